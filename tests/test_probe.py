"""The probes against a rollout written out, and for what they leave behind: nothing."""
import copy
from dataclasses import replace
from functools import partial

import pytest, torch, torch.nn.functional as F

from lop_nb.data import load
from lop_nb.learner import Learner, evaluate
from lop_nb.models import CNN, MLP
from lop_nb.probe import _pick, k_step_gain, rollout_losses
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
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
