"""What keeping records costs: the same run of `Learner` with every step's loss (and accuracy) kept and written, against one that keeps nothing."""
from functools import partial

from lop_nb.bitflips import BitFlips
from lop_nb.config import SGD, Adam
from lop_nb.learner import Online
from lop_nb.streams import PermutedPixels

from . import ours
from .core import Missing, Row, Way
from .data import few


def run(make_stream, sizes, spec, n, R, bin, on, **kw):
    if bin and "bin" not in Online.__init__.__code__.co_varnames: raise Missing("the learner does not keep bins yet")
    online = (partial(Online, bin=bin) if bin else Online) if on else None
    return ours.whole(make_stream(), sizes, spec, ours.he(sizes, R), "numba", online=online, **kw), n


def row(name, what, *args, **kw):
    ways = {"records off": Way("plain", lambda: run(*args, on=False, **kw), same=False), "ours": Way("ours", lambda: run(*args, on=True, **kw), same=False)}
    return Row(name, what, ways, {("ours", "records off"): .95}, finer=4)


def rows(quick=False):
    flips, some = (2, 4 if quick else 400), 64 if quick else 20_480
    bits = lambda R: lambda: BitFlips(tasks=max(2, flips[1] // R), examples=100 if quick else 10_000, seeds=range(R))
    sgd, wide = SGD(lr=.003, momentum=0.), 20 if quick else 2000
    return {
        "records-bits": lambda: row("records-bits", "bit flipping, 20-5-1, backprop: the loss of every 1000 examples", bits(1), (20, 5, 1), SGD(lr=.01, momentum=0.), max(2, flips[1]) * (100 if quick else 10_000), 1, 10 if quick else 1000),
        "records-online": lambda: row("records-online", f"online permuted MNIST, width {wide}, backprop: loss and accuracy of every example", lambda: PermutedPixels(few(64 if quick else 256), tasks=1, normalize="unit"), (784, wide, wide, wide, 10), sgd, 64 if quick else 256, 1, 1),
        "records-batches": lambda: row("records-batches", "784-256-10, batches of 32, Adam: loss and accuracy of every batch", lambda: PermutedPixels(few(some), tasks=1, normalize="unit"), (784, 256, 10), Adam(), some, 1, 32, batch_size=32)}
