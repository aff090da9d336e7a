"""The unit measures against closed forms, against loops written from their definitions, and for properties that hold for any activations."""
import math

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lop_nb.activity import (activation_statistics, dead_fraction, distance, dormant_fraction, dormant_scores, frozen_fraction, gradient_shares, histogram,
                             often, saturated_fraction, saturated_gradient_fraction, slopes, unit_moments, unit_rows, weight_magnitude, weight_norm, zero_gradient_fraction)
from lop_nb.runtime import LopError
from measuring import EPS, close, dtypes, normal

def by_share(h): return saturated_gradient_fraction(h, h, ratio=.3, threshold=.5)      # as if each gradient were its activation: h → h²
def by_source(h): return saturated_gradient_fraction(h, h, ratio=.3, threshold=.5, how="source")
STATISTICS = {k: (lambda h, k=k: activation_statistics(h)[k]) for k in ("mean_of_means", "std_of_means", "mean_of_stds", "std_of_stds")}
SHARES = dict(dead_fraction=dead_fraction, dormant_fraction=dormant_fraction, saturated_fraction=lambda h: saturated_fraction(h, .3, .5), frozen_fraction=frozen_fraction,
              saturated_gradient_fraction=by_share, source=by_source, zero_gradient_fraction=zero_gradient_fraction)
PURE = [*SHARES.values(), *STATISTICS.values()]


# ---- closed forms ----
@dtypes
def test_dead(dtype):
    h = torch.ones(20, 5, dtype=dtype)
    for j, n in enumerate((0, 1, 18, 19, 20)): h[:n, j] = 0
    assert [round(5 * dead_fraction(h, threshold=t).item()) for t in (.05, .9, .95, .96, 1.)] == [4, 3, 2, 1, 1]
    h[h == 0] = -1e-7
    close(dead_fraction(h), .4, EPS[dtype]); assert dead_fraction(h, eps=1e-8) == 0 and dead_fraction(-h, eps=0) == 0

def test_a_share_is_a_count():
    "k of n samples reach the threshold k/n, whatever k/n rounds to; also if only some samples count"
    for n in (3, 7, 10, 49, 100, 360):
        rows = torch.cat([torch.ones(n), torch.zeros(5)]).bool()
        for k in range(1, n + 1):
            true = torch.zeros(n + 5, 1, dtype=torch.bool); true[:k] = True; true[n:] = True
            assert often(true[:n], k / n) and often(true, k / n, rows)
            true[k - 1] = False
            assert not often(true[:n], k / n) and not often(true, k / n, rows)
            h = torch.ones(n, 1); h[:k] = 0
            assert dead_fraction(h, threshold=k / n) == 1

@dtypes
def test_dormant(dtype):
    h = torch.tensor([[4., -1, .2, 0, 0], [-4, 1, .2, 0, 0]], dtype=dtype)           # sizes 4, 1, .2, 0, 0: mean 1.04
    close(dormant_scores(h), [4/1.04, 1/1.04, .2/1.04, 0, 0], EPS[dtype])
    close([dormant_fraction(h, t) for t in (0., .19, .2, .97, 4.)], [.4, .4, .6, .8, 1], EPS[dtype])
    assert dormant_scores(torch.zeros(3, 4, dtype=dtype)).tolist() == [0]*4 and dormant_fraction(torch.zeros(3, 4, dtype=dtype), 0.) == 1
    assert dormant_fraction(torch.full((3, 4), 7., dtype=dtype)) == 0

@pytest.mark.parametrize("f, df", [(torch.relu, lambda z: (z > 0)*1.), (torch.tanh, lambda z: 1/z.cosh()**2), (torch.sigmoid, lambda z: 1/(2 + z.exp() + (-z).exp())),
                                   (nn.LeakyReLU(.25), lambda z: torch.where(z > 0, 1., .25)), (nn.ELU(), lambda z: torch.where(z > 0, 1., z.exp())), (nn.ReLU(inplace=True), lambda z: (z > 0)*1.),
                                   (lambda z: z**3 + 1, lambda z: 3*z**2), (lambda z: torch.full_like(z, 3.), torch.zeros_like), (torch.sign, torch.zeros_like), (lambda z: (z > 0).to(z), torch.zeros_like)])
def test_slopes(f, df):
    z = normal(4, 5, 6); before = z.clone()
    close(slopes(f, z), df(z), 1e-12)
    with torch.no_grad(): close(slopes(f, z.requires_grad_()), df(before), 1e-12)
    assert torch.equal(z, before) and z.grad is None and not slopes(f, z).requires_grad

def test_slopes_leave_parameters_alone():
    "The gain of a parametric ReLU gets no gradient, its slope is found, and f may not mix or reshape"
    f, z = nn.PReLU(init=.2), normal(5, 3, dtype=torch.float32)
    close(slopes(f, z), torch.where(z > 0, 1., .2), 1e-7); assert f.weight.grad is None
    assert slopes(torch.tanh, torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(LopError, match="elementwise"): slopes(lambda z: z[:2], z)

def test_frozen_and_saturated():
    z = torch.tensor([[-1., -1, 1, 0], [-2, 2, 1, 0]])
    s = slopes(torch.relu, z)                                                        # relu′(0) = 0
    assert frozen_fraction(s) == .5 and saturated_fraction(s, threshold=1.) == .5 and saturated_fraction(s, threshold=.5) == .75
    assert saturated_fraction(torch.full((2, 1), -1e-3), 1e-3) == 0 and saturated_fraction(torch.full((2, 1), -9e-4), 1e-3) == 1
    assert saturated_fraction(s, flat=0.) == 0                                       # nothing is below zero in size
    t = slopes(torch.tanh, torch.tensor([[3.7, 3.9, 9.2, 20]]))                      # .0024, .0016, 4e-8 (0 in float32), 0
    assert saturated_fraction(t, 2e-3) == .75 and frozen_fraction(t) == .5 and frozen_fraction(slopes(torch.tanh, torch.tensor([[9.2, 20]]).double())) == .5

def test_gradient_shares():
    h = torch.tensor([[1., -10, 0], [3, 10, 0]]); g = torch.tensor([[1e-3, -1e-2, 5], [0, 0, 0]])
    # sizes 2, 10, 0; pulls of the first sample 2e-3, 1e-1, 0, their mean .034; the second sample has none
    close(gradient_shares(h, g)[0], [.002/.034, .1/.034, 0], 1e-6); assert gradient_shares(h, g)[1].isnan().all()
    for ratio, share in ((0., 1/3), (.05, 1/3), (.06, 2/3), (3., 1)): close(saturated_gradient_fraction(h, g, ratio), share, 1e-6)
    assert saturated_gradient_fraction(h, 0*g).isnan() and saturated_gradient_fraction(h, 0*g, how="source") == 1
    assert saturated_gradient_fraction(0*h, g) == 1                                  # a silent layer: nothing passes, whatever arrives
    assert saturated_gradient_fraction(h, g.abs() + 1, 0.) == pytest.approx(1/3)     # and a silent unit likewise

def test_sources_ratio():
    "|∂L/∂h| / max(mean |h|, 1e-12) below 1e-4 in more than 99 % of the samples; a silent unit counts as responsive"
    h, g = torch.full((200, 4), 2.), torch.full((200, 4), 1.)
    g[:, 0] = 1.9e-4; g[:199, 1] = 0; g[:198, 2] = 0; h[:, 3] = 0; g[:, 3] = 1e-15
    close(saturated_gradient_fraction(h, g, 1e-4, .99, "source"), .5, 1e-6)          # 200 and 199 of 200 are more than 99 %, 198 are not; 1e-15/1e-12 is above 1e-4

def test_zero_gradients():
    g = torch.zeros(4, 5); g[0, 1], g[2, 3], g[3, 3] = 1e-40, math.pi, -1
    close(zero_gradient_fraction(g), 17/20, 1e-6)
    close(zero_gradient_fraction(torch.stack([g, 0*g, g + 1])), [17/20, 1, 1/20], 1e-6)

@dtypes
def test_moments(dtype):
    h = normal(50, 7, dtype=dtype)*10 + 3
    close(unit_moments(h)[0], np.asarray(h.double()).mean(0), EPS[dtype]); close(unit_moments(h)[1], np.asarray(h.double()).std(0), EPS[dtype])
    for c in (.1, 1e30, -1e-30, 0.):                                                 # a constant has no deviation, not even rounding
        assert unit_moments(torch.full((777, 2), c, dtype=dtype))[1].tolist() == [0, 0]
        close(unit_moments(torch.full((777, 2), c, dtype=dtype))[0]/(c or 1), [bool(c)]*2, EPS[dtype])
    one = activation_statistics(torch.tensor([[5.]], dtype=dtype))
    assert {k: v.item() for k, v in one.items()} == dict(mean_of_means=5, std_of_means=0, mean_of_stds=0, std_of_stds=0)

def test_histogram():
    h = normal(3, 40, 100)
    edges = torch.linspace(-.3, .3, 11)
    for of, values in zip(("means", "stds"), (np.asarray(h).mean(1), np.asarray(h).std(1))):
        got = histogram(h, edges, of)
        for r in range(3): close(got[r], np.histogram(values[r].clip(-.3, .3), np.asarray(edges.double()))[0], 0)
    assert histogram(torch.tensor([[0., 1, 2, 3, -9, 9]]), [0, 1, 2, 3]).tolist() == [2, 1, 3]   # edges belong to the bin on their right, the last one to the last
    h[1, 0, 0] = math.nan
    assert histogram(h, edges).isnan().all(1).tolist() == [False, True, False]
    with pytest.raises(LopError, match="Did you mean 'means'"): histogram(h, edges, "mean")
    for bad in ([1.], torch.ones(2, 2)):
        with pytest.raises(LopError, match="two edges"): histogram(h, bad)

def test_weight_magnitude():
    w = torch.randn(3, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    close(weight_magnitude(w, dims=4), [np.abs(v.double().numpy()).mean() for v in w], 1e-6)
    assert weight_magnitude(torch.full((300, 300), 1., dtype=torch.float16)) == 1 and weight_magnitude(torch.full((3,), torch.inf), dims=1) == torch.inf


def test_weight_norm():
    w = normal(3, 8, 4, 5, 5)
    close(weight_norm(w, dims=4), [np.linalg.norm(v.flatten()) for v in w], 1e-13)
    close(weight_norm(w.flatten(2), dims=2), weight_norm(w, dims=4), 1e-13)
    assert weight_norm(w, dims=5).shape == () and weight_norm(torch.ones(3, 4), dims=1).tolist() == [2, 2, 2]
    assert weight_norm(torch.full((300, 300), 1., dtype=torch.float16)) == 300        # not overflowed
    for dims in (0, 6):
        with pytest.raises(LopError, match="dims is 1 to 5"): weight_norm(w, dims=dims)

def test_distance():
    w, o = normal(3, 8, 4), normal(3, 8, 4, seed=1)
    close(distance(w, o), [np.linalg.norm((a - b).flatten()) for a, b in zip(w, o)], 1e-13)
    close(distance(w, o[0]), distance(w, o[0].expand_as(w)), 0); close(distance(w, w), [0]*3, 0); close(distance(w, o), distance(o, w), 0)
    assert (distance(w, o) <= distance(w, o[2]) + distance(o[2].expand_as(o), o)).all()
    close(distance(w[0], o[0], dims=1), np.linalg.norm(np.asarray(w[0] - o[0]), axis=1), 1e-13)
    assert distance(torch.full((300, 300), 2., dtype=torch.float16), torch.ones(300, 300, dtype=torch.float16)) == 300
    for bad, dims in ((o[:, :7], 2), (o.view(3, 4, 8), 2)):
        with pytest.raises(LopError, match="distance needs weights of one shape"): distance(w, bad, dims)
    with pytest.raises(LopError, match="dims is 1 to 3"): distance(w, o, 0)

def test_unit_rows():
    h = torch.randn(2, 3, 4, 5, 6)
    rows = unit_rows(h)
    for b in range(3):
        for i in range(5):
            for j in range(6): assert torch.equal(rows[:, (b * 5 + i) * 6 + j], h[:, b, :, i, j])
    assert torch.equal(unit_rows(h[0], leading=0), rows[0])
    assert torch.equal(unit_rows(h[:, :, 0], axis=2), h[:, :, 0].reshape(2, 15, 6))
    assert torch.equal(unit_rows(h[:, :, :, 0, 0]), h[:, :, :, 0, 0])


# ---- bad input ----
@pytest.mark.parametrize("how", ["share", "source"])
def test_not_finite_gradients(how):
    h, g = normal(3, 12, 9), normal(3, 12, 9, seed=1); g[1, 2, 3] = math.nan
    assert saturated_gradient_fraction(h, g, how=how).isnan().tolist() == [False, True, False]

NAMED = dict(SHARES, dormant_scores=dormant_scores, unit_moments=unit_moments, activation_statistics=activation_statistics, histogram=lambda h: histogram(h, [0, 1]))
NAMED["saturated_gradient_fraction (source)"] = NAMED.pop("source")
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_to_measure(name, shape):
    with pytest.raises(LopError, match=f"{name.split()[0]} needs .* at least one of each, not") as e: NAMED[name](torch.zeros(shape))
    assert "\n" not in str(e.value)

def test_gradients_of_another_shape():
    with pytest.raises(LopError, match="a gradient for each activation"): saturated_gradient_fraction(torch.ones(5, 4), torch.ones(4, 5))
    with pytest.raises(LopError, match="Unknown saturation 'sauce'. Did you mean 'source'?"): saturated_gradient_fraction(torch.ones(5, 4), torch.ones(5, 4), how="sauce")


# ---- loops written from the definitions ----
shapes = st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(0, 2**31))
def draw(shape, relu=True):
    n, d, seed = shape
    h = normal(n, d, seed=seed)*normal(d, seed=seed + 1).exp()                       # units of different sizes
    return h.relu() if relu else h

def slow_dead(h, share, eps): return sum(sum(abs(v) <= eps for v in column) >= share*len(column) - 1e-9 for column in h.T.tolist())/h.shape[1]
def slow_sizes(h): return [sum(abs(v) for v in column)/len(column) for column in h.T.tolist()]
def slow_dormant(h, tau):
    size = slow_sizes(h); mean = sum(size)/len(size)
    return sum(s <= tau*mean for s in size)/len(size)
def slow_saturated(slope, flat, share): return sum(sum(abs(v) < flat for v in column) >= share*len(column) - 1e-9 for column in slope.T.tolist())/slope.shape[1]
def slow_by_share(h, g, ratio, share):
    "Over samples that have a gradient, one unit at a time"
    size, d = slow_sizes(h), h.shape[1]
    rows = [row for row in g.tolist() if any(row)]
    if not rows: return math.nan
    flat = [sum(abs(row[j])*size[j] <= ratio*sum(abs(row[k])*size[k] for k in range(d))/d for row in rows) for j in range(d)]
    return sum(f >= share*len(rows) - 1e-9 for f in flat)/d
def slow_by_source(h, g, ratio, share):
    size = slow_sizes(h)
    return sum(sum(abs(row[j])/max(size[j], 1e-12) < ratio for row in g.tolist()) > share*len(h) + 1e-9 for j in range(h.shape[1]))/h.shape[1]

@settings(max_examples=100, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([.3, .5, .95, 1.]))
def test_loops(shape, relu, share):
    h = draw(shape, relu); g = normal(*h.shape, seed=shape[2] + 2)*(normal(*h.shape, seed=shape[2] + 3) > -.5)*(normal(len(h), 1, seed=shape[2] + 4) > -1)
    for eps in (0., .5): close(dead_fraction(h, share, eps), slow_dead(h, share, eps), 1e-12)
    for tau in (0., .1, .7): close(dormant_fraction(h, tau), slow_dormant(h, tau), 1e-12)
    for flat in (1e-3, .5): close(saturated_fraction(h, flat, share), slow_saturated(h, flat, share), 1e-12)
    close(frozen_fraction(h), sum(not any(c) for c in h.T.tolist())/h.shape[1], 1e-12)
    for ratio in (0., .2, .9):
        close(saturated_gradient_fraction(h, g, ratio, share), slow_by_share(h, g, ratio, share), 1e-12)
        close(saturated_gradient_fraction(h, g, ratio, share, "source"), slow_by_source(h, g, ratio, share), 1e-12)
    close(zero_gradient_fraction(g), sum(v == 0 for row in g.tolist() for v in row)/g.numel(), 1e-12)
    columns = h.T.tolist(); means = [math.fsum(c)/len(c) for c in columns]; stds = [(math.fsum((v - m)**2 for v in c)/len(c))**.5 for c, m in zip(columns, means)]
    spread = lambda v: (sum(v)/len(v), (sum((a - sum(v)/len(v))**2 for a in v)/len(v))**.5)
    close(list(activation_statistics(h).values()), [*spread(means), *spread(stds)], 1e-9)


# ---- properties ----
@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_order_of_units_and_samples_is_nothing(shape, seed):
    h = draw(shape); g = torch.Generator().manual_seed(seed)
    moved = h[torch.randperm(h.shape[0], generator=g)][:, torch.randperm(h.shape[1], generator=g)]
    for f in PURE: close(f(moved), f(h), 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(2, 10))
def test_more_of_the_same_samples_is_nothing(shape, times):
    h = draw(shape)
    for f in PURE: close(f(h.repeat(times, 1)), f(h), 1e-9)

@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3), st.integers(1, 3))
def test_leading_axes_are_a_loop(shape, a, b):
    n, d, seed = shape; h = draw((a * b * n, d, seed)).view(a, b, n, d)
    for f in PURE: close(f(h), [[f(h[i, j]) for j in range(b)] for i in range(a)], 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(-480, 480), st.integers(-480, 480))
def test_scale_is_nothing(shape, of_units, of_loss):
    "For what is relative to the layer: no change at all, from 1e-144 to 1e144"
    h, g = draw(shape), draw((*shape[:2], shape[2] + 7), relu=False); a, b = 2.**of_units, 2.**of_loss
    for f in (lambda h, g: dormant_scores(h), lambda h, g: dormant_fraction(h), lambda h, g: dead_fraction(h, eps=0), lambda h, g: gradient_shares(h, g), lambda h, g: saturated_gradient_fraction(h, g, .3, .5)):
        assert torch.equal(f(a*h, b*g), f(h, g))
    each = 2.**torch.randint(-9, 9, (h.shape[1],), generator=torch.Generator().manual_seed(shape[2]))      # every unit by its own factor, its gradient by the inverse
    close(gradient_shares(h*each, g/each), gradient_shares(h, g), 1e-12)
    rows = 2.**torch.randint(-300, 300, (len(h), 1), generator=torch.Generator().manual_seed(shape[2])).double()  # every sample's loss by its own
    assert torch.equal(gradient_shares(h, g*rows), gradient_shares(h, g))

@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(-100, 100), st.floats(-1e3, 1e3))
def test_moments_move_with_the_data(shape, a, b):
    h = draw(shape); (mean, std), (mean2, std2) = unit_moments(h), unit_moments(a*h + b)
    close(mean2, a*mean + b, 1e-9); np.testing.assert_allclose(std2, abs(a)*std, rtol=1e-9, atol=1e-9*(abs(b) + 1))

@settings(max_examples=60, deadline=None)
@given(shapes)
def test_bounds_and_monotony(shape):
    h = draw(shape); s = dormant_scores(h)
    for f in SHARES.values(): assert 0 <= f(h) <= 1 or f(h).isnan() and not h.any()
    assert (s >= 0).all() and (abs(s.mean() - 1) < 1e-12 or not h.any())
    for low, high in ((.5, .9), (.9, 1.)):
        assert dead_fraction(h, threshold=low) >= dead_fraction(h, threshold=high) and saturated_fraction(h, .3, low) >= saturated_fraction(h, .3, high)
        assert dormant_fraction(h, low) <= dormant_fraction(h, high) and saturated_fraction(h, low) <= saturated_fraction(h, high)
        assert saturated_gradient_fraction(h, h, low) <= saturated_gradient_fraction(h, h, high) or not h.any()
    assert dormant_fraction(h, 0.) == dead_fraction(h, 1., 0.) == frozen_fraction(h) <= saturated_fraction(h, threshold=1.)
    twice = torch.cat([h, h], 1)
    for f in (*SHARES.values(), *STATISTICS.values()): np.testing.assert_allclose(f(twice), f(h), rtol=1e-9, atol=1e-9)


# ---- the size of the batch ----
def teacher(n, seed):
    "Examples, and a network whose units differ: some respond, some hardly do, some never"
    x, y = normal(n, 20, seed=seed, dtype=torch.float32), torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 5))
    with torch.no_grad():
        net[0].weight *= 2; net[0].bias.copy_(torch.linspace(-8, 4, 400)[torch.randperm(400)]); net[2].weight *= torch.logspace(-8, 1, 400)[torch.randperm(400)]
    z = net[0](x); h = net[1](z); loss = nn.functional.cross_entropy(net[2](h), y, reduction="sum")
    return z.detach(), h.detach(), *torch.autograd.grad(loss, (z, h))

def test_batch_size():
    "The same network on 500 and on 5,000 rows: within .05, which is five standard errors of a share of these units (few lie near a threshold); the published ratio moves further, as if its threshold were ten times as high"
    few, many = teacher(500, 1), teacher(5000, 2)
    for f in (lambda z, h, gz, gh: dead_fraction(h), lambda z, h, gz, gh: dormant_fraction(h), lambda z, h, gz, gh: saturated_fraction(slopes(torch.tanh, z), .3),
              lambda z, h, gz, gh: saturated_fraction(slopes(torch.relu, z)), lambda z, h, gz, gh: saturated_gradient_fraction(h, gh),
              lambda z, h, gz, gh: saturated_gradient_fraction(z, gz), lambda z, h, gz, gh: zero_gradient_fraction(gz)):
        a, b = f(*few), f(*many)
        assert .02 < a < .98 and abs(a - b) < .05
    for k, v in activation_statistics(few[1]).items(): close(v, activation_statistics(many[1])[k], .1)
    published = lambda sample, ratio: saturated_gradient_fraction(sample[1], sample[3]/len(sample[1]), ratio, .99, "source").item()
    assert published(many, 1e-4) - published(few, 1e-4) > .05 > abs(published(many, 1e-4) - published(few, 1e-3))

def test_batch_size_of_the_strict_ones():
    "What must hold on every sample can only fall as samples are added, and says so"
    z, h = teacher(5000, 2)[:2]
    for f in (lambda n: frozen_fraction(slopes(torch.relu, z[:n])), lambda n: dead_fraction(h[:n], 1., 0.), lambda n: dormant_fraction(h[:n], 0.)):
        shares = [f(n).item() for n in (50, 500, 5000)]
        assert shares[0] > shares[1] > shares[2] > 0
