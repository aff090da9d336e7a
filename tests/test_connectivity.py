"""Segments between networks: against networks put together by hand, and children that share exactly what they should."""
import copy
from dataclasses import replace
from functools import partial

import pytest, torch, torch.nn.functional as F
from torch import nn

from lop_nb.config import SGD, Adam
from lop_nb.connectivity import between, children, instability, norms, path, reestimate_norms
from lop_nb.data import load
from lop_nb.learner import Callback, Learner
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels

DIGITS = load("digits")
plain = partial(PermutedPixels, DIGITS, tasks=1, first_permuted=False)
mlp = lambda **kw: partial(MLP, 64, 10, **dict(dict(hidden_sizes=[16], normalization="none", dropout_p=0.), **kw))
NORMED = dict(
    mlp=mlp(normalization="batch", dropout_p=.5), cnn=partial(CNN, 1, 8, 10, conv_channels=[3], fc_hidden_units=[6], dropout_p=.5),
    resnet=partial(ResNet, 1, 8, 10, layers=[1, 1], base_channels=3, dropout_p=.5), vit=partial(ViT, 1, 8, 10, patch_size=4, embed_dim=6, depth=1, n_heads=2, normalization="batch"))


def small(view, n): return replace(view, rows=view.rows[:, :n])


def everything(nets): return [t.detach().clone() for t in (*nets.params.values(), *nets.buffers.values())] + [g for m in nets.modules for g in [torch.tensor(m.training)]]


# ---- the segment ----
def test_the_ends_are_the_networks_and_the_middle_is_theirs():
    a, b = (Replicas(mlp(normalization="batch"), [0, 1]) for _ in range(2)); b.reset("other")
    for α, want in ((0., a), (1., b)): assert all(torch.equal(v, want.params[k]) for k, v in between(a.params, b.params, α).items())
    half = between(a.params, b.params, .25); assert all((half[k] - (.75*a.params[k] + .25*b.params[k])).abs().max() < 1e-6 and not half[k].requires_grad for k in half)
    assert all(v.dtype == a.buffers[k].dtype for k, v in between(a.buffers, b.buffers, .5).items())
    with pytest.raises(LopError, match="no segment"): between(a.params, Replicas(mlp(hidden_sizes=[8], normalization="batch"), [0, 1]).params, .5)
    with pytest.raises(LopError, match="no segment"): between(a.params, Replicas(mlp(normalization="batch"), [0]).params, .5)


def test_instability_by_hand():
    assert instability(torch.tensor([[.1, .5, .2], [.3, .2, .1], [.1, .1, .1]], dtype=torch.float64)).tolist() == pytest.approx([.35, .1, 0])


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_errors_on_the_path_are_those_of_networks_made_by_hand(strategy):
    "plain modules with (1 − α)W¹ + αW², on a task of some classes, module by module"
    stream = ClassSplit(DIGITS, partitions=[[1, 8, 3]], seeds=[0, 1]); task = stream[0]
    a, b = Replicas(mlp(), [0, 1], strategy), Replicas(mlp(), [2, 3], strategy); before = everything(a), everything(b)
    got = path(a, b, task, points=4)
    assert set(got) == {(s, k) for s in ("train", "test") for k in ("loss", "error")} and all(v.shape == (2, 4) and v.dtype == torch.float64 for v in got.values())
    for r in range(2):
        for i, α in enumerate((0, 1/3, 2/3, 1)):
            m = copy.deepcopy(a.modules[r]); m.load_state_dict({k: (1 - α)*v + α*b.modules[r].state_dict()[k] for k, v in m.state_dict().items()})
            for s in ("train", "test"):
                view = getattr(task, s); x, y = view.fetch(torch.arange(view.n).expand(2, -1)); ids = torch.tensor([1, 3, 8])
                with torch.no_grad(): z = m.eval()(x[r])[:, ids]
                t = torch.searchsorted(ids, y[r]); assert abs(got[s, "loss"][r, i] - F.cross_entropy(z, t)) < 1e-5 and abs(got[s, "error"][r, i] - (z.argmax(1) != t).double().mean()) < 1e-6
    assert all(torch.equal(x, y) for old, new in zip(before, (everything(a), everything(b))) for x, y in zip(old, new))
    few = path(a, b, task, points=2, splits=("test",), examples=7); assert set(few) == {("test", "loss"), ("test", "error")}
    assert abs(few["test", "error"]*7 - (few["test", "error"]*7).round()).max() < 1e-5


def test_a_convex_loss_has_no_barrier():
    "softmax regression: the loss on the segment is below the chord"
    a, b = (Learner(Replicas(mlp(hidden_sizes=[]), range(2)), plain(), SGD(lr=.05), epochs=1, batches=name, defaults=[]).fit().replicas for name in ("", "x"))
    L = path(a, b, plain().seeded(range(2))[0], points=9)["train", "loss"]; α = torch.linspace(0, 1, 9)
    assert (L <= (1 - α)*L[:, :1] + α*L[:, -1:] + 1e-6).all()


def test_faults_are_named():
    a, task = Replicas(mlp(), [0, 1]), plain().seeded([0, 1])[0]
    with pytest.raises(LopError, match="points=1"): path(a, a, task, points=1)
    task.test = None
    with pytest.raises(LopError, match="splits"): path(a, a, task)


# ---- norms ----
@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_statistics_are_those_of_the_data(name, strategy):
    "every norm of every network: mean and unbiased variance of its inputs when all examples come at once, dropout off; modes and momentum as before"
    nets, view = Replicas(NORMED[name], [0, 1], strategy), small(plain().seeded([0, 1])[0].train, 60)
    for b in nets.buffers.values(): b.add_(3)
    state = torch.get_rng_state(), [g["dropout"].get_state() for g in nets.generators]
    reestimate_norms(nets, view, batch=1000)
    assert torch.equal(state[0], torch.get_rng_state()) and all(torch.equal(s, g["dropout"].get_state()) for s, g in zip(state[1], nets.generators))
    assert all(m.training for one in nets.modules for m in one.modules()) and all(m.momentum == .1 for ms in norms(nets) for m in ms) and all(norms(nets))
    x, _ = view.fetch(torch.arange(60).expand(2, -1))
    for r, module in enumerate(copy.deepcopy(nets.modules)):
        module.eval(); seen = {}
        for n, m in module.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.train(); m.register_forward_pre_hook(lambda m, args, n=n: seen.update({n: args[0].movedim(1 if args[0].ndim == 4 else -1, -1).flatten(0, -2)}))
        with torch.no_grad(): module(x[r])
        assert seen
        for n, z in seen.items():
            assert torch.allclose(nets.buffers[f"{n}.running_mean"][r], z.mean(0), atol=1e-4), n
            assert torch.allclose(nets.buffers[f"{n}.running_var"][r], z.var(0), rtol=1e-3, atol=1e-5) and nets.buffers[f"{n}.num_batches_tracked"][r] == 1, n


def test_statistics_are_plain_means_over_batches_and_of_rows_that_are_there():
    nets = Replicas(mlp(normalization="batch"), [0, 1]); view = plain().seeded([0, 1])[0].train
    rows = view.rows[:, :40].clone(); rows[1, 30:] = -1; view = replace(view, rows=rows)
    reestimate_norms(nets, view, batch=20)
    x, _ = view.fetch(torch.arange(40).expand(2, -1)); z = [m.linear_0(x[r].flatten(1)).detach() for r, m in enumerate(nets.modules)]
    for r, parts in enumerate(((z[0][:20], z[0][20:]), (z[1][:20], z[1][20:30]))):
        assert torch.allclose(nets.buffers["norm_0.running_mean"][r], sum(p.mean(0) for p in parts)/2, atol=1e-5)
        assert torch.allclose(nets.buffers["norm_0.running_var"][r], sum(p.var(0) for p in parts)/2, rtol=1e-3)


def test_only_estimated_statistics_are_right_between_networks():
    "far apart, trained: the middle with interpolated statistics is far worse on the training examples than with its own; without norms both ways are one"
    make = mlp(hidden_sizes=[32]*2, normalization="batch"); task = plain().seeded(range(2))[0]
    a, b = (Learner(Replicas(make, s), plain(), Adam(lr=1e-2), epochs=2, defaults=[]).fit().replicas for s in (range(2), range(2, 4)))
    b.seeds = a.seeds
    right, wrong = (path(a, b, task, points=5, splits=("train",), reestimate=how)["train", "loss"] for how in (True, False))
    assert (right[:, 2] < .7*wrong[:, 2]).all() and (right[:, 0] - wrong[:, 0]).abs().max() < .05
    c, d = Replicas(mlp(), range(2)), Replicas(mlp(), range(2, 4))
    assert all(torch.equal(*(path(c, d, task, points=3, reestimate=how)[s, "loss"] for how in (True, False))) for s in ("train", "test"))


# ---- children ----
class Watch(Callback):
    "every step's weights and moments"
    def __init__(self): self.seen = []
    def after_step(self, learner):
        self.seen.append([p.detach().clone() for p in learner.replicas.params.values()] + [b.clone() for b in learner.replicas.buffers.values()]
                         + [v.clone() for s in learner.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)])


def makers(logs, epochs=2, tasks=1):
    def make(batches):
        logs.append(Watch())
        return Learner(Replicas(mlp(normalization="batch", dropout_p=.2), [3, 5]), PermutedPixels(DIGITS, tasks=tasks), Adam(lr=1e-2), epochs=epochs, batch_size=256, batches=batches, callbacks=[logs[-1]], defaults=[])
    return make


same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("part", [0, 1, 4, 6, 8])
def test_children_are_one_until_they_part(part):
    "6 steps an epoch, 12 in all: the trunk is an ordinary training, each child goes on from its state, and sees other examples than its sibling"
    logs = []; make = makers(logs); one, two = children(make, part); *trunk, a, b = (w.seen for w in logs)
    alone = make("").fit(); whole = logs[-1].seen
    assert len(whole) == 12 and len(a) == len(b) == 12 - part and all(same(x, y) for x, y in zip(trunk[0], whole)) and len(trunk[0]) == part
    assert not same(a[0], b[0]) and not same(a[0], whole[part]) and one.at.step == two.at.step == alone.at.step == 12
    assert not any(torch.equal(one.replicas.params[k], two.replicas.params[k]) for k in one.replicas.params)


def test_children_go_on_from_the_trunks_own_state():
    "children whose batches bear the trunk's name go where the trunk would have gone, the second as the first: weights, statistics, moments, dropout, place in the epoch"
    logs = []; make = makers(logs); both = children(lambda batches: make(""), 4); alone = make("").fit()
    for one in both: assert same([*one.replicas.params.values(), *one.replicas.buffers.values()], [*alone.replicas.params.values(), *alone.replicas.buffers.values()])


def test_children_that_part_at_the_end_or_in_a_later_task():
    make = makers([]); ends = children(make, 12); assert same(ends[0].replicas.params.values(), ends[1].replicas.params.values())
    with pytest.raises(LopError, match="the training has 12"): children(make, 13)
    logs = []; later = children(makers(logs, tasks=2), 12 + 3, count=3)
    assert [len(w.seen) for w in logs] == [15, 9, 9, 9] and all(c.at.task == 1 and c.finished for c in later) and not same(logs[1].seen[0], logs[3].seen[0])


def test_a_segment_of_one_ticket_stays_in_its_mask():
    masks = {k: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < .4 for k, p in Replicas(mlp(), [3, 5]).params.items() if p.ndim > 2}
    class Hold(Callback):
        def hold(self, learner):
            with torch.no_grad():
                for k, m in masks.items(): learner.replicas.params[k].mul_(m)
        before_fit = after_step = hold
    def make(batches):
        return Learner(Replicas(mlp(), [3, 5]), plain(), Adam(lr=1e-2), epochs=1, batch_size=256, batches=batches, callbacks=[Hold()], defaults=[])
    one, two = children(make, 2)
    for α in (0, .1, .5, 1): mid = between(one.replicas.params, two.replicas.params, α); assert all((mid[k][~m] == 0).all() and (mid[k][m] != 0).all() for k, m in masks.items())
