"""The ranks against closed forms, against NumPy's SVD, and for properties that hold for any activations."""
import math
from functools import partial

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st

from lop_nb.ranks import effective_rank, energy_rank, gram, numerical_rank, outer, participation_ratio, rankme, scaled, spectrum, srank, stable_rank
from lop_nb.copies import centre
from lop_nb.runtime import LopError
from measuring import EPS, close, dtypes

covariance_rank = partial(effective_rank, centred=True, squared=True)
RANKS = [effective_rank, stable_rank, partial(participation_ratio, centred=False), srank, energy_rank, numerical_rank, rankme, partial(effective_rank, squared=True)]
CENTRED = [partial(f, centred=True) for f in (effective_rank, stable_rank, participation_ratio, srank, energy_rank, numerical_rank)] + [covariance_rank]
PURE = [*RANKS, *CENTRED]
def uncounted(d): return -(-99 * d // 100)             # the least k that holds 99 % of d equal values


def from_spectrum(s, n, d, seed):
    "A random matrix [n, d] with these singular values"
    g = torch.Generator().manual_seed(seed); s = torch.as_tensor(s, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(k, len(s), generator=g, dtype=torch.float64))[0] for k in (n, d))
    return u * s @ v.T

def reference(h, centred=False):
    "Effective and stable rank, from NumPy's SVD in float64"
    h = np.asarray(h, dtype=np.float64)
    s = np.linalg.svd(h - h.mean(0) if centred else h, compute_uv=False)
    p = s[s > 0] / s.sum()
    return np.exp(-(p * np.log(p)).sum()), (s**2).sum() / s[0]**2

def slow(s, missing=.01, eps=1e-7):
    "Each rank from its definition, number by number"
    total, squares = sum(s), sum(v*v for v in s); p, q = [v/total for v in s], [v*v/squares for v in s]
    def perplexity(p): return math.exp(-sum(v*math.log(v) for v in p if v > 0))
    def least(p):
        for k in range(1, len(p) + 1):
            if sum(p[:k]) >= 1 - missing - 1e-9: return k
    return [perplexity(p), squares/max(s)**2, squares**2/sum(v**4 for v in s), least(p), least(q), sum(v > 0 for v in s), perplexity([v + eps for v in p]), perplexity(q)]


# ---- closed forms ----
@dtypes
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("d", [1, 2, 7, 64, 200])
def test_identity(rank, d, dtype):
    h = torch.eye(d, dtype=dtype); expected = uncounted(d) if rank in (srank, energy_rank) else d
    eps = 1e-3 if rank is rankme else EPS[dtype]              # up to 400 times 1e-7 is added to the shares
    close(rank(h), expected, eps)
    close(rank(h.repeat(3, 2)), expected, eps)                # block copies, of samples and of units
    close(rank(torch.cat([h, torch.zeros_like(h)], 1)), expected, eps)

@dtypes
@pytest.mark.parametrize("rank", CENTRED)
@pytest.mark.parametrize("d", [2, 7, 64])
def test_centred_identity(rank, d, dtype):
    "I - 11ᵀ/d has d-1 equal singular values"
    close(rank(torch.eye(d, dtype=dtype)), uncounted(d - 1) if rank.func in (srank, energy_rank) else d - 1, EPS[dtype])

@dtypes
@pytest.mark.parametrize("rank", RANKS)
def test_rank_one_and_zero(rank, dtype):
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(50, 1, generator=g, dtype=dtype), torch.randn(1, 30, generator=g, dtype=dtype)
    for scale in (1e-15, 1, 1e15): close(rank(u @ v * scale), 1, 1e-4 if rank is rankme else EPS[dtype])
    assert rank(torch.zeros(50, 30, dtype=dtype)) == 0
    close(rank(torch.full((50, 30), .1, dtype=dtype)), 1, 1e-4 if rank is rankme else EPS[dtype])

@dtypes
@pytest.mark.parametrize("rank", CENTRED)
def test_constant_units_have_no_centred_rank(rank, dtype):
    h = torch.full((1000, 30), .1, dtype=dtype); assert rank(h) == 0
    h[:, 3] = torch.arange(1000); close(rank(h), 1, EPS[dtype])

@dtypes
def test_known_spectrum(dtype):
    h = torch.diag(torch.tensor([4., 2., 1., 1.], dtype=dtype))      # p = 1/2, 1/4, 1/8, 1/8: entropy 7/4 bits
    close(effective_rank(h), 2**1.75, EPS[dtype])
    close(stable_rank(h), (16 + 4 + 1 + 1) / 16, EPS[dtype])
    close(participation_ratio(h, centred=False), 22**2/(256 + 16 + 1 + 1), EPS[dtype])
    close(effective_rank(h.sqrt(), squared=True), 2**1.75, EPS[dtype])
    assert [srank(h, m).item() for m in (0, .124, .126, .24, .26, .49, .51)] == [4, 4, 3, 3, 2, 2, 1]
    assert [energy_rank(h, m).item() for m in (0, .045, .046, .09, .1, .27, .28)] == [4, 4, 3, 3, 2, 2, 1]
    assert [numerical_rank(h, m).item() for m in (None, .2, .25, .3, .5, .6)] == [4, 4, 2, 2, 1, 1]
    close(spectrum(h), [4, 2, 1, 1], 1e-12)

@pytest.mark.parametrize("rank", [srank, energy_rank])
def test_equal_values_hold_their_share_exactly(rank):
    "k of n equal singular values hold k/n of the sum, whatever k/n rounds to"
    for n in (3, 7, 10, 49, 100):
        for k in range(n): assert rank(torch.eye(n), k/n) == n - k

@pytest.mark.parametrize("missing", [-.1, 1, 2])
def test_impossible_shares(missing):
    for rank in (srank, energy_rank):
        with pytest.raises(LopError, match="at least 0 and below 1"): rank(torch.eye(3), missing)

def test_gram_and_scaled():
    g = torch.Generator().manual_seed(0)
    for n, d in ((5, 9), (9, 5)):
        h = torch.randn(2, n, d, generator=g)*1e30; x = scaled(h)
        assert x.dtype == torch.float64 and gram(x).shape == (2, 5, 5); close(x.abs().amax((1, 2)), 1, 1e-15)
        close(x*h.abs().amax((1, 2), keepdim=True).double(), h, 1e-12)
        close(spectrum(h, g=gram(x)), spectrum(h), 1e-13); close(spectrum(h, True, gram(centre(x))), spectrum(h, True), 1e-13)
    assert (scaled(torch.zeros(3, 4)) == 0).all() and (scaled(torch.tensor([[math.inf, 1.]])) == 0).all()

@dtypes
def test_products_and_eigenvalues_are_the_same_with_and_without_autograd(dtype):
    "across the sizes where a processor changes its way: torch's own for tensors that autograd follows, NumPy's else; one of a batch as alone, bit for bit"
    for k, n in ((3, 7), (128, 40), (129, 300), (300, 200)):
        a = torch.randn(2, k, n, generator=torch.Generator().manual_seed(k), dtype=dtype); g = outer(a); followed = a.clone().requires_grad_()
        assert g.dtype == dtype and torch.equal(g, g.mT) and torch.equal(g[1], outer(a[1])) and torch.equal(outer(a.mT.contiguous().mT)[0], outer(a[0].T.contiguous().T))
        close(g, outer(followed).detach(), 10*EPS[dtype]); assert torch.equal(spectrum(a)[1], spectrum(a[1]))
        loose = max(k, n)*torch.finfo(torch.float64).eps*max(k, n)                     # of the squares
        s, own = spectrum(a), spectrum(a.double(), g=gram(scaled(followed.double()))).detach()
        close((s**2/s[:, :1]**2), own**2/own[:, :1]**2, loose)


# ---- bad input ----
@pytest.mark.parametrize("f", [*PURE, spectrum])
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_to_measure(f, shape):
    name = getattr(f, "func", f).__name__
    with pytest.raises(LopError, match=f"^{name} needs .* at least one of each") as e: f(torch.zeros(shape))
    assert "\n" not in str(e.value)


# ---- properties ----
shapes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31))
def draw(shape, relu=True):
    n, d, seed = shape
    h = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return h.relu() if relu else h

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_order_of_units_and_samples_is_nothing(shape, seed):
    h = draw(shape); g = torch.Generator().manual_seed(seed)
    moved = h[torch.randperm(h.shape[0], generator=g)][:, torch.randperm(h.shape[1], generator=g)]
    for f in PURE: close(f(moved), f(h), 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(-300, 300))
def test_scale_is_nothing(shape, power):
    h = draw(shape)
    scaled = h * 10.**(power / 2 if power < 0 else power)     # down to 1e-150, up to 1e300
    for f in PURE: close(f(scaled), f(h), 1e-9)

@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3), st.integers(1, 3))
def test_leading_axes_are_a_loop(shape, a, b):
    n, d, seed = shape; h = draw((a * b * n, d, seed)).view(a, b, n, d)
    for f in PURE: close(f(h), [[f(h[i, j]) for j in range(b)] for i in range(a)], 1e-9)

@settings(max_examples=100, deadline=None)
@given(shapes, st.booleans(), st.booleans())
def test_numpy_svd(shape, relu, centred):
    "To 1e-10, for random matrices of any shape (those whose small singular values are above the Gram matrix's rounding, or zero)"
    h = draw(shape, relu); assume(h.std(0, correction=0).min() > 0 if centred else h.any())
    s = np.linalg.svd(h - h.mean(0) if centred else h, compute_uv=False)
    assume(s[0] > 1e-3 and not ((s > 1e-13 * s[0]) & (s < 1e-4 * s[0])).any())
    ours = [f(h, centred=centred) for f in (effective_rank, stable_rank, participation_ratio, srank, energy_rank, numerical_rank)]
    theirs = slow(np.where(s > 1e-13*s[0], s, 0).tolist())
    close(ours, theirs[:6], 1e-10); close(effective_rank(h, centred, squared=True), theirs[7], 1e-10)
    if not centred: close(rankme(h), theirs[6], 1e-10)

@settings(max_examples=60, deadline=None)
@given(shapes)
def test_a_spectrum_at_hand_gives_the_same(shape):
    h = draw(shape)
    for f in RANKS: close(f(h, s=spectrum(h)), f(h), 1e-12)
    for f in CENTRED: close(f(h, s=spectrum(h, True)), f(h), 1e-12)
    for centred, x in ((False, scaled(h)), (True, centre(scaled(h)))): close(participation_ratio(h, centred, g=gram(x)), participation_ratio(h, centred), 1e-12)

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(2, 10))
def test_more_of_the_same_samples_is_nothing(shape, times):
    h = draw(shape)
    for f in PURE: close(f(h.repeat(times, 1)), f(h), 2e-4 if f is rankme else 1e-9)         # up to 23 more values of 1e-7

def test_batch_size():
    "One network on 5,000 inputs and on ten times 500 others: the ratios of moments agree within 3 %; counts and entropies do not promise that"
    g = torch.Generator().manual_seed(0)
    h = (torch.randn(5000, 10, generator=g) @ torch.randn(10, 16, generator=g)).relu()
    for f in (stable_rank, participation_ratio):
        parts = f(h.view(10, 500, 16)); assert (parts.mean()/f(h) - 1).abs() < .03

@pytest.mark.parametrize("n,d,r", [(40, 40, 40), (200, 30, 30), (30, 200, 30), (60, 50, 7), (512, 512, 512)])
def test_numpy_svd_of_built_matrices(n, d, r):
    h = from_spectrum(np.linspace(1, .01, r), n, d, seed=r)
    close([effective_rank(h), stable_rank(h)], reference(h), 1e-10)
    assert spectrum(h).shape == (min(n, d),) and spectrum(h[None]).shape == (1, min(n, d))
    assert (spectrum(h) > 0).sum() == r                       # rounding is cut, nothing else

def test_what_the_cut_costs():
    "Singular values from 1 down to 1e-12: those below 1e-7 are lost, and with them less than 1e-4 of the rank"
    h = from_spectrum(10.**-np.arange(0, 12.5, .5), 64, 64, seed=0)
    kept = int((spectrum(h) > 0).sum())
    assert 14 <= kept <= 16
    close([effective_rank(h), stable_rank(h)], reference(h), 1e-4)

@settings(max_examples=100, deadline=None)
@given(shapes, st.booleans(), st.floats(0, 4))
def test_the_chain(shape, relu, power):
    "1 ≤ stable ≤ participation ratio ≤ effective of the squares ≤ effective ≤ rank ≤ min(N, D), and energy rank ≤ srank ≤ rank, also for very uneven spectra"
    h = draw(shape, relu); assume(h.any())
    h = h * torch.linspace(1, .1, h.shape[1], dtype=h.dtype)**power
    for centred in (False, True):
        s = spectrum(h, centred); rank = (s > 0).sum()
        if rank == 0: continue
        chain = [1, stable_rank(h, s=s), participation_ratio(h, s=s), effective_rank(h, s=s, squared=True), effective_rank(h, s=s), rank, min(h.shape)]
        for a, b in zip(chain, chain[1:]): assert a <= b * (1 + 1e-12)
        assert 1 <= energy_rank(h, s=s) <= srank(h, s=s) <= rank == numerical_rank(h, s=s)

@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(-100, 100))
def test_centred_has_no_mean(shape, shift):
    h = draw(shape)
    for f in (effective_rank, stable_rank, participation_ratio): close(f(h + shift, centred=True), f(h, centred=True), 1e-6)

@settings(max_examples=60, deadline=None)
@given(shapes)
def test_copies_of_units_add_nothing(shape):
    h = draw(shape)
    for rank in PURE: close(rank(torch.cat([h, h], 1)), rank(h), 2e-4 if rank is rankme else 1e-9)
