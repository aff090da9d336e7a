"""Blocks, projections and partitions against matrices written out, and the theorem of the manifold for every network."""
from functools import partial

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lop_nb.cloning import add_noise, clone, sides
from lop_nb.data import load
from lop_nb.manifold import Blocks, constant, distance_to_manifold, equitable, equitable_partition, flat_of, frozen_units, gradient_tangency, quotient, residuals, similar_units, tree_of
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.units import UnitGraph

DIGITS = load("digits"); X, Y = DIGITS.train.x[:24].double() / DIGITS.train.x.max(), DIGITS.train.y[:24]
NETS = dict(MLP=partial(MLP, 64, 10, hidden_sizes=[8, 8], dropout_p=0.), CNN=partial(CNN, 1, 8, 10, conv_channels=[4, 8], fc_hidden_units=[6], dropout_p=0.),
            ResNet=partial(ResNet, 1, 8, 10, layers=[1, 1], base_channels=4, dropout_p=0.), ViT=partial(ViT, 1, 8, 10, patch_size=4, embed_dim=8, depth=1, n_heads=2, dropout_p=0., attn_drop_rate=0.))
CASES = [(n, norm) for n in NETS for norm in ("none", "batch", "layer", "group")]
ce = lambda z, y: F.cross_entropy(z.mT, y, reduction="none")
params_of = lambda net: {k: p.detach()[None].clone() for k, p in net.named_parameters()}


def made(name, norm="none", seed=0, k=None):
    "a network with random parameters and statistics, all different; or its clone"
    with torch.random.fork_rng(): torch.manual_seed(seed); net = NETS[name](normalization=norm).double()
    g = generator(seed, "parameters")
    for v in net.state_dict().values():
        if v.is_floating_point(): v.copy_(.3*torch.randn(v.shape, generator=g, dtype=v.dtype) + (v if v.ndim == 1 else 0)); v.abs_() if v.ndim == 1 else None
    return net if k is None else clone(net, k)


def some_partition(sizes, seed):
    "random blocks, every one of them there"
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randint(max(1, n // 2), (n,), generator=g).unique(return_inverse=True)[1] for k, n in sizes.items()}


def averaging(labels):
    "the matrix that replaces each entry by the mean of its block"
    same = (labels[:, None] == labels).double()
    return same / same.sum(1, keepdim=True)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_projections_are_the_nearest_points(seed):
    net = MLP(3, 2, hidden_sizes=[5, 6], normalization="none", dropout_p=0.).double(); p = some_partition(dict(act_0=5, act_1=6), seed); blocks = Blocks(net, p)
    g = torch.Generator().manual_seed(seed); tree = {k: torch.randn(2, *s, generator=g, dtype=torch.float64) for k, s in blocks.shapes.items()}
    Mr, Mc, one5, one6 = averaging(p["act_1"]), averaging(p["act_0"]), torch.eye(5).double(), torch.eye(6).double()
    W = tree["linear_1.weight"][1].flatten(); both = torch.cat([torch.kron(one6 - Mr, Mc), torch.kron(Mr, one5 - Mc)])    # RE and CE, of W read row by row
    nearest = W - torch.linalg.pinv(both, rtol=1e-10) @ (both @ W)
    torch.testing.assert_close(equitable(tree, blocks)["linear_1.weight"][1].flatten(), nearest, atol=1e-10, rtol=0)
    torch.testing.assert_close(constant(tree, blocks)["linear_1.weight"][1].flatten(), torch.kron(Mr, Mc) @ W, atol=1e-12, rtol=0)
    torch.testing.assert_close(equitable(tree, blocks)["linear_0.weight"], averaging(p["act_0"]) @ tree["linear_0.weight"], atol=1e-12, rtol=0)
    torch.testing.assert_close(equitable(tree, blocks)["out.weight"], tree["out.weight"] @ Mr, atol=1e-12, rtol=0)
    torch.testing.assert_close(equitable(tree, blocks)["out.bias"], tree["out.bias"])
    for r, norm in ((0, tree["linear_1.weight"][0]), (1, tree["linear_1.weight"][1])):
        found = residuals(tree, blocks)["linear_1.weight"]
        torch.testing.assert_close(found["RE"][r], ((one6 - Mr) @ norm @ Mc).norm() / norm.norm()); torch.testing.assert_close(found["CE"][r], (Mr @ norm @ (one5 - Mc)).norm() / norm.norm())
    rest = (flat_of(tree) - flat_of(equitable(tree, blocks))).norm(dim=1) / flat_of(tree).norm(dim=1)
    torch.testing.assert_close(distance_to_manifold(tree, blocks), rest)
    assert all(torch.equal(tree_of(flat_of(tree), blocks)[k], v) for k, v in tree.items())


@pytest.mark.parametrize("name,norm", CASES)
def test_the_theorem(name, norm):
    "a clone with noise in RE ∩ CE: found, tangent for any data, in training mode too, and the dimension is the base's size"
    k = 3 if norm == "batch" else 2
    base, big = made(name, norm), made(name, norm, k=k)
    add_noise({n: p.data[None] for n, p in big.named_parameters()}, UnitGraph.of(big), .3, [generator(1, "noise")], {g.name: torch.arange(k*g.size) // k for g in UnitGraph.of(base)})
    for sending in (True, False):
        found = equitable_partition(big, sending=sending)
        assert all(torch.equal(b, torch.arange(len(b)) // k) for b in found.values()), "the clones, and no coarser: the base's units all differ"
    blocks = Blocks(big, found)
    assert blocks.dimension == sum(p.numel() for p in base.parameters())
    assert distance_to_manifold(params_of(big), blocks) < 1e-14 and distance_to_manifold(params_of(big), blocks, "constant") > .005
    g = generator(0, "static"); static, labels = torch.randn(X.shape, generator=g, dtype=X.dtype), torch.randint(10, Y.shape, generator=g)
    for x, y in ((X, Y), (static, labels)): assert gradient_tangency(big, blocks, x[None], y[None], ce) < 1e-13
    F.cross_entropy(big.train()(static), labels).backward()
    grads = {n: p.grad[None] for n, p in big.named_parameters()}
    assert (flat_of(grads) - flat_of(constant(grads, blocks))).norm() < 1e-13 * flat_of(grads).norm()
    off = made(name, norm, seed=1, k=k)
    with torch.no_grad():
        for p in off.parameters(): p += .1*torch.randn(p.shape, generator=g, dtype=p.dtype)
    assert gradient_tangency(off, blocks, X[None], Y[None], ce) > 1e-3 and distance_to_manifold(params_of(off), blocks) > .01


def test_quotient_is_the_base():
    for name in ("MLP", "CNN", "ResNet"):
        base, big = made(name), made(name, k=3)
        core = quotient({n: t[None] for n, t in big.state_dict().items()}, Blocks(big, equitable_partition(big)))
        for n, t in base.state_dict().items(): torch.testing.assert_close(core[n][0], t, atol=1e-14, rtol=0)


def naive(net, sending):
    "colour refinement on dictionaries, unit by unit"
    graph, state = UnitGraph.of(net), net.state_dict()
    colour = {(g.name, u): (g.name, u) if g in (graph.inputs, graph.outputs) else g.name for g in [graph.inputs, *graph, graph.outputs] for u in range(g.size)}
    while True:
        seen = {}
        for name, owners in sides(graph).items():
            w = state[name] if state[name].ndim > 1 else state[name][:, None]
            rows, cols = ([g for g, _, k in owners if k == kind] for kind in ("own", "from"))
            for i in range(w.shape[0]):
                for j in range(w.shape[1]):
                    me, other = (rows[0].name, i), (cols[0].name, j) if cols else "one"
                    for unit, to in [(me, other)] + ([(other, me)] if sending and cols else []):
                        sums = seen.setdefault(unit, {}); key = name, to == me, colour.get(to, to); sums[key] = sums.get(key, 0.) + w[i, j].item()
        new = {u: (c, tuple(sorted((str(k), round(v, 9) + 0.) for k, v in seen.get(u, {}).items()))) for u, c in colour.items()}
        if len(set(new.values())) == len(set(colour.values())): break
        names = {c: str(i) for i, c in enumerate(dict.fromkeys(new.values()))}; colour = {u: names[c] for u, c in new.items()}
    out = {}
    for g in graph:
        first = {}
        out[g.name] = torch.tensor([first.setdefault(colour[g.name, u], len(first)) for u in range(g.size)])
    return out


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=20, deadline=None)
def test_partition_is_the_coarsest(seed, sending):
    "of networks whose weights are -1, 0 and 1, so that many sums agree by chance"
    net = MLP(2, 2, hidden_sizes=[6, 5, 5], normalization="none", dropout_p=0.).double(); g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randint(-1, 2, p.shape, generator=g) * (p.ndim > 1))
    found, slow = equitable_partition(net, sending=sending), naive(net, sending)
    assert all(torch.equal(found[k], slow[k]) for k in slow)


def test_partition_finds_shuffled_clones_and_nothing_else():
    big = made("MLP", k=3); g = generator(0, "shuffle"); order = torch.randperm(24, generator=g)
    with torch.no_grad():
        for p, axis in ((big.linear_0.weight, 0), (big.linear_0.bias, 0), (big.linear_1.weight, 1)): p.copy_(p.index_select(axis, order))
    b = equitable_partition(big, sending=True)["act_0"]
    assert torch.equal(b[:, None] == b, order[:, None] // 3 == order // 3)
    assert all(int(b.max()) + 1 == len(b) for b in equitable_partition(made("MLP")).values())
    with torch.no_grad(): big.linear_0.weight += 1e-4*torch.randn(big.linear_0.weight.shape, generator=g)
    assert len(equitable_partition(big)["act_0"].unique()) == 24 and len(equitable_partition(big, tol=1e-2)["act_0"].unique()) == 8


def test_heads_and_groups_of_a_norm_keep_units_apart():
    "all weights equal: one colour for each head, each group of the norm"
    vit, cnn = made("ViT"), NETS["CNN"](normalization="group").double()
    with torch.no_grad():
        for p in [*vit.parameters(), *cnn.parameters()]: p.fill_(.1)
    found = equitable_partition(vit, sending=True)
    assert [int(b.max()) + 1 for b in found.values()] == [2, 2, 1, 1]       # queries and keys, values; hidden units; stream
    parts = equitable_partition(cnn)
    groups = {g.name: cnn.get_submodule(g.normed[0]).num_groups if g.normed else 1 for g in UnitGraph.of(cnn)}
    assert {k: int(b.max()) + 1 for k, b in parts.items()} == groups and max(groups.values()) > 1


def test_replicas_at_once():
    nets = Replicas(lambda: MLP(64, 10, hidden_sizes=[6, 4], normalization="none", dropout_p=0.), range(3), dtype=torch.float64); p = dict(act_0=torch.arange(6) // 2)
    blocks, x, y = Blocks(nets, p), X.flatten(1).expand(3, -1, -1), Y.expand(3, -1)
    together = distance_to_manifold({k: v.detach() for k, v in nets.params.items()}, blocks), gradient_tangency(nets, blocks, x, y, ce)
    for r, m in enumerate(nets.modules):
        torch.testing.assert_close(together[0][r], distance_to_manifold(params_of(m), Blocks(m, p))[0]); torch.testing.assert_close(together[1][r], gradient_tangency(m, Blocks(m, p), x[:1], y[:1], ce)[0])


def test_frozen_units_get_no_gradient():
    nets = Replicas(lambda: CNN(1, 8, 10, conv_channels=[4], fc_hidden_units=[6], dropout_p=0., normalization="batch"), range(2), dtype=torch.float64)
    with torch.no_grad(): nets.params["norm_0.bias"][1, 2] = -50.; nets.params["fc_0.bias"][0, 5] = -50.
    found = frozen_units(nets, X.expand(2, *X.shape))
    assert found["act_0"][1].tolist() == [False, False, True, False] and not found["act_0"][0].any() and found["fc_act_0"][0, 5]
    for m in nets.modules: m.eval()
    nets.backward(ce(nets(X.expand(2, *X.shape)), Y.expand(2, -1)))
    assert torch.equal((nets.params["fc_0.weight"].grad == 0).all(2), found["fc_act_0"]) and torch.equal((nets.params["conv_0.weight"].grad == 0).flatten(2).all(2), found["act_0"])


def test_similar_units_are_led_by_who_has_most_partners():
    net = MLP(3, 2, hidden_sizes=[6], activation="none", normalization="none", dropout_p=0.).double(); e = torch.eye(3).double()
    with torch.no_grad(): net.linear_0.weight.copy_(torch.stack([e[0], e[1], 5*e[0], e[2], e[1] + .1*e[0], -e[2]]))
    x = torch.randn(500, 3, generator=generator(0, "x"), dtype=torch.float64)
    assert similar_units(Replicas(lambda: net, [0], dtype=torch.float64), x[None])[0]["act_0"].tolist() == [0, 1, 0, 2, 1, 3]


def test_bad_input_says_what_is_legal():
    net = made("MLP")
    with pytest.raises(LopError, match="act_0"): Blocks(net, dict(act_9=torch.zeros(8, dtype=torch.long)))
    for bad in (torch.zeros(7, dtype=torch.long), torch.tensor([0, 2]*4)):
        with pytest.raises(LopError, match="without gaps"): Blocks(net, dict(act_0=bad))
    with pytest.raises(LopError, match="equitable"): distance_to_manifold(params_of(net), Blocks(net, {}), "equal")
    with pytest.raises(LopError, match="unit_groups"): equitable_partition(torch.nn.Linear(2, 2))
