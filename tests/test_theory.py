"Means under a normal distribution, α, rank recovery and flat slopes against closed forms and slow integrals; sets of units against loops."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats

from lop_nb.layers import make_activation
from lop_nb.models import MLP, CNN
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.theory import (alpha_f, duplicate_pairs, equal_rank, flat_relu, flat_share, flat_tanh, saturated_units, hermite_rule, normal_rule, persistence,
                           predicted_rank, spread_after, stage_rows, stages)

KINDS = ["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "elu", "selu"]


def mean(g, kinks=(0.,), reach=12.):
    "E g(z) by SciPy's adaptive rule, piece by piece"
    edges = [-reach, *sorted(kinks), reach]
    return sum(integrate.quad(lambda z: g(z) * math.exp(-z*z/2) / math.sqrt(2*math.pi), a, b, epsabs=1e-13, epsrel=1e-12, limit=400)[0] for a, b in zip(edges, edges[1:]))


def slow_alpha(f, centred):
    "α from its definition, one point at a time"
    def at(z, slope=False):
        x = torch.tensor(z, dtype=torch.float64, requires_grad=True); y = f(x)
        return torch.autograd.grad(y, x)[0].item() if slope else y.item()
    m = mean(at) if centred else 0.
    return mean(lambda z: at(z, True)**2) / mean(lambda z: (at(z) - m)**2) - 1


# ---- rules ----
@given(st.lists(st.floats(-15, 15), max_size=3))
@settings(max_examples=20, deadline=None)
def test_normal_rule_has_the_moments_wherever_it_is_cut(kinks):
    z, w = normal_rule(kinks)
    for k, moment in {0: 1, 1: 0, 2: 1, 3: 0, 4: 3, 6: 15, 10: 945}.items(): assert abs((w*z**k).sum() - moment) < 1e-10 * max(moment, 1)


@pytest.mark.parametrize("kink", [-3., 0., .7, 5.])
def test_normal_rule_takes_kinks_exactly(kink):
    "E|z − k| = 2φ(k) + k(2Φ(k) − 1); cut elsewhere it is not as good"
    z, w = normal_rule([kink]); exact = 2*stats.norm.pdf(kink) + kink*(2*stats.norm.cdf(kink) - 1)
    assert abs((w*(z - kink).abs()).sum() - exact) < 1e-13
    many = normal_rule([[kink], [0.]])
    assert torch.equal(many[0][0], z) and torch.equal(many[1][0], w)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 80])
def test_hermite_without_kinks_is_gauss_and_hermites(n):
    z, w = hermite_rule(n); x, v = np.polynomial.hermite_e.hermegauss(n)
    np.testing.assert_allclose(z, x, atol=1e-10); np.testing.assert_allclose(w, v/v.sum(), atol=1e-12)


def test_hermite_on_pieces_is_exact_for_piecewise_polynomials():
    "n nodes a piece integrate polynomials of degree 2n − 1 of each piece"
    z, w = hermite_rule(4, [-1., .5])
    for k in range(8):
        for lo, hi in ((-math.inf, -1), (-1, .5), (.5, math.inf)):
            got = (w*z**k*((z > lo) & (z < hi))).sum(); want = mean(lambda z: z**k * (lo < z < hi), kinks=(-1., .5))
            assert abs(got - want) < 1e-10 * max(1, abs(want))


# ---- alpha ----
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("centred", [True, False])
def test_alpha_by_three_integrators(name, centred):
    "quadrature and Gauss-Hermite agree to 1e-9, both with a slow loop to 1e-8"
    f = make_activation(name); a, h, slow = alpha_f(f, centred), alpha_f(f, centred, "hermite"), slow_alpha(f, centred)
    assert abs(a - h) < 1e-9 and abs(a - slow) < 1e-8


@given(st.floats(-.9, .9))
@settings(max_examples=20, deadline=None)
def test_alpha_of_leaky_relu(c):
    second, m = (1 + c*c)/2, (1 - c)/math.sqrt(2*math.pi)
    assert abs(alpha_f(lambda z: F.leaky_relu(z, c)) - (second/(second - m*m) - 1)) < 1e-10
    assert abs(alpha_f(lambda z: F.leaky_relu(z, c), centred=False)) < 1e-10


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_alpha_of_a_hermite_polynomial_is_its_degree_less_one(k):
    c = np.polynomial.hermite_e.herme2poly([0]*k + [1])
    assert abs(alpha_f(lambda z: sum(a*z**i for i, a in enumerate(c))) - (k - 1)) < 1e-9


@given(st.floats(.3, 5), st.floats(-3, 3), st.floats(.1, 10), st.floats(-5, 5), st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None)
def test_centred_alpha_ignores_what_happens_behind_f_and_is_not_negative(a, b, gain, shift, name):
    f = make_activation(name); alpha = alpha_f(f, scale=a, shift=b)
    assert alpha > -1e-9
    assert abs(alpha_f(lambda z: gain*f(z) - shift, scale=a, shift=b) - alpha) < 1e-6*(1 + alpha)


def test_alpha_of_tensors_is_alpha_of_each():
    a, b = torch.tensor([.5, 2., 7.]), torch.tensor([[-1.], [0.], [2.]])
    many = alpha_f(F.selu, scale=a, shift=b)
    assert many.shape == (3, 3) and many.dtype == torch.float64
    for i in range(3):
        for j in range(3): assert abs(many[i, j] - alpha_f(lambda z: F.selu(a[j].double()*z + b[i, 0].double()), kinks=[-b[i, 0].item()/a[j].item()])) < 1e-9


def test_alpha_where_there_is_none():
    assert alpha_f(torch.zeros_like).isnan() and alpha_f(lambda z: 0*z + 3).isnan() and alpha_f(F.relu, shift=-30.).isnan()
    for bad in (dict(scale=0.), dict(scale=-1.)):
        with pytest.raises(LopError, match="scale above 0"): alpha_f(F.relu, **bad)
    with pytest.raises(LopError, match="Choices: quadrature, hermite"): alpha_f(F.relu, how="trapezoid")
    with pytest.raises(LopError, match="one scale"): alpha_f(F.relu, how="hermite", scale=torch.ones(2))


# ---- ranks ----
@pytest.mark.parametrize("eps", [1e-4, 1e-2, .1, .5, 1.])
def test_spread_of_erf_in_closed_form(eps):
    "E erf(x)erf(y) = 2/π asin(2ρ/3)"
    corr = lambda rho: math.asin(2*rho/3)/math.asin(2/3)
    assert abs(spread_after(torch.erf, eps, kinks=()) - (1 - corr(1 - eps))) < 1e-11


@pytest.mark.parametrize("name", ["tanh", "gelu", "sigmoid"])
def test_spread_by_hermites_series(name):
    "corr = Σ c_k² ρ^k / Σ c_k², k ≥ 1, c_k = E f(z) He_k(z) / √k!"
    f, (z, w), eps = make_activation(name), normal_rule([0.]), .3
    he, c = [torch.ones_like(z), z], []
    for k in range(1, 60):
        c.append(((w*f(z)*he[k]).sum()**2).item())
        he.append((z*he[k] - math.sqrt(k)*he[k - 1])/math.sqrt(k + 1))         # normalised
    assert abs(spread_after(f, eps) - sum(v*(1 - (1 - eps)**(k + 1)) for k, v in enumerate(c))/sum(c)) < 1e-7


@pytest.mark.parametrize("name", KINDS)
def test_alpha_is_the_spreads_slope(name):
    "with an error that falls with √ε at kinks, with ε elsewhere"
    f = make_activation(name)
    off = [abs(spread_after(f, e)/e - 1 - alpha_f(f)).item() for e in (1e-2, 1e-4)]
    assert off[1] < .02 and off[1] < off[0]/5


@given(st.integers(2, 60), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_equal_rank_is_that_of_the_matrix(n, eps):
    p = np.linalg.eigvalsh(np.full((n, n), 1 - eps) + eps*np.eye(n)).clip(0)/n
    assert abs(equal_rank(n, eps) - math.exp(-(p[p > 0]*np.log(p[p > 0])).sum())) < 1e-6*n


def test_predicted_rank_is_the_first_order():
    "what it leaves out of the gain is of the same order in ε and smaller by ln(n/ε) alone: ((1 + α) ln(1 + α) − α) / (α ln(n/ε)) of it"
    n, alpha = 10_000, .5
    for eps in (1e-4, 1e-6, 1e-8):
        exact, first = (r - equal_rank(n, eps) for r in (equal_rank(n, (1 + alpha)*eps), predicted_rank(n, eps, alpha)))
        left = ((1 + alpha)*math.log(1 + alpha) - alpha)/(alpha*math.log(n/eps))
        assert abs(first/exact - 1 - left) < .1*left


# ---- flat slopes ----
@pytest.mark.parametrize("tol", [1e-4, 1e-2])
def test_flat_share_is_the_closed_form(tol):
    a, b = torch.logspace(-6, 3, 19), torch.linspace(-4, 4, 9)
    assert (flat_share(torch.tanh, tol, scale=a) - flat_tanh(a, tol)).abs().max() <= 2/2**13
    assert (flat_share(F.relu, tol, shift=b) - flat_relu(b)).abs().max() <= 1/2**13
    assert flat_tanh(tol/2, tol) == 1 and flat_share(lambda z: z) == 0 and flat_share(torch.zeros_like) == 1


# ---- sets of units ----
def slow_frozen(slope, flat, share):
    N, D = slope.shape
    return [sum(abs(slope[i, j].item()) < flat for i in range(N)) >= math.ceil(share*N - 1e-9) for j in range(D)]


def slow_pairs(h, threshold, least):
    h = h.double().numpy(); D = h.shape[1]; c = np.zeros((D, D), bool)
    for i in range(D):
        for j in range(D):
            if i != j and min(h[:, i].std(ddof=1), h[:, j].std(ddof=1)) > least: c[i, j] = abs(np.corrcoef(h[:, i], h[:, j])[0, 1]) > threshold
    return c


@given(st.integers(0, 10**6), st.sampled_from([.5, .8, .95, 1.]))
@settings(max_examples=25, deadline=None)
def test_sets_against_loops_and_their_symmetries(seed, share):
    g = generator(seed, "sets"); base = torch.randn(20, 3, generator=g)
    h = base[:, torch.randint(3, (7,), generator=g)]*torch.randn(7, generator=g) + .1*torch.randn(20, 7, generator=g); h[:, 6] = 2.
    slope = (torch.rand(20, 7, generator=g) > torch.rand(7, generator=g)).float()
    assert saturated_units(slope, threshold=share).tolist() == slow_frozen(slope, 1e-3, share)
    pairs = duplicate_pairs(h); assert (pairs.numpy() == slow_pairs(h, .95, 1e-5)).all() and not pairs[6].any()
    order, rows = torch.randperm(7, generator=g), torch.randperm(20, generator=g)
    assert torch.equal(saturated_units(slope[rows][:, order], threshold=share), saturated_units(slope, threshold=share)[order]) and torch.equal(duplicate_pairs(h[rows][:, order]), pairs[order][:, order])
    assert torch.equal(saturated_units(slope.repeat(3, 1), threshold=share), saturated_units(slope, threshold=share)) and torch.equal(duplicate_pairs(h.repeat(3, 1)), pairs)
    both = torch.stack([h, h.flip(1)]); assert torch.equal(duplicate_pairs(both)[1], duplicate_pairs(h.flip(1))) and torch.equal(duplicate_pairs(both)[0], pairs)
    assert torch.equal(duplicate_pairs(-3*h + 1), pairs)


def test_sets_of_what_is_not_finite_or_empty():
    h = torch.randn(30, 4, generator=generator(0, "nan")); h[:, 3] = h[:, 2]; bad = h.clone(); bad[0, 0] = torch.nan
    assert torch.equal(duplicate_pairs(torch.stack([h, bad]))[0], duplicate_pairs(h)) and not duplicate_pairs(bad)[0].any()
    assert not saturated_units(torch.full((5, 2), torch.nan)).any()
    for f in (saturated_units, duplicate_pairs):
        for empty in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3)):
            with pytest.raises(LopError): f(empty)


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_persistence_of_sets(before, after):
    s, t = (torch.tensor([k in x for k in range(10)]) for x in (before, after))
    got = persistence(s, t)
    assert got.isnan() if not before else abs(got - len(before & after)/len(before)) < 1e-6
    assert torch.equal(persistence(torch.stack([s, t]), torch.stack([t, t]))[0].nan_to_num(-1), got.nan_to_num(-1))


# ---- stages ----
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("after", [False, True])
def test_stages_are_what_stands_between_the_layers(norm, after):
    nets = Replicas(lambda: MLP(6, 3, hidden_sizes=[5, 4], activation="tanh", normalization=norm, norm_after_activation=after, dropout_p=.5), seeds=[0, 1])
    x = torch.randn(2, 11, 1, 2, 3, generator=generator(0, "x")); rows = stage_rows(nets, x)
    assert all(h.shape[:2] == (2, 11) for h in rows.values()) and torch.equal(rows["Input"], x.flatten(2))
    for r, m in enumerate(nets.modules):
        m.eval(); h = x[r].flatten(1)
        for i in range(2):
            h = m.get_submodule(f"linear_{i}")(h); assert torch.equal(rows[f"H{i + 1}_Lin"][r], h)
            for part in [p for p in (["Act", "Nrm"] if after else ["Nrm", "Act"]) if p == "Act" or norm != "none"]:
                if part == "Act": assert torch.equal(rows[f"H{i + 1}_ActIn"][r], h)
                h = m.get_submodule(f"{'act' if part == 'Act' else 'norm'}_{i}")(h); assert torch.equal(rows[f"H{i + 1}_{part}"][r], h)
        assert torch.equal(rows["Out_Logits"][r], m.out(h))
        m.train()
    assert all(m.training for m in nets.modules)


def test_other_networks_have_no_stages():
    with pytest.raises(LopError, match="CNN has no stages"): stages(CNN(1, 8, 10))
