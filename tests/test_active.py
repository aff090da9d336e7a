"The deep streaming kernels, held to torch's steps one by one"
from types import SimpleNamespace

import pytest
import torch
from stepping import torch_steps

from lop_nb.active import Active
from lop_nb.config import SGD, Adam, AdamW, RMSprop
from lop_nb.interventions import ContinualBackprop
from lop_nb.kernels import Cannot, Job
from lop_nb.models import MLP
from lop_nb.optimizers import make_optimizer
from lop_nb.remedies import WeightClipping
from lop_nb.replicas import Replicas

pytest.importorskip("numba")
n, wide, classes = 520, 7, 4
specs = dict(sgd=SGD(lr=.1, momentum=0.), decayed_sgd=SGD(lr=.1, momentum=0., weight_decay=.01),
             adam=Adam(lr=.01), decayed_adam=Adam(lr=.01, weight_decay=.1), adamw=AdamW(lr=.01, weight_decay=.1))
utilities = "contribution", "zero_contribution", "adaptation", "adaptable_contribution"


def job(spec=specs["sgd"], inside=(), sizes=(18, 9), act="relu", seeds=(3,), outputs=classes, loss="cross_entropy", dtype=torch.float64, threads=1):
    nets = Replicas(lambda: MLP(wide, outputs, hidden_sizes=list(sizes), activation=act, normalization="none", dropout_p=0.), seeds, dtype=dtype)
    return Job(nets, spec, make_optimizer(spec, nets.params, any(c.resets_units for c in inside)), loss, 1, {c.inside: c for c in inside}, threads)


def data(R=1, dtype=torch.float64, loss="cross_entropy"):
    "Half of the inputs are zero"
    g = torch.Generator().manual_seed(1)
    x = torch.rand(R, n, wide, generator=g, dtype=torch.float64) * (torch.rand(R, n, wide, generator=g) > .5); x[:, :, -1] = 0
    return x.to(dtype), torch.randint(classes, (R, n), generator=g) if loss == "cross_entropy" else x.sin().sum(2).to(dtype)


def by_kernel(job, x, y, cuts=None):
    "Losses, logits from `Active`, with blocks of `cuts` examples"
    for c in job.inside.values(): c.before_fit(SimpleNamespace(replicas=job.nets, optimizer=job.optimizer))
    family = Active(job)
    return tuple(torch.cat(o, 1) for o in zip(*(family(a, b) for a, b in zip(x.split(cuts or len(x[0]), 1), y.split(cuts or len(x[0]), 1)))))


def state(job):
    "All that a job leaves behind"
    left = {k: p.detach() for k, p in job.nets.params.items()}
    left |= {(k, s): v for k, p in job.nets.params.items() for s, v in job.optimizer.state[p].items() if v is not None}
    for c in job.inside.values(): left |= {(g, k): v for g, stats in getattr(c, "stats", {}).items() for k, v in stats.items()}
    return left


def hold(make, cuts=(100, 1, 419), loss="cross_entropy"):
    "To 1e-12 of the largest number: losses, logits, parameters, the optimizer's memory, continual backprop's statistics"
    a, b = make(), make(); x, y = data(len(a.nets), loss=loss)
    want, got = torch_steps(a, x, y), by_kernel(b, x, y, cuts)
    for u, v in zip(want, got): assert (u - v).abs().max() <= 1e-12
    left, mine = state(a), state(b)
    assert left.keys() == mine.keys()
    for k, v in left.items(): assert (v - mine[k]).abs().max() <= 1e-12 * v.abs().max().clamp(min=1), k
    return a, b


@pytest.mark.parametrize("act, spec", [*[("relu", s) for s in specs], *[(a, s) for a in ("leaky_relu", "tanh", "sigmoid", "elu") for s in ("sgd", "decayed_adam")]])
def test_the_kernel_takes_torchs_steps(act, spec): hold(lambda: job(specs[spec], act=act))


@pytest.mark.parametrize("act, spec", [*[("relu", s) for s in specs], ("leaky_relu", "adam")])
def test_weights_are_clipped_inside_the_step(act, spec):
    "Weights that no example touches too: the last input is always 0"
    a, b = hold(lambda: job(specs[spec], [WeightClipping(.2)], act=act))
    limits = b.inside["weight_clipping"].limits
    assert all((b.nets.params[k].abs() <= v).all() for k, v in limits.items())
    assert (job(specs[spec]).nets.params["linear_0.weight"].abs() > limits["linear_0.weight"]).any()


@pytest.mark.parametrize("sizes", [(), (5,), (6, 17, 33, 4)])
@pytest.mark.parametrize("spec", ["sgd", "adam"])
def test_any_depth(sizes, spec): hold(lambda: job(specs[spec], sizes=sizes))


@pytest.mark.parametrize("spec", ["sgd", "decayed_adam"])
def test_a_squared_loss(spec): hold(lambda: job(specs[spec], outputs=1, loss="squared"), loss="squared")


@pytest.mark.parametrize("utility, hand_over, spec, act", [*[(u, "mean", "sgd", "relu") for u in utilities], ("contribution", "zero", "sgd", "tanh"), ("adaptable_contribution", "zero", "decayed_sgd", "relu")])
def test_units_are_replaced_as_by_the_plain_form(utility, hand_over, spec, act):
    a, b = hold(lambda: job(specs[spec], [ContinualBackprop(.01, 20, decay=.9, utility=utility, hand_over=hand_over)], act=act, seeds=(3, 4)))
    plain, mine = a.inside["continual_backprop"], b.inside["continual_backprop"]
    assert plain.replaced == mine.replaced and min(mine.replaced.values()) >= 30
    for k in plain.schedules: assert plain.schedules[k].state_dict() == mine.schedules[k].state_dict()
    for g, h in zip(a.nets.generators, b.nets.generators): assert torch.equal(g["intervention"].get_state(), h["intervention"].get_state())


def test_many_units_at_once(): hold(lambda: job(inside=[ContinualBackprop(.3, 5, decay=.9)]))


arms = dict(sgd=lambda: dict(), clipped=lambda: dict(inside=[WeightClipping(.4)]), replacing=lambda: dict(inside=[ContinualBackprop(.01, 20, decay=.9)]),
            adam=lambda: dict(spec=specs["adam"]))

@pytest.mark.parametrize("arm", arms)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_for_all_cuts_threads_and_numbers_of_replicas(arm, dtype):
    seeds = range(256); x, y = data(256, dtype)
    x, y = x[:, :120], y[:, :120]
    many = job(seeds=seeds, dtype=dtype, **arms[arm]()); outs = by_kernel(many, x, y, 120)
    for r, cuts, threads in ((0, 7, 1), (201, 120, 2), (255, 1, 1)):
        one = job(seeds=[r], dtype=dtype, threads=threads, **arms[arm]())
        for u, v in zip(outs, by_kernel(one, x[[r]], y[[r]], cuts)): assert torch.equal(u[r], v[0])
        mine = state(one)
        for k, v in state(many).items(): assert torch.equal(v[r] if v.ndim else v, mine[k][0] if v.ndim else mine[k])
    apart = job(seeds=seeds, dtype=dtype, threads=5, **arms[arm]()); by_kernel(apart, x, y, (33, 87))
    for k, v in state(many).items(): assert torch.equal(v, state(apart)[k])


@pytest.mark.parametrize("arm", arms)
def test_single_precision_stays_near(arm):
    x, y = data(dtype=torch.float32)
    a, b = job(dtype=torch.float32, **arms[arm]()), job(dtype=torch.float32, **arms[arm]())
    (want, _), (got, _) = torch_steps(a, x, y), by_kernel(b, x, y)
    assert (want - got).abs().max() <= 2e-3


def test_torch_goes_on_where_the_kernel_stopped():
    "Kernel, torch, kernel: Adam's memory is one for both"
    x, y = data(); a, b = job(specs["adam"]), job(specs["adam"])
    torch_steps(a, x, y)
    by_kernel(b, x[:, :200], y[:, :200]); torch_steps(b, x[:, 200:300], y[:, 200:300]); by_kernel(b, x[:, 300:], y[:, 300:])
    for k, v in state(a).items(): assert (v - state(b)[k]).abs().max() <= 1e-12


def test_a_parameters_memory_that_was_dropped_begins_anew():
    from lop_nb.optimizers import forget
    x, y = data(); a, b = job(specs["adam"]), job(specs["adam"])
    for j, go in ((a, torch_steps), (b, by_kernel)): go(j, x[:, :200], y[:, :200]); forget(j.optimizer, j.nets.params, ["out.weight"]); go(j, x[:, 200:], y[:, 200:])
    for k, v in state(a).items(): assert (v - state(b)[k]).abs().max() <= 1e-12


def test_a_saved_state_comes_back():
    x, y = data(); a, b = (job(specs["adam"]) for _ in range(2))
    by_kernel(a, x, y)
    by_kernel(b, x[:, :200], y[:, :200])
    c = job(specs["adam"], seeds=(8,)); by_kernel(c, x[:, :3], y[:, :3])
    c.nets.load_state_dict(b.nets.state_dict()); c.optimizer.load_state_dict(b.optimizer.state_dict())
    by_kernel(c, x[:, 200:], y[:, 200:])
    for k, v in state(a).items(): assert torch.equal(v, state(c)[k])


@pytest.mark.parametrize("why, how", [("momentum", dict(spec=SGD(lr=.1))), ("RMSprop", dict(spec=RMSprop())), ("ElementAdam", dict(spec=Adam(), inside=[ContinualBackprop()])),
                                      ("weight clipping", dict(inside=[ContinualBackprop(), WeightClipping()])), ("bfloat16", dict(dtype=torch.bfloat16)), ("several outputs", dict(loss="squared"))])
def test_what_it_cannot_do_it_says(why, how):
    with pytest.raises(Cannot, match=why): Active(job(**how))


def test_batches_are_not_for_it():
    asked = job(); asked.batch_size = 8
    with pytest.raises(Cannot, match="batches of 8"): Active(asked)


