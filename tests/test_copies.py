"""Duplicates against closed forms, against loops written from their definitions, and for properties that hold for any activations."""
import math
from functools import partial

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st

from lop_nb.copies import _by_groups, centre, duplicate_fraction, random_layers, similarity
from lop_nb.runtime import LopError, generator
from measuring import EPS, close, dtypes, normal

WAYS, KINDS = ["partner", "groups", "later"], ["pearson", "cosine"]
PURE = [partial(duplicate_fraction, how=w, kind=k, absolute=a, threshold=t) for w in WAYS for k in KINDS for a in (False, True) for t in (.5, .95)]


# ---- closed forms ----
@dtypes
def test_duplicates(dtype):
    a, b, c = normal(3, 200, 1, dtype=dtype)
    cat = lambda *cols: torch.cat(cols, 1)
    for h, pearson, cosine, both in [
        (a.expand(200, 10), 1, 1, 1), (cat(a, b, c), 0, 0, 0), (cat(a, 3 * a, b, c), .5, .5, .5), (cat(a, -a, b, c), 0, 0, .5),
        (cat(a, a + 1, b, c), .5, 0, .5),                                       # shifted: correlated, not parallel
        (cat(a + 100, b + 100), 0, 1, 0),                                       # a common mean: parallel, not correlated
        (torch.full((200, 4), .1, dtype=dtype), 0, 1, 0), (torch.zeros(200, 4, dtype=dtype), 0, 0, 0),
        (cat(a, a, torch.zeros_like(a), torch.full_like(a, .1)), .5, .5, .5), (a, 0, 0, 0)]:
        close(duplicate_fraction(h), pearson, EPS[dtype])
        close(duplicate_fraction(h, kind="cosine"), cosine, EPS[dtype])
        close(duplicate_fraction(h, absolute=True), both, EPS[dtype])

@dtypes
@pytest.mark.parametrize("sizes", [(10,), (1,), (1, 1, 1), (2, 3, 5), (4, 1, 1, 7)])
def test_groups_of_copies(sizes, dtype):
    "A group of g copies has g units with a partner, g - 1 that could be spared, and g - 1 with a later one, in any order"
    h = normal(300, len(sizes), dtype=dtype).repeat_interleave(torch.tensor(sizes), 1); d = sum(sizes)
    for order in range(3):
        h = h[:, torch.randperm(d, generator=torch.Generator().manual_seed(order))]*(.5 + torch.rand(d, generator=torch.Generator().manual_seed(9), dtype=dtype))
        close([duplicate_fraction(h, how=w) for w in WAYS], [sum(g for g in sizes if g > 1)/d, (d - len(sizes))/d, (d - len(sizes))/d], EPS[dtype])

@dtypes
def test_chains(dtype):
    "Units on a circle, alike up to 14°: all have a partner; of those with two, the one whose two are closest leads"
    for steps, spared in (([10], 1), ([10, 10], 2), ([10, 10, 12, 12], 3), ([12, 10, 10, 12], 2), ([12, 12, 10, 10], 3), ([10]*3 + [100] + [10]*2, 4)):
        t = torch.tensor([0, *steps], dtype=dtype).cumsum(0)*math.pi/180; n = len(t)
        h = torch.stack([t.cos(), t.sin()])
        close(n*torch.stack([duplicate_fraction(h, math.cos(14*math.pi/180), "cosine", how=w) for w in WAYS[:2]]), [n, spared], 1e-4)

def test_stars():
    star = torch.eye(5)[:, :4]; star = torch.cat([star, star.sum(1, keepdim=True)], 1)      # the last is at 60° to each of four others
    close([duplicate_fraction(star, .45, "cosine", how=w) for w in WAYS], [1, .8, .8], 1e-6)
    close(duplicate_fraction(star.flip(1), .45, "cosine", how="later"), .2, 1e-6)                  # the published count depends on the order

def test_similarity_is_numpys():
    h = normal(50, 8)
    close(similarity(h), np.corrcoef(h.T), 1e-13)
    n = h / h.norm(dim=0); close(similarity(h, "cosine"), n.T @ n, 1e-13)
    assert similarity(h.float()).dtype == torch.float64 and torch.equal(centre(torch.full((7, 2), .1)), torch.zeros(7, 2))
    assert similarity(torch.cat([h, torch.ones(50, 1)], 1)).isnan().sum() == 17

def test_given_similarity():
    "What is at hand is used, and gives the same"
    h = normal(2, 40, 12).relu()
    for f in PURE: assert torch.equal(f(h, c=similarity(h, f.keywords["kind"])), f(h))
    assert duplicate_fraction(h, c=torch.ones(2, 12, 12)).tolist() == [1, 1]
    c = similarity(h); before = c.clone(); duplicate_fraction(h, c=c, how="groups", absolute=True); assert torch.equal(c, before)

def test_words():
    with pytest.raises(LopError, match="Unknown way to count duplicates 'group'. Did you mean 'groups'"): duplicate_fraction(normal(5, 4), how="group")
    with pytest.raises(LopError, match="Unknown similarity 'cos'"): duplicate_fraction(normal(5, 4), kind="cos")


# ---- bad input ----
@pytest.mark.parametrize("f, name", [(duplicate_fraction, "duplicate_fraction"), (similarity, "similarity"), (lambda x: random_layers(x, [3]), "random_layers")])
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_to_measure(f, name, shape):
    with pytest.raises(LopError, match=f"{name} needs .* at least one of each") as e: f(torch.zeros(shape))
    assert "\n" not in str(e.value)


# ---- loops written from the definitions ----
shapes = st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(0, 2**31))
def draw(shape, relu=True):
    "A few directions, so that some units are alike"
    n, d, seed = shape
    h = normal(n, 3, seed=seed) @ normal(3, d, seed=seed + 1) + .1*normal(n, d, seed=seed + 2)
    return h.relu() if relu else h
def undecided(h, *thresholds): return any(bool(((similarity(h, k).abs() - t).abs() < 1e-9).any()) for k in KINDS for t in thresholds or (.5, .95))

def slow_partners(h, threshold, kind, absolute):
    "[j, k]: are they partners?"
    columns = [list(c) for c in h.T.tolist()]
    if kind == "pearson": columns = [[v - math.fsum(c)/len(c) for v in c] if min(c) < max(c) else [0.]*len(c) for c in columns]
    size = [math.sqrt(math.fsum(v*v for v in c)) for c in columns]
    def cos(j, k):
        c = math.fsum(a*b for a, b in zip(columns[j], columns[k]))/(size[j]*size[k]) if size[j]*size[k] else 0.
        return abs(c) if absolute else c
    d = len(columns); c = [[cos(j, k) for k in range(d)] for j in range(d)]
    return [[j != k and c[j][k] > threshold for k in range(d)] for j in range(d)], c

def slow_fraction(h, threshold, kind, absolute, how):
    near, c = slow_partners(h, threshold, kind, absolute); d = len(near)
    if how == "partner": return sum(any(row) for row in near)/d
    if how == "later": return sum(any(near[j][j + 1:]) for j in range(d))/d
    strength = [(sum(near[j]), sum(c[j][k] for k in range(d) if near[j][k])) for j in range(d)]
    weight, free, spared = [a + b for a, b in strength], set(range(d)), 0
    for leader in sorted(range(d), key=lambda j: -weight[j]):
        if leader not in free: continue
        group = {k for k in free if near[leader][k]} - {leader}
        spared += len(group); free -= group | {leader}
    return spared/d

@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([.5, .95]), st.sampled_from(KINDS), st.booleans())
def test_loops(shape, relu, threshold, kind, absolute):
    h = draw(shape, relu); assume(shape[0] > 2 and not undecided(h))
    for how in WAYS: close(duplicate_fraction(h, threshold, kind, absolute, how), slow_fraction(h, threshold, kind, absolute, how), 1e-12)


# ---- properties ----
@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_order_of_units_and_samples_is_nothing(shape, seed):
    "For partners and groups; the published count depends on the units' order"
    h = draw(shape); g = torch.Generator().manual_seed(seed); assume(shape[0] > 2 and not undecided(h))
    rows, units = torch.randperm(h.shape[0], generator=g), torch.randperm(h.shape[1], generator=g)
    for f in PURE:
        close(f(h[rows]), f(h), 1e-9)
        if f.keywords["how"] != "later": close(f(h[:, units]), f(h), 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(-450, 450), st.integers(2, 5))
def test_scale_and_repetition_are_nothing(shape, power, times):
    h = draw(shape); assume(not undecided(h))
    each = 10.**torch.randint(-100, 100, (h.shape[1],), generator=torch.Generator().manual_seed(shape[2])).double()
    for f in PURE:
        for same in (h*2.**power, h*each, h.repeat(times, 1)): close(f(same), f(h), 1e-9)

@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3), st.integers(1, 3))
def test_leading_axes_are_a_loop(shape, a, b):
    n, d, seed = shape; h = draw((a * b * n, d, seed)).view(a, b, n, d)
    assume(not undecided(h))
    for f in PURE: close(f(h), [[f(h[i, j]) for j in range(b)] for i in range(a)], 1e-9)

@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(-100, 100))
def test_correlation_has_no_mean(shape, shift):
    h = draw(shape); assume(shape[0] > 2 and not undecided(h))
    for how in WAYS: close(duplicate_fraction(h + shift, how=how), duplicate_fraction(h, how=how), 1e-12)

@settings(max_examples=60, deadline=None)
@given(shapes)
def test_bounds_and_monotony(shape):
    h = draw(shape); assume(not undecided(h)); live = (h.amax(0) > h.amin(0)).double()
    for f in PURE: assert 0 <= f(h) <= 1 - (f.keywords["how"] != "partner")/h.shape[1]
    for k in KINDS:
        for a in (False, True):
            share = {w: duplicate_fraction(h, .5, k, a, w) for w in WAYS}
            assert share["groups"] <= share["partner"] >= share["later"] and len({v.item() > 0 for v in share.values()}) == 1
            assert duplicate_fraction(h, .5, k, a) >= duplicate_fraction(h, .9, k, a)
        assert duplicate_fraction(h, kind=k, absolute=True) >= duplicate_fraction(h, kind=k)
    twice = torch.cat([h, h], 1)
    close(duplicate_fraction(twice), live.mean(), 1e-12)                              # all but the constant ones
    close(duplicate_fraction(twice, how="groups"), (live.sum() + h.shape[1]*duplicate_fraction(h, how="groups"))/(2*h.shape[1]), 1e-12)

@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([.3, .5, .9]))
def test_what_groups_promise(shape, threshold):
    "Who was spared has a partner that is left; no two that are left are partners; who has most partners is left"
    h = draw(shape); c = similarity(h); near = (c > threshold).triu(1); near = near | near.mT
    spared = _by_groups(near, c)
    assert near[spared][:, ~spared].any(1).all() and not near[~spared][:, ~spared].any() and near[~spared].sum(1).max() == near.sum(1).max()
    close(spared.double().mean(), duplicate_fraction(h, threshold, how="groups"), 1e-12)


# ---- independent units with a common mean, and the null ----
def test_samples_of_unrelated_units():
    "500 and 5,000 samples of unrelated units: no duplicates by correlation, all by the cosine if they share a mean"
    for n in (500, 5000):
        h = 2 + .2*normal(n, 200, seed=n)
        assert duplicate_fraction(h) == duplicate_fraction(h, absolute=True) == 0 and duplicate_fraction(h, kind="cosine") == 1

def test_random_layers():
    x = normal(7, 30, 6, seed=1, dtype=torch.float32)
    one, two = random_layers(x, [5, 4], torch.tanh, repeats=3, seed=2)
    assert one.shape == (3, 7, 30, 5) and two.shape == (3, 7, 30, 4)
    for r in range(3):                                                               # weights and biases as torch draws them, each from its own generator
        w = 2*torch.rand(7, 5, generator=generator(2, "null", r, 0)) - 1
        close(one[r, 3], torch.tanh((x[3] @ w[:6] + w[6])/6**.5), 1e-6)
        w = 2*torch.rand(6, 4, generator=generator(2, "null", r, 1)) - 1
        close(two[r, 3], torch.tanh((one[r, 3] @ w[:5] + w[5])/5**.5), 1e-6)
    again = random_layers(x, [5], torch.tanh, repeats=2, seed=2)[0]
    assert torch.equal(again, one[:2]) and not torch.equal(random_layers(x, [5], torch.tanh, repeats=2, seed=3)[0], again)
    state = torch.get_rng_state(); random_layers(x, [5]); assert torch.equal(torch.get_rng_state(), state)
    assert random_layers(x.bfloat16(), [5])[0].dtype == torch.float32 and random_layers(x.double(), [5])[0].dtype == torch.float64
    assert duplicate_fraction(one).shape == (3, 7)
