"""Mini-batches: 784-256-10, ReLU, batches of 32, Adam.

The plain way is one module, a DataLoader over a TensorDataset, torch's default Adam, loss and accuracy by `.item()` at each step; a better one keeps its tensors in memory and
takes torch's fused Adam, module after module. Ours and JAX take 32 shuffled batches a call. "ours, torch" is the same by torch on stacked replicas. Whole runs go through
`Learner`, with shuffling, loss and accuracy. On standardised pixels from the start; and one replica on raw pixels 0 … 255 after an epoch, when half of the units are silent
and their moments decay into denormal numbers, which our runs round to zero and a plain loop does not.
"""
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lop_nb.config import Adam
from lop_nb.learner import Learner
from lop_nb.streams import PermutedPixels

from . import jaxed, limits, ours
from .core import Missing, Row, Way
from .data import digits28, few

B, STEPS = 32, 32


def pixels(how, n):
    d = digits28()
    return d.scale(d.train.x[:n], how).flatten(1), d.train.y[:n].long()


def module(weights, r=0):
    net = nn.Sequential(nn.Linear(784, weights[0][0].shape[1]), nn.ReLU(), nn.Linear(weights[0][0].shape[1], 10))
    with torch.no_grad():
        for layer, (w, b) in zip((net[0], net[2]), weights): layer.weight.copy_(torch.as_tensor(w[r])); layer.bias.copy_(torch.as_tensor(b[r]))
    return net


def plain(weights, x, y, skip=0):
    net, loss_of = module(weights), nn.CrossEntropyLoss()
    opt, loader, seen = torch.optim.Adam(net.parameters()), DataLoader(TensorDataset(x, y), batch_size=B, shuffle=True, drop_last=True), [0., 0]
    def forever():
        while True: yield from loader
    batches = forever()
    def run():
        for _ in range(STEPS):
            a, b = next(batches)
            out = net(a); loss = loss_of(out, b)
            opt.zero_grad(); loss.backward(); opt.step()
            seen[0] += loss.item(); seen[1] += (out.argmax(1) == b).sum().item()
    for _ in range(skip // STEPS): run()
    return run, STEPS * B


def picks(n, R, seed=0):
    "Endless blocks of shuffled rows, int64 [R, STEPS * B]"
    g = torch.Generator().manual_seed(seed)
    while True:
        order = torch.stack([torch.randperm(n, generator=g) for _ in range(R)])
        yield from order[:, :n // (STEPS * B) * STEPS * B].split(STEPS * B, 1)


def modules(weights, x, y, R, fused):
    "Modules in turn, a block of steps each, tensors in memory"
    nets = [module(weights, r) for r in range(R)]; opts = [torch.optim.Adam(n.parameters(), fused=fused) for n in nets]
    rows, loss_of = picks(len(x), R), nn.CrossEntropyLoss(reduction="none")
    def step(net, opt, a, b):
        each = loss_of(net(a), b)
        opt.zero_grad(); each.mean().backward(); opt.step()
        return each.detach()
    def run():
        pick = next(rows)
        return [torch.cat([step(net, opt, x[i], y[i]) for i in p.split(B)]) for net, opt, p in zip(nets, opts, pick)]
    return run, R * STEPS * B


def blocks(x, y, R):
    rows = picks(len(x), R)
    def turn():
        pick = next(rows)
        return x[pick], y[pick]
    return turn


def kernel(weights, x, y, R, skip=0, **kw):
    job = ours.job((784, weights[0][0].shape[1], 10), weights, Adam(**kw), "cross_entropy", B)
    return warmed(ours.fused(ours.family("Batches", job), blocks(x, y, R)), skip), R * STEPS * B


def stacked(weights, x, y, R, implementation, skip=0):
    job = ours.job((784, weights[0][0].shape[1], 10), weights, Adam(implementation=implementation), "cross_entropy", B)
    return warmed(ours.torch_steps(job, blocks(x, y, R)), skip), R * STEPS * B


def warmed(run, skip):
    for _ in range(skip // STEPS): run()
    return run


def peer(weights, x, y, R, skip=0):
    jaxed.need()
    jnp, turn = jaxed.jnp, picks(len(x), R)
    trainer, jx, jy = jaxed.Trainer(weights, "relu", jaxed.cross_entropy, jaxed.adam(1e-3)), jnp.array(x.numpy()), jnp.array(y.int().numpy())
    def run():
        pick = jnp.array(next(turn).numpy().reshape(R, STEPS, B).swapaxes(0, 1))
        return trainer(jx[pick], jy[pick]).reshape(R, -1)[:, :100]
    return warmed(run, skip), R * STEPS * B


def whole(weights, R, n, how, engine, implementation="foreach", epochs=1):
    if "engine" not in Learner.__init__.__code__.co_varnames: raise Missing("the learner has no engines yet")
    stream = PermutedPixels(few(n), tasks=1, normalize=how, seeds=range(R))
    return ours.whole(stream, (784, weights[0][0].shape[1], 10), Adam(implementation=implementation), weights, engine, batch_size=B, epochs=epochs), R * n * epochs


def flops(units, R, made):
    "Matrix products, and Adam's roots and divisions"
    per_example, weights = 2 * (2*784*units + 3*10*units), 795*units
    step = B * per_example / limits.peak_flops() + weights / limits.root_rate()
    return B / step, f"{per_example / 1e6:.3g} Mflop an example at the peak of a matrix product, and {weights:,} roots and divisions a step"


def row(name, R, how, quick):
    units, n = (32, 2048) if quick else (256, 20_480)
    skip = 0 if how == "standardize" else 64 if quick else 1700
    weights, (x, y) = ours.he((784, units, 10), R), pixels(how, n)
    ways = {"plain DataLoader loop": Way("plain", lambda: plain(weights, x, y, skip), same=False),
            "modules, fused Adam": Way("also", lambda: (warmed(*modules(weights, x, y, R, True)[:1], skip), R * STEPS * B)),
            "modules, default Adam": Way("also", lambda: (warmed(*modules(weights, x, y, R, False)[:1], skip), R * STEPS * B)),
            "ours": Way("ours", lambda: kernel(weights, x, y, R, skip)),
            "ours, torch": Way("also", lambda: stacked(weights, x, y, R, "foreach", skip)),
            "ours, torch, fused": Way("also", lambda: stacked(weights, x, y, R, "fused", skip)),
            "JAX": Way("peer", lambda: peer(weights, x, y, R, skip))}
    if how == "standardize":
        m = 1024 if quick else 10_240
        ways |= {"ours, whole run": Way("also", lambda: whole(weights, R, m, how, "numba"), same=False),
                 "ours, whole run, torch": Way("also", lambda: whole(weights, R, m, how, "torch"), same=False),
                 "ours, whole run, vmap": Way("also", lambda: whole(weights, R, m, how, "vmap"), same=False)}
    if skip:                                                     # rounding has parted them by then
        for w in ways.values(): w.same = False
    goals = {("ours", "plain DataLoader loop"): 3., ("ours", "modules, fused Adam"): 2., ("ours", "JAX"): .9 if R == 1 else 1.1, ("ours, torch, fused", "plain DataLoader loop"): 1.4}
    return Row(name, f"784-{units}-10, batches of {B}, Adam 0.001, {R} replica{'s'*(R > 1)}" + (f", raw pixels after {skip} steps" if skip else ""),
               ways, goals, partial(flops, units, R))


def rows(quick=False):
    settings = [(1, "standardize")] if quick else [(1, "standardize"), (4, "standardize"), (16, "standardize"), (1, "raw255")]
    return {name: partial(row, name, R, how, quick) for R, how in settings for name in [f"batches-R{R}" + ("-raw" if how == "raw255" else "")]}
