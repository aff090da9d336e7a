"Figures show the numbers of the records, on true axes, and say what they lack."
import json, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest
from matplotlib.colors import to_rgb

from lop_nb import figures, outcomes, plots
from lop_nb.compose import compose
from lop_nb.config import Adam
from lop_nb.data import load
from lop_nb.experiments import run_study
from lop_nb.interventions import L2Init
from lop_nb.learner import Learner
from lop_nb.models import MLP
from lop_nb.monitor import Monitor, OtherTasks
from lop_nb.plots import Picture, interval, over_time, pick
from lop_nb.records import Records, read_records
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import PermutedPixels

TODAY = ["accuracy_matrix", "forgetting", "task_transitions", "learning_curves", "metrics_history", "layer_metrics", "layer_metrics_over_time", "activations", "plasticity", "rank_and_dead",
         "by_layer", "smoothed_accuracy", "ticket_accuracy", "tickets_along", "bit_flips"]          # those that a run of today feeds


def made_up(**k):
    "Records: every combination of the lists; `value` is a function of a row"
    keys = [c for c in k if c != "value"]; each = pd.MultiIndex.from_product([k[c] if isinstance(k[c], list) else [k[c]] for c in keys], names=keys).to_frame(index=False)
    base = dict(replica=0, run="a", seed=0, task=0, epoch=1, examples=0, split="train", layer="")
    each = each.assign(**{c: v for c, v in base.items() if c not in keys}); each["step"] = 10*(each.task + 1)
    return each.assign(value=[float(k["value"](r)) for r in each.itertuples()])


@pytest.fixture(scope="module")
def df():
    data, make, store = load("digits", examples_per_class=20), partial(MLP, 64, 10, hidden_sizes=[16]*2, normalization="none", dropout_p=0.), Records()
    for run, more in dict(backprop=[], l2_init=[L2Init()]).items():
        monitor = Monitor(["dead_fraction", "duplicate_fraction", "effective_rank"], epochs=1, probe_size=50, histograms=True)
        Learner(Replicas(make, range(3)), PermutedPixels(data, tasks=4), Adam(lr=.01), epochs=2, callbacks=[monitor, OtherTasks("all"), *more], store=store, run=run).fit()
    return store.frame()


# ---- all of them ----
@pytest.mark.parametrize("name", TODAY)
def test_it_draws_a_run_of_today_and_saves_its_numbers(df, name, tmp_path):
    fig = figures.draw(df, name); path = fig.save(tmp_path/f"{name}.png", dpi=60)
    assert isinstance(fig, Picture) and path.stat().st_size > 2000
    saved = pd.read_csv(path.with_suffix(".csv"))
    assert len(saved) == len(fig.numbers) > 0 and list(saved.columns) == list(fig.numbers.columns)
    assert all(t.get_fontsize() >= 7 for ax in fig.axes for t in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()])       # legible at its size in print

@pytest.mark.parametrize("name", TODAY)
def test_it_says_what_it_lacks(df, name):
    with pytest.raises(LopError, match="(have no|hold no|lack)"): figures.draw(df[df.metric == "online_loss"], name)

def test_names_are_known():
    assert set(TODAY) < set(figures.known) and all(f.__doc__ and n in figures.describe_figures() for n, f in figures.known.items())
    with pytest.raises(LopError, match="Did you mean 'rank_and_dead'.*accuracy_matrix"): figures.draw(made_up(metric="x", value=lambda r: 0), "rank_an_dead")

@pytest.mark.parametrize("name", ["normalizations", "optimizers", "widths", "noise_sweep", "ticket_overlap", "parameter_overlap"])
def test_a_column_that_is_lacking_is_named(df, name):
    metric = dict(ticket_overlap="ticket_overlap", parameter_overlap="parameter_overlap", noise_sweep="train_loss").get(name, "effective_rank")
    with pytest.raises(LopError, match="no column (normalization|optimizer|width|noise_scale, noise_decay|density)"): figures.draw(df.assign(metric=metric), name)


# ---- their numbers, by other ways ----
def test_lines_are_means_and_students_intervals(df):
    fig = figures.plasticity(df)
    rows = df.query("run == 'l2_init' and metric == 'dead_fraction' and task == 2 and epoch == 2")
    each = rows.groupby("seed").value.mean()                                              # over layers first
    t = fig.numbers.query("run == 'l2_init' and metric == 'dead_fraction' and task == 2").iloc[0]
    assert (t["mean"], t.half, t.n, t.step) == pytest.approx((each.mean(), 4.302653 * each.std() / 3**.5, 3, rows.step.iloc[0]))
    line = fig.axes[0].lines[1]
    assert line.get_label() == "l2_init" and line.get_ydata()[2] == t["mean"] and line.get_xdata()[2] == t.step

def test_the_axis_is_steps_or_examples(df):
    for x in ("step", "examples"):
        drawn = plots.plot_metric(df, "effective_rank", x).axes[0]
        assert drawn.lines[0].get_xdata().tolist() == sorted(df.query("metric == 'effective_rank' and epoch == 2")[x].unique()) and drawn.get_xlabel() == dict(step="gradient steps", examples="examples")[x]
    assert figures.bit_flips(df).axes[0].get_xlabel() == "examples"
    with pytest.raises(LopError, match="Choices: step, examples, task"): plots.plot_metric(df, "effective_rank", "epochs")

def test_replicas_that_stop_early_stand_at_their_mean_step():
    rows = made_up(metric="m", seed=[0, 1], value=lambda r: r.seed).assign(step=[10, 30])
    t = over_time(rows).iloc[0]
    assert (t["mean"], t.step) == (.5, 20)

def test_the_forgetting_curve(df):
    t = figures.forgetting(df).numbers
    for run, r in df.groupby("run"):
        A = outcomes.accuracy_matrix(r)
        for lag in range(4): assert t.query("run == @run and lag == @lag")["mean"].item() == pytest.approx(np.mean([A[:, j + lag, j] for j in range(4 - lag)]))
    more = figures.forgetting(df).more["outcomes"].set_index(["run", "outcome"]).estimate
    assert more["backprop", "forgetting"] == pytest.approx(outcomes.forgetting(outcomes.accuracy_matrix(df[df.run == "backprop"])).mean())

def test_histograms_fill_their_columns(df):
    t = figures.activations(df).numbers
    whole = t.groupby(["run", "layer", "of", "task", "epoch"])["mean"].sum()
    assert whole.to_numpy() == pytest.approx(1) and len(whole) == 2 * 2 * 2 * 4 * 3
    mesh = figures.activations(df).axes[0].collections[0]; edges = mesh.get_coordinates()[0, :, 0]
    assert edges[:-1].tolist() == df.query("metric.str.startswith('act_means') and run == 'backprop'").drop_duplicates(["task", "epoch"]).step.tolist()

def test_colours_go_with_runs_not_with_places(df):
    rows = df[~((df.run == "backprop") & (df.metric == "dead_fraction"))]                 # the first run lacks the first metric
    a, b, *_ = plots.plot_overview(rows).axes[-2:]
    colour = lambda ax: {line.get_label(): line.get_color() for line in ax.lines}
    assert colour(a)["l2_init"] == colour(b)["l2_init"] and set(colour(a)) == {"l2_init"}

def test_no_two_lines_look_alike_in_grey():
    "neighbours in the order of drawing differ in dash; the first four colours differ in lightness or dash"
    assert all(plots.style(i)["linestyle"] != plots.style(i + 1)["linestyle"] for i in range(12))
    grey = [np.dot(to_rgb(c), [.2126, .7152, .0722]) for c in plots.palette]
    assert max(grey) < .8                                                                 # none is lost on white

def test_bars_and_settings():
    t = figures.normalizations(made_up(metric="dead_fraction", normalization=["none", "layer"], dropout_p=[0., .1], seed=[0, 1], task=[0, 1], layer=["a", "b"],
                                       value=lambda r: (r.normalization == "none") + .1*r.dropout_p + r.task + 4*(r.layer == "b"))).numbers.set_index(["normalization", "kind"])["mean"]
    assert t["none", "dropout 0.0"] == pytest.approx(3.5) and t["layer", "dropout 0.1"] == pytest.approx(2.51) and len(t) == 4

@pytest.mark.parametrize("T, window", [(40, 21), (40, 20), (5, 21), (1, 21)])
def test_smoothing_as_a_loop(T, window):
    v, half = np.random.default_rng(0).random(T), window // 2
    mean, std = figures.smooth(v, window)
    for t in range(T):
        seen = [v[min(max(k, 0), T - 1)] for k in range(t - half, t + half + 1)]
        assert (mean[t], std[t]) == pytest.approx((np.mean(seen), np.std(seen)), abs=1e-12) and len(seen) == 2*half + 1

def test_correlations_of_series_and_of_their_steps():
    rng = np.random.default_rng(0); a, b = rng.normal(size=(2, 2, 12))
    rows = pd.concat([made_up(metric="ticket_overlap", density=.05, seed=[0, 1], task=list(range(12)), value=lambda r: a[r.seed, r.task] + r.task), made_up(metric="test_accuracy", seed=[0, 1], task=list(range(12)), value=lambda r: b[r.seed, r.task] + r.task)])
    t = figures.ticket_overlap(rows).more["correlations"].set_index("series")
    o, c = a.mean(0) + np.arange(12), b.mean(0) + np.arange(12)
    assert t.estimate["raw"] == pytest.approx(np.corrcoef(o, c)[0, 1]) and t.estimate["differenced"] == pytest.approx(np.corrcoef(np.diff(o), np.diff(c))[0, 1])
    assert t.tasks.to_dict() == dict(raw=12, differenced=11) and t.estimate["raw"] > .9


# ---- runs on the disk ----
@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep"); words = ["stream.tasks=2", "training.epochs=1", "training.replicas=2", "intervention=backprop", "dataset.examples_per_class=10", "metrics.other_tasks=all", "metrics.histograms=true"]
    for i, norm in enumerate(("none", "layer")): run_study(compose([*words, f"model.normalization={norm}", "logging.progress=false"]), folder/str(i))
    return folder

def test_a_run_leaves_pictures_and_numbers(sweep):
    names = {p.stem for p in (sweep/"0"/"figures").glob("*.png")}
    assert {"overview", "dead_fraction", "accuracy_matrix", "forgetting", "activations"} <= names and not any(n.startswith(("other_", "act_", "val_")) for n in names)
    assert names <= {p.stem for p in (sweep/"0"/"figures").glob("*.csv")}
    found = json.loads((sweep/"0"/"summary.json").read_text())["outcomes"]["backprop"]
    assert {r["outcome"] for r in found} == {"average_online_accuracy", "learning_speed", "final_average", "backward_transfer", "forgetting", "forward_transfer"} and all(r["low"] <= r["estimate"] <= r["high"] for r in found)

def test_settings_come_from_the_runs_configs(sweep):
    df = figures.with_settings(read_records(sweep), [sweep])
    assert df.groupby("run").normalization.unique().apply(list).to_dict() == {"0/backprop": ["none"], "1/backprop": ["layer"]} and set(df.width) == {64} and set(df.optimizer) == {"adam"}
    t = figures.normalizations(df).numbers.query("metric == 'online_accuracy'").set_index("normalization")["mean"]
    assert t["layer"] == pytest.approx(df.query("run == '1/backprop' and metric == 'online_accuracy'").value.mean())

def test_the_command_draws_one_figure(sweep, tmp_path):
    show = lambda *words: subprocess.run([Path(sys.executable).parent/"lop-show", *map(str, words)], capture_output=True, text=True, timeout=120)
    done = show("--figure", "normalizations", "--figure", "rank_and_dead", sweep, "--figures", tmp_path)
    assert done.returncode == 0 and {p.name for p in tmp_path.iterdir()} == {f"{n}.{k}" for n in ("normalizations", "rank_and_dead") for k in ("png", "csv")}, done.stderr
    bad = show("--figure", "forgeting", "nowhere")
    assert bad.returncode == 2 and "Did you mean 'forgetting'?" in bad.stderr and "rank_and_dead" in bad.stderr and "Traceback" not in bad.stderr
    shown = show("--help").stdout
    assert all(n in shown for n in figures.known)
