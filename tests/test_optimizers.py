"The five optimizers: noise measured, torch's own matched bit for bit, units reset and heads forgotten."
import io
from dataclasses import replace
from functools import partial

import pytest
import torch

from lop_nb.config import Adam, AdamW, NoisySGD, RMSprop, SGD
from lop_nb.models import MLP
from lop_nb.optimizers import ElementAdam, forget, make_optimizer, memory
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.units import scatter

SHAPES = dict(body=(5, 3), bias=(5,), head=(2, 5))
SEEDS = [3, 4, 5]


def gens(seeds=SEEDS): return [generator(s, "noise") for s in seeds]


def params_and_grads(shapes=SHAPES, seeds=SEEDS, steps=12, dtype=torch.float32):
    "{name: [R, …]} and the gradients of each step; each replica's are its own, whoever stands beside it"
    draw = lambda what, shape: torch.stack([torch.randn(shape, generator=generator(s, *what), dtype=dtype) for s in seeds])
    return {k: draw(("p", k), s).requires_grad_() for k, s in shapes.items()}, [{k: draw(("g", k, t), s) for k, s in shapes.items()} for t in range(steps)]


def walk(opt, params, grads):
    for at in grads:
        for k, p in params.items(): p.grad = at[k].clone()
        opt.step()
    return params


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- noise ----

@pytest.mark.parametrize("per, share", [("entry", 1.), ("tensor", .01)])
def test_the_noise_has_the_std_it_says(per, share):
    "std / ‖g‖ = σ₀λᵗ (or that / √D) within 2 %, for each replica and step, on 10⁴ numbers"
    g = torch.stack([torch.randn(100, 100, generator=generator(s, "g")) * s for s in SEEDS])
    p = torch.zeros_like(g, requires_grad=True)
    opt = make_optimizer(NoisySGD(lr=1., momentum=0., noise_scale=.03, noise_decay=.9, noise_per=per), dict(p=p), generators=gens())
    for t in range(5):
        assert opt.noise_scale_now == .03 * .9**t
        before = p.detach().clone(); p.grad = g.clone(); opt.step()
        noise = before - p.detach() - g
        for r in range(3): assert (noise[r].std() / g[r].norm()).item() == pytest.approx(.03 * .9**t * share, rel=.02)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("kw", [dict(momentum=0.), dict(momentum=.9), dict(momentum=.9, dampening=.3), dict(momentum=.9, nesterov=True), dict(momentum=.9, weight_decay=.1)], ids=str)
def test_without_noise_it_is_sgd_bit_for_bit(kw, implementation):
    (a, grads), (b, _) = params_and_grads(), params_and_grads()
    ours = make_optimizer(NoisySGD(lr=.1, noise_scale=0., implementation=implementation, **kw), a)
    assert equal(walk(ours, a, grads), walk(torch.optim.SGD(b.values(), lr=.1, **{implementation: True}, **kw), b, grads))


@pytest.mark.parametrize("per", ["entry", "tensor"])
def test_noise_comes_before_weight_decay_and_momentum(per):
    "against a loop over replicas and tensors, in float64, from the equations"
    a, grads = params_and_grads(dtype=torch.float64); b = {k: p.detach().clone() for k, p in a.items()}
    lr, μ, d, wd, σ0, λ = .1, .9, .2, .05, .3, .8
    spec = NoisySGD(lr=lr, momentum=μ, dampening=d, weight_decay=wd, noise_scale=σ0, noise_decay=λ, noise_per=per)
    walk(make_optimizer(spec, a, generators=gens()), a, grads)
    total = sum(p[0].numel() for p in b.values())
    for r, gen in enumerate(gens()):
        velocity = {}
        for t, at in enumerate(grads):
            z = torch.empty(total, dtype=torch.float64).normal_(generator=gen).tolist()
            for k, p in b.items():
                g = at[k][r].flatten(); D = g.numel(); norm = sum(v.item()**2 for v in g)**.5
                std = σ0 * λ**t * norm / (D**.5 if per == "tensor" else 1)
                noisy = torch.tensor([v.item() + std * z.pop(0) for v in g], dtype=torch.float64).view(p[r].shape) + wd * p[r]
                velocity[k] = μ * velocity[k] + (1 - d) * noisy if k in velocity else noisy.clone()
                p[r] -= lr * velocity[k]
    for k in a: torch.testing.assert_close(a[k].detach(), b[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shapes", [SHAPES, dict(w=(64, 33), b=(64,), conv=(7, 3, 3, 3), gain=(1,))], ids=["small", "odd"])
def test_a_replica_draws_what_it_draws_alone(shapes):
    "noise, norms and steps, bit for bit"
    spec = NoisySGD(noise_scale=.1, noise_decay=.9)
    (a, grads) = params_and_grads(shapes); walk(make_optimizer(spec, a, generators=gens()), a, grads)
    for r, s in enumerate(SEEDS):
        b, own = params_and_grads(shapes, [s]); walk(make_optimizer(spec, b, generators=gens([s])), b, own)
        assert equal({k: p[r] for k, p in a.items()}, {k: p[0] for k, p in b.items()}), s


def test_gradients_are_left_as_they_were():
    a, grads = params_and_grads(); opt = make_optimizer(NoisySGD(), a, generators=gens())
    for k, p in a.items(): p.grad = grads[0][k].clone()
    a["bias"].grad = None
    held = {k: p.grad for k, p in a.items()}; bias = a["bias"].detach().clone()
    opt.step()
    assert all(p.grad is held[k] for k, p in a.items()) and all(torch.equal(held[k], grads[0][k]) for k in ("body", "head"))
    assert torch.equal(a["bias"].detach(), bias), "a parameter without a gradient stays"


def test_the_schedule_survives_save_and_load():
    "state_dict → file → load(weights_only=True) → the same bits from there on"
    spec = NoisySGD(noise_scale=.1, noise_decay=.9)
    a, grads = params_and_grads(); opt = make_optimizer(spec, a, generators=gens()); walk(opt, a, grads[:5])
    file = io.BytesIO(); torch.save(dict(opt=opt.state_dict(), p={k: p.detach() for k, p in a.items()}, gens=[g.get_state() for g in opt.generators]), file); file.seek(0)
    saved = torch.load(file, weights_only=True)
    b, _ = params_and_grads(); again = make_optimizer(spec, b, generators=gens()); again.load_state_dict(saved["opt"])
    for k, p in b.items(): p.data.copy_(saved["p"][k])
    for g, s in zip(again.generators, saved["gens"]): g.set_state(s)
    assert again.noise_scale_now == opt.noise_scale_now == .1 * .9**5
    assert equal(walk(opt, a, grads[5:]), walk(again, b, grads[5:])) and again.noise_scale_now == opt.noise_scale_now


def test_decay_zero_is_one_noisy_step_and_reset_makes_another():
    a, grads = params_and_grads(); opt = make_optimizer(NoisySGD(lr=1., momentum=0., noise_decay=0.), a, generators=gens())
    noisy = []
    for t, at in enumerate(grads[:6]):
        if t == 4: opt.reset_noise()
        before = {k: p.detach().clone() for k, p in a.items()}; walk(opt, a, [at])
        noisy.append(any(not torch.equal(p.detach(), before[k] - at[k]) for k, p in a.items()))
    assert noisy == [True, False, False, False, True, False]


def test_replicas_generators_do():
    "as a learner passes them: their state is saved with the replicas, and loaded after the optimizer was made"
    def build():
        nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[8], normalization="none", dropout_p=0.), SEEDS)
        return nets, make_optimizer(NoisySGD(), nets.params, generators=[g["noise"] for g in nets.generators])
    def step(nets, opt):
        for p in nets.params.values(): p.grad = torch.ones_like(p)
        opt.step()
        return {k: p.detach().clone() for k, p in nets.params.items()}
    nets, opt = build(); step(nets, opt)
    file = io.BytesIO(); torch.save((nets.state_dict(), opt.state_dict()), file); file.seek(0)
    then = step(nets, opt)
    again, its = build(); saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved[0]); its.load_state_dict(saved[1])
    assert equal(step(again, its), then)


@pytest.mark.parametrize("spec, says", [
    (RMSprop(implementation="fused"), "optimizer.implementation for rmsprop 'fused'. Choices: foreach."),
    (SGD(implementation="fussed"), "Did you mean 'fused'?"),
    (SGD(momentum=0., nesterov=True), "Nesterov"),
    (Adam(betas=[.9, 1.]), "beta"),
    (NoisySGD(noise_per="tensors"), "Did you mean 'tensor'?"),
    (NoisySGD(noise_scale=-.1), "noise_scale"),
    (NoisySGD(), "g['noise'] for g in replicas.generators"),
    (replace(SGD(), name="sdg"), "Did you mean 'sgd'?")], ids=str)
def test_what_is_refused(spec, says):
    with pytest.raises(LopError) as e: make_optimizer(spec, params_and_grads()[0])
    assert says in str(e.value)


def test_a_generator_for_each_replica():
    with pytest.raises(LopError, match="2 generators for parameters of 3 replicas"): make_optimizer(NoisySGD(), params_and_grads()[0], generators=gens(SEEDS[:2]))


# ---- ages of elements ----

@pytest.mark.parametrize("kw", [dict(), dict(lr=.05, betas=[.5, .9], weight_decay=.3), dict(lr=.01, eps=1e-3)], ids=str)
@pytest.mark.parametrize("spec", [Adam, AdamW])
def test_element_adam_is_adam_or_adamw(spec, kw):
    (a, grads), (b, _) = params_and_grads(dtype=torch.float64, steps=60), params_and_grads(dtype=torch.float64, steps=60)
    ours, theirs = make_optimizer(spec(**kw), a, per_element=True), make_optimizer(spec(**kw), b)
    assert type(ours) is ElementAdam and type(theirs).__name__ == spec.__name__
    walk(ours, a, grads); walk(theirs, b, grads)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-12)


EVERY = [Adam(weight_decay=.1), AdamW(weight_decay=.1), SGD(), SGD(momentum=0.), SGD(nesterov=True, weight_decay=.1), RMSprop(lr=.01), RMSprop(lr=.01, momentum=.9, centered=True, weight_decay=.1), NoisySGD(noise_scale=0.)]


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_unit_that_is_reset_steps_like_a_new_one(spec):
    "memory + scatter zero, as interventions do; then the unit's weights go where those of an optimizer without a past go, and no others change"
    nets = [Replicas(partial(MLP, 64, 10, hidden_sizes=[8]*2, normalization="none", dropout_p=0.), SEEDS) for _ in range(3)]
    opts = [make_optimizer(spec, n.params, per_element=True, generators=gens()) for n in nets]
    grads = [{k: torch.stack([torch.randn(p.shape[1:], generator=generator(s, "g", k, t)) for s in SEEDS]) for k, p in nets[0].params.items()} for t in range(25)]
    for n, o in zip(nets[:2], opts): walk(o, n.params, grads[:20])
    for n in nets[1:]:
        for k, p in n.params.items(): p.data.copy_(nets[0].params[k].data)
    group, unit = nets[0].graph.groups[0], torch.tensor([[1], [5], [0]])
    for kind in memory(opts[0], nets[0].params): scatter(kind, [s for s in group.slices if s.param in kind], unit, 0.)
    for n, o in zip(nets, opts): walk(o, n.params, grads[20:])
    mine = {k: torch.zeros_like(p.data, dtype=torch.bool) for k, p in nets[0].params.items()}
    scatter(mine, [s for s in group.slices if s.param in mine], unit, True)
    for k, m in mine.items():
        after, past, new = (n.params[k].data for n in nets)
        torch.testing.assert_close(after[m], new[m], rtol=1e-6, atol=1e-7)
        assert torch.equal(after[~m], past[~m]), k
    if memory(opts[0], nets[0].params): assert any((nets[1].params[k].data - nets[2].params[k].data)[m].abs().max() > 1e-4 for k, m in mine.items() if m.any()), "the past matters"


# ---- forgetting a head ----

FUSED = [replace(s, implementation="fused") for s in EVERY if s.name != "rmsprop"]   # torch has no fused RMSprop


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("spec", [*EVERY, SGD(dampening=.5), *FUSED], ids=str)
def test_a_forgotten_head_goes_on_like_a_new_one(spec, per_element):
    "bit for bit, in the next step and those after; the others never notice"
    make = partial(make_optimizer, spec, per_element=per_element, generators=gens())
    (a, grads), (b, _), (new, _) = (params_and_grads() for _ in range(3))
    opt, past = make(a), make(b)
    walk(opt, a, grads[:6]); walk(past, b, grads[:6])
    new = {"head": new["head"]}; new["head"].data.copy_(a["head"].data)
    forget(opt, a, ["head"])
    assert not [k for kind in memory(opt, a) for k, s in kind.items() if k == "head" and s.any()]
    fresh = make(new)
    for at in grads[6:]:
        walk(opt, a, [at]); walk(past, b, [at]); walk(fresh, new, [dict(head=at["head"])])
        assert torch.equal(a["head"], new["head"]) and all(torch.equal(a[k], b[k]) for k in ("body", "bias"))


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_nothing_to_forget_is_no_error(spec):
    (a, grads), (b, _) = params_and_grads(), params_and_grads()
    opt = make_optimizer(spec, a); forget(opt, a, ["head"]); forget(opt, a, [])
    assert equal(walk(opt, a, grads), walk(make_optimizer(spec, b), b, grads))


@pytest.mark.parametrize("spec", [Adam(), SGD(), SGD(implementation="fused"), RMSprop(momentum=.9)], ids=str)
def test_what_is_left_after_forgetting_can_be_saved(spec):
    a, grads = params_and_grads(); opt = make_optimizer(spec, a); walk(opt, a, grads[:4]); forget(opt, a, ["head"])
    file = io.BytesIO(); torch.save(opt.state_dict(), file); file.seek(0)
    b = {k: p.detach().clone().requires_grad_() for k, p in a.items()}; again = make_optimizer(spec, b); again.load_state_dict(torch.load(file, weights_only=True))
    assert equal(walk(opt, a, grads[4:]), walk(again, b, grads[4:]))


def test_forgetting_says_what_it_cannot():
    a, grads = params_and_grads(); opt = make_optimizer(SGD(dampening=.5, implementation="fused"), a); walk(opt, a, grads[:2])
    with pytest.raises(LopError, match="optimizer.implementation=foreach"): forget(opt, a, ["head"])
    with pytest.raises(LopError, match="Did you mean 'head'"): forget(opt, a, ["heads"])
