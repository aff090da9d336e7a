"""Gradients example by example, readiness and local redundancy: against loops, closed forms and enumerated expectations."""
import itertools
from functools import partial

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lop_nb import gradients
from lop_nb.data import load
from lop_nb.gradients import (batch_square, debiased, example_gradients, gradient_alignment, gradient_norm, local_redundancy, mean_gradient, moments, output_gradients, pullback_squares,
                              readiness, reliability, sampled_square, strength, task_readiness, zero_gradient_share)
from lop_nb.models import CNN, MLP
from lop_nb.ranks import effective_rank, stable_rank
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.streams import ClassSplit, PermutedPixels
from lop_nb.units import gather, scatter

DIGITS = load("digits")
mlp = partial(MLP, 64, 10, hidden_sizes=[8, 6], normalization="batch", dropout_p=.3)
cnn = partial(CNN, 1, 8, 10, conv_channels=[4], fc_hidden_units=[8], pool_size=1, normalization="batch", dropout_p=.3)
gauss = lambda *size, seed=0: torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
seeds = st.integers(0, 2**31)


def some(net=mlp, n=12, strategy="loop", warm=True):
    "two replicas with running statistics of their own, and examples of a task of three classes"
    nets, task = Replicas(net, [3, 4], strategy, dtype=torch.float64), ClassSplit(DIGITS, tasks=None, classes_per_task=3, seeds=[3, 4])[0]
    x, y = task.train.fetch(torch.arange(0, 20*n, 20).expand(2, -1)); x = x.double()
    if warm:
        with torch.no_grad(): nets.train()(x * 2 + 1)
    return nets, task, x, y


def loop(nets, task, x, y, r, i):
    "the gradient of one example by backward through one module, the classes sliced"
    net, ids = nets.modules[r].eval(), task.classes[r].nonzero()[:, 0]
    loss = F.cross_entropy(net(x[r, i:i + 1])[:, ids], torch.searchsorted(ids, y[r, i:i + 1]))
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# ---- the gradient of each example ----
@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_each_example_is_backward_through_it_alone(net, strategy):
    nets, task, x, y = some(net, strategy=strategy)
    g, losses = example_gradients(nets, x, y, task.loss), output_gradients(nets, x, y, task.loss)[0]
    for r, i in itertools.product(range(2), range(0, 12, 3)):
        loss, slow = loop(nets, task, x, y, r, i)
        assert (g[r, i] - slow).abs().max() < 1e-12 and abs(losses[r, i] - loss) < 1e-12
    assert (mean_gradient(nets, x, y, task.loss) - g.mean(1)).abs().max() < 1e-12


def test_a_module_is_one_replica():
    nets, task, x, y = some()
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    both = example_gradients(nets, x, y, loss)
    assert (example_gradients(nets.modules[1], x[1:], y[1:], loss)[0] - both[1]).abs().max() < 1e-14


def test_chunks_change_nothing(monkeypatch):
    nets, task, x, y = some(cnn)
    whole, m, r = example_gradients(nets, x, y, task.loss), moments(nets, x, y, task.loss), local_redundancy(nets, x, classes=task.classes)
    monkeypatch.setattr(gradients, "chunk_bytes", 1)
    assert (example_gradients(nets, x, y, task.loss) - whole).abs().max() < 1e-14
    for k, v in moments(nets, x, y, task.loss).items(): assert (v - m[k]).abs().max() < 1e-12
    assert (local_redundancy(nets, x, classes=task.classes) - r).abs().max() < 1e-12


def test_nothing_is_left_behind():
    "parameters, running statistics, gradients, modes and random generators are what they were"
    nets, task, x, y = some(); nets.modules[0].act_0.eval()
    def all_of(): return [t.clone() for t in (*nets.params.values(), *nets.buffers.values())], [m.training for net in nets.modules for m in net.modules()], torch.get_rng_state(), [p.grad for net in nets.modules for p in net.parameters()]
    was = all_of()
    moments(nets, x, y, task.loss); mean_gradient(nets, x, y, task.loss); local_redundancy(nets, x)
    now = all_of()
    assert all(torch.equal(a, b) for a, b in zip(was[0], now[0])) and was[1] == now[1] and torch.equal(was[2], now[2]) and was[3] == now[3] == [None]*len(now[3])


def test_one_broken_replica_breaks_no_other():
    nets, task, x, y = some(); before = moments(nets, x, y, task.loss), local_redundancy(nets, x), mean_gradient(nets, x, y, task.loss)
    with torch.no_grad(): nets.params["linear_1.weight"][0, 0, 0] = torch.nan
    after = moments(nets, x, y, task.loss), local_redundancy(nets, x), mean_gradient(nets, x, y, task.loss)
    for a, b in [*zip(before[0].values(), after[0].values()), before[1:2] + after[1:2], (gradient_norm(before[2]), gradient_norm(after[2]))]:
        assert b.isnan().tolist() == [True, False] and torch.equal(a[1], b[1])
    assert zero_gradient_share(after[2]).isnan().tolist() == [True, False]
    assert gradient_alignment(after[2], after[2]).isnan().tolist() == [True, False]


def test_empty_input_is_refused_in_words():
    nets, task, x, y = some()
    for f in (example_gradients, mean_gradient, moments):
        with pytest.raises(LopError, match="at least one example"): f(nets, x[:, :0], y[:, :0], task.loss)
    with pytest.raises(LopError, match="at least one example"): local_redundancy(nets, x[:, :0])


# ---- norm, zeros, alignment, covariance ----
@given(seeds, st.floats(1e-3, 1e3))
def test_alignment_is_a_cosine(seed, scale):
    a, b = gauss(2, 3, 20, seed=seed)
    c = gradient_alignment(a, b)
    assert torch.allclose(c, F.cosine_similarity(a, b, dim=-1), atol=1e-12) and torch.allclose(gradient_alignment(a * scale, b), c, atol=1e-12)
    assert torch.allclose(gradient_alignment(a, -a), -torch.ones(3, dtype=torch.float64))


def test_dead_units_hear_nothing():
    "of a network with 8 units of which 3 are off on every input, exactly their incoming weights and biases and outgoing weights are zero"
    net = MLP(64, 10, hidden_sizes=[8], normalization="none", dropout_p=0., activation="relu")
    with torch.no_grad(): net.linear_0.weight[:] = .1; net.linear_0.bias[:3] = -1e6; net.linear_0.bias[3:] = 1e3; net.out.weight.copy_(gauss(10, 8))
    x = gauss(1, 40, 64).float() + 1; y = torch.arange(40)[None] % 10
    g = mean_gradient(net, x, y, lambda z, y: F.cross_entropy(z.flatten(0, 1) / 1e3, y.flatten(), reduction="none").view(y.shape))
    assert zero_gradient_share(g)[0] == pytest.approx((3*64 + 3 + 3*10) / g.shape[1], abs=1e-7)


def test_rank_of_the_covariance_is_that_of_the_inputs():
    "a linear model with one output: g_i = r_i x_i, so inputs from a plane give gradients of rank 2, and of rank 1 if all lie on a line"
    linear, basis = torch.nn.Linear(10, 1, bias=False, dtype=torch.float64), torch.linalg.qr(gauss(10, 2))[0].T
    for rank, x in ((2, gauss(1, 30, 2) @ basis), (1, gauss(1, 30, 1) @ basis[:1])):
        g = example_gradients(linear, x, gauss(1, 30, 1, seed=5), lambda z, y: (z - y).square().sum(-1) / 2)
        assert (torch.linalg.svdvals(g[0]) > 1e-9).sum() == rank and effective_rank(g)[0] <= rank + 1e-6
    assert stable_rank(g)[0] == pytest.approx(1)


# ---- readiness ----
class Point(torch.nn.Module):
    "f(x) = θ - x"
    def __init__(self, θ): super().__init__(); self.θ = torch.nn.Parameter(θ)
    def forward(self, x): return self.θ - x


@given(seeds, st.floats(.05, 1.95), st.integers(1, 3), st.floats(.1, 10))
@settings(max_examples=20, deadline=None)
def test_the_guarantee_is_met_with_equality_on_a_quadratic(seed, alpha, m, beta):
    "G¹ = α(1 - α/2)/β · OR with Hessian βI, the expectation over all batches, whatever the data"
    θ, c = gauss(3, seed=seed), gauss(1, 4, 3, seed=seed + 1)
    mo = moments(Point(θ), c, torch.zeros(1, 4), lambda z, y: beta/2 * z.square().sum(-1))
    L = lambda θ: beta/2 * (θ - c[0]).square().sum(-1).mean()
    square = batch_square(mo["whole"], mo["each"], m); rel = reliability(mo["whole"], square)[0]
    g = beta * (θ - c[0]); eta = alpha * rel / beta
    after = torch.stack([L(θ - eta * g[list(b)].mean(0)) for b in itertools.product(range(4), repeat=m)]).mean()
    bound = alpha * (1 - alpha/2) / beta * readiness(mo["loss"], mo["whole"], square)[0]
    assert abs((L(θ) - after) / L(θ) - bound) < 1e-10


@given(seeds, st.integers(1, 4), st.booleans())
@settings(max_examples=20, deadline=None)
def test_batch_square_is_the_mean_over_all_batches(seed, m, without):
    g = gauss(4, 6, seed=seed); whole, each = g.mean(0).square().sum(), g.square().sum(1).mean()
    batches = list(itertools.combinations(range(4), m) if without else itertools.product(range(4), repeat=m))
    slow = torch.stack([g[list(b)].mean(0).square().sum() for b in batches]).mean()
    assert abs(batch_square(whole, each, m, 4 if without else None) - slow) < 1e-12
    assert abs(sampled_square(g[None], torch.tensor(batches)[None])[0] - slow) < 1e-12


@given(seeds, st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_debiased_has_no_bias(seed, n):
    "its mean over every sample of n that can be drawn is ‖g‖²; the naive one is too large by the trace of the covariance over n"
    g = gauss(4, 3, seed=seed) + gauss(3, seed=seed + 1); truth, trace = g.mean(0).square().sum(), (g - g.mean(0)).square().sum(1).mean()
    samples = [g[list(s)] for s in itertools.product(range(4), repeat=n)]
    naive = torch.stack([s.mean(0).square().sum() for s in samples]); each = torch.stack([s.square().sum(1).mean() for s in samples])
    assert abs(debiased(naive, each, n).mean() - truth) < 1e-10 and abs(naive.mean() - truth - trace/n) < 1e-10


@given(seeds)
def test_readiness_is_made_of_its_parts(seed):
    loss, whole, square = gauss(3, 5, seed=seed).abs() + .1
    assert torch.allclose(readiness(loss, whole, square), whole**2 / (loss * square))
    assert torch.allclose(strength(loss*7, whole*49), 7*strength(loss, whole)) and torch.allclose(reliability(whole*49, square*49), reliability(whole, square))


def test_nothing_to_learn_is_not_ready():
    zero, one = torch.zeros(1), torch.ones(1)
    assert strength(zero, one) == strength(one, zero) == reliability(zero, zero) == readiness(zero, zero, zero) == readiness(zero, one, one) == 0
    assert readiness(torch.tensor([torch.nan, 1.]), torch.ones(2), torch.ones(2)).isnan().tolist() == [True, False]


def test_a_task_and_its_definition():
    "whole-task readiness from a loop over examples, with a replica that has fewer of them; the unused rows count for nothing"
    task, nets = ClassSplit(DIGITS, partitions=[[1, 2]], seeds=[0, 1])[0], Replicas(mlp, [0, 1])
    task.train.rows = task.train.rows[:, :30].clone(); task.train.rows[1, 11:] = -1
    x, y = task.train.fetch(torch.arange(30).expand(2, -1)); got = task_readiness(nets, task, batch=4)
    for r, n in ((0, 30), (1, 11)):
        losses, gs = zip(*[loop(nets, task, x, y, r, i) for i in range(n)])
        g = torch.stack(gs).double(); whole, L = g.mean(0).square().sum(), sum(losses)/n
        square = whole*3/4 + g.square().sum(1).mean()/4
        want = dict(loss=L, gradient_norm=whole**.5, strength=whole/L, reliability=whole/square, readiness=whole**2/(L*square))
        for k, v in want.items(): assert float(got[k][r]) == pytest.approx(float(v), rel=1e-4), k


def test_duplicated_and_shuffled_examples_change_nothing():
    "a task of 500 examples, and of 5,000 that are the same ten times over: the same moments"
    nets = Replicas(mlp, [0]); x, y = PermutedPixels(DIGITS, tasks=1, seeds=[0])[0].train.fetch(torch.arange(500)[None])
    loss = PermutedPixels(DIGITS, tasks=1, seeds=[0])[0].loss; a = moments(nets, x, y, loss)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0)) % 500
    for k, v in moments(nets, x[:, order], y[:, order], loss).items(): assert float(v) == pytest.approx(float(a[k]), rel=1e-4), k


def test_few_examples_agree_with_the_whole_task():
    "over 60 draws of 100 examples each, ‖g‖² has the mean of the whole task within four standard errors; the draws repeat with the seed"
    task, nets = PermutedPixels(DIGITS, tasks=2, seeds=[0, 1])[1], Replicas(mlp, [0, 1])
    truth = task_readiness(nets, task)["gradient_norm"].square()
    draws = torch.stack([task_readiness(nets, task, examples=100, seed=s)["gradient_norm"].square() for s in range(60)])
    assert ((draws.mean(0) - truth).abs() < 4*draws.std(0)/60**.5).all()
    assert torch.equal(task_readiness(nets, task, examples=100, seed=7)["readiness"], task_readiness(nets, task, examples=100, seed=7)["readiness"])
    with pytest.raises(LopError, match="at least 2"): task_readiness(nets, task, examples=1)


# ---- local redundancy ----
def slow_redundancy(net, x, kind, ids, sigma):
    "tr JᵀFJ with both matrices written out"
    J = torch.cat([j.flatten(1) for j in torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x[None],))[0])({k: v.detach() for k, v in net.named_parameters()}).values()], 1)
    p = torch.zeros(len(J), dtype=J.dtype); p[ids] = net(x[None])[0].detach()[ids].softmax(0)
    return (J.T @ (p.diag() - p[:, None]*p) @ J).trace() if kind == "classification" else J.square().sum() / sigma**2


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("masked", [False, True])
def test_local_redundancy_is_the_trace_of_the_fisher_matrix(kind, masked):
    nets, task, x, _ = some(n=4)
    got = local_redundancy(nets, x, kind, task.classes if masked and kind == "classification" else None, sigma=.5)
    for r in range(2):
        ids = task.classes[r].nonzero()[:, 0] if masked else torch.arange(10)
        want = torch.stack([slow_redundancy(nets.modules[r].eval(), one, kind, ids, .5) for one in x[r]]).mean()
        assert float(got[r]) == pytest.approx(float(want), rel=1e-10)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_drawn_labels_have_the_exact_expectation(kind):
    nets, task, x, _ = some(n=6); exact = local_redundancy(nets, x, kind, task.classes if kind == "classification" else None, sigma=2.)
    draw = lambda i: local_redundancy(nets, x, kind, task.classes if kind == "classification" else None, 2., draws=20, generators=[generator(s, "labels", i) for s in nets.seeds])
    draws = torch.stack([draw(i) for i in range(100)])
    assert ((draws.mean(0) - exact).abs() < 4*draws.std(0)/10).all() and (draws.std(0) > 0).all()
    assert torch.equal(draw(3), draws[3])


def test_what_local_redundancy_refuses():
    nets, _, x, _ = some(n=2)
    with pytest.raises(LopError, match="regression"): local_redundancy(nets, x, "regresion")
    with pytest.raises(LopError, match="generators="): local_redundancy(nets, x, draws=3)


# ---- squares without the gradients ----
class Twice(torch.nn.Module):
    "one linear layer that every example passes twice"
    def __init__(self): super().__init__(); self.inner = torch.nn.Linear(5, 5, dtype=torch.float64)
    def forward(self, x): return self.inner(self.inner(x).tanh())


class Tokens(torch.nn.Module):
    "a linear layer that sees three positions of an example"
    def __init__(self): super().__init__(); self.inner = torch.nn.Linear(5, 4, dtype=torch.float64)
    def forward(self, x): return self.inner(x.unflatten(1, (3, 5))).mean(1)


@pytest.mark.parametrize("net, inputs, short", [
    (partial(MLP, 6, 4, hidden_sizes=[5, 3], normalization="none", dropout_p=.3, activation="tanh"), 6, True),
    (partial(MLP, 6, 4, hidden_sizes=[5], normalization="none", dropout_p=0., bias=False), 6, True),
    (partial(torch.nn.Linear, 6, 4), 6, True), (partial(MLP, 6, 4, hidden_sizes=[5], normalization="layer"), 6, False), (Twice, 5, False), (Tokens, 15, False)])
def test_squares_by_the_short_way_and_the_long(net, inputs, short):
    "the same for three vectors of each example; a network to which the short way does not apply takes the long one"
    nets = Replicas(net, [0, 1], dtype=torch.float64); x = gauss(2, 7, inputs); d = gauss(2, 7, 3, nets(x).shape[-1], seed=1)
    long = torch.cat([g.square().sum(-1) for _, g in gradients.pullbacks(nets, x, d)], 1)
    assert (pullback_squares(nets, x, d) - long).abs().max() < 1e-12
    module, params, buffers = gradients.stacked(nets); assert (gradients._linear_layers(module, params, buffers, x) is not None) == short
    slow = torch.autograd.grad((nets.modules[1].eval()(x[1, 2:3])[0] * d[1, 2, 0]).sum(), list(nets.modules[1].parameters()))
    assert abs(sum(g.square().sum() for g in slow) - long[1, 2, 0]) < 1e-12
    assert not any(m._forward_hooks for m in module.modules())


# ---- properties of the measures ----
@given(seeds)
@settings(max_examples=5, deadline=None)
def test_no_measure_knows_the_order_of_units(seed):
    "hidden units in another order, with all that belongs to them: the same moments, redundancy and share of zeros"
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[8, 6], normalization="none", dropout_p=0.), [0, 1], dtype=torch.float64)
    x, y = (t[:, :20] for t in everything()); task = PermutedPixels(DIGITS, tasks=1, seeds=[0, 1])[0]
    def measure():
        g = mean_gradient(nets, x, y, task.loss)
        return [*moments(nets, x, y, task.loss).values(), local_redundancy(nets, x), zero_gradient_share(g), gradient_norm(g), effective_rank(example_gradients(nets, x, y, task.loss))]
    was, gen = measure(), torch.Generator().manual_seed(seed)
    for group in nets.graph:
        order = torch.stack([torch.randperm(group.size, generator=gen) for _ in range(2)]); straight = torch.arange(group.size).expand(2, -1)
        slices = group.reads + group.writes
        scatter(nets.params, slices, straight, [v.detach().clone() for v in gather(nets.params, slices, order)])
    for a, b in zip(was, measure()): assert torch.allclose(a, b, rtol=1e-9)


def everything():
    x, y = PermutedPixels(DIGITS, tasks=1, seeds=[0, 1])[0].train.fetch(torch.arange(500).expand(2, -1))
    return x.double(), y


def test_repeated_rows_change_nothing_and_other_rows_little():
    "local redundancy and the gradient's norm: 500 rows, the same ten times over, and others of the same task within five standard errors"
    nets, (x, y) = Replicas(mlp, [0, 1], dtype=torch.float64), everything()
    one = local_redundancy(nets, x); assert torch.allclose(local_redundancy(nets, x.repeat(1, 10, 1, 1, 1)), one, rtol=1e-10)
    task = PermutedPixels(DIGITS, tasks=1, seeds=[0, 1])[0]; others = task.train.fetch(torch.arange(500, 1293).expand(2, -1))[0].double()
    each = torch.stack([local_redundancy(nets, others[:, i:i + 1]) for i in range(0, 793, 4)]); error = each.std(0) * (1/500 + 1/len(each))**.5
    assert ((each.mean(0) - one).abs() < 5*error).all()
    a, b = (mean_gradient(nets, x.repeat(1, k, 1, 1, 1), y.repeat(1, k), task.loss) for k in (1, 10)); assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)
