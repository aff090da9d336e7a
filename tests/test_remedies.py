"Remedies against slow loops written from their papers; each changes the run, and a run that was stopped goes on as if it had not been."
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.compose import compose
from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.experiments import intervention_kinds, load_run, make_interventions, run_study, verify
from lop_nb.learner import Callback, Evaluate, Learner, Online, evaluate
from lop_nb.models import CNN, MLP
from lop_nb.monitor import Monitor
from lop_nb.records import Records
from lop_nb.remedies import OnlineNormalization, ShrinkAndPerturb, WeightClipping, bounds
from lop_nb.replicas import Replicas
from lop_nb.runtime import Generators, LopError, seeded
from lop_nb.streams import PermutedPixels

DATA = load("digits")
MAKE = dict(mlp=partial(MLP, 64, 10, hidden_sizes=[10, 8], normalization="none", dropout_p=0.),
            cnn=partial(CNN, 1, 8, 10, conv_channels=[4, 6], fc_hidden_units=[10], normalization="batch", dropout_p=0.))


class Doubles:
    "A stream in float64; what was fetched is remembered"
    def __init__(self, stream): self.stream, self.fetched = stream, []
    def __getattr__(self, name): return getattr(self.stream, name)
    def __len__(self): return len(self.stream)
    def seeded(self, seeds): self.stream = self.stream.seeded(seeds); return self
    def __getitem__(self, k):
        task = self.stream[k]; fetch = task.train.fetch
        def double(*args):
            x, y = fetch(*args); self.fetched.append((k, x.double(), y)); return x.double(), y
        task.train.fetch = double
        return task


def learner_of(*callbacks, kind="mlp", seeds=(3,), optimizer=SGD(lr=.05), dtype=torch.float64, tasks=2, **kw):
    stream = PermutedPixels(DATA, tasks=tasks)
    return Learner(Replicas(MAKE[kind], seeds, dtype=dtype), Doubles(stream) if dtype == torch.float64 else stream, optimizer,
                   epochs=1, callbacks=callbacks, defaults=(), **kw)


def params_of(learner): return {k: p.detach().clone() for k, p in learner.replicas.params.items()}


def slow_run(kind, fetched, spec, each_step=lambda net, lr: None, at_task=lambda net: None, B=32):
    "Plain torch on one network of seed 3, in the order that was fetched"
    net, now = Replicas(MAKE[kind], [3], dtype=torch.float64).modules[0], 0
    opt = (torch.optim.SGD(net.parameters(), lr=spec.lr, momentum=spec.momentum) if spec.name == "sgd" else torch.optim.Adam(net.parameters(), lr=spec.lr))
    for k, xs, ys in fetched:
        if k != now: at_task(net); now = k
        for x, y in zip(xs[0].split(B), ys[0].split(B)):
            opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
            each_step(net, spec.lr)
    return dict(net.named_parameters())


def slow_clip(net, κ, norms):
    "Weight after weight, as in the paper; for norms, the bound of the weight before"
    fan_in = None
    for name, p in net.named_parameters():
        if p.ndim > 1:
            fan_in = 1
            for n in p.shape[1:]: fan_in *= n
        if name.startswith("norm") and not norms: continue
        flat = p.data.view(-1)
        for i, w in enumerate(flat.tolist()): flat[i] = max(-κ / fan_in**.5, min(κ / fan_in**.5, w))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind, κ", [("mlp", .7), ("cnn", .9)])
def test_clipping_equals_the_slow_loop(kind, κ, norms):
    of_norms = [k for k in bounds(MAKE[kind](), norms) if k.startswith("norm")]
    assert len(of_norms) == (4 if kind == "cnn" and norms else 0)
    spec = SGD(lr=.05)
    learner = learner_of(WeightClipping(κ, norms), kind=kind, tasks=1, optimizer=spec).fit()
    want = slow_run(kind, learner.stream.fetched, spec, lambda net, lr: slow_clip(net, κ, norms))
    assert learner.at.step == 41
    for k, p in params_of(learner).items(): assert (p[0] - want[k]).abs().max() <= 1e-12, k
    assert all((learner.replicas.params[f"{l}.weight"].abs() == learner.callbacks[0].limits[f"{l}.weight"]).any() for l in ("out",))


@pytest.mark.parametrize("bound", [0., -1., float("nan")])
def test_a_bound_that_is_none(bound):
    with pytest.raises(LopError, match="weight_clipping.bound"): WeightClipping(bound)


def test_clipping_from_the_command_line():
    cfg = compose(["intervention=weight_clipping", "intervention.weight_clipping.bound=3"])
    callback, = make_interventions(cfg, cfg.intervention.arms[0])
    assert type(callback) is WeightClipping is intervention_kinds["weight_clipping"] and (callback.bound, callback.norms) == (3., False)


def test_the_share_that_is_clipped():
    class Count(Callback):
        order = 1
        def after_task(self, learner):
            clip = learner.callbacks[0]
            self.found = [sum((p[r].abs() == torch.tensor(clip.limits[k], dtype=p.dtype)).sum().item() for k, p in learner.replicas.params.items()) / 828 for r in range(2)]
    count = Count()
    learner = learner_of(WeightClipping(.5), count, seeds=(3, 4), dtype=None, tasks=1).fit()
    assert sum(p[0].numel() for p in learner.replicas.params.values()) == 828
    logged = learner.records.query("metric == 'clipped_fraction'").sort_values("replica").value.tolist()
    assert logged == pytest.approx(count.found, abs=1e-7) and .01 < min(logged) < max(logged) < 1


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("when", ["step", "task"])
def test_shrink_and_perturb_equals_the_slow_loop(when, fresh):
    "ε drawn a number at a time, or weight by weight from a network made as the first one was"
    λ, σ, spec, gens = .99, .02, SGD(lr=.05), Generators(3)
    def perturb(net, *_):
        sizes = [p.numel() for p in net.parameters()]
        if fresh:
            with seeded(gens["intervention"]): new = [p.detach().flatten() for p in MAKE["mlp"]().parameters()]
        else: new = torch.empty(sum(sizes), dtype=torch.float64).normal_(generator=gens["intervention"]).split(sizes)
        for p, ε in zip(net.parameters(), new):
            flat = p.data.view(-1)
            for i in range(len(flat)): flat[i] = λ * flat[i].item() + σ * ε[i].item()
    learner = learner_of(ShrinkAndPerturb(λ, σ, when, fresh), optimizer=spec, tasks=3 if when == "task" else 1).fit()
    want = slow_run("mlp", learner.stream.fetched, spec, **{"each_step" if when == "step" else "at_task": perturb})
    for k, p in params_of(learner).items(): assert (p[0] - want[k]).abs().max() <= 1e-12, k


def test_shrinks_and_perturbs():
    "A77: each alone does its part, in every parameter, with the deviation asked for"
    nets = lambda: Replicas(MAKE["mlp"], [3, 4], dtype=torch.float64)
    was = nets().params
    only = {}
    for name, λ, σ in (("shrink", .9, 0.), ("noise", 1., .3)): only[name] = nets(); ShrinkAndPerturb(λ, σ).apply(only[name])
    noise = torch.cat([(only["noise"].params[k] - was[k]).flatten(1) for k in was], 1)
    for k in was: assert torch.equal(only["shrink"].params[k], .9 * was[k]) and (only["noise"].params[k] != was[k]).all()
    assert (noise.std(1) / .3 - 1).abs().max() < 5 * (2 * noise.shape[1])**-.5 and abs(torch.corrcoef(noise)[0, 1]) < 5 * noise.shape[1]**-.5


@pytest.mark.parametrize("settings", [dict(shrink=1.5), dict(shrink=-.1), dict(noise=-1.), dict(when="epoch")])
def test_shrink_and_perturb_refuses(settings):
    with pytest.raises(LopError, match=f"shrink_and_perturb.*{next(iter(settings))}"): ShrinkAndPerturb(**settings)


def test_only_what_acts_at_each_step_listens_to_steps():
    "else a kernel would be kept away for nothing"
    for callback, listens in ((ShrinkAndPerturb(when="step"), True), (ShrinkAndPerturb(when="task"), False), (OnlineNormalization(), False)):
        learner = learner_of(callback, dtype=None)
        assert (callback in learner.watchers) == listens and isinstance(callback, (ShrinkAndPerturb, OnlineNormalization))


def welford(x, limit):
    "One feature after the other, one example after the other: x [n, features]"
    z = torch.empty_like(x)
    for j in range(x.shape[1]):
        μ = M = 0.
        for t, v in enumerate(x[:, j].tolist(), 1):
            δ = v - μ; μ += δ / t; M += δ * (v - μ)
            z[t - 1, j] = 0. if M == 0 else max(-limit, min(limit, (v - μ) / (M / t)**.5))
    return z


def test_online_normalization_equals_welford():
    "through tasks and blocks, and the networks learn from just these inputs"
    shown = []
    class Look(Callback):
        order = 1
        def inputs(self, learner, x): shown.append(x); return x
    learner = learner_of(OnlineNormalization(4.), Look(), tasks=2).fit()
    x, z = (torch.cat(v, 1)[0].flatten(1) for v in ([f[1] for f in learner.stream.fetched], shown))
    assert len(x) == 2 * 1293 and learner.at.step == 82 and z.dtype == x.dtype
    assert (z - welford(x, 4.)).abs().max() < 1e-9 and z.abs().max() == 4
    net = Replicas(MAKE["mlp"], [3], dtype=torch.float64).modules[0]
    opt = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9)
    for part, y in zip(z.view(2, 1293, 64).unbind(), (torch.cat([f[2] for f in learner.stream.fetched if f[0] == k], 1)[0] for k in (0, 1))):
        for a, b in zip(part.split(32), y.split(32)): opt.zero_grad(); F.cross_entropy(net(a), b).backward(); opt.step()
    for k, p in net.named_parameters(): assert (p - learner.replicas.params[k][0]).abs().max() < 1e-10, k
    buffers = learner.replicas.buffers
    assert (buffers["input_mean"][0].flatten() - x.mean(0)).abs().max() < 1e-10 and (buffers["input_std"][0].flatten() - x.std(0, correction=0)).abs().max() < 1e-8


def test_evaluation_sees_inputs_on_the_same_scale(tmp_path):
    "at the end of tasks, for measures, and after the run was read from its folder"
    cfg = compose(["intervention=online_norm", "dataset.normalize=raw255", "training.replicas=2", "training.epochs=6", "stream.tasks=1", "optimizer=sgd",
                   "logging.progress=false", "logging.figures=false", "metrics.names=[dead_fraction]"])
    run = load_run(run_study(cfg, tmp_path/"run"))
    accuracy = run.records.query("metric == 'test_accuracy'").groupby(["run", "replica"]).value.mean()
    assert accuracy["online_norm"].min() > .7
    nets, stream = run.replicas["online_norm"], PermutedPixels(DATA, tasks=1, normalize="raw255").seeded([42, 43])
    every = lambda view: view.fetch(torch.arange(view.n).expand(2, -1))[0].double()
    seen = every(stream[0].train)                                          # six times, each example as often as any other
    z = ((every(stream[0].test) - seen.mean(1, keepdim=True)) / seen.std(1, correction=0, keepdim=True)).nan_to_num(0, 10, -10).clamp(-10, 10)
    plain = Replicas(nets.make_model, [42, 43])
    with torch.no_grad():
        for k, p in plain.params.items(): p.copy_(nets.params[k])
    with plain.evaluating(), nets.evaluating():
        want, x = plain(z.float()), every(stream[0].test).float()
        assert (nets(x) - want).abs().max() < 1e-3 < .1 < (plain(x) - want).abs().max()
    assert evaluate(nets, stream[0], stream[0].test)["accuracy"].tolist() == pytest.approx(accuracy["online_norm"].tolist(), abs=1e-7)


def test_fresh_networks_keep_the_scale():
    "training.reset: new weights, the same stream"
    learner = learner_of(OnlineNormalization(), dtype=None, tasks=2, reset=True).fit()
    assert learner.callbacks[0].sums["t"] == 2 * 1293


ARMS = dict(weight_clipping=lambda: [WeightClipping(.8)], each_step=lambda: [ShrinkAndPerturb()], fresh_each_step=lambda: [ShrinkAndPerturb(.99, .01, "step", True)],
            each_task=lambda: [ShrinkAndPerturb(.6, .01, "task")], online_norm=lambda: [OnlineNormalization()])


class Stop(Callback):
    def __init__(self, step=None): self.step = step
    def after_step(self, learner): learner.stopping = learner.stopping or learner.at.step == self.step


def run_of(arm, folder, step=None, resume_at=None, seeds=(0, 1)):
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[12, 8], dropout_p=.1), seeds)
    callbacks = [Online(), Evaluate(), Monitor(["dead_fraction"]), *ARMS.get(arm, list)(), Stop(step), Checkpoint(folder/"checkpoints", 1e9)]
    return Learner(nets, PermutedPixels(DATA, tasks=3), Adam(lr=.01), epochs=1, callbacks=callbacks, store=Records(folder/"records", resume_at=resume_at), defaults=())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {arm: run_of(arm, tmp_path_factory.mktemp(arm)).fit() for arm in ["backprop", *ARMS]}


def all_of(learner): return learner.replicas.params | learner.replicas.buffers


@pytest.mark.parametrize("step", [1, 41, 2*41 + 5])
@pytest.mark.parametrize("arm", ARMS)
def test_stopped_anywhere(arm, step, tmp_path, whole):
    first = run_of(arm, tmp_path, step)
    with pytest.raises(KeyboardInterrupt): first.fit()
    assert first.at.step == step
    first.store.close()
    state = load_checkpoint(tmp_path/"checkpoints")
    second = run_of(arm, tmp_path, resume_at=state["rows"]); second.load_state_dict(state); second.fit()
    for k, p in all_of(second).items(): assert torch.equal(p, all_of(whole[arm])[k]), k
    pd.testing.assert_frame_equal(second.records, whole[arm].records, check_exact=True)


@pytest.mark.parametrize("arm", ARMS)
def test_each_one_changes_the_run(arm, whole):
    "A81, DA36: no remedy is plain backprop under another name"
    for k, p in whole["backprop"].replicas.params.items(): assert (whole[arm].replicas.params[k] - p).abs().max() > 1e-3, k


@pytest.mark.parametrize("arm", ARMS)
def test_alone_as_among_others_and_however_blocks_are_cut(arm, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("lop_nb.learner.chunk_bytes", 3 * 4 * 32 * 64 // 16)      # three batches
    alone = run_of(arm, tmp_path, seeds=[1]).fit()
    for k, p in all_of(alone).items(): assert torch.equal(p[0], all_of(whole[arm])[k][1]), k


@pytest.mark.parametrize("arm", ["weight_clipping", "shrink_and_perturb", "online_norm", "weight_clipping+online_norm"])
def test_as_an_arm(arm):
    cfg = compose([f"intervention.arms=[{arm}]"], verify)
    assert [type(c) for c in make_interventions(cfg, arm)] == [type(intervention_kinds[k]()) for k in arm.split("+")]


@pytest.mark.parametrize("callbacks", [lambda: [OnlineNormalization(3.)], lambda: [WeightClipping(.7), OnlineNormalization()], lambda: [ShrinkAndPerturb(.6, .01, "task")]], ids=["online_norm", "clipping+online_norm", "each_task"])
def test_a_kernel_does_the_same(callbacks):
    "what needs not see each step leaves the steps to compiled code; records too"
    pytest.importorskip("numba")
    runs = {}
    for engine in "torch", "numba":
        runs[engine] = Learner(Replicas(MAKE["mlp"], [3, 4], dtype=torch.float64), Doubles(PermutedPixels(load("digits", examples_per_class=20), tasks=2)), SGD(lr=.01, momentum=0.), epochs=1,
                               batch_size=1, engine=engine, callbacks=[Online(50), *callbacks()], defaults=()).fit()
        assert runs[engine].engine.name == engine
    for k, p in all_of(runs["torch"]).items(): assert (all_of(runs["numba"])[k] - p).abs().max() <= 1e-10, k
    a, b = (runs[e].records for e in runs)
    pd.testing.assert_frame_equal(a.drop(columns="value"), b.drop(columns="value")); assert (a.value - b.value).abs().max() < 1e-9 and len(a) > 12
