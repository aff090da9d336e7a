"""What the machine itself can do: arithmetic by a matrix product, bandwidth by reading and by changing an array in place. Measured in the run that quotes them."""
import statistics
import time
from functools import lru_cache

import numpy as np

try: import numba
except ImportError: numba = None


def seconds(f, times=3):
    "Median processor seconds of f()"
    f(); took = []
    for _ in range(times): began = time.process_time(); f(); took.append(time.process_time() - began)
    return statistics.median(took)


@lru_cache
def array(mib): return np.ones(mib * 2**18, np.float32)


def compiled(f): return numba.njit(fastmath=True, error_model="numpy")(f) if numba else f


@compiled
def roots(a, often):
    for _ in range(often):
        for i in range(len(a)): a[i] = np.float32(1) / (np.sqrt(a[i]) + np.float32(1e-8))


def peak_flops(n=1024):
    "Floating point operations a second of one core, float32: a matrix product's"
    a, b, c = (np.ones((n, n), np.float32) for _ in range(3))
    return 2 * n**3 / seconds(lambda: np.dot(a, b, out=c))


def bandwidth(mib):
    "Bytes of array a second, float32, one core: (read, changed in place)"
    a, often = array(mib), max(1, 256 // mib)
    def read():
        for _ in range(often): np.dot(a, a)
    def change():
        for _ in range(often): np.multiply(a, np.float32(1.), out=a)
    return a.nbytes * often / seconds(read), a.nbytes * often / seconds(change)


def root_rate():
    "Square roots with a division each, a second, of numbers in the first cache"
    if not numba: return float("inf")
    a, often = np.ones(4096, np.float32), 2000
    return len(a) * often / seconds(lambda: roots(a, often))


def flops(per_example, made):
    rate = peak_flops() / per_example
    return rate, f"{per_example / 1e3:.3g} kflop an example at the peak of a matrix product"


def streaming(read, changed, mib, made):
    "Examples a second if an example reads so many bytes and changes so many others: each read or changed once, at the speed of an array of `mib`"
    r, c = bandwidth(mib)
    return 1 / (read / r + changed / c), f"{read / 1e6:.3g} MB read and {changed / 1e6:.3g} MB changed an example, at {r / 1e9:.1f} and {c / 1e9:.1f} GB/s ({mib} MiB array)"


def adam(weights, made, mib=4):
    "Adam on so many weights: its memory read and changed once an example, from the cache that holds it, or its roots and divisions"
    by_memory, words = streaming(4 * weights, 12 * weights, mib, made); by_roots = root_rate() / weights
    return min(by_memory, by_roots), f"{words}; roots and divisions alone {by_roots:,.0f} a second"
