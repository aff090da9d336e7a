"""Curvature across a manifold against matrices of finite differences; pairs of units against the blocks of the Hessian; the pairs on the disk against slow loops."""
import math
from functools import partial

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lop_nb.cloning import clone
from lop_nb.curvature import loss_hessian
from lop_nb.data import load
from lop_nb.escape import (NormalHessian, across, angle, coupling, descend_pairs, disagreement_budget, disk_points, disk_targets, follow, growth_rate, held, kicks, loss_of, new_pairs, normal_hessian,
                           normal_size, opposed, opposed_losses, overlap, pair_hessian, pair_risk, pair_step, recovery_bound, train_pairs)
from lop_nb.gradients import pullbacks
from lop_nb.manifold import Blocks, equitable_partition, flat_of, tree_of
from lop_nb.models import CNN, MLP, ViT
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.units import UnitGraph

DIGITS = load("digits"); X = F.avg_pool2d(DIGITS.train.x.double() / DIGITS.train.x.max(), 2)[:60]; Y = DIGITS.train.y[:60]
ce = lambda z, y: F.cross_entropy(z.mT, y, reduction="none")
gens = lambda n, *names: [generator(r, "test", *names) for r in range(n)]
NETS = dict(tanh=partial(MLP, 16, 10, hidden_sizes=[3, 3], activation="tanh", normalization="none", dropout_p=0.), relu=partial(MLP, 16, 10, hidden_sizes=[3, 3], normalization="none", dropout_p=0.),
            batch=partial(MLP, 16, 10, hidden_sizes=[3, 3], activation="gelu", normalization="batch", dropout_p=0.), cnn=partial(CNN, 1, 4, 10, conv_channels=[3], fc_hidden_units=[4], activation="tanh", dropout_p=0., normalization="layer"),
            vit=partial(ViT, 1, 4, 10, patch_size=2, embed_dim=4, depth=1, n_heads=2, mlp_ratio=1, dropout_p=0., attn_drop_rate=0.))


def doubled(name, seed=0, k=2):
    "a random clone and its blocks"
    with torch.random.fork_rng(): torch.manual_seed(seed); net = NETS[name]().double()
    with torch.no_grad():
        for p in net.parameters(): p += .1*torch.randn(p.shape, generator=generator(seed, "more"), dtype=p.dtype)
    big = clone(net, k)
    return big, Blocks(big, equitable_partition(big, sending=True))


def params_of(net): return {k: p.detach()[None].clone() for k, p in net.named_parameters()}
def matrix(H): return torch.cat([H @ e[None] for e in torch.eye(H.shape[1], dtype=torch.float64)])


@pytest.mark.parametrize("name", NETS)
def test_normal_hessian_is_that_of_finite_differences(name):
    net, blocks = doubled(name); f, θ = loss_of(net, X[None], Y[None], ce), flat_of(params_of(net)); P = θ.shape[1]; I = torch.eye(P, dtype=torch.float64)
    def gradient(θ):
        leaves = {k: v.requires_grad_() for k, v in tree_of(θ.clone(), blocks).items()}
        return flat_of(dict(zip(leaves, torch.autograd.grad(f(leaves).sum(), list(leaves.values())))))
    ε = 1e-5; H = loss_hessian(net, X[None], Y[None], ce); D = matrix(H)
    for e in I[::1 if name == "tanh" else 50]: torch.testing.assert_close((gradient(θ + ε*e) - gradient(θ - ε*e)) / (2*ε), e[None] @ D, atol=1e-7, rtol=0)
    N = flat_of(across(tree_of(I, blocks), blocks)); assert ((I - N) @ D @ N).norm() < 1e-13 * D.norm()             # P_T H P_N = 0
    eig = torch.linalg.eigvalsh(N @ D @ N + 1e3*(I - N)); eig = eig[eig < 500]; assert len(eig) == P - blocks.dimension
    found = normal_hessian(H, blocks, gens(1), steps=120)
    torch.testing.assert_close(torch.stack([found["bottom"][0], found["top"][0]]), eig[[0, -1]], atol=1e-10, rtol=0)
    assert found["leakage"] < 1e-12 and (found["bound"] < 1e-8).all()


@pytest.mark.parametrize("name", NETS)
def test_no_part_of_gauss_and_newton(name):
    net, blocks = doubled(name)
    J = torch.cat([j for _, j in pullbacks(net, X[None], torch.eye(10).double().expand(1, len(X), 10, 10))], 1)[0].flatten(0, 1)
    assert flat_of(across(tree_of(J, blocks), blocks)).norm() < 1e-13 * J.norm()


@pytest.mark.parametrize("seed", range(3))
def test_relu_copies_are_saddles_with_opposite_eigenvalues(seed):
    net, blocks = doubled("relu", seed, k=3)
    H = matrix(NormalHessian(loss_hessian(net, X[None], Y[None], ce), blocks, gens(1))); N = flat_of(across(tree_of(torch.eye(len(H)).double(), blocks), blocks))
    eig = torch.linalg.eigvalsh(N @ H @ N); torch.testing.assert_close(eig, -eig.flip(0), atol=1e-13, rtol=0); assert eig[-1] > 1e-3


def test_directions_that_stay_equitable_are_flat():
    net, blocks = doubled("tanh"); H = loss_hessian(net, X[None], Y[None], ce); raw = kicks(blocks, 1., gens(1))
    n = flat_of(raw) - flat_of(across(raw, blocks, "equitable")); assert n.norm() > .1 and (H @ n).norm() < 1e-14
    assert normal_size(raw, blocks) > normal_size(raw, blocks, "equitable") > 0
    both = [normal_hessian(H, blocks, gens(1), steps=120, off=off) for off in ("constant", "equitable")]
    for end in ("bottom", "top"): torch.testing.assert_close(both[0][end], both[1][end])


def test_sign_predicts_growth():
    "24 kicks along eigenvectors from both ends, for two networks; then as many random ones"
    for name in ("tanh", "relu"):
        net, blocks = doubled(name, seed=1); H = matrix(loss_hessian(net, X[None], Y[None], ce)); I = torch.eye(len(H)).double(); N = flat_of(across(tree_of(I, blocks), blocks))
        λ, Q = torch.linalg.eigh(N @ H @ N + 99*(I - N)); λ, Q = λ[λ < 50], Q[:, λ < 50]; use = torch.cat([torch.arange(12), torch.arange(len(λ) - 12, len(λ))])
        for n, size in ((Q[:, use].mT, 1e-7), (flat_of(kicks(blocks, 1., gens(24))), 1e-7)):
            nets = Replicas(lambda: clone(NETS[name]().double(), 2), range(24), "vmap", dtype=torch.float64)
            with torch.no_grad():
                for k, v in tree_of(size*n, blocks).items(): nets.params[k].copy_(params_of(net)[k] + v)
            def step():
                nets.backward(ce(nets(X.expand(24, *X.shape)), Y.expand(24, -1)))
                with torch.no_grad():
                    for p in nets.params.values(): p -= 1e-3*p.grad
            rates = growth_rate(follow(step, nets.params, blocks, 3)) / 1e-3; said = -((n @ H) * n).sum(1)
            sure = said.abs() > 2e-4
            assert (rates.sign() == said.sign())[sure].all() and sure.sum() >= 20
            torch.testing.assert_close(rates, said, atol=2e-4, rtol=.02)


def test_growth_rate_is_the_slope_of_the_logarithm():
    t = torch.arange(9.).double(); torch.testing.assert_close(growth_rate(torch.stack([.1*torch.exp(.3*t), 5*torch.exp(-.02*t)], 1)), torch.tensor([.3, -.02]).double())


def test_kicks():
    net, blocks = doubled("cnn"); n = kicks(blocks, torch.tensor([1e-3, 2.]), gens(2))
    torch.testing.assert_close(flat_of(n).norm(dim=1), torch.tensor([1e-3, 2.]).double(), rtol=1e-6, atol=0)
    assert not torch.equal(n["out.weight"][0] / 1e-3, n["out.weight"][1] / 2) and all(torch.equal(v, w) for v, w in zip(n.values(), kicks(blocks, torch.tensor([1e-3, 2.]), gens(2)).values()))
    for k, v in across(n, blocks).items(): torch.testing.assert_close(v, n[k], atol=1e-15, rtol=0)
    with pytest.raises(LopError, match="block of two"): kicks(Blocks(net, {}), 1., gens(1))
    with pytest.raises(LopError, match="equitable"): kicks(blocks, 1., gens(1), "copies")


@pytest.mark.parametrize("name,site", [("tanh", "act_0"), ("batch", "act_1"), ("cnn", "act_0"), ("vit", "block_0.mlp.act_0"), ("vit", "block_0.attend.heads.v")])
def test_pair_hessian_is_made_of_blocks_of_the_hessian(name, site):
    "any two units of any network, equal or not, behind a flatten, in a part of a joint matrix"
    with torch.random.fork_rng(): torch.manual_seed(0); net = NETS[name]().double()
    group, params, pair = UnitGraph.of(net)[site], params_of(net), (0, 2); f = loss_of(net, X[None], Y[None], ce)
    H = loss_hessian(net, X[None], Y[None], ce); zero = {k: 0*v for k, v in params.items()}
    for slices in (group.reads, group.writes, group.reads + group.writes):
        K = pair_hessian(f, params, slices, pair); one = [torch.cat([flat_of(moved(zero, slices, u, e[None])) for e in torch.eye(K.shape[1]).double()]) for u in pair]
        columns = [torch.cat([H @ e[None] for e in u]) for u in one]; expected = sum(s * one[i] @ columns[j].mT for i, j, s in ((0, 0, 1), (1, 1, 1), (0, 1, -1), (1, 0, -1)))
        torch.testing.assert_close(matrix(K), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(K.gradient[0].detach(), (one[0] - one[1]) @ H.gradient[0].detach(), atol=1e-14, rtol=0)
        torch.testing.assert_close(held(opposed(params, slices, pair, d := torch.randn(1, K.shape[1], dtype=torch.float64, generator=generator(0, "δ"))), slices, 0) - held(params, slices, 0), d)
        ends = opposed_losses(f, params, slices, pair, d, [1e-4, 0., -1e-4]); torch.testing.assert_close((ends[0] - 2*ends[1] + ends[2]) / 1e-8, (d * (K @ d)).sum(1), atol=1e-4, rtol=1e-3)


def moved(tree, slices, unit, δ):
    "δ added to one unit, position by position"
    out, here = {k: v.clone() for k, v in tree.items()}, 0
    for s in slices:
        rows = out[s.param].movedim(s.axis + 1, 1)[:, s.start + unit*s.block:s.start + (unit + 1)*s.block]
        rows += δ[:, here:here + rows[0].numel()].view(rows.shape); here += rows[0].numel()
    return out


def test_coupling_says_what_comes():
    nets = Replicas(NETS["tanh"], range(4), "vmap", dtype=torch.float64); group = nets.graph["act_0"]; every = group.reads + group.writes
    x, y = X.expand(4, *X.shape), Y.expand(4, -1)
    c = coupling(nets, group, (0, 1), x, y, ce, gens(4)); u, v = (held(nets.params, every, k).detach() for k in (0, 1))
    torch.testing.assert_close(c["both"]["distance"], (u - v).norm(dim=1)); torch.testing.assert_close(c["both"]["cosine"], F.cosine_similarity(u, v)); torch.testing.assert_close(c["both"]["inner"], (u*v).sum(1))
    nets.backward(ce(nets(x), y)); g, h = (held({k: p.grad for k, p in nets.params.items()}, every, k) for k in (0, 1))
    torch.testing.assert_close(c["both"]["gradient_cosine"], F.cosine_similarity(g, h)); torch.testing.assert_close(c["both"]["drift"], -((u - v)*(g - h)).sum(1) / (u - v).square().sum(1))
    for side, s in (("in", group.reads), ("out", group.writes)): assert (c[side]["bottom"] <= c[side]["along"] + 1e-12).all() and (c[side]["along"] <= c[side]["top"] + 1e-12).all() and torch.allclose(c[side]["first"], held(nets.params, s, 0).norm(dim=1))


# the disk

def test_angle_is_exact_where_the_arc_cosine_is_not():
    for δ in (1e-12, 1e-9, 1e-3, 1., 3.1): torch.testing.assert_close(angle(torch.tensor([2., 0.], dtype=torch.float64), torch.tensor([3*math.cos(δ), 3*math.sin(δ)], dtype=torch.float64)), torch.tensor(δ, dtype=torch.float64), rtol=1e-9, atol=0)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_expectations_by_quadrature(seed):
    w, a = new_pairs([seed], 1.); t = (torch.arange(200_000).double() + .5) / 200_000 * 2*math.pi; x = torch.stack([t.cos(), t.sin()])        # E r² = 2
    h = (w[0] @ x).relu(); torch.testing.assert_close(overlap(w[0, 0], w[0, 1]), 2*(h[0]*h[1]).mean(), atol=1e-8, rtol=0)
    for target, y_of in disk_targets.items(): torch.testing.assert_close(pair_risk(w, a, target)[0], (a[0] @ h - y_of(x)).square().mean(), atol=1e-8, rtol=0)  # ½ · 2


def test_steps_against_a_loop():
    w, a = new_pairs(range(3), 1.); x = disk_points(gens(3), 1, 5)[0]; assert (x.norm(dim=1) <= 2).all()
    for target, y_of in disk_targets.items():
        y, (v, b) = y_of(x), (w.clone(), a.clone()); pair_step(v, b, x, y, .1, .05)
        for p in range(3):
            W, A = w[p].clone().requires_grad_(), a[p].clone().requires_grad_()
            loss = sum((sum(A[i] * torch.relu(W[i] @ x[p, :, n]) for i in range(2)) - y[p, n])**2 / 2 for n in range(5)) / 5 + .025*(W.square().sum() + A.square().sum())
            g, h = torch.autograd.grad(loss, (W, A)); torch.testing.assert_close(v[p], w[p] - .1*g); torch.testing.assert_close(b[p], a[p] - .1*h)


@pytest.mark.parametrize("target", disk_targets)
def test_compiled_steps_are_the_plain_ones(target, monkeypatch):
    w, a = new_pairs(range(5), .7); run = lambda: train_pairs(w, a, target, gens(5), 60, .02, 7, .05, chunk=25)
    fast = run(); monkeypatch.setattr("lop_nb.escape.numba", None); plain = run()
    for p, q in zip(fast, plain): torch.testing.assert_close(p, q, atol=1e-13, rtol=0)
    assert (fast[0] - w).abs().max() > .01


def test_training_goes_on_where_it_was_and_pairs_do_not_meet():
    w, a = new_pairs(range(4), .5); how = dict(lr=.01, batch=4, decay=.05)
    whole = train_pairs(w, a, "source", gens(4), 30, **how, chunk=10)
    g = gens(4); parts = train_pairs(*train_pairs(w, a, "source", g, 20, **how, chunk=10), "source", g, 10, **how, chunk=10)
    alone = train_pairs(w[2:3], a[2:3], "source", gens(4)[2:3], 30, **how, chunk=10)
    assert all(torch.equal(p, q) for p, q in zip(whole, parts)) and all(torch.equal(p[2:3], q) for p, q in zip(whole, alone)) and torch.equal(w, new_pairs(range(4), .5)[0])


def test_decay_closes_the_angle_at_its_rate():
    "gradient descent on the source: δ shrinks by e^(−λt) once both units face it; on the target it grows at 2/π − λ"
    w = torch.tensor([[[.67, .01], [.67, -.01]]]).double(); a = w.norm(dim=-1)
    for target, rate in (("source", -.05), ("target", 2/math.pi - .05)):
        w, a = (w, a) if target == "source" else (torch.tensor([[[1., 1e-5], [1., -1e-5]]]).double() * (2/math.pi - .05)**.5, torch.full((1, 2), (2/math.pi - .05)**.5, dtype=torch.float64))
        start = descend_pairs(w, a, target, 600 if target == "source" else 1, .05, .05); later = descend_pairs(*start, target, 100, .05, .05)
        assert abs((angle(*later[0][0]) / angle(*start[0][0])).log().item() / 5 - rate) < .01


def test_budget_and_bound():
    assert disagreement_budget(1e-4, 16, 1e-3) == pytest.approx(1.6) and recovery_bound(math.pi*.05*math.log(2), .05).item() == pytest.approx(.5) and recovery_bound(0., .05) == 0
    with pytest.raises(LopError, match="source"): pair_risk(*new_pairs([0], 1.), "norm")
    with pytest.raises(LopError, match="source"): train_pairs(*new_pairs([0], 1.), "norm", gens(1), 1, .1, 1, .05)
