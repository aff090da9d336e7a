"The monitor measures what the functions measure, looks without touching, and says in which state it looked."
from functools import partial

import numpy as np, pytest, torch

from lop_nb import metrics
from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.compose import compose
from lop_nb.config import Adam, MetricsConfig
from lop_nb.data import load
from lop_nb.experiments import make_callbacks, plan, verify
from lop_nb.learner import Callback, Evaluate, Learner, Online, evaluate
from lop_nb.layers import activations
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.monitor import Monitor, OtherTasks, balanced, incoming, select, spread, with_gradients, with_slopes
from lop_nb.ntk import TangentKernel, kernel, kernel_effective_rank
from lop_nb.outcomes import accuracy_matrix, initial_accuracy
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels, RandomLabels

DATA = load("digits", examples_per_class=30)
SMALL = partial(MLP, 64, 10, hidden_sizes=[12, 12], dropout_p=.1)                         # batch norm and dropout: both have a mode and a state
NETS = dict(mlp=SMALL, cnn=partial(CNN, 1, 8, 10, conv_channels=[4, 6], fc_hidden_units=[16]), resnet=partial(ResNet, 1, 8, 10, layers=[1, 1], base_channels=4),
            vit=partial(ViT, 1, 8, 10, patch_size=4, embed_dim=12, n_heads=3, depth=1))


def fit(*callbacks, make=SMALL, seeds=(0, 1), stream=PermutedPixels, tasks=2, epochs=2, **how):
    return Learner(Replicas(make, seeds), stream(DATA, tasks=tasks), Adam(lr=.01), epochs=epochs, callbacks=callbacks, defaults=[Online(), Evaluate()], **how).fit()


# ---- what it measures ----
def test_every_measure_is_that_of_the_function():
    "all names on a trained network, against `metrics.measure` on activations, gradients, slopes and weights taken by hand"
    monitor = Monitor(["all"], probe_size=60); learner = fit(monitor)
    nets, task, first = learner.replicas, learner.task, Replicas(SMALL, [0, 1])
    x, y = monitor.examples(task); places = ["act_0", "act_1"]
    seen, slope = with_gradients(nets, task, x, y, places), with_slopes(nets, x, places)
    df = learner.records.query("task == 1")
    for p in places:
        w = lambda n: incoming(n.params, n.graph[p])
        want = metrics.measure(*[seen[p][0], [n for n in metrics.known if n != "update_norm"], seen[p][1]], slope=slope[p], weights=w(nets), initial=w(first))
        for name, v in want.items():
            got = df[(df.layer == p) & (df.metric == name)].sort_values("seed").value.to_numpy()
            np.testing.assert_allclose(got, v.detach().double().numpy(), rtol=1e-6, atol=1e-9, err_msg=name)

def test_update_norm_is_counted_from_the_tasks_start():
    class Keep(Callback):
        order, at = -5, {}
        def before_task(self, learner): self.at[learner.at.task] = incoming(learner.replicas.params, learner.replicas.graph["act_0"]).clone()
    keep = Keep(); learner = fit(keep, Monitor(["update_norm", "distance_from_init"], epochs=1))
    end = incoming(learner.replicas.params, learner.replicas.graph["act_0"])
    rows = learner.records.query("layer == 'act_0'")
    for metric, task in (("update_norm", 1), ("distance_from_init", 0)):
        got = rows.query("metric == @metric and task == 1 and epoch == 2").value.to_numpy()
        np.testing.assert_allclose(got, (end - keep.at[task]).flatten(1).norm(dim=1), rtol=1e-5)
    assert (rows.query("metric == 'update_norm' and epoch == 0").value == 0).all()

@pytest.mark.parametrize("name", [n for n in activations if n != "none"])
def test_slopes_are_those_of_the_activation(name):
    "central differences in float64, away from kinks"
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[8], normalization="none", activation=name, dropout_p=0.), [0], dtype=torch.float64)
    x = torch.randn(1, 50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, f = nets(x, ["linear_0"])[1]["linear_0"], activations[name]()
    numeric = (f(z + 1e-5) - f(z - 1e-5)) / 2e-5; smooth = z.abs() > 1e-4
    got = with_slopes(nets, x, ["act_0"])["act_0"]
    assert (got - numeric)[smooth].abs().max() < 1e-8 and smooth.double().mean() > .99

@pytest.mark.parametrize("name", NETS)
def test_all_measures_on_all_networks(name):
    "units of ResNet blocks have slopes, those of a transformer's stream, queries and values have none; nothing else is missing, and all is finite"
    learner = fit(Monitor(["all"], probe_size=20), make=NETS[name], seeds=[0], tasks=1, epochs=1)
    rows, sites = learner.records.query("layer != ''"), {g.name: g.site for g in learner.replicas.graph.groups}
    slopeless = {n for n, s in sites.items() if name == "vit" and "act" not in s}
    for layer in sites:
        lacking = set(metrics.known) - set(rows[rows.layer == layer].metric)
        assert lacking == ({n for n, needs in metrics.known.items() if "slope" in needs} if layer in slopeless else set())
    assert np.isfinite(rows.value).all() and len(slopeless) == (3 if name == "vit" else 0)

def test_histograms_are_shares_of_the_units():
    h = torch.tensor([[[0., 5., -2.], [0., 5., 2.2]]])                                    # means 0, 5, .1; deviations 0, 0, 2.1
    got = {k: v.item() for k, v in spread(h, [.5, 4.]).items()}
    want = {"act_means_hist[-inf,-4)": 0, "act_means_hist[-4,-0.5)": 0, "act_means_hist[-0.5,0.5)": 2, "act_means_hist[0.5,4)": 0, "act_means_hist[4,inf)": 1,
            "act_stds_hist[0,0.5)": 2, "act_stds_hist[0.5,4)": 1, "act_stds_hist[4,inf)": 0}
    assert got == pytest.approx({k: n / 3 for k, n in want.items()})


# ---- that it only looks ----
@pytest.mark.parametrize("looks", [lambda: Monitor(["all"], epochs=1, layers=[], histograms=True, probe_size=20), lambda: OtherTasks("all"), lambda: TangentKernel(10, epochs=1)])
def test_training_goes_on_as_if_nobody_looked(looks):
    "parameters, running statistics and generators after a measured run are bit for bit those of one that was not"
    plain, watched = fit(), fit(looks())
    state, other = (l.replicas.state_dict() for l in (plain, watched))
    for k in ("params", "buffers"): assert all(torch.equal(v, other[k][n]) for n, v in state[k].items())
    assert all(torch.equal(s, o[n]) for r, o in zip(state["generators"], other["generators"]) for n, s in r.items())
    common = set(plain.records.metric); rows = watched.records
    assert plain.records.equals(rows[rows.metric.isin(common)].reset_index(drop=True))

def test_a_run_that_is_resumed_measures_the_same(tmp_path):
    "the weights of the task's start and of the beginning are in the checkpoint"
    class Stop(Callback):
        order = 99
        def after_step(self, learner): learner.stopping = learner.stopping or learner.at.step == 12
    build = lambda folder, *more: Learner(Replicas(SMALL, [0, 1]), PermutedPixels(DATA, tasks=2), Adam(lr=.01), epochs=1, defaults=[],
                                          callbacks=[Monitor(["update_norm", "distance_from_init"], epochs=1), *more, Checkpoint(folder, 1e9)])
    whole = build(tmp_path/"a").fit()
    assert whole.at.step == 20
    with pytest.raises(KeyboardInterrupt): build(tmp_path/"b", Stop()).fit()
    again = build(tmp_path/"b"); again.load_state_dict(load_checkpoint(tmp_path/"b")); again.fit()
    late = lambda l: l.records.query("step == 20").reset_index(drop=True)
    assert late(again).equals(late(whole)) and len(late(whole)) == 8


# ---- when, and in which state ----
@pytest.mark.parametrize("how, twice", [(dict(head_reset="zero"), True), (dict(head_reset="reinit"), True), (dict(reset=True), True), ({}, False)])
def test_before_and_after_a_reset(how, twice):
    monitor = Monitor(["weight_norm"], epochs=2, layers=["out", "default"]); learner = fit(monitor, Monitor(["dead_fraction"], layers=["out"], epochs=2), stream=ClassSplit, **how)
    start = learner.records.query("epoch == 0")
    before = start[start.metric.str.endswith("_before_reset")]
    assert set(before.task) == ({1} if twice else set())
    if how.get("head_reset") == "zero":
        dead = start.query("layer == 'out' and task == 1").groupby("metric").value.mean()
        assert dead.dead_fraction_before_reset == 0                                       # logits that speak
        assert dead.dead_fraction == 1                                                    # weights and biases are zero
    if how.get("reset"):
        norm = start.query("layer == 'act_0' and task == 1").groupby("metric").value.mean()
        fresh = Replicas(SMALL, [0, 1]); fresh.reset(1)
        assert norm.weight_norm == pytest.approx(metrics.weight_norm(incoming(fresh.params, fresh.graph["act_0"])).mean().item(), rel=1e-5)
        assert norm.weight_norm_before_reset != pytest.approx(norm.weight_norm, rel=1e-3)

def test_it_looks_at_ends_alone_unless_asked():
    when = lambda **k: sorted(set(map(tuple, fit(Monitor(["dead_fraction"], **k), epochs=3, tasks=3).records.query("metric == 'dead_fraction'")[["task", "epoch"]].to_numpy().tolist())))
    assert when() == [(0, 3), (1, 3), (2, 3)] and when(every=2) == [(0, 3), (2, 3)]
    assert when(epochs=2, every=2) == [(t, e) for t in (0, 2) for e in (0, 2, 3)]


# ---- other tasks ----
def test_other_tasks_are_evaluated_as_their_own():
    learner = fit(OtherTasks("all"), stream=ClassSplit, tasks=3, epochs=1)
    A = accuracy_matrix(learner.records)
    for j in range(3):
        task = learner.stream[j]
        np.testing.assert_array_equal(A[:, 2, j], evaluate(learner.replicas, task, task.test)["accuracy"].double().numpy())
    fresh = Replicas(SMALL, [0, 1])
    np.testing.assert_array_equal(initial_accuracy(learner.records)[:, 1], evaluate(fresh, learner.stream[1], learner.stream[1].test)["accuracy"].double().numpy())
    assert set(learner.records.query("metric == 'other_loss'").split) == {"test/0", "test/1", "test/2"}

def test_the_tangent_kernel_in_a_study():
    "on as many examples as were asked for, of the split and at the moments of the other measures; of labels that are numbers there is no alignment"
    learner = plan(compose(["metrics.kernel_size=20", "metrics.probe_split=test", "training.replicas=2", "stream.tasks=2", "training.epochs=1"]))[1][0].fit()
    rows = learner.records.query("metric == 'ntk_effective_rank'"); assert len(rows) == 4 and set(rows.split) == {"test"}
    look, = (c for c in learner.callbacks if isinstance(c, TangentKernel)); x, y = look.examples(learner.task); assert x.shape[:2] == (2, 20) and (y.bincount() if y.ndim == 1 else y[0].bincount()).unique().tolist() == [2]
    np.testing.assert_allclose(rows.query("task == 1").value, kernel_effective_rank(kernel(learner.replicas, x)).numpy(), rtol=1e-6)
    assert not any(isinstance(c, TangentKernel) for c in make_callbacks(compose([]), "backprop"))
    with pytest.raises(LopError, match="metrics.kernel_size"): compose(["metrics.kernel_size=-1"])
    bits = plan(compose(["+experiment=bit-flipping", "metrics.kernel_size=5", "stream.tasks=2", "training.replicas=2"]))[1][0].fit()
    assert {m for m in bits.records.metric if m.startswith("ntk_")} == {"ntk_trace", "ntk_condition", "ntk_effective_rank"}

def test_other_tasks_in_a_study():
    learner = plan(compose(["metrics.other_tasks=past", "training.replicas=1"]))[1][0]
    assert [c.which for c in learner.callbacks if isinstance(c, OtherTasks)] == ["past"]
    assert not any(isinstance(c, OtherTasks) for c in make_callbacks(compose([]), "backprop"))
    with pytest.raises(LopError, match="metrics.other_tasks=none"): compose(["stream=random_labels", "metrics.other_tasks=past"], verify)
    with pytest.raises(LopError, match="no test examples"): fit(OtherTasks(), stream=RandomLabels)


# ---- what it is asked ----
@pytest.mark.parametrize("words, says", [
    (["metrics.names=[dead_fractoin]"], "Did you mean 'dead_fraction'?"), (["metrics.names=[all,nothing]"], "Unknown metric 'nothing'"), (["metrics.layers=[act_9]"], "act_9"),
    (["metrics.other_tasks=some"], "Choices: none, past, all"), (["metrics.histogram_edges=[0]"], "metrics.histogram_edges"), (["metrics.histogram_edges=[1,0.5]"], "ascending")])
def test_bad_words_are_refused_before_data_are_read(words, says, monkeypatch):
    monkeypatch.setattr("lop_nb.experiments.load", lambda *a, **k: pytest.fail("data were read"))
    with pytest.raises(LopError) as e: compose(words, verify)
    assert says in str(e.value)

def test_settings_reach_the_functions():
    cfg = compose(["metrics.names=[all]", "metrics.saturation_threshold=0.5", "metrics.saturation_percentage=0.7", "metrics.gaussianity_method=ks", "metrics.log_activation_histograms=true", "metrics.corr_threshold=0.6"])
    (monitor,) = [c for c in make_callbacks(cfg, "backprop") if isinstance(c, Monitor)]
    s = monitor.settings
    assert (s.gradient_ratio, s.saturated_threshold, s.normality, monitor.histograms, s.duplicate_threshold) == (.5, .7, "ks", True, .6)
    assert monitor.names == list(metrics.known) and Monitor().settings == MetricsConfig()

def test_presets_of_layers():
    model = lambda words: (lambda cfg: select(plan(cfg)[1][0].replicas.modules[0], cfg.metrics.layers))(compose([*words, "training.replicas=1", "intervention=backprop"]))
    everything = model(["metrics=all"])
    assert model([]) == ["act_0", "act_1", "act_2"] and {"linear_0", "act_2", "out"} <= set(everything)
    assert model(["metrics=block_outputs", "model=resnet", "model.layers=[1,1]"]) == ["layer1_block0", "layer2_block0"]

def test_a_probe_of_numbers_takes_the_first_rows():
    assert balanced(torch.rand(2, 9), 4, torch.ones(2, 9, dtype=bool)).tolist() == [[0, 1, 2, 3]]*2

def test_the_probe_is_chosen_anew_where_labels_or_rows_that_count_change():
    "and else not; the choice is always `balanced`'s"
    monitor, y = Monitor(probe_size=6), torch.arange(12).remainder(3).expand(2, -1); valid = torch.ones_like(y, dtype=torch.bool)
    first = monitor.choice(y, valid)
    assert monitor.choice(y.clone(), valid.clone()) is first
    for other in ((y.flip(1), valid), (y, valid & (torch.arange(12) > 3)), (y.float(), valid), (y[:1], valid[:1]), (y, valid)):
        got = monitor.choice(*other)
        assert got is not first and torch.equal(got, balanced(other[0], 6, other[1]))
