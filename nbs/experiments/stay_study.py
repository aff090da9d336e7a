"""Who stays a clone: the table of 39_cloning.ipynb. `OMP_NUM_THREADS=1 python nbs/experiments/stay_study.py`

Four networks, cloned by 3, are trained for 400 steps on the digits by each rule, in float64 unless it says otherwise: once from copies, once from an equitable
start (copies, and noise that leaves the function as it is). Seed 0 throughout. The departure 1 - R² of the worst layer, forward or backward, is read every 20 steps
and goes to nbs/experiments/results/stay.parquet. Two minutes of one core.
"""
import os
import socket
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lop_nb.cloning import add_noise, axis_blocks, block_means, clone_measures, clone_partition, clone_replicas, factors_of, sides, tensors
from lop_nb.data import load
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.optimizers import NoisySGD
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator
from lop_nb.streams import PermutedPixels

networks = dict(mlp=partial(MLP, 64, 10, [8, 6], normalization="batch"), cnn=partial(CNN, 1, 8, 10, [4, 6], fc_hidden_units=[8], normalization="batch"),
                resnet=partial(ResNet, 1, 8, 10, [1, 1], 4, normalization="batch"), vit=partial(ViT, 1, 8, 10, patch_size=4, embed_dim=8, depth=1, n_heads=2, mlp_ratio=2, normalization="layer"))


def network(kind, dropout_p=0., attn_drop_rate=0.):
    "a network in which no gain is 1, no shift and no statistic as at the start"
    net = networks[kind](dropout_p=dropout_p, **dict(attn_drop_rate=attn_drop_rate) if kind == "vit" else {})
    with torch.no_grad():
        for t in tensors(net).values():
            if t.is_floating_point(): t += .3 * (torch.randn_like(t) if t.requires_grad else torch.rand_like(t))
    return net


def start(kind, k=3, dtype=torch.float64, **drop):
    "the base twice, and two clones: copies, and an equitable start"
    base = Replicas(partial(network, kind, **drop), [0, 0], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore"); big = clone_replicas(base, k)
    add_noise({n: p.data[1:] for n, p in big.params.items()}, big.graph, .3, [generator(0, "clone")], clone_partition(base.graph, factors_of(base.graph, k)))
    return base, big


class Muon(torch.optim.Optimizer):
    "Momentum whose matrices are made orthogonal by five steps of a polynomial (Jordan et al., 2024), for [R, out, …]; the rest by SGD"
    def __init__(self, params, lr=.01, momentum=.9, dtype=None): super().__init__(params, dict(lr=lr, momentum=momentum)); self.dtype = dtype
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).mul_(group["momentum"]).add_(p.grad)
                p -= group["lr"] * (self.orthogonal(m.flatten(2)).view_as(m) if p.ndim > 2 else m)
    def orthogonal(self, m):
        x = (m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self.dtype or m.dtype)
        for _ in range(5): g = x @ x.mT; x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
        return x.to(m.dtype)


def exactly(nets, k=3):
    "take off what rounding has made of gradients that are constant in blocks"
    owners, partition = sides(nets.graph), {g.name: torch.arange(g.size) // k for g in nets.graph}
    for n, p in nets.params.items():
        for axis in {s.axis for _, s, _ in owners[n]}: p.grad = block_means(p.grad, axis + 1, axis_blocks(owners[n], axis, partition))


def clip_norm(nets):
    "each replica's gradient to norm 1 at most"
    norm = torch.stack([p.grad.flatten(1).square().sum(1) for p in nets.params.values()]).sum(0).sqrt()
    for p in nets.params.values(): p.grad /= norm.clamp(min=1).view(-1, *[1]*(p.ndim - 1))


def clip_value(nets):
    for p in nets.params.values(): p.grad.clamp_(-.01, .01)


def uneven(optimizer, nets):
    "second moments as another past would have left them"
    gen = generator(0, "uneven")
    for p in nets.params.values(): optimizer.state[p] = dict(step=torch.tensor(1.), exp_avg=torch.zeros_like(p), exp_avg_sq=1e-4 * torch.rand(p.shape, generator=gen, dtype=p.dtype))


def noisy(noise_decay): return lambda params, nets: NoisySGD(params, [generator(r, "noise") for r in range(len(nets))], lr=.02, noise_scale=.01, noise_decay=noise_decay)


def plain(make, **kw): return lambda params, nets: make(params, **kw)


sgd, adam = plain(torch.optim.SGD, lr=.02), plain(torch.optim.Adam, lr=.003)
# rule: (optimizer, what else, does it stay from copies, and from an equitable start?, why); None: as far as rounding lets it
rules = {
    "SGD": (sgd, {}, True, True, "gradients are constant in blocks"),
    "SGD, momentum": (plain(torch.optim.SGD, lr=.005, momentum=.9), {}, True, True, "so are sums of them"),
    "SGD, weight decay": (plain(torch.optim.SGD, lr=.02, weight_decay=.01), {}, True, True, "shrinking keeps equal sums equal"),
    "SGD, norm clipped": (sgd, dict(clip=clip_norm), True, True, "one factor for all"),
    "SGD, values clipped": (sgd, dict(clip=clip_value), True, True, "equal numbers are cut equally"),
    "Adam": (adam, {}, True, True, "equal histories make equal steps"),
    "AdamW, decay .1": (plain(torch.optim.AdamW, lr=.003, weight_decay=.1), {}, True, True, "decay is apart from the quotient"),
    "RMSprop": (plain(torch.optim.RMSprop, lr=.001), {}, True, True, "equal histories make equal steps"),
    "Muon": (lambda params, nets: Muon(params), {}, None, None, "so are polynomials of them; but small singular values grow, rounding too"),
    "Muon, rounding taken off": (lambda params, nets: Muon(params), dict(clip=exactly), True, True, "and without rounding it stays"),
    "Muon in bfloat16": (lambda params, nets: Muon(params, dtype=torch.bfloat16), {}, True, True, "small differences are rounded away before they can grow"),
    "Adam, coupled L2": (plain(torch.optim.Adam, lr=.003, weight_decay=.01), {}, True, False, "the quotient sees the weights themselves, and equitable ones differ"),
    "Adam, coupled L2, k = 2": (plain(torch.optim.Adam, lr=.003, weight_decay=.01), dict(k=2), True, True, "both rows of a 2×2 block hold the same two numbers"),
    "Adam, uneven state": (adam, dict(prepare=uneven), False, False, "equal gradients, unequal histories"),
    "noisy SGD": (noisy(1.), {}, False, False, "each weight draws for itself"),
    "noisy SGD, one kick": (noisy(0.), {}, False, False, "one step off is enough"),
    "dropout .1": (sgd, dict(dropout_p=.1), False, False, "each clone is dropped by itself"),
    "attention dropout .1": (sgd, dict(attn_drop_rate=.1), True, True, "the clones of a head share its mask"),
    "SGD, float32": (sgd, dict(dtype=torch.float32), True, None, "equal numbers are rounded equally; unequal ones with equal sums are not"),
    "SGD, bfloat16 autocast": (sgd, dict(dtype=torch.float32, autocast=True), True, None, "likewise"),
}
data = load("digits")
inputs, labels = data.scale(data.train.x, "standardize"), data.train.y


def train(nets, optimizer, steps, clip=None, autocast=False, share=slice(None), average=None, look=None):
    "`steps` steps of batches of 16, the same for all replicas; of each batch `share`; `look` every 20 steps"
    gen, x = generator(0, "order"), inputs.to(nets.dtype); nets.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(labels), (16,), generator=gen)[share]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): out = nets(x[rows].expand(len(nets), *x[rows].shape))
        losses = nn.functional.cross_entropy(out.to(nets.dtype).flatten(0, 1), labels[rows].repeat(len(nets)), reduction="none")
        nets.backward(losses.view(len(nets), -1))
        for change in filter(None, (average, clip)): change(nets)
        optimizer.step()
        if look and step % 20 == 0: look(step)


def departure(base, big, n=64):
    "1 - R² of the worst layer [R], forward or backward"
    x = data.scale(data.test.x[:n], "standardize").to(big.dtype); y = data.test.y[:n]
    task = PermutedPixels(data, seeds=[0, 0], tasks=1)[0]
    found = clone_measures(base, big, task, x.expand(2, *x.shape), y.expand(2, -1))
    return torch.stack([v.nan_to_num(0.) for (_, m), v in found.items() if m.startswith("variance")]).amax(0)


def stay(kind, rule, steps=400):
    "{step: departures [copies, equitable start]}"
    make, how, *_ = rules[rule]; how, found = dict(how), {}
    base, big = start(kind, how.pop("k", 3), **{a: how.pop(a) for a in ("dtype", "dropout_p", "attn_drop_rate") if a in how})
    optimizer, prepare = make(big.params.values(), big), how.pop("prepare", None)
    if prepare: prepare(optimizer, big)
    train(big, optimizer, steps, look=lambda step: found.update({step: departure(base, big).tolist()}), **how)
    return found


def cases(): return [(kind, rule) for kind in networks for rule in rules if kind == "vit" or rule != "attention dropout .1"]


# ---- two processes, each with its half of each batch ----
def _half(rank, port, steps, results):
    torch.set_num_threads(1); os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)); dist.init_process_group("gloo", rank=rank, world_size=2)
    def average(nets):
        for p in nets.params.values(): dist.all_reduce(p.grad); p.grad /= 2
    for kind in networks:
        base, big = start(kind); train(big, torch.optim.SGD(big.params.values(), .02), steps, share=slice(rank, None, 2), average=average)
        if rank == 0: results[kind] = departure(base, big).tolist(), sum(p.detach().sum().item() for p in big.params.values())
    dist.destroy_process_group()


def data_parallel(steps=400):
    "{network: ([copies, equitable start], sum of all parameters)}"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict(); mp.spawn(_half, (port, steps, results), nprocs=2)
        return dict(results)


if __name__ == "__main__":
    torch.set_num_threads(1); rows = []
    def keep(kind, rule, found, stays, why):
        rows.extend(dict(network=kind, rule=rule, start=s, step=step, departure=d, stays=e, why=why) for step, pair in found.items() for s, d, e in zip(("copies", "equitable"), pair, stays))
        print(f"{kind:8}{rule:28}", *(f"{d:.1e}" for d in found[max(found)]), flush=True)
    for kind, rule in cases(): keep(kind, rule, stay(kind, rule), *(rules[rule][i] for i in (slice(2, 4), 4)))
    for kind, (pair, _) in data_parallel().items(): keep(kind, "SGD, two processes", {400: pair}, (True, True), "a mean of what is constant in blocks")
    pd.DataFrame(rows).to_parquet(Path(__file__).parent/"results"/"stay.parquet")
