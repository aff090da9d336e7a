"Mini-batch kernels against torch, step by step; what they refuse; and bits that do not depend on who computes beside them."
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stepping import torch_steps

import lop_nb.kernels
import lop_nb.minibatch
from lop_nb.config import SGD, Adam, AdamW, NoisySGD, RMSprop
from lop_nb.interventions import ContinualBackprop
from lop_nb.kernels import Cannot, Job, kinds
from lop_nb.layers import activations
from lop_nb.minibatch import Batches
from lop_nb.models import CNN, MLP
from lop_nb.optimizers import forget, make_optimizer
from lop_nb.remedies import WeightClipping
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError

pytestmark = pytest.mark.skipif(lop_nb.kernels.numba is None, reason="numba is not installed")
float64, float32 = torch.float64, torch.float32


def job_of(spec=Adam(lr=.01), B=8, loss="cross_entropy", hidden=(12, 9), R=2, dtype=float64, K=5, seeds=None, per_element=False, **kw):
    how = dict(normalization="none", dropout_p=0.) | {k: kw.pop(k) for k in ("activation", "dropout_p", "normalization") if k in kw}
    nets = Replicas(partial(MLP, 20, K, hidden_sizes=list(hidden), **how), range(R) if seeds is None else seeds, dtype=dtype)
    return Job(nets, spec, make_optimizer(spec, nets.params, per_element), loss, B, **kw)


def examples(n, R=2, loss="cross_entropy", dtype=float64, K=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(R, n, 20, generator=g, dtype=float64).to(dtype)
    return (x, torch.randint(K, (R, n), generator=g)) if loss == "cross_entropy" else (x, torch.randn(R, n, generator=g, dtype=float64).to(dtype))


def numbers(job):
    "All that training changes: {name: tensor}"
    memory = {f"{k} {s}": v for k, p in job.nets.params.items() for s, v in job.optimizer.state[p].items() if v is not None}
    return {k: p.detach() for k, p in job.nets.params.items()} | memory


def same(a, b, tolerance=1e-12):
    mine, its = numbers(a), numbers(b)
    assert mine.keys() == its.keys()
    for k in mine:
        assert mine[k].dtype == its[k].dtype and mine[k].shape == its[k].shape, k
        assert (mine[k] - its[k]).abs().max() <= tolerance, k


def check(job, its, x, y, tolerance=1e-12, cut=None):
    "`job` by the kernel and `its` by torch end in the same place, block by block"
    begin = {k: p.detach().clone() for k, p in job.nets.params.items()}
    family = Batches(job)
    for xb, yb in zip(x.split(cut or x.shape[1], 1), y.split(cut or x.shape[1], 1)):
        ours, torchs = family(xb, yb), torch_steps(its, xb, yb)
        for a, b in zip(ours, torchs): assert a.dtype == b.dtype and a.shape == b.shape and (a - b).abs().max() <= tolerance * max(1, b.abs().max().item())
    same(job, its, tolerance)
    assert all((p - begin[k]).abs().max() > 1e-3 for k, p in job.nets.params.items()), "nothing was learnt"


OPTIMIZERS = dict(
    adam=Adam(lr=.01), adam_decay=Adam(lr=.01, weight_decay=.1, betas=[.8, .95], eps=1e-3), adam_fused=Adam(lr=.01, implementation="fused"), adamw=AdamW(lr=.01, weight_decay=.3),
    sgd=SGD(lr=.05, momentum=0.), sgd_decay=SGD(lr=.05, momentum=0., weight_decay=.1), momentum=SGD(lr=.02), damped=SGD(lr=.05, momentum=.8, dampening=.5, weight_decay=.01), nesterov=SGD(lr=.02, nesterov=True), sgd_fused=SGD(lr=.02, implementation="fused"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_torch_for_500_steps(name):
    "parameters, the optimizer's memory, losses and logits; in blocks, so that memory goes in and out"
    x, y = examples(8 * 500)
    check(job_of(OPTIMIZERS[name]), job_of(OPTIMIZERS[name]), x, y, cut=8 * 130)


@pytest.mark.parametrize("activation", sorted({*kinds.values()} & {*activations}))
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_activations_and_losses(activation, loss):
    K = 5 if loss == "cross_entropy" else 1
    x, y = examples(8 * 60, loss=loss)
    check(*(job_of(SGD(lr=.05), loss=loss, activation=activation, K=K) for _ in range(2)), x, y)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(hidden=st.lists(st.integers(1, 40), max_size=4), B=st.integers(1, 33), steps=st.integers(1, 6), rest=st.integers(0, 32), R=st.integers(1, 3), K=st.integers(2, 30), adam=st.booleans())
def test_any_shape(hidden, B, steps, rest, R, K, adam):
    "any depth and width, any batch size; an epoch's last batch may be smaller, or larger by one. With its own eps Adam would make a whole step of a gradient that is rounding error"
    rest = rest % B; n, spec = steps * B + rest, Adam(lr=.01, eps=1e-3) if adam else SGD(lr=.1)
    (x, y), (job, its) = examples(n, R, K=K), (job_of(spec, B, hidden=hidden, R=R, K=K) for _ in range(2))
    losses, logits = Batches(job)(x, y)
    sizes = [B] * (steps - 1) + [B + 1] if rest == 1 else [B] * steps + [rest] * (rest > 0)
    for xb, yb, lb, zb in zip(*(t.split(sizes, 1) for t in (x, y, losses, logits))):
        its.batch_size = xb.shape[1]
        for a, b in zip((lb, zb), torch_steps(its, xb, yb)): assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max().item())
    same(job, its)


def test_large_gradients_are_made_in_parts(monkeypatch):
    monkeypatch.setattr(lop_nb.minibatch, "_panel", 300)
    x, y = examples(8 * 50)
    check(*(job_of(hidden=(70, 90)) for _ in range(2)), x, y)


def test_float32():
    x, y = examples(8 * 50, dtype=float32)
    check(*(job_of(SGD(lr=.05), dtype=float32) for _ in range(2)), x, y, 1e-5)


@pytest.mark.parametrize("spec", [Adam(lr=.01), SGD(lr=.1)], ids=["adam", "sgd"])
def test_weight_clipping(spec):
    x, y = examples(8 * 100)
    job, its = (job_of(spec, inside=dict(weight_clipping=WeightClipping(.7))) for _ in range(2))
    check(job, its, x, y)
    for layer, fan_in in ("linear_0", 20), ("linear_1", 12), ("out", 9):
        assert job.nets.params[f"{layer}.weight"].abs().max().item() == pytest.approx(.7 / fan_in**.5, rel=1e-12)


@pytest.mark.parametrize("spec", [Adam(lr=.01), SGD(lr=.05, momentum=.9)], ids=["adam", "sgd"])
def test_torch_goes_on_where_the_kernel_stopped_and_back(spec):
    "what the kernel writes into the optimizer torch can save, load and go on with; a new head is newborn; the settings of the moment count"
    (x, y), (job, its) = examples(8 * 30), (job_of(spec) for _ in range(2))
    for step, train in enumerate([Batches(job), partial(torch_steps, job), Batches(job)]):
        train(x, y); torch_steps(its, x, y)
        for j in job, its:
            j.optimizer.load_state_dict(j.optimizer.state_dict())
            if step == 0: forget(j.optimizer, j.nets.params, ["out.weight", "out.bias"])
            if step == 1: j.optimizer.param_groups[0]["lr"] /= 2
    same(job, its)


def test_weights_laid_out_in_another_way():
    "another kernel keeps weights [in, out]; here they become [out, in] again, and the modules see it"
    (x, y), (job, its) = examples(8 * 30), (job_of() for _ in range(2))
    torch_steps(job, x, y); torch_steps(its, x, y)
    for p in job.nets.params.values():
        if p.ndim == 3: p.data = p.data.mT.contiguous().mT; job.optimizer.state[p] = {k: v.mT.contiguous().mT if v.ndim else v for k, v in job.optimizer.state[p].items()}
    job.nets._view()
    check(job, its, x, y)
    with torch.no_grad(): assert torch.equal(job.nets.modules[1](x[1]), its.nets.modules[1](x[1])) or torch.allclose(job.nets.modules[1](x[1]), its.nets.modules[1](x[1]), atol=1e-12)


@pytest.mark.parametrize("dtype", [float64, float32], ids=["float64", "float32"])
def test_bits(dtype):
    "a replica's numbers are the same alone and among 256, in one thread and in three, in one block and in many"
    x, y = examples(16 * 6, R=256, dtype=dtype)
    def trained(pick, threads=1, cut=96):
        job = job_of(B=16, seeds=pick, dtype=dtype, threads=threads)
        return [torch.cat(t, 1) for t in zip(*map(Batches(job), x[pick].split(cut, 1), y[pick].split(cut, 1)))], numbers(job)
    (out, among), all_ = trained(list(range(256))), {}
    for kw in dict(threads=3), dict(cut=32): all_[str(kw)] = trained(list(range(256)), **kw)
    for out2, others in all_.values(): assert all(map(torch.equal, out, out2)) and all(torch.equal(among[k], others[k]) for k in among)
    for r in 0, 77, 255:
        alone, its = trained([r])
        assert all(torch.equal(a[0], b[r]) for a, b in zip(alone, out)) and all(torch.equal(v[0], among[k][r]) for k, v in its.items() if v.ndim)


def test_denormals_are_flushed_in_every_thread():
    "dead inputs: Adam's averages decay into denormal numbers, unless the caller flushes them"
    from lop_nb.runtime import flush_denormals
    x, y = examples(16 * 200, R=3, dtype=float32); x[:, 32:, :10] = 0
    def tiny(threads):
        job = job_of(Adam(lr=1e-6, betas=[.5, .6]), 16, R=3, dtype=float32, threads=threads); Batches(job)(x, y)
        m = job.optimizer.state[job.nets.params["linear_0.weight"]]["exp_avg"][..., :10]
        return ((m != 0) & (m.abs() < torch.finfo(float32).tiny)).sum((1, 2)).tolist()
    with flush_denormals() as on:
        if not on: pytest.skip("this processor can't flush denormals")
        assert tiny(1) == tiny(3) == [0, 0, 0]


def test_nan_stays():
    "a run that diverges is seen to diverge, clipped or not"
    x, y = examples(16); x[0, 3, 2] = np.nan
    job = job_of(SGD(lr=.1), inside=dict(weight_clipping=WeightClipping(1.)))
    losses, logits = Batches(job)(x, y)
    assert losses[0, 3].isnan() and losses[0, 8:].isnan().all() and job.nets.params["linear_0.weight"][0].isnan().any() and not losses[1].isnan().any()


REFUSED = dict(
    cbp=(dict(inside=dict(continual_backprop=ContinualBackprop())), "continual_backprop"), rmsprop=(dict(spec=RMSprop()), "RMSprop"), noisy=(dict(spec=NoisySGD(noise_scale=0.)), "NoisySGD"),
    ages=(dict(per_element=True), "ElementAdam"), dropout=(dict(dropout_p=.5), "drop"), norm=(dict(normalization="batch"), "BatchNorm"), half=(dict(dtype=torch.bfloat16), "bfloat16"))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    kw, word = REFUSED[name]
    with pytest.raises(Cannot, match=word): Batches(job_of(**kw))


def test_refuses_networks():
    nets = Replicas(partial(CNN, 1, 8, 10, conv_channels=[4], fc_hidden_units=[10]), [0])
    with pytest.raises(Cannot, match="CNN"): Batches(SimpleNamespace(nets=nets, inside={}))


def test_bad_input_is_told():
    (x, y), family = examples(16), Batches(job_of())
    with pytest.raises(LopError, match="0 to 4"): family(x, y.clamp(min=4) + 1)
    with pytest.raises(LopError, match="20 inputs"): family(x[..., 1:], y)
    with pytest.raises(LopError, match="examples"): family(x, y[:, 1:])
