"""Our ways: a compiled kernel through its `Family`, torch's steps on stacked replicas, and whole runs through `Learner`.

All ways of a row begin with the same weights, drawn here as the published code draws them (Kaiming uniform, zero biases).
"""
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lop_nb.interventions import ContinualBackprop
from lop_nb.kernels import Cannot, Job
from lop_nb.learner import Learner, Online
from lop_nb.models import MLP
from lop_nb.optimizers import make_optimizer
from lop_nb.replicas import Replicas
from lop_nb.runtime import flush_denormals

from .core import Missing

published = dict(replacement_rate=1e-4, maturity_threshold=100, decay=.99, utility="adaptable_contribution")   # of continual backprop


def he(sizes, R, seed=0):
    "[(W [R, out, in], b [R, out]), …]: Kaiming uniform, with the gain of a rectifier but in the last layer; zero biases"
    rng, last = np.random.default_rng(seed), len(sizes) - 2
    bound = lambda i: ((3 if i == last else 6) / sizes[i])**.5
    return [((rng.uniform(-1, 1, (R, sizes[i + 1], sizes[i])) * bound(i)).astype("float32"), np.zeros((R, sizes[i + 1]), "float32")) for i in range(last + 1)]


def make_net(sizes, act="relu"):
    net = MLP(sizes[0], sizes[-1], hidden_sizes=list(sizes[1:-1]), activation=act, normalization="none", dropout_p=0.)
    for m in net.children():
        if isinstance(m, nn.LeakyReLU): m.negative_slope = .01
    return net


def nets_of(sizes, weights, act="relu", strategy="loop"):
    "`Replicas` with these weights"
    nets = Replicas(lambda: make_net(sizes, act), range(len(weights[0][0])), strategy)
    load(nets, weights)
    return nets


@torch.no_grad()
def load(nets, weights):
    for p, w in zip(nets.params.values(), [p for wb in weights for p in wb]): p.copy_(torch.as_tensor(w))


def inside(cbp=None, clip=None):
    "{kind: callback} of what a step does besides"
    out = {}
    if cbp: out["continual_backprop"] = ContinualBackprop(**published | ({} if cbp is True else cbp))
    if clip:
        try: out["weight_clipping"] = import_module("lop_nb.remedies").WeightClipping(bound=clip)
        except (ImportError, AttributeError): raise Missing("weight clipping is not there yet") from None
    return out


def job(sizes, weights, spec, loss, batch_size=1, act="relu", extra=None, threads=1):
    nets, extra = nets_of(sizes, weights, act), extra or {}
    per_element = any(c.resets_units for c in extra.values())
    job = Job(nets, spec, make_optimizer(spec, nets.params, per_element, [g["noise"] for g in nets.generators]), loss, batch_size, extra, threads)
    for c in extra.values(): c.before_fit(SimpleNamespace(replicas=nets, optimizer=job.optimizer))
    return job


def family(name, job):
    "A kernel bound to the job; `Missing` where there is none"
    module = dict(Shallow="kernels", Active="active", Batches="minibatch")[name]
    try: make = getattr(import_module(f"lop_nb.{module}"), name)
    except (ImportError, AttributeError): raise Missing(f"the kernel {name} is not there yet") from None
    try: return make(job)
    except Cannot as why: raise Missing(f"{name}: {why}") from None


def fused(kernel, blocks):
    "run() for a kernel and [(x, y), …] or a function that gives the next: one block a call"
    turn = blocks if callable(blocks) else Turn(blocks)
    def run():
        with flush_denormals(): return kernel(*turn())[0]
    run.kernel = kernel
    return run


class Turn:
    "The blocks one after the other, over and over"
    def __init__(self, blocks): self.blocks, self.at = blocks, -1
    def __call__(self):
        self.at = (self.at + 1) % len(self.blocks)
        return self.blocks[self.at]


def torch_steps(job, blocks):
    "run(): the same steps by torch on stacked replicas, as the learner's torch engine takes them"
    turn, cs = blocks if callable(blocks) else Turn(blocks), list(job.inside.values())
    reads = tuple(n for c in cs for n in c.reads)
    def step(x, y):
        out, seen = job.nets(x, reads) if reads else (job.nets(x), {})
        loss = (out[..., 0] - y).square() if job.loss == "squared" else F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        job.nets.backward(loss); job.optimizer.step()
        for c in cs: c.after_step(SimpleNamespace(replicas=job.nets, seen=seen, optimizer=job.optimizer))
        return loss.detach()
    def run():
        x, y = turn()
        with flush_denormals(): return torch.cat([step(a, b) for a, b in zip(x.split(job.batch_size, 1), y.split(job.batch_size, 1))], 1)
    return run


def whole(stream, sizes, spec, weights, engine, batch_size=1, act="relu", extra=(), callbacks=(), online=Online, epochs=1):
    "run(): a whole run of a stream by `Learner`, from new networks to its last record"
    def run():
        nets = Replicas(lambda: make_net(sizes, act), stream.seeds); load(nets, weights)
        kw = {} if engine is None else dict(engine=engine)
        learner = Learner(nets, stream, spec, epochs=epochs, batch_size=batch_size, callbacks=[*extra, *callbacks], defaults=[online()] if online else [], **kw)
        learner.fit()
        run.learner = learner
    return run
