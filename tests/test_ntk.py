"""The tangent kernel against Jacobians written out, in float64, and for what it must not depend on."""
import math
from functools import partial
from itertools import combinations

import pytest, torch, torch.nn.functional as F
from torch import nn

from lop_nb import ntk, ranks
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.ntk import (eigenvalues, jacobian, kernel, kernel_alignment, kernel_condition, kernel_cosine, kernel_distance, kernel_effective_rank, kernel_measures, kernel_trace,
                        kernel_velocity, mean_gradient_inner_product, sampled_kernel, target_kernel)
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator

NETWORKS = dict(
    mlp=partial(MLP, 64, 5, hidden_sizes=[7, 6], dropout_p=.3), tanh=partial(MLP, 64, 5, hidden_sizes=[7], activation="tanh", normalization="none"),
    cnn=partial(CNN, 1, 8, 5, conv_channels=[3, 4], fc_hidden_units=[6]), resnet=partial(ResNet, 1, 8, 5, layers=[1, 1], base_channels=3),
    vit=partial(ViT, 1, 8, 5, patch_size=4, embed_dim=6, depth=1, n_heads=2))


def gauss(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aged(make, R=2, dtype=torch.float64):
    "networks whose running statistics and norms are not those of new ones"
    nets = Replicas(make, range(R), dtype=dtype)
    with torch.no_grad():
        for i, p in enumerate(nets.params.values()): p += .1*gauss(*p.shape, seed=i).to(p)
        for i in range(3): nets(gauss(R, 16, 1, 8, 8, seed=9 + i))
    return nets


def by_loop(module, x):
    "[n, C, P]: every logit of every example by itself"
    module.eval(); ps = list(module.parameters())
    return torch.stack([torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(z, ps, retain_graph=True)]) for z in module(one[None])[0]]) for one in x])


def masks_of(nets, density, seed=0):
    return {k: torch.rand(p.shape, generator=torch.Generator().manual_seed(seed + i)) < density for i, (k, p) in enumerate(nets.params.items()) if p.ndim > 2}


# ---- Jacobian and kernel ----
@pytest.mark.parametrize("name", NETWORKS)
def test_jacobian_and_kernels_are_those_of_a_loop(name):
    "all four networks, dropout off, running statistics as constants, and everything left as it was: modes, buffers, gradients, generators"
    nets, x = aged(NETWORKS[name]), gauss(2, 5, 1, 8, 8, seed=3)
    before, rng = {k: b.clone() for k, b in nets.buffers.items()}, torch.get_rng_state()
    J, K, k = jacobian(nets, x), kernel(nets, x), kernel(nets, x, contract=True)
    assert all(m.training for m in nets.modules) and all(torch.equal(b, nets.buffers[n]) for n, b in before.items()) and torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in nets.params.values())
    for r, m in enumerate(nets.modules):
        slow = by_loop(m, x[r]); flat = slow.flatten(0, 1)
        assert (J[r] - slow).abs().max() <= 1e-10*slow.abs().max()
        assert (K[r] - flat @ flat.T).abs().max() <= 1e-10*K[r].max()
        assert (k[r] - sum(slow[:, c] @ slow[:, c].T for c in range(5))).abs().max() <= 1e-10*k[r].max()
    for kind in (K, k):
        assert torch.equal(kind, kind.mT)
        assert (torch.linalg.eigvalsh(kind) >= -1e-13*kind.amax()*kind.shape[-1]).all()
    assert kernel_trace(K).sub(kernel_trace(k)).abs().max() <= 1e-10*kernel_trace(k).max()


@pytest.mark.parametrize("contract", [True, False])
@pytest.mark.parametrize("memory", [1, 25_000, 60_000])
def test_blocks_change_nothing(contract, memory):
    nets, x = aged(NETWORKS["cnn"]), gauss(2, 7, 1, 8, 8, seed=1)
    whole, blocks = kernel(nets, x, contract), kernel(nets, x, contract, memory=memory)
    assert (whole - blocks).abs().max() <= 1e-12*whole.max() and torch.equal(blocks, blocks.mT)


def test_memory_bounds_the_rows_that_are_held(monkeypatch):
    "of 64 examples with 16 kB of rows each, 128 kB hold two blocks of 4; each block is pulled back once with every one before it"
    nets, x, seen = Replicas(lambda: nn.Sequential(nn.Linear(18, 10, bias=False), nn.BatchNorm1d(10)), [0]), gauss(1, 64, 18), []
    pulled = ntk._pulled
    monkeypatch.setattr(ntk, "_pulled", lambda net, keep, x, d: seen.append(x.shape[1]) or pulled(net, keep, x, d))
    size = 200*10*8; assert sum(p.numel() for p in nets.params.values()) == 200
    kernel(nets, x, memory=8*size); assert max(seen) == 4 and len(seen) == 16*17/2
    seen.clear(); kernel(nets, x, memory=64*size); assert seen == [64]


@pytest.mark.parametrize("masked", ["no", "weights", "one layer", "biases too"])
@pytest.mark.parametrize("make", [NETWORKS["tanh"], partial(MLP, 64, 5, hidden_sizes=[7, 6], normalization="none", bias=False), partial(MLP, 64, 5, hidden_sizes=[7], normalization="batch", normalization_affine=False)])
def test_layers_without_a_jacobian_give_the_same(masked, make, monkeypatch):
    "the products of linear layers beside the rows of J: whole, contracted, drawn; with masks, biases, norms without parameters"
    nets, x = aged(make), gauss(2, 6, 1, 8, 8, seed=1); masks = masks_of(nets, .4)
    if masked == "one layer": masks.popitem()
    if masked == "biases too": masks = {k: torch.rand(p.shape, generator=torch.Generator().manual_seed(7)) < .5 for k, p in nets.params.items() if k != "out.weight"}
    ask = lambda: [kernel(nets, x, mask=m), kernel(nets, x, True, m), sampled_kernel(nets, x, 3, [generator(r, "ntk") for r in range(2)], m)[0]]
    m = None if masked == "no" else masks; monkeypatch.setattr(ntk, "_by_rows", None); fast = ask()
    monkeypatch.undo(); monkeypatch.setattr(ntk, "_linear", lambda *_: None); slow = ask()
    for a, b in zip(fast, slow): assert (a - b).abs().max() <= 1e-11*b.max() and torch.equal(a, a.mT)


def test_layers_that_see_an_example_twice_need_a_jacobian():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(5, 5)
        def forward(self, x): return self.a(self.a(x))
    m, x = Twice().double(), gauss(1, 4, 5); slow = by_loop(m, x[0]).flatten(0, 1)
    assert (kernel(m, x)[0] - slow @ slow.T).abs().max() < 1e-12


def test_a_module_is_one_replica_and_float32_is_computed_in_float64():
    nets, x = aged(NETWORKS["mlp"], dtype=torch.float32), gauss(2, 4, 1, 8, 8).float()
    both = kernel(nets, x)
    assert both.dtype == torch.float64
    for r, m in enumerate(nets.modules): assert torch.equal(kernel(m, x[r:r + 1])[0], both[r])
    slow = by_loop(nets.modules[1].double(), x[1].double()).flatten(0, 1)
    assert (both[1] - slow @ slow.T).abs().max() <= 1e-10*both[1].max()
    assert kernel(nets, x, dtype=torch.float32).dtype == torch.float32


def test_a_linear_models_kernel_is_constant_and_known():
    "f = Wx + b: K = (x·x′ + 1) I, whatever the weights; two layers have no such luck"
    x = gauss(1, 6, 4)
    def trained(hidden):
        nets = Replicas(partial(MLP, 4, 3, hidden_sizes=hidden, normalization="none"), [0], dtype=torch.float64)
        opt, kernels = torch.optim.SGD(nets.params.values(), lr=.1), [kernel(nets, x)]
        for _ in range(30): nets.backward(F.cross_entropy(nets(x)[0], torch.tensor([0, 1, 2, 0, 1, 2]), reduction="none")[None]); opt.step(); kernels.append(kernel(nets, x))
        return torch.stack(kernels)
    linear = trained([])
    assert torch.equal(linear, linear[:1].expand_as(linear))
    assert (linear[0, 0] - torch.kron(x[0] @ x[0].T + 1, torch.eye(3, dtype=torch.float64))).abs().max() < 1e-12
    assert kernel_distance(trained([8])[-1], trained([8])[0]) > .01


# ---- tickets ----
@pytest.mark.parametrize("name", NETWORKS)
def test_a_tickets_kernel(name):
    "weights that the mask drops are zero in the network, whatever they are in memory, and have no derivative"
    nets, x = aged(NETWORKS[name]), gauss(2, 4, 1, 8, 8, seed=5)
    masks = masks_of(nets, .4); K, J = kernel(nets, x, mask=masks), jacobian(nets, x, mask=masks)
    keep = torch.cat([masks.get(k, torch.ones_like(p, dtype=bool)).flatten(1) for k, p in nets.params.items()], 1)
    with torch.no_grad():
        for k, m in masks.items(): nets.params[k] *= m
    for r, m in enumerate(nets.modules):
        slow = by_loop(m, x[r]) * keep[r]; flat = slow.flatten(0, 1)
        assert (J[r] - slow).abs().max() <= 1e-10*slow.abs().max() and (K[r] - flat @ flat.T).abs().max() <= 1e-10*K[r].max()
    assert torch.equal(K, kernel(nets, x, mask=masks))
    everything = {k: torch.ones_like(m) for k, m in masks.items()}
    dense = kernel(nets, x); assert (kernel(nets, x, mask=everything) - dense).abs().max() <= 1e-12*dense.max()


def test_faults_are_named():
    nets, x = aged(NETWORKS["tanh"]), gauss(2, 4, 1, 8, 8)
    good = masks_of(nets, .5); k = next(iter(good))
    for bad in ({"nowhere": good[k]}, {k: good[k][:, :3]}, {k: good[k].float()}):
        with pytest.raises(LopError, match=next(iter(bad))): kernel(nets, x, mask=bad)
    for bad in (x[:1], x[:, :0]):
        with pytest.raises(LopError, match="2 replicas"): kernel(nets, bad)
    for s in (0, 6):
        with pytest.raises(LopError, match="1 to 5"): sampled_kernel(nets, x, s, [generator(r, "ntk") for r in range(2)])
    with pytest.raises(LopError, match="go with a kernel"): kernel_alignment(torch.eye(4)[None], torch.zeros(1, 3, dtype=torch.int64), 5)
    for at in ([0, 1], [0, 2, 2]):
        with pytest.raises(LopError, match="increasing"): kernel_velocity(torch.eye(3).expand(3, 3, 3), at)
    with pytest.raises(LopError, match="at least 2"): mean_gradient_inner_product(nets, x[:, None], torch.zeros(2, 1, 4, dtype=torch.int64), lambda z, y: z[..., 0])


# ---- measures ----
def psd(*shape, rank=None, seed=0): a = gauss(*shape, rank or shape[-1], seed=seed); return a @ a.mT


def test_measures_of_known_kernels():
    λ = torch.tensor([8., 4, 2, 2], dtype=torch.float64); Q = torch.linalg.qr(gauss(4, 4))[0]; K = Q @ torch.diag(λ) @ Q.T
    assert (eigenvalues(K) - λ).abs().max() < 1e-12 and abs(kernel_trace(K) - 16) < 1e-12 and abs(kernel_condition(K) - 4) < 1e-12
    assert abs(kernel_effective_rank(K).log() - 1.75*math.log(2)) < 1e-12          # shares 1/2, 1/4, 1/8, 1/8: 1.75 bits
    a = gauss(9, 4); assert abs(kernel_effective_rank(a @ a.T) - ranks.effective_rank(a, squared=True)) < 1e-6
    assert (eigenvalues(a @ a.T)[4:] == 0).all() and kernel_condition(a @ a.T) == math.inf
    zero = kernel_measures(torch.zeros(1, 3, 3), torch.tensor([[0, 1, 2]]), 3, torch.eye(3)[None])
    assert zero["ntk_trace"] == zero["ntk_effective_rank"] == 0 and all(zero[k].isnan() for k in ("ntk_condition", "ntk_alignment", "ntk_distance"))
    bad = torch.stack([K, K*math.nan]); assert kernel_effective_rank(bad).isnan().tolist() == kernel_trace(bad).isnan().tolist() == kernel_condition(bad).isnan().tolist() == [False, True]


@pytest.mark.parametrize("c", [1e-200, 1e-3, 7., 1e150])
def test_all_but_the_trace_are_free_of_scale(c):
    K, start, y = psd(2, 12), psd(2, 12, seed=1), torch.arange(12).expand(2, -1) % 3
    one, other = kernel_measures(K, y, 3, start), kernel_measures(c*K, y, 3, start)
    for k in one: assert torch.allclose(other[k], c*one[k] if k == "ntk_trace" else one[k], rtol=1e-9, atol=0), k


def test_alignment_is_the_fields_formula_and_ignores_the_mean():
    "yᵀKy/(‖K‖‖y‖²) with y written out; 1 at the target, 0 at a kernel that cannot tell examples apart; labels renamed change nothing for a kernel without classes"
    y, K = torch.tensor([[0, 1, 1, 2, 0, 2, 2]]), psd(1, 21)
    Y = torch.eye(3, dtype=torch.float64)[y[0]] - torch.tensor([2, 2, 3], dtype=torch.float64)/7; v = Y.flatten()
    assert abs(kernel_alignment(K, y, 3) - v @ K[0] @ v / (K.norm() * v.square().sum())) < 1e-12
    k = psd(1, 7); T = Y @ Y.T
    assert abs(kernel_alignment(k, y, 3) - (k[0] * T).sum() / (k.norm() * T.norm())) < 1e-12
    assert abs(kernel_alignment(k, (y + 1) % 3, 3) - kernel_alignment(k, y, 3)) < 1e-12
    for contract, n in ((True, 7), (False, 21)):
        assert abs(kernel_alignment(target_kernel(y, 3, contract), y, 3) - 1) < 1e-12
        assert abs(kernel_alignment(torch.ones(1, n, n), y, 3)) < 1e-12


def test_distance_and_velocity():
    a, b = psd(2, 6), psd(2, 6, seed=4)
    slow = torch.stack([1 - (x * y).sum() / (x.norm() * y.norm()) for x, y in zip(a, b)])
    assert (kernel_distance(a, b) - slow).abs().max() < 1e-12 and (kernel_cosine(a, 3*a) - 1).abs().max() < 1e-12
    chain = torch.stack([a, b, a]); speed = kernel_velocity(chain, [0, 2, 6])
    assert (speed - torch.stack([slow/2, slow/4])).abs().max() < 1e-12 and torch.equal(kernel_velocity(chain)[0], kernel_distance(b, a))


# ---- drawn logits ----
def test_sampled_kernels_are_unbiased_and_know_their_error():
    "the mean over all 10 pairs of 5 logits is the kernel; the mean of the squared errors that they tell is the true one; drawn from the generators alone"
    nets, x = aged(NETWORKS["tanh"], R=1), gauss(1, 4, 1, 8, 8)
    J, k = jacobian(nets, x)[0], kernel(nets, x, contract=True)[0]
    pair = lambda S: 5/2 * sum(J[:, c] @ J[:, c].T for c in S)
    every = torch.stack([pair(S) for S in combinations(range(5), 2)])
    assert (every.mean(0) - k).abs().max() <= 1e-10*k.max()
    truth, seen = (every - k).square().sum((1, 2)).mean(), {}
    for i in range(200):
        K, e = sampled_kernel(nets, x, 2, [generator(0, "ntk", i)])
        S = min(combinations(range(5), 2), key=lambda S: (pair(S) - K[0]).abs().max()); assert (pair(S) - K[0]).abs().max() <= 1e-10*K.max()
        seen[S] = (e[0]*K[0].norm()).square()
    assert len(seen) == 10 and abs(torch.stack(list(seen.values())).mean() - truth) <= 1e-9*truth
    again = [sampled_kernel(nets, x, 2, [generator(0, "ntk", 7)])[0] for _ in range(2)]; assert torch.equal(*again)
    whole, none = sampled_kernel(nets, x, 5, [generator(0, "ntk")]); assert (whole[0] - k).abs().max() <= 1e-10*k.max() and none == 0
    assert sampled_kernel(nets, x, 1, [generator(0, "ntk")])[1].isnan()


# ---- the source's scalar ----
def test_the_scalar_by_pairs_and_from_the_kernel():
    "45 pairs of gradients by autograd; and the same from the kernel between batches, weighed with the errors"
    nets, x, y = aged(NETWORKS["vit"]), gauss(2, 10, 3, 1, 8, 8, seed=2), torch.arange(60).view(2, 10, 3) % 5
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    got = mean_gradient_inner_product(nets, x, y, loss)
    for r, m in enumerate(nets.modules):
        m.eval(); gs = [torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(m(x[r, i]), y[r, i]), list(m.parameters()))]) for i in range(10)]
        assert abs(got[r] - sum(a @ b for a, b in combinations(gs, 2)) / 45) <= 1e-12*max(g @ g for g in gs)
        z = m(x[r].flatten(0, 1)).detach(); e = (z.softmax(-1) - F.one_hot(y[r].flatten(), 5)) / 3
        E = torch.block_diag(*e.view(10, 1, 15)); G = E @ kernel(m, x[r:r + 1].flatten(1, 2))[0] @ E.T
        assert abs(got[r] - G.triu(1).sum() / 45) <= 1e-10*G.max()
