"Slowly-changing regression: one flip between two tasks and nothing else, a target that is the formula's, and a task that learners, evaluations and rollouts take."
import json
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lop_nb import experiments
from lop_nb.bitflips import LTU, Bits, BitFlips
from lop_nb.chains import MLP
from lop_nb.compose import compose
from lop_nb.config import SGD
from lop_nb.experiments import load_run, run_study, verify
from lop_nb.learner import Callback, Evaluate, Learner, Online, evaluate
from lop_nb.models import make_model
from lop_nb.plots import at_a_glance
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError
from lop_nb.streams import from_record

ALL = lambda view: torch.arange(view.n).expand(len(view.rows), -1)


def nets(seeds=(3, 5), **kw): return Replicas(partial(MLP, 20, 1, hidden_sizes=[5, 5], normalization="none", dropout_p=0.), seeds, **kw)


@given(st.floats(0, 1), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_thresholds_lie_at_the_share_beta_of_the_way(beta, bits, hidden, seed):
    "θ counted from the least sum that a unit can have, bias half inside, over m + 1"
    t = LTU.draw([seed], bits, hidden, beta); w = t.w[0]
    least = w[:, :-1].clamp(max=0).sum(1) + w[:, -1]/2
    assert torch.allclose((t.theta[0] - least)/(bits + 1), torch.tensor(beta), atol=1e-5)


def test_fast_bits_are_drawn_anew_for_each_example_and_task():
    stream = BitFlips(tasks=2, examples=20000, seeds=[3, 5])
    a, b = (stream[k].train for k in (0, 1))
    counts = a.rows[0].bincount(minlength=32)
    assert ((counts - 625).abs() < 5*25).all()                      # five standard deviations of a count
    assert not torch.equal(a.rows, b.rows) and not torch.equal(a.rows[0], a.rows[1])
    x = a.fetch(ALL(a))[0][..., 15:]
    assert (x[:, 1:]*x[:, :-1]).mean().sub(.25).abs() < .01         # no memory from one example to the next


def test_the_test_view_has_every_input_once():
    stream = BitFlips(tasks=3, examples=30, bits=9, slow=5, seeds=[1])
    view = stream[2].test; x, _ = view.fetch(ALL(view))
    assert view.n == 16 and len(x[0].unique(dim=0)) == 16 and (x[0, :, :5] == stream._draw(1, 2)).all()


def test_any_task_first_alone_or_among_others_in_a_longer_stream():
    stream = BitFlips(tasks=6, examples=40, seeds=[3, 5])
    late = stream[5]
    alone = BitFlips(tasks=300, examples=40, seeds=[5])[5]
    for a, b in zip(late.train.fetch(ALL(late.train)), alone.train.fetch(ALL(alone.train))): assert torch.equal(a[1], b[0])
    again = BitFlips(**stream.record()["settings"], seeds=stream.record()["seeds"])
    assert again.fingerprint() == stream.fingerprint() == stream.seeded([3, 5]).fingerprint() != stream.seeded([3, 6]).fingerprint()
    assert BitFlips(tasks=6, examples=40, hidden=99, seeds=[3, 5]).fingerprint() != stream.fingerprint()


@pytest.mark.parametrize("wrong, words", [(dict(tasks=0), "stream.tasks=0"), (dict(examples=0), "stream.examples=0"), (dict(slow=21), "there are 20 bits"), (dict(slow=0), "at least 1"),
                                          (dict(bits=40), "at most 16 of the 40 bits may be fast"), (dict(beta=1.2), "stream.beta=1.2"), (dict(hidden=0), "stream.hidden=0")])
def test_what_can_t_be_is_refused(wrong, words):
    with pytest.raises(LopError, match=words.replace(".", r"\.")): BitFlips(**wrong)


def test_a_state_without_fast_bits_has_one_input():
    task = BitFlips(tasks=2, examples=7, bits=4, slow=4)[1]
    assert task.test.n == 1 and task.train.fetch(ALL(task.train))[0].shape == (1, 7, 4)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_a_learner_trains_on_it_and_records_no_accuracy(strategy):
    stream = BitFlips(tasks=2, examples=400, seeds=[3, 5])
    learner = Learner(nets(strategy=strategy), stream, SGD(lr=.02, momentum=0.), epochs=1, batch_size=4, defaults=[Online(), Evaluate()]).fit()
    df = learner.records
    assert set(df.metric) == {"train_loss", "online_loss", "train_loss_summed", "test_loss"} and learner.at.step == 200
    assert (df[df.metric == "test_loss"].value < df[df.metric == "online_loss"].value.max()).all()


def test_one_step_is_the_gradient_of_the_squared_error():
    n, stream = nets(dtype=torch.float64), BitFlips(tasks=1, examples=6, seeds=[3, 5])
    task = stream[0]; x, y = task.train.fetch(ALL(task.train)); x, y = x.double(), y.double()
    out = n(x); losses = task.loss(out, y)
    assert losses.shape == (2, 6) and torch.equal(losses, (out[..., 0] - y)**2)
    n.backward(losses)
    for r in range(2): assert torch.allclose(n.params["out.bias"].grad[r, 0], 2*(out[r, :, 0] - y[r]).mean())
    assert list(evaluate(nets(), task, task.test)) == ["loss"]
    with pytest.raises(TypeError, match="no accuracy"): task.correct(out, y)


def test_a_network_can_be_made_for_it():
    for name in ("relu", "tanh", "sigmoid", "leaky_relu", "elu", "swish"):
        m = make_model(dict(name="mlp", hidden_sizes=[5], activation=name, normalization="none"), Bits(20))
        assert m(torch.zeros(2, 20)).shape == (2, 1)


# ---- all slow bits anew, walks, codes

def test_tasks_asked_for_in_any_order_are_those_of_a_walk():
    for flip in "one", "all":
        walk, jump = (BitFlips(tasks=30, examples=5, seeds=[3, 5, 8], flip=flip) for _ in range(2))
        states = torch.stack([walk[k].train.x[:, 0, :15] for k in range(30)])
        for k in 7, 8, 29, 0, 0, 13, 12: assert torch.equal(jump[k].train.x[:, 0, :15], states[k]) and torch.equal(torch.stack([jump._draw(s, k) for s in jump.seeds]).float(), states[k])
        kept = walk.draws()
        if flip == "all": assert (torch.from_numpy(kept["slow"]).transpose(0, 1) == states).all()
        else: assert ((states[1:] != states[:-1]).int().argmax(-1).T == torch.from_numpy(kept["flips"])).all()
    with pytest.raises(IndexError): walk[30]


def test_codes_are_the_examples():
    for fast in 5, 9:                                                 # 32 inputs, and more than a byte can count
        view = BitFlips(tasks=2, examples=700, bits=4 + fast, slow=4, seeds=[3, 5])[1].train; pick = torch.randint(700, (2, 90), generator=torch.Generator().manual_seed(0))
        ((table, codes), targets), (x, y) = view.codes(pick), view.fetch(pick)
        assert table.shape == (2, 2**fast, 4 + fast) and codes.dtype == torch.int64 and view.in_order
        for r in range(2): assert torch.equal(table[r, codes[r]], x[r]) and torch.equal(targets[r, codes[r]], y[r])
        assert torch.equal(view.label(pick), y)


def test_a_record_makes_it_again_and_what_was_not_said_is_as_it_was():
    for flip in "one", "all":
        stream = BitFlips(tasks=6, examples=40, seeds=[3, 5], flip=flip); record = json.loads(json.dumps(stream.record()))
        assert torch.equal(from_record(record, Bits(20))[4].train.rows, stream[4].train.rows)
        with pytest.raises(LopError, match="draws other numbers"): from_record(record | dict(fingerprint="0"), Bits(20))
        with pytest.raises(LopError, match="the data are 12 bits"): from_record(record, Bits(12))
    assert BitFlips(tasks=6, examples=40, seeds=[3, 5]).fingerprint() == "c7ce079c53b4da74"        # since before `flip` and `codes`


@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_a_study_of_bits_is_run_stopped_and_resumed(engine, tmp_path):
    "the same records and weights as without the stop; what it leaves can be loaded"
    if engine == "numba": pytest.importorskip("numba")
    words = ["stream=bit_flips", "stream.tasks=4", "stream.examples=300", "training=streaming", "training.replicas=2", f"training.engine={engine}", "optimizer=plain_sgd", "model.hidden_sizes=[5]",
             "intervention.arms=[backprop,continual_backprop]", "logging.figures=false", "logging.progress=false", "logging.checkpoint_seconds=0"]
    whole = run_study(compose(words, verify), tmp_path/"a")
    class Stop(Callback):
        def after_task(self, learner):
            if learner.at.task == 1: raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        make = experiments.make_callbacks
        m.setattr(experiments, "make_callbacks", lambda *a: [*make(*a), Stop()])
        with pytest.raises(KeyboardInterrupt): run_study(compose(words, verify), tmp_path/"b")
    run_study(compose([*words, "resume=true"], verify), tmp_path/"b"); a, b = load_run(whole), load_run(tmp_path/"b")
    by = ["run", "replica", "task", "layer", "split", "metric", "step"]
    assert a.records.sort_values(by).value.tolist() == b.records.sort_values(by).value.tolist() and {"online_loss", "test_loss", "dead_fraction"} <= set(a.records.metric)
    for arm in a.replicas:
        for k, p in a.replicas[arm].params.items(): assert torch.equal(p, b.replicas[arm].params[k])
    assert "online_loss" in at_a_glance(a.records)


@pytest.mark.parametrize("words, says", [(["stream=bit_flips", "dataset=digits"], "does not go with dataset=digits"), (["dataset=bits", "stream=chunks"], "does not go with dataset=bits"), (["dataset=bits", "dataset.val=.1"], "Unknown key 'dataset.val'"),
                                         (["dataset=bits", "model=cnn"], "use model=mlp"), (["dataset=bits", "training.early_stopping=2"], "needs a validation split"), (["dataset=bits", "passage=inputs"], "Choices: none."),
                                         (["dataset=bits", "metrics.probe_split=val"], "metrics.probe_split=val"), (["dataset=bits", "stream.slow=3"], "at most 16 of the 20 bits"), (["dataset=bits", "stream.flip=two"], "Choices: one, all"),
                                         (["dataset=bits", "dataset.num_classes=3"], "dataset=NAME"), (["stream.pool=all", "metrics.probe_split=test"], "stream.pool=all leaves no examples"),
                                         (["stream.examples=100", "passage=inputs"], "each task draws its own")])
def test_what_does_not_go_together_is_refused_before_anything_is_drawn(words, says):
    with pytest.raises(LopError, match=re.escape(says)): compose(words, verify)


def test_a_linear_learner_is_trained_and_has_no_units_to_measure():
    cfg = compose(["stream=bit_flips", "stream.tasks=2", "stream.examples=100", "training=streaming", "training.engine=torch", "model.hidden_sizes=[]", "intervention=backprop", "logging.progress=false"], verify)
    df = experiments.plan(cfg)[1][0].fit().records
    assert set(df.metric) == {"train_loss", "online_loss", "train_loss_summed", "test_loss"}
