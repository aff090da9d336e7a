"Kernels for streams of single examples, held to torch's way step by step; what they are given beforehand, to what the plain form draws."
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from stepping import torch_steps

from lop_nb.config import SGD, Adam, AdamW
from lop_nb.interventions import ContinualBackprop, Schedule
from lop_nb.kernels import Job, Shallow
from lop_nb.models import MLP
from lop_nb.optimizers import make_optimizer
from lop_nb.replicas import Replicas

plain, PLAIN = partial(MLP, normalization="none", dropout_p=0.), SGD(lr=.05, momentum=0.)


class Fits:
    "As much of a learner as continual backprop asks of one"
    def __init__(self, nets): self.replicas = nets


def by_steps(cbp, nets, steps):
    "due and fresh from the plain form's own calls, drawn step after step, layer after layer"
    due, fresh = torch.zeros(len(cbp.groups), steps, dtype=torch.int64), [[] for _ in cbp.groups]
    for t in range(steps):
        for i, g in enumerate(cbp.groups):
            n = due[i, t] = cbp.schedules[g.name].due()
            fan_in = nets.params[g.weights[0].param].shape[2]
            if n: fresh[i].append(torch.stack([g.fresh((n, 1, fan_in), fan_in, gs["intervention"]).to(nets.params[g.weights[0].param]) for gs in nets.generators])[:, :, 0])
    return due, [torch.cat(f, 1) for f in fresh]


@pytest.mark.parametrize("sizes", [[5], [9, 7, 8]])
@pytest.mark.parametrize("rule", ["uniform", "normal"])
def test_ahead_draws_what_the_plain_form_draws(sizes, rule):
    "Whatever the cuts; also where one draw of many numbers is not many draws of few"
    def made():
        nets = Replicas(lambda: plain(6, 3, hidden_sizes=sizes), [4, 5, 6]); cbp = ContinualBackprop(.05, 7)
        if rule == "normal":
            for g in nets.graph.groups: g.fresh = lambda shape, fan_in, generator: torch.randn(shape, generator=generator) / fan_in
        cbp.before_fit(Fits(nets)); return nets, cbp
    nets, cbp = made(); want, drawn = by_steps(cbp, nets, 400)
    other, ahead = made()
    got = [ahead.ahead(other, n) for n in (1, 0, 13, 386)]
    assert want.sum() > 50 and torch.equal(torch.cat([d for d, _ in got], 1), want)
    for i, f in enumerate(drawn): assert torch.equal(torch.cat([fs[i] for _, fs in got], 1), f)
    for k, s in cbp.schedules.items(): assert ahead.schedules[k].state_dict() == s.state_dict() and ahead.replaced[k] == want[list(cbp.schedules).index(k)].sum()
    for a, b in zip(nets.generators, other.generators): assert torch.equal(a["intervention"].get_state(), b["intervention"].get_state())


@pytest.mark.parametrize("size, rate, maturity", [(1, 1., 0), (3, .4, 2), (50, .3, 0), (7, 0., 5), (2000, 1e-4, 100)])
def test_a_schedule_ahead_counts_as_one_that_is_asked(size, rate, maturity):
    asked, ahead = Schedule(size, rate, maturity), Schedule(size, rate, maturity)
    for n in (1, 3, 600, 1, 395): assert [asked.due() for _ in range(n)] == ahead.coming(n).tolist() and asked.state_dict() == ahead.state_dict()


class Clip:
    "Weight clipping from its formula"
    reads = ()
    def __init__(self, bound): self.bound = bound
    def before_fit(self, learner): pass
    def after_backward(self, learner): pass
    @torch.no_grad()
    def after_step(self, learner):
        for k, p in learner.replicas.params.items():
            b = self.bound / learner.replicas.params[k.replace("bias", "weight")].shape[2]**.5
            p.clamp_(-b, b)


def made(sizes=(5,), act="relu", loss="squared", spec=PLAIN, utility=None, hand="mean", clip=None, seeds=range(2), dtype=torch.float64, threads=1):
    "A job on 12 inputs, and what is inside it has begun"
    nets = Replicas(lambda: plain(12, 1 if loss == "squared" else 3, hidden_sizes=list(sizes), activation=act), seeds, dtype=dtype)
    inside = {"continual_backprop": ContinualBackprop(.02, 10, .95, utility, hand)} if utility else {}
    if clip: inside["weight_clipping"] = Clip(clip)
    job = Job(nets, spec, make_optimizer(spec, nets.params, bool(utility)), loss, inside=inside, threads=threads)
    for c in inside.values(): c.before_fit(SimpleNamespace(replicas=nets, optimizer=job.optimizer))
    return job


def stream(seeds, n, loss="squared", dtype=torch.float64, k=12):
    "Half of the inputs are zero; each replica's examples come from its own seed"
    x, y = [], []
    for s in seeds:
        g = torch.Generator().manual_seed(100 + s)
        x.append(torch.randn(n, k, generator=g, dtype=torch.float64) * (torch.rand(n, k, generator=g) < .5))
        y.append(torch.randn(n, generator=g, dtype=torch.float64) if loss == "squared" else torch.randint(3, (n,), generator=g))
    x, y = torch.stack(x).to(dtype), torch.stack(y)
    return x, y.to(dtype) if loss == "squared" else y


def everything(job):
    "All that a job has learnt and remembers, by name"
    state = {f"{k}, {n}": v for k, p in job.nets.params.items() for n, v in job.optimizer.state[p].items()}
    cbp = job.inside.get("continual_backprop")
    stats = {f"{g}, {k}": v for g, kinds in cbp.stats.items() for k, v in kinds.items()} | {f"{g} replaced": torch.tensor(n) for g, n in cbp.replaced.items()} if cbp else {}
    drawn = {f"generator {r}": g["intervention"].get_state() for r, g in enumerate(job.nets.generators)}
    return dict(job.nets.params) | {k: v for k, v in state.items() if torch.is_tensor(v)} | stats | drawn


def in_blocks(family, x, y, cuts):
    parts = [family(x[:, a:b], y[:, a:b]) for a, b in zip([0, *cuts], [*cuts, x.shape[1]])]
    return tuple(torch.cat(p, 1) for p in zip(*parts))


def largest(a, b): return max((a[k].double() - b[k].double()).abs().max().item() for k in a)

U = "contribution", "zero_contribution", "adaptation", "adaptable_contribution"
EACH = [*(dict(act=a) for a in ("relu", "leaky_relu", "tanh", "sigmoid", "elu", "none")), dict(sizes=()), dict(sizes=(), loss="cross_entropy", spec=Adam(lr=.01)),
        dict(sizes=(9,), loss="cross_entropy", act="tanh"), dict(spec=SGD(lr=.02, momentum=0., weight_decay=.1)), dict(spec=SGD(lr=.02, momentum=0., weight_decay=.1), sizes=()),
        dict(spec=Adam(lr=.01, betas=[.8, .95])), dict(spec=Adam(lr=.01, weight_decay=.1), act="elu"), dict(spec=AdamW(lr=.01, weight_decay=.1), loss="cross_entropy", act="sigmoid"),
        *(dict(utility=u) for u in U), *(dict(utility=u, loss="cross_entropy", act="tanh") for u in U), dict(utility="contribution", hand="zero"),
        dict(utility="zero_contribution", spec=SGD(lr=.02, momentum=0., weight_decay=.1), act="leaky_relu"), dict(utility="contribution", spec=Adam(lr=.01)),
        dict(utility="adaptable_contribution", spec=AdamW(lr=.01, weight_decay=.1), act="sigmoid"), dict(utility="contribution", sizes=()),
        dict(clip=.5), dict(clip=.5, spec=Adam(lr=.01)), dict(clip=.3, sizes=()), dict(clip=.5, spec=SGD(lr=.02, momentum=0., weight_decay=.1), loss="cross_entropy")]


@pytest.mark.parametrize("kw", EACH, ids=lambda kw: " ".join(str(getattr(v, "name", v)) for v in kw.values()) if kw else "default")
def test_shallow_is_torch_step_by_step(kw):
    "Six hundred steps in blocks: weights, losses, logits, the optimizer's averages, continual backprop's, and where the generators stand"
    torchs, ours = made(**kw), made(**kw)
    x, y = stream(range(2), 600, kw.get("loss", "squared"))
    want, got = torch_steps(torchs, x, y), in_blocks(Shallow(ours, 0), x, y, (1, 170))
    a, b = everything(torchs), everything(ours)
    assert a.keys() == b.keys() and largest(a, b) <= 1e-12
    for u, v in zip(want, got): assert u.shape == v.shape and (u - v).abs().max() <= 1e-12
    if "utility" in kw and kw.get("sizes") != (): assert b["act_0 replaced"] >= 40
    start = made(**kw).nets.params
    assert all((p - start[k]).abs().max() > 1e-3 for k, p in ours.nets.params.items())
    lanes = made(**kw)
    both = in_blocks(Shallow(lanes, 2), x, y, (33,))
    assert all(torch.equal(u, v) for u, v in zip(got, both)) and all(torch.equal(v, b[k]) for k, v in everything(lanes).items())
