"The unit graph against brute force over all settings, against graphs that are wrong on purpose, and against Torch-Pruning"
from dataclasses import replace
from itertools import product
import pytest, torch
import torch_pruning as tp
from torch import nn
from lop_nb.models import CNN, MLP, ResNet, Slice, ViT, chain_groups
from lop_nb.runtime import LopError
from lop_nb.units import UnitGraph, faults, gather, scatter

NORMS, BOOL = ["none", "batch", "layer", "group", "instance"], [False, True]
FLAGS = list(product(NORMS, BOOL, BOOL, BOOL))          # normalization, norm_after_activation, normalization_affine, bias

GEOMETRIES = [  # one deviation from the defaults each, then some together
    dict(), dict(strides=[2]), dict(paddings=[0]), dict(paddings=[2], kernel_sizes=[5, 1]), dict(pool_type="avg"), dict(pool_type="none"), dict(pool_size=3),
    dict(fc_hidden_units=[]), dict(fc_hidden_units=[5, 4]), dict(fc_hidden_units=[], pool_type="none", strides=[2, 1], paddings=[0, 2], kernel_sizes=[3, 5])]

def flags(norm, after, affine, bias): return dict(normalization=norm, norm_after_activation=after, normalization_affine=affine, bias=bias)

def shaken(model):
    "The model with random parameters and running statistics, none of them special"
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p += .3 * torch.randn_like(p)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"): b.normal_(0, .5)
            if name.endswith("running_var"): b.uniform_(.5, 2)
    return model

def mlp(cls=MLP, sizes=(8, 5), **kw): return shaken(cls(12, 3, hidden_sizes=list(sizes), **kw)), torch.randn(6, 12)
def cnn(cls=CNN, **kw): return shaken(cls(2, 13, 3, **dict(conv_channels=[8, 4], fc_hidden_units=[5]) | kw)), torch.randn(6, 2, 13, 13)

def resnet(cls=ResNet, **kw): return shaken(cls(2, 9, 3, **dict(layers=[2, 1], base_channels=3) | kw)), torch.randn(4, 2, 9, 9)
def vit(cls=ViT, **kw): return shaken(cls(2, 9, 3, **dict(patch_size=4, embed_dim=6, n_heads=2, depth=1, mlp_ratio=1.2) | kw)), torch.randn(4, 2, 9, 9)

@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_every_unit_of_an_mlp(flag):
    for activation in ("relu", "tanh"):
        assert faults(*mlp(**flags(*flag), activation=activation)) == []

@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_every_unit_of_a_cnn(flag): assert faults(*cnn(**flags(*flag))) == []

@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group"])
@pytest.mark.parametrize("geometry", GEOMETRIES[1:], ids=str)
def test_every_geometry(norm, geometry): assert faults(*cnn(normalization=norm, norm_after_activation=len(geometry) == 1, **geometry)) == []

@pytest.mark.parametrize("norm, after, affine", list(product(NORMS, BOOL, BOOL)), ids=str)
def test_every_unit_of_a_resnet(norm, after, affine):
    kw = dict(normalization=norm, norm_after_activation=after, normalization_affine=affine)
    if after and norm == "instance":                                                    # brute force found it: no unit moves the logits
        with pytest.raises(LopError, match="would not depend on its input"): resnet(**kw)
        return
    if after and norm == "group": kw |= dict(layers=[1], base_channels=34)  # groups of two channels
    assert faults(*resnet(**kw)) == []

@pytest.mark.parametrize("kw", [dict(stem="7x7", layers=[1, 1]), dict(layers=[1]), dict(layers=[1, 1, 1], base_channels=2), dict(base_channels=1, layers=[1], normalization="layer"), dict(base_channels=34, layers=[1], normalization="group"), dict(activation="tanh", dropout_p=.5, layers=[1, 1])], ids=str)
def test_resnets_of_other_shapes(kw): assert faults(*resnet(**kw)) == []

@pytest.mark.parametrize("norm, affine, bias", list(product(NORMS, BOOL, BOOL)), ids=str)
def test_every_unit_of_a_vit(norm, affine, bias): assert faults(*vit(normalization=norm, normalization_affine=affine, qkv_bias=bias)) == []

@pytest.mark.parametrize("kw", [dict(depth=2), dict(depth=0), dict(n_heads=1), dict(n_heads=6), dict(embed_dim=8, n_heads=4, normalization="group"), dict(patch_size=9), dict(dropout_p=0., attn_drop_rate=0., activation="relu")], ids=str)
def test_vits_of_other_shapes(kw): assert faults(*vit(**kw)) == []

def test_at_the_edges():
    "No hidden layer; one unit; no convolution; a chain that is somebody else's"
    assert faults(*mlp(sizes=())) == [] == faults(*mlp(sizes=(1,), normalization="none"))
    assert faults(*cnn(conv_channels=[])) == [] == faults(*cnn(conv_channels=[1], normalization="none"))
    class Theirs(nn.Sequential):
        def unit_groups(self): return chain_groups(self.named_children())
    net = Theirs(nn.Conv2d(2, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(.5), nn.Linear(75, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 2))
    assert faults(shaken(net), torch.randn(6, 2, 13, 13)) == []

def test_places():
    def at(net): return [(g.site, g.private, g.passed) for g in UnitGraph.of(net)]
    conv = dict(in_channels=1, img_size=8, num_classes=2, conv_channels=[8], fc_hidden_units=[4])
    dense, lone = ("fc_act_0",) * 3, dict(input_size=4, num_classes=2, hidden_sizes=[8])
    for norm in ("layer", "group", "instance"):
        assert at(MLP(**lone, normalization=norm)) == [("act_0", "linear_0", "act_0")]
        assert at(MLP(**lone, normalization=norm, norm_after_activation=True)) == [("act_0", "act_0", "norm_0")]
    assert at(MLP(**lone, normalization="batch", norm_after_activation=True)) == [("act_0", "norm_0", "norm_0")]
    assert at(CNN(**conv, normalization="layer")) == [("act_0", "conv_0", "pool_0"), dense]
    assert at(CNN(**conv, normalization="layer", norm_after_activation=True)) == [("act_0", "act_0", "pool_0"), dense]
    assert at(CNN(**conv, normalization="instance")) == [("act_0", "conv_0", "pool_0"), dense]      # it removes the convolution's bias
    assert at(CNN(**conv, normalization="none")) == at(CNN(**conv, normalization="batch")) == [("act_0", "pool_0", "pool_0"), dense]
    assert at(CNN(**conv, pool_type="none", normalization="batch", norm_after_activation=True)) == [("act_0", "norm_0", "norm_0"), dense]

# what a wrong graph would say: (what is done to the first hidden group, what must be noticed)
def _writes(**kw): return lambda g: replace(g, writes=[replace(g.writes[0], **kw)])
WRONG = {
    "column i behind a flatten": (_writes(block=1), "with fc_0.weight[:, i] at zero"),
    "a row for a column": (_writes(axis=0, block=1), "do not go out of exactly one unit"),
    "start off by one": (_writes(start=1), "goes beyond"),
    "block too long": (_writes(block=99), "goes beyond"),
    "a name that is not there": (_writes(param="fc_9.weight"), "no parameter fc_9.weight"),
    "no outgoing slices": (lambda g: replace(g, writes=[]), "still moves the logits"),
    "the bias forgotten": (lambda g: replace(g, reads=g.reads[:1]), "conv_1.bias: 4 of 4 numbers do not go into"),
    "the norm forgotten": (lambda g: replace(g, norms=[]), "norm_1.running_var: 4 of 4 numbers do not go into"),
    "incoming weights counted twice": (lambda g: replace(g, reads=g.reads + g.reads[:1]), "conv_1.weight: 288 of 288"),
    "units read backwards": (lambda g: replace(g, reads=[Slice("conv_1.weight", 1)], size=4), "conv_1.weight"),
    "another layer's norm": (lambda g: replace(g, norms=[Slice("norm_0.weight", 0)]), "changing norm_0.weight[i] for i=0 moves units [0, 1, 2, 3]"),
    "passed stands too late": (lambda g: replace(g, passed="fc_0"), "still moves the logits"),
}
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_graph_is_caught(name):
    spoil, says = WRONG[name]
    class Wrong(CNN):
        def unit_groups(self):
            groups = super().unit_groups()
            groups[2] = spoil(groups[2])
            return groups
    found = faults(*cnn(Wrong))
    assert any(says in f for f in found), found

def group_at(name, change):
    "What a wrong graph does to the group called `name`, and to the others"
    def spoil(groups):
        k = next(k for k, g in enumerate(groups) if g.name == name)
        return [*groups[:k], *change(groups[k]), *groups[k + 1:]]
    return spoil
def on(field, f): return lambda g: [replace(g, **{field: f(getattr(g, field))})]
def without(word): return lambda slices: [s for s in slices if word not in s.param]
def moved(word, **kw): return lambda slices: [replace(s, **kw) if word in s.param else s for s in slices]

def each_block_for_itself(g):
    "The stage's stream cut behind its first block, as if nothing were carried past the second; every number is still counted once"
    late = lambda slices: [s for s in slices if not s.param.startswith(("conv_0", "norm_0", "layer1_block0"))]
    old = [replace(g, **{f: [s for s in getattr(g, f) if s not in late(getattr(g, f))] for f in ("reads", "norms")}, writes=[s for s in g.writes if "layer2" not in s.param], stream=g.stream[:2], name="early")]
    return old + [replace(g, reads=late(g.reads), norms=late(g.norms), writes=[s for s in g.writes if "layer2" in s.param], stream=g.stream[2:])]

STAGE, LAST = "layer1_block1", "layer2_block0"
WRONG_RESNET = {
    "the projection of the next stage forgotten": (group_at(STAGE, on("writes", without("shortcut"))), "at act_0 still moves the logits"),
    "the next stage's convolution forgotten": (group_at(STAGE, on("writes", without("layer2_block0.branch"))), "layer2_block0.branch.conv_0.weight: 162 of 162 numbers do not go out of"),
    "a block's own reader forgotten": (group_at(STAGE, on("writes", without("layer1_block1"))), "at layer1_block0 still moves the logits"),
    "the head forgotten": (group_at(LAST, on("writes", without("out"))), "still moves the logits"),
    "the projection does not come in": (group_at(LAST, on("reads", without("shortcut"))), "layer2_block0.shortcut.conv.weight: 18 of 18 numbers do not go into"),
    "the shortcut's norm forgotten": (group_at(LAST, on("norms", without("shortcut"))), "layer2_block0.shortcut.norm.running_mean: 6 of 6"),
    "a block's second norm for the first": (group_at(STAGE, on("norms", lambda n: [replace(s, param=s.param.replace("block0.branch.norm_1", "block0.branch.norm_0")) for s in n])), "block0.branch.norm_0.weight: 3 of 3"),
    "inner channels for the stream's": (group_at(STAGE, on("reads", lambda r: [replace(s, param=s.param.replace("block0.branch.conv_1", "block0.branch.conv_0")) for s in r])), "moves units [0, 1, 2] at layer1_block0"),
    "a column for a row": (group_at(STAGE, on("reads", moved("block1.branch.conv_1", axis=1))), "moves units [0, 1, 2] at layer1_block1"),
    "a group for each block": (group_at(STAGE, each_block_for_itself), "early: with layer1_block0.branch.conv_0.weight[:, i]"),
    "read too late": (group_at(STAGE, on("reads", moved("conv_0.weight", at="layer1_block1"))), "moves units [0, 1, 2] at layer1_block1"),
    "a place that is not there": (group_at(STAGE, on("stream", lambda s: (*s, "layer1_block7"))), "there is no module layer1_block7"),
}
QK, V, HIDDEN, FEATURES = "block_0.attend.heads.q", "block_0.attend.heads.v", "block_0.mlp.act_0", "block_0"
WRONG_VIT = {
    "keys at the values": (group_at(QK, on("reads", lambda r: [replace(s, start=12) if s.start == 6 else s for s in r])), "heads.qkv.weight: 72 of 108 numbers do not go into"),
    "the query alone": (group_at(QK, on("reads", lambda r: [s for s in r if s.start == 0])), "heads.qkv.bias: 6 of 18"),
    "queries and keys taken for hidden units": (group_at(QK, lambda g: [replace(g, product=(), private=g.site, passed=g.site)]), "the unit at block_0.attend.heads.q still moves the logits"),
    "a query with another unit's key": (group_at(QK, on("reads", lambda r: [replace(s, param=s.param, start=0, at="block_0.attend.heads.k") if s.start == 6 else replace(s, at="block_0.attend.heads.q", start=6) for s in r])), "moves units [] at block_0.attend.heads.k"),
    "values at the keys": (group_at(V, on("reads", moved("qkv", start=6))), "moves units [] at block_0.attend.heads.v"),
    "proj by rows": (group_at(V, on("writes", moved("proj", axis=0))), "at block_0.attend.heads.mixed still moves the logits"),
    "the bias before proj forgotten": (group_at(V, on("reads", without("bias"))), "heads.qkv.bias: 6 of 18"),
    "positions forgotten": (group_at(FEATURES, on("reads", without("positions"))), "embed.positions: 30 of 30 numbers do not go into"),
    "class token forgotten": (group_at(FEATURES, on("reads", without("token"))), "embed.token: 6 of 6 numbers do not go into"),
    "positions along the tokens": (group_at(FEATURES, on("reads", moved("token", axis=1))), "goes beyond"),
    "positions taken for weights": (group_at(FEATURES, on("reads", moved("positions", added=False))), "embed.positions: 30 of 30 numbers do not go out of"),
    "proj does not come in": (group_at(FEATURES, on("reads", without("proj"))), "proj.weight: 36 of 36 numbers do not go into"),
    "the head forgotten": (group_at(FEATURES, on("writes", without("out"))), "still moves the logits"),
    "qkv's columns forgotten": (group_at(FEATURES, on("writes", without("qkv"))), "at embed still moves the logits"),
    "the MLP's columns forgotten": (group_at(FEATURES, on("writes", without("fc_0"))), "at block_0.mid still moves the logits"),
    "a norm forgotten": (group_at(FEATURES, on("norms", without("mlp.norm"))), "block_0.mlp.norm.weight: 6 of 6"),
    "units on the wrong axis": (group_at(HIDDEN, lambda g: [replace(g, axis=1, size=5)]), "moves units [0, 1, 2, 3, 4]"),
    "rows of the MLP's second layer": (group_at(HIDDEN, on("writes", lambda w: [replace(w[0], axis=0, start=0)])), "goes beyond"),
}
@pytest.mark.parametrize("make, name", [(resnet, n) for n in WRONG_RESNET] + [(vit, n) for n in WRONG_VIT], ids=lambda v: getattr(v, "__name__", v))
def test_a_wrong_graph_of_a_stream_is_caught(make, name):
    spoil, says = (WRONG_RESNET if make is resnet else WRONG_VIT)[name]
    class Wrong(ResNet if make is resnet else ViT):
        def unit_groups(self): return spoil(super().unit_groups())
    found = faults(*make(Wrong))
    assert any(says in f for f in found), found

def test_units_that_do_nothing_are_noticed():
    "A head that reads nothing makes every other test pass"
    net, x = mlp(); net.out.weight.data.zero_()
    assert any("does not move the logits at all" in f for f in faults(net, x))

@pytest.mark.parametrize("place, says", [("private", "moves units [0, 1, 2, 3"), ("passed", "still moves the logits")])
def test_a_place_on_the_wrong_side_of_a_mixing_norm_is_caught(place, says):
    class Wrong(MLP):
        def unit_groups(self):
            groups = super().unit_groups()
            groups[1] = replace(groups[1], private="norm_0") if place == "private" else replace(groups[1], passed="act_0")
            return groups
    found = faults(*mlp(Wrong, normalization="layer", norm_after_activation=True))
    assert any(says in f for f in found), found

def test_faults_leave_the_model_alone():
    net, x = cnn(); net.train(); before = {k: v.clone() for k, v in net.state_dict().items()}; rng = torch.get_rng_state()
    faults(net, x)
    assert net.training and all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and not any(m._forward_hooks for m in net.modules())

def test_who_can_be_renewed():
    "Groups whose units go out through weights that are theirs alone; not streams, not pairs"
    def renewable(net): return [g.name for g in UnitGraph.of(net) if g.renewable]
    assert renewable(mlp()[0]) == ["act_0", "act_1"] and renewable(cnn()[0]) == ["act_0", "act_1", "fc_act_0"]
    assert renewable(resnet()[0]) == [f"layer{b}.branch.act_0" for b in ("1_block0", "1_block1", "2_block0")]
    assert renewable(vit()[0]) == [V, HIDDEN]
    for net in (resnet()[0], vit()[0]):
        graph = UnitGraph.of(net)
        assert not graph.inputs.renewable and not graph.outputs.renewable
        assert all(bool(g.stream) + bool(g.product) + g.renewable == 1 for g in graph)

def marked(state, slices_and_units):
    "{parameter: which of its numbers are named}"
    masks = {k: torch.zeros(v.shape, dtype=torch.bool) for k, v in state.items() if v.ndim}
    for param, axis, idxs in slices_and_units: masks[param].movedim(axis, 0)[idxs] = True
    return masks

def torch_prunings(model, x, name, unit):
    "What Torch-Pruning would cut with one unit of the layer called `name`"
    layer, names = model.get_submodule(name), {m: n for n, m in model.named_modules()}
    cut = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    for dep, idxs in tp.DependencyGraph().build_dependency(model, x).get_pruning_group(layer, cut, idxs=[unit]):
        module = dep.target.module
        if module not in names: continue                # an operation without parameters
        inward = dep.handler.__name__ == "prune_in_channels"
        for k, v in module.state_dict().items():
            if v.ndim and not (inward and v.ndim == 1): yield f"{names[module]}.{k}", int(inward), idxs

@pytest.mark.parametrize("norm, after", list(product(NORMS, BOOL)), ids=str)
@pytest.mark.parametrize("make", [mlp, cnn, lambda **kw: cnn(fc_hidden_units=[], strides=[2, 1], **kw)], ids=["mlp", "cnn", "cnn without dense layer"])
def test_torch_pruning_agrees(make, norm, after):
    net, x = make(normalization=norm, norm_after_activation=after); net.eval()
    for g in UnitGraph.of(net):
        for i in range(g.size):
            ours = marked(net.state_dict(), [(s.param, s.axis, list(range(s.start + i*s.block, s.start + (i+1)*s.block))) for s in g.slices])
            theirs = marked(net.state_dict(), torch_prunings(net, x, g.reads[0].param.removesuffix(".weight"), i))
            assert all(torch.equal(ours[k], theirs[k]) for k in ours), (g.name, i)

@pytest.mark.parametrize("norm, after", [(n, a) for n, a in product(NORMS, BOOL) if not (a and n in ("group", "instance"))], ids=str)
def test_torch_pruning_agrees_on_resnet(norm, after):
    net, x = resnet(normalization=norm, norm_after_activation=after); net.eval()
    for g in UnitGraph.of(net):
        for i in range(g.size):
            ours = marked(net.state_dict(), [(s.param, s.axis, [i]) for s in g.slices])
            theirs = marked(net.state_dict(), torch_prunings(net, x, g.weights[0].param.removesuffix(".weight"), i))
            assert all(torch.equal(ours[k], theirs[k]) for k in ours), (g.name, i)

@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_torch_pruning_agrees_on_vit(norm):
    "Features and hidden units; its way through attention takes a reshape into heads for the identity"
    net, x = vit(normalization=norm, depth=2); net.eval(); state = net.state_dict()
    for g in UnitGraph.of(net):
        if g.product or g.name.endswith(".v"): continue
        layer, cut = net.get_submodule(g.weights[0].param.removesuffix(".weight")), tp.prune_linear_out_channels if "mlp" in g.name else tp.prune_conv_out_channels
        plain = {net.embed.token: "embed.token", net.embed.positions: "embed.positions"}
        for i in range(g.size):
            theirs = {k: torch.zeros(v.shape, dtype=torch.bool) for k, v in state.items() if v.ndim}
            for dep, idxs in tp.DependencyGraph().build_dependency(net, x, unwrapped_parameters=[(p, 2) for p in plain]).get_pruning_group(layer, cut, idxs=[i]):
                module, inward = dep.target.module, dep.handler.__name__ == "prune_in_channels"
                if module in plain: theirs[plain[module]][..., idxs] = True
                for k in [k for k in theirs if k.rpartition(".")[0] == next((n for n, m in net.named_modules() if m is module), "-")]:
                    if not (inward and theirs[k].ndim == 1): theirs[k].movedim(int(inward), 0)[idxs] = True
            ours = marked(state, [(s.param, s.axis, [i]) for s in g.slices])
            assert all(torch.equal(ours[k], theirs[k]) for k in ours), (g.name, i)

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [mlp, cnn, resnet, vit], ids=["mlp", "cnn", "resnet", "vit"])
def test_verbs_against_plain_indexing(make, norm):
    net, _ = make(normalization=norm)
    params = {k: torch.stack([v + r for r in range(3)]) for k, v in net.state_dict().items()}
    for g in UnitGraph.of(net):
        units = torch.stack([torch.randperm(g.size)[:2] for _ in range(3)])
        for s in g.slices:
            want = torch.stack([torch.stack([torch.stack([params[s.param][r].select(s.axis, s.start + i*s.block + k) for k in range(s.block)]) for i in units[r].tolist()]) for r in range(3)])
            assert torch.equal(gather(params, s, units), want)
            new, expect = torch.randn_like(want), params[s.param].clone()
            for r, j, k in product(range(3), range(2), range(s.block)): expect[r].select(s.axis, s.start + units[r, j].item()*s.block + k).copy_(new[r, j, k])
            scatter(params, s, units, new)
            assert torch.equal(params[s.param], expect)

def test_verbs_with_an_offset_and_one_replica():
    params = dict(qkv=torch.arange(24.).reshape(1, 12, 2))                     # q, k, v: four rows each
    k_part, heads = Slice("qkv", 0, start=4), Slice("qkv", 0, start=4, block=2)
    assert gather(params, k_part, torch.tensor([[3]]))[0, 0, 0].tolist() == [14, 15]
    assert gather(params, heads, torch.tensor([[1]]))[0, 0].tolist() == [[12, 13], [14, 15]]
    scatter(params, [k_part], torch.tensor([[0, 2]]), 0)
    assert (params["qkv"][0] == 0).all(1).nonzero().flatten().tolist() == [4, 6]

def test_verbs_along_a_later_axis():
    params = dict(w=torch.arange(2*3*4*5.).reshape(2, 3, 4, 5))
    out = gather(params, Slice("w", 2, block=2), torch.tensor([[1], [0]]))
    assert out.shape == (2, 1, 2, 3, 4)
    assert torch.equal(out[0, 0, 1], params["w"][0, :, :, 3]) and torch.equal(out[1, 0, 0], params["w"][1, :, :, 0])

def test_verbs_on_parameters_that_train():
    w = torch.ones(2, 3, 4, requires_grad=True)
    gather(dict(w=w), Slice("w", 1), torch.tensor([[0], [3]])).sum().backward()   # gather has a gradient
    assert w.grad.sum() == 6 and (w.grad[0, :, 0] == 1).all() and (w.grad[1, :, 3] == 1).all()
    scatter(dict(w=w), [Slice("w", 1)], torch.tensor([[0], [3]]), 0)                # scatter needs none
    assert w.is_leaf and w.requires_grad and w.sum() == 18

def test_a_model_without_groups_is_told_what_to_write():
    with pytest.raises(LopError, match="unit_groups"): UnitGraph.of(nn.Linear(2, 2))
    with pytest.raises(LopError, match="Choices: inputs, act_0, outputs"): UnitGraph.of(MLP(4, 2, [3]))["nonsense"]
