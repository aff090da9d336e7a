"The bench runs, its report has its shape, and ways that do other work are found out; no times are tested"
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import core, jaxed, online, ours, reference, show, tickets
from bench.__main__ import main
from lop_nb.config import SGD

def test_the_report_has_its_shape(tmp_path, monkeypatch, capsys):
    out = tmp_path/"report.json"
    monkeypatch.setattr(jaxed, "jax", None)
    main(["--quick", "--only", "bits-bp-5-R1", "online-bp", "metrics-five", "--out", str(out)])
    rows = {r["name"]: r for r in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"bits-bp-5-R1", "online-bp-20", "metrics-five"}
    for r in rows.values():
        assert {"name", "what", "unit", "rounds", "seconds", "ways", "ratios", "limit", "machine"} <= set(r) and {"processor", "cores", "python", "torch"} <= set(r["machine"])
        for w in r["ways"].values():
            assert w["missing"] or 0 < w["low"] <= w["rate"] <= w["high"] and w["wall_rate"] > 0
    bits = rows["bits-bp-5-R1"]
    assert bits["ways"]["JAX"]["missing"].startswith("JAX is not installed") and bits["limit"]["rate"] > 0
    best = next(x for x in bits["ratios"] if (x["of"], x["over"]) == ("ours", "plain learn()"))
    assert best["goal"] == 1500 and best["met"] == (best["ratio"] >= 1500)
    assert "| bits-bp-5-R1 |" in capsys.readouterr().out


def test_a_second_run_keeps_the_rows_of_the_first(tmp_path):
    out = tmp_path/"report.json"
    out.write_text(json.dumps(dict(version=1, rows=[dict(name="monitor", old=True), dict(name="metrics-spectrum", old=True)])))
    main(["--quick", "--only", "metrics-spectrum", "--out", str(out)])
    first, second = json.loads(out.read_text())["rows"]      # in the bench's order
    assert second == dict(name="monitor", old=True) and first["name"] == "metrics-spectrum" and "old" not in first


def test_an_unknown_row_is_refused():
    with pytest.raises(SystemExit, match="No row begins with bits-bp-7. There are: bits-bp-5-R1"): main(["--only", "bits-bp-7"])


def way(loss, n=4): return core.Way("also", lambda: (lambda: [[loss]*n], n))


def test_ways_that_do_other_work_are_found_out():
    core.measure(core.Row("same", "", dict(a=way(1.), b=way(1. + 1e-5))), 1, 1e-4)
    with pytest.raises(AssertionError, match="b does other work than a"): core.measure(core.Row("other", "", dict(a=way(1.), b=way(1.1))), 1, 1e-4)


def test_what_is_missing_is_said_and_a_ratio_is_of_one_round():
    def gone(): raise core.Missing("no such thing")
    r = core.measure(core.Row("r", "", dict(plain=way(1.), gone=core.Way("peer", gone))), 2, 1e-4)
    assert r["ways"]["gone"]["missing"] == "no such thing" and "no such thing" in show.row(r)
    x = core.ratio("a", "b", dict(a=[4., 9., 100.], b=[2., 3., 10.]), 3.)
    assert (x["ratio"], x["low"], x["high"], x["met"]) == (3., 2., 10., True)


def test_together_is_a_geometric_mean():
    row = core.Row("r", "", dict(a=way(1., 1), b=way(1., 1)), {("ours", "plain"): 1.}, together=dict(plain=("plain", ["a"]), ours=("ours", ["a", "b"])))
    r = core.measure(row, 1, 1e-4); rate = {k: w["rate"] for k, w in r["ways"].items()}
    assert np.isclose(rate["ours"], (rate["a"] * rate["b"])**.5) and np.isclose(r["ratios"][0]["ratio"], rate["ours"] / rate["a"])


def stream(n, sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(1, n, sizes[0], generator=g), torch.randint(sizes[-1], (1, n), generator=g)


def test_the_plain_algorithm_replaces_what_ours_replaces():
    "the published algorithm, written plainly, against ours by torch: equal losses up to the first replacement, and replacements at the same steps (few enough that no unit is new twice)"
    sizes, lr, n = (6, 30, 30, 3), .05, 260
    weights, (x, y) = ours.he(sizes, 1), stream(n, sizes)
    plain = reference.ContinualBackprop(reference.network([(w[0], b[0]) for w, b in weights]), lr, F.cross_entropy, rate=5e-4)
    losses = torch.stack([plain.learn(x[0, i:i+1], y[0, i:i+1])[0] for i in range(n)])
    cbp = ours.inside(dict(replacement_rate=5e-4))
    job = ours.job(sizes, weights, SGD(lr=lr, momentum=0.), "cross_entropy", extra=cbp)
    mine = ours.torch_steps(job, [(x, y)])()[0]
    first = 100 + int(np.ceil(1 / (5e-4 * 30)))
    torch.testing.assert_close(losses[:first], mine[:first], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(losses[first + 50:], mine[first + 50:], rtol=1e-3), "other weights were drawn"
    stats = cbp["continual_backprop"].stats
    for ages, s in zip(plain.ages, stats.values()): assert sorted(ages.tolist()) == sorted(s["age"][0].tolist())
    assert [int((a < n).sum()) for a in plain.ages] == [int((s["age"] < n).sum()) for s in stats.values()] and (plain.ages[0] < n).any()


@pytest.mark.skipif(jaxed.jax is None, reason="JAX is not installed")
@pytest.mark.parametrize("how", ["sgd", "cbp", "adam", "clipping"])
def test_jax_does_the_same_work(how):
    n, s = 300, online.Setting((784, 20, 20, 10), 1e-3 if how in ("adam", "clipping") else .01, adam=how in ("adam", "clipping"), cbp=how == "cbp", clip=.2 if how == "clipping" else None)
    x, y = stream(n, s.sizes, 1)
    jax, _ = online.peer(s, x, y, n); plain, _ = online.plain(s, x, y, n)
    a, b = np.asarray(jax())[0], np.array([float(v) for v in plain()[0]])
    until = 100
    assert np.allclose(a[:until], b[:until], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(jaxed.jax is None, reason="JAX is not installed")
def test_jax_replaces_units_at_the_same_steps():
    sizes, n, rate = (6, 30, 30, 3), 260, 5e-4
    weights, g = ours.he(sizes, 2), torch.Generator().manual_seed(0)
    x, y = torch.rand(2, n, 6, generator=g), torch.randint(3, (2, n), generator=g)
    jaxed.need()
    t = jaxed.Trainer(weights, "relu", jaxed.cross_entropy, jaxed.sgd(.05), jaxed.ContinualBackprop(weights, rate, steps=n))
    t(*jaxed.steps_first(x, y.int()))
    plain = reference.ContinualBackprop(reference.network([(w[1], b[1]) for w, b in weights]), .05, F.cross_entropy, rate=rate)
    for i in range(n): plain.learn(x[1, i:i+1], y[1, i:i+1])
    for s, ages in zip(t.stats, plain.ages): assert sorted(np.asarray(s["age"])[1].tolist()) == sorted(ages.tolist())


def test_the_plain_search_finds_what_ours_finds():
    "both keep 5 % of each layer, and about the same weights: those that two orders of the examples agree on"
    weights, n = ours.he((784, 32, 10), 1), 1280; task = tickets.PermutedPixels(tickets.few(n), tasks=1, normalize=tickets.HOW, seeds=[0])[0]
    train, test = tickets.flat(task, "train"), tickets.flat(task, "test")
    plain, m = tickets.plain_search(weights, train, test, 2, 2); mine, k = tickets.our_search(weights, n, 2, 2)
    assert m == k == 3 * 2 * n
    plain(); mine()
    for name, mask in mine.masks.items():
        other = plain.masks[tickets.module_name(name)].bool(); both = (mask[0] & other).sum() / other.sum()
        assert abs(int(mask.sum()) - int(other.sum())) <= 2 and both > .3, (name, both)         # by chance 5 % of them
    assert plain.accuracy <= 1 and mine.learner.at.examples == k
    picture, label = tickets.Pictures(tickets.few(n).train, task)[7]
    torch.testing.assert_close(picture, train.tensors[0][7], rtol=1e-5, atol=1e-5); assert label == train.tensors[1][7]


def test_ten_tickets_at_once_are_those_one_by_one():
    weights = ours.he((784, 16, 10), 1); masks = tickets.tickets(weights, 3)
    (together, a), (alone, b) = (tickets.our_tickets(weights, masks, 200, 3, 2, t) for t in (True, False))
    together(); alone(); assert a == b == 3 * 2 * 200
    for r, one in enumerate(alone.learners):
        for k, p in one.replicas.params.items(): assert torch.equal(p[0], together.learners[0].replicas.params[k][r])
    w = together.learners[0].replicas.params["linear_0.weight"]; assert not torch.equal(w[0], w[1]) and ((w != 0) <= masks["linear_0.weight"]).all()


def test_ways_to_prune_keep_the_same(): assert set(tickets.pruning("p", 5000).ways) == {"plain, torch.quantile", "sort", "topk", "ours"}    # each is held to the first in there
