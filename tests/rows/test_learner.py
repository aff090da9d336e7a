"""Rows A26, A32 to A38, A45 to A47 and B12 to B14 of the sources: training, and what is seen of it."""
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lop_nb.compose import compose
from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.experiments import load_run, plan, run_study
from lop_nb.interventions import ContinualBackprop
from lop_nb.learner import Callback, Learner
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.monitor import Monitor, read_units, select, with_gradients
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels
from lop_nb.tracking import Wandb, read_wandb
from lop_nb.units import gather

DATA = load("digits")
SMALL = partial(MLP, 64, 10, hidden_sizes=[16, 16], normalization="none", dropout_p=0.)


def study(*words): return plan(compose(["training.replicas=1", *words]))[1][0]


def test_A23_the_switch():
    "`training.no_augment=true` switches all augmentation off, and the data set's own is on without it"
    if not os.environ.get("LOP_DATA"): pytest.skip("LOP_DATA is not set")
    words = ["training=continual", "dataset=mnist", "dataset.examples_per_class=20", "model.hidden_sizes=[8]"]
    assert study(*words, "training.no_augment=true").augment is None
    on = study(*words); on.task, was = on.stream[0], on.stream.data.train.x[:1].clone()
    pick = torch.zeros(1, 1, dtype=torch.long)
    assert not torch.equal(on._change()(pick)(was[None]), was[None]) and torch.equal(on.stream.data.train.x[:1], was)


def test_A26_the_probe_is_balanced_and_constant():
    "what is measured is measured on the same examples each time, equally many of each class of the task, never augmented"
    task, monitor = ClassSplit(DATA, seeds=[0, 1])[0], Monitor(probe_size=100)
    view = task.train
    _, y = view.fetch(torch.arange(view.n).expand(2, -1))
    from lop_nb.monitor import balanced
    rows = balanced(y, 100, view.valid)
    for r in range(2): assert y[r][rows[r]].bincount(minlength=10)[task.classes[r]].tolist() == [50, 50]
    assert torch.equal(monitor.probe(task)[0], monitor.probe(task)[0])


def test_A32_a_fresh_optimizer_each_task():
    "`optimizer.reinit_optimizer`: Adam remembers nothing at the start of the second task"
    class Look(Callback):
        def before_task(self, learner): self.states = sum(map(len, learner.optimizer.state.values()))
    for reinit in (True, False):
        look = Look(); Learner(Replicas(SMALL, [0]), PermutedPixels(DATA, tasks=2), Adam(reinit_optimizer=reinit), epochs=1, callbacks=[look]).fit()
        assert (look.states == 0) == reinit


@pytest.mark.parametrize("make", [SMALL, partial(CNN, 1, 8, 10, conv_channels=[8, 8], fc_hidden_units=[16], normalization="none", dropout_p=0.)])
def test_A33_continual_backprop(make):
    "it runs on MLP and CNN, replaces ρ times the eligible units a step to within a tenth, and a replaced unit has new incoming weights and zero outgoing ones"
    rate, eligible = .01, []
    class Count(Callback):
        order, seen = 10, 0
        def after_backward(self, learner): self.was = {k: p.detach().clone() for k, p in learner.replicas.params.items()}
        def after_step(self, learner):
            fresh = {g.name: (cbp.stats[g.name]["age"] == 0).nonzero()[:, 1][None] for g in cbp.groups}
            for g in cbp.groups:
                new = fresh[g.name]
                eligible.append(float((cbp.stats[g.name]["age"] > cbp.maturity).sum())); self.seen += new.numel()
                if sum(n.numel() for n in fresh.values()) == new.numel():     # else a new unit of the next layer has just drawn its weights
                    assert all((gather(learner.replicas.params, w, new) == 0).all() for w in g.writes)
                assert all((gather(learner.replicas.params, w, new) - gather(self.was, w, new)).abs().mean() > .01 for w in g.weights if new.numel())
    cbp, count = ContinualBackprop(replacement_rate=rate, maturity_threshold=20), Count()
    Learner(Replicas(make, [0]), PermutedPixels(DATA, tasks=6), Adam(), epochs=2, callbacks=[cbp, count]).fit()
    assert sum(cbp.replaced.values()) == count.seen == pytest.approx(rate * sum(eligible), rel=.1)


def test_A34_continual_training():
    "5 tasks of 2 classes, 20 epochs each, batches of 128, and an entry for each task's start and each epoch"
    learner = study("training=continual")
    assert (len(learner.stream), learner.epochs, learner.batch_size) == (5, 20, 128) and learner.stream[0].classes.sum() == 2
    learner.fit()
    assert learner.records.query("metric == 'val_loss'").groupby("task").epoch.apply(list).tolist() == [list(range(21))]*5


def test_A36_what_happens_when():
    "before a task: a look at what is about to be reset; networks, then optimizer, then head, each only if asked for; then evaluation; then epochs of training, evaluation and measuring"
    events = []
    class Log(Callback):
        order = -10
        def before_task(self, learner): events.append(("task", bool((learner.replicas.params["out.weight"] == 0).all()), sum(map(len, learner.optimizer.state.values()))))
        def before_epoch(self, learner): events.append("epoch")
    monitor = Monitor(["dead_fraction"], epochs=2)
    learner = Learner(Replicas(SMALL, [0]), ClassSplit(DATA, tasks=2, seeds=[0]), Adam(reinit_optimizer=True), epochs=2, callbacks=[Log(), monitor], head_reset="zero").fit()
    assert events == [("task", False, 0), "epoch", "epoch", ("task", True, 0), "epoch", "epoch"]
    rows = learner.records.query("task == 1")
    order = list(dict.fromkeys(zip(rows.epoch, rows.metric)))
    assert [m for e, m in order if e == 0 and "accuracy_all" not in m] == ["dead_fraction_before_reset", "val_loss", "val_accuracy", "dead_fraction"]
    at_end = [m for e, m in order if e == 2]
    assert at_end.index("train_loss") < at_end.index("val_loss") < at_end.index("dead_fraction")
    assert (learner.task.loss(torch.zeros(1, 3, 10), torch.full((1, 3), int(learner.task.classes[0].nonzero()[0]))) - torch.tensor(2.).log()).abs().max() < 1e-6


def test_A37_fresh_networks_each_task():
    "`training.reset`: weights at the start of task 1 have nothing to do with those at the end of task 0, and running statistics are new"
    class Look(Callback):
        def __init__(self): self.w, self.mean = [], []
        def keep(self, learner): self.w.append(learner.replicas.params["linear_1.weight"].detach().clone().flatten()); self.mean.append(learner.replicas.buffers["norm_0.running_mean"].clone())
        before_task = after_task = keep
    look = Look()
    Learner(Replicas(partial(MLP, 64, 10, hidden_sizes=[32, 32]), [0]), PermutedPixels(DATA, tasks=2), Adam(lr=.01), epochs=1, callbacks=[look], reset=True).fit()
    assert abs(torch.corrcoef(torch.stack(look.w[1:3]))[0, 1]) < .1 and (look.mean[1] != 0).any() and (look.mean[2] == 0).all()


def test_A38_standard_training():
    "one task with all classes, plain cross-entropy, 20 epochs"
    learner = study("training=standard")
    task = learner.stream[0]
    assert (len(learner.stream), learner.epochs, task.active) == (1, 20, None) and task.classes.all()
    logits, y = torch.randn(1, 8, 10), torch.randint(10, (1, 8))
    assert torch.allclose(task.loss(logits, y)[0], F.cross_entropy(logits[0], y[0], reduction="none"))


NETS = dict(mlp=lambda: MLP(64, 10, hidden_sizes=[8, 8], dropout_p=0.), cnn=lambda: CNN(1, 8, 10, conv_channels=[4, 4], fc_hidden_units=[8], pool_type="avg", dropout_p=0.),
            resnet=lambda: ResNet(1, 8, 10, layers=[1, 1], base_channels=4, dropout_p=0.), vit=lambda: ViT(1, 8, 10, patch_size=4, embed_dim=8, depth=2, n_heads=2, dropout_p=0., attn_drop_rate=0.))


@pytest.mark.parametrize("name", NETS)
def test_A45_activations_and_gradients_of_every_module(name):
    "activations, and gradients of the loss with respect to them, equal autograd's on every module of the four networks"
    nets = Replicas(NETS[name], [0, 1], dtype=torch.float64)
    task = PermutedPixels(DATA, tasks=1, seeds=[0, 1])[0]
    x, y = task.train.fetch(torch.arange(12).expand(2, -1)); x = x.double()
    places = select(nets.modules[0], [])
    seen = with_gradients(nets, task, x, y, places)
    assert set(seen) == {n for n, m in nets.modules[0].named_modules() if n} >= {"out"}
    step = 1e-6
    with nets.evaluating():
        for place, (h, g) in seen.items():                      # the loss along one direction of the activation, by differences
            direction = torch.randn(h.shape[1:], dtype=h.dtype, generator=torch.Generator().manual_seed(0))
            def loss(eps):
                handle = nets.modules[0].get_submodule(place).register_forward_hook(lambda m, i, out: out + eps * direction)
                try: return task.loss(nets.modules[0](x[0])[None], y[:1]).sum().item()
                finally: handle.remove()
            assert (g[0] * direction).sum().item() == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-4, abs=1e-7), place


@pytest.mark.parametrize("name", NETS)
def test_A46_filters_always_find_something(name):
    "default, block outputs, all modules and parts of names: none of them watches nothing, and a part that is nowhere is refused"
    net = NETS[name]()
    everything, default, blocks = select(net, []), select(net, ["default"]), select(net, ["block_outputs"])
    assert len(everything) > len(default) > 0 and 0 < len(blocks) and set(default) | set(blocks) <= set(everything)
    if name == "resnet": assert blocks == ["layer1_block0", "layer2_block0"]
    if name == "vit": assert blocks == ["block_0", "block_1"]
    assert select(net, ["out"])[-1] == "out"
    with pytest.raises(LopError, match="nowhere"): select(net, ["nowhere"])


def test_A47_activations_as_samples_by_units():
    "a channel's pixels and a feature's tokens are samples of it; vectors stay as they are"
    x = torch.randn(2, 5, 1, 8, 8)
    shapes = {name: {tuple(h.shape) for h in read_units(Replicas(NETS[name], [0, 1]), x).values()} for name in ("mlp", "cnn", "resnet", "vit")}
    assert shapes["mlp"] == {(2, 5, 8)}
    assert shapes["cnn"] == {(2, 5*64, 4), (2, 5*16, 4), (2, 5, 8)}
    assert shapes["resnet"] == {(2, 5*64, 4), (2, 5*16, 8)} and shapes["vit"] == {(2, 5*5, 8), (2, 5*5, 32)}


def test_A59_keys_of_the_log(tmp_path, monkeypatch):
    "W&B gets the sources' keys for tasks, epochs, steps, losses, accuracies and layers, with gradient steps on the x-axis"
    monkeypatch.setenv("WANDB_MODE", "offline")
    learner = Learner(Replicas(SMALL, [0]), PermutedPixels(DATA, tasks=2), Adam(), epochs=2, callbacks=[Monitor(["dead_fraction"]), Wandb("p", tmp_path, {})]).fit()
    told = read_wandb(next(tmp_path.rglob("*.wandb")), wait=20)
    keys = {k for row in told["rows"] for k in row}
    assert keys >= {"task_id", "local_epoch", "global_epoch", "local_step", "global_step", "train_loss", "train_acc", "val_loss", "val_acc", "train/act_0/dead_fraction"}
    last = [row for row in told["rows"] if "train_loss" in row][-1]
    steps = learner.at.step
    assert (last["task_id"], last["local_epoch"], last["global_epoch"], last["local_step"], last["global_step"]) == (1, 2, 4, steps // 2, steps)
    assert told["axes"]["train_loss"] == "global_step"


def test_B12_each_task_a_fresh_adam():
    "source B's preset: Adam starts afresh with each task, cross-entropy, 10 epochs of batches of 32, biases trained"
    cfg = compose(["+experiment=tickets/lop"])
    assert (cfg.optimizer.name, cfg.optimizer.reinit_optimizer, cfg.training.epochs, cfg.training.batch_size, cfg.model.bias) == ("adam", True, 10, 32, True)


def test_B13_both_conventions_of_what_is_reported():
    "train accuracy as the mean over all epochs and loss as their sum (source B), beside each epoch's own"
    learner = Learner(Replicas(SMALL, [0]), PermutedPixels(DATA, tasks=1), SGD(lr=.01), epochs=3, batch_size=431).fit()    # 1293 = 3 · 431
    value = lambda m: learner.records.query("metric == @m").value.to_numpy()
    assert value("online_accuracy")[0] == pytest.approx(value("train_accuracy").mean(), rel=1e-5)
    assert value("train_loss_summed")[0] == pytest.approx(value("train_loss").sum(), rel=1e-5)
    assert len(value("test_accuracy")) == 1 and len(value("val_accuracy")) == 4


def test_B14_networks_and_tasks_are_kept(tmp_path):
    "networks at the start and end of each so many tasks, and the permutation of every task from the record"
    run = load_run(run_study(compose(["stream.tasks=3", "training.epochs=1", "training.replicas=1", "intervention=backprop", "logging.snapshot_tasks=2", "logging.figures=false"]), tmp_path/"run"))
    assert sorted(f.name for f in (tmp_path/"run"/"models"/"backprop").iterdir()) == [f"task_00000{k}_{m}.pt" for k in (0, 2) for m in ("end", "start")]
    from lop_nb.streams import from_record
    assert torch.equal(from_record(run.stream, DATA)[2].train.pixels, PermutedPixels(DATA, tasks=3, seeds=[42])[2].train.pixels)
    assert run.records.query("metric == 'test_accuracy'").task.tolist() == [0, 1, 2]
