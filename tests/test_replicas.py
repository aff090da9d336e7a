"The two strategies agree, one seed gives one result, and a replica does not notice its neighbours."
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop, L2Init
from lop_nb.learner import Callback, Learner
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.optimizers import make_optimizer
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels

DATA = load("digits")
mlp = partial(MLP, 64, 10, hidden_sizes=[16, 12])
cnn = partial(CNN, 1, 8, 10, conv_channels=[4, 6], fc_hidden_units=[10])
resnet = partial(ResNet, 1, 8, 10, layers=[1, 1], base_channels=4)
vit = partial(ViT, 1, 8, 10, patch_size=4, embed_dim=12, depth=1, n_heads=3, mlp_ratio=2.)
ALL = dict(argvalues=[mlp, cnn, resnet, vit], ids=["mlp", "cnn", "resnet", "vit"])


class Steps(Callback):
    "Stop after so many steps"
    def __init__(self, n): self.n = n
    def after_step(self, learner):
        if learner.at.step == self.n: raise StopIteration


def trained(make, seeds, steps=20, optimizer=Adam(lr=.01), callbacks=(), dtype=None, **kw):
    learner = Learner(Replicas(make, seeds, dtype=dtype, **kw), PermutedPixels(DATA, tasks=3), optimizer, epochs=1, callbacks=[*callbacks, Steps(steps)], defaults=())
    if dtype: learner.stream = Wrapped(learner.stream, dtype)
    try: learner.fit()
    except StopIteration: pass
    return learner.replicas


class Wrapped:
    "A stream whose inputs have another dtype"
    def __init__(self, stream, dtype): self.stream, self.dtype = stream, dtype
    def __getattr__(self, name): return getattr(self.stream, name)
    def __len__(self): return len(self.stream)
    def __getitem__(self, k):
        task = self.stream[k]; fetch = task.train.fetch
        def cast(pick, change=None, progress=None): x, y = fetch(pick); return x.to(self.dtype), y
        object.__setattr__(task.train, "fetch", cast)
        return task


def state(nets, r=slice(None)): return {k: v.detach()[r] for k, v in (nets.params | nets.buffers).items()}


OPTIMIZERS = dict(argvalues=[SGD(lr=.05), Adam(lr=.01)], ids=["sgd", "adam"])


def on_noise(make, optimizer, strategy, steps=20):
    "Some steps on random inputs, in which no pixel is constant: behind batch norm a constant input's weights have no gradient but rounding noise"
    nets, g = Replicas(make, [0, 1, 2], strategy, dtype=torch.float64), torch.Generator().manual_seed(0)
    opt = make_optimizer(optimizer, nets.params)
    for _ in range(steps):
        x, y = torch.randn(3, 32, 1, 8, 8, dtype=torch.float64, generator=g), torch.randint(10, (3, 32), generator=g)
        nets.backward(torch.stack([F.cross_entropy(l, t, reduction="none") for l, t in zip(nets(x), y)])); opt.step()
    return nets, x


@pytest.mark.parametrize("optimizer", **OPTIMIZERS)
@pytest.mark.parametrize("norm, bias", [("none", True), ("batch", False), ("layer", True)])
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_loop_and_vmap_agree(make, norm, bias, optimizer):
    (loop, _), (vmap, _) = (on_noise(partial(make, normalization=norm, bias=bias, dropout_p=0.), optimizer, s) for s in ("loop", "vmap"))
    for k, v in state(loop).items():
        assert v.dtype in (torch.float64, torch.int64) and (v - state(vmap)[k]).abs().max() <= 1e-12, k


@pytest.mark.parametrize("optimizer", **OPTIMIZERS)
@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group", "instance"])
@pytest.mark.parametrize("make", [resnet, partial(vit, attn_drop_rate=0., qkv_bias=False)], ids=["resnet", "vit"])
def test_loop_and_vmap_agree_on_streams(make, norm, optimizer):
    "Five steps. What is added to all tokens alike, batch norm takes away again: such biases are inert, see below"
    (loop, x), (vmap, _) = (on_noise(partial(make, normalization=norm, dropout_p=0.), optimizer, s, 5) for s in ("loop", "vmap"))
    a, b = state(loop), state(vmap)
    inert = ("heads.proj.bias", "fc_1.bias", "norm.running_mean") if norm == "batch" and make is not resnet else ()
    for k in a: assert (a[k] - b[k]).abs().max() <= (5 * optimizer.lr * 1e-8 if k.endswith(inert) else 1e-12), k
    assert (loop(x) - vmap(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("optimizer", **OPTIMIZERS)
def test_the_bias_of_keys_is_inert(optimizer):
    "q·(k + b) adds the same to all keys, and softmax takes it away again; all else agrees"
    (loop, x), (vmap, _) = (on_noise(partial(vit, attn_drop_rate=0., dropout_p=0.), optimizer, s, 5) for s in ("loop", "vmap"))
    a, b = state(loop), state(vmap)
    for k in a:
        d = (a[k] - b[k]).abs()
        if k.endswith("qkv.bias"): assert d[:, 12:24].max() <= 5 * optimizer.lr * 1e-8; d[:, 12:24] = 0
        assert d.max() <= 1e-12, k
    assert (loop(x) - vmap(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("optimizer", **OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_a_bias_before_batch_norm_is_inert(make, optimizer):
    """Batch norm subtracts such a bias again: its gradient is zero but for rounding, some 1e-16, which Adam divides by eps = 1e-8.
    So in each of 20 steps it may move by lr · 1e-8 of noise, and the running mean moves along. All else agrees to 1e-12, and so do the logits,
    which see only the difference of the two."""
    (loop, x), (vmap, _) = (on_noise(partial(make, normalization="batch", dropout_p=0.), optimizer, s) for s in ("loop", "vmap"))
    a, b = state(loop), state(vmap)
    inert = [f"{layer}_{i}.{name}" for i in (0, 1) for layer, name in (("linear", "bias"), ("conv", "bias"), ("norm", "running_mean"))]
    for k in a: assert (a[k] - b[k]).abs().max() <= (20 * optimizer.lr * 1e-8 if k in inert else 1e-12), k
    assert (loop(x) - vmap(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("make", **ALL)
def test_one_seed_gives_one_result(make, strategy):
    a, b = (state(trained(make, [3, 4], strategy=strategy)) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = state(trained(make, [5, 6], strategy=strategy))
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("arm", [[], [partial(ContinualBackprop, .05, 5)], [partial(L2Init, .01)]], ids=["backprop", "cbp", "l2_init"])
@pytest.mark.parametrize("make", **ALL)
def test_a_replica_does_not_notice_its_neighbours(make, arm):
    "bit for bit, with batch norm, dropout and interventions"
    steps = 100 if make in (mlp, cnn) else 40
    among = state(trained(make, [7, 8, 9], steps, callbacks=[c() for c in arm]), 1)
    alone = state(trained(make, [8], steps, callbacks=[c() for c in arm]), 0)
    for k in among: assert torch.equal(among[k], alone[k]), k


@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
@pytest.mark.parametrize("make", [resnet, vit], ids=["resnet", "vit"])
def test_no_norm_lets_replicas_notice_each_other(make, norm):
    make = partial(make, normalization=norm, dropout_p=.3)
    among, alone = state(trained(make, [7, 8, 9], 10), 1), state(trained(make, [8], 10), 0)
    for k in among: assert torch.equal(among[k], alone[k]), k


@pytest.mark.parametrize("make", [partial(vit, dropout_p=0., attn_drop_rate=.5), partial(vit, dropout_p=.5, attn_drop_rate=0.)], ids=["attention", "elsewhere"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_dropout_of_a_vit_draws_from_its_own_generator(make, strategy):
    "The same seeds drop the same, each forward pass drops anew, and torch's own generator is left alone"
    nets, x = Replicas(make, [5, 6], strategy), torch.randn(1, 4, 1, 8, 8).expand(2, -1, -1, -1, -1)
    rng = torch.get_rng_state(); a, b = nets(x), nets(x)
    assert torch.equal(torch.get_rng_state(), rng) and not torch.equal(a, b)
    with nets.evaluating(): assert torch.equal(nets(x), nets(x))
    again = Replicas(make, [5, 6], strategy)
    assert torch.equal(again(x), a)


def test_fused_agrees_to_rounding():
    make = partial(mlp, normalization="none", dropout_p=0.)
    a, b = (state(trained(make, [0, 1], 40, Adam(lr=.01, implementation=i), dtype=torch.float64)) for i in ("foreach", "fused"))
    for k in a: assert (a[k] - b[k]).abs().max() <= 1e-12, k


def test_dropout_under_vmap_differs_between_replicas_and_keeps_the_mean():
    nets = Replicas(partial(MLP, 64, 64, hidden_sizes=[64], normalization="none", dropout_p=.5), [0, 0], strategy="vmap")
    x = torch.randn(1, 2000, 64).expand(2, -1, -1)
    a, b = nets(x).detach()
    assert not torch.equal(a, b)
    with nets.evaluating(): c = nets(x)[0]
    assert (a.mean(0) - c.mean(0)).abs().max() < .1
