"The unit graph against brute force over all settings, against graphs that are wrong on purpose, and against Torch-Pruning"
from dataclasses import replace
from itertools import product
import pytest, torch
import torch_pruning as tp
from torch import nn
from lop_nb.models import MLP, CNN, Slice, chain_groups
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

@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_every_unit_of_an_mlp(flag):
    for activation in ("relu", "tanh"):
        assert faults(*mlp(**flags(*flag), activation=activation)) == []

@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_every_unit_of_a_cnn(flag): assert faults(*cnn(**flags(*flag))) == []

@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group"])
@pytest.mark.parametrize("geometry", GEOMETRIES[1:], ids=str)
def test_every_geometry(norm, geometry): assert faults(*cnn(normalization=norm, norm_after_activation=len(geometry) == 1, **geometry)) == []

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

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
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
