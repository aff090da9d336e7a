"""Streams of single pictures: online permuted MNIST (three hidden layers, SGD) and the streams of the weight-clipping paper (784-300-150-10, Adam).

The plain way is `learn()` of the published algorithm. The active kernel touches only the rows of a matrix whose input is not zero, so its speed depends on the share of
zeros: the row's limit counts the bytes of the rows that are touched on these pictures by this network, read once on the way forward, read and written once on the way back.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lop_nb.config import SGD, Adam
from lop_nb.learner import Learner
from lop_nb.streams import PermutedPixels

from . import jaxed, limits, ours, reference
from .core import Missing, Row, Way
from .data import digits28, few


def pictures(n, how):
    "x [1, n, 784] and y [1, n]: pixels as the published runs take them, 0 … 1, or symmetric, −1 … 1"
    d = digits28().train
    x = d.x[:n].flatten(1).float() / 255
    return (x if how == "unit" else 2*x - 1)[None], d.y[None, :n].long()


class Clipped(reference.Backprop):
    "Adam, and after each step every weight and bias within ±κ/√fan_in"
    bound = None
    def learn(self, x, y):
        out = super().learn(x, y)
        if self.bound is None: return out
        with torch.no_grad():
            for layer in self.layers[::2]:
                edge = self.bound / math.sqrt(layer.in_features)
                layer.weight.clamp_(-edge, edge); layer.bias.clamp_(-edge, edge)
        return out


def plain(s, x, y, n):
    layers = reference.network([(w[0], b[0]) for w, b in s.weights()], partial(nn.LeakyReLU, .01) if s.act == "leaky_relu" else nn.ReLU)
    if s.cbp: learner = reference.ContinualBackprop(layers, s.lr, F.cross_entropy)
    else: learner = Clipped(layers, s.lr, F.cross_entropy, torch.optim.Adam if s.adam else torch.optim.SGD); learner.bound = s.clip
    turn = ours.Turn([(x[0, i:i + n], y[0, i:i + n]) for i in range(0, x.shape[1] - n + 1, n)])
    def run():
        x, y = turn()
        return [[learner.learn(x[i:i+1], y[i:i+1])[0] for i in range(n)]]
    return run, n


def kernel(s, x, y, n):
    job = s.job()
    run = ours.fused(ours.family("Active", job), list(zip(x.split(n, 1), y.split(n, 1))))
    run.job = job
    return run, n


def stacked(s, x, y, n): return ours.torch_steps(s.job(), list(zip(x.split(n, 1), y.split(n, 1)))), n


def peer(s, x, y, n):
    jaxed.need()
    optimizer = jaxed.adam(s.lr, clip=s.clip) if s.adam else jaxed.sgd(s.lr)
    trainer = jaxed.Trainer(s.weights(), s.act, jaxed.cross_entropy, optimizer, jaxed.ContinualBackprop(s.weights(), steps=20_000, fresh=16) if s.cbp else None)
    turn = ours.Turn([jaxed.steps_first(a, b.int()) for a, b in zip(x.split(n, 1), y.split(n, 1))])
    return lambda: trainer(*turn())[:, :100, 0], n


def whole(s, n):
    if "engine" not in Learner.__init__.__code__.co_varnames: raise Missing("the learner has no engines yet")
    stream = PermutedPixels(few(n), tasks=1, normalize="unit")
    return ours.whole(stream, s.sizes, s.spec(), s.weights(), "numba", act=s.act, extra=list(ours.inside(s.cbp, s.clip).values())), n


class Setting:
    "What a row trains, and how its ways begin"
    def __init__(self, sizes, lr, adam=False, cbp=False, clip=None, act="relu", how="unit"):
        self.sizes, self.lr, self.adam, self.cbp, self.clip, self.act, self.how = sizes, lr, adam, cbp, clip, act, how
    def spec(self): return Adam(lr=self.lr) if self.adam else SGD(lr=self.lr, momentum=0.)
    def weights(self): return ours.he(self.sizes, 1)
    def job(self): return ours.job(self.sizes, self.weights(), self.spec(), "cross_entropy", act=self.act, extra=ours.inside(self.cbp, self.clip))
    @property
    def count(self): return sum(a*b + b for a, b in zip(self.sizes, self.sizes[1:]))


@torch.no_grad()
def touched(job, x):
    "Bytes of the weights whose input is not zero, of the mean example x [1, n, in]"
    net, total = job.nets.modules[0], 0.
    h = x[0]
    for m in net.children():
        if isinstance(m, nn.Linear): total += (h != 0).sum(1).float().mean().item() * m.out_features * 4
        h = m(h)
    return total


def bound(s, x, made):
    if s.adam: return limits.adam(s.count, made)
    size, part = 4 * s.count, touched(made["ours"].job, x)
    rate, words = limits.streaming(part, part, 512 if size > 2**23 else 1, made)
    return rate, f"{words}; {part / size:.0%} of the weights touched"


def row(name, what, s, n, goals, pace, quick):
    "n: pictures in a block of ours; pace: of the slow ways"
    x, y = pictures(8*n, s.how)
    ways = {"plain learn()": Way("plain", lambda: plain(s, x, y, pace)),
            "ours": Way("ours", lambda: kernel(s, x, y, n)),
            "ours, torch": Way("also", lambda: stacked(s, x, y, pace)),
            "ours, whole run": Way("also", lambda: whole(s, n if quick else 128 if s.count > 10**6 else 20_480), same=False),
            "JAX": Way("peer", lambda: peer(s, x, y, n))}
    return Row(name, what, ways, goals, partial(bound, s, x[:, :min(64, n)]))


def rows(quick=False):
    out = {}
    for width in [20] if quick else [2000, 100]:
        for cbp in (False, True):
            n, pace = (16, 4) if quick else (64, 8) if width == 2000 else (1000, 50)
            least = {(2000, False): 5., (2000, True): 9., (100, False): 25., (100, True): 30.}.get((width, cbp))
            name, kind = f"online-{'cbp' if cbp else 'bp'}-{width}", "continual backprop" if cbp else "backprop"
            goals = ({("ours", "plain learn()"): least} if least else {}) | ({("ours", "limit"): .75} if width == 2000 else {})
            s = Setting((784, width, width, width, 10), .003, cbp=cbp)
            out[name] = partial(row, name, f"online permuted MNIST, 784-{width}-{width}-{width}-10, {kind}, SGD 0.003, batch 1", s, n, goals, pace, quick)
    for clip in (None, 1.):
        n, pace = (16, 4) if quick else (500, 50)
        sizes = (784, 20, 10) if quick else (784, 300, 150, 10)
        name, s = f"online-adam{'-clipping' if clip else ''}", Setting(sizes, 1e-4, adam=True, clip=clip, act="leaky_relu", how="symmetric")
        out[name] = partial(row, name, f"input-permuted MNIST, {'-'.join(map(str, sizes))}, leaky ReLU, Adam 0.0001{', weight clipping' if clip else ''}, batch 1, pixels in [−1, 1]", s, n, {}, pace, quick)
    return out
