"""Near-duplicates of a trained network, the runs behind results/near_duplicates.parquet and near_duplicates_push.parquet: `OMP_NUM_THREADS=1 python nbs/experiments/near_duplicates_study.py` (some five minutes of one core)

Networks of one hidden layer learn whether a digit is odd (the source), and then which digit it is (the target), with weight decay .01. Near-duplicates are of two kinds. *Made*: 4 units trained on the source for a time
of 100, each then doubled and its copies' incoming weights turned apart by an angle δ. *Found*: of 32 units, after a source of 200 … 800, those that are each other's nearest and less than .1 apart.
On the target δ, batch size b and step size η vary in factors of 8, so that one budget Γ = bδ/η comes from several of them. Time is step size × steps, as in the disk problem; 200 is the end. A pair has parted when the angle
between its incoming weights (biases included) has passed .1. Seeds 10 to 17; one seed has the same network, turns and order of examples in all runs of one b and η.

Written before this run, after trial runs with seeds 0 to 5:
1. Pairs part, also where the disk's bound 1 − exp(−Γ/πλ) forbids it: of the live made pairs with Γ < 10⁻³ more than a quarter, where it allows no more than 4 %.
2. The time to part goes with δ, not with Γ: its rank correlation with δ is stronger than that with Γ, in the mean over seeds with a 95 % interval of the difference that excludes 0; with b and with 1/η alone it is below .3.
3. Because no example between the kinks is needed: at δ < 10⁻⁴ most ReLU pairs have grown tenfold before they have met one.
4. And so tanh units, which have no kinks, part too.
5. Found duplicates part as made ones do, or not at all.

And of a second run, `… near_duplicates_study.py value` (results/near_duplicates_value.parquet), written after the first one and after a trial with seeds 0 to 3, before seeds 10 to 17. Everything is the same, but the networks have one output
and squared error: the source is odd (1) or even (-1), the target the digit's value (standardised), and step sizes are .02 and .0025, for .1 is not stable here. The theory says that kinks alone can part a pair then:
6. The time to part has a stronger rank correlation with Γ than with δ, in the mean over seeds with a 95 % interval of the difference that excludes 0.
7. Of the pairs that grow tenfold, at most 5 % do so before they have met an example between their kinks.
8. At equal Γ and different δ, b, η the shares that part do not differ by more than .3.
"""
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from lop_nb.cloning import clone_replicas
from lop_nb.data import load
from lop_nb.escape import disagreement_budget
from lop_nb.models import MLP
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator

seeds, decay, near, horizon, every = range(10, 18), .01, .1, 200, .5
turns, sources = [1e-2 / 8**k for k in range(6)], (200, 400, 600, 800)
grid = dict(made=[("relu", lr, b) for lr in (.1, .0125) for b in (1, 8, 64)] + [("tanh", .1, b) for b in (1, 8, 64)], found=[("relu", .1, b) for b in (1, 8, 64)])
OUT = Path(__file__).parent/"results"/"near_duplicates.parquet"

DIGITS = load("digits").train; X, Y = (DIGITS.x.double() / DIGITS.x.max()).flatten(1), DIGITS.y
labels = {("source", 10): Y % 2, ("target", 10): Y, ("source", 1): 2. * (Y % 2) - 1, ("target", 1): (Y - Y.double().mean()) / Y.double().std()}


def loss(z, y): return F.cross_entropy(z.mT, y, reduction="none") if z.shape[-1] > 1 else (z[..., 0] - y).square() / 2


def networks(width, activation, times=1, outputs=10): return Replicas(partial(MLP, 64, outputs, hidden_sizes=[width], activation=activation, normalization="none", dropout_p=0.), [s for _ in range(times) for s in seeds], "vmap", dtype=torch.float64)


def train(nets, task, gens, lr, batch, steps, look=lambda step, z: None):
    "SGD with weight decay; `look` sees each step's pre-activations before it is made. Networks of one seed get the same examples"
    opt, of = torch.optim.SGD(nets.params.values(), lr, weight_decay=decay), torch.arange(len(nets)) % len(gens)
    for t in range(steps):
        i = torch.stack([torch.randint(len(X), (batch,), generator=g) for g in gens])[of]
        z, seen = nets(X[i], ["linear_0"]); look(t, seen["linear_0"].detach()); nets.backward(loss(z, labels[task, z.shape[-1]][i])); opt.step()


def incoming(nets): return torch.cat([nets.params["linear_0.weight"], nets.params["linear_0.bias"][..., None]], 2).detach()    # [R, D, 65]


def angles(u, v):
    "Between vectors [..., n] -> [...], exact for tiny angles too"
    u, v = (F.normalize(w, dim=-1) for w in (u, v))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def filled(nets, state):
    with torch.no_grad():
        for k, p in nets.params.items(): p.copy_(state[k])
    return nets


def turned(w, δ):
    "Two of each unit, δ apart: w [R, D, n] -> [R, 2D, n], in the plane of w and a random direction"
    z = torch.stack([torch.randn(w[0].shape, generator=generator(s, "turn"), dtype=w.dtype) for s in seeds]); size, e = w.norm(dim=2, keepdim=True), F.normalize(w, dim=2)
    n, half = F.normalize(z - (z * e).sum(2, keepdim=True) * e, dim=2), torch.tensor(δ / 2, dtype=w.dtype)
    return torch.stack([size * (half.cos() * e + sign * half.sin() * n) for sign in (1, -1)], 2).flatten(1, 2)


def made(activation, width=4, outputs=10, lr=.1):
    "State, pairs [R, P, 2] and names of networks whose units are doubled and turned apart"
    nets = networks(width, activation, 1, outputs); train(nets, "source", [generator(s, "source") for s in seeds], lr, 16, round(100 / lr))
    big = clone_replicas(nets, 2); w = torch.cat([turned(incoming(big)[:, ::2], δ) for δ in turns])
    state = {k: p.detach().repeat(len(turns), *[1] * (p.ndim - 1)) for k, p in big.params.items()} | {"linear_0.weight": w[..., :-1], "linear_0.bias": w[..., -1]}
    return state, torch.arange(2*width).view(1, width, 2).expand(len(w), -1, -1), dict(turn=[δ for δ in turns for _ in seeds], T=100)


def found(activation, width=32):
    "Likewise of networks at several moments of a long source; a pair (0, 0) is none"
    nets, gens, kept = networks(width, activation), [generator(s, "source") for s in seeds], []
    for before, T in zip((0, *sources), sources): train(nets, "source", gens, .1, 16, (T - before) * 10); kept.append({k: p.detach().clone() for k, p in nets.params.items()})
    state = {k: torch.cat([s[k] for s in kept]) for k in kept[0]}; w = torch.cat([state["linear_0.weight"], state["linear_0.bias"][..., None]], 2)
    apart = angles(w[:, :, None], w[:, None]) + 9 * ((w.norm(dim=2) < 1e-3)[:, None] | torch.eye(width, dtype=torch.bool)); δ, to = apart.min(2); i = torch.arange(width).expand_as(to)
    good = (to.gather(1, to) == i) & (i < to) & (δ < near); P = int(good.sum(1).max()); first = good.int().sort(dim=1, descending=True, stable=True).indices[:, :P]
    pairs = torch.stack([first, to.gather(1, first)], 2) * good.gather(1, first)[..., None]
    return state, pairs, dict(turn=float("nan"), T=[T for T in sources for _ in seeds])


class Watch:
    "When each pair has parted, when its angle has grown tenfold, and how many examples had fallen between its kinks by then"
    def __init__(self, nets, pairs, lr):
        self.nets, self.pairs, self.lr, self.each = nets, pairs, lr, round(every / lr)
        self.start = self.angle(); self.met = torch.zeros_like(self.start); self.at = {k: torch.full_like(self.start, float("nan")) for k in ("parted", "tenfold", "met_parted", "met_tenfold")}
    def ends(self, t): return (t.gather(1, self.pairs[..., k, None].expand(-1, -1, t.shape[2])) for k in (0, 1))
    def angle(self): return angles(*self.ends(incoming(self.nets)))
    def __call__(self, step, z):
        if step % self.each == 0: self.read(step)
        u, v = self.ends(z.mT); self.met += ((u > 0) != (v > 0)).sum(2)
    def read(self, step):
        self.now = self.angle()
        for name, bar in (("parted", near), ("tenfold", 10 * self.start)):
            new = (self.now > bar) & self.at[name].isnan(); self.at[name][new] = step * self.lr; self.at[f"met_{name}"][new] = self.met[new]


def run(kind, start, activation, lr, batch):
    state, pairs, names = start; _, outputs, width = state["out.weight"].shape; nets = filled(networks(width, activation, len(pairs) // len(seeds), outputs), state); watch = Watch(nets, pairs, lr); began = time.time()
    z = nets(X.expand(len(nets), *X.shape), ["linear_0"])[1]["linear_0"].detach(); alive = torch.stack([(e > 0).any(2) for e in watch.ends(z.mT)]).any(0) | (activation != "relu")
    train(nets, "target", [generator(s, "target", batch) for s in seeds], lr, batch, steps := round(horizon / lr), watch); watch.read(steps)
    with nets.evaluating(): end = loss(nets(X.expand(len(nets), *X.shape)), labels["target", outputs].expand(len(nets), -1)).mean(1)
    table = pd.DataFrame(dict(names, seed=nets.seeds, loss=end)).assign(kind=kind, activation=activation, lr=lr, batch=batch); P = pairs.shape[1]
    table = table.loc[table.index.repeat(P)].reset_index(drop=True).assign(pair=list(range(P)) * len(pairs), angle=watch.start.flatten(), budget=disagreement_budget(watch.start, batch, lr).flatten(), alive=alive.flatten(), end=watch.now.flatten())
    print(kind, activation, lr, batch, f"{time.time() - began:.0f} s", flush=True)
    return table.assign(**{k: v.flatten() for k, v in watch.at.items()})[(pairs[..., 0] != pairs[..., 1]).flatten().numpy()]


def pulls(nets):
    "M = E 1[w·x > 0] r (x, 1)ᵀ of each unit, over all examples: [R, D, 10, 65]"
    z, seen = nets(X.expand(len(nets), *X.shape), ["linear_0"]); on, r = (seen["linear_0"] > 0).detach().double(), (z.softmax(2) - F.one_hot(Y, 10)).detach() / len(X)
    return torch.einsum("rnd,rnk,nm->rdkm", on, r, torch.cat([X, torch.ones(len(X), 1).to(X)], 1))


def pushes(start, batch, lr=.1, each=20):
    "The largest singular value σ₁ of M of the pairs' first units, and the rate −aᵀMw / ‖a‖‖w‖ at which such a unit itself grows, along the target"
    state, pairs, names = start; nets, rows = filled(networks(len(state["out.weight"][0, 0]), "relu", len(pairs) // len(seeds)), state), []
    def look(step, z):
        if step % round(each / lr): return
        M, w, a = pulls(nets), F.normalize(incoming(nets), dim=2), F.normalize(nets.params["out.weight"].detach().mT, dim=2)
        σ, own = (v.gather(1, pairs[..., 0]) for v in (torch.linalg.svdvals(M)[..., 0], -torch.einsum("rdk,rdkm,rdm->rd", a, M, w)))
        rows.append(pd.DataFrame(dict(T=[T for T in names["T"] for _ in pairs[0]], seed=[s for s in nets.seeds for _ in pairs[0]], time=step * lr, batch=batch, σ=σ.flatten(), own=own.flatten()))[(pairs[..., 0] != pairs[..., 1]).flatten().numpy()])
    train(nets, "target", [generator(s, "target", batch) for s in seeds], lr, batch, round(horizon / lr), look)
    return pd.concat(rows)


def after(start):
    "Asked after the first look at the results: why do single examples part more of the found pairs?"
    pd.concat([pushes(start, b) for b in (1, 8, 64)], ignore_index=True).to_parquet(OUT.with_stem("near_duplicates_push"))


def value():
    "The second run: one output"
    start = made("relu", outputs=1, lr=.02)
    pd.concat([run("made", start, "relu", lr, b) for lr, b in ((.02, 1), (.02, 8), (.02, 64), (.0025, 8))], ignore_index=True).to_parquet(OUT.with_stem("near_duplicates_value"))


def main():
    starts = {(kind, a): dict(made=made, found=found)[kind](a) for kind, a in (("made", "relu"), ("made", "tanh"), ("found", "relu"))}
    frame = pd.concat([run(kind, starts[kind, a], a, lr, b) for kind, cases in grid.items() for a, lr, b in cases], ignore_index=True)
    frame.to_parquet(OUT)
    after(starts["found", "relu"])
    print(frame.groupby(["kind", "activation", "lr", "batch"]).agg(pairs=("angle", "size"), alive=("alive", "sum"), parted=("parted", "count")))


if __name__ == "__main__":
    value() if sys.argv[1:] == ["value"] else main()
