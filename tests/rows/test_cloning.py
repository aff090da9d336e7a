"Rows A39, A41, A56, A57, A60 and A62 to A66, A88 of the sources: cloning studies, each as a test."
import warnings

import pytest
import torch

from lop_nb.cloning import block_r2
from lop_nb.compose import compose, size_of
from lop_nb.config import presets
from lop_nb.experiments import load_run, run_study, verify
from lop_nb.records import read_records

SMALL = ["dataset=digits", "dataset.examples_per_class=12", "training.replicas=1", "training.batch_size=16", "logging.figures=false", "logging.progress=false"]
SIZES = dict(mlp=["model.hidden_sizes=[16,16]"], cnn=["model.conv_channels=[4,4]", "model.fc_hidden_units=[8]"], resnet=["model.base_channels=4", "model.layers=[1,1]"],
             vit=["model.patch_size=4", "model.embed_dim=8", "model.n_heads=2", "model.depth=1"])
PLAIN = ["model.normalization=none", "model.dropout_p=0"]


def study(folder, *words):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dropout at")
        return run_study(compose([*words]), folder)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    "base, clone and scratch, twice two epochs"
    return study(tmp_path_factory.mktemp("cloned")/"run", "training=cloning", "training.initial_epochs=2", "training.epochs_per_expansion=2", "metrics.metrics_frequency=1", "optimizer.lr=0.02", *SIZES["mlp"], *PLAIN, *SMALL, "training.replicas=2")


def test_A39_cloning(cloned):
    "`training=cloning`: base and clone side by side; the clone's first validation loss is the base's at that moment"
    df = read_records(cloned); t = df[df.metric == "val_loss"].pivot_table(index=["task", "epoch", "seed"], columns="run", values="value")
    assert (t.loc[0].clone == t.loc[0].backprop).all() and (t.loc[(1, 0)].clone - t.loc[(1, 0)].backprop).abs().max() < 1e-6
    assert t.loc[(1, 2)].notna().all(axis=None) and (t.loc[(1, 2)].clone != t.loc[(1, 2)].backprop).all()
    models = load_run(cloned).models
    assert [m[0].linear_0.out_features for m in models.values()] == [16, 32, 32]
    cfg = compose(["training=cloning"])
    assert (cfg.training.initial_epochs, cfg.training.epochs, cfg.stream.tasks, cfg.intervention.clone.factor) == (5, 20, 2, 2)
    alone = compose(["training=cloning", "training.track_base=false"])
    assert list(cfg.intervention.arms) == ["backprop", "clone", "scratch"] and list(alone.intervention.arms) == ["clone"]


def test_A41_repeated_expansion(tmp_path):
    "`training.num_expansions=3`: 16 units become 32, 64 and 128"
    folder = study(tmp_path/"run", "training=cloning", "training.num_expansions=3", "training.initial_epochs=1", "training.epochs=1", "logging.snapshot_tasks=1", "intervention=clone", *SIZES["mlp"], *PLAIN, *SMALL)
    run = load_run(folder)
    assert [run.snapshot("clone", k, "end").modules[0].linear_0.out_features for k in range(4)] == [16, 32, 64, 128]
    r2 = run.records[run.records.metric == "cloning_r2"]
    assert (r2.value > 1 - 1e-9).all() and set(r2.task) == {1, 2, 3}


def test_A56_agreement_of_clones(cloned):
    "R² of each layer, forward and backward: 1 of a perfect clone, about 0 of an unrelated network"
    df = read_records(cloned)
    for way in ("forward", "backward"):
        rows = df[df.metric == f"cloning_r2_{way}"]
        assert set(rows.layer) == {"act_0", "act_1"} and set(rows.epoch) == {0, 1, 2} and (rows.value > 1 - 1e-9).all()
    h = torch.randn(200, 500, 32, generator=torch.Generator().manual_seed(0))
    assert block_r2(h, torch.arange(32) // 2, corrected=True).mean().abs() < 2e-3


def test_A57_similarity_and_alignment(cloned):
    "cosine between clones and the units they come from, and whether clones agree: both logged, both 1 when the clone is made"
    df = read_records(cloned); start = df[(df.run == "clone") & (df.task == 1) & (df.epoch == 0)]
    for m in ("activation_similarity", "feature_alignment"): assert (start[start.metric == m].value - 1).abs().max() < 1e-6
    later = df[(df.metric == "activation_similarity") & (df.epoch == 2)].value
    assert len(later) == 4 and (later < 1 - 1e-6).all()


def test_A60_what_is_logged(cloned):
    "losses and accuracies of base and clone, R² by layer and in the mean, the gap to the base, over true gradient steps"
    df = read_records(cloned); clone = df[df.run == "clone"]
    names = {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "base_train_loss", "base_train_accuracy", "base_val_loss", "base_val_accuracy", "base_test_loss",
             "cloning_r2", "cloning_r2_corrected", "cloning_r2_published", "cloning_r2_forward", "cloning_r2_backward", "logit_gap", "activation_similarity", "effective_rank"}
    assert names <= set(clone.metric)
    beside = clone[clone.metric.str.startswith("base_val")]; base = df[(df.run == "backprop") & (df.task == 1) & df.metric.str.startswith("val_")]
    key = ["metric", "seed", "epoch"]
    assert (beside.assign(metric=beside.metric.str.removeprefix("base_")).set_index(key).value.sort_index() == base.set_index(key).value.sort_index()).all()
    assert clone[clone.metric == "train_loss"].groupby(["task", "epoch"]).step.max().diff().dropna().nunique() == 1


MODES = {"mlp-mnist": ("mlp", "mnist", 20, 2), "cnn-cifar10": ("cnn", "cifar10", 30, 2), "resnet-cifar10": ("resnet", "cifar10", 30, 2), "vit-cifar10": ("vit", "cifar10", 30, 2),
         "multi-expansion": ("mlp", "mnist", 15, 4), "custom": ("mlp", "mnist", 20, 2)}


@pytest.mark.parametrize("mode", MODES)
def test_A62_the_modes_of_the_script(mode, tmp_path):
    "each mode is a preset, `+experiment=cloning/MODE`, which starts and finishes"
    model, data, epochs, stages = MODES[mode]; cfg = compose([f"+experiment=cloning/{mode}"]); verify(cfg)
    assert (cfg.model.name, cfg.dataset.name, cfg.training.initial_epochs, cfg.training.epochs, cfg.stream.tasks, cfg.intervention.clone.factor) == (model, data, epochs, epochs, stages, 2)
    assert f"cloning/{mode}" in presets()
    df = read_records(study(tmp_path/"run", f"+experiment=cloning/{mode}", *SIZES[model], *SMALL, "training.initial_epochs=1", "training.epochs=1"))
    assert set(df.run) == {"backprop", "clone", "scratch"} and set(df.task) == {*range(stages)}


COMMANDS = [("mlp", "training=cloning model=mlp dataset=mnist"), ("cnn", "training=cloning model=cnn dataset=cifar10 training.expansion_factor=2"),
            ("resnet", "training=cloning model=resnet dataset=cifar10 training.initial_epochs=30 training.epochs_per_expansion=30 training.num_expansions=2"),
            ("vit", "training=cloning model=vit dataset=cifar100 training.initial_epochs=50 training.epochs_per_expansion=50 training.expansion_factor=3"),
            ("mlp", "training=cloning model=mlp dataset=mnist metrics.metrics_frequency=1 logging.use_wandb=true")]


@pytest.mark.parametrize("model, words", COMMANDS)
def test_A63_the_commands_of_the_readme(model, words, tmp_path):
    "each is understood as it stands, and runs with one epoch"
    cfg = compose(words.split()); verify(cfg)
    assert cfg.intervention.clone.factor == (3 if "factor=3" in words else 2) and cfg.stream.tasks == (3 if "num_expansions" in words else 2) and cfg.logging.wandb == ("wandb" in words)
    small = {o.partition("=")[0]: o for o in words.split()} | {o.partition("=")[0]: o for o in [*SIZES[model], *SMALL, "logging.wandb=false", "logging.use_wandb=false", "training.initial_epochs=1", "training.epochs_per_expansion=1"]}
    small.pop("logging.wandb")
    folder = study(tmp_path/"run", *small.values())
    assert read_records(folder).groupby("run").step.max().nunique() == 1


def networks(name):
    "How many networks a grid trains in each arm, all its runs checked"
    words, seen = [f"+experiment={name}"], []
    cfg = compose(words, lambda c: seen.append(verify(c)))
    assert len(seen) > 5 and cfg.training.seed == 40
    return size_of(words) * cfg.training.replicas


def test_A64_the_grid_of_continual_runs():
    "four networks, three normalisations, two dropout rates, three step sizes, five seeds: 360, as the script says"
    assert networks("grid/continual") == 360


def test_A65_the_grid_of_cloning_and_dropout():
    "1080 networks; the script says 540, without its two optimizers"
    assert networks("grid/cloning-dropout") == 1080


def test_A66_the_grid_of_cloning_and_noise():
    "900 networks; the script says 60, without its noise scales and decays"
    assert networks("grid/cloning-noise") == 900


def test_A88_a_network_of_the_same_size_from_scratch(cloned):
    "`scratch` has the clone's width and begins with the clone's stage; `wide` has had it from the start"
    df = read_records(cloned); start = df[(df.metric == "val_loss") & (df.task == 1) & (df.epoch == 0)].groupby("run").value.mean()
    assert start.scratch > 2.2 > 2. > start.clone
    assert list(compose(["training=cloning", "intervention.arms=[backprop,clone,scratch,wide]"]).intervention.arms)[-1] == "wide"
