"Pairs in the right order, against a slow loop; a case where the answer is known; networks of many moments side by side are the networks one by one."
import itertools
import math
from functools import partial

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lop_nb.bitflips import BitFlips, BitView, Regression
from lop_nb.chains import CNN, MLP
from lop_nb.config import SGD
from lop_nb.data import load
from lop_nb.gradients import example_gradients, local_redundancy, output_gradients, task_readiness
from lop_nb.learner import Learner
from lop_nb.metrics import known
from lop_nb.monitor import as_rows, with_slopes
from lop_nb.ranking import (Keep, all_values, directions, example_gram, gains, gradient_values, held_out, kernel_values, rank_measures, ranking_accuracy, score, stacked_nets,
                            undecided, unit_names)
from lop_nb.ranks import effective_rank, energy_rank
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels

plain = dict(normalization="none", dropout_p=0.)
small = st.sampled_from([0., 1., 2., 3., -1., math.nan])


def slow_accuracy(m, g, higher, error):
    "from the definition, pair by pair"
    right = total = 0
    for i, j in itertools.combinations(range(len(m)), 2):
        if math.isnan(g[i]) or math.isnan(g[j]) or g[i] == g[j]: continue
        if error is not None and abs(g[i] - g[j]) <= 2*math.hypot(error[i], error[j]): continue
        total += 1
        if math.isnan(m[i]) or math.isnan(m[j]) or m[i] == m[j]: right += .5
        else: right += ((m[i] > m[j]) == (g[i] > g[j])) == higher
    return right/total if total else math.nan


@given(st.lists(st.tuples(small, small, st.sampled_from([0., .3, 1.])), min_size=2, max_size=8), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_accuracy_is_the_share_of_pairs_counted_one_by_one(rows, higher, with_error):
    m, g, e = map(list, zip(*rows)); e = e if with_error else None
    got, want = ranking_accuracy(m, g, higher, e).item(), slow_accuracy(m, g, higher, e)
    assert math.isnan(got) and math.isnan(want) or math.isclose(got, want, abs_tol=1e-12)


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_order_is_all_that_counts_and_streams_stand_apart(seed):
    m, g = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = ranking_accuracy(m, g)
    assert torch.equal(a, ranking_accuracy(m.exp(), 3*g - 1)) and torch.allclose(a, 1 - ranking_accuracy(m, g, higher=False))
    assert torch.allclose(a, 1 - ranking_accuracy(-m, g)) and torch.equal(a[1], ranking_accuracy(m[1], g[1]))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed)); assert torch.allclose(a, ranking_accuracy(m[:, order], g[:, order]))


def test_undecided_is_the_share_within_twice_the_error():
    assert undecided([0., 1., 5.], [.1, .1, .1]) == 0 and undecided([0., 1., 5.], [1., 1, 1]).item() == pytest.approx(1/3)
    assert undecided([1., 1., 1.], [0., 0, 0]) == 1


def test_a_single_checkpoint_is_refused():
    with pytest.raises(LopError, match="at least two checkpoints"): ranking_accuracy([1.], [1.])


# ---- the answer is known

def half_dead(dead, seeds=(0, 1)):
    "one hidden layer of four units that say 1 or, `dead` of them, nothing; outputs from zero"
    nets = Replicas(partial(MLP, 2, 1, hidden_sizes=[4], **plain), seeds)
    with torch.no_grad():
        for p in nets.params.values(): p.zero_()
        bias = nets.params["linear_0.bias"]; bias.fill_(1.); bias[:, :dead] = -100.
    return dict(params={k: p.detach().clone() for k, p in nets.params.items()}, buffers={})


def one_example(seeds):
    R = len(seeds); view = BitView(torch.ones(R, 1, 2), torch.full((R, 1), 3.), torch.zeros(R, 1, dtype=torch.int64))
    return [Regression("three", 0, view, None, view)]


def test_where_dead_units_are_all_that_matters_they_rank_perfectly():
    """the clock shows the number of dead units, too. f = 0 at first, loss y²; each living unit and the bias add 2η to what one step on the only example moves the output by: gain 1 − (1 − 2η(living + 1))²"""
    nets = Replicas(partial(MLP, 2, 1, hidden_sizes=[4], **plain), (0, 1)); kept = {d: half_dead(d) for d in (3, 0, 2, 4, 1)}
    frame = score(nets, kept, one_example, partial(all_values, few=1), dict(published=dict(ks=(1, 3), lr=.01, rollouts=2)), at_once=2)
    gain = frame[(frame.metric == "gain_1") & (frame.seed == 0)].set_index("after").value
    for d, g in gain.items(): assert g == pytest.approx(1 - (1 - .02*(4 - d + 1))**2, abs=1e-6)
    assert (frame[frame.metric == "gain_1_error"].value == 0).all()
    for target in "gain_1", "gain_3", "end_1", "end_3":
        t = rank_measures(frame, target)
        assert (t.loc[["tasks_learnt", "dead_fraction", "frozen_fraction", "gradient_norm", "strength", "readiness", "local_redundancy"], "accuracy"] == 1).all()
        assert (t.loc[["weight_norm", "distance_from_init", "loss", "reliability"], "accuracy"] == .5).all()      # the same for all
        assert t.low["dead_fraction"] == t.high["dead_fraction"] == 1 and t.undecided["loss"] == 0
        assert t.accuracy["top_eigenvalue"] == 0 and t.free["top_eigenvalue"] == 1                             # the more live, the sharper: theory's sign is wrong here
    assert set(t.index) == set(directions)
    with pytest.raises(LopError, match="There is no gain_2"): rank_measures(frame, "gain_2")
    with pytest.raises(LopError, match="of rollout 'mine'"): rank_measures(frame, "gain_1", "mine")


def test_every_measure_has_a_direction():
    assert set(directions) >= set(unit_names) and set(unit_names) == set(known) - {"update_norm"}
    assert set(directions.values()) == {-1, 0, 1}


def test_checkpoints_before_from_are_left_out_and_errors_are_of_means_over_tasks():
    rows = [dict(after=a, task=t, seed=s, rollout=r, metric=m, value=v) for a in range(4) for t in (0, 1) for s in (0, 1)
            for r, m, v in (("", "loss", -a if a else 9), ("published", "gain_1", a + t), ("published", "gain_1_error", 1.2))]
    frame = pd.DataFrame(rows)
    assert rank_measures(frame, "gain_1").accuracy["loss"] == .0                              # 9 > −1 > −2 > −3, and the gains rise
    assert rank_measures(frame, "gain_1", directions=dict(loss=-1), from_=1).accuracy["loss"] == 1
    u = 2*math.hypot(*[math.hypot(1.2, 1.2)/2]*2)                                            # 2.4: three of six pairs differ by 1, two by 2, one by 3
    assert u == pytest.approx(2.4) and rank_measures(frame, "gain_1").undecided["loss"] == pytest.approx(5/6)
    assert rank_measures(frame, "gain_1", decided=True).accuracy["loss"] == 0


# ---- the parts

def old(make, seeds, strategy="loop"):
    nets = Replicas(make, seeds, strategy)
    with torch.no_grad():
        for p in nets.params.values(): p.mul_(1.5)
    return nets


@pytest.mark.parametrize("kw", [dict(hidden_sizes=[8, 6]), dict(hidden_sizes=[7], bias=False), dict(hidden_sizes=[8], normalization="layer")], ids=["linear layers", "no bias", "with layer norm"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_grams_are_inner_products_of_gradients(kw, strategy):
    nets = old(partial(MLP, 64, 10, **plain | kw), (1, 4), strategy); task = PermutedPixels(load("digits"), tasks=1, seeds=(1, 4))[0]
    x, y = task.train.fetch(torch.arange(9).expand(2, -1))
    g = example_gradients(nets, x, y, task.loss).double()
    assert torch.allclose(example_gram(nets, x, output_gradients(nets, x, y, task.loss)[1][:, :, None]), g @ g.mT, atol=1e-4, rtol=1e-5)
    J = torch.stack([torch.stack([torch.cat([t.flatten() for t in torch.autograd.grad(m(one[None])[0, k], list(m.parameters()))]) for one in xs for k in range(10)]) for m, xs in zip(nets.modules, x)]).double()
    assert torch.allclose(example_gram(nets, x, torch.eye(10).expand(2, 9, 10, 10)), J @ J.mT, atol=1e-3, rtol=1e-5)
    v = kernel_values(nets, task, x)
    assert torch.allclose(v["kernel_rank"], effective_rank(J), rtol=1e-3) and torch.equal(v["kernel_energy_rank"], energy_rank(J))
    assert torch.allclose(v["local_redundancy"], local_redundancy(nets, x).double(), rtol=1e-4)


def test_a_convolutional_network_takes_the_long_way():
    nets = Replicas(partial(CNN, 1, 8, 10, conv_channels=[3], fc_hidden_units=[5], **plain), (0, 2)); task = PermutedPixels(load("digits"), tasks=1, seeds=(0, 2))[0]
    x, y = task.train.fetch(torch.arange(6).expand(2, -1)); g = example_gradients(nets, x, y, task.loss).double()
    assert torch.allclose(example_gram(nets, x, output_gradients(nets, x, y, task.loss)[1][:, :, None]), g @ g.mT, rtol=1e-5, atol=1e-7)
    assert {n for n, v in all_values(nets, held_out(PermutedPixels(load("digits"), tasks=1, seeds=(0, 2)), [0], examples=12)[0], nets.params, few=6).items() if v.shape != (2,)} == set()


def test_readiness_is_that_of_gradients_and_only_the_task_s_classes_count():
    stream = ClassSplit(load("digits"), tasks=5, classes_per_task=2, seeds=(0, 2)); task = held_out(stream, [3], examples=20)[0]
    nets = old(partial(MLP, 64, 10, hidden_sizes=[8], **plain), (0, 2))
    x, y = task.train.fetch(torch.arange(20).expand(2, -1)); mine, theirs = gradient_values(nets, task, x, y, batch=3), task_readiness(nets, task, batch=3)
    for k, v in theirs.items(): assert torch.allclose(mine[k].double(), v.double(), rtol=1e-4), k
    assert torch.allclose(kernel_values(nets, task, x)["local_redundancy"], local_redundancy(nets, x, classes=task.active).double(), rtol=1e-4)
    regression = BitFlips(tasks=1, examples=9, seeds=(0, 2))[0]; nets = old(partial(MLP, 20, 1, hidden_sizes=[5], **plain), (0, 2)); x, y = regression.train.fetch(torch.arange(9).expand(2, -1))
    assert torch.allclose(kernel_values(nets, regression, x)["local_redundancy"], local_redundancy(nets, x, "regression").double(), rtol=1e-4)


def test_slopes_are_those_of_the_activation():
    nets = old(partial(MLP, 64, 10, hidden_sizes=[8, 6], activation="tanh", **plain), (0, 2)); x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    s = as_rows(nets, with_slopes(nets, x, [g.site for g in nets.graph])); site = nets.graph[0].site
    z = torch.stack([m.get_submodule("linear_0")(one) for m, one in zip(nets.modules, x)])
    assert torch.allclose(s[site], 1 - z.tanh()**2, atol=1e-6) and not nets.modules[0].get_submodule(site)._forward_pre_hooks and not nets.modules[0].get_submodule(site)._forward_hooks


def test_networks_kept_along_a_stream_side_by_side_are_the_same_networks():
    seeds = (3, 5); nets, keep = Replicas(partial(MLP, 20, 1, hidden_sizes=[5, 5], **plain), seeds), Keep(every=2); start = {k: p.detach().clone() for k, p in nets.params.items()}
    Learner(nets, BitFlips(tasks=5, examples=40), SGD(lr=.05, momentum=0.), epochs=1, batch_size=4, callbacks=[keep], defaults=[]).fit()
    assert list(keep.kept) == [0, 2, 4] and all(torch.equal(start[k], v) for k, v in keep.kept[0]["params"].items())
    assert not torch.equal(keep.kept[4]["params"]["out.bias"], nets.params["out.bias"])              # one more task since, on memory of their own
    many = stacked_nets(nets, [keep.kept[0], keep.kept[4]]); x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    assert many.seeds == [3, 5, 3, 5] and all(torch.equal(many.params[k][2:], v) for k, v in keep.kept[4]["params"].items())
    for part, state in enumerate((keep.kept[0], keep.kept[4])):
        nets.load_state_dict(state); assert torch.allclose(many(x.repeat(2, 1, 1))[2*part:2*part + 2], nets(x), atol=1e-6)


def test_scores_don_t_depend_on_how_many_are_tried_at_once():
    seeds = (3, 5); nets, keep = Replicas(partial(MLP, 20, 1, hidden_sizes=[5, 5], **plain), seeds), Keep()
    Learner(nets, BitFlips(tasks=3, examples=40), SGD(lr=.05, momentum=0.), epochs=1, batch_size=4, callbacks=[keep], defaults=[]).fit()
    beyond = BitFlips(tasks=30, examples=1); tasks = lambda seeds: held_out(beyond.seeded(seeds), (10, 20), "test")
    a, b = (score(nets, keep.kept, tasks, all_values, dict(published=dict(ks=(1, 4), rollouts=3)), at_once=n) for n in (1, 4))
    both = a.merge(b, on=["after", "seed", "task", "rollout", "metric"])
    assert len(a) == len(b) == len(both) and set(a.after) == {0, 1, 2, 3} and set(a.task) == {10, 20}
    assert torch.allclose(*(torch.tensor(both[c].to_numpy()) for c in ("value_x", "value_y")), rtol=1e-3, atol=1e-5, equal_nan=True)


def test_gains_are_relative_to_the_loss_before_and_a_perfect_network_gains_nothing():
    nets = Replicas(partial(MLP, 2, 1, hidden_sizes=[4], **plain), (0, 1)); task = one_example(nets.seeds)[0]
    g = gains(nets, task, ks=(2,), rollouts=3); before = task.loss(nets(task.train.x), task.train.y).mean(1).double()
    assert torch.allclose(g["gain_2"], 1 - g["end_2"]/before) and set(g) == {"gain_2", "gain_2_error", "end_2", "end_2_error"}
    with torch.no_grad():
        for p in nets.params.values(): p.zero_()
        nets.params["out.bias"].fill_(3.)
    assert torch.equal(gains(nets, task, ks=(2,), rollouts=3)["gain_2"], torch.zeros(2, dtype=torch.float64))
