"""What is wrong with a config is said before any data are read: every key with a wrong type, an unknown value, a value out of range; and random configs."""
import contextlib
import io
import os
import sys
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from omegaconf import OmegaConf

from lop_nb import cli, experiments
from lop_nb.compose import choices, compose, ranges
from lop_nb.config import options
from lop_nb.learner import Callback
from lop_nb.runtime import LopError


@pytest.fixture(autouse=True)
def no_data(monkeypatch, request):
    "reading data is an error, but for the test that trains"
    def load(*_, **__): raise AssertionError("data were read")
    if "trains" not in request.keywords: monkeypatch.setattr(experiments, "load", load)


def refused(*words):
    with pytest.raises(LopError) as e: compose(words, experiments.verify)
    assert len(str(e.value).splitlines()) <= 2
    return str(e.value)


@cache
def leaves():
    "{key: (the choices that bring it, its value)} over all options"
    found = {}
    for group, named in options().items():
        for name, node in named.items():
            flat = lambda n, p: [x for k, v in n.items() for x in (flat(v, f"{p}.{k}") if OmegaConf.is_dict(v) else [(f"{p}.{k}", v)])]
            for key, v in flat(OmegaConf.structured(node), group): found.setdefault(key, ([f"{group}={name}"], v))
    return {k: v for k, v in found.items() if not k.endswith(".name") and k not in {f"dataset.{s}" for s in ("in_channels", "img_size", "input_size", "num_classes")}}


NUMBERS = [(f"{group}.{key}", interval) for group, keys in ranges.items() for key, interval in keys.items()]


@pytest.mark.parametrize("key, interval", NUMBERS)
def test_out_of_range(key, interval):
    low, is_list = float(interval[1:].split(",")[0]), OmegaConf.is_list(leaves()[key][1])
    said = refused(*leaves()[key][0], f"{key}={[int(low) - 1] if is_list else int(low) - 1}".replace(" ", ""))
    assert key in said and interval in said and str(int(low) - 1) in said


def test_every_number_has_a_range():
    numbers = {k for k, (_, v) in leaves().items() if isinstance(v, (int, float)) and not isinstance(v, bool) or OmegaConf.is_list(v) and v and isinstance(v[0], (int, float))}
    assert numbers <= {k for k, _ in NUMBERS}, numbers - {k for k, _ in NUMBERS}


@pytest.mark.parametrize("key", [k for k, (_, v) in leaves().items() if not isinstance(v, str) and v is not None])
def test_wrong_type(key):
    wrong = "abc" if not OmegaConf.is_list(leaves()[key][1]) else "3"
    said = refused(*leaves()[key][0], f"{key}={wrong}")
    assert f"{key}={wrong}" in said


WORDS = [f"{g}.{k}" for g, keys in choices.items() for k in keys] + ["model.activation", "model.normalization", "model.pool_type", "model.stem"]


@pytest.mark.parametrize("key", WORDS)
def test_unknown_word(key):
    said = refused(*leaves()[key][0], f"{key}=nonesuch")
    assert "nonesuch" in said and "Choices:" in said


@pytest.mark.parametrize("words, says", [
    (["stream=class_split", "stream.tasks=6"], ["stream.tasks=6", "10 classes"]),
    (["stream=class_split", "stream.classes_per_task=11"], ["stream.classes_per_task=11", "10 classes"]),
    (["task.partitions=[[0,1],[1,2]]"], ["partitions", "class 1"]),
    (["task.partitions=[[0,1],[10]]"], ["partitions", "class 10"]),
    (["task.partitions=[[0,1],[]]"], ["partitions", "no class"]),
    (["stream=binary_pairs", "stream.tasks=46"], ["stream.tasks=46", "45"]),
    (["stream=alternating", "stream.hard_classes=11"], ["stream.hard_classes=11", "10"]),
    (["passage=inputs", "stream=class_split"], ["passage.how=inputs", "sampling"]),
    (["model=cnn", "model.conv_channels=[8,8,8,8]"], ["Nothing is left at", "pool_3"]),
    (["model=cnn", "model.kernel_sizes=[3,3]"], ["kernel_sizes", "3"]),
    (["model=vit", "dataset=digits", "model.patch_size=9"], ["patch_size=9", "8"]),
    (["model=vit", "model.n_heads=5"], ["n_heads=5", "384"]),
    (["metrics.names=[dead]"], ["dead", "dead_fraction"]),
    (["metrics.layers=[nowhere]"], ["nowhere", "default"]),
    (["training.early_stopping=2", "dataset.val=0"], ["training.early_stopping=2", "dataset.val"]),
    (["metrics.probe_split=val", "dataset.val=0"], ["metrics.probe_split=val", "dataset.val"]),
    (["stream=random_labels", "metrics.probe_split=test"], ["stream=random_labels", "metrics.probe_split=train"]),
    (["stream=random_labels", "training.early_stopping=1"], ["stream=random_labels", "training.early_stopping=0"]),
    (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "two"]),
    (["dataset.num_classes=3"], ["dataset.num_classes=3", "dataset=NAME"]),
    (["model.name=cnn"], ["model=cnn"]),
    (["optimizer=noisysgd", "optimizer.nesterov=true", "optimizer.momentum=0"], ["Nesterov", "optimizer=noisysgd"]),
    (["optimizer=rmsprop", "optimizer.implementation=fused"], ["fused", "foreach"]),
    (["model=mlp", "training.batch_size=1"], ["training.batch_size=1", "2"]),
])
def test_what_does_not_fit_together(words, says):
    said = refused(*words)
    for part in says: assert part in said, said


@pytest.mark.parametrize("word, ours", [("model.m=18", "stream.bits=18"), ("model.f=9", "stream.slow=9"), ("model.hidden_size_target=7", "stream.hidden=7"), ("model.beta=.6", "stream.beta=0.6"), ("training.T=50", "stream.examples=50"),
    ("training.n_examples=2e4", "stream.tasks=2"), ("model.hidden_size_learner=10", "model.hidden_sizes=[10]"), ("training.rho=1e-3", "intervention.continual_backprop.replacement_rate=0.001"),
    ("training.maturity_threshold=7", "intervention.continual_backprop.maturity_threshold=7"), ("training.cbp_decay_rate=.9", "intervention.continual_backprop.decay=0.9"),
    ("training.continual_backprop=true", "intervention.arms=['continual_backprop']"), ("training.continual_backprop=false", "intervention.arms=['backprop']"), ("training.use_shrink_perturb=true", "intervention.arms=['shrink_and_perturb']"),
    ("training.noise_variance=.25", "intervention.shrink_and_perturb.noise=0.5"), ("training.bin_size=500", "metrics.bin=500"), ("optimizer.step_size=.5", "optimizer.lr=0.5"), ("optimizer.use_adam=true", "optimizer.name=adam"),
    ("optimizer.use_adam=false", "optimizer.name=sgd"), ("metrics.fixed_batch_size=64", "metrics.probe_size=64"), ("metrics.corr_threshold=.9", "metrics.duplicate_threshold=0.9"), ("metrics.log_histograms=true", "metrics.histograms=True")])
def test_words_of_the_bit_flipping_script(word, ours):
    cfg = compose(["+experiment=bit-flipping", word], experiments.verify); key, _, value = ours.partition("=")
    assert str(OmegaConf.select(cfg, key)) == value


@pytest.mark.parametrize("word", ["training.n_examples=15000", "training.n_examples=many", "optimizer.use_adam=maybe", "training.noise_variance=x", "training.noise_variance=-1", "training.continual_backprop=1", "training.save_model=true",
                                  "training.cbp_replacement_interval=10", "model.m=0", "model.f=21", "model.hidden_size_learner=0", "model.beta=2"])
def test_words_of_the_bit_flipping_script_with_values_that_they_can_t_have(word): assert refused("+experiment=bit-flipping", word)


class FirstStep(Callback):
    def after_step(self, learner): learner.stopping = True


def one_step(cfg):
    "Train each arm of a study for one step"
    for learner in experiments.plan(cfg)[1]:
        learner.callbacks.append(FirstStep())
        with pytest.raises(KeyboardInterrupt): learner.fit()


def cfg_job(words):
    "`lop-run WORDS --cfg job` in this process: exit code, what it printed, what it complained of"
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lop-run", *words, "--cfg", "job"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): cli.run(); code = 0
    except SystemExit as e: code = e.code
    finally: sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def values(v):
    "Values that might be given for a setting that is now `v`: good ones, bad ones, and nonsense"
    small = st.sampled_from(["0", "1", "2", "3", "4", "8"])
    odd = st.sampled_from(["-1", "0.5", "1.5", "nan", "inf", "null", "abc", "true", "[]", "[1,2]", "[[0,1],[2]]", "[a]", "{a:1}", "''", "${training.seed}", "${nope}", "1e400", "-0.0", "5,6"])
    if isinstance(v, bool): return st.sampled_from(["true", "false"]) | odd
    if isinstance(v, str): return st.sampled_from(["none", "relu", "batch", "layer", "max", "zero", "inputs", "foreach", "unit", v or "none"]) | odd
    if OmegaConf.is_list(v): return st.lists(small, min_size=1, max_size=3).map(lambda xs: f"[{','.join(xs)}]") | odd
    return small | odd


@st.composite
def studies(draw):
    "A few choices and a few settings of small networks, legal or not"
    chosen = {g: draw(st.sampled_from(sorted(o))) for g, o in options().items() if g not in ("dataset", "logging") and draw(st.booleans())}
    if chosen.get("model") == "vgg": del chosen["model"]     # has no place on digits, and little on a laptop
    small = dict(mlp=["model.hidden_sizes=[8]"], cnn=["model.conv_channels=[4,4]", "model.fc_hidden_units=[8]"], resnet=["model.layers=[1,1]", "model.base_channels=4"], vit=["model.embed_dim=12", "model.depth=1"]).get(chosen.get("model"), [])
    here = [k for k in leaves() if not k.startswith("logging.") and k not in ("dataset.root", "training.device", "training.threads", "training.seed")]
    keys = draw(st.lists(st.sampled_from(here), max_size=3, unique=True))
    fit = [k for k in keys if k not in [w.split("=")[0] for w in small]]
    return [*(f"{g}={n}" for g, n in chosen.items()), "training.replicas=1", *small, *(f"{k}={draw(values(leaves()[k][1]))}" for k in fit if k != "training.replicas")]


@pytest.mark.trains
@settings(max_examples=int(os.environ.get("LOP_RANDOM_CONFIGS", 40)), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(studies())
def test_random_configs_train_or_are_refused(words):
    "none ends in a traceback: `--cfg job` prints it and it trains a step, or it is refused in a line or two"
    code, out, err = cfg_job(words)
    assert code in (0, 2) and "Traceback" not in err, (words, err)
    if code == 2: assert err.startswith("lop-run: ") and len(err.strip().splitlines()) <= 2, (words, err); return
    assert OmegaConf.create(out).training.replicas == 1
    try: one_step(compose([*words, "logging.progress=false"]))
    except LopError as e: assert len(str(e).splitlines()) <= 2
