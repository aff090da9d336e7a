"""The probes against a rollout written out, and for what they leave behind: nothing."""
import copy, itertools
from dataclasses import replace
from functools import partial

import pandas as pd, pytest, torch, torch.nn.functional as F

from lop_nb.bitflips import BitFlips
from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop
from lop_nb.learner import Callback, Learner, cuts, evaluate
from lop_nb.models import CNN, MLP
from lop_nb.probe import _best, _pick, fresh_task_probe, icc, k_step_gain, probe_table, rescale_units, rollout_losses
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator, spawn
from lop_nb.streams import ClassSplit, Passage, PermutedPixels

DIGITS = load("digits")
mlp = lambda **kw: partial(MLP, 64, 10, **dict(dict(hidden_sizes=[16, 16], normalization="none", dropout_p=0.), **kw))


def everything(nets):
    "all of a network's state, as bytes"
    state = nets.state_dict()
    return [t.numpy().tobytes() for part in (state["params"], state["buffers"], *state["generators"]) for t in part.values()], torch.get_rng_state().tolist(), [m.training for m in nets.modules]


# ---- rollouts ----
@pytest.mark.parametrize("optimizer, make", [("sgd", lambda ps: torch.optim.SGD(ps, lr=.1)), ("adam", lambda ps: torch.optim.Adam(ps, lr=.1))])
def test_a_rollout_is_an_ordinary_training(optimizer, make):
    "in float64, on a task of three classes: module by module, batch by batch, with torch's own optimizer"
    stream = ClassSplit(DIGITS, partitions=[[1, 8, 3], [2, 0]], seeds=[4, 7]); task = stream[0]
    nets = Replicas(mlp(), [4, 7], dtype=torch.float64)
    got = rollout_losses(nets, double(task), ks=(2, 7), lr=.1, batch=5, rollouts=2, seed=9, optimizer=optimizer)
    for r in range(2):
        ids = task.classes[r].nonzero()[:, 0]
        def loss(model, x, y): return F.cross_entropy(model(x.double())[:, ids], torch.searchsorted(ids, y))
        def whole(model):
            with torch.no_grad(): return loss(model, *(t[r][task.train.valid[r]] for t in task.train.fetch(torch.arange(task.train.n).expand(2, -1))))
        for m in range(2):
            model, draw = copy.deepcopy(nets.modules[r]), _pick(task.train, nets.seeds, ("rollout", 9, 0), 5, 2)
            opt = make(model.parameters()); assert abs(got[0][r, m] - whole(model)) < 1e-12
            for k in range(1, 8):
                x, y = task.train.fetch(draw()[:, m*5:(m + 1)*5])
                opt.zero_grad(); loss(model, x[r], y[r]).backward(); opt.step()
                if k in got: assert abs(got[k][r, m] - whole(model)) < 1e-12


class double:
    "a task seen in float64"
    def __init__(self, task): self.task, self.train = task, self
    def __getattr__(self, name): return getattr(self.task if name in ("loss", "index", "classes") else self.task.train, name)
    def fetch(self, pick, *args): x, y = self.task.train.fetch(pick, *args); return x.double(), y


def test_batches_are_drawn_evenly_from_the_rows_that_are_there():
    "rows of -1 (a replica with a smaller class) are never drawn, the others equally often, batches of two replicas differ, and a seed fixes them"
    task = ClassSplit(DIGITS, tasks=None, classes_per_task=3, seeds=[1, 2])[0]
    view = replace(task.train, rows=torch.stack([torch.arange(6), torch.tensor([5, 4, 3, -1, -1, -1])]))
    draw = _pick(view, [1, 2], ("rollout", 0, 0), 3000, 2); picks = draw()
    assert picks.shape == (2, 6000) and torch.equal(picks, _pick(view, [1, 2], ("rollout", 0, 0), 3000, 2)())
    assert not torch.equal(picks, draw()) and not torch.equal(picks[0] % 3, picks[1])
    for r, n in ((0, 6), (1, 3)):
        counts = picks[r].bincount(minlength=6)
        assert (counts[n:] == 0).all() and ((counts[:n] - 6000/n).abs() < 5*(6000/n*(1 - 1/n))**.5).all()     # five standard deviations
    empty = replace(view, rows=torch.tensor([[0, 1], [-1, -1]]))
    with pytest.raises(LopError, match="no training examples"): _pick(empty, [1, 2], ("rollout",), 1, 1)


@pytest.mark.parametrize("net", [mlp(normalization="batch", dropout_p=.5), partial(CNN, 1, 8, 10, conv_channels=[4], fc_hidden_units=[8], pool_size=1, dropout_p=.1)])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_rollouts_leave_no_trace(net, strategy):
    "parameters, running statistics, dropout's generators, torch's generator and modes are what they were, bit for bit"
    nets = Replicas(net, [0, 1], strategy); stream = PermutedPixels(DIGITS, tasks=3)
    Learner(nets, PermutedPixels(DIGITS, tasks=1), epochs=1, defaults=[]).fit()
    nets.modules[0].eval(); was = everything(nets)
    first = k_step_gain(nets, stream.seeded([0, 1])[2], ks=(1, 3), rollouts=3)
    assert everything(nets) == was
    again = k_step_gain(nets, stream.seeded([0, 1])[2], ks=(1, 3), rollouts=3)
    assert all(torch.equal(first[k], again[k]) for k in (1, 3)) and all(g.isfinite().all() for g in first.values())


def test_dropout_differs_between_rollouts_and_is_off_in_measuring():
    nets = Replicas(mlp(dropout_p=.5), [3]); task = PermutedPixels(DIGITS, tasks=1, seeds=[3])[0]
    losses = rollout_losses(nets, task, ks=(5,), rollouts=3, lr=.1)
    assert losses[0].unique().numel() == 1 and losses[5].unique().numel() == 3
    assert abs(losses[0][0, 0] - evaluate(nets, task, task.train)["loss"][0]) < 1e-6


def test_a_replica_does_not_notice_its_neighbours():
    stream = PermutedPixels(DIGITS, tasks=2); seeds = [0, 1, 2]
    together = k_step_gain(Replicas(mlp(), seeds), stream.seeded(seeds)[1], ks=(1, 10), rollouts=4, lr=.1)
    alone = k_step_gain(Replicas(mlp(), [2]), stream.seeded([2])[1], ks=(1, 10), rollouts=4, lr=.1)
    assert all((together[k][2] - alone[k][0]).abs() < 1e-6 for k in (1, 10))


def test_broken_and_finished_networks():
    "a network with NaN has a gain of NaN and its neighbour has its own; one without any loss has nothing to gain: 0"
    nets, task = Replicas(mlp(), [0, 1, 2]), ClassSplit(DIGITS, partitions=[[5], [0]], seeds=[0, 1, 2])[0]
    two = PermutedPixels(DIGITS, tasks=1, seeds=[0, 1, 2])[0]; alone = k_step_gain(nets, two, ks=(2,), rollouts=2)[2]
    with torch.no_grad(): nets.params["out.bias"][1] = torch.nan
    broken = k_step_gain(nets, two, ks=(2,), rollouts=2)[2]
    assert broken.isnan().tolist() == [False, True, False] and torch.equal(broken[[0, 2]], alone[[0, 2]])
    assert torch.equal(k_step_gain(nets, task, ks=(1,), rollouts=2)[1][[0, 2]], torch.zeros(2, dtype=torch.float64))


def test_passages_count_their_second_end():
    "a rollout has no progress: the task is the one at the end of the passage"
    stream = PermutedPixels(DIGITS, tasks=3, seeds=[0]); way = Passage(stream, "inputs")
    a, b = (k_step_gain(Replicas(mlp(), [0]), s[2], ks=(3,), rollouts=2) for s in (stream, way))
    assert torch.equal(a[3], b[3])


def test_what_is_refused():
    nets, task = Replicas(mlp(), [0]), PermutedPixels(DIGITS, tasks=1, seeds=[0])[0]
    with pytest.raises(LopError, match="sgd"): k_step_gain(nets, task, optimizer="sdg")
    for ks in ((), (0, 1)):
        with pytest.raises(LopError, match="at least 1"): k_step_gain(nets, task, ks=ks)


# ---- the fresh-task probe ----
def one(probe, **at): return probe.loc[(probe[list(at)] == pd.Series(at)).all(axis=1)].sort_values("replica").value.to_numpy()


def test_the_probe_is_an_ordinary_training():
    "both arms in float64, written out: the order of each epoch, torch's Adam, losses at the horizons, the area as the mean of the batches' losses"
    nets, stream = Replicas(mlp(), [5, 6], dtype=torch.float64), PermutedPixels(DIGITS, tasks=2, seeds=[5, 6])
    task = Wide(stream[1]); probe = fresh_task_probe(nets, task, horizons=(3, 50), lrs=(.01,), seed=2)
    seeds = [spawn(s, "probe", 2) for s in (5, 6)]; fresh = Replicas(mlp(), seeds, dtype=torch.float64)
    for arm, r in itertools.product(("given", "fresh"), range(2)):
        model = copy.deepcopy((nets if arm == "given" else fresh).modules[r]); opt, losses = torch.optim.Adam(model.parameters(), lr=.01), []
        def whole(view):
            with torch.no_grad(): x, y = view.fetch(torch.arange(view.n).expand(2, -1)); return F.cross_entropy(model(x[r]), y[r]).item()
        sizes = cuts(task.train.n, 32); order = torch.cat([torch.randperm(task.train.n, generator=generator(seeds[r], "order", 0, epoch)) for epoch in range(2)])
        assert abs(one(probe, arm=arm, horizon=0, split="train", metric="loss")[r] - whole(task.train)) < 1e-10
        for step, pick in enumerate(order.split(sizes + sizes)[:50], 1):
            x, y = task.train.fetch(pick.expand(2, -1)); loss = F.cross_entropy(model(x[r]), y[r]); losses.append(loss.item())
            opt.zero_grad(); loss.backward(); opt.step()
            if step in (3, 50):
                for split in "train", "test": assert abs(one(probe, arm=arm, horizon=step, split=split, metric="loss")[r] - whole(getattr(task, split))) < 1e-8
                assert abs(one(probe, arm=arm, horizon=step, split="train", metric="area")[r] - sum(losses)/step) < 1e-8


class WideView:
    "a view in float64, with no more than a learner needs"
    def __init__(self, view): self.view, self.n, self.valid = view, view.n, view.valid
    def fetch(self, pick, change=None, progress=None): x, y = self.view.fetch(pick); return x.double(), y


class Wide:
    "a task in float64"
    def __init__(self, task): self.task, self.index, self.train, self.val, self.test = task, task.index, WideView(task.train), None, WideView(task.test)
    def __getattr__(self, name): return getattr(self.task, name)


def test_networks_that_are_fresh_have_a_ratio_of_one():
    "given the very networks that the probe initialises, every number of both arms is the same, and every interval is a point"
    nets = Replicas(mlp(dropout_p=.3, normalization="batch"), [0, 1])
    nets.load_state_dict({k: v for k, v in Replicas(nets.make_model, [spawn(s, "probe", 0) for s in (0, 1)]).state_dict().items() if k != "generators"})
    probe = fresh_task_probe(nets, data=DIGITS, horizons=(2, 5), lrs=(1e-3, 1e-2))
    wide = probe.pivot_table(index=["lr", "replica", "horizon", "split", "metric"], columns="arm", values="value")
    assert (wide.given == wide.fresh).all() and len(wide) == 2*2*(4 + 5 + 5)
    table = probe_table(probe)
    assert (table[["ratio", "low", "high"]] == 1).all(axis=None) and (table.lr_given == table.lr_fresh).all()


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("task", ["pixels", "labels", "regression"])
def test_a_probe_leaves_no_trace(strategy, task):
    "networks, generators, modes, the carried optimizer and torch's generator, bit for bit; and the probe repeats bit for bit"
    nets = Replicas(mlp(normalization="batch", dropout_p=.5), [0, 1], strategy)
    learner = Learner(nets, PermutedPixels(DIGITS, tasks=1), Adam(), epochs=1, defaults=[]).fit(); nets.modules[1].eval()
    memory = lambda: [t.numpy().tobytes() for s in learner.optimizer.state.values() for t in s.values()] + [str(learner.optimizer.param_groups[0]["lr"])]
    was = everything(nets), memory()
    first, again = (fresh_task_probe(nets, task, DIGITS, horizons=(2,), lrs=(.1,), carry=learner.optimizer) for _ in range(2))
    assert (everything(nets), memory()) == was and first.equals(again)
    assert not first.value.equals(fresh_task_probe(nets, task, DIGITS, horizons=(2,), lrs=(.1,), carry=learner.optimizer, seed=1).value)
    assert first.value.notna().all() and ("accuracy" in set(first.metric)) == (task != "regression")


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_a_training_that_was_probed_goes_on_as_if_it_had_not(strategy):
    "a probe and a rollout in the middle of an epoch's steps, as a callback, with continual backprop and dropout: the same bits at the end"
    class Probe(Callback):
        def after_step(self, learner):
            if learner.at.step == 30:
                fresh_task_probe(learner.replicas, data=DIGITS, horizons=(2,), lrs=(1e-2,))
                k_step_gain(learner.replicas, learner.task, ks=(2,), rollouts=2)
    def train(*callbacks):
        nets = Replicas(mlp(dropout_p=.3), [0, 1], strategy)
        learner = Learner(nets, PermutedPixels(DIGITS, tasks=2), Adam(lr=1e-2), epochs=1, callbacks=[ContinualBackprop(replacement_rate=1e-2, maturity_threshold=5), *callbacks]).fit()
        return [p.detach() for p in nets.params.values()], learner.records
    (plain, a), (probed, b) = train(), train(Probe())
    assert all(torch.equal(p, q) for p, q in zip(plain, probed)) and a.equals(b)


def test_an_optimizer_can_come_along():
    "the carried memory is used by the given arm alone, at the probe's own step size; another kind is refused"
    nets = Replicas(mlp(), [0, 1]); learner = Learner(nets, PermutedPixels(DIGITS, tasks=1), Adam(lr=.05), epochs=1, defaults=[]).fit()
    how = dict(data=DIGITS, horizons=(1,), lrs=(1e-3,))
    alone, along = fresh_task_probe(nets, **how), fresh_task_probe(nets, carry=learner.optimizer, **how)
    for arm, same in (("given", False), ("fresh", True)):
        a, b = (one(p, arm=arm, horizon=1, split="train", metric="loss") for p in (alone, along)); assert ((a == b).all()) == same
    still = fresh_task_probe(nets, carry=learner.optimizer, **how | dict(lrs=(0.,)))
    assert (one(still, arm="given", horizon=1, split="train", metric="loss") == one(still, arm="given", horizon=0, split="train", metric="loss")).all()
    with pytest.raises(LopError, match="Adam.*SGD"): fresh_task_probe(nets, carry=learner.optimizer, optimizer=SGD(), **how)


def test_any_task_will_do():
    "a stream of another kind, whose examples are bits and whose loss is a squared error: losses and areas, no accuracy"
    nets, task = Replicas(partial(MLP, 20, 1, hidden_sizes=[5, 5], normalization="none", dropout_p=0.), [0, 1]), BitFlips(tasks=2, examples=300, seeds=[0, 1])[1]
    probe = fresh_task_probe(nets, task, horizons=(1, 20), lrs=(1e-2,))
    assert set(probe.metric) == {"loss", "area"} and probe.value.notna().all() and set(probe.horizon) == {0, 1, 20}
    x, y = task.train.fetch(torch.arange(300).expand(2, -1))
    with nets.evaluating(): want = (nets(x)[..., 0] - y).square().mean(1)
    assert torch.allclose(torch.tensor(one(probe, arm="given", horizon=0, split="train", metric="loss")), want.double(), rtol=1e-5)
    assert torch.allclose(rollout_losses(nets, task, ks=(1,), rollouts=2)[0][:, 0], want.double(), rtol=1e-5)


def test_each_side_has_its_own_best_step_size():
    "the lowest mean for losses, the lowest mean area for areas, the test examples choose nothing, and what diverged in one replica is never best"
    rows = [dict(arm=a, lr=lr, replica=r, horizon=5, split=s, metric=m, value=v + r) for a, lr, s, m, v in [
        ("given", .1, "train", "loss", 3.), ("given", .2, "train", "loss", 2.), ("given", .1, "test", "loss", 0.), ("given", .2, "test", "loss", 9.), ("given", .1, "train", "area", 1.), ("given", .2, "train", "area", 4.),
        ("fresh", .1, "train", "loss", 1.), ("fresh", .2, "train", "loss", float("nan")), ("fresh", .1, "test", "loss", 3.5), ("fresh", .2, "test", "loss", 9.), ("fresh", .1, "train", "area", 2.), ("fresh", .2, "train", "area", 1.)] for r in (0, 1)]
    rows[14]["value"] = -100.          # fresh, .2: one replica is splendid, the other NaN
    table = probe_table(_best(pd.DataFrame(rows))).set_index(["split", "metric"])
    assert table.lr_given.to_dict() == {("test", "loss"): .2, ("train", "area"): .1, ("train", "loss"): .2}
    assert table.lr_fresh.to_dict() == {("test", "loss"): .1, ("train", "area"): .2, ("train", "loss"): .1}
    assert table.loc[("train", "loss"), "ratio"] == pytest.approx(2.5/1.5) and table.loc[("test", "loss"), "ratio"] == pytest.approx(9.5/4) and table.loc[("train", "area"), "ratio"] == 1


def test_a_module_needs_to_say_what_a_fresh_one_is():
    nets, how = Replicas(mlp(), [0]), dict(data=DIGITS, horizons=(2,), lrs=(1e-2,))
    with pytest.raises(LopError, match="fresh="): fresh_task_probe(nets.modules[0], **how)
    assert fresh_task_probe(nets.modules[0], fresh=mlp(), **how).equals(fresh_task_probe(nets, **how))
    wider = fresh_task_probe(nets, fresh=mlp(hidden_sizes=[64, 64]), **how)
    assert (one(wider, arm="given", horizon=2, split="train", metric="loss") == one(fresh_task_probe(nets, **how), arm="given", horizon=2, split="train", metric="loss")).all()


def test_ctrl_c_is_not_swallowed():
    class Impatient(Callback):
        def after_step(self, learner): learner.stopping = learner.at.step == 2
    with pytest.raises(KeyboardInterrupt): fresh_task_probe(Replicas(mlp(), [0]), data=DIGITS, horizons=(5,), lrs=(1e-2,), callbacks=lambda: [Impatient()])


def test_what_the_probe_refuses():
    nets = Replicas(mlp(), [0])
    with pytest.raises(LopError, match="data="): fresh_task_probe(nets, "pixels")
    with pytest.raises(LopError, match="labels"): fresh_task_probe(nets, "label", DIGITS)
    for horizons in ((), (0, 5)):
        with pytest.raises(LopError, match="at least 1"): fresh_task_probe(nets, data=DIGITS, horizons=horizons)
    with pytest.raises(LopError, match="normalization=none"): rescale_units(Replicas(mlp(normalization="layer"), [0]), 1.)
    for values in ([[1., 2]], [[1.], [2]]):
        with pytest.raises(LopError, match="at least 2"): icc(values)


@pytest.mark.parametrize("net", [mlp(), partial(CNN, 1, 8, 10, conv_channels=[4, 6], fc_hidden_units=[8], pool_size=[2, 1], normalization="none", dropout_p=0.)])
def test_rescaling_keeps_the_function_and_nothing_else(net):
    nets = Replicas(net, [0, 1], dtype=torch.float64); x, _ = PermutedPixels(DIGITS, tasks=1, seeds=[0, 1])[0].train.fetch(torch.arange(40).expand(2, -1))
    was, params = nets(x.double()), {k: p.detach().clone() for k, p in nets.params.items()}
    rescale_units(nets, 1.)
    assert (nets(x.double()) - was).abs().max() < 1e-12
    assert all((nets.params[k] != p).any() for k, p in params.items() if k != "out.bias") and torch.equal(nets.params["out.bias"], params["out.bias"])
    ratio = next(v / params[k] for k, v in nets.params.items()).flatten(2)
    assert (ratio - ratio[:, :, :1]).abs().max() < 1e-9 and ratio[..., 0].unique().numel() == ratio[..., 0].numel(), "each unit has one factor of its own"


def test_icc_is_the_anova():
    "by hand for 5 networks and 3 probes; no difference between networks gives about -1/(k-1) at worst"
    v = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(5)[:, None]
    between = sum(3*(row.mean() - v.mean())**2 for row in v) / 4; within = sum((row - row.mean()).square().sum() for row in v) / 10
    assert icc(v) == pytest.approx(float((between - within) / (between + 2*within)))
    assert icc(v * 7 - 3) == pytest.approx(icc(v)) and icc([[0., 2, 4], [4, 0, 2]]) == pytest.approx(-.5)
