"""The Hessian's products, eigenvalues, trace and density against matrices written out."""
from functools import partial

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lop_nb.curvature import curved_share, lanczos, loss_hessian, ritz, task_curvature, top_eigenvalues, trace
from lop_nb.data import load
from lop_nb.models import CNN, MLP
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels

DIGITS = load("digits")
seeds = st.integers(0, 2**31)
gens = lambda n, first=0: [torch.Generator().manual_seed(first + r) for r in range(n)]


class Matrix:
    "something to multiply with: a symmetric matrix for each replica"
    def __init__(self, a): self.a, self.shape, self.dtype, self.device = a, a.shape[:2], a.dtype, a.device
    def __matmul__(self, v): return (self.a @ v[..., None])[..., 0]


def symmetric(eigenvalues, seed=0, dtype=torch.float64):
    "a random matrix with these eigenvalues [R, P]"
    λ = torch.as_tensor(eigenvalues, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(λ), λ.shape[1], λ.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return Matrix((q * λ[:, None] @ q.mT).to(dtype))


# ---- products ----
def written_out(net, x, y, ids):
    "the Hessian of one module's mean loss over the classes `ids`, by backward through backward"
    params = {k: v.detach() for k, v in net.eval().named_parameters()}
    loss = lambda p: F.cross_entropy(torch.func.functional_call(net, p, (x,))[:, ids], torch.searchsorted(ids, y))
    blocks = torch.func.jacrev(torch.func.jacrev(loss))(params)
    return torch.cat([torch.cat([blocks[a][b].reshape(params[a].numel(), -1) for b in params], 1) for a in params])


@pytest.mark.parametrize("net", [partial(MLP, 64, 10, hidden_sizes=[2, 3], activation="gelu", normalization="batch", dropout_p=.5),
                                 partial(CNN, 1, 8, 10, conv_channels=[2], fc_hidden_units=[2], pool_size=[4], activation="tanh", normalization="none")])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_products_and_eigenvalues_of_networks(net, strategy):
    "two replicas with different examples and classes, one of which has fewer examples"
    nets, task = Replicas(net, [3, 4], strategy, dtype=torch.float64), ClassSplit(DIGITS, tasks=None, classes_per_task=3, seeds=[3, 4])[0]
    x, y = task.train.fetch(torch.arange(30).mul(10).expand(2, -1)); x = x.double()
    valid = torch.arange(30) < torch.tensor([[30], [12]])
    H = loss_hessian(nets, x, y, task.loss, valid)
    v = torch.randn(H.shape, generator=gens(1)[0], dtype=torch.float64); product, top = H @ v, top_eigenvalues(H, gens(2), 3, steps=60)
    for r in range(2):
        full = written_out(nets.modules[r], x[r][valid[r]], y[r][valid[r]], task.classes[r].nonzero()[:, 0])
        assert (product[r] - full @ v[r]).abs().max() < 1e-11
        assert (top[r] - torch.linalg.eigvalsh(full).flip(0)[:3]).abs().max() < 1e-9
    assert torch.equal(H @ v, product), "a product can be repeated"
    one = loss_hessian(nets.modules[1], x[1:, :12], y[1:, :12], lambda z, y: task.loss(z.expand(2, -1, -1), y.expand(2, -1))[1:])
    assert (one @ v[1:] - product[1:]).abs().max() < 1e-11, "a module is one replica"


def test_logistic_regression_in_closed_form():
    "for one weight matrix, H = mean of (diag p - ppᵀ) ⊗ xxᵀ"
    g = gens(1)[0]; linear = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64); x = torch.randn(1, 20, 4, generator=g, dtype=torch.float64)
    with torch.no_grad(): linear.weight.copy_(torch.randn(3, 4, generator=g))
    H = loss_hessian(linear, x, torch.randint(3, (1, 20), generator=g), lambda z, y: F.cross_entropy(z[0], y[0], reduction="none")[None])
    p = linear(x[0]).softmax(1).detach()
    want = sum(torch.kron(a.diag() - a[:, None]*a, b[:, None]*b) for a, b in zip(p, x[0])) / 20
    assert (torch.stack([(H @ e[None])[0] for e in torch.eye(12, dtype=torch.float64)]) - want).abs().max() < 1e-14


def test_nothing_is_left_behind():
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[4], normalization="batch", dropout_p=.5), [0, 1]); task = PermutedPixels(DIGITS, tasks=1, seeds=[0, 1])[0]
    def everything(): return [t.clone() for t in (*nets.params.values(), *nets.buffers.values())], [m.training for net in nets.modules for m in net.modules()], torch.get_rng_state()
    was, first = everything(), task_curvature(nets, task, examples=50, steps=5, probes=3)
    now, again = everything(), task_curvature(nets, task, examples=50, steps=5, probes=3)
    assert all(torch.equal(a, b) for a, b in zip(was[0], now[0])) and was[1] == now[1] and torch.equal(was[2], now[2])
    assert all(torch.equal(first[k], again[k]) for k in first) and all(p.grad is None and p.requires_grad for p in nets.params.values())
    other = task_curvature(nets, task, examples=50, steps=5, probes=3, seed=1)
    assert not torch.equal(first["top_eigenvalue"], other["top_eigenvalue"])


# ---- Lanczos ----
@given(seeds, st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_all_eigenvalues_after_all_steps(seed, P):
    λ = torch.randn(3, P, generator=gens(1, seed)[0], dtype=torch.float64)
    θ, bound, weights = ritz(*lanczos(symmetric(λ, seed), P, gens(3, seed)))
    assert (θ - λ.sort(1, descending=True)[0]).abs().max() < 1e-9 and (weights.sum(1) - 1).abs().max() < 1e-12
    assert lanczos(symmetric(λ, seed), 99, gens(3))[0].shape == (3, P)


@pytest.mark.parametrize("eigenvalues", [[5., 5, 5, 5, 5, 5], [3., 3, 0, 0, 0, 0], [0.]*6, [-1., -1, -1, -1, -2, -2], [1e6, 1, 1e-6, 0, 0, -1e6]])
@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(eigenvalues, dtype, eps):
    "one start reaches one direction of each; where nothing is left a new one goes on, and no zero appears from nowhere"
    θ, _, _ = ritz(*lanczos(symmetric([eigenvalues], dtype=dtype), 6, gens(1)))
    assert (θ[0] - torch.tensor(eigenvalues, dtype=torch.float64).sort(descending=True)[0]).abs().max() <= eps * max(1, max(map(abs, eigenvalues)))


@given(seeds, st.integers(2, 15))
@settings(max_examples=25, deadline=None)
def test_each_ritz_value_is_as_near_as_its_bound_says(seed, steps):
    λ = torch.randn(2, 40, generator=gens(1, seed)[0], dtype=torch.float64)
    θ, bound, _ = ritz(*lanczos(symmetric(λ, seed), steps, gens(2, seed)))
    assert ((θ[:, :, None] - λ[:, None]).abs().amin(2) <= bound + 1e-10).all() and (θ[:, 0] <= λ.max(1)[0] + 1e-10).all()


def test_no_ghosts():
    "an eigenvalue far above the rest stays single after many steps, which plain Lanczos does not manage in float32"
    λ = torch.cat([torch.tensor([[1000., 900.]]), torch.linspace(0, 1, 198)[None]], 1)
    assert (ritz(*lanczos(symmetric(λ, dtype=torch.float32), 100, gens(1)))[0][0] > 500).sum() == 2


def test_replicas_are_apart():
    λ = torch.randn(3, 30, generator=gens(1)[0], dtype=torch.float64); H = symmetric(λ); broken = Matrix(H.a.clone()); broken.a[1, 0, 0] = torch.nan
    good, bad = top_eigenvalues(H, gens(3), 2, steps=10), top_eigenvalues(broken, gens(3), 2, steps=10)
    assert bad.isnan().all(1).tolist() == [False, True, False] and torch.equal(good[[0, 2]], bad[[0, 2]])
    for f in (trace, curved_share):
        out = f(broken, gens(3)); out = out[0] if isinstance(out, tuple) else out
        assert out.isnan().tolist() == [False, True, False]
    alone = top_eigenvalues(Matrix(H.a[2:]), gens(3)[2:], 2, steps=10)
    assert (alone[0] - good[2]).abs().max() < 1e-10


# ---- trace and density ----
def test_trace_has_the_variance_of_hutchinson():
    "over 400 estimates: the mean is the trace, and the reported errors are the right size"
    H = symmetric(torch.linspace(-1, 3, 20, dtype=torch.float64)[None])
    values, errors = zip(*[trace(H, gens(1, i), 20) for i in range(400)]); values, errors = torch.cat(values), torch.cat(errors)
    off = H.a.square().sum() - H.a.diagonal(dim1=1, dim2=2).square().sum(); true = (2*off/20)**.5
    assert (values.mean() - 20).abs() < 4*true/20 and abs(values.std()/true - 1) < .15 and abs(errors.square().mean().sqrt()/true - 1) < .15


def test_density_of_known_spectra():
    "a third of the eigenvalues at ±2, the others at 0: the share above 1 within four standard errors, and exactly 0 and 1 at the ends"
    λ = torch.tensor([[2.]*20 + [-2.]*20 + [0.]*80], dtype=torch.float64); H = symmetric(λ)
    shares = torch.stack([curved_share(H, gens(1, i), 1., steps=5, probes=1)[0] for i in range(200)])
    assert (shares.mean() - 1/3).abs() < 4*shares.std()/200**.5
    assert curved_share(H, gens(1), 3.) == 0 and curved_share(symmetric(λ + 5), gens(1), 1.) == pytest.approx(1)


# ---- the guarantee that gives the eigenvalue its meaning ----
def test_the_largest_eigenvalue_is_the_edge_of_stability():
    "gradient descent on a quadratic stays bounded just below 2/λ and not just above"
    H = symmetric(torch.linspace(.1, 7, 30, dtype=torch.float64)[None]); λ = top_eigenvalues(H, gens(1), steps=30)[0, 0]
    assert λ == pytest.approx(7)
    for eta, grows in ((1.99/λ, False), (2.01/λ, True)):
        w = torch.ones(1, 30, dtype=torch.float64)
        for _ in range(2000): w = w - eta * (H @ w)
        assert (w.norm() > 1e3) == grows


def test_what_is_refused():
    nets, task = Replicas(partial(MLP, 64, 10, hidden_sizes=[4]), [0]), PermutedPixels(DIGITS, tasks=1, seeds=[0])[0]
    x, y = task.train.fetch(torch.arange(3)[None])
    with pytest.raises(LopError, match="at least one example"): loss_hessian(nets, x[:, :0], y[:, :0], task.loss)
    with pytest.raises(LopError, match="at least 2"): trace(loss_hessian(nets, x, y, task.loss), gens(1), probes=1)
