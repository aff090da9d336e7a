"""Bit flipping: one hidden layer, batch 1, squared error, SGD; 20 bits, of which 15 stand still.

The plain way is `learn()` of the published algorithm, example after example. Ours reads one number an example and the table of the 32 inputs that there are between two flips,
which is how the learner gets them from `BitFlips`; "written out" reads all bits of each example, as the plain way does, and JAX, for which codes are no faster. JAX has its steps
in the order of time, which is up to twice as fast as replica by replica. "ours, whole run" also draws the stream and keeps the records.
"""
from functools import partial

from lop_nb.bitflips import BitFlips
from lop_nb.config import SGD
from lop_nb.learner import Learner

from . import jaxed, limits, ours, reference
from .core import Missing, Row, Way

LR = .01


def tasks(R, n, many):
    "Blocks of a stream: [(table [R, 32, 20], targets [R, 32], codes int64 [R, n]), …]"
    stream = BitFlips(tasks=many, examples=n, seeds=range(R))
    return [(v.x, v.y, v.rows.long()) for v in (stream[k].train for k in range(many))]


def written(blocks):
    "[(x [R, n, 20], y [R, n]), …]"
    return [(x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1])), y.gather(1, rows)) for x, y, rows in blocks]


def plain(blocks, weights, cbp, n):
    first = [(w[0], b[0]) for w, b in weights]
    layers = reference.network(first)
    learner = reference.ContinualBackprop(layers, LR) if cbp else reference.Backprop(layers, LR)
    turn = ours.Turn([(x[0, i:i + n], y[0, i:i + n, None]) for x, y in blocks for i in range(0, x.shape[1] - n + 1, n)][:200])
    def run():
        x, y = turn()
        return [[learner.learn(x[i:i+1], y[i:i+1])[0] for i in range(n)]]
    return run, n


def kernel(blocks, weights, sizes, cbp, coded=False, threads=1):
    k = ours.family("Shallow", ours.job(sizes, weights, spec(), "squared", extra=ours.inside(cbp), threads=threads))
    given = [((x, rows), y) for x, y, rows in blocks] if coded else written(blocks)
    return ours.fused(k, given), blocks[0][2].numel()


def stacked(blocks, weights, sizes, cbp, n):
    job = ours.job(sizes, weights, spec(), "squared", extra=ours.inside(cbp))
    return ours.torch_steps(job, [(x[:, :n], y[:, :n]) for x, y in written(blocks)]), n * len(weights[0][0])


def peer(blocks, weights, cbp, unroll):
    jaxed.need()
    trainer = jaxed.Trainer(weights, "relu", jaxed.squared, jaxed.sgd(LR), jaxed.ContinualBackprop(weights) if cbp else None, unroll)
    turn = ours.Turn([jaxed.steps_first(x, y) for x, y in written(blocks)])
    def run():
        losses = trainer(*turn())
        return losses[:, :100, 0]
    return run, blocks[0][2].numel()


def whole(R, sizes, cbp, many, n=10_000):
    if "engine" not in Learner.__init__.__code__.co_varnames: raise Missing("the learner has no engines yet")
    stream = BitFlips(tasks=many, examples=n, seeds=range(R))
    return ours.whole(stream, sizes, spec(), ours.he(sizes, R), "numba", extra=list(ours.inside(cbp).values())), R * many * n


def spec(): return SGD(lr=LR, momentum=0.)


def row(R, units, cbp, quick=False):
    "A row: R replicas of 20-units-1"
    sizes, n = (20, units, 1), max(200, (400 if quick else 20_000) // (1 if R == 1 else 10))
    weights, blocks = ours.he(sizes, R), tasks(R, n, 2 if quick else 4)
    made = written(blocks[:1] if quick else blocks)
    kind, short = ("continual backprop", "cbp") if cbp else ("backprop", "bp")
    ways = {"plain learn()": Way("plain", lambda: plain(made, weights, cbp, 50 if quick else 200)),
            "ours": Way("ours", lambda: kernel(blocks, weights, sizes, cbp, coded=True)),
            "ours, two threads": Way("also", lambda: kernel(blocks, weights, sizes, cbp, coded=True, threads=2)),
            "ours, written out": Way("also", lambda: kernel(blocks, weights, sizes, cbp)),
            "ours, torch": Way("also", lambda: stacked(blocks, weights, sizes, cbp, 20 if quick else 100)),
            "ours, whole run": Way("also", lambda: whole(R, sizes, cbp, 2 if quick else max(6, 100 // R), 100 if quick else 10_000), same=False),
            "JAX": Way("peer", lambda: peer(blocks, weights, cbp, 4 if R == 1 else 1))}
    if R == 1: ways.pop("ours, two threads")
    if R > 16: ways.pop("ours, torch")
    least = {(5, False): 1500, (100, False): 800, (5, True): 1500, (100, True): 600}.get((units, cbp), None) if R == 1 else 8000 if (R, units) == (256, 5) else None
    goals = ({("ours", "JAX"): 3.} if R == 1 or (R, units) == (256, 5) else {}) | ({("ours", "plain learn()"): float(least)} if least else {})
    flops = 2 * 3 * (20 * units + units) - 2 * 20 * units   # forward, backward (not to the inputs), update
    return Row(f"bits-{short}-{units}-R{R}", f"bit flipping, 20-{units}-1, {kind}, SGD {LR}, batch 1, {R} replica{'s'*(R > 1)}", ways, goals, partial(limits.flops, flops),
               note="" if not cbp else "JAX and ours get the new weights drawn in the block's beginning (ours) or before the clock starts (JAX).")


def rows(quick=False):
    settings = [(1, 5, False), (1, 5, True)] if quick else [(R, units, cbp) for cbp in (False, True) for R, units in ((1, 5), (1, 50), (1, 100), (16, 5), (256, 5), (256, 50))]
    return {f"bits-{'cbp' if cbp else 'bp'}-{units}-R{R}": partial(row, R, units, cbp, quick) for R, units, cbp in settings}
