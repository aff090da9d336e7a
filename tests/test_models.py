"The networks against references written by hand: names, numbers of parameters, shapes, and the numbers of a forward pass"
from itertools import product
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.func import functional_call, vmap
from lop_nb.config import CNNConfig, MLPConfig, ResNetConfig, ViTConfig
from lop_nb.models import CNN, MLP, Attention, Dropout, ResNet, ViT, activations, group_count, make_model, map_norm, uniform, vector_norm
from lop_nb.runtime import LopError

NORMS, BOOL = ["none", "batch", "layer", "group", "instance"], [False, True]
FLAGS = list(product(NORMS, BOOL, BOOL, BOOL, [0., .2]))     # normalization, norm_after_activation, affine, bias, dropout_p
def flags(norm, after, affine, bias, p): return dict(normalization=norm, norm_after_activation=after, normalization_affine=affine, bias=bias, dropout_p=p)
def count(net): return sum(p.numel() for p in net.parameters())
def names(net): return [n for n, _ in net.named_children()]

def in_order(i, norm, after):
    if norm == "none": return [f"act_{i}"]
    return [f"act_{i}", f"norm_{i}"] if after else [f"norm_{i}", f"act_{i}"]

@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_mlp_names_and_parameters(flag):
    norm, after, affine, bias, p = flag
    net, gains = MLP(20, 3, hidden_sizes=[12, 7], **flags(*flag)), 2*(12 + 7) if affine and norm != "none" else 0
    assert count(net) == 20*12 + 12*7 + 7*3 + bias*(12 + 7 + 3) + gains
    drop = lambda i: [f"drop_{i}"] if p else []
    assert names(net) == ["linear_0", *in_order(0, norm, after), *drop(0), "linear_1", *in_order(1, norm, after), *drop(1), "out"]
    assert net(torch.randn(4, 5, 2, 2)).shape == net(torch.randn(4, 20)).shape == (4, 3)

@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_cnn_names_and_parameters(flag):
    norm, after, affine, bias, p = flag
    net, gains = CNN(2, 12, 3, conv_channels=[6, 5], fc_hidden_units=[7], **flags(*flag)), 2*(6 + 5) if affine and norm != "none" else 0
    assert count(net) == 9*(2*6 + 6*5) + 5*3*3*7 + 7*3 + bias*(6 + 5 + 7 + 3) + gains
    drop = ["fc_drop_0"] if p else []
    assert names(net) == ["conv_0", *in_order(0, norm, after), "pool_0", "conv_1", *in_order(1, norm, after), "pool_1", "flatten", "fc_0", "fc_act_0", *drop, "out"]
    assert net(torch.randn(4, 2, 12, 12)).shape == (4, 3)

def test_no_pooling_and_no_dense_layers():
    assert names(CNN(1, 8, 2, [4], pool_type="none", fc_hidden_units=[], normalization="none")) == ["conv_0", "act_0", "flatten", "out"]
    assert names(MLP(8, 2, [])) == ["out"]

def test_published_sizes():
    assert count(MLP(3*32*32, 10)) == 461_962
    assert count(CNN(3, 32, 10)) == 2_474_506
    assert count(ResNet(3, 32, 10)) == 11_173_962
    assert count(ViT(3, 32, 10)) == 10_732_426
    assert count(MLP(784, 10, [256], normalization="none")) == 203_530

def test_nothing_works_in_place():
    for kind, a in product((lambda a: MLP(4, 2, [3], activation=a), lambda a: CNN(1, 8, 2, [3], activation=a), lambda a: ResNet(1, 8, 2, [1], 4, activation=a), lambda a: ViT(1, 8, 2, 4, 6, 1, 2, activation=a)), activations):
        assert not any(getattr(m, "inplace", False) for m in kind(a).modules())

GEOMETRIES = [dict(), dict(strides=[2, 1, 1]), dict(strides=[1, 2, 1], paddings=[0, 2, 1]), dict(kernel_sizes=[5, 3, 1], paddings=[2, 0, 0]), dict(pool_type="none", strides=[2]),
              dict(pool_type="avg"), dict(pool_size=3, paddings=[2])]
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_pictures_of_several_sizes(size, geometry):
    net = CNN(3, size, 5, conv_channels=[4, 6, 8], fc_hidden_units=[7], **geometry)
    assert net(torch.randn(2, 3, size, size)).shape == (2, 5)

def test_too_small_says_where():
    for kw, where in ((dict(strides=[2], pool_size=4), "pool_1"), (dict(kernel_sizes=[9], paddings=[0], pool_type="none"), "conv_1"), (dict(conv_channels=[2]*4), "pool_3")):
        with pytest.raises(LopError, match=f"Nothing is left at {where}:"): CNN(1, 9, 2, **dict(conv_channels=[2, 2, 2]) | kw)
    with pytest.raises(LopError, match="one pixel"): CNN(1, 4, 2, conv_channels=[2]*3, normalization="instance")

BAD = [dict(activation="rellu"), dict(normalization="bach"), dict(dropout_p=1.), dict(dropout_p=-.1)]
@pytest.mark.parametrize("bad", BAD + [dict(hidden_sizes=[3, 0])], ids=str)
def test_mlp_refuses(bad):
    with pytest.raises(LopError): MLP(4, 2, **bad)
@pytest.mark.parametrize("bad", BAD + [dict(pool_type="mean"), dict(pool_size=0), dict(strides=[0]), dict(paddings=[-1]), dict(kernel_sizes=[3, 3]), dict(conv_channels=[4, 0])], ids=str)
def test_cnn_refuses(bad):
    with pytest.raises(LopError): CNN(3, 32, 2, **bad)

RESNET, VIT = dict(layers=[1, 1], base_channels=4), dict(patch_size=4, embed_dim=12, depth=1, n_heads=3)
@pytest.mark.parametrize("bad", BAD + [dict(layers=[]), dict(layers=[0]), dict(base_channels=0), dict(stem="5x5"), dict(layers=[1]*4, normalization="instance"), dict(normalization="instance", norm_after_activation=True)], ids=str)
def test_resnet_refuses(bad):
    with pytest.raises(LopError): ResNet(3, 8, 2, **RESNET | bad)
@pytest.mark.parametrize("bad", BAD + [dict(patch_size=9), dict(patch_size=0), dict(n_heads=5), dict(n_heads=0), dict(attn_drop_rate=1.), dict(embed_dim=0), dict(depth=-1), dict(mlp_ratio=.05)], ids=str)
def test_vit_refuses(bad):
    with pytest.raises(LopError): ViT(3, 8, 2, **VIT | bad)

# ---- all normalisations, affine or not, odd widths, strides and paddings, pictures of all sizes
WIDTHS = [5, 12, 20]                                                                            # none is divisible by 32
BUILD = dict(
    mlp=lambda w, size, **kw: MLP(3*size*size, 7, hidden_sizes=[w, w + 2], **kw),
    cnn=lambda w, size, **kw: CNN(3, size, 7, conv_channels=[w, w + 2], fc_hidden_units=[w], **kw),
    strided=lambda w, size, **kw: CNN(3, size, 7, conv_channels=[w, w + 2], kernel_sizes=[5, 3], strides=[2, 1], paddings=[0, 2], fc_hidden_units=[w], **kw),
    resnet=lambda w, size, **kw: ResNet(3, size, 7, layers=[1, 1], base_channels=w, **kw),
    resnet7=lambda w, size, **kw: ResNet(3, size, 7, layers=[1, 2], base_channels=w, stem="7x7", **kw),
    vit=lambda w, size, **kw: ViT(3, size, 7, embed_dim=w, depth=1, n_heads=max(h for h in (1, 3, 4) if w % h == 0), mlp_ratio=1.7, **kw))

@pytest.mark.parametrize("norm, affine", list(product(NORMS, BOOL)), ids=str)
@pytest.mark.parametrize("kind", BUILD)
def test_everything_builds_and_learns(kind, norm, affine):
    for (w, size) in zip(WIDTHS, (28, 32, 64)):
        torch.manual_seed(0)
        net, x = BUILD[kind](w, size, normalization=norm, normalization_affine=affine), torch.randn(4, 3, size, size)
        F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert all(p.grad.abs().max() > 0 for n, p in net.named_parameters() if n.endswith("weight")), "a weight without a gradient"
        gains = sum(n.rpartition(".")[0].rpartition(".")[2].startswith("norm") for n, _ in net.named_parameters())
        assert (gains > 0) == (affine and norm != "none")

def test_28_pixels_with_patches_that_fit():
    for p, tokens in ((7, 17), (4, 50), (8, 10), (14, 5), (28, 2)): assert ViT(1, 28, 3, p, 6, 1, 2).embed.positions.shape[1] == tokens

def test_what_resnets_are_made_of():
    net = ResNet(3, 32, 10)
    assert names(net)[3:11] == [f"layer{i}_block{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    convs = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n for n, m in convs.items() if m.kernel_size == (1, 1)} == {f"layer{i}_block0.shortcut.conv" for i in (2, 3, 4)}
    assert {n for n, m in convs.items() if m.stride == (2, 2)} == {f"layer{i}_block0.{c}" for i in (2, 3, 4) for c in ("branch.conv_0", "shortcut.conv")}
    assert all(m.bias is None for m in convs.values()) and all(m.bias is not None for m in ResNet(3, 8, 2, [1, 1], 4, normalization="none").modules() if isinstance(m, nn.Conv2d))
    for m in convs.values():
        std = (2 / (m.out_channels * m.kernel_size[0]**2))**.5
        assert abs(m.weight.std() / std - 1) < 5 / (2*m.weight.numel())**.5                         # 5 standard errors
    assert names(net)[-3:] == ["flatten", "drop", "out"] and names(ResNet(3, 8, 2, [1], 4, dropout_p=0))[-2:] == ["flatten", "out"]
    x = torch.randn(2, 3, 64, 64); stem = nn.Sequential(*list(ResNet(3, 64, 10, [1], 4, stem="7x7"))[:4])
    assert stem(x).shape == (2, 4, 16, 16)

def test_initial_weights_of_a_vit():
    net = ViT(3, 32, 10, depth=1)
    drawn = [net.embed.positions, net.embed.token] + [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
    for w in drawn: assert abs(w.std() / .02 - 1) < 5 / (2*w.numel())**.5
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))

def test_one_switch_for_all_dropout():
    "attn_drop_rate=None follows dropout_p; both zero is no dropout at all"
    def rates(**kw): return sorted(m.p for m in ViT(1, 8, 2, **VIT | kw).modules() if isinstance(m, Dropout))
    assert rates(dropout_p=.3, attn_drop_rate=None) == [.3]*5 and rates(dropout_p=0., attn_drop_rate=None) == [] == rates(dropout_p=0., attn_drop_rate=0.)
    assert rates(dropout_p=0., attn_drop_rate=.1) == [.1] and rates(dropout_p=.1, attn_drop_rate=0.) == [.1]*4

def test_the_scale_of_attention_can_be_set():
    torch.manual_seed(0); a, x = Attention(6, 2, True, 0.), torch.randn(2, 3, 6)
    nn.init.normal_(a.qkv.weight); before = a(x)
    assert a.scale == 3**-.5
    a.scale /= 2; a.qkv.weight.data[:6] *= 2; a.qkv.bias.data[:6] *= 2
    torch.testing.assert_close(a(x), before)

# ---- the numbers of a forward pass, written out
by_hand = dict(relu=lambda z: z.clamp(min=0), leaky_relu=lambda z: z.where(z > 0, .1*z), tanh=lambda z: 2/(1 + (-2*z).exp()) - 1, sigmoid=lambda z: 1/(1 + (-z).exp()), swish=lambda z: z/(1 + (-z).exp()),
               gelu=lambda z: z*(1 + torch.erf(z/2**.5))/2, elu=lambda z: z.where(z > 0, z.exp() - 1), none=lambda z: z,
               selu=lambda z: 1.0507009873554805*z.where(z > 0, 1.6732632423543772*(z.exp() - 1)))

def standard(z, axes): return (z - z.mean(axes, keepdim=True)) / (z.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()

def norm_by_hand(z, kind, p, i, training):
    if kind == "none": return z
    tail = (1,)*(z.ndim - 2)
    side = lambda k: p[f"norm_{i}.{k}"].view(-1, *tail)
    if kind == "batch": h = standard(z, (0, *range(2, z.ndim))) if training else (z - side("running_mean")) / (side("running_var") + 1e-5).sqrt()
    elif kind == "layer" or z.ndim == 2 and kind == "instance": h = standard(z, tuple(range(1, z.ndim)))
    elif kind == "instance": h = standard(z, (2, 3))
    else: h = standard(z.view(len(z), {2: 2, 4: 8}[z.ndim], -1), (2,)).view_as(z)     # 8 units: two groups of four, or one for each channel's map
    return h*side("weight") + side("bias") if f"norm_{i}.weight" in p else h

@pytest.mark.parametrize("norm, after, affine", list(product(NORMS, BOOL, BOOL)), ids=str)
@pytest.mark.parametrize("training", BOOL)
def test_mlp_forward_by_hand(norm, after, affine, training):
    torch.manual_seed(0)
    net = MLP(12, 3, [8, 8], normalization=norm, norm_after_activation=after, normalization_affine=affine, activation="gelu", dropout_p=0.).double().train(training)
    for p in net.parameters(): nn.init.normal_(p)
    for k, b in net.named_buffers(): b.uniform_(.5, 2) if "running" in k else None
    p, h = {k: v.clone() for k, v in net.state_dict().items()}, (x := torch.randn(6, 3, 2, 2).double()).flatten(1)
    for i in range(2):
        h = h @ p[f"linear_{i}.weight"].T + p[f"linear_{i}.bias"]
        h = norm_by_hand(by_hand["gelu"](h), norm, p, i, training) if after else by_hand["gelu"](norm_by_hand(h, norm, p, i, training))
    torch.testing.assert_close(net(x), h @ p["out.weight"].T + p["out.bias"], rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("norm, after, affine", list(product(NORMS, BOOL, BOOL)), ids=str)
@pytest.mark.parametrize("training", BOOL)
def test_cnn_forward_by_hand(norm, after, affine, training):
    torch.manual_seed(0)
    net = CNN(2, 9, 3, [8], strides=[2], paddings=[2], pool_type="avg", fc_hidden_units=[4], normalization=norm, norm_after_activation=after, normalization_affine=affine, activation="elu", dropout_p=0.).double().train(training)
    for p in net.parameters(): nn.init.normal_(p)
    for k, b in net.named_buffers(): b.uniform_(.5, 2) if "running" in k else None
    p, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(6, 2, 9, 9).double()
    patches = F.pad(x, (2,)*4).unfold(2, 3, 2).unfold(3, 3, 2)                                # 13 pixels with padding, windows of 3 every 2: 6
    h = torch.einsum("bcijkl,ockl->boij", patches, p["conv_0.weight"]) + p["conv_0.bias"].view(-1, 1, 1)
    h = norm_by_hand(by_hand["elu"](h), norm, p, 0, training) if after else by_hand["elu"](norm_by_hand(h, norm, p, 0, training))
    h = h.view(6, 8, 3, 2, 3, 2).mean((3, 5)).flatten(1)
    h = by_hand["elu"](h @ p["fc_0.weight"].T + p["fc_0.bias"])
    torch.testing.assert_close(net(x), h @ p["out.weight"].T + p["out.bias"], rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("norm, after, affine", [f for f in product(NORMS, BOOL, BOOL) if not (f[1] and f[0] == "instance")], ids=str)
@pytest.mark.parametrize("training", BOOL)
def test_resnet_forward_by_hand(norm, after, affine, training):
    torch.manual_seed(0); act = by_hand["elu"]
    net = ResNet(2, 5, 3, layers=[1, 1], base_channels=4 if not (after and norm == "group") else 17, normalization=norm, norm_after_activation=after, normalization_affine=affine, activation="elu", dropout_p=0.).double().train(training)
    for p in net.parameters(): nn.init.normal_(p)
    for k, b in net.named_buffers(): b.uniform_(.5, 2) if "running" in k else None
    p, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(6, 2, 5, 5).double()
    def conv(z, name, k, s):
        windows = F.pad(z, (k//2,)*4).unfold(2, k, s).unfold(3, k, s)
        return torch.einsum("bcijkl,ockl->boij", windows, p[f"{name}.weight"]) + (p[f"{name}.bias"].view(-1, 1, 1) if f"{name}.bias" in p else 0)
    def normed(z, name):
        if norm == "none": return z
        own, C = {k.rpartition(".")[2]: v for k, v in p.items() if k.startswith(name + ".")}, z.shape[1]
        side = lambda k: own[k].view(-1, 1, 1)
        if norm == "batch" and not training: h = (z - side("running_mean")) / (side("running_var") + 1e-5).sqrt()
        elif norm == "batch": h = standard(z, (0, 2, 3))
        else: h = standard(z.reshape(6, {"layer": 1, "instance": C, "group": max(g for g in range(1, 33) if C % g == 0 and C // g * z[0, 0].numel() >= 4)}[norm], -1), (2,)).reshape(z.shape)
        return h*side("weight") + side("bias") if "weight" in own else h
    def step(z, name): return normed(act(z), name) if after else act(normed(z, name))
    h = step(conv(x, "conv_0", 3, 1), "norm_0")
    for b, s in (("layer1_block0", 1), ("layer2_block0", 2)):
        f = conv(step(conv(h, f"{b}.branch.conv_0", 3, s), f"{b}.branch.norm_0"), f"{b}.branch.conv_1", 3, 1)
        around = h if s == 1 else normed(conv(h, f"{b}.shortcut.conv", 1, s), f"{b}.shortcut.norm")
        h = normed(act(f + around), f"{b}.end.norm_1") if after else act(normed(f, f"{b}.branch.norm_1") + around)
    torch.testing.assert_close(net(x), h.mean((2, 3)) @ p["out.weight"].T + p["out.bias"], rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("norm, affine, bias", list(product(NORMS, BOOL, BOOL)), ids=str)
@pytest.mark.parametrize("training", BOOL)
def test_vit_forward_by_hand(norm, affine, bias, training):
    torch.manual_seed(0); D, H = 8, 2
    net = ViT(2, 9, 3, 4, D, 2, H, 1.6, bias, 0., 0., "tanh", norm, affine).double().train(training)
    for p in net.parameters(): nn.init.normal_(p, std=.3)
    for k, b in net.named_buffers(): b.uniform_(.5, 2) if "running" in k else None
    p, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(6, 2, 9, 9).double()
    def normed(z, name):
        if norm == "none": return z
        own = {k.rpartition(".")[2]: v for k, v in p.items() if k.startswith(name + ".")}
        if norm == "batch" and not training: h = (z - own["running_mean"]) / (own["running_var"] + 1e-5).sqrt()
        elif norm == "batch": h = standard(z, (0, 1))
        else: h = standard(z.reshape(6, 5, 2 if norm == "group" else 1, -1), (3,)).view_as(z)
        return h*own["weight"] + own["bias"] if "weight" in own else h
    def linear(z, name): return z @ p[f"{name}.weight"].T + (p[f"{name}.bias"] if f"{name}.bias" in p else 0)
    tokens = [torch.einsum("bchw,dchw->bd", x[:, :, i:i+4, j:j+4], p["embed.patch.weight"]) + p["embed.patch.bias"] for i in (0, 4) for j in (0, 4)]   # the ninth row and column are not seen
    h = torch.stack([p["embed.token"][0].expand(6, D), *tokens], 1) + p["embed.positions"]
    for b in ("block_0", "block_1"):
        joint, heads = linear(normed(h, f"{b}.attend.norm"), f"{b}.attend.heads.qkv"), []
        for i in range(H):
            q, k, v = (joint[..., part*D + i*D//H:part*D + (i + 1)*D//H] for part in range(3))
            a = (torch.einsum("bid,bjd->bij", q, k) / (D//H)**.5).exp()
            heads.append(torch.einsum("bij,bjd->bid", a / a.sum(2, keepdim=True), v))
        h = h + linear(torch.cat(heads, 2), f"{b}.attend.heads.proj")
        h = h + linear(linear(normed(h, f"{b}.mlp.norm"), f"{b}.mlp.fc_0").tanh(), f"{b}.mlp.fc_1")
    torch.testing.assert_close(net(x), linear(normed(h, "norm")[:, 0], "out"), rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("name", activations)
def test_activations_by_hand(name):
    z = torch.linspace(-8, 8, 1001).double()
    torch.testing.assert_close(activations[name]()(z), by_hand[name](z), rtol=1e-12, atol=1e-12)

GAINS = dict(relu=2**.5, leaky_relu=(2/(1 + .3**2))**.5, tanh=5/3, sigmoid=1., selu=.75, swish=2**.5, elu=2**.5, gelu=2**.5, none=1.)   # torch's table, and the ReLU's where it has nothing

@pytest.mark.parametrize("name", activations)
def test_kaiming_begins_within_its_bounds_and_fresh_units_too(name):
    "weights uniform within ±g√(3/fan_in), the head with g = 1, biases zero; the distribution that replaced units draw from is that of their layer"
    torch.manual_seed(0); net = MLP(80, 10, [400, 300], name, negative_slope=.3, init="kaiming", normalization="batch")
    for m, g in (net.linear_0, GAINS[name]), (net.linear_1, GAINS[name]), (net.out, 1.):
        b, w = g*(3/m.in_features)**.5, m.weight.detach()
        assert .99*b < w.abs().max() <= b*(1 + 1e-6) and abs(w.std() - b/3**.5) < .03*b and abs(w.mean()) < .05*b and not m.bias.any()
    for group, fan_in in zip(net.unit_groups()[1:-1], (80, 400)):
        w = group.fresh((400, fan_in), fan_in, torch.Generator().manual_seed(1)); b = GAINS[name]*(3/fan_in)**.5
        assert .99*b < w.abs().max() <= b*(1 + 1e-6) and abs(w.std() - b/3**.5) < .01*b

def test_glorot_is_normal_with_its_own_deviation_in_each_layer_and_fresh_units_too():
    "variance 2/(fan_in + fan_out), biases zero: torch's xavier_normal_, number for number"
    torch.manual_seed(0); net = MLP(80, 10, [400, 300], init="glorot", normalization="batch")
    torch.manual_seed(0); same = MLP(80, 10, [400, 300], normalization="batch")
    for m in (same.linear_0, same.linear_1, same.out): torch.nn.init.xavier_normal_(m.weight)
    for m, other in (net.linear_0, same.linear_0), (net.linear_1, same.linear_1), (net.out, same.out):
        assert not m.bias.any(); torch.testing.assert_close(m.weight, other.weight, rtol=1e-6, atol=1e-8)
    for group, (fan_in, fan_out) in zip(net.unit_groups()[1:-1], ((80, 400), (400, 300))):
        w, std = group.fresh((500, fan_in), fan_in, torch.Generator().manual_seed(1)), (2/(fan_in + fan_out))**.5
        assert abs(w.std() - std) < 4*std/(2*w.numel())**.5 and w.abs().max() > 3.5*std      # four standard errors; no bound, as a uniform one has

def test_torchs_own_start_is_the_default_and_the_slope_reaches_the_layer():
    torch.manual_seed(0); a = MLP(8, 3, [4], "leaky_relu")
    torch.manual_seed(0); b = MLP(8, 3, [4], "leaky_relu", negative_slope=.01, init="torch")
    assert torch.equal(a.linear_0.weight, b.linear_0.weight) and (a.act_0.negative_slope, b.act_0.negative_slope) == (.1, .01)
    assert all(g.fresh is uniform for g in a.unit_groups())
    with pytest.raises(LopError, match="Choices: torch, kaiming, glorot"): MLP(8, 3, [4], init="he")
    with torch.device("meta"): assert MLP(8, 3, [4], init="kaiming").linear_0.weight.is_meta

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [1, 2, 7, 12, 37, 64, 100])
def test_norms_build_for_any_width(norm, width):
    for affine in BOOL:
        for net, x in ((vector_norm(norm, width, affine), torch.randn(5, width)), (map_norm(norm, width, 3, affine), torch.randn(5, width, 3, 3))):
            if net is not None: assert net(x).shape == x.shape and len(list(net.parameters())) == 2*affine

def test_groups():
    for width, positions in product(range(1, 200), (1, 4, 16)):
        g = group_count(width, positions)
        assert width % g == 0 and g <= 32 and (g == 1 or width//g*positions >= 4)
        assert not any(width % k == 0 and width//k*positions >= 4 for k in range(g + 1, 33))

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet", "vit"])
def test_state_dict_round_trip(kind, norm):
    small = dict(mlp=dict(hidden_sizes=[6]), cnn=dict(conv_channels=[4], fc_hidden_units=[5]), resnet=RESNET, vit=VIT)
    make = lambda: make_model(dict(name=kind, normalization=norm, **small[kind]), SimpleNamespace(shape=(2, 8, 8), num_classes=3))
    a, b, x = make(), make(), torch.randn(9, 2, 8, 8)
    a(x)                                                                                        # moves the running statistics
    assert not torch.equal(a.eval()(x), b.eval()(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [lambda **kw: MLP(32, 3, [8], **kw), lambda **kw: CNN(2, 4, 3, [8], **kw), lambda **kw: ResNet(2, 4, 3, **RESNET, **kw), lambda **kw: ViT(2, 4, 3, 2, 8, 1, 2, attn_drop_rate=0., **kw)], ids=["mlp", "cnn", "resnet", "vit"])
def test_vmap_over_replicas(kind, norm):
    "Stacked parameters and buffers under vmap give what single networks give, running statistics included"
    make = lambda: kind(normalization=norm, dropout_p=0.).double()
    nets, x = [make() for _ in range(3)], torch.randn(3, 6, 2, 4, 4).double()
    params = {k: torch.stack([dict(n.named_parameters())[k].detach() for n in nets]) for k, _ in nets[0].named_parameters()}
    buffers = {k: torch.stack([dict(n.named_buffers())[k].clone() for n in nets]) for k, _ in nets[0].named_buffers()}
    out = vmap(lambda p, b, x: functional_call(nets[0], (p, b), (x,)), randomness="different")(params, buffers, x)
    torch.testing.assert_close(out, torch.stack([n(xr) for n, xr in zip(nets, x)]), rtol=1e-12, atol=1e-12)
    for k, b in buffers.items(): torch.testing.assert_close(b, torch.stack([dict(n.named_buffers())[k] for n in nets]), rtol=1e-12, atol=1e-12)

def test_dropout_draws_from_its_own_generator():
    drop, x = Dropout(.3), torch.ones(4, 50)
    drop.generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state(); a = drop(x)
    assert torch.equal(torch.get_rng_state(), state)
    drop.generator.manual_seed(5)
    assert torch.equal(vmap(lambda x: drop(x), randomness="different")(x[None])[0], a)
    x.requires_grad_(); out = drop(x); out.sum().backward()
    assert torch.equal(x.grad, out)                                                             # the same mask backward

def test_dropout_is_exact_in_double_precision():
    drop = Dropout(.1); out = drop(torch.ones(1000).double())
    assert set(out.tolist()) == {0., 1/.9}

def test_uniform_is_torchs_own():
    for shape, fan_in in (((3, 50, 1, 20), 20), ((3, 50, 1, 2, 3, 3), 18)):
        w = uniform(shape, fan_in, torch.Generator().manual_seed(0))
        assert w.shape == shape and .99 <= w.abs().max() * fan_in**.5 <= 1 and abs(w.mean()) < .1*fan_in**-.5   # 5 standard errors or more

def test_factory():
    data = SimpleNamespace(shape=(3, 32, 32), num_classes=10)
    for config, n in ((MLPConfig(), 461_962), (CNNConfig(), 2_474_506), (ResNetConfig(), 11_173_962), (ViTConfig(), 10_732_426)):
        for c in (config, OmegaConf.structured(config), OmegaConf.to_container(OmegaConf.structured(config)), dict(name=config.name)): assert count(make_model(c, data)) == n
    for bad, says in ((dict(name="mlp", hiden_sizes=[3]), "Did you mean 'hidden_sizes'"), (dict(name="mlp", conv_channels=[3]), "Unknown setting of mlp"), (dict(name="cnn", img_size=3), "Unknown setting of cnn"), (dict(name="resnet", bias=True), "Unknown setting of resnet"), (dict(name="vit", patchsize=4), "Did you mean 'patch_size'"),
                      (dict(name="nlp"), "Did you mean 'mlp'"), (dict(hidden_sizes=[3]), "Unknown model 'None'")):
        with pytest.raises(LopError, match=says): make_model(bad, data)
    for config in (CNNConfig(), ResNetConfig(), ViTConfig()):
        with pytest.raises(LopError, match="square"): make_model(config, SimpleNamespace(shape=(1, 8, 9), num_classes=2))
    assert make_model(MLPConfig(), SimpleNamespace(shape=(1, 8, 9), num_classes=2)).linear_0.in_features == 72
