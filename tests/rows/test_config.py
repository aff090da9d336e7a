"""Rows A1 to A10, A13 and B1 to B7 of the sources: configuration and commands.

Each test is named for its row in the table on the page "sources", and its docstring says what the row asks for.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from lop_nb.compose import aliases, compose, expand, studies
from lop_nb.config import options, presets, ticket_stages
from lop_nb.experiments import load_run, run_study
from lop_nb.models import MLP
from lop_nb.pipeline import verify_tickets
from lop_nb.records import read_records
from lop_nb.runtime import LopError

BIN = Path(sys.executable).parent
TINY = ["stream.tasks=2", "training.epochs=1", "training.replicas=1", "logging.figures=false", "intervention=backprop"]


def lop_run(*words, **env):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(WANDB_MODE="disabled", OMP_NUM_THREADS="1") | env
    return subprocess.run([BIN/"lop-run", *map(str, words)], capture_output=True, text=True, timeout=300, env=env)


def refused(*words):
    with pytest.raises(LopError) as e: compose(words)
    return str(e.value)


def test_A1_one_command_composes_all_groups():
    "`lop-run --cfg job` prints a config with every group, and the documented default study is the real one"
    shown = OmegaConf.create(lop_run("--cfg", "job").stdout)
    assert set(options()) | {"resume", "dryrun"} == set(shown)
    assert (shown.model.name, shown.dataset.name, shown.stream.name, shown.training.replicas, list(shown.intervention.arms)) == ("mlp", "digits", "permuted_pixels", 3, ["backprop", "continual_backprop", "l2_init"])
    assert "permuted digits, three arms" in lop_run("--help").stdout


def test_A2_the_keys_at_the_top_level():
    "`use_wandb`, `wandb_project`, `wandb_tags`, `dryrun` at the top, entity, run name and summary under logging: settable, and in the composed config"
    cfg = compose(["use_wandb=true", "wandb_project=x", "wandb_tags=[a,b]", "dryrun=true", "logging.summary=false", "logging.wandb_entity=me", "logging.wandb_run_name=one"])
    log = cfg.logging
    assert (log.wandb, log.wandb_project, list(log.wandb_tags), cfg.dryrun, log.summary, log.wandb_entity, log.wandb_run_name) == (True, "x", ["a", "b"], True, False, "me", "one")


@pytest.mark.parametrize("key, ours, value", [(k, v, x) for k, v in aliases.items() for x in [dict(
    dataset="mnist", optimizer="sgd").get(v) or {"tickets.tasks": "[0,1]", "tickets.targets": "[0.5]", "tickets.rounds": "[2]", "tickets.aggregate": "union"}.get(v) or {"wandb": "true", "wandb_project": "x", "wandb_tags": "[a]", "partitions": "[[0,1],[2,3]]", "layers": "[out]", "lr": "0.5", "duplicate_threshold": "0.5", "saturated_threshold": "0.5", "normality": "ks", "histograms": "true", "beta": ".5", "replacement_rate": ".5", "decay": ".5"}.get(v.rpartition(".")[2], "2")]])
def test_A3_spellings_of_the_readme(key, ours, value):
    "every spelling of the sources' READMEs and configuration files is the same setting as ours"
    assert compose([f"{key}={value}"]) == compose([*expand([f"{key}={value}"])[:-1], f"{ours}={value}"])


def test_A4_a_dry_run_trains_nothing(tmp_path):
    "`dryrun=true` builds data and networks, exits with 0, and leaves no folder, no checkpoint and no open W&B run"
    done = lop_run("dryrun=true", "logging.wandb=true", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0 and "Nothing was trained" in done.stdout and not (tmp_path/"run").exists()


def test_A5_a_run_has_a_dated_folder_with_its_config(tmp_path):
    "a run without a folder of its own goes to outputs/date/time, with the whole resolved config in it"
    done = subprocess.run([BIN/"lop-run", *TINY], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    (file,) = tmp_path.glob("outputs/*-*-*/*-*-*/config.yaml")
    assert done.returncode == 0 and OmegaConf.load(file) == compose(TINY)


def test_A6_a_sweep_has_a_folder_a_run_and_one_table(tmp_path):
    "`--multirun optimizer.lr=… model=mlp,cnn` makes 6 runs in 6 folders and one summary table"
    done = lop_run("--multirun", "optimizer.lr=0.001,0.01,0.1", "model=mlp,cnn", "model.normalization=none", "dataset.examples_per_class=10", *TINY, f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path/"sweep").glob("*/config.yaml"))) == 6
    assert pd.read_csv(tmp_path/"sweep"/"summary.csv").run.nunique() == 6 and "summary.csv" in done.stdout


@pytest.mark.parametrize("name", ["mlp_mnist", "cnn_cifar10", "resnet_cifar10", "vit_cifar10"])
def test_A7_presets_reach_the_network(name):
    "the presets' settings appear in the config and in the network that is built from it"
    from lop_nb.experiments import make_network
    from lop_nb.config import sizes
    cfg = compose([f"+experiment={name}"]); c, side, classes = sizes[cfg.dataset.name]
    net = make_network(cfg, (c, side, side), classes)
    assert cfg.model.name == name.split("_")[0] and cfg.dataset.name == name.split("_")[1] and cfg.training.batch_size == (64 if name == "mlp_mnist" else 128)
    if name == "mlp_mnist": assert [m.out_features for m in net.children() if isinstance(m, torch.nn.Linear)] == [256, 128, 64, 10] and cfg.optimizer.lr == .002
    if name == "cnn_cifar10": assert (net.conv_2.out_channels, net.fc_0.out_features) == (128, 256)
    assert {"mlp_mnist", "cnn_cifar10", "resnet_cifar10", "vit_cifar10"} <= presets().keys()


def test_A8_types_are_checked():
    "a value of the wrong type is refused, naming key and value"
    assert "training.batch_size=abc" in refused("training.batch_size=abc")
    assert "model.hidden_sizes" in refused("model.hidden_sizes=[a]")


def test_A10_one_seed_gives_one_result(tmp_path):
    "two runs with one seed have bit-identical records on a processor; another seed has others"
    runs = [read_records(run_study(compose([*TINY, f"training.seed={seed}", "logging.progress=false"]), tmp_path/name)) for name, seed in (("a", 42), ("b", 42), ("c", 7))]
    pd.testing.assert_frame_equal(runs[0], runs[1], check_exact=True)
    assert not runs[0].value.equals(runs[2].value) and compose().training.seed == 42


@pytest.mark.parametrize("name, shown", dict(mnist=(784, 28, 1, 10), cifar10=(3072, 32, 3, 10), cifar100=(3072, 32, 3, 100), tiny_imagenet=(12288, 64, 3, 200)).items())
def test_A21_sizes_in_the_config(name, shown):
    "`lop-run dataset=X --cfg job` shows inputs, side, colours and classes"
    d = compose([f"dataset={name}"]).dataset
    assert (d.input_size, d.img_size, d.in_channels, d.num_classes) == shown and compose([f"dataset={name.replace('_', '-')}"]).dataset == d


def test_A43_the_history_is_on_disk(tmp_path):
    "losses, accuracies and measures of every task and epoch stand in the run's folder, as Parquet and JSON"
    df = pd.read_parquet(run_study(compose([*TINY, "training.epochs=2", "metrics.epochs=1"]), tmp_path/"run")/"records.parquet")
    assert df[df.metric == "val_loss"].groupby("task").epoch.apply(list).tolist() == [[0, 1, 2]]*2
    assert set(df[df.layer != ""].metric) >= {"dead_fraction", "effective_rank"} and df[df.layer != ""].groupby("task").epoch.apply(set).tolist() == [{0, 1, 2}]*2
    assert json.loads((tmp_path/"run"/"summary.json").read_text())["finished"]


def test_A44_every_network_can_be_loaded_again(tmp_path):
    "the networks of all arms and replicas, and those of each task when asked for, come back with one call"
    words = ["stream.tasks=2", "training.epochs=1", "training.replicas=2", "logging.figures=false", "logging.snapshot_tasks=1"]
    run = load_run(run_study(compose(words), tmp_path/"run"))
    assert {arm: [type(m) for m in ms] for arm, ms in run.models.items()} == {arm: [MLP]*2 for arm in ("backprop", "continual_backprop", "l2_init")}
    for arm in run.models:
        assert torch.equal(run.snapshot(arm, 1, "end").params["out.weight"], run.replicas[arm].params["out.weight"])
        assert not torch.equal(run.snapshot(arm, 0, "start").params["out.weight"], run.replicas[arm].params["out.weight"])
    assert torch.equal(run.snapshot("backprop", 0, "start").params["out.weight"], run.snapshot("l2_init", 0, "start").params["out.weight"])


def test_A68_the_helper_scripts(tmp_path):
    "checking imports and extracting notebooks are one line each, with tools that the dev extras bring"
    def call(*words): return subprocess.run([BIN/words[0], *map(str, words[1:])], capture_output=True, text=True, cwd=tmp_path)
    (tmp_path/"good.py").write_text("import os\nprint(os.name)\n")
    assert call("ruff", "check", "--select", "F", ".").returncode == 0
    (tmp_path/"bad.py").write_text("import os\nprint(sys.argv)\n")
    done = call("ruff", "check", "--select", "F", ".")
    assert done.returncode == 1 and "sys" in done.stdout and "os" in done.stdout
    text = call("jupytext", "--to", "py:percent", "--output", "-", Path(__file__).parents[2]/"nbs"/"api"/"01_runtime.ipynb").stdout
    assert "class LopError" in text and "# # runtime" in text


def test_B1_the_study_is_chosen_by_name():
    "source B's seven names (`lop-run winning_tickets_masks`) and ours (`+experiment=tickets/masks`) choose the same study, the overlap too; help touches no data"
    for name, ours in studies.items(): assert compose([name]) == compose([f"+experiment={ours}"]), name
    assert set(studies.values()) | {"tickets/all"} == {p for p in presets() if p.startswith("tickets/")}
    assert compose(["+experiment=tickets/lop"]).stream.tasks == 500
    assert lop_run("--help", LOP_DATA="/dev/null").returncode == 0


def test_B2_general_settings():
    "seed, data set, epochs, batch size, learning rate and optimizer are settable where source B had them; run number and criterion say where they went"
    cfg = compose(["general.seed=1", "general.dataset=mnist", "general.num_epochs=10", "general.batch_size=32", "general.lr=0.5", "general.optimizer=sgd"])
    assert (cfg.training.seed, cfg.dataset.name, cfg.training.epochs, cfg.training.batch_size, cfg.optimizer.lr, cfg.optimizer.name) == (1, "mnist", 10, 32, .5, "sgd")
    assert "hydra.run.dir" in refused("general.id=2") and "cross-entropy" in refused("general.criterion=mse")


def test_B3_settings_of_the_long_run():
    "number of tasks and how often networks are kept, at source B's place; the folder has another"
    cfg = compose(["+experiment=tickets/lop", "lop_experiment.num_tasks=501", "lop_experiment.save_freq=50"])
    assert (cfg.stream.name, cfg.stream.tasks, cfg.logging.snapshot_tasks) == ("permuted_pixels", 501, 50)
    assert "hydra.run.dir" in refused("lop_experiment.save_folder=x")


def test_B4_ticket_masks():
    "how many tickets, which density in how many rounds, and at which tasks, at source B's place; pairs are always compared; the preset of all stages runs as it stands"
    t = compose(["winning_tickets_masks", *(f"winning_tickets_masks.{w}" for w in ("num_tickets=10", "target_percentage=0.05", "pruning_rounds=10", "tasks=[0,50,500]"))]).tickets
    assert (t.stages, t.masks, t.targets, t.rounds, t.tasks) == (["masks"], 10, [.05], [10], [0, 50, 500])
    assert "All pairs are compared" in refused("winning_tickets_masks.pairwise=true")
    cfg = compose(["+experiment=tickets/all"]); verify_tickets(cfg)
    assert cfg.tickets.stages == list(ticket_stages) and max(cfg.tickets.tasks) < cfg.stream.tasks


def test_B5_overlap_of_tickets():
    "which mask is made of several (first, intersection, union, average) and for which densities"
    for how in ("first", "intersection", "union", "average"):
        t = compose(["overlap_parameters_tickets", f"overlap_parameters_tickets.mask_selection_criterion={how}", "overlap_parameters_tickets.target_percentages_values=[0.2,0.1,0.05]", "overlap_parameters_tickets.pruning_rounds_values=[3,5,10]"]).tickets
        assert (t.stages, t.aggregate, t.targets, t.rounds) == (["overlap"], how, [.2, .1, .05], [3, 5, 10])


def test_B6_plasticity_of_tickets():
    "density, rounds, number of new tasks, and the tasks at which tickets were found"
    t = compose(["winning_tickets_plasticity", *(f"winning_tickets_plasticity.{w}" for w in ("target_percentage=0.05", "pruning_rounds=10", "num_tasks=100", "tasks=[0,50]"))]).tickets
    assert (t.stages, t.targets, t.rounds, t.new_tasks, t.tasks) == (["plasticity"], [.05], [10], 100, [0, 50])


def test_B7_accuracy_and_random_masks():
    "the same of the three other studies"
    for name, stage in dict(winning_tickets_accuracy="accuracy", test_random_masks="random_masks", parameter_plasticity="parameter_plasticity").items():
        t = compose([name, f"{name}.tasks=[0,3]"] + ([f"{name}.target_percentage=0.05", f"{name}.num_masks_per_task=10"] if name != "parameter_plasticity" else [])).tickets
        assert (t.stages, t.tasks) == ([stage], [0, 3]) and (stage == "parameter_plasticity" or (t.targets, t.masks) == ([.05], 10))
