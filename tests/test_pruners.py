"Pruners at initialisation: on aged networks, on every kind of network, and what they leave as it was."
from functools import partial

import pytest
import torch

from lop_nb.data import load
from lop_nb.imp import prune
from lop_nb.masks import density, full, prunable
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.pruners import grasp, prune_at_start, pruners, snip, synflow, synflow_scores
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import Stages

data = load("digits", examples_per_class=20)
pictures = dict(in_channels=1, img_size=8, num_classes=10, dropout_p=0.)
nets = dict(mlp=partial(MLP, 64, 10, hidden_sizes=[16, 12], normalization="batch", dropout_p=0.), cnn=partial(CNN, conv_channels=[6, 6], fc_hidden_units=[8], **pictures),
            resnet=partial(ResNet, layers=[1, 1], base_channels=4, **pictures), vit=partial(ViT, patch_size=4, embed_dim=8, depth=1, n_heads=2, attn_drop_rate=0., **pictures))


def task(): return Stages(data, tasks=1).seeded([0, 1])[0]


def batch(n=30): return task().train.fetch(torch.arange(n).expand(2, -1))


@pytest.mark.parametrize("net", nets)
def test_snip_is_the_derivative_by_the_mask(net):
    "of the network itself, in training mode, by autograd through a mask of ones"
    R, (x, y) = Replicas(nets[net], (0, 1)), batch(); scores = snip(R, x, y)
    module = nets[net]().double(); module.load_state_dict({k: v[1] for k, v in (R.params | R.buffers).items()}); c = {k: torch.ones_like(module.get_parameter(k)).requires_grad_() for k in prunable(module)}
    out = torch.func.functional_call(module, {k: module.get_parameter(k).detach() * m for k, m in c.items()}, (x[1].double(),))
    slope = torch.autograd.grad(torch.nn.functional.cross_entropy(out, y[1]), list(c.values())); total = sum(g.abs().sum() for g in slope)
    for k, g in zip(c, slope): assert (scores[k][1] - g.abs() / total).abs().max() < 1e-12, k


@pytest.mark.parametrize("net", nets)
def test_grasp_is_the_change_of_the_gradient(net):
    "θ_q (H∇L)_q is minus half the derivative of ‖∇L‖² when the weight is scaled away: by a difference"
    R, (x, y) = Replicas(nets[net], (0, 1), dtype=torch.float64), batch(); scores = grasp(R, x, y, temperature=2.)
    module, k = R.modules[0], prunable(R.modules[0])[-1]
    def length(scale):
        w = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
        with torch.no_grad(): w[k][0] *= scale
        out = torch.func.functional_call(module, (w, {n: b.clone() for n, b in module.named_buffers()}), (x[0].double(),))
        return sum(g.square().sum() for g in torch.autograd.grad(torch.nn.functional.cross_entropy(out / 2, y[0]), list(w.values()), allow_unused=True) if g is not None)
    slope = (length(1 + 1e-4) - length(1 - 1e-4)) / 2e-4                      # d‖∇L‖²/dε for w₀ (1 + ε) = 2 Σ_q θ_q (H∇L)_q over the first row
    assert abs(2 * scores[k][0, 0].sum() - slope) < 1e-5 * abs(slope) + 1e-12


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_synflow_conserves(normalization):
    R = Replicas(partial(MLP, 64, 10, hidden_sizes=[16, 12, 9], normalization=normalization, dropout_p=0.), (0, 1))
    with torch.no_grad():
        for k, p in R.params.items(): p.mul_(1 + torch.arange(p[0].numel()).view(p.shape[1:]) % 3)      # an aged network: gains, biases, sizes of all kinds
    before = {k: v.clone() for k, v in (R.params | R.buffers).items()}
    s = synflow_scores(R, (64,)); layers = [*s]
    for below, here in zip(layers, layers[1:]): assert torch.allclose(s[below].sum(2), s[here].sum(1), rtol=1e-12)
    for k, v in before.items(): assert torch.equal(v, (R.params | R.buffers)[k]), k


def test_synflow_scores_what_is_left():
    R = Replicas(nets["mlp"], (0, 1)); m = synflow(R, (64,), .3, rounds=5)
    for k, s in synflow_scores(R, (64,), m).items(): assert not s[~m[k]].any(), k
    one = prune(synflow_scores(R, (64,)), .3, "global")
    assert abs(density(m) - density(one)).max() < 1e-12 and any(not torch.equal(m[k], one[k]) for k in m)


def test_a_replica_alone_and_among_others():
    for name in pruners:
        both, alone = Replicas(nets["mlp"], (0, 1)), Replicas(nets["mlp"], (1,))
        a, b = (prune_at_start(R, name, .3, Stages(data, tasks=1).seeded(s)[0], scope="layer") for R, s in ((both, [0, 1]), (alone, [1])))
        for k in b: assert torch.equal(a[k][1], b[k][0]), (name, k)


def test_refused():
    R = Replicas(nets["mlp"], (0, 1))
    with pytest.raises(LopError, match="another architecture"): synflow_scores(R, (64,), full(Replicas(nets["cnn"], (0, 1)).params, prunable(nets["cnn"]())))
    with pytest.raises(LopError, match="random, magnitude, snip"): prune_at_start(R, "imp", .3, task())
