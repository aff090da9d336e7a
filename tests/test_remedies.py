"Remedies against slow loops written from their papers; each changes the run, and a run that was stopped goes on as if it had not been."
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lop_nb.compose import compose
from lop_nb.config import SGD
from lop_nb.data import load
from lop_nb.experiments import intervention_kinds, make_interventions
from lop_nb.learner import Callback, Learner
from lop_nb.models import CNN, MLP
from lop_nb.remedies import WeightClipping, bounds
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import PermutedPixels

DATA = load("digits")
MAKE = dict(mlp=partial(MLP, 64, 10, hidden_sizes=[10, 8], normalization="none", dropout_p=0.),
            cnn=partial(CNN, 1, 8, 10, conv_channels=[4, 6], fc_hidden_units=[10], normalization="batch", dropout_p=0.))


class Doubles:
    "A stream in float64; what was fetched is remembered"
    def __init__(self, stream): self.stream, self.fetched = stream, []
    def __getattr__(self, name): return getattr(self.stream, name)
    def __len__(self): return len(self.stream)
    def seeded(self, seeds): self.stream = self.stream.seeded(seeds); return self
    def __getitem__(self, k):
        task = self.stream[k]; fetch = task.train.fetch
        def double(*args):
            x, y = fetch(*args); self.fetched.append((k, x.double(), y)); return x.double(), y
        task.train.fetch = double
        return task


def learner_of(*callbacks, kind="mlp", seeds=(3,), optimizer=SGD(lr=.05), dtype=torch.float64, tasks=2, **kw):
    stream = PermutedPixels(DATA, tasks=tasks)
    return Learner(Replicas(MAKE[kind], seeds, dtype=dtype), Doubles(stream) if dtype == torch.float64 else stream, optimizer,
                   epochs=1, callbacks=callbacks, defaults=(), **kw)


def params_of(learner): return {k: p.detach().clone() for k, p in learner.replicas.params.items()}


def slow_run(kind, fetched, spec, each_step=lambda net, lr: None, at_task=lambda net: None, B=32):
    "Plain torch on one network of seed 3, in the order that was fetched"
    net, now = Replicas(MAKE[kind], [3], dtype=torch.float64).modules[0], 0
    opt = (torch.optim.SGD(net.parameters(), lr=spec.lr, momentum=spec.momentum) if spec.name == "sgd" else torch.optim.Adam(net.parameters(), lr=spec.lr))
    for k, xs, ys in fetched:
        if k != now: at_task(net); now = k
        for x, y in zip(xs[0].split(B), ys[0].split(B)):
            opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
            each_step(net, spec.lr)
    return dict(net.named_parameters())


def slow_clip(net, κ, norms):
    "Weight after weight, as in the paper; for norms, the bound of the weight before"
    fan_in = None
    for name, p in net.named_parameters():
        if p.ndim > 1:
            fan_in = 1
            for n in p.shape[1:]: fan_in *= n
        if name.startswith("norm") and not norms: continue
        flat = p.data.view(-1)
        for i, w in enumerate(flat.tolist()): flat[i] = max(-κ / fan_in**.5, min(κ / fan_in**.5, w))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind, κ", [("mlp", .7), ("cnn", .9)])
def test_clipping_equals_the_slow_loop(kind, κ, norms):
    of_norms = [k for k in bounds(MAKE[kind](), norms) if k.startswith("norm")]
    assert len(of_norms) == (4 if kind == "cnn" and norms else 0)
    spec = SGD(lr=.05)
    learner = learner_of(WeightClipping(κ, norms), kind=kind, tasks=1, optimizer=spec).fit()
    want = slow_run(kind, learner.stream.fetched, spec, lambda net, lr: slow_clip(net, κ, norms))
    assert learner.at.step == 41
    for k, p in params_of(learner).items(): assert (p[0] - want[k]).abs().max() <= 1e-12, k
    assert all((learner.replicas.params[f"{l}.weight"].abs() == learner.callbacks[0].limits[f"{l}.weight"]).any() for l in ("out",))


@pytest.mark.parametrize("bound", [0., -1., float("nan")])
def test_a_bound_that_is_none(bound):
    with pytest.raises(LopError, match="weight_clipping.bound"): WeightClipping(bound)


def test_clipping_from_the_command_line():
    cfg = compose(["intervention=weight_clipping", "intervention.weight_clipping.bound=3"])
    callback, = make_interventions(cfg, cfg.intervention.arms[0])
    assert type(callback) is WeightClipping is intervention_kinds["weight_clipping"] and (callback.bound, callback.norms) == (3., False)


def test_the_share_that_is_clipped():
    class Count(Callback):
        order = 1
        def after_task(self, learner):
            clip = learner.callbacks[0]
            self.found = [sum((p[r].abs() == torch.tensor(clip.limits[k], dtype=p.dtype)).sum().item() for k, p in learner.replicas.params.items()) / 828 for r in range(2)]
    count = Count()
    learner = learner_of(WeightClipping(.5), count, seeds=(3, 4), dtype=None, tasks=1).fit()
    assert sum(p[0].numel() for p in learner.replicas.params.values()) == 828
    logged = learner.records.query("metric == 'clipped_fraction'").sort_values("replica").value.tolist()
    assert logged == pytest.approx(count.found, abs=1e-7) and .01 < min(logged) < max(logged) < 1
