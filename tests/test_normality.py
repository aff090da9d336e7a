"""The four rulers of normality against SciPy's, unit by unit, and for properties that hold for any activations."""
import math
import warnings

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from scipy import stats

from lop_nb.normality import _royston, non_gaussianity, non_gaussianity_scores
from lop_nb.runtime import LopError
from measuring import close

MOST = dict(shapiro=1, ks=1, anderson=10, kurtosis=10)
kinds = pytest.mark.parametrize("kind", MOST)


def standard(u): return (u - u.mean())/u.std(ddof=1)

def anderson(u):
    "A² by SciPy, whose function gained an argument and will lose a warning; over the 5 % value of its notes, unrounded"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore"); a2 = stats.anderson(u, "norm").statistic
    return min(a2*(1 + .75/len(u) + 2.25/len(u)**2)/.752, 10)

SCIPY = dict(shapiro=lambda u: 1 - stats.shapiro(u).statistic, ks=lambda u: stats.kstest(standard(u), "norm").statistic, anderson=anderson, kurtosis=lambda u: min(abs(stats.kurtosis(u)), 10))


# ---- SciPy's values ----
@kinds
@pytest.mark.parametrize("n", [3, 4, 5, 6, 7, 11, 12, 13, 50, 500, 1000, 5000])
def test_scipys_values(kind, n):
    g = np.random.default_rng(n)
    h = np.stack([g.normal(size=n), g.uniform(size=n), g.laplace(size=n), g.exponential(size=n), 1e3 + g.normal(size=n), g.normal(size=n).round(1), np.maximum(g.normal(size=n), -.5), 1e-9*g.standard_t(3, size=n)], 1)
    close(non_gaussianity_scores(torch.tensor(h), kind, rows=n), [SCIPY[kind](u) for u in h.T], 1e-8)

def test_roystons_weights():
    "Odd, of length 1, and for 10 samples within 1e-3 of the table of Shapiro and Wilk (1965)"
    for n in (3, 4, 5, 6, 12, 100, 1001):
        a = _royston(n); close(a, -a[::-1], 1e-15); close((a**2).sum(), 1, 1e-12)
    close(_royston(10)[5:], [.0399, .1224, .2141, .3291, .5739], 1e-3)

@kinds
def test_distributions(kind):
    "Uniform, normal and Laplace samples, 300 units of 1,000: within four standard errors of SciPy's mean over other samples of the same kind"
    ours, theirs = (np.random.default_rng(seed) for seed in (0, 1))
    for name in ("uniform", "normal", "laplace"):
        a, b = (getattr(g, name)(size=(1000, 300)) for g in (ours, theirs))
        each = [SCIPY[kind](u) for u in b.T]; score = non_gaussianity_scores(torch.tensor(a), kind)
        error = math.hypot(np.std(each), score.std().item())/300**.5
        assert abs(score.mean() - np.mean(each)) <= 4*error
        close(non_gaussianity(torch.tensor(a), kind), score.mean(), 1e-12)


# ---- a slow loop from the definitions ----
def phi(z): return math.erfc(-z/2**.5)/2

def slow(u, kind):
    n, mean = len(u), sum(u)/len(u); s = math.sqrt(sum((v - mean)**2 for v in u)/(n - 1)); z = sorted((v - mean)/s for v in u)
    if kind == "ks": return max(max((i + 1)/n - phi(v), phi(v) - i/n) for i, v in enumerate(z))
    if kind == "anderson": return min((-n - sum((2*i + 1)*(math.log(phi(z[i])) + math.log(phi(-z[-1 - i]))) for i in range(n))/n)*(1 + .75/n + 2.25/n**2)/.752, 10)
    if kind == "kurtosis": return min(abs(n*sum(v**4 for v in z)/sum(v*v for v in z)**2 - 3), 10)
    return 1 - sum(a*v for a, v in zip(_royston(n), z))**2/sum(v*v for v in z)

shapes = st.tuples(st.integers(3, 30), st.integers(1, 8), st.integers(0, 2**31))
def draw(shape):
    n, d, seed = shape
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()
def live(h): return bool((h.amax(0) > h.amin(0)).all())

@settings(max_examples=60, deadline=None)
@given(shapes)
def test_loops(shape):
    h = draw(shape); assume(live(h))
    for kind in MOST: close(non_gaussianity_scores(h, kind), [slow(u, kind) for u in h.T.tolist()], 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_order_of_units_and_samples_is_nothing(shape, seed):
    h = draw(shape); g = torch.Generator().manual_seed(seed)
    moved = h[torch.randperm(h.shape[0], generator=g)][:, torch.randperm(h.shape[1], generator=g)]
    for kind in MOST: close(non_gaussianity(moved, kind), non_gaussianity(h, kind), 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(-480, 480), st.floats(-9, 9), st.booleans())
def test_scale_and_shift_are_nothing(shape, power, shift, mirrored):
    h = draw(shape); assume(live(h)); other = (h + shift)*(-1 if mirrored else 1)*2.**power
    for kind in MOST: close(non_gaussianity(other, kind), non_gaussianity(h, kind), 1e-9)

@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 3), st.integers(1, 3))
def test_leading_axes_are_a_loop(shape, a, b):
    n, d, seed = shape; h = draw((a*b*n, d, seed)).view(a, b, n, d)
    for kind in MOST: close(non_gaussianity(h, kind), [[non_gaussianity(h[i, j], kind) for j in range(b)] for i in range(a)], 1e-12)

@settings(max_examples=60, deadline=None)
@given(shapes)
def test_bounds_and_constants(shape):
    h = draw(shape)
    for kind, most in MOST.items():
        score = non_gaussianity_scores(h, kind)
        assert ((score >= 0) & (score <= most)).all() and (score[h.amax(0) == h.amin(0)] == most).all()
        assert non_gaussianity(torch.full_like(h, .1), kind) == most

@kinds
def test_more_of_the_same_samples(kind):
    "Ten copies of each sample: the kurtosis and the widest gap but one step of 1/n are the same; a test's statistic may grow with n"
    h = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64); many = non_gaussianity(h.repeat(10, 1), kind); once = non_gaussianity(h, kind)
    if kind == "kurtosis": close(many, once, 1e-12)
    elif kind == "ks": assert (many - once).abs() < 1/50
    elif kind == "anderson": assert many > 2*once
    else: assert (many - once).abs() < .02

@kinds
def test_batch_size(kind):
    "One distribution in batches of 500 and 5,000: 1-W, D and the kurtosis of a uniform unit agree within 10 %, A² grows tenfold"
    u = torch.rand(5000, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small, large = non_gaussianity_scores(u[:500], kind).mean(), non_gaussianity_scores(u, kind, rows=5000).mean()
    if kind == "anderson": assert small < large == 10
    else: close(small, large, .1)


# ---- rows, input ----
def test_rows_are_evenly_spaced():
    h = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    for rows, kept in ((1000, slice(None)), (2000, slice(None)), (500, slice(None, None, 2)), (100, slice(None, None, 10)), (300, [i*1000//300 for i in range(300)])):
        assert torch.equal(non_gaussianity(h, rows=rows), non_gaussianity(h[kept], rows=10**6))
    by_class = torch.arange(1000)[:, None].float()//100                                   # sorted by class
    assert torch.equal(non_gaussianity(by_class, "kurtosis", rows=100), non_gaussianity(by_class[::10], "kurtosis"))

@kinds
def test_too_few_samples(kind):
    for n in (1, 2): assert non_gaussianity(torch.randn(3, n, 5), kind).isnan().all() and non_gaussianity(torch.zeros(3, n, 5), kind).shape == (3,)
    assert non_gaussianity(torch.randn(9, 5), kind, rows=2).isnan() and not non_gaussianity(torch.randn(3, 5), kind).isnan()

@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_to_measure(shape):
    with pytest.raises(LopError, match="^non_gaussianity needs .* at least one of each"): non_gaussianity(torch.zeros(shape))

def test_unknown_kind():
    with pytest.raises(LopError, match="Did you mean 'anderson'"): non_gaussianity(torch.zeros(5, 5), "andersen")
