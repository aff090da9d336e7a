"""Rows A48, A49, A52, A54 and A58 of the sources: what single units do."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lop_nb.activity import activation_statistics, dead_fraction, frozen_fraction, histogram, saturated_gradient_fraction, slopes, unit_moments, weight_norm
from lop_nb.config import Adam
from lop_nb.copies import duplicate_fraction
from lop_nb.data import load
from lop_nb.learner import Callback, Learner
from lop_nb.models import MLP
from lop_nb.monitor import Monitor
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels

def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_A48_dead_units():
    "Units that are zero throughout are all dead, ReLUs of standard normal numbers are not, and a unit is if it is below 1e-7 in 95 % of the samples"
    assert dead_fraction(torch.zeros(500, 8)) == 1 and dead_fraction(normal(500, 8).relu()) == 0
    h = torch.ones(500, 8); h[:476, :3] = 1e-8; h[:474, 3] = 1e-8; h[:, 4] = 2e-7
    assert dead_fraction(h) == 3/8 and dead_fraction(h, threshold=.9) == 4/8 and dead_fraction(h, eps=1e-6) == 4/8


def test_A49_duplicate_units():
    "Ten copies of a unit are ten duplicates (nine as published), by correlation, cosine or the size of either"
    copies = normal(100, 1)@torch.ones(1, 10)
    for kind in ("pearson", "cosine"):
        assert duplicate_fraction(copies, kind=kind) == 1 and duplicate_fraction(copies, kind=kind, how="later") == pytest.approx(.9) == duplicate_fraction(copies, kind=kind, how="groups")
        mirrored = torch.cat([copies[:, :1], -copies[:, :1], normal(100, 2, seed=1)], 1)
        assert duplicate_fraction(mirrored, kind=kind) == 0 and duplicate_fraction(mirrored, kind=kind, absolute=True) == .5
    unrelated = 2 + .2*normal(500, 100)                        # DA15: .99 as published, and none by correlation
    assert duplicate_fraction(unrelated, kind="cosine", how="later") == pytest.approx(.99) and duplicate_fraction(unrelated) == 0


def pulls(net, x, y):
    "Pre-activations, activations, and the gradient of the summed loss with respect to each, of the first hidden layer"
    z = net.linear_0(x.flatten(1)); h = net.act_0(z)
    return z.detach(), h.detach(), *torch.autograd.grad(F.cross_entropy(net.out(h), y, reduction="sum"), (z, h))

def test_A52_saturated_units():
    "The share doesn't depend on the batch's size or the loss's, and a zeroed head leaves it unmeasurable by gradients (as published: everything saturated) and unchanged by slopes"
    torch.manual_seed(0)
    data = load("digits").train; x, y = data.x.float()/255, data.y
    net = MLP(64, 10, hidden_sizes=[128], normalization="none", dropout_p=0.)
    with torch.no_grad(): net.linear_0.bias[:32] = -10         # 32 of 128 are silent
    z, h, gz, gh = pulls(net, x, y)
    silent, most = dead_fraction(h, 1., 0.), dead_fraction(h, .99, 0.)               # these alone: no unit is there whose gradient is merely small
    assert .25 <= silent <= most < .35
    for many in (1, 10):
        for scale in (1., 1e-3, 1e3):
            for a, g, want in ((z, gz, most), (h, gh, silent)): assert saturated_gradient_fraction(a.repeat(many, 1), scale*g.repeat(many, 1), threshold=.99) == want
    published = [saturated_gradient_fraction(h.repeat(many, 1), gh.repeat(many, 1)/len(h)/many, threshold=.99, how="source").item() for many in (1, 10, 100)]
    assert published[0] < .1 and published[2] - published[0] > .5                    # DA18: the same network, the same samples
    assert published[2] <= 1 - silent                          # and the silent ones count as responsive
    assert saturated_gradient_fraction(h, 0*gh, how="source") == 1
    net.out.weight.data.zero_(); z, h, gz, gh = pulls(net, x, y)
    assert saturated_gradient_fraction(h, gh).isnan() and saturated_gradient_fraction(h, gh/len(h), how="source") == 1 and frozen_fraction(slopes(net.act_0, z)) == silent


def test_A54_activation_statistics():
    "Mean and deviation of each unit, the four numbers made of them under the sources' names, and histograms of both"
    h = normal(3, 200, 50)*torch.linspace(.5, 2, 50) + torch.linspace(-1, 1, 50)
    means, stds = unit_moments(h)
    assert torch.allclose(means, h.mean(1), atol=1e-5) and torch.allclose(stds, h.std(1, correction=0), atol=1e-5)
    told = activation_statistics(h)
    assert list(told) == ["mean_of_means", "std_of_means", "mean_of_stds", "std_of_stds"] and all(v.shape == (3,) for v in told.values())
    assert torch.allclose(told["std_of_means"], means.std(1, correction=0)) and torch.allclose(told["mean_of_stds"], stds.mean(1))
    for of, values in (("means", means), ("stds", stds)):
        edges = torch.linspace(values.min().item(), values.max().item(), 21)
        assert torch.equal(histogram(h, edges, of).sum(-1), torch.full((3,), 50.)) and histogram(h, edges, of)[0].tolist() == torch.histogram(values[0], edges).hist.tolist()


class GradientNorm(Callback):
    def after_backward(self, learner):
        for name, p in learner.replicas.params.items():
            if p.grad is not None and p.grad.ndim == 3: learner.log("gradient_norm", weight_norm(p.grad), "train", name)

def test_A58_weight_norms_and_gradient_magnitudes():
    "Both are there as a series for each layer, and the last weight norm is that of the weights at the end"
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[16, 16], normalization="none", dropout_p=0.), [0, 1])
    learner = Learner(nets, PermutedPixels(load("digits"), tasks=3), Adam(), epochs=1, callbacks=[Monitor(["weight_norm"]), GradientNorm()]).fit()
    rows = learner.records.query("metric == 'weight_norm'")
    assert sorted(rows.layer.unique()) == ["act_0", "act_1"] and (rows.groupby(["layer", "replica"]).task.nunique() == 3).all()
    last = rows[rows.task == 2].pivot(index="layer", columns="replica", values="value").to_numpy()
    want = torch.stack([weight_norm(nets.params[f"linear_{i}.weight"].detach()) for i in (0, 1)])
    assert torch.allclose(torch.tensor(last), want.double(), rtol=1e-6)
    grads = learner.records.query("metric == 'gradient_norm'")
    assert set(grads.layer) == {"linear_0.weight", "linear_1.weight", "out.weight"} and (grads.value > 0).all() and (grads.groupby(["layer", "replica"]).step.nunique() == learner.at.step).all()
