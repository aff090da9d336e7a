"""The measures of a layer in one pass, beside the way the sources' code computes the same five, one after the other.

The five: dead and duplicate units, effective rank, participation ratio, units saturated by gradients. The plain way is ours, written after the sources' definitions:
singular values of H in float32, cosines of all pairs, the squared covariance, each measure from scratch and read back with `.item()`; normality by one SciPy call per unit.
`measure` computes the eigenvalues in float64, correlations instead of cosines (centred: more work), and gradient shares instead of ratios. It answers for any number of
layers or replicas at once and reads nothing back. Activations are rectified, of rank 64 with noise, 512 samples; the arithmetic does not depend on what they mean.
A row's figure is the geometric mean over the widths.
"""
import math
import warnings
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from scipy import stats

from lop_nb.metrics import measure, measure_layers, non_gaussianity, spectrum

from .core import Row, Way

FIVE = ["dead_fraction", "duplicate_fraction", "effective_rank", "participation_ratio", "saturated_gradient_fraction"]
N = 512


def dead(h): return ((h.abs() < 1e-7).float().mean(0) > .95).float().mean().item()

def duplicates(h):
    x = F.normalize(h.T, dim=1); c = x @ x.T
    later = torch.triu(torch.ones_like(c), diagonal=1).bool()
    return ((c > .95) & later).any(1).float().mean().item()

def entropy_rank(h):
    s = torch.linalg.svdvals(h)
    if s.sum() < 1e-9: return 0.
    p = s/s.sum()
    return torch.exp(-(p*torch.log(p + 1e-12)).sum()).item()

def participation(h):
    c = h - h.mean(0, keepdim=True); total = (c**2).sum().item(); square = ((c.T @ c)**2).sum().item()
    return total**2/square if square >= 1e-9 else 0.

def saturated(h, g):
    ratio = g.abs()/h.abs().mean(0, keepdim=True).clamp(min=1e-12)
    return ((ratio < 1e-4).float().mean(0) > .99).float().mean().item()

def plain_five(h, g): return dead(h), duplicates(h), entropy_rank(h), participation(h), saturated(h, g)

def plain_normality(h):
    "1-W of each unit by SciPy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(1 - stats.shapiro(u).statistic if u.std() > 1e-6 else 1. for u in h.T.numpy())/h.shape[1]


def layer(D, seed=0, layers=()):
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(*layers, N, 64, generator=g) @ torch.randn(*layers, 64, D, generator=g) + torch.randn(*layers, N, D, generator=g)).relu()
    return h, torch.randn(*layers, N, D, generator=g)


def agree(h, g):
    "Both ways measure the same thing where their definitions are the same"
    ours = measure(h, FIVE, g)
    for name, plain in (("dead_fraction", dead(h)), ("participation_ratio", participation(h)), ("effective_rank", entropy_rank(h.double()))):
        assert math.isclose(ours[name].item(), plain, rel_tol=1e-4, abs_tol=1e-6), name
    assert math.isclose(non_gaussianity(h).item(), plain_normality(h), abs_tol=1e-6)


def five(D):
    h, g = layer(D); agree(h, g)
    return lambda: plain_five(h, g), lambda: measure(h, FIVE, g)

def sixteen(D):
    hs, gs = layer(D, 1, (16,)); many, their = (dict(enumerate(t.unbind())) for t in (hs, gs))
    return lambda: [plain_five(a, b) for a, b in zip(hs, gs)], lambda: measure_layers(many, FIVE, their)

def normality(D):
    h, g = layer(D)
    return lambda: (plain_five(h, g), plain_normality(h)), lambda: measure(h, [*FIVE, "non_gaussianity"], g)

def spectra(D):
    h, _ = layer(D)
    return lambda: torch.linalg.svdvals(h), lambda: spectrum(h)


def row(name, what, pair, goal, least, widths):
    "`goal` of the geometric mean, `least` of each width"
    ways, pair = {}, lru_cache(pair)      # both sides on the same numbers
    for D in widths:
        for i, side in enumerate(("plain", "ours")): ways[f"{side}, D = {D}"] = Way("also", lambda D=D, i=i: (quiet(pair(D)[i]), 1), same=False)
    goals = {("ours", "plain"): goal} | {(f"ours, D = {D}", f"plain, D = {D}"): least for D in widths}
    return Row(name, f"{what}, {N} samples × D units", ways, goals, unit="calls/s",
               together={side: (side, [f"{side}, D = {D}" for D in widths]) for side in ("plain", "ours")})


def quiet(f):
    def run(): f()
    return run


def rows(quick=False):
    widths = [32, 64] if quick else [128, 256, 512, 1024, 2048]
    kinds = dict(five=("five measures of a layer", five, 2., 1.), sixteen=("five measures of sixteen layers in one call", sixteen, 2., 1.),
                 normality=("five measures and normality", normality, 4., 1.), spectrum=("eigenvalues in float64 against a float32 SVD", spectra, None, 1.))
    return {f"metrics-{k}": partial(row, f"metrics-{k}", *v, widths) for k, v in kinds.items()}
