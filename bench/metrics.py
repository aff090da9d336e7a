"""Milliseconds for the measures of a layer in one pass, beside the way the sources' code computes the same five, one after the other.

    python bench/metrics.py [--rounds 9] [--device cpu]

The five: dead and duplicate units, effective rank, participation ratio, units saturated by gradients. The baseline is ours, written after
the sources' definitions: singular values of H in float32, cosines of all pairs, the squared covariance, each measure from scratch and read
back with `.item()`; normality by one SciPy call per unit. `measure` computes the eigenvalues in float64, correlations instead of cosines
(centred: more work), and gradient shares instead of ratios. It answers for any number of layers or replicas at once and reads nothing back.
All variants run in one process, in turn, round after round; a figure is the median over rounds, a ratio the median of the rounds' ratios.
Before the clock starts every variant has run, so that the allocator has seen the largest buffers. CPU time on a CPU, wall time on a GPU.
Activations are ReLUs of rank 64 with noise, 512 samples; the arithmetic does not depend on what they mean.
"""
import argparse
import math
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from scipy import stats

from lop_nb.metrics import measure, measure_layers, non_gaussianity, spectrum

FIVE = ["dead_fraction", "duplicate_fraction", "effective_rank", "participation_ratio", "saturated_gradient_fraction"]
N = 512


def clock(device):
    if device == "cpu": return time.process_time()
    torch.cuda.synchronize(); return time.perf_counter()


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
        return sum(1 - stats.shapiro(u).statistic if u.std() > 1e-6 else 1. for u in h.T.cpu().numpy())/h.shape[1]


def layer(D, device, seed=0, layers=()):
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(*layers, N, 64, generator=g) @ torch.randn(*layers, 64, D, generator=g) + torch.randn(*layers, N, D, generator=g)).relu()
    return h.to(device), torch.randn(*layers, N, D, generator=g).to(device)


def agree(h, g):
    "Both ways measure the same thing where their definitions are the same"
    ours = measure(h, FIVE, g)
    for name, plain in (("dead_fraction", dead(h)), ("participation_ratio", participation(h)), ("effective_rank", entropy_rank(h.double()))):
        assert math.isclose(ours[name].item(), plain, rel_tol=1e-4, abs_tol=1e-6), name
    assert math.isclose(non_gaussianity(h).item(), plain_normality(h), abs_tol=1e-6)


def race(runs, rounds, device):
    "{variant: [seconds, …]}: all variants in turn, after a round that does not count; short ones many times a round"
    took, times = {k: [] for k in runs}, {}
    for k, (_, run) in runs.items():
        run(); start = clock(device); run(); times[k] = max(1, min(50, int(.03/max(clock(device) - start, 1e-4))))
    for _ in range(rounds):
        for k, (_, run) in runs.items():
            start = clock(device)
            for _ in range(times[k]): run()
            took[k].append((clock(device) - start)/times[k])
    return took


def variants(D, device):
    "{name: (its baseline, what runs)} for one width"
    h, g = layer(D, device); hs, gs = layer(D, device, 1, (16,)); many, their = (dict(enumerate(t.unbind())) for t in (hs, gs))
    agree(h, g); sixteen = "the same, 16 layers"
    return {
        "five measures, plain": (None, lambda: plain_five(h, g)),
        "five measures, one pass": ("five measures, plain", lambda: measure(h, FIVE, g)),
        sixteen + ", plain": (None, lambda: [plain_five(a, b) for a, b in zip(hs, gs)]),
        sixteen + ", one call": (sixteen + ", plain", lambda: measure_layers(many, FIVE, their)),
        "with normality, plain": (None, lambda: (plain_five(h, g), plain_normality(h))),
        "with normality, one pass": ("with normality, plain", lambda: measure(h, [*FIVE, "non_gaussianity"], g)),
        "spectrum, float32 SVD": (None, lambda: torch.linalg.svdvals(h)),
        "spectrum, float64 Gram": ("spectrum, float32 SVD", lambda: spectrum(h))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9); parser.add_argument("--device", default="cpu")
    parser.add_argument("--units", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = {D: variants(D, args.device) for D in args.units}
    took = race({(D, k): v for D, w in ways.items() for k, v in w.items()}, args.rounds, args.device)
    print(f"torch {torch.__version__}, {args.device}, {N} samples, {args.rounds} rounds, milliseconds\n")
    report(ways, took)


def report(ways, took):
    "A line for each pair, and the geometric mean over the widths"
    pairs = [(base, k) for k, (base, _) in next(iter(ways.values())).items() if base]
    for base, k in pairs:
        ratios = {D: sorted(a/b for a, b in zip(took[D, base], took[D, k])) for D in ways}
        print(f"| {k} | {' | '.join(f'D = {D}' for D in ways)} | geometric mean |\n|---{'|---'*len(ways)}|---|")
        for name in (base, k): print(f"| {name} | {' | '.join(f'{statistics.median(took[D, name])*1e3:.2f}' for D in ways)} | |")
        print(f"| ratio (low–high) | {' | '.join(f'**{statistics.median(r):.2f}** ({r[0]:.2f}–{r[-1]:.2f})' for r in ratios.values())} | **{statistics.geometric_mean(statistics.median(r) for r in ratios.values()):.2f}** |\n")


if __name__ == "__main__":
    main()
