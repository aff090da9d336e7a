"Slowly-changing regression: one flip between two tasks and nothing else, a target that is the formula's, and a task that learners, evaluations and rollouts take."
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lop_nb.bitflips import LTU, Bits, BitFlips
from lop_nb.chains import MLP
from lop_nb.config import SGD
from lop_nb.learner import Learner, Online, Evaluate, evaluate
from lop_nb.models import make_model
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError

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
    for name in ("relu", "tanh", "sigmoid", "leaky_relu", "elu"):
        m = make_model(dict(name="mlp", hidden_sizes=[5], activation=name, normalization="none"), Bits(20))
        assert m(torch.zeros(2, 20)).shape == (2, 1)
