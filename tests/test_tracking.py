"What arrives at Weights & Biases, read back from its own offline files; and what happens when it fails, or the run does."
import math
import subprocess
import sys
import types
from functools import partial

import pytest
import torch

from lop_nb.compose import compose
from lop_nb.data import load
from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.learner import Callback, Evaluate, Learner, Online
from lop_nb.models import MLP
from lop_nb.monitor import Monitor
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels
from lop_nb.tracking import Wandb, read_wandb, wandb_key

DATA = load("digits")
MAKE = partial(MLP, 64, 10, hidden_sizes=[16]*2, normalization="none", dropout_p=0.)
STEPS = -(-DATA.train.y.numel() // 32)                         # of an epoch, in batches of 32


class Tell(Callback):
    "Log a number and do something at the end of one epoch, before W&B is told of it"
    def __init__(self, epoch, act): self.epoch, self.act, self.seen = epoch, act, 0
    def after_epoch(self, learner):
        self.seen += 1
        if self.seen == self.epoch: self.act(learner)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setenv("WANDB_SILENT", "true")


def learner(*callbacks, seeds=(42, 43), tasks=2):
    return Learner(Replicas(MAKE, seeds), PermutedPixels(DATA, tasks=tasks), epochs=2, callbacks=[Online(), Evaluate(), *callbacks], run="backprop", defaults=())


read = partial(read_wandb, wait=20)                            # W&B's own process writes the file


def files(folder): return sorted(folder.rglob("*.wandb"), key=lambda f: f.stat().st_mtime)


def where(rows): return [tuple(r[k] for k in ("task_id", "local_epoch", "global_epoch", "local_step", "global_step")) for r in rows]


def same(logged, ours):
    "Every record at its step, and nothing else"
    want = {(r.step, f"{wandb_key(r.split, r.layer, r.metric)}/seed_{r.seed}"): r.value for r in ours.itertuples()}
    have = {(r["global_step"], k): v for r in logged for k, v in r.items() if "/seed_" in k}
    return have == want


@pytest.fixture
def library(monkeypatch):
    "A stand-in for wandb that notes what it is told"
    told = types.SimpleNamespace(inits=[], rows=[], axes=[], ends=[], summary={})
    def init(**kw): told.inits.append(kw); return run
    run = types.SimpleNamespace(log=told.rows.append, define_metric=lambda name, **kw: told.axes.append((name, kw)), summary=told.summary, finish=lambda exit_code=0: told.ends.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init)); told.run = run
    return told


@pytest.mark.parametrize("seeds", [(42, 43), (7,)])
def test_the_offline_file_holds_the_run(tmp_path, seeds):
    "config, tags, names, steps, x-axis, summary, as W&B wrote them"
    cfg = compose(["optimizer.lr=0.01"])
    l = learner(Monitor(["dead_fraction", "stable_rank"]), Wandb("plasticity", tmp_path/"study", cfg, tags=["a", "b"], entity="us", name="first", kind="continual"), seeds=seeds).fit()
    [file] = files(tmp_path/"study"); run = read(file)
    assert {k: run[k] for k in ("project", "entity", "name", "group", "arm", "tags", "exit_code")} == dict(
        project="plasticity", entity="us", name="first", group="study", arm="backprop", tags=["a", "b", "continual"], exit_code=0)
    assert run["config"]["optimizer"]["lr"] == .01 and {"model", "dataset", "stream", "training", "metrics", "intervention"} <= set(run["config"])
    assert same(run["rows"], l.records)
    E = STEPS
    assert where(run["rows"]) == [(0, 0, 0, 0, 0), (0, 1, 1, E, E), (0, 2, 2, 2*E, 2*E), (0, 2, 2, 2*E, 2*E), (1, 0, 2, 0, 2*E), (1, 1, 3, E, 3*E), (1, 2, 4, 2*E, 4*E), (1, 2, 4, 2*E, 4*E)]
    plain = {k for r in run["rows"] for k in r if "/seed_" not in k and not k.startswith("_")}
    layers = {f"train/{g.name}/{m}" for g in l.replicas.graph.groups for m in ("dead_fraction", "stable_rank")}
    assert plain == {"task_id", "local_epoch", "global_epoch", "local_step", "global_step", "train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "online_loss", "online_acc", "train_loss_summed"} | layers
    for r in run["rows"]:
        for k in plain & set(r):
            if f"{k}/seed_{seeds[0]}" in r: assert r[k] == pytest.approx(sum(r[f"{k}/seed_{s}"] for s in seeds) / len(seeds), abs=1e-12)
    assert {run["axes"][k] for k in plain - {"global_step"}} == {"global_step"}
    last = run["rows"][-1]
    assert all(run["summary"][k] == last[k] for k in ("test_acc", "online_loss", *layers))


def test_without_a_summary(tmp_path):
    "names with a dot too, which W&B would read as a path"
    dotted = Tell(1, lambda l: l.log("dead_fraction", torch.zeros(2), "train", "layers.act_0"))
    learner(dotted, Wandb("p", tmp_path, {}, summary=False), tasks=1).fit()
    assert not [k for k in read(files(tmp_path)[0])["summary"] if not k.startswith("_")]


@pytest.mark.parametrize("how", ["ctrl-c", "error"])
def test_a_run_that_is_stopped_is_closed_and_taken_up_in_a_new_one(tmp_path, how):
    "the second run has the same folder, group and name, and goes on with the counts"
    def stop(l):
        if how == "error": raise ZeroDivisionError
        l.stopping = True
    parts = lambda: [Monitor(["dead_fraction"]), Wandb("p", tmp_path/"run", {}), Checkpoint(tmp_path/"saved", 0. if how == "error" else 1e9)]
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)): learner(*parts(), Tell(3, stop)).fit()
    first = read(files(tmp_path/"run")[0])
    assert first["exit_code"] == 1
    state = load_checkpoint(tmp_path/"saved"); state["callbacks"] = [c for c in state["callbacks"] if c[0] != "Tell"]
    at = 3 * STEPS + (how == "ctrl-c")                         # Ctrl-C waits for the next step; the error came after the last
    assert state["at"]["step"] == at
    again = learner(*parts()); again.load_state_dict(state); again.fit()
    second = read(files(tmp_path/"run")[1])
    assert [second[k] for k in ("group", "name", "exit_code")] == [first["group"], first["name"], 0]
    both = where(first["rows"]) + where(second["rows"])
    assert both[-2:] == [(1, 2, 4, 2*STEPS, 4*STEPS)]*2
    whole = learner(Monitor(["dead_fraction"])).fit().records
    assert same(first["rows"] + second["rows"], whole)


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish"])
def test_trouble_at_weights_and_biases_is_only_a_warning(library, fails):
    def trouble(*_, **__): raise OSError("the network is down")
    if fails == "init": sys.modules["wandb"].init = trouble
    else: setattr(library.run, fails, trouble)
    with pytest.warns(UserWarning, match="network is down") as said: l = learner(Wandb("p", None, {}), tasks=1).fit()
    assert len([w for w in said if "network" in str(w.message)]) == 1, "once is enough"
    assert l.finished and l.records.equals(learner(tasks=1).fit().records)


def test_each_value_is_sent_once(library):
    "and nobody else's view of the latest values is disturbed"
    l = learner(Wandb("p", None, {}), tasks=1).fit()
    sent = [k for r in library.rows for k in r if k == "val_loss"]
    assert len(sent) == 3 and len(l.latest) == 9
    assert len({n for n, _ in library.axes}) == len(library.axes), "each name is declared once"
    assert library.ends == [0] and len(library.inits) == 1


def test_an_undefined_value_does_not_stop_it(library):
    def undefined(l):
        l.log("srank", torch.tensor([math.nan, 1.]), "train", "act_0")
    learner(Tell(1, undefined), Wandb("p", None, {}), tasks=1).fit()
    [row] = [r for r in library.rows if "train/act_0/srank" in r]
    assert math.isnan(row["train/act_0/srank"]) and row["train/act_0/srank/seed_43"] == 1.


def test_wandb_is_imported_when_used_and_not_before():
    code = "import sys, lop_nb.tracking as t; t.Wandb('p', None, {}); assert 'wandb' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
