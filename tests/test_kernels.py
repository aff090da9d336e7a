"Kernels for streams of single examples, held to torch's way step by step; what they are given beforehand, to what the plain form draws."
from functools import partial

import pytest
import torch

from lop_nb.interventions import ContinualBackprop, Schedule
from lop_nb.models import MLP
from lop_nb.replicas import Replicas

plain = partial(MLP, normalization="none", dropout_p=0.)


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
