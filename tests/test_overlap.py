"""Overlap of masks: against sets counted by hand, against draws, and on every kind of network."""
import itertools, math
from functools import partial

import pytest, torch

from lop_nb.imp import shuffled
from lop_nb.masks import among, live_units, prunable
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.overlap import (_counts, aggregate, average, chance, corrected, jaccard, matched, n_way, pair_overlap, pairs, plastic_masks, strata)
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.units import gather, scatter

SHAPES = {"a": (30, 20), "b": (7, 3, 5, 5), "c": (10, 30)}


def drawn(density, R=1, seed=0, shapes=SHAPES):
    return {k: torch.rand(R, *s, generator=generator(seed, k)) < (density[k] if isinstance(density, dict) else density) for k, s in shapes.items()}


def kept(masks, r, live=None):
    "a ticket as a set of (name, position), only those that are live"
    return {(k, i) for k, m in masks.items() for i in (m[r] if live is None else m[r] & live[k][r]).flatten().nonzero()[:, 0].tolist()}


# ---- counts ----
@pytest.mark.parametrize("live", [False, True])
def test_jaccard_and_chance_of_sets(live):
    a, b, live = drawn(.3, 4), drawn(dict(a=.1, b=.6, c=.4), 4, 1), drawn(.7, 4, 2) if live else None
    J, J0 = jaccard(a, b, live), chance(a, b, live)
    assert list(J) == list(J0) == ["a", "b", "c", "all"] and all(v.shape == (4,) and v.dtype == torch.float64 for v in J.values())
    for r in range(4):
        A, B = kept(a, r, live), kept(b, r, live); expected = 0
        for k, s in SHAPES.items():
            x, y = ({i for i in S if i[0] == k} for S in (A, B)); n = math.prod(s) if live is None else int(live[k][r].sum())
            assert J[k][r] == len(x & y) / len(x | y)
            e = len(x)*len(y)/n; expected += e; p, q = len(x)/n, len(y)/n
            assert abs(J0[k][r] - p*q/(p + q - p*q)) < 1e-12
        assert J["all"][r] == len(A & B) / len(A | B) and abs(J0["all"][r] - expected / (len(A) + len(B) - expected)) < 1e-12


def test_what_equal_opposite_empty_and_full_masks_give():
    a = drawn(.3, 3); full = {k: torch.ones_like(m) for k, m in a.items()}; empty = {k: ~m for k, m in full.items()}
    one = lambda d: all((v == 1).all() for v in d.values())
    assert one(jaccard(a, a)) and one(corrected(jaccard(a, a), chance(a, a))) and one(jaccard(full, full)) and one(jaccard(empty, empty))
    assert all((v == 0).all() for v in jaccard(a, {k: ~m for k, m in a.items()}).values()) and (corrected(jaccard(a, empty), chance(a, empty))["all"] == 0).all()
    assert all(v.isnan().all() for v in corrected(jaccard(full, full), chance(full, full)).values()) and corrected(jaccard(empty, empty), chance(empty, empty))["all"].isnan().all()
    apart = {k: m.clone() for k, m in a.items()}
    assert all((v < 0).all() for v in corrected(jaccard(a, {k: ~m for k, m in apart.items()}), chance(a, {k: ~m for k, m in apart.items()})).values())
    assert torch.equal(jaccard(a, full)["a"], a["a"].flatten(1).double().mean(1))


@pytest.mark.parametrize("p, q", [(.05, .05), (.2, .2), (.1, .1), (.05, .6)])
def test_random_masks_are_at_chance(p, q):
    "within four binomial standard errors over 300 pairs of 10,000 weights"
    R, n = 300, 10_000; shapes = dict(w=(100, 100))
    J = jaccard(drawn(p, R, 0, shapes), drawn(q, R, 1, shapes))["w"]; J0 = p*q/(p + q - p*q)
    assert abs(J.mean() - J0) < 4*math.sqrt(J0*(1 - J0) / ((p + q - p*q)*n*R)) + 1/n            # a weight of the union is in both with probability J0


def test_chance_in_all_goes_by_layers():
    "two global tickets that agree on the layers' densities alone are at chance, not above it; the density of the whole would say otherwise"
    density = dict(a=.9, b=.02, c=.02); a, b = drawn(density, 200), drawn(density, 200, 1)
    J, J0 = jaccard(a, b)["all"], chance(a, b)["all"]
    assert (J - J0).mean().abs() < 4*(J - J0).std()/200**.5 + 1e-3
    p = sum(m.sum() for m in a.values()) / sum(m.numel() for m in a.values()); assert (J - p/(2 - p)).mean() > .2


# ---- matched magnitudes ----
def test_the_null_is_the_mean_over_all_shuffles():
    "a layer of 6 weights in two classes by hand: every arrangement of both masks"
    start = dict(w=torch.tensor([[.1, -.2, .3, 4, -5, 6]])); s = torch.tensor([[0, 0, 0, 1, 1, 1]])
    A, B = torch.tensor([1, 0, 0, 1, 1, 0]) > 0, torch.tensor([1, 1, 0, 0, 0, 1]) > 0
    arrangements = lambda m: {tuple(m[torch.tensor([*p, *(3 + i for i in q)])].tolist()) for p in itertools.permutations(range(3)) for q in itertools.permutations(range(3))}
    both = [sum(x & y for x, y in zip(a, b)) for a in arrangements(A) for b in arrangements(B)]; e = sum(both)/len(both)
    assert abs(_counts(dict(w=A[None]), dict(w=B[None]), dict(w=s))["w"][2] - e) < 1e-12
    big = dict(w=start["w"].repeat_interleave(30, 1)); assert torch.equal(strata(big, 2)["w"][0], s[0].repeat_interleave(30)) and strata(start, 2)["w"].max() == 0
    assert abs(matched(dict(w=A[None].repeat_interleave(30, 1)), dict(w=B[None].repeat_interleave(30, 1)), big, 2)["w"] - e/(6 - e)) < 1e-12


def test_the_null_knows_the_start_and_nothing_else():
    "masks that follow the start plus noise of their own: at the null, above chance; masks that share more than the start: above both"
    R = 40; start = dict(w=torch.randn(1, 100, 100, generator=generator(0, "start")))
    def top(w): return dict(w=w.abs().flatten(1) >= w.abs().flatten(1).kthvalue(8001, 1, keepdim=True).values)
    noise = lambda seed: torch.randn(R, 100, 100, generator=generator(seed, "noise"))
    flat = {k: w.flatten(1) for k, w in start.items()}
    a, b = top(start["w"] + .5*noise(0)), top(start["w"] + .5*noise(1)); common = .5*noise(2)
    J, J1, J0 = jaccard(a, b)["all"].mean(), matched(a, b, flat)["all"].mean(), chance(a, b)["all"].mean()
    assert abs(J - J1) < .004 and J > J0 + .2
    a, b = top(start["w"] + common + .2*noise(0)), top(start["w"] + common + .2*noise(1))
    assert (jaccard(a, b)["all"] - matched(a, b, flat)["all"]).min() > .2
    assert (matched(a, b, flat, bins=1)["all"] - chance(a, b)["all"]).abs().max() < 1e-12
    same = top(flat["w"][:, None].expand(R, 1, -1).clone()); assert (matched(same, same, flat)["all"] > .98).all()


def test_shuffles_keep_each_class_and_are_the_generators_own():
    masks, start = drawn(.3, 3), {k: torch.randn(1, *s, generator=generator(0, k)) for k, s in SHAPES.items()}
    classes = strata(start, 5); gens = lambda: [generator(r, "masks") for r in range(3)]
    new, again, free = shuffled(masks, gens(), classes), shuffled(masks, gens(), classes), shuffled(masks, gens())
    for k in masks:
        assert torch.equal(new[k], again[k]) and not torch.equal(new[k], masks[k]) and new[k].shape == masks[k].shape and not torch.equal(new[k][0], new[k][1])
        count = lambda m: torch.zeros(3, 99).scatter_add_(1, classes[k].expand(3, -1), m[k].flatten(1).float())
        assert torch.equal(count(new), count(masks)) and torch.equal(free[k].flatten(1).sum(1), masks[k].flatten(1).sum(1)) and not torch.equal(count(free), count(masks))
    many = shuffled({k: m[:1].expand(2000, *m.shape[1:]) for k, m in masks.items()}, [generator(r, "masks") for r in range(2000)])
    assert (many["c"].double().mean(0) - masks["c"][0].double().mean()).abs().max() < 5*.5/2000**.5       # every place is equally likely


# ---- live units ----
@pytest.mark.parametrize("make", [partial(MLP, 64, 5, hidden_sizes=[7, 6]), partial(CNN, 1, 8, 5, conv_channels=[3, 4], fc_hidden_units=[6]), partial(ResNet, 1, 8, 5, layers=[1, 1], base_channels=3), partial(ViT, 1, 8, 5, patch_size=4, embed_dim=6, depth=1, n_heads=2)])
def test_live_weights_are_those_the_graph_names(make):
    "for each group in turn one unit dies: exactly its reads and writes go, in its replica alone"
    nets = Replicas(make, range(2)); masks = {k: torch.ones_like(nets.params[k], dtype=bool) for k in prunable(nets.modules[0])}
    for g in nets.graph.groups:
        live = {g.name: torch.ones(2, g.size, dtype=bool)}; live[g.name][1, g.size - 1] = False
        got = among(masks, nets.graph, live); mine = [s for s in (*g.reads, *g.writes) if s.param in masks]
        count = {k: torch.zeros_like(m, dtype=torch.int64) for k, m in masks.items()}
        for s in mine: scatter(count, s, torch.tensor([[g.size - 1]]*2), 1); assert not gather(got, s, torch.tensor([[g.size - 1]]*2))[1].any()
        for k in masks: assert got[k][0].all() and torch.equal(~got[k][1], count[k][1] == 1)
    everyone = among(masks, nets.graph, {}); assert all(torch.equal(m, masks[k]) for k, m in everyone.items())


def test_live_units_are_those_that_speak():
    nets, x = Replicas(partial(MLP, 64, 5, hidden_sizes=[7, 6], normalization="none"), range(2)), torch.randn(2, 50, 1, 8, 8, generator=generator(0, "x"))
    with torch.no_grad(): nets.params[nets.graph.groups[0].biases[0].param][1, 3] = -100
    live = live_units(nets, x); first = nets.graph.groups[0].name
    assert live[first][0].all() and live[first][1].tolist() == [i != 3 for i in range(7)]


def test_dead_weights_no_longer_count():
    "tickets that agree on half of the weights because these are dead: the raw index is high, that of the live ones at chance"
    a = dict(w=torch.rand(10, 100, 100, generator=generator(0, "m")) < .2); dead = torch.arange(100) < 50
    a["w"][:, dead] = a["w"][:1, dead].clone(); live = dict(w=(~dead)[None, :, None].expand(10, 100, 100))
    raw, alive = (pair_overlap(a, live=where).query("layer == 'all'").set_index("measure")["mean"] for where in (None, live))
    assert abs(raw["jaccard"] - (.1 + .02)/(.1 + .18)) < .01 and raw["corrected"] > .2 and abs(alive["corrected"]) < .01 and set(raw.index) == {"jaccard", "chance", "corrected"}


def test_a_pair_is_compared_where_both_are_alive():
    masks, live = drawn(.4, 3), drawn(.6, 3, 5); t = pair_overlap(masks, live=live).query("layer == 'all'").set_index("measure")["mean"]
    every = []
    for r, s in ((0, 1), (0, 2), (1, 2)):
        there = {k: m[r:r + 1] & m[s:s + 1] for k, m in live.items()}; A, B = (kept({k: m[i:i + 1] for k, m in masks.items()}, 0, there) for i in (r, s)); every.append(len(A & B) / len(A | B))
    assert abs(t["jaccard"] - sum(every)/3) < 1e-12


# ---- many tickets ----
def test_pairs_and_n_way():
    masks = drawn(.4, 4); i, j = pairs(masks); t = pair_overlap(masks, start={k: m[:1].float() for k, m in masks.items()})
    sets = [kept(masks, r) for r in range(4)]; every = torch.tensor([len(a & b)/len(a | b) for a, b in itertools.combinations(sets, 2)], dtype=torch.float64)
    assert torch.equal(jaccard(i, j)["all"], every)
    row = t.query("layer == 'all' and measure == 'jaccard'").iloc[0]; assert abs(row["mean"] - every.mean()) < 1e-12 and abs(row["std"] - every.std()) < 1e-12 and row.pairs == 6
    J, J0 = n_way(masks); assert J["all"] == len(set.intersection(*sets)) / len(set.union(*sets))
    p = masks["a"].flatten(1).double().mean(1); assert abs(J0["a"] - p.prod() / (1 - (1 - p).prod())) < 1e-12
    same = {k: m[:1].expand(4, *m.shape[1:]) for k, m in masks.items()}; assert all(v == 1 for v in n_way(same)[0].values())
    two = {k: m[:2] for k, m in masks.items()}
    for d, e in zip(n_way(two), (jaccard(*pairs(two)), chance(*pairs(two)))): assert all(abs(d[k] - e[k][0]) < 1e-12 for k in d)


def test_aggregates():
    masks = drawn(.3, 5); gen = lambda: generator(0, "masks"); share = average(masks)
    union, both, first, mean = (aggregate(masks, how, generator=gen()) for how in ("union", "intersection", "first", "average"))
    for k, m in masks.items():
        assert torch.equal(share[k][0], sum(r.double() for r in m)/5) and torch.equal(first[k], m[:1])
        assert torch.equal(union[k][0], m[0] | m[1] | m[2] | m[3] | m[4]) and torch.equal(both[k][0], m[0] & m[1] & m[2] & m[3] & m[4])
        assert mean[k].sum() == round(m.sum().item()/5) and share[k][mean[k]].min() >= share[k][~mean[k]].max() and all(v.dtype == torch.bool for v in (union[k], both[k], mean[k]))
        tenth = aggregate(masks, "average", .1, gen())[k]; assert tenth.sum() == round(.1*m[0].numel())
    again, other = aggregate(masks, "average", generator=gen()), aggregate(masks, "average", generator=generator(1, "masks"))
    assert all(torch.equal(again[k], mean[k]) for k in mean) and any(not torch.equal(other[k], mean[k]) for k in mean)
    last = share["a"] == share["a"][mean["a"]].min(); assert 0 < mean["a"][last].sum() < last.sum() and mean["a"][0].flatten().nonzero()[:, 0].double().mean() > 200   # ties are not won by the first places


def test_plastic_masks():
    g = {k: torch.rand(3, *s, generator=generator(5, k)) for k, s in SHAPES.items()}; like = drawn(dict(a=.1, b=.5, c=.3), 3)
    mine, published = plastic_masks(g, like), plastic_masks(g, like, global_density=True)
    whole = sum(m.flatten(1).sum(1) for m in like.values()) / sum(m[0].numel() for m in like.values())
    for k, m in mine.items():
        for r in range(3):
            assert m[r].sum() == like[k][r].sum() and g[k][r][m[r]].min() > g[k][r][~m[r]].max()
            assert published[k][r].sum() == round(whole[r].item()*m[r].numel()) and g[k][r][published[k][r]].min() > g[k][r][~published[k][r]].max()
    assert (jaccard(mine, mine)["all"] == 1).all()


def test_faults_are_named():
    a = drawn(.3, 2)
    for bad, word in (({k: m.float() for k, m in a.items()}, "not bool"), ({k: m for k, m in a.items() if k != "b"}, "same network"), ({k: m[:, :3] for k, m in a.items()}, "same network"), ({}, "at least one")):
        with pytest.raises(LopError, match=word): jaccard(a, bad)
    with pytest.raises(LopError, match="at least two tickets"): pair_overlap({k: m[:1] for k, m in a.items()})
    with pytest.raises(LopError, match="intersection"): aggregate(a, "intersect")
    with pytest.raises(LopError, match="generator"): aggregate(a, "average")
    for density in (0, 1.5):
        with pytest.raises(LopError, match=f"density={density}"): aggregate(a, "average", density, generator(0, "masks"))
    with pytest.raises(LopError, match="gradients"): plastic_masks({k: m.float() for k, m in a.items() if k != "c"}, a)
    with pytest.raises(LopError, match="at least 1 class"): strata({k: m.float() for k, m in a.items()}, 0)
