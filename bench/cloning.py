"""Cloning a ResNet-18: a wider network built and filled layer by layer, as one would write it for one network, against the clone of the unit graph, which knows no layers."""
import torch
from torch import nn

from lop_nb.cloning import clone
from lop_nb.models import ResNet

from .core import Row, Way


@torch.no_grad()
def by_hand(net, make, k):
    "Convolutions, linear layers and batch norms, module by module"
    wide = make(k)
    for m, w in zip(net.modules(), wide.modules()):
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            a, b = w.weight.shape[1] // m.weight.shape[1], w.weight.shape[0] // m.weight.shape[0]
            w.weight.copy_(m.weight.repeat_interleave(b, 0).repeat_interleave(a, 1) / a)
            if m.bias is not None: w.bias.copy_(m.bias.repeat_interleave(b, 0))
        elif isinstance(m, nn.BatchNorm2d):
            for name in "weight", "bias", "running_mean", "running_var": getattr(w, name).copy_(getattr(m, name).repeat_interleave(k))
    return wide


def row(base):
    make = lambda k: ResNet(3, 32, 10, base_channels=base * k, dropout_p=0.); net = make(1)
    hand, ours = by_hand(net, make, 2).state_dict(), clone(net, 2).state_dict()
    assert all(torch.equal(hand[n], t) for n, t in ours.items() if t.is_floating_point())
    ways = {"plain, layer by layer": Way("plain", lambda: (lambda: by_hand(net, make, 2), 1), same=False), "ours": Way("ours", lambda: (lambda: clone(net, 2), 1), same=False)}
    return Row("cloning", f"ResNet-18 of {base} channels to {2 * base}", ways, {("ours", "plain, layer by layer"): 1.}, unit="clones/s", note="Asked was a clone in less than a second.")


def rows(quick=False): return {"cloning": lambda: row(4 if quick else 64)}
