"""What the machine itself can do: arithmetic by a matrix product, bandwidth by reading and by changing an array in place. Measured in the run that quotes them."""
import statistics
import time
from functools import lru_cache

import numpy as np

try: import numba
except ImportError: numba = None


def best(f, times=7):
    "Median seconds of f()"
    f(); took = []
    for _ in range(times): began = time.process_time(); f(); took.append(time.process_time() - began)
    return statistics.median(took)


def peak_flops(n=1024):
    "Floating point operations a second of one core, float32: a matrix product's"
    a, b, c = (np.ones((n, n), np.float32) for _ in range(3))
    return 2 * n**3 / best(lambda: np.dot(a, b, out=c))


def bandwidth(mib=512):
    "Bytes of array a second, float32, one core: (read, changed in place)"
    a = np.ones(mib * 2**18, np.float32); often = max(1, 256 // mib)
    def read():
        for _ in range(often): total(a)
    def change():
        for _ in range(often): np.multiply(a, np.float32(1.), out=a)
    return a.nbytes * often / best(read), a.nbytes * often / best(change)


if numba:
    @numba.njit(fastmath=True, cache=False)
    def total(a):
        s = np.float32(0)
        for v in a: s += v
        return s
else:
    def total(a): return np.dot(a, a)


def flops(per_example, made):
    rate = peak_flops() / per_example
    return rate, f"{per_example / 1e3:.3g} kflop an example at the peak of a matrix product"


def streaming(read, changed, mib, made):
    "Examples a second if an example reads so many bytes and changes so many others: each read or changed once, at the speed of an array of `mib`"
    r, c = bandwidth(mib)
    return 1 / (read / r + changed / c), f"{read / 1e6:.3g} MB read and {changed / 1e6:.3g} MB changed an example, at {r / 1e9:.1f} and {c / 1e9:.1f} GB/s ({mib} MiB array)"
