"""Many measures in one pass: each the plain function's value, whatever is asked beside it."""
import math
from dataclasses import fields

import pytest, torch
from hypothesis import assume, given, settings, strategies as st

from lop_nb import activity, copies, metrics, normality, ranks
from lop_nb.config import MetricsConfig
from lop_nb.metrics import activation_statistics, known, measure, measure_layers, similarity
from lop_nb.runtime import LopError
from measuring import close

def normal(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def layer(*shape, seed=0, dtype=torch.float32):
    "Activations of rank about 10 with noise, some units dead, constant or double; gradients, slopes and weights"
    *front, n, d = shape; z = normal(*front, n, 10, seed=seed, dtype=dtype) @ normal(*front, 10, d, seed=seed + 1, dtype=dtype) + .1*normal(*shape, seed=seed + 2, dtype=dtype)
    if d > 5: z[..., 0] = -1; z[..., 1] = .1; z[..., 5] = z[..., 4]
    w = normal(*front, d, 7, seed=seed + 3, dtype=dtype)
    return dict(h=z.relu(), grads=normal(*shape, seed=seed + 4, dtype=dtype)*(z > 0), slope=(-z).exp()*(z > 0), weights=w, before=w + .1, initial=.5*w)

def plain(name, s, h, grads, slope, weights, before, initial):
    "Each measure by its own function"
    return dict(
        dead_fraction=lambda: activity.dead_fraction(h, s.dead_threshold, s.dead_size), dormant_fraction=lambda: activity.dormant_fraction(h, s.dormant_threshold),
        saturated_fraction=lambda: activity.saturated_fraction(slope, s.flat_slope, s.saturated_threshold), frozen_fraction=lambda: activity.frozen_fraction(slope),
        saturated_gradient_fraction=lambda: activity.saturated_gradient_fraction(h, grads, s.gradient_ratio, s.saturated_threshold), zero_gradient_fraction=lambda: activity.zero_gradient_fraction(grads),
        duplicate_fraction=lambda: copies.duplicate_fraction(h, s.duplicate_threshold), duplicate_groups=lambda: copies.duplicate_fraction(h, s.duplicate_threshold, how="groups"),
        effective_rank=lambda: ranks.effective_rank(h), effective_rank_centred=lambda: ranks.effective_rank(h, True), effective_rank_covariance=lambda: ranks.effective_rank(h, True, squared=True),
        stable_rank=lambda: ranks.stable_rank(h), stable_rank_centred=lambda: ranks.stable_rank(h, True), srank=lambda: ranks.srank(h, s.missing_mass), energy_rank=lambda: ranks.energy_rank(h, s.missing_mass),
        participation_ratio=lambda: ranks.participation_ratio(h), numerical_rank=lambda: ranks.numerical_rank(h), rankme=lambda: ranks.rankme(h),
        non_gaussianity=lambda: normality.non_gaussianity(h, s.normality, s.normality_rows), weight_norm=lambda: activity.weight_norm(weights), weight_magnitude=lambda: activity.weight_magnitude(weights),
        update_norm=lambda: activity.distance(weights, before), distance_from_init=lambda: activity.distance(weights, initial))[name]()

NAMES = [n for n in known if not n.endswith(("means", "stds"))]
OTHER = MetricsConfig(dead_threshold=.4, dead_size=.3, dormant_threshold=.9, flat_slope=.5, saturated_threshold=.4, gradient_ratio=.7, duplicate_threshold=.6, missing_mass=.2, normality="ks", normality_rows=20)
SHAPES = [(3, 60, 20), (2, 30, 45), (40, 40), (1, 8), (8, 1)]


def test_the_names():
    assert set(known) == {"dead_fraction", "dormant_fraction", "saturated_fraction", "frozen_fraction", "saturated_gradient_fraction", "zero_gradient_fraction", "duplicate_fraction", "duplicate_groups",
        "effective_rank", "effective_rank_centred", "effective_rank_covariance", "stable_rank", "stable_rank_centred", "srank", "energy_rank", "participation_ratio", "numerical_rank", "rankme", "non_gaussianity",
        "mean_of_means", "std_of_means", "mean_of_stds", "std_of_stds", "weight_norm", "weight_magnitude", "update_norm", "distance_from_init"}
    assert set(MetricsConfig().names) <= set(known)

@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("config", [MetricsConfig(), OTHER], ids=["default", "other"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_is_the_plain_functions_value(shape, config, dtype, eps):
    given = layer(*shape, dtype=dtype); h = given["h"]; t = config.duplicate_threshold
    assert not ((similarity(h) - t).abs() < 1e-5).any()                          # no pair on the threshold, where float32 may round either way
    found = measure(names=known, settings=config, **given)
    assert list(found) == list(known)
    for n in NAMES: close(found[n], plain(n, config, **given), eps)
    for n, v in activation_statistics(h).items(): assert torch.equal(found[n], v)
    assert all(v.shape == shape[:-2] and v.dtype == dtype for v in found.values())

def test_each_threshold_has_a_say():
    "Another value of any threshold changes some measure"
    given = layer(60, 20); a = measure(names=known, **given)
    for f in fields(MetricsConfig):
        if f.name not in ("names", "every", "epochs", "layers") and getattr(OTHER, f.name) != getattr(MetricsConfig(), f.name):
            b = measure(names=known, settings=MetricsConfig(**{f.name: getattr(OTHER, f.name)}), **given)
            changed = {n for n in known if not torch.equal(a[n], b[n])}
            assert 1 <= len(changed) <= 2, (f.name, changed)

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
@given(shapes, st.lists(st.sampled_from(list(known)), unique=True))
def test_what_is_asked_beside_it_is_nothing(shape, names):
    "Any selection in any order: bit for bit what the whole gives"
    n, d, seed = shape; given = layer(n, d, seed=seed); whole = measure(names=known, **given)
    for n, v in measure(names=names, **given).items(): assert torch.equal(v, whole[n]) or v.isnan() and whole[n].isnan()

@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(-1e6, 1e6))
def test_large_means(shape, mean):
    "Units with a common mean, large and small: duplicates and centred ranks are the plain functions'"
    n, d, seed = shape; h = normal(n, d, seed=seed, dtype=torch.float64) + mean; assume(not ((similarity(h) - .95).abs() < 1e-6).any())
    found = measure(h, ["duplicate_fraction", "participation_ratio", "effective_rank_centred", "effective_rank", "stable_rank"])
    assert found["duplicate_fraction"] == copies.duplicate_fraction(h)
    close(found["participation_ratio"], ranks.participation_ratio(h), 1e-9); close(found["stable_rank"], ranks.stable_rank(h), 1e-9)
    s = ranks.spectrum(h, True); assume((s > 1e-5*s[..., :1]).all() or d == 1 or n <= d)
    close(found["effective_rank_centred"], ranks.effective_rank(h, True), 1e-6)

def test_replicas_are_a_loop():
    given = layer(3, 2, 30, 12); found = measure(names=known, **given)
    for i in range(3):
        for j in range(2):
            for n, v in measure(names=known, **{k: v[i, j] for k, v in given.items()}).items(): close(found[n][i, j], v, 1e-5)

@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 12, 9), (3, 9, 12)])
def test_not_finite(poison, shape):
    "One value spoils its own replica and no other, and only the measures that see it"
    given = layer(*shape); clean = measure(names=known, **given)
    for part in ("h", "grads", "slope", "weights"):
        bad = dict(given, **{part: given[part].clone()}); bad[part][1, 4, 2] = poison
        for n, v in measure(names=known, **bad).items():
            spoiled = part in known[n] and not (part == "weights" and not math.isnan(poison))  # an infinite weight has a norm
            assert v[1].isnan() == spoiled or part == "weights", (n, part); assert torch.equal(v[[0, 2]], clean[n][[0, 2]])


# ---- layers ----
def test_layers():
    "Of one shape or not, with and without weights: each layer what it is alone"
    layers = dict(a=layer(2, 30, 12), b=layer(2, 30, 12, seed=10), c=layer(2, 30, 8, seed=20), d=layer(2, 30, 12, seed=30))
    layers["b"]["weights"] = normal(2, 12, 3); layers["b"]["before"] = layers["b"]["initial"] = torch.zeros(2, 12, 3)
    parts = {k: {n: own[k] for n, own in layers.items()} for k in ("h", "grads", "slope", "weights", "before", "initial")}
    del parts["weights"]["d"], parts["slope"]["c"], parts["before"]["a"]
    found = measure_layers(parts.pop("h"), known, **parts)
    lacks = dict(a={"update_norm"}, b=set(), c={"frozen_fraction", "saturated_fraction"}, d={"weight_norm", "weight_magnitude", "update_norm", "distance_from_init"})
    for n, own in layers.items():
        assert list(found[n]) == [k for k in known if k not in lacks[n]]
        alone = measure(names=known, **own)
        for k, v in found[n].items(): close(v, alone[k], 1e-6)

def test_layers_make_few_calls(monkeypatch):
    "Sixteen layers of one shape are one eigenvalue problem"
    calls = []; inner = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda g: calls.append(g.shape) or inner(g))
    measure_layers({i: normal(3, 20, 10, seed=i) for i in range(16)}, ["effective_rank", "stable_rank", "srank", "duplicate_fraction", "participation_ratio"])
    assert calls == [(16, 3, 10, 10)]

def test_nothing_but_weights():
    w = normal(2, 5, 4)
    assert torch.equal(measure(None, ["weight_norm"], weights=w)["weight_norm"], activity.weight_norm(w))
    assert torch.equal(measure(None, "weight_norm", weights=w)["weight_norm"], activity.weight_norm(w))


# ---- bad input ----
def test_refused():
    h = normal(5, 4)
    for f, at in ((measure, h), (measure_layers, dict(a=h))):
        with pytest.raises(LopError, match="Unknown measure 'dead_fractoin'. Did you mean 'dead_fraction'?"): f(at, ["srank", "dead_fractoin"])
        with pytest.raises(LopError, match="saturated_gradient_fraction needs the gradients of the summed loss .* pass them as `grads`"): f(at, ["saturated_gradient_fraction"])
        with pytest.raises(LopError, match="distance_from_init needs the weights at init"): f(at, ["distance_from_init"], weights=at)
    for f, at in ((measure, None), (measure_layers, None)):
        with pytest.raises(LopError, match="srank needs the activations"): f(at, ["srank"])

@pytest.mark.parametrize("name", [n for n in known if "h" in known[n]])
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_to_measure(name, shape):
    empty = torch.zeros(shape)
    with pytest.raises(LopError, match=f"^{name} needs .* at least one of each"): measure(empty, [name], empty)

def test_reads_nothing_back():
    "Meta tensors have no values: a branch on one, or an .item(), would raise"
    given = {k: v.to("meta") for k, v in layer(3, 20, 8).items()}
    assert all(v.shape == (3,) for v in measure(names=known, **given).values())

def test_input_is_left_alone():
    for dtype in (torch.float32, torch.float64):
        given = layer(3, 20, 8, dtype=dtype); before = {k: v.clone() for k, v in given.items()}
        measure(names=known, **given); assert all(torch.equal(before[k], v) for k, v in given.items())

def test_all_measures_are_here():
    "the facade has whatever the notebooks of the measures export"
    for module in (activity, copies, ranks, normality):
        for name in module.__all__: assert name in ("often", "largest") or getattr(metrics, name) is getattr(module, name)
