"The LeNet study in small: it runs, is stopped, goes on and collects the same; where a curve is least; what is said of its numbers."
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lop_nb.data import Split, load
from lop_nb.masks import broken, densities
from lop_nb.runtime import LopError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"nbs"/"experiments"))
import lenet_study as study  # noqa: E402

TINY = dict(rounds=2, steps=40, every=10, again=[2], data={})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "The digits in frames of 28 × 28 in place of MNIST"
    d = load("digits", examples_per_class=12, val=.2); framed = lambda s: Split(F.pad(s.x, (10, 10, 10, 10)), s.y)
    monkeypatch.setattr(study, "load", lambda name, **kw: replace(d, train=framed(d.train), val=framed(d.val), test=framed(d.test)))


def run(folder):
    study.search(folder, TINY)
    for k in TINY["again"]: study.again(folder, TINY, k)
    return study.collect(folder, TINY, folder/"lenet.parquet")


def test_stopped_and_gone_on_with(tmp_path, monkeypatch):
    whole, plain = run(tmp_path/"a"), study.Validate.after_block
    for stop in (3, 41, 79, 119):     # steps of the search, after which Ctrl-C arrives: in the first round, behind its end, at the second's, in the last
        class Stopped(study.Validate):
            def after_block(self, learner):
                plain(self, learner)
                if learner.at.step >= stop and not again: again.append(learner.at.step); learner.stopping = True
        again = []
        with monkeypatch.context() as m:
            m.setattr(study, "Validate", type("Validate", (Stopped,), {}))
            with pytest.raises(KeyboardInterrupt): study.search(tmp_path/f"{stop}", TINY)
            with pytest.raises(LopError, match="Not finished in .*: tickets, again_02"): study.collect(tmp_path/f"{stop}", TINY, tmp_path/"no.parquet")
        pd.testing.assert_frame_equal(run(tmp_path/f"{stop}"), whole)
    assert not (tmp_path/"no.parquet").exists()


def test_the_recipe(tmp_path):
    df = run(tmp_path); state = torch.load(sorted((tmp_path/"tickets"/"checkpoints").glob("*.pt"))[-1], weights_only=True)
    masks = [torch.load(study.mask_file(tmp_path/"tickets"/"masks", k), weights_only=True) for k in range(3)]
    assert state["at"]["step"] == 3 * 40 and state["at"]["examples"] == 3 * 40 * 60
    for k, m in enumerate(masks):
        for name, kept in densities(m).items(): assert abs(kept - (.9 if name == "out.weight" else .8)**k).max() * m[name][0].numel() <= 1, (k, name)
        assert k == 0 or not any((m[n] & ~masks[k - 1][n]).any() for n in m)
    start = study.networks(); assert sum(v[0].numel() for v in masks[0].values()) == 266_200
    ends = {n: torch.load(sorted((tmp_path/n/"checkpoints").glob("*.pt"))[-1], weights_only=True)["replicas"]["params"] for n in ("tickets", "again_02")}
    for params in ends.values(): assert not broken(params, masks[2])
    assert all(torch.equal(state["callbacks"][0][1]["start"][k], p) for k, p in start.params.items())
    assert not torch.equal(ends["tickets"]["linear_0.weight"][masks[2]["linear_0.weight"]], ends["again_02"]["linear_0.weight"][masks[2]["linear_0.weight"]])
    curve = df[(df.metric == "val_loss") & (df.arm == "ticket") & (df["round"] == 1) & (df.seed == 2)]
    assert list(curve.iteration) == [12, 21, 30, 40]         # ends of blocks of three steps, and of the round
    orders = [study.Passes(study.load(""), 1, 500, first=2, seeds=[1])[0].train.rows, study.Passes(study.load(""), 3, 500, seeds=[0, 1])[2].train.rows[1:]]
    assert torch.equal(*orders) and len(orders[0].unique()) == len(study.load("").train)                # the control sees the ticket's batches


def test_the_control_needs_the_search(tmp_path):
    with pytest.raises(LopError, match="mask of round 2 is not in"): study.again(tmp_path, TINY, 2)
    assert not list(tmp_path.iterdir())


def test_where_a_curve_is_least():
    steps = [100, 200, 300, 400]
    assert [study.early_stop(steps, v) for v in ([4, 3, 2, 1], [1, 2, 3, 4], [3, 1, 1, 2], [np.nan, 2, 1, np.nan], [np.inf, np.inf, 5, 6])] == [400, 100, 200, 300, 300]
    with pytest.raises(LopError, match="smaller step size"): study.early_stop(steps, [np.nan]*4)


def test_what_is_held_against_the_published_numbers():
    "Networks that do exactly what the paper says are inside in its column, and ones whose tickets are of no use are outside"
    def frame(stop, accuracy, other_stop, other):
        rows = [("ticket", k, seed, "stop_iteration", stop[k]) for k in stop for seed in range(3)] + [("ticket", k, seed, m, v + .0001*seed) for k, v in accuracy.items() for seed in range(3) for m in ("stop_accuracy", "end_accuracy")]
        rows += [("re-initialised", k, seed, m, v) for k in other for seed in range(3) for m, v in (("stop_iteration", other_stop[k]), ("stop_accuracy", other[k] + .0001*seed))]
        return pd.DataFrame(rows, columns=["arm", "round", "seed", "metric", "value"])
    t = study.against(frame({0: 10_000, 7: 6200, 15: 6000}, {0: .98, 7: .983, 9: .983, 15: .98}, {7: 6200*2.51, 15: 6000*2.4}, {7: .978, 15: .97}))
    assert t.inside.all() and np.allclose(t["mean"], [.38, .003, 0, .003, 2.51, .005, 2.4, .01, .9801]) and (t.half[["stops earlier, 21.07 %", "accuracy, 13.52 %"]].abs() < 1e-9).all()
    t = study.against(frame({0: 10_000, 7: 20_000, 15: 6000}, {0: .9, 7: .9, 9: .89, 15: .88}, {7: 20_000, 15: 6000}, {7: .9, 15: .9}))
    assert not t.inside.any()
