"Kernels for streams of single examples, held to torch's way step by step; what they are given beforehand, to what the plain form draws."
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import torch_steps

from lop_nb.config import SGD, Adam, AdamW, RMSprop
from lop_nb.interventions import ContinualBackprop, Schedule
from lop_nb.kernels import Cannot, Job, Shallow
from lop_nb.models import MLP
from lop_nb.optimizers import forget, make_optimizer
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
EACH = [*(dict(act=a) for a in ("relu", "leaky_relu", "tanh", "sigmoid", "elu", "swish", "none")), dict(sizes=()), dict(sizes=(), loss="cross_entropy", spec=Adam(lr=.01)),
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


def streamed(seeds, kw, cuts=(), n=300, threads=1, lanes=None, dtype=torch.float32):
    job = made(seeds=seeds, dtype=dtype, threads=threads, **kw)
    family = Shallow(job, lanes)
    out = in_blocks(family, *stream(seeds, n, kw.get("loss", "squared"), dtype), cuts)
    return job, out


@pytest.mark.parametrize("kw", [dict(utility="contribution"), dict(utility="adaptable_contribution", act="tanh", spec=SGD(lr=.02, momentum=0., weight_decay=.1)),
                                dict(loss="cross_entropy", utility="zero_contribution", spec=Adam(lr=.01))], ids=["sgd", "decay", "adam"])
def test_no_bit_depends_on_replicas_threads_blocks_or_layout(kw):
    "Of 256 replicas, some alone; in three threads; in blocks of any size; as lanes, or one after the other, or as is chosen"
    job, out = streamed(range(256), kw)
    for how in dict(threads=3), dict(cuts=(1, 2, 150)), dict(lanes=0), dict(lanes=100), dict(lanes=8, threads=2, cuts=(77,)):
        other, again = streamed(range(256), kw, **how)
        assert all(torch.equal(a, b) for a, b in zip(out, again)), how
        a, b = everything(job), everything(other)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), how
    for r in 0, 101, 255:
        alone, mine = streamed([r], kw)
        assert all(torch.equal(a[r], b[0]) for a, b in zip(out, mine))
        assert all(torch.equal(p[r], alone.nets.params[k][0]) for k, p in job.nets.params.items())
        assert all(torch.equal(v[r], alone.inside["continual_backprop"].stats["act_0"][k][0]) for k, v in job.inside["continual_backprop"].stats["act_0"].items())


def test_which_layout_is_chosen():
    chosen = lambda R, H, threads=1, **kw: (f := Shallow(made(sizes=(H,) if H else (), seeds=range(R), threads=threads, dtype=torch.float32, **kw)))._width(f._step())
    assert [chosen(256, 5), chosen(256, 5, 4), chosen(20, 5), chosen(15, 5), chosen(20, 16), chosen(64, 16), chosen(256, 17)] == [128, 64, 20, 0, 0, 64, 0]
    assert [chosen(99, 0), chosen(99, 5, spec=Adam()), chosen(99, 5, loss="cross_entropy"), chosen(99, 5, utility="adaptation")] == [0, 0, 0, 99]


@pytest.mark.parametrize("k", [1, 16, 500])
@pytest.mark.parametrize("lanes", [0, 3])
def test_examples_by_number_are_the_examples(lanes, k):
    "Also if the table is longer than the block, or has one row"
    seeds = range(3)
    table, _ = stream(seeds, k); y = torch.randn(3, k, dtype=torch.float64); table[..., :5] = table[:, :1, :5]
    codes = torch.randint(k, (3, 200))
    plain_, coded = made(seeds=seeds), made(seeds=seeds)
    x = table.gather(1, codes[..., None].expand(-1, -1, 12))
    want, got = Shallow(plain_, lanes)(x, y.gather(1, codes)), Shallow(coded, lanes)((table, codes), y)
    assert all(torch.equal(a, b) for a, b in zip(want, got)) and all(torch.equal(p, coded.nets.params[n]) for n, p in plain_.nets.params.items())


@pytest.mark.parametrize("kw", [dict(), dict(spec=Adam(lr=.01)), dict(spec=Adam(lr=.01), utility="contribution"), dict(spec=SGD(lr=.02, momentum=0., weight_decay=.1), utility="zero_contribution")],
                         ids=["sgd", "adam", "aged", "decay"])
def test_torch_goes_on_where_the_kernel_stopped_and_back(kw):
    x, y = stream(range(2), 400)
    torchs, mixed = made(**kw), made(**kw)
    torch_steps(torchs, x, y)
    family = Shallow(mixed)
    for a, way in zip((0, 100, 200, 300), (family, partial(torch_steps, mixed), family, partial(torch_steps, mixed))): way(x[:, a:a + 100], y[:, a:a + 100])
    a, b = everything(torchs), everything(mixed)
    assert a.keys() == b.keys() and largest(a, b) <= 1e-12


def test_a_forgotten_head_and_a_changed_step_are_respected():
    "Each parameter's own step count; the optimizer's settings as they are now"
    x, y = stream(range(2), 300, "cross_entropy"); kw = dict(loss="cross_entropy", spec=Adam(lr=.01))
    jobs = [made(**kw) for _ in range(2)]; ways = [partial(torch_steps, jobs[0]), Shallow(jobs[1])]
    for job, way in zip(jobs, ways):
        way(x[:, :150], y[:, :150]); forget(job.optimizer, job.nets.params, ["out.weight", "out.bias"]); job.optimizer.param_groups[0]["lr"] = .002
        way(x[:, 150:], y[:, 150:])
    a, b = map(everything, jobs)
    assert a["out.weight, step"] == 150 and a["linear_0.weight, step"] == 300 and largest(a, b) <= 1e-12


@pytest.mark.parametrize("kw", [dict(), dict(spec=Adam(lr=.01), loss="cross_entropy"), dict(utility="contribution")], ids=["sgd", "adam", "renewal"])
def test_float32_stays_close(kw):
    x, y = stream(range(2), 500, kw.get("loss", "squared"), torch.float32)
    torchs, ours = made(dtype=torch.float32, **kw), made(dtype=torch.float32, **kw)
    want, got = torch_steps(torchs, x, y), Shallow(ours)(x, y)
    assert got[0].dtype == torch.float32 and (want[0] - got[0]).abs().max() < 1e-4
    assert all((p - ours.nets.params[k]).abs().max() < 1e-4 for k, p in torchs.nets.params.items())


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "tanh", "elu", "swish"])
def test_what_is_not_a_number_is_not_hidden(act):
    "A bias that is none makes every loss none, as with torch"
    x, y = stream(range(2), 9)
    for lanes in 0, 2:
        torchs, ours = made(act=act), made(act=act)
        for job in (torchs, ours): job.nets.params["linear_0.bias"].data[1, 2] = torch.nan
        want, got = torch_steps(torchs, x, y)[0], Shallow(ours, lanes)(x, y)[0]
        assert got[1].isnan().all() and torch.equal(want.isnan(), got.isnan())


def test_codes_and_targets_of_other_types():
    "Bytes for codes, float32 tables for networks of float64"
    g = torch.Generator().manual_seed(0); table, y = torch.randn(2, 8, 12, generator=g), torch.randn(2, 8, generator=g); codes = torch.randint(8, (2, 90), generator=g)
    a, b = made(), made()
    Shallow(a)((table.double(), codes), y.double()); Shallow(b)((table, codes.byte()), y)
    assert all(torch.equal(p, b.nets.params[k]) for k, p in a.nets.params.items())


def test_pictures_of_any_shape_and_views_of_other_memory():
    x, y = stream(range(2), 100)
    a, b = made(), made()
    Shallow(a)(x, y)
    Shallow(b)(x.repeat_interleave(2, 1)[:, ::2].view(2, 100, 1, 3, 4), y.t().contiguous().t())
    assert all(torch.equal(p, b.nets.params[k]) for k, p in a.nets.params.items())


@pytest.mark.parametrize("kw, why", [
    (dict(sizes=(5, 5)), "2 hidden layers"), (dict(spec=SGD()), "momentum=0.9"), (dict(spec=RMSprop()), "RMSprop"), (dict(dtype=torch.float16), "float16"),
    (dict(utility="contribution", clip=1.), "both"), (dict(act="gelu"), "GELU")])
def test_what_it_cannot_do_it_says(kw, why):
    with pytest.raises(Cannot, match=why): Shallow(made(**kw))


def test_what_a_job_asks_beyond():
    job = made(); job.batch_size = 4
    with pytest.raises(Cannot, match="4 examples"): Shallow(job)
    job = made(); job.inside["noise"] = None
    with pytest.raises(Cannot, match="noise"): Shallow(job)
    nets = Replicas(lambda: plain(12, 3, hidden_sizes=[5]), [0])
    with pytest.raises(Cannot, match="3 outputs"): Shallow(Job(nets, PLAIN, make_optimizer(PLAIN, nets.params), "squared"))


def test_without_numba_it_says_so(monkeypatch):
    from lop_nb import kernels
    monkeypatch.setattr(kernels, "numba", None)
    with pytest.raises(Cannot, match="numba is not installed"): made()
    assert kernels.compiled(len) is len


def test_where_nothing_may_be_kept_a_kernel_is_compiled_all_the_same():
    "No folder to write to: neither beside the package nor in the home"
    code = """if 1:
        import numba.core.caching as c
        for kind in c.CacheImpl._locator_classes: kind.from_function = classmethod(lambda *a: None)
        from lop_nb.interventions import Schedule
        print(*Schedule(5, .5, 0).coming(4))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    asked = Schedule(5, .5, 0)
    assert out.stdout.split() == [str(asked.due()) for _ in range(4)], out.stderr


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 3), st.lists(st.integers(0, 60), max_size=4), st.sampled_from(["relu", "tanh", "leaky_relu"]), st.integers(0, 4), st.integers(0, 99))
def test_any_sizes_and_cuts(R, H, u, cuts, act, lanes, seed):
    "Against torch's way, in blocks of any size, none of them too"
    kw = dict(sizes=(H,) if H else (), act=act, utility=U[u], seeds=range(seed, seed + R))
    x, y = stream(range(seed, seed + R), 60)
    torchs, ours = made(**kw), made(**kw)
    want, got = torch_steps(torchs, x, y), in_blocks(Shallow(ours, lanes), x, y, sorted(cuts))
    assert (want[0] - got[0]).abs().max() <= 1e-12 and largest(everything(torchs), everything(ours)) <= 1e-12
