"Rows A71, A89, A90 and B25 to B28 of the sources: their figures, from records."
from functools import partial

import numpy as np, pandas as pd, pytest

from lop_nb import figures
from lop_nb.config import Adam
from lop_nb.data import load
from lop_nb.learner import Learner
from lop_nb.models import MLP
from lop_nb.monitor import Monitor, OtherTasks
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels


@pytest.fixture(scope="module")
def df():
    data, make = load("digits", examples_per_class=20), partial(MLP, 64, 10, hidden_sizes=[12]*2, normalization="none", dropout_p=0.)
    looks = [Monitor(["dead_fraction", "duplicate_fraction", "effective_rank"], epochs=2, probe_size=50, histograms=True), OtherTasks("all")]
    return Learner(Replicas(make, range(2)), PermutedPixels(data, tasks=3), Adam(lr=.01), epochs=4, callbacks=looks, run="backprop").fit().records


def made_up(tasks=11, apart=50, **lines):
    "Records of two seeds whose values are functions (run or metric: f(task)), at tasks 0, 50, …"
    return pd.concat([pd.DataFrame([dict(run="a", replica=s, seed=s, task=t, epoch=1, step=100*t, examples=3200*t, split="test", layer="", value=f(t)) for s in (0, 1) for t in range(0, tasks*apart, apart)]).assign(**k)
                      for k, f in lines["rows"]])


def saved(fig, tmp_path):
    path = fig.save(tmp_path/"figure.png", dpi=60)
    return pd.read_csv(path.with_suffix(".csv"))


def test_A71_forgetting_and_transitions(df, tmp_path):
    "the accuracy matrix, the forgetting curve with backward transfer beside it, and accuracy across the tasks' borders"
    A = saved(figures.accuracy_matrix(df), tmp_path); assert len(A) == 9 and A["mean"].between(0, 1).all()
    fig = figures.forgetting(df); kept = saved(fig, tmp_path); assert kept.lag.tolist() == [0, 1, 2] and kept.since.is_monotonic_increasing
    assert set(pd.read_csv(tmp_path/"figure_outcomes.csv").outcome) == {"backward_transfer", "forgetting"}
    across = saved(figures.task_transitions(df), tmp_path); assert len(across) == 3 * 5 and across.step.nunique() == 13   # a border is one step, seen from both sides


def test_A89_histories_on_true_axes(df):
    "history of all measures, bars by layer, layers over time, activations; measured at epochs 0, 2 and 4 and drawn at the gradient steps where those were"
    steps = sorted(df.query("metric == 'dead_fraction'").step.unique())
    history = figures.metrics_history(df)
    assert [ax.get_title() for ax in history.axes] == ["dead fraction", "duplicate fraction", "effective rank"]
    assert sorted(set(history.axes[0].lines[0].get_xdata())) == steps and history.axes[0].get_xlabel() == "gradient steps"
    bars = figures.layer_metrics(df).axes[0]; assert [t.get_text() for t in bars.get_xticklabels()] == ["act_0", "act_1"]
    over = figures.layer_metrics_over_time(df, ["effective_rank"]).axes[0]
    assert [line.get_label() for line in over.lines] == ["act_0", "act_1"] and sorted(set(over.lines[1].get_xdata())) == steps
    assert len(figures.activations(df).axes) == 2 * 2 + 1                                   # two layers, means and deviations, the scale


@pytest.mark.parametrize("name, panels", [("plasticity", 3), ("rank_and_dead", 1), ("by_layer", 6)])
def test_A90_figures_of_the_paper_from_a_run(df, name, panels, tmp_path):
    "dead and duplicate units with online accuracy against steps; rank against dead units; layer by layer"
    fig = figures.draw(df, name)
    assert len(fig.axes) == panels and saved(fig, tmp_path)[["dead_mean", "rank_mean"] if name == "rank_and_dead" else ["mean"]].notna().all(axis=None)


def test_A90_figures_of_the_paper_from_studies(tmp_path):
    "bars over normalisations; cloning's R², loss and rank; sweeps over σ and λ; optimizers; slowly-changing regression over examples and over widths: from records with the columns that say which"
    m = lambda metric, f, **k: (dict(metric=metric, **k), f)
    t = saved(figures.normalizations(made_up(rows=[m("dead_fraction", lambda t: .7, normalization="none"), m("dead_fraction", lambda t: .3, normalization="batch")])), tmp_path)
    assert dict(zip(t.normalization, t["mean"])) == pytest.approx(dict(none=.7, batch=.3))
    t = saved(figures.cloning(made_up(rows=[m("cloning_r2", lambda t: 1 - t/1000), m("train_loss", lambda t: .2), m("base_train_loss", lambda t: .7), m("effective_rank", lambda t: 80.), m("base_effective_rank", lambda t: 60.)])), tmp_path)
    assert t.query("task == 500").set_index(["metric", "run"])["mean"].to_dict() == pytest.approx({("cloning_r2", "a"): .5, ("train_loss", "a"): .2, ("train_loss", "a base"): .7, ("effective_rank", "a"): 80, ("effective_rank", "a base"): 60})
    t = saved(figures.noise_sweep(made_up(rows=[m("train_loss", lambda t, s=s, d=d: s + d, noise_scale=s, noise_decay=d, run=f"{s}{d}") for s in (.01, .05) for d in (0., 1.)])), tmp_path)
    assert dict(zip(zip(t.noise_scale, t.noise_decay), t["mean"])) == pytest.approx({(f"σ = {s}", d): s + d for s in (.01, .05) for d in (0., 1.)})
    fig = figures.optimizers(made_up(rows=[m("cloning_r2", lambda t: 1., optimizer="sgd"), m("cloning_r2", lambda t: .9, optimizer="adam")]))
    assert {line.get_label(): line.get_ydata()[0] for line in fig.axes[0].lines} == pytest.approx(dict(sgd=1, adam=.9))
    bits = made_up(rows=[m(k, lambda t, v=v, w=w: v + w + (t < 500), width=w, run=f"{w}/bp") for k, v in (("train_loss", .5), ("effective_rank", 3.)) for w in (5, 50)])
    t = saved(figures.widths(bits), tmp_path).set_index(["metric", "width"])["mean"]
    assert t["train_loss", 50] == pytest.approx(50.5) and t["effective_rank", 5] == pytest.approx(8)
    assert figures.bit_flips(bits).axes[0].lines[0].get_xdata()[1] == 3200 * 50


def tickets(metric="ticket_overlap"):
    return made_up(rows=[*((dict(metric=metric, density=d), lambda t, d=d: 15 + 100*d + t/10 + 5*np.sin(t)) for d in (.05, .1, .2)), (dict(metric="test_accuracy"), lambda t: .95 - t/5000 - .01*np.sin(t))])


def test_B25_overlap_and_accuracy(tmp_path):
    "from records, here made up: overlap at three sparsities with test accuracy, raw and differenced, and Pearson's correlations of both as CSV"
    fig = figures.ticket_overlap(tickets()); t = saved(fig, tmp_path)
    assert t.line.nunique() == 4 and [len(ax.lines) for ax in fig.axes] == [3, 1, 3, 1]
    c = pd.read_csv(tmp_path/"figure_correlations.csv")
    assert len(c) == 6 and set(c.series) == {"raw", "differenced"} and (c.estimate < -.5).all()
    x, y = (np.array([f(t) for t in range(0, 550, 50)]) for f in (lambda t: t/10 + 5*np.sin(t), lambda t: -t/5000 - .01*np.sin(t)))
    assert c.query("series == 'differenced'").estimate.to_numpy() == pytest.approx(np.corrcoef(np.diff(x), np.diff(y))[0, 1])


def test_B26_smoothed_accuracy():
    "from records, here made up: moving average over 21 tasks with one standard deviation, of test accuracy when the axis says so"
    df = made_up(60, 1, rows=[(dict(metric="test_accuracy"), lambda t: float(t)), (dict(metric="train_accuracy"), lambda t: -1.)])
    fig = figures.smoothed_accuracy(df, window=20); line = fig.axes[0].lines[0]
    assert fig.axes[0].get_ylabel() == "test accuracy" and line.get_ydata()[30] == pytest.approx(30) and line.get_ydata()[0] == pytest.approx(np.mean([max(0, k) for k in range(-10, 11)]))
    assert fig.numbers["std"].iloc[30] == pytest.approx(np.std(np.arange(21)))


def test_B27_tickets_random_masks_and_the_full_network(tmp_path):
    "from records, here made up: mean test accuracy of the three; what is drawn at task 0 is task 0"
    level = dict(full=.95, ticket=.9, random=.8)
    df = made_up(rows=[(dict(metric="test_accuracy", run=r), lambda t, v=v: v - t/1000) for r, v in level.items()])
    fig = figures.ticket_accuracy(df); t = saved(fig, tmp_path)
    assert dict(zip(t[t.task == 0].run, t[t.task == 0]["mean"])) == pytest.approx(level)
    assert {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in fig.axes[0].lines} == {k: (0, pytest.approx(v)) for k, v in level.items()}


def test_B28_parameter_overlap_and_the_first_100_tasks():
    "from records, here made up: overlap of tickets with the most plastic parameters against the task; a ticket beside the full network over the first 100 tasks"
    fig = figures.parameter_overlap(tickets("parameter_overlap"))
    assert [line.get_label() for line in fig.axes[0].lines] == ["0.05", "0.1", "0.2"] and fig.axes[0].lines[1].get_ydata()[0] == pytest.approx(25)
    df = made_up(150, 1, rows=[(dict(metric="test_accuracy", run=r), lambda t: .9) for r in ("full", "ticket")])
    assert figures.tickets_along(df).numbers.task.max() == 99
