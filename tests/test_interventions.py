"Continual backprop against a slow loop written from the paper, unit by unit, and its promises counted."
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop, L2Init
from lop_nb.learner import Callback, Learner
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.replicas import Replicas
from lop_nb.runtime import Generators
from lop_nb.streams import PermutedPixels
from lop_nb.units import gather, scatter

DATA = load("digits")
SEED, STEPS, RHO, MATURITY, ETA = 3, 300, .02, 20, .99
KINDS = "contribution", "zero_contribution", "adaptation", "adaptable_contribution"
MAKE = dict(mlp=partial(MLP, 64, 10, hidden_sizes=[10, 8], normalization="none", dropout_p=0.),
            cnn=partial(CNN, 1, 8, 10, conv_channels=[4, 6], fc_hidden_units=[10], normalization="none", dropout_p=0.))
# incoming module, outgoing module, where the outgoing weights' input is seen, inputs of the outgoing module for each unit
LAYERS = dict(mlp=[("linear_0", "linear_1", "act_0", 1), ("linear_1", "out", "act_1", 1)],
              cnn=[("conv_0", "conv_1", "pool_0", 1), ("conv_1", "fc_0", "pool_1", 4), ("fc_0", "out", "fc_act_0", 1)])


class Batches(Callback):
    "Remember what was trained on; stop after STEPS"
    def __init__(self): self.seen = []
    def after_step(self, learner):
        if learner.at.step == STEPS: raise StopIteration


class Doubles:
    "The stream in float64, its batches remembered"
    def __init__(self, stream): self.stream, self.batches = stream, []
    def __getattr__(self, name): return getattr(self.stream, name)
    def __len__(self): return len(self.stream)
    def seeded(self, seeds): self.stream = self.stream.seeded(seeds); return self
    def __getitem__(self, k):
        task = self.stream[k]; fetch = task.train.fetch
        def double(pick, change=None, progress=None):
            x, y = fetch(pick); x = x.double()
            self.batches += list(zip(x[0].split(32), y[0].split(32))); return x, y
        task.train.fetch = double
        return task


def fast(kind, utility, optimizer, **kw):
    "Our learner, one replica: its parameters, the batches, the intervention"
    stream, cbp = Doubles(PermutedPixels(DATA, tasks=9)), ContinualBackprop(RHO, MATURITY, ETA, utility, **kw)
    learner = Learner(Replicas(MAKE[kind], [SEED], dtype=torch.float64), stream, optimizer, epochs=1, callbacks=[cbp, Batches()], defaults=())
    try: learner.fit()
    except StopIteration: pass
    return {k: p.detach()[0] for k, p in learner.replicas.params.items()}, stream.batches[:STEPS], cbp


def slow_utility(kind, h, f_hat, w_in, w_out):
    "One unit: h are its outputs, w_in and w_out its weights"
    varies = (h - f_hat).abs().mean() if kind != "contribution" else h.abs().mean()
    return {"contribution": w_out.abs().mean() * varies, "zero_contribution": w_out.abs().mean() * varies,
            "adaptation": 1 / w_in.abs().mean(), "adaptable_contribution": w_out.abs().mean() * varies / w_in.abs().mean()}[kind]


class SlowOptimizer:
    "SGD with momentum, or Adam with a step count for each element, from the formulas"
    def __init__(self, params, spec):
        self.params, self.spec = params, spec
        self.state = {k: [torch.zeros_like(p) for _ in range(3)] for k, p in params.items()}   # momentum or m; v; steps
    def step(self):
        s = self.spec
        for k, p in self.params.items():
            m, v, t = self.state[k]; g = p.grad
            if s.name == "sgd": m.mul_(s.momentum).add_(g); p.data -= s.lr * m; continue
            t += 1; m.mul_(s.betas[0]).add_((1 - s.betas[0]) * g); v.mul_(s.betas[1]).add_((1 - s.betas[1]) * g * g)
            p.data -= s.lr * (m / (1 - s.betas[0]**t)) / ((v / (1 - s.betas[1]**t)).sqrt() + s.eps)


def slow(kind, utility, spec, batches, hand="mean"):
    "The paper's algorithm 1, a unit at a time; returns parameters and replacements [(step, layer, unit)]"
    gens = Generators(SEED); model = Replicas(MAKE[kind], [SEED], dtype=torch.float64).modules[0]
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    opt, seen = SlowOptimizer(params, spec), {}
    for _, _, site, _ in LAYERS[kind]: model.get_submodule(site).register_forward_hook(lambda m, i, o, site=site: seen.__setitem__(site, o.detach()))
    D = [params[f"{i}.weight"].shape[0] for i, *_ in LAYERS[kind]]
    age, f, u, owed = ([[0.]*d for d in D] for _ in range(3)), None, None, [0.]*len(D)
    age, f, u = age
    replaced = []
    for step, (x, y) in enumerate(batches, 1):
        for p in params.values(): p.requires_grad_(True); p.grad = None
        F.cross_entropy(torch.func.functional_call(model, params, (x,)), y).backward()
        with torch.no_grad(): opt.step()
        for p in params.values(): p.requires_grad_(False)
        for l, (into, out, site, block) in enumerate(LAYERS[kind]):
            W, b, Wn, bn = params[f"{into}.weight"], params[f"{into}.bias"], params[f"{out}.weight"], params[f"{out}.bias"]
            h, f_hat, u_hat = seen[site], [0.]*D[l], [0.]*D[l]
            for i in range(D[l]):
                age[l][i] += 1
                f[l][i] = ETA*f[l][i] + (1 - ETA)*h[:, i].mean().item(); f_hat[i] = f[l][i] / (1 - ETA**age[l][i])
                y_i = slow_utility(utility, h[:, i], f_hat[i], W[i], Wn[:, i*block:(i + 1)*block]).item()
                u[l][i] = ETA*u[l][i] + (1 - ETA)*y_i; u_hat[i] = u[l][i] / (1 - ETA**age[l][i])
            eligible = [i for i in range(D[l]) if age[l][i] > MATURITY]
            owed[l] += RHO * len(eligible); n = int(owed[l]); owed[l] -= n
            gone = sorted(eligible, key=lambda i: (u_hat[i], i))[:n]
            for i in gone:
                replaced.append((step, l, i))
                if hand == "mean": bn += f_hat[i] * Wn[:, i*block:(i + 1)*block].flatten(1).sum(1)
            if gone:
                fresh = (2*torch.rand(len(gone), 1, *W.shape[1:], generator=gens["intervention"]) - 1) / math.sqrt(W[0].numel())
                for i, w in zip(gone, fresh): W[i] = w[0]
            for i in gone:
                b[i] = 0; Wn[:, i*block:(i + 1)*block] = 0; age[l][i] = f[l][i] = u[l][i] = 0.
                for s in opt.state[f"{into}.weight"] + opt.state[f"{into}.bias"]: s[i] = 0
                for s in opt.state[f"{out}.weight"]: s[:, i*block:(i + 1)*block] = 0
    return params, replaced


@pytest.mark.parametrize("optimizer", [SGD(lr=.02), Adam(lr=.003)], ids=["sgd", "adam"])
@pytest.mark.parametrize("utility", KINDS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_fast_equals_slow(kind, utility, optimizer):
    params, batches, cbp = fast(kind, utility, optimizer)
    want, replaced = slow(kind, utility, optimizer, batches)
    assert len(replaced) == sum(cbp.replaced.values()) > 30
    for k, p in params.items(): assert (p - want[k]).abs().max() <= 1e-12, k


def test_the_references_hand_over_is_zero_and_differs():
    params, batches, _ = fast("mlp", "contribution", SGD(lr=.02), hand_over="zero")
    want, _ = slow("mlp", "contribution", SGD(lr=.02), batches, hand="zero")
    with_it, _ = slow("mlp", "contribution", SGD(lr=.02), batches)
    for k, p in params.items(): assert (p - want[k]).abs().max() <= 1e-12, k
    assert (params["linear_1.bias"] - with_it["linear_1.bias"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_replacements_are_what_is_owed(kind):
    "ρ · eligible · steps, within rounding; eligible counted from the ages themselves"
    eligible = {}
    class Count(Callback):
        order = -1
        def after_step(self, learner):
            for g in cbp.groups:
                age = cbp.stats[g.name]["age"] + 1
                eligible[g.name] = eligible.get(g.name, 0) + (age > MATURITY).sum(1)
    cbp = ContinualBackprop(RHO, MATURITY)
    learner = Learner(Replicas(MAKE[kind], [0, 1]), PermutedPixels(DATA, tasks=9), SGD(), epochs=1, callbacks=[Count(), cbp, Batches()], defaults=())
    try: learner.fit()
    except StopIteration: pass
    for name, n in cbp.replaced.items():
        for e in eligible[name]: assert abs(n - RHO * e.item()) < 1 + 1e-6 and n > 0


@pytest.mark.parametrize("where", ["mlp", "conv", "flatten", "norm"])
def test_replacing_a_constant_unit_leaves_the_function(where):
    "With padding, a constant channel is not constant at the border; so the convolutions here have none"
    from lop_nb.interventions import hand_over, renew
    make = dict(mlp=partial(MLP, 64, 10, hidden_sizes=[9, 7], normalization="none", dropout_p=0.),
                norm=partial(MLP, 64, 10, hidden_sizes=[9, 7], normalization="batch", dropout_p=0.)).get(
        where, partial(CNN, 1, 8, 10, conv_channels=[4, 6], paddings=[0], pool_type="none", fc_hidden_units=[5], normalization="none", dropout_p=0.))
    nets = Replicas(make, [0, 1], dtype=torch.float64)
    group = nets.graph.groups[1 if where == "flatten" else 0]
    first = group.reads[0].param.rpartition(".")[0]
    x = DATA.scale(DATA.test.x, "standardize").double().expand(2, -1, -1, -1, -1)
    with torch.no_grad(), nets.evaluating():
        nets.params[f"{first}.weight"][:, 2] = 0; nets.params[f"{first}.bias"][:, 2] = .7
        before, seen = nets(x, read=[group.passed])
        value = seen[group.passed][:, 0, 2].reshape(2, -1)[:, 0]
        f = torch.zeros(2, group.size, dtype=torch.float64); f[:, 2] = value
        units = torch.full((2, 1), 2)
        hand_over(nets.params, group, units, f)
        renew(nets.params | nets.buffers, group, units, [g["intervention"] for g in nets.generators])
        assert value.abs().min() > 0 and (nets(x) - before).abs().max() < 1e-12


STREAMS = dict(resnet=partial(ResNet, 1, 8, 10, layers=[1, 1], base_channels=5), vit=partial(ViT, 1, 8, 10, patch_size=4, embed_dim=12, depth=2, n_heads=3, mlp_ratio=1.3))


@pytest.mark.parametrize("kind, norm", [("mlp", "batch"), ("cnn", "batch"), ("resnet", "none"), ("resnet", "batch"), *(("vit", n) for n in ("none", "batch", "layer", "group"))])
def test_renewing_units_that_write_nothing_leaves_the_function(kind, norm):
    "Two units of every renewable group, whose outgoing weights are zero: fresh weights may come in, and nobody notices. The others' do move the logits"
    from lop_nb.interventions import renew
    make = {**{k: v.func for k, v in MAKE.items()}, **STREAMS}[kind]
    make = partial(make, *MAKE[kind].args, **MAKE[kind].keywords | dict(normalization=norm)) if kind in MAKE else partial(make, normalization=norm)
    nets, g = Replicas(make, [0, 1], dtype=torch.float64), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.params.values(): p += .2 * torch.randn(p.shape, dtype=p.dtype, generator=g)
    x, tensors = DATA.scale(DATA.test.x[:50], "standardize").double().expand(2, -1, -1, -1, -1), {**nets.params, **nets.buffers}
    groups, units = [g for g in nets.graph if g.renewable], torch.tensor([[0, 2], [1, 3]])
    assert len(groups) == dict(mlp=2, cnn=3, resnet=2, vit=4)[kind]
    with torch.no_grad(), nets.evaluating():
        for group in groups:
            for s in group.writes: scatter(tensors, s, units, 0.)
            before, old = nets(x), gather(tensors, group.weights, units)
            renew(tensors, group, units, [gs["intervention"] for gs in nets.generators])
            assert (nets(x) - before).abs().max() < 1e-12, group.name
            assert all((a - b).abs().max() > .01 for a, b in zip(old, gather(tensors, group.weights, units)))
            scatter(tensors, group.writes, units, [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in gather(tensors, group.writes, units)])   # equal ones, layer norm would take away
            assert (nets(x) - before).abs().max() > 1e-3, group.name


@pytest.mark.parametrize("kind", STREAMS)
def test_renewed_weights_are_like_the_first_ones(kind):
    "Drawn anew with the deviation that the network was built with, not with torch's"
    from lop_nb.interventions import renew
    nets = Replicas(partial(STREAMS[kind].func, *STREAMS[kind].args, **STREAMS[kind].keywords | (dict(base_channels=40) if kind == "resnet" else dict(embed_dim=60))), [0])
    for group in nets.graph:
        if not group.renewable: continue
        s = group.weights[0]; all_of_them = torch.arange(group.size)[None]; old = gather(nets.params, s, all_of_them).std().item()
        with torch.no_grad(): renew({**nets.params, **nets.buffers}, group, all_of_them, [nets.generators[0]["intervention"]])
        w = gather(nets.params, s, all_of_them)
        assert abs(w.std().item() / old - 1) < 5 * w.numel()**-.5, group.name


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("kind", STREAMS)
def test_continual_backprop_on_streams(kind, strategy):
    "Its averages are those of the activations themselves: over batch and pixels, or batch and tokens; streams and pairs are left alone"
    sums, cbp = {}, ContinualBackprop(RHO, MATURITY, ETA)
    class Watch(Callback):
        order = -1
        def after_step(self, learner):
            for g in cbp.groups:
                if learner.at.step <= 15:
                    h = learner.seen[g.passed].detach().double(); h = h.movedim(g.axis + 1, -1)
                    sums[g.name] = ETA * sums.get(g.name, 0.) + (1 - ETA) * torch.stack([torch.stack([h[r, ..., i].mean() for i in range(g.size)]) for r in range(2)])
            if learner.at.step == 16: seen.update({k: v["f"].clone() for k, v in cbp.stats.items()})
            if learner.at.step == 60: raise StopIteration
    seen = {}
    nets = Replicas(STREAMS[kind], [0, 1], strategy, dtype=torch.float64)
    learner = Learner(nets, Doubles(PermutedPixels(DATA, tasks=2)), Adam(lr=.003), epochs=2, callbacks=[Watch(), cbp], defaults=())
    try: learner.fit()
    except StopIteration: pass
    assert list(cbp.replaced) == [g.name for g in nets.graph if g.renewable] == list(seen) and min(cbp.replaced.values()) > 0
    for k, f in seen.items(): assert (f - sums[k]).abs().max() <= 1e-12, k


def test_l2_init_equals_the_loss_with_its_penalty():
    weight, stream = .05, Doubles(PermutedPixels(DATA, tasks=1))
    learner = Learner(Replicas(MAKE["mlp"], [0], dtype=torch.float64), stream, SGD(lr=.05), epochs=1, callbacks=[L2Init(weight)], defaults=()).fit()
    model = Replicas(MAKE["mlp"], [0], dtype=torch.float64).modules[0]
    start = [p.detach().clone() for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    for x, y in stream.batches:
        loss = F.cross_entropy(model(x), y) + weight * sum(((p - s)**2).sum() for p, s in zip(model.parameters(), start))
        opt.zero_grad(); loss.backward(); opt.step()
    for k, p in model.named_parameters(): assert (p.detach() - learner.replicas.params[k][0]).abs().max() < 1e-12, k
