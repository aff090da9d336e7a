"Rows A72 and A73 of the sources: the stream and the target of slowly-changing regression."
import torch

from lop_nb.bitflips import BitFlips

ALL = lambda view: torch.arange(view.n).expand(len(view.rows), -1)


def test_A72_one_slow_bit_flips_between_tasks():
    "m = 20 bits, f = 15 of them slow: constant within T examples, exactly one flip per T, and the others random each step"
    stream = BitFlips(tasks=60, examples=200, seeds=[3, 5, 8]); before = None
    for task in stream:
        x, y = task.train.fetch(ALL(task.train)); slow = x[..., :15]
        assert (slow == slow[:, :1]).all() and set(x.unique().tolist()) == {0., 1.}
        assert torch.equal(y, stream.target(x)) and x.shape == (3, 200, 20) and x.dtype == y.dtype == torch.float32
        if before is not None: assert ((slow[:, 0] != before).sum(1) == 1).all()
        before = slow[:, 0]
    flips = torch.stack([stream.flips(s, 59) for s in stream.seeds])
    assert len(flips.unique()) == 15 and not torch.equal(flips[0], flips[1])


def slow_target(target, r, x):
    "one input of one replica, from the definition, in Python's own numbers"
    m = len(x); total = target.v[r, -1].item()
    for w, v in zip(target.w[r].tolist(), target.v[r].tolist()):
        S = sum(a < 0 for a in w[:m]) - .5*w[m]
        if sum(a*b for a, b in zip(w, [*x, 1])) > (m + 1)*target.beta - S: total += v
    return total


def test_A73_the_target_is_a_fixed_network_of_threshold_units():
    "±1 weights, 100 units that fire strictly above θ = (m+1)β − S, ±1 output weights and bias; recomputed one input at a time"
    stream = BitFlips(tasks=5, examples=50, seeds=[3, 5])
    for k in 0, 4:
        x, y = stream[k].test.fetch(ALL(stream[k].test))
        for r in range(2):
            for i in range(0, 32, 3): assert y[r, i].item() == slow_target(stream.target, r, x[r, i].tolist())
    assert stream.target.w.shape == (2, 100, 21) and stream.target.v.shape == (2, 101)
    assert set(stream.target.w.unique().tolist()) == set(stream.target.v.unique().tolist()) == {-1., 1.}
    assert stream.target.w.mean().abs() < .1
