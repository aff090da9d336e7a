"""Winning tickets: which weights to keep, a whole search, and many tickets of one task.

Pruning: which share of n weights is the largest. The plain way compares with `torch.quantile`, which sorts; ours selects, and keeps an exact number.
A search: 784-256-10, batches of 32, Adam; rounds of training, pruning layer by layer and rewinding, to 5 % of the weights, the last mask trained too. The plain way is what a
study of tickets does: one module, a DataLoader, torch's default Adam, the mask on the gradients, loss and accuracy by `.item()` at each step; its pictures are made ready
beforehand, which is better than the usual data set, whose pictures are made as they are asked for, and that stands beside. Ten tickets: one task, one start, ten masks and ten
orders of the examples; as ten replicas, one after the other, and by the plain loop, one after the other.
"""
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lop_nb.config import Adam
from lop_nb.imp import Rounds, Search, keep, random_masks
from lop_nb.learner import Evaluate, Learner, Online
from lop_nb.masks import Mask, full, prunable
from lop_nb.streams import PermutedPixels

from . import ours
from .batches import module
from .core import Row, Way
from .data import few

B, TARGET, HOW = 32, .05, "standardize"


def sizes(quick): return 784, 32 if quick else 256, 10


# pruning

def by_quantile(s, share): return s > torch.quantile(s, 1 - share)

def by_sort(s, share):
    order = s.argsort(descending=True); kept = torch.zeros_like(s, dtype=torch.bool)
    kept[order[:round(share * len(s))]] = True
    return kept

def by_topk(s, share): return torch.zeros_like(s, dtype=torch.bool).scatter_(0, s.topk(round(share * len(s)), sorted=False).indices, True)

def by_keep(s, share): return keep(s[None], round(share * len(s)))[0]


def pruning(name, n, share=.8):
    s = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs().float()
    wanted = by_sort(s, share)
    for f in by_quantile, by_topk, by_keep: assert (f(s, share) != wanted).sum() <= 2, f.__name__        # equal weights, if there are any
    way = lambda role, f: Way(role, lambda: (lambda: None if f(s, share) is None else None, 1), same=False)
    ways = {"plain, torch.quantile": way("plain", by_quantile), "sort": way("also", by_sort), "topk": way("also", by_topk), "ours": way("ours", by_keep)}
    return Row(name, f"the largest {share:.0%} of {n:,} weights, as a mask", ways, {("ours", "plain, torch.quantile"): 8.}, unit="masks/s")


# one ticket after the other, plainly

def fit_plainly(net, masks, data, epochs):
    "Train a module under its masks, as one writes it"
    opt, loader, weights = torch.optim.Adam(net.parameters()), DataLoader(data, batch_size=B, shuffle=True), dict(net.named_parameters())
    with torch.no_grad():
        for k, m in masks.items(): weights[k].mul_(m)
    for _ in range(epochs):
        loss_sum, right = 0., 0
        for x, y in loader:
            out = net(x); loss = F.cross_entropy(out, y)
            opt.zero_grad(); loss.backward()
            for k, m in masks.items(): weights[k].grad.mul_(m)
            opt.step()
            loss_sum += loss.item(); right += (out.argmax(1) == y).sum().item()
    return right / len(data)


def shrunk(w, m, share):
    "The mask m with this share of its weights, the largest"
    left = w.abs()[m.bool()]
    return ((w.abs() > torch.quantile(left, 1 - share)) & m.bool()).float()


def plain_search(weights, train, test, rounds, epochs):
    def run():
        net = module(weights); start = copy.deepcopy(net.state_dict())
        masks = {k: torch.ones_like(p) for k, p in net.named_parameters() if p.ndim == 2}
        for r in range(rounds + 1):
            net.load_state_dict(start); fit_plainly(net, masks, train, epochs)
            with torch.no_grad(): run.accuracy = (net(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean().item()
            if r < rounds: masks = {k: shrunk(p.detach(), masks[k], TARGET ** (1 / rounds)) for k, p in net.named_parameters() if k in masks}
        run.masks = masks
    return run, (rounds + 1) * epochs * len(train)


class Pictures(Dataset):
    "Permuted MNIST as it is usually written: each picture is scaled, permuted and standardised when it is asked for"
    def __init__(self, split, task): self.split, self.order, self.scale = split, task.train.pixels[0], task.train.data
    def __len__(self): return len(self.split)
    def __getitem__(self, i):
        x = self.split.x[i].float().div(255).flatten()[self.order]
        return (x - self.scale.mean[0]) / self.scale.std[0], int(self.split.y[i])


def flat(task, split):
    "The same, made beforehand"
    view = getattr(task, split)
    x, y = view.fetch(torch.arange(view.n)[None])
    return TensorDataset(x[0].flatten(1).contiguous(), y[0])


# ours

def learner(weights, n, seeds, callback, tasks, epochs, engine="numba"):
    "A learner of one permuted task, again and again; networks of replica r have `weights` and the order of seed r"
    shape = (784, weights[0][0].shape[1], 10)
    nets = ours.nets_of(shape, [[p[:1].repeat(len(seeds), 0) for p in wb] for wb in weights]); nets.seeds = list(seeds)
    stream = Rounds(PermutedPixels(few(n), tasks=1, normalize=HOW, seeds=[0] * len(seeds)), 0, tasks)
    return Learner(nets, stream, Adam(), epochs, B, [callback], engine=engine, defaults=[Online(), Evaluate()])


def our_search(weights, n, rounds, epochs, engine="numba"):
    def run():
        found = Search(TARGET, rounds); run.learner = learner(weights, n, [0], found, rounds + 1, epochs, engine).fit(); run.masks = found.masks
    return run, (rounds + 1) * epochs * n


def search_row(name, quick):
    n, rounds, epochs = (256, 2, 1) if quick else (20_480, 3, 1)
    weights = ours.he(sizes(quick), 1); task = PermutedPixels(few(n), tasks=1, normalize=HOW, seeds=[0])[0]
    ways = {"plain DataLoader loop": Way("plain", lambda: plain_search(weights, flat(task, "train"), flat(task, "test"), rounds, epochs), same=False),
            "plain, pictures made as asked for": Way("also", lambda: plain_search(weights, Pictures(few(n).train, task), flat(task, "test"), rounds, epochs), same=False),
            "ours": Way("ours", lambda: our_search(weights, n, rounds, epochs), same=False),
            "ours, torch": Way("also", lambda: our_search(weights, n, rounds, epochs, "torch"), same=False)}
    return Row(name, f"a search of {rounds} rounds to {TARGET:.0%}, {epochs} epoch of {n:,} examples each, 784-{sizes(quick)[1]}-10, batches of {B}, Adam", ways, {("ours", "plain DataLoader loop"): 4.})


# ten tickets

def tickets(weights, many):
    nets = ours.nets_of((784, weights[0][0].shape[1], 10), weights)
    return random_masks(full({k: p.detach() for k, p in nets.params.items()}, prunable(nets.modules[0])), TARGET, range(many))


def plain_tickets(weights, masks, train, many, epochs):
    def run():
        for r in range(many): fit_plainly(module(weights), {module_name(k): m[r].float() for k, m in masks.items()}, train, epochs)
    return run, many * epochs * len(train)


def module_name(k): return {"linear_0.weight": "0.weight", "out.weight": "2.weight"}[k]


def our_tickets(weights, masks, n, many, epochs, together):
    def run():
        groups = [range(many)] if together else [[r] for r in range(many)]
        run.learners = [learner(weights, n, g, Mask({k: m[list(g)] for k, m in masks.items()}), 1, epochs).fit() for g in groups]
    return run, many * epochs * n


def tickets_row(name, quick):
    n, many, epochs = (256, 2, 1) if quick else (5120, 10, 1)
    weights = ours.he(sizes(quick), 1); masks = tickets(weights, many); task = PermutedPixels(few(n), tasks=1, normalize=HOW, seeds=[0])[0]
    ways = {"plain DataLoader loop": Way("plain", lambda: plain_tickets(weights, masks, flat(task, "train"), many, epochs), same=False),
            "ours": Way("ours", lambda: our_tickets(weights, masks, n, many, epochs, True), same=False),
            "ours, one by one": Way("also", lambda: our_tickets(weights, masks, n, many, epochs, False), same=False)}
    return Row(name, f"{many} tickets of {TARGET:.0%} trained on one task, {epochs} epoch of {n:,} examples each, 784-{sizes(quick)[1]}-10, batches of {B}, Adam", ways,
               {("ours", "plain DataLoader loop"): 4., ("ours", "ours, one by one"): 1.})


def rows(quick=False):
    counts = {"20k": 20_000} if quick else {"200k": 200_000, "2M": 2_000_000}
    return {f"pruning-{k}": partial(pruning, f"pruning-{k}", n) for k, n in counts.items()} | {"tickets": partial(search_row, "tickets", quick), "tickets-ten": partial(tickets_row, "tickets-ten", quick)}
