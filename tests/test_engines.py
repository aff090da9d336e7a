import warnings
from functools import partial

import pytest
import torch

from lop_nb import engines, kernels
from lop_nb.bitflips import BitFlips
from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop, L2Init
from lop_nb.learner import Callback, Learner, Online, by_batch, cuts
from lop_nb.models import CNN, MLP
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, Passage, PermutedLabels, PermutedPixels

DIGITS = load("digits", val=.5)
plain = dict(normalization="none", dropout_p=0.)
deep, shallow, bits = partial(MLP, 64, 10, hidden_sizes=[24, 16], **plain), partial(MLP, 64, 10, hidden_sizes=[24], **plain), partial(MLP, 20, 1, hidden_sizes=[5], **plain)
pixels, flips = PermutedPixels(DIGITS, tasks=2), BitFlips(tasks=3, examples=700)
still = SGD(lr=.01, momentum=0.)
JOBS = dict(active=(deep, pixels, still, 1), active_adam=(deep, pixels, Adam(), 1), shallow=(bits, flips, still, 1), batches=(deep, pixels, Adam(), 16))


class StopAt(Callback):
    "Ask to stop at the end of the block in which a step falls, as Ctrl-C would"
    def __init__(self, step): self.step = step
    def after_block(self, learner): learner.stopping = learner.stopping or learner.at.step >= self.step


def learner(job, engine="numba", *callbacks, seeds=(0, 1), dtype=torch.float64):
    make, stream, spec, B = JOBS[job]
    return Learner(Replicas(make, seeds, dtype=dtype), stream, spec, 1, B, callbacks, engine=engine, defaults=[Online()])


def same(a, b): return all(torch.equal(p, b.replicas.params[k]) for k, p in a.replicas.params.items()) and a.records.equals(b.records)


@pytest.mark.parametrize("job", JOBS)
def test_a_kernel_is_torch_to_rounding(job):
    "weights, records, and what the optimizer remembers"
    a, b = learner(job, "torch").fit(), learner(job).fit()
    assert (a.engine.name, b.engine.name) == ("torch", "numba")
    for k, p in a.replicas.params.items(): assert (p - b.replicas.params[k]).abs().max() < 1e-12, k
    assert (a.records.value - b.records.value).abs().max() < 1e-6 and len(a.records) == len(b.records)
    for p, q in zip(a.replicas.params.values(), b.replicas.params.values()):
        for k, s in a.optimizer.state.get(p, {}).items():
            if torch.is_tensor(s): assert (s - b.optimizer.state[q][k]).abs().max() < 1e-12, k


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_where_blocks_end_does_not_matter(job, engine, monkeypatch):
    whole = learner(job, engine, dtype=torch.float32).fit()
    monkeypatch.setattr("lop_nb.learner.chunk_bytes", 2**12)
    assert same(whole, learner(job, engine, dtype=torch.float32).fit())


@pytest.mark.parametrize("job", JOBS)
def test_alone_as_among_others_and_on_any_number_of_threads(job):
    many = learner(job, dtype=torch.float32, seeds=range(5)).fit()
    one = learner(job, dtype=torch.float32, seeds=[3]).fit()
    for k, p in one.replicas.params.items(): assert torch.equal(p[0], many.replicas.params[k][3]), k
    was = torch.get_num_threads(); torch.set_num_threads(2)
    try: assert same(many, learner(job, dtype=torch.float32, seeds=range(5)).fit())
    finally: torch.set_num_threads(was)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("stop", [1, 900])
def test_stopped_saved_and_resumed_is_never_stopped(job, stop, tmp_path, monkeypatch):
    monkeypatch.setattr("lop_nb.learner.chunk_bytes", 2**11)
    extra = (lambda: [ContinualBackprop(replacement_rate=2e-3)]) if JOBS[job][3] == 1 and JOBS[job][2] is still else list
    whole = learner(job, "auto" if extra is list else "numba", *extra(), dtype=torch.float32).fit()
    a = learner(job, "auto" if extra is list else "numba", *extra(), StopAt(min(stop, whole.at.step - 1)), Checkpoint(tmp_path, 1e9), dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt): a.fit()
    b = learner(job, "auto" if extra is list else "numba", *extra(), dtype=torch.float32)
    b.load_state_dict(load_checkpoint(tmp_path)); b.fit()
    assert 0 < a.at.step < b.at.step == whole.at.step
    for k, p in whole.replicas.params.items(): assert torch.equal(p, b.replicas.params[k]), k
    last = whole.records[whole.records.step == whole.at.step]
    assert last.value.tolist() == b.records[b.records.step == whole.at.step].value.tolist()


class Watch(Callback):
    def after_step(self, learner): pass


REFUSED = dict(dropout=(dict(make=partial(MLP, 64, 10, hidden_sizes=[8], normalization="none", dropout_p=.1)), "drop_0"),
    norm=(dict(make=partial(MLP, 64, 10, hidden_sizes=[8], normalization="layer", dropout_p=0.)), "norm_0"),
    cnn=(dict(make=lambda: CNN(1, 8, 10, conv_channels=[2], fc_hidden_units=[4])), "CNN is no plain MLP"),
    some_classes=(dict(stream=ClassSplit(DIGITS, tasks=2)), "some of the classes"), passage=(dict(stream=Passage(PermutedLabels(DIGITS, tasks=2), "labels")), "labels pass into"),
    watcher=(dict(callbacks=[Watch()]), "Watch must see every step"), l2_init=(dict(callbacks=[L2Init()]), "L2Init must see every step"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_kernel_cannot_do_is_refused_by_name_and_done_by_torch_otherwise(case):
    kw, why = REFUSED[case]
    make = lambda engine: Learner(Replicas(kw.get("make", shallow), [0]), kw.get("stream", pixels), still, 1, 1, kw.get("callbacks", ()), engine=engine, defaults=[])
    with pytest.raises(LopError, match=why): make("numba").fit()
    l = make("auto"); l.fit()
    assert l.engine.name == "torch" and why in l.why


def test_a_few_batches_are_not_worth_compiling(monkeypatch):
    assert learner("batches", "auto").fit().engine.name == "torch"
    monkeypatch.setattr(engines, "pays", 10)
    l = learner("batches", "auto").fit()
    assert l.engine.name == "numba" and not l.why


@pytest.mark.parametrize("job", JOBS)
def test_without_numba(job, monkeypatch):
    monkeypatch.setattr(kernels, "numba", None); monkeypatch.setattr(engines, "pays", 1)
    assert learner(job, "auto").fit().engine.name == "torch"
    with pytest.raises(LopError, match="numba is not installed"): learner(job).fit()


def test_a_cache_that_cannot_be_written(monkeypatch):
    "the kernel is compiled for this process alone"
    real = kernels.numba.njit
    def njit(**kw):
        if kw.get("cache"): raise RuntimeError("cannot cache function: no locator available")
        return real(**kw)
    monkeypatch.setattr(kernels.numba, "njit", njit)
    assert kernels.compiled(lambda a: a.sum() + 1)(torch.ones(3).numpy()) == 4


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(LopError, match="C\\+\\+ compiler.*apt-get"): learner("batches", "compile").fit()


def test_compiled_is_torch_to_rounding():
    run = lambda engine: Learner(Replicas(partial(MLP, 64, 10, hidden_sizes=[4], **plain), [0, 1]), PermutedPixels(DIGITS, tasks=1), Adam(), 1, 640, engine=engine, defaults=[Online()]).fit()
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); a, b = run("torch"), run("compile")
    assert b.engine.name == "compile"
    for k, p in a.replicas.params.items(): assert (p - b.replicas.params[k]).abs().max() < 1e-6, k


@pytest.mark.parametrize("make,callbacks,why", [(partial(MLP, 64, 10, hidden_sizes=[4], normalization="batch", dropout_p=0.), [], "running statistics"), (shallow, [ContinualBackprop()], "reads activations")])
def test_what_cannot_be_compiled(make, callbacks, why):
    with pytest.raises(LopError, match=why): Learner(Replicas(make, [0]), pixels, Adam(), 1, 32, callbacks, engine="compile", defaults=[]).fit()


@pytest.mark.parametrize("n,B", [(7, 3), (8, 3), (9, 3), (1, 3), (5, 1), (33, 32), (32, 32)])
def test_sums_over_batches(n, B):
    v = torch.arange(2. * n).view(2, n)
    assert torch.equal(by_batch(v, cuts(n, B)), torch.stack([b.sum(1) for b in v.split(cuts(n, B), 1)], 1))
