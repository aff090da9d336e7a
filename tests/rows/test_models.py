"The networks of the sources, row by row"
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lop_nb.compose import compose
from lop_nb.config import sizes
from lop_nb.models import CNN, MLP, ResNet, ViT, activations, make_model
from lop_nb.runtime import LopError

NORMS, BOOL = ["none", "batch", "layer", "group", "instance"], [False, True]
def count(net): return sum(p.numel() for p in net.parameters())
def data(size, channels=3, classes=10): return SimpleNamespace(shape=(channels, size, size), num_classes=classes)
def chosen(*overrides):
    "The network that a command line asks for, on 32×32 pixels in colour"
    return make_model(compose(list(overrides)).model, data(32))


@pytest.mark.parametrize("norm, after, affine, bias, p", list(product(NORMS, BOOL, BOOL, BOOL, [0., .2])), ids=str)
def test_A14_mlp(norm, after, affine, bias, p):
    "Layers stand in the order asked for under their names, and have as many parameters as a list written by hand"
    net = MLP(6, 3, hidden_sizes=[8, 4], activation="tanh", dropout_p=p, normalization=norm, norm_after_activation=after, bias=bias, normalization_affine=affine)
    kinds = dict(none=[], batch=[nn.BatchNorm1d], group=[nn.GroupNorm], layer=[nn.LayerNorm], instance=[nn.LayerNorm])[norm]
    want, n = [], 8*6 + 4*8 + 3*4 + bias*(8 + 4 + 3) + (2*(8 + 4) if affine and kinds else 0)
    for i in range(2): want += [(f"linear_{i}", nn.Linear), *[(f"norm_{i}", k) for k in kinds if not after], (f"act_{i}", nn.Tanh), *[(f"norm_{i}", k) for k in kinds if after]] + [(f"drop_{i}", None)]*(p > 0)
    have = list(net.named_children())
    assert [k for k, _ in have] == [k for k, _ in want] + ["out"] and all(t is None or isinstance(m, t) for (_, m), (_, t) in zip(have, want))
    assert count(net) == n and net(torch.randn(5, 1, 2, 3)).shape == (5, 3)


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("geometry", [dict(), dict(strides=[2, 2, 1]), dict(strides=[1, 2, 1], paddings=[0, 2, 1]), dict(kernel_sizes=[5, 3, 1], paddings=[2, 0, 0], pool_type="avg"), dict(pool_type="none", strides=[2])], ids=str)
def test_A15_cnn(size, geometry):
    "Logits come out for pictures of 28, 32 and 64 pixels, with strides and paddings other than the default"
    assert CNN(3, size, 7, conv_channels=[4, 6, 8], fc_hidden_units=[9], **geometry)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_A16_resnet():
    "The defaults have 11,173,962 parameters for 10 classes, and the other three networks their own numbers"
    assert {m: count(chosen(f"model={m}")) for m in ("resnet", "cnn", "vit", "mlp")} == dict(resnet=11_173_962, cnn=2_474_506, vit=10_732_426, mlp=461_962)


@pytest.mark.parametrize("size, tokens", [(28, 10), (32, 17), (64, 65)])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_A17_vit(size, tokens, norm):
    "Logits come out for pictures of 28, 32 and 64 pixels, and batch norm means every feature's statistics over batch and tokens"
    net, seen = ViT(3, size, 7, embed_dim=24, depth=1, normalization=norm), []
    net.block_0.attend[0].register_forward_hook(lambda m, i, o: seen.append(o))
    assert net(torch.randn(6, 3, size, size)).shape == (6, 7) and seen[0].shape == (6, tokens, 24)
    if norm == "batch":
        assert seen[0].mean((0, 1)).abs().max() < 1e-5 and (seen[0].std((0, 1), correction=0) - 1).abs().max() < .1
        assert seen[0].mean(2).abs().max() > .01   # it is not layer norm


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "elu", "selu", "swish", "none"])
@pytest.mark.parametrize("make", [lambda a: MLP(4, 2, [3], activation=a), lambda a: CNN(1, 4, 2, [3], activation=a), lambda a: ResNet(1, 4, 2, [1], 3, activation=a), lambda a: ViT(1, 4, 2, 2, 4, 1, 2, activation=a)], ids=["mlp", "cnn", "resnet", "vit"])
def test_A18_activations(make, name):
    "Each of the eight, and swish, can be chosen in each network, and a word that is none of them is answered with all"
    made = type(activations[name]())
    assert any(isinstance(m, made) for m in make(name).modules())
    if name == "leaky_relu": assert activations[name]().negative_slope == .1
    with pytest.raises(LopError, match="Choices: relu, leaky_relu, tanh, sigmoid, gelu, elu, selu, swish, none"): make("swash")


@pytest.mark.parametrize("norm, affine", list(product(NORMS, BOOL)), ids=str)
@pytest.mark.parametrize("width", [5, 48, 100])
def test_A19_normalisations(norm, affine, width):
    "Every norm, with gains or without, builds and runs in every network at widths that 32 does not divide"
    how, x = dict(normalization=norm, normalization_affine=affine), torch.randn(3, 1, 8, 8)
    nets = MLP(64, 2, [width], **how), CNN(1, 8, 2, [width], fc_hidden_units=[4], **how), ResNet(1, 8, 2, [1, 1], width, **how), ViT(1, 8, 2, 4, width, 1, 1, mlp_ratio=.5, **how)
    for net in nets:
        assert net(x).isfinite().all()
        gains = [n for n, p in net.named_parameters() if "norm" in n]
        assert bool(gains) == (affine and norm != "none")
    kind = {"layer": (nn.GroupNorm, nn.LayerNorm), "batch": (nn.BatchNorm2d, nn.BatchNorm1d)}.get(norm)
    if kind: assert isinstance(nets[2].norm_0, kind[0]) and isinstance(nets[3].norm, kind[1]) and getattr(nets[2].norm_0, "num_groups", 1) == 1


@pytest.mark.parametrize("name, sizes_of", [("mlp", dict(input_size=3)), ("cnn", dict(img_size=3)), ("resnet", dict(in_channels=1)), ("vit", dict(num_classes=2))])
def test_A20_factory(name, sizes_of):
    "A setting that the network does not know, its sizes among them, is refused and not dropped; the data set says the sizes"
    for bad in (dict(widht=3), sizes_of):
        with pytest.raises(LopError, match=f"Unknown setting of {name}"): make_model(dict(name=name) | bad, data(32))
    small = dict(mlp=dict(hidden_sizes=[4]), cnn=dict(conv_channels=[4], fc_hidden_units=[]), resnet=dict(layers=[1], base_channels=4), vit=dict(embed_dim=6, depth=1))[name]
    for set_name in ("mnist", "cifar10", "tiny_imagenet"):
        channels, side, classes = sizes[set_name]
        assert make_model(dict(name=name) | small, data(side, channels, classes))(torch.randn(2, channels, side, side)).shape == (2, classes)


def test_B10_mlp_of_the_tickets():
    "The preset's network is 784-256-10 with ReLU, 203,530 parameters, and torch's own initial weights"
    net = make_model(compose(["+experiment=tickets/lop"]).model, data(28, 1))
    assert count(net) == 203_530 and [type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.manual_seed(0); ours = make_model(compose(["+experiment=tickets/lop"]).model, data(28, 1))
    torch.manual_seed(0); theirs = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_B11_vgg():
    "Eight convolutions from 64 to 512 channels and two dense layers of 4096 with dropout build from the command line, and logits come out for 32×32"
    net = chosen("model=vgg")
    assert [m.out_channels for m in net if isinstance(m, nn.Conv2d)] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [m.out_features for m in net if isinstance(m, nn.Linear)] == [4096, 4096, 10] and sum(hasattr(m, "p") for m in net) == 2
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
