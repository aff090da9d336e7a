"Rows A72 to A82 of the sources: streams of single examples, what learns on them, and what a study of them leaves behind."
import json
import os
from functools import cache

import numpy as np
import pytest
import torch

from lop_nb.bitflips import Bits, BitFlips
from lop_nb.compose import compose
from lop_nb.data import load
from lop_nb.experiments import load_run, make_replicas, plan, run_study, verify
from lop_nb.runtime import LopError
from lop_nb.streams import PermutedPixels, from_record

ALL = lambda view: torch.arange(view.n).expand(len(view.rows), -1)
BITS = ["+experiment=bit-flipping", "training.replicas=2", "training.engine=torch", "logging.progress=false", "logging.figures=false"]
SMALL = ["+experiment=permuted-mnist", "dataset=digits", "model.hidden_sizes=[32,32,32]", "stream.tasks=2", "stream.examples=1500", "metrics.probe_size=200", "training.replicas=2",
         "training.engine=torch", "logging.progress=false"]


def study(*words):
    cfg = compose(words); verify(cfg)
    return cfg, plan(cfg)[1]


@cache
def trained(words):
    "The records of the first arm of a study, and the parameters that it ended with"
    learner = study(*words)[1][0].fit()
    return learner.records, {k: v.detach().clone() for k, v in learner.replicas.params.items()}


def mean(df, metric, **at):
    rows = df[(df.metric == metric) & np.logical_and.reduce([df[k] == v for k, v in at.items()])]
    return rows.value.mean()


def test_A72_one_slow_bit_flips_between_tasks():
    "m = 20 bits, f = 15 of them slow: constant within T examples, exactly one flip per T, and the others random each step"
    stream = BitFlips(tasks=60, examples=200, seeds=[3, 5, 8]); before = None
    for task in stream:
        x, y = task.train.fetch(ALL(task.train)); slow = x[..., :15]
        assert (slow == slow[:, :1]).all() and set(x.unique().tolist()) == {0., 1.}
        assert torch.equal(y, stream.target(x)) and x.shape == (3, 200, 20) and x.dtype == y.dtype == torch.float32
        if before is not None: assert ((slow[:, 0] != before).sum(1) == 1).all()
        before = slow[:, 0]
    flips = torch.stack([stream.flips(s, 59) for s in stream.seeds])
    assert len(flips.unique()) == 15 and not torch.equal(flips[0], flips[1])
    cfg = study(*BITS)[0]; assert cfg.stream.tasks * cfg.stream.examples == 5_000_000 and (cfg.stream.bits, cfg.stream.slow, cfg.stream.flip) == (20, 15, "one")
    assert compose([*BITS, "training.n_examples=3000000", "training.T=10000"]).stream.tasks == 300


def test_A72_all_slow_bits_anew_on_request():
    "and by its own name what the reference's configuration files run by default: all slow bits are re-sampled every T"
    stream = BitFlips(tasks=200, examples=2, seeds=[3, 5], flip="all"); states = torch.stack([stream.states(k) for k in range(200)])
    changed = (states[1:] != states[:-1]).sum(2).double()
    assert abs(changed.mean() - 7.5) < 4*15**.5/2/398**.5 and abs(states.double().mean() - .5) < 4*.5/(400*15)**.5   # four standard errors
    assert torch.equal(states[7, 1], BitFlips(tasks=9, examples=2, seeds=[5], flip="all").states(7)[0])


def slow_target(target, r, x):
    "one input of one replica, from the definition, in Python's own numbers"
    m = len(x); total = target.v[r, -1].item()
    for w, v in zip(target.w[r].tolist(), target.v[r].tolist()):
        S = sum(a < 0 for a in w[:m]) - .5*w[m]
        if sum(a*b for a, b in zip(w, [*x, 1])) > (m + 1)*target.beta - S: total += v
    return total


def test_A73_the_target_is_a_fixed_network_of_threshold_units():
    "±1 weights, 100 units that fire strictly above θ = (m+1)β − S, ±1 output weights and bias; recomputed one input at a time"
    stream = BitFlips(tasks=5, examples=50, seeds=[3, 5])
    for k in 0, 4:
        x, y = stream[k].test.fetch(ALL(stream[k].test))
        for r in range(2):
            for i in range(0, 32, 3): assert y[r, i].item() == slow_target(stream.target, r, x[r, i].tolist())
    assert stream.target.w.shape == (2, 100, 21) and stream.target.v.shape == (2, 101)
    assert set(stream.target.w.unique().tolist()) == set(stream.target.v.unique().tolist()) == {-1., 1.}
    assert stream.target.w.mean().abs() < .1


@pytest.mark.parametrize("name, gain", [("relu", 2**.5), ("tanh", 5/3), ("sigmoid", 1.), ("leaky_relu", (2/1.0001)**.5), ("elu", 2**.5), ("swish", 2**.5)])
def test_A74_the_learner(name, gain):
    "one hidden layer of 5 (10, 50, 100) units, six activations, Kaiming's uniform weights, zero biases; and no hidden layer at all, the linear control"
    cfg = compose([*BITS, "model.hidden_size_learner=5", f"model.activation={name}"], verify)
    for size in 5, 10, 50, 100:
        cfg.model.hidden_sizes = [size]; nets = make_replicas(cfg, (1, 1, 20), 1); p = nets.params
        assert p["linear_0.weight"].shape == (2, size, 20) and p["out.weight"].shape == (2, 1, size) and not p["linear_0.bias"].any() and not p["out.bias"].any()
        for k, bound in ("linear_0.weight", gain*(3/20)**.5), ("out.weight", (3/size)**.5): assert .5*bound < p[k].abs().max() <= bound*(1 + 1e-6)
        fresh = nets.graph["act_0"].fresh((1000, 20), 20, torch.Generator().manual_seed(0)); assert .99*gain*(3/20)**.5 < fresh.abs().max() <= gain*(3/20)**.5*(1 + 1e-6)
    z = torch.linspace(-4, 4, 9); f = nets.modules[0].act_0
    by_hand = dict(relu=z.clamp(min=0), tanh=z.tanh(), sigmoid=1/(1 + (-z).exp()), leaky_relu=torch.where(z < 0, .01*z, z), elu=torch.where(z < 0, z.exp() - 1, z), swish=z/(1 + (-z).exp()))
    assert torch.allclose(f(z), by_hand[name], atol=1e-6)
    cfg.model.hidden_sizes = []; assert list(make_replicas(cfg, (1, 1, 20), 1).params) == ["out.weight", "out.bias"]


@pytest.mark.parametrize("words", [(), ("optimizer.use_adam=true",), ("model.hidden_sizes=[]",), ("model.activation=swish",)], ids=str)
def test_A75_online_training(words):
    "batch 1, squared error, SGD with a step of .01 or Adam by `use_adam`, `weight_decay`: the loss falls on the first T, and each word reaches the optimizer"
    cfg, (learner, *_) = study(*BITS, "intervention.arms=[backprop]", "training.T=2000", "stream.tasks=1", "model.hidden_size_learner=5", *words)
    assert (cfg.training.batch_size, cfg.training.epochs, cfg.optimizer.lr) == (1, 1, .01) and type(learner.optimizer).__name__ == ("Adam" if cfg.optimizer.name == "adam" else "SGD")
    if cfg.optimizer.name == "sgd": assert cfg.optimizer.momentum == 0
    losses = []
    learner.callbacks.append(type("Keep", (type(learner.callbacks[0]).__mro__[1],), dict(after_block=lambda self, l: losses.append(l.losses.clone())))())
    learner.fit(); each = torch.cat(losses, 1)
    assert learner.at.step == each.shape[1] == 2000 and (each[:, -500:].mean(1) < .8*each[:, :100].mean(1)).all()
    assert {k for k in learner.records.metric if "accuracy" in k} == set()


def test_A75_weight_decay_acts():
    "the weights end smaller with `optimizer.weight_decay`"
    words = (*BITS, "intervention.arms=[backprop]", "training.T=1000", "stream.tasks=1")
    (_, plain), (_, decayed) = trained(words), trained((*words, "optimizer.weight_decay=.1"))
    assert decayed["linear_0.weight"].norm() < .9*plain["linear_0.weight"].norm()


def test_A76_options_of_continual_backprop():
    "`rho`, `maturity_threshold` and `cbp_decay_rate` each change what happens, and replacements are ρ·eligible·steps; `cbp_replacement_interval`, which the source declares and ignores, is refused with a reason"
    words = (*BITS, "training.continual_backprop=true", "training.T=500", "stream.tasks=2", "model.hidden_size_learner=50", "training.rho=1e-3")
    df, base = trained(words)
    assert study(*words)[0].intervention.arms == ["continual_backprop"]
    replaced = df[(df.metric == "replaced_units") & (df.task == 1)].value     # so far
    assert (abs(replaced - 1e-3*50*900/(1 + 1e-3*100)) <= 2).all()            # n = ρ(50·900 − 100 n): the first 100 steps have nobody mature, and each new unit waits 100
    for other in "training.rho=1e-4", "training.maturity_threshold=300", "training.cbp_decay_rate=.5": assert not torch.equal(trained((*words, other))[1]["linear_0.weight"], base["linear_0.weight"]), other
    assert mean(trained((*words, "training.rho=1e-4"))[0], "replaced_units", task=1) < .2*replaced.mean()
    with pytest.raises(LopError, match="replacement_rate"): study(*words, "training.cbp_replacement_interval=1000")


def test_A77_shrink_and_perturb():
    "`use_shrink_perturb` and `noise_variance`: the weights are both shrunk and perturbed, by λ and by noise of that variance (in the source they were never shrunk, and the noise was 0)"
    words = (*BITS, "training.use_shrink_perturb=true", "training.T=40", "stream.tasks=1", "optimizer.step_size=0")
    start = study(*words)[1][0].replicas.params["linear_0.weight"].detach().clone()
    shrunk = trained((*words, "training.noise_variance=0", "intervention.shrink_and_perturb.shrink=.9"))[1]["linear_0.weight"]
    assert torch.allclose(shrunk, start*.9**40, rtol=1e-4)
    words = (*words, "model.hidden_size_learner=100", "intervention.shrink_and_perturb.shrink=1")
    start = study(*words)[1][0].replicas.params["linear_0.weight"].detach().clone()
    moved = trained((*words, "training.noise_variance=.0001"))[1]["linear_0.weight"] - start
    assert abs(moved.std()/(40*.0001)**.5 - 1) < .05                        # 4000 numbers: 4.5 standard errors


def test_A78_binned_error_and_measures_of_units():
    "squared error in bins of 1000 examples, by `bin_size`; units measured on 128 rows with thresholds dead .95, corr .98, sat .05/.8, behind the activation: a dead learner is reported dead (in the source it was not)"
    words = (*BITS, "intervention.arms=[backprop]", "training.T=1000", "stream.tasks=2", "model.hidden_size_learner=5")
    cfg, (learner, *_) = study(*words, "optimizer.lr=0", "training.bin_size=500")
    assert compose(BITS).metrics.bin == 1000
    assert (cfg.metrics.probe_size, cfg.metrics.dead_threshold, cfg.metrics.duplicate_threshold, cfg.metrics.gradient_ratio, cfg.metrics.saturated_threshold) == (128, .95, .98, .05, .8)
    with torch.no_grad(): learner.replicas.params["linear_0.bias"][0] = -100.    # the first replica's units are silent on every input
    df = learner.fit().records; bins = df[df.metric == "binned_loss"].sort_values(["replica", "examples"])
    x, y = (torch.cat(t, 1) for t in zip(*(learner.stream[k].train.fetch(ALL(learner.stream[k].train)) for k in range(2))))
    by_hand = (learner.replicas(x).detach()[..., 0] - y).square().double().view(2, 4, 500).mean(2)     # nothing is learnt at a step of 0
    assert bins.examples.tolist() == [500, 1000, 1500, 2000]*2 and np.allclose(bins.value, by_hand.flatten(), rtol=1e-5)
    units = df[df.layer == "act_0"]
    assert mean(units, "dead_fraction", replica=0) == 1 and mean(units, "dead_fraction", replica=1) < 1
    h = learner.replicas(learner.stream[1].train.fetch(torch.arange(128).expand(2, -1))[0], ["act_0"])[1]["act_0"]
    assert mean(units, "dead_fraction", replica=1, task=1) == pytest.approx(((h[1] <= 1e-7).double().mean(0) >= .95).double().mean().item())


def test_A61_what_is_logged():
    "the step, the error of each bin with the bin's end, and the measures of the hidden layer, over true steps"
    _, (learner, *_) = study(*BITS, "intervention.arms=[backprop]", "training.T=1000", "stream.tasks=2", "training.bin_size=250")
    df = learner.fit().records; bins = df[(df.metric == "binned_loss") & (df.replica == 0)]
    assert bins.step.tolist() == bins.examples.tolist() == [*range(250, 2001, 250)]
    units = df[(df.layer == "act_0") & (df.replica == 0)]
    assert set(units.metric) == {"dead_fraction", "duplicate_fraction", "effective_rank", "stable_rank", "saturated_gradient_fraction", "non_gaussianity", "weight_norm"} and set(units.step) == {1000, 2000}


def test_A79_what_is_left_on_disk(tmp_path):
    "the history of a run, which bit flipped when, and the networks, as files; `save_model`, which the source ignores, is not needed"
    words = (*BITS, "training.T=200", "stream.tasks=5")
    folder = run_study(compose(words, verify), tmp_path/"run"); run = load_run(folder)
    flips = np.load(folder/"draws.npz")["flips"]; stream = from_record(json.loads((folder/"stream.json").read_text()), Bits(20))
    for r, seed in enumerate(run.stream["seeds"]):
        assert flips[r].tolist() == stream.flips(seed, 4).tolist()
        for k in range(1, 5): assert (stream.states(k)[r] != stream.states(k - 1)[r]).nonzero()[:, 0].tolist() == [flips[r, k - 1]]
    assert set(run.replicas) == {"backprop", "continual_backprop"} and run.replicas["backprop"].params["linear_0.weight"].shape == (2, 5, 20)
    assert run.records.query("metric == 'online_loss' and run == 'backprop'").groupby("replica").task.nunique().tolist() == [5, 5]
    with pytest.raises(LopError, match="always kept"): compose([*words, "training.save_model=true"])


@pytest.mark.skipif(not os.environ.get("LOP_DATA"), reason="LOP_DATA is not set")
def test_A80_the_preset_is_the_source_s():
    "three layers of 2000 ReLUs, 70,000 images merged, 60,000 single steps a task, 50 tasks, step .003, pixels by 255, SGD or Adam"
    cfg = compose(["+experiment=permuted-mnist"], verify)
    assert (list(cfg.model.hidden_sizes), cfg.model.activation, cfg.model.init, cfg.stream.tasks, cfg.stream.examples, cfg.training.batch_size, cfg.training.epochs) == ([2000]*3, "relu", "kaiming", 50, 60000, 1, 1)
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == ("sgd", .003, 0, 0) and compose(["+experiment=permuted-mnist", "optimizer=adam"]).optimizer.lr == .003
    stream = PermutedPixels(load("mnist", val=0.), normalize=cfg.dataset.normalize, seeds=[1], tasks=50, pool=cfg.stream.pool, examples=cfg.stream.examples); view = stream[3].train
    assert view.n == len(view.rows[0].unique()) == 60_000 and len(view.split) == 70_000 and (view.rows >= 60_000).sum() > 8000
    x, y = view.fetch(torch.arange(50)[None]); raw = view.split.x[view.rows[0, :50]].flatten(1).float()/255
    assert torch.allclose(x[0].flatten(1), raw[:, view.pixels[0]]) and torch.equal(y[0], view.split.y[view.rows[0, :50]])


def test_A80_online_accuracy_of_each_task():
    "each example is judged before it is learnt from, and the mean is kept for each task (on digits, in small)"
    cfg, (learner, cbp) = study(*SMALL, "stream.examples=500"); seen = []
    keep = type("Keep", (type(learner.callbacks[0]).__mro__[1],), dict(after_block=lambda self, l: seen.append((l.logits.argmax(-1) == l.y).double())))
    learner.callbacks.append(keep()); df = learner.fit().records
    each = torch.cat(seen, 1).view(2, 2, 500).mean(2)                       # [replica, task]
    assert np.allclose(df[df.metric == "online_accuracy"].pivot(index="replica", columns="task", values="value"), each.numpy(), atol=1e-6)
    assert learner.at.step == 1000 and (each > .2).all() and cbp.run == "continual_backprop"


REMEDIES = {"dropout": ["model.dropout_p=.2"], "decay by multiplication": ["optimizer=adamw", "optimizer.lr=.003", "optimizer.weight_decay=.1"], "coupled decay": ["optimizer.weight_decay=.01"],
            "shrink and perturb": ["intervention.arms=[shrink_and_perturb]"], "online normalisation": ["intervention.arms=[online_norm]"], "continual backprop": ["intervention.arms=[continual_backprop]", "intervention.continual_backprop.replacement_rate=1e-2"]}


@pytest.mark.parametrize("name", REMEDIES)
def test_A81_each_one_changes_the_trajectory(name):
    "dropout, decay (by multiplication, or in the gradient), shrink-and-perturb, online normalisation and continual backprop each change what is learnt (in the source dropout and normalisation did nothing)"
    words = (*SMALL, "stream.tasks=1", "stream.examples=400", "intervention.arms=[backprop]")
    base = ("optimizer=adamw", "optimizer.lr=.003", "optimizer.weight_decay=0") if name == "decay by multiplication" else ()
    (_, plain), (_, other) = trained((*words, *base)), trained((*words, *REMEDIES[name]))
    assert plain.keys() == other.keys() and all(not torch.equal(plain[k], other[k]) for k in plain if k.endswith("weight"))
    assert all(v.isfinite().all() for v in other.values())


def test_A82_what_is_measured_on_each_task_and_drawn(tmp_path):
    "online accuracy, mean |w|, dead units behind the activation and effective rank of each layer, on 2000 images, once a task; and the four plots of backprop beside continual backprop, saved"
    cfg = compose(["+experiment=permuted-mnist"]); assert cfg.metrics.probe_size == 2000 and cfg.intervention.arms == ["backprop", "continual_backprop"]
    folder = run_study(compose([*SMALL, "stream.examples=300", "metrics.probe_size=null"], verify), tmp_path/"run"); run = load_run(folder); df = run.records
    assert {"comparison.png", "comparison.csv"} <= {p.name for p in (folder/"figures").iterdir()}
    task = PermutedPixels(load("digits", val=0.), normalize="unit", tasks=2, pool="all", examples=300, seeds=run.stream["seeds"])[1]; x, _ = task.train.fetch(ALL(task.train))
    for arm, nets in run.replicas.items():
        seen = nets(x, ["act_0", "act_1", "act_2"])[1]; at = lambda m: df[(df.run == arm) & (df.metric == m) & (df.task == 1)].sort_values(["layer", "replica"]).value.tolist()
        dead = [((h[r].abs() <= 1e-7).double().mean(0) >= .95).double().mean().item() for h in seen.values() for r in range(2)]
        w = [nets.params[f"linear_{i}.weight"][r].abs().mean().item() for i in range(3) for r in range(2)]
        s = [torch.linalg.svdvals(h[r].double()) for h in seen.values() for r in range(2)]; p = [v/v.sum() for v in s]
        for metric, by_hand in dict(dead_fraction=dead, weight_magnitude=w, effective_rank=[torch.special.entr(q).sum().exp().item() for q in p]).items(): assert at(metric) == pytest.approx(by_hand, rel=1e-4), metric
        assert df[(df.run == arm) & (df.metric == "online_accuracy")].groupby("task").replica.nunique().tolist() == [2, 2]
