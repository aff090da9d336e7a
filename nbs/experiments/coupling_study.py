"""Two units of one layer made nearly the same, the runs behind results/coupling.parquet and coupling_losses.parquet: `OMP_NUM_THREADS=1 python nbs/experiments/coupling_study.py` (a minute and a half of one core)

Networks of two layers of 12 units; in one of the layers unit 1 begins as unit 0 times 1 + εz, z normal, in what it reads and what it writes. 300 steps of size 0.1 on 300 digits, then 300 on the same with permuted pixels.
Every 20 steps `escape.coupling` is asked on all examples, before the step: cosines, inner products, distance d = w₁ − w₂, and the restricted Hessian K, of what is read, what is written, and both. It *says* that ‖d‖ grows at the rate
−dᵀKd / 2‖d‖² − λ, where λ is the weight decay. What *came* is the growth of log ‖d‖ in the step, per unit of step size × steps; and `later`, the same over 20 steps. Seeds 10 to 19.

Written before this run, after trial runs with seeds 0 to 3, without decay:
1. By both sides together the sign of what came is said rightly in at least 95 % of the cases with tanh, and in 90 % with ReLU, in full batches.
2. Most pairs expand, so that a constant answer is also nearly always right. With λ = .015 both fates are common; there the mean of the shares right among contractions and among expansions is above .9 with tanh and .8 with ReLU.
3. By one side alone (as row A70 asks: eigenvalues for in- and outgoing weights) its own distance's fate is said wrongly more often than not: K of one side is mostly positive, and what drives a pair apart is that a difference in what is written makes a difference in what is read, and that in turn.
4. With mini-batches of 16 fewer signs of a single step are right.
5. Wherever a ReLU pair's sign is wrong in full batches, an example lies between its kinks before or after the step.
"""
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from lop_nb.data import load
from lop_nb.escape import coupling, held, loss_of, opposed_losses
from lop_nb.models import MLP
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator
from lop_nb.units import gather, scatter

seeds, lr, steps, every, examples, pair = range(10, 20), .1, 300, 20, 300, (0, 1)
grid = [dict(activation=a, layer=layer, ε=1e-3, batch=b, decay=λ) for a in ("relu", "tanh") for layer in (0, 1) for b, λ in ((0, 0.), (16, 0.), (0, .015))] + [dict(activation=a, layer=0, ε=.1, batch=0, decay=0.) for a in ("relu", "tanh")]
moments, sizes = {"task 1, start": 0, "task 1, end": steps - every, "task 2, start": steps, "task 2, end": 2*steps - every}, torch.linspace(-1, 1, 21)
OUT = Path(__file__).parent/"results"
measured = ["inner", "distance", "first", "second", "bottom", "top", "along", "drift", "said", "came", "later"]

DIGITS = load("digits").train; X, Y = (DIGITS.x.double() / DIGITS.x.max()).flatten(1)[:examples], DIGITS.y[:examples]


def loss(z, y): return F.cross_entropy(z.mT, y, reduction="none")


def networks(activation, layer, ε, **_):
    "Of two layers of 12 units, in one of which unit 1 is unit 0 up to ε; its graph's group"
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[12, 12], activation=activation, normalization="none", dropout_p=0.), seeds, "vmap", dtype=torch.float64); group = nets.graph[f"act_{layer}"]
    for s in group.reads + group.writes:
        to = torch.full((len(nets), 1), pair[1]); v = gather(nets.params, s, 0*to + pair[0]).detach()
        scatter(nets.params, s, to, v * (1 + ε * torch.stack([torch.randn(v[0].shape, generator=generator(r, "pair", s.param), dtype=v.dtype) for r in seeds])))
    return nets, group


def tasks():
    "The digits, and the digits with their pixels permuted, a permutation for each seed"
    order = torch.stack([torch.randperm(64, generator=generator(s, "task", 1)) for s in seeds])[:, None].expand(-1, examples, -1)
    x = X.expand(len(seeds), -1, -1)
    return x, x.gather(2, order)


def gaps(nets, group):
    "‖w₁ − w₂‖ on each side"
    slices = {"in": group.reads, "out": group.writes, "both": group.reads + group.writes}
    return {k: (held(nets.params, s, pair[0]) - held(nets.params, s, pair[1])).norm(dim=1).detach() for k, s in slices.items()}


def between(nets, layer, x):
    "Examples on which one of the pair's pre-activations is positive and the other is not"
    z = nets(x, [f"linear_{layer}"])[1][f"linear_{layer}"] > 0
    return (z[..., pair[0]] != z[..., pair[1]]).sum(1)


def valley(nets, group, x, y, at):
    "What the loss gains when the units are moved by ±size along d/‖d‖, from where they are"
    params = {k: p.detach() for k, p in nets.params.items()}; every = group.reads + group.writes; d = held(params, every, pair[0]) - held(params, every, pair[1])
    unit = d / d.norm(dim=1, keepdim=True); f = loss_of(nets, x, y, loss); here = f(params).detach()
    return pd.DataFrame([dict(at=at, seed=s, size=t.item(), rise=v) for t, row in zip(sizes, opposed_losses(f, params, every, pair, unit, sizes.double()) - here) for s, v in zip(seeds, row.tolist())])


def run(case):
    nets, group = networks(**case); b, rows, valleys, began = case["batch"], [], [], time.time(); opt = torch.optim.SGD(nets.params.values(), lr, weight_decay=case["decay"])
    gens, xs, y = [generator(s, "order") for s in seeds], tasks(), Y.expand(len(seeds), -1)
    for t in range(2*steps):
        x = xs[t // steps]; i = torch.stack([torch.randperm(examples, generator=g)[:b or examples] for g in gens])
        if t % every == 0:
            said, before, kinks = coupling(nets, group, pair, x, y, loss, [generator(s, "lanczos", t) for s in seeds], 16), gaps(nets, group), between(nets, case["layer"], x)
            if b == 0 and case["decay"] == 0: valleys += [valley(nets, group, x, y, name).assign(**case) for name, at in moments.items() if at == t]
        nets.backward(loss(nets(x.gather(1, i[..., None].expand(-1, -1, 64))), y.gather(1, i))); opt.step()
        if t % every == 0: one, kinks = gaps(nets, group), kinks + between(nets, case["layer"], x)
        if t % every == every - 1:
            after = gaps(nets, group)
            for side, v in said.items(): rows.append(pd.DataFrame(dict(v, seed=seeds, step=t - every + 1, side=side, said=-v["along"] / 2 - case["decay"], between=kinks, came=(one[side] / before[side]).log() / lr, later=(after[side] / before[side]).log() / (lr * every))).assign(**case))
    print(case, f"{time.time() - began:.0f} s", flush=True)
    return pd.concat(rows), pd.concat(valleys) if valleys else None


def main():
    frames, valleys = zip(*map(run, grid))
    pd.concat(frames, ignore_index=True).astype({c: "float32" for c in measured}).to_parquet(OUT/"coupling.parquet"); pd.concat([v for v in valleys if v is not None], ignore_index=True).to_parquet(OUT/"coupling_losses.parquet")


if __name__ == "__main__":
    main()
