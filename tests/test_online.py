"Online loss and accuracy in bins of examples against plain lists, wherever blocks and runs are cut; and a dead learner is seen to be dead."
from functools import partial

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lop_nb.bitflips import BitFlips
from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.compose import compose
from lop_nb.config import SGD
from lop_nb.data import load
from lop_nb.experiments import load_run, run_study
from lop_nb.learner import Callback, Learner, Online, full_bins
from lop_nb.models import MLP
from lop_nb.monitor import Monitor
from lop_nb.records import Records
from lop_nb.replicas import Replicas
from lop_nb.streams import ClassSplit, PermutedPixels

DATA = load("digits")


class Keep(Callback):
    "Every loss and hit, in order, and where batches ended"
    def __init__(self): self.rows, self.ends, self.hits = [[], []], [], [[], []]
    def after_step(self, learner):
        self.ends.append(learner.at.examples)
        correct = learner.task.correct(learner.logits, learner.y) if learner.task.classes is not None else learner.y
        for r in range(2): self.rows[r] += learner.losses[r].tolist(); self.hits[r] += correct[r].tolist()


def run(stream, bin, batch_size, *callbacks, store=None, epochs=2, sizes=(12,), optimizer=SGD(lr=.01)):
    data = stream.data
    nets = Replicas(partial(MLP, data.input_size, stream.num_classes, hidden_sizes=list(sizes), normalization="none", dropout_p=0.), [0, 1])
    return Learner(nets, stream, optimizer, epochs=epochs, batch_size=batch_size, callbacks=[Online(bin), *callbacks], store=store, defaults=())


@pytest.mark.parametrize("bin, batch_size", [(50, 32), (7, 32), (1, 500), (1000, 1), (4000, 32), (10**6, 32)])
def test_bins_equal_plain_lists(bin, batch_size):
    "bins go on from epoch to epoch and task to task; each stands at its last example and the step that learnt from it"
    keep = Keep(); df = run(PermutedPixels(DATA, tasks=2), bin, batch_size, keep, epochs=1 if batch_size == 1 else 2).fit().records
    for metric, values in dict(binned_loss=keep.rows, binned_accuracy=keep.hits).items():
        for r in range(2):
            rows, n = df[(df.metric == metric) & (df.replica == r)], len(values[r]) // bin
            assert rows.examples.tolist() == [bin * (i + 1) for i in range(n)] and set(rows.split) <= {"train"}
            assert rows.value.tolist() == pytest.approx([sum(values[r][bin*i:bin*(i + 1)]) / bin for i in range(n)], rel=1e-6)
            assert rows.step.tolist() == [next(i for i, end in enumerate(keep.ends, 1) if end >= e) for e in rows.examples]
            per_task = len(values[r]) // 2
            assert rows.task.tolist() == [(e - 1) // per_task for e in rows.examples]


def test_bins_where_the_last_batch_is_larger():
    "n = kB + 1: the last batch has one more"
    from lop_nb.learner import cuts
    n = DATA.train.n if hasattr(DATA.train, "n") else len(DATA.train)
    B = next(b for b in range(20, 200) if n % b == 1); assert cuts(n, B)[-1] == B + 1
    keep = Keep(); df = run(PermutedPixels(DATA, tasks=1), 10, B, keep, epochs=1).fit().records.query("metric == 'binned_loss' and replica == 0")
    assert df.step.tolist() == [next(i for i, end in enumerate(keep.ends, 1) if end >= e) for e in df.examples] and df.step.max() <= n // B


def test_bins_of_a_regression_and_of_some_classes():
    keep = Keep(); df = run(BitFlips(tasks=3, examples=500, bits=8, slow=5, seeds=[0, 1]), 200, 1, keep, epochs=1).fit().records
    assert df[df.metric == "binned_loss"].groupby("replica").value.apply(list)[1] == pytest.approx([sum(keep.rows[1][200*i:200*(i + 1)]) / 200 for i in range(7)], rel=1e-6)
    assert not (df.metric == "binned_accuracy").any()
    df = run(ClassSplit(DATA, tasks=2, classes_per_task=2), 20, 32).fit().records
    assert (df[df.metric == "binned_accuracy_all"].value.to_numpy() <= df[df.metric == "binned_accuracy"].value.to_numpy()).all() and (df.metric == "binned_accuracy_all").sum() > 20


class Stop(Callback):
    def __init__(self, step=None): self.step = step
    def after_step(self, learner): learner.stopping = learner.stopping or learner.at.step == self.step


@pytest.mark.parametrize("chunk", [1, 2**9, 2**21])
@pytest.mark.parametrize("batch_size, step", [(32, 1), (32, 41), (32, 60), (1, 777)])
def test_stopped_anywhere_and_blocks_cut_anyhow(batch_size, step, chunk, tmp_path, monkeypatch):
    "to the last bit"
    def one(folder, stop=None, resume_at=None):
        return run(PermutedPixels(DATA, tasks=2 if batch_size > 1 else 1), 90, batch_size, Stop(stop), Checkpoint(folder/"checkpoints", 1e9), store=Records(folder/"records", resume_at=resume_at), epochs=1, sizes=[4])
    whole = one(tmp_path/"whole").fit().records
    monkeypatch.setattr("lop_nb.learner.chunk_bytes", chunk)
    first = one(tmp_path/"cut", step)
    with pytest.raises(KeyboardInterrupt): first.fit()
    first.store.close(); state = load_checkpoint(tmp_path/"cut"/"checkpoints")
    second = one(tmp_path/"cut", resume_at=state["rows"]); second.load_state_dict(state); second.fit()
    by = ["metric", "replica", "examples"]
    pd.testing.assert_frame_equal(*(d.sort_values(by).reset_index(drop=True) for d in (second.records, whole)), check_exact=True)
    assert (whole.metric == "binned_loss").sum() == 2 * (len(DATA.train) * (2 if batch_size > 1 else 1) // 90)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.lists(st.integers(1, 59), max_size=6, unique=True), st.integers(0, 99))
def test_full_bins(n, size, cuts, seed):
    v = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64); ends = [*sorted(c for c in cuts if c < n), n]
    opened, found, at = torch.zeros(2, dtype=torch.float64), [], 0
    for end in ends: full, opened = full_bins(v[:, at:end], opened, at % size, size); found.append(full); at = end
    want = []
    for r in range(2):
        sums = [0.]
        for i, x in enumerate(v[r].tolist(), 1):
            sums[-1] += x
            if i % size == 0: sums.append(0.)
        want.append(sums)
    assert torch.cat([*found, opened[:, None]], 1).tolist() == want


def test_bins_from_the_command_line(tmp_path):
    "and there is one figure of bins, none of those at the tasks' ends"
    cfg = compose(["metrics.bin=500", "intervention=backprop", "stream.tasks=2", "training.epochs=1", "training.replicas=1", "logging.progress=false", "metrics.names=[dead_fraction]"])
    run = load_run(run_study(cfg, tmp_path/"run"))
    assert run.records.query("metric == 'binned_accuracy'").examples.tolist() == [500, 1000, 1500, 2000, 2500]
    assert {p.name for p in (tmp_path/"run"/"figures").glob("binned_*")} == {"binned_error.png", "binned_error.csv"}


def test_A78_a_dead_learner_is_reported_dead():
    "DA34: units are measured behind the activation, so all are dead when each ReLU is silent; before it they would look alive"
    stream = BitFlips(tasks=2, examples=300, bits=8, slow=5, seeds=[0, 1])
    class Kill(Callback):
        order = -1
        @torch.no_grad()
        def before_task(self, learner): learner.replicas.params["linear_0.bias"][1] = -100.
    learner = run(stream, 100, 1, Kill(), Monitor(["dead_fraction"], probe_size=None), epochs=1, sizes=[5], optimizer=SGD(lr=.01, momentum=0.)).fit()
    dead = learner.records.query("metric == 'dead_fraction'").groupby("replica").value.apply(list)
    assert dead[1] == [1., 1.] and max(dead[0]) < 1
    x = stream.seeded([0, 1])[1].train.fetch(torch.arange(128).expand(2, -1))[0]
    before = torch.einsum("rni,roi->rno", x.flatten(2), learner.replicas.params["linear_0.weight"]) + learner.replicas.params["linear_0.bias"][:, None]
    assert (before[1].abs() > 1e-7).all() and before[1].std(0).min() > 0      # what source A looks at


def test_A82_comparison_plots(tmp_path):
    "Per task: online accuracy, mean |w|, dead units and effective rank, backprop against continual backprop; saved with their numbers"
    cfg = compose(["intervention.arms=[backprop,continual_backprop]", "metrics.names=[weight_magnitude,dead_fraction,effective_rank]", "metrics.bin=500", "stream.tasks=2", "training.epochs=1",
                   "training.replicas=2", "logging.progress=false"])
    folder = run_study(cfg, tmp_path/"run"); run = load_run(folder)
    numbers = pd.read_csv(folder/"figures"/"comparison.csv")
    assert (folder/"figures"/"comparison.png").stat().st_size > 5000 and (folder/"figures"/"binned_error.png").exists()
    assert set(numbers.metric) == {"online_accuracy", "weight_magnitude", "dead_fraction", "effective_rank"} and set(numbers.run) == {"backprop", "continual_backprop"} and set(numbers.task) == {0, 1}
    w = run.replicas["backprop"].params; want = [torch.stack([w[f"linear_{l}.weight"][r].abs().mean() for l in range(3)]).mean().item() for r in range(2)]
    assert numbers.query("run == 'backprop' and metric == 'weight_magnitude' and task == 1")["mean"].item() == pytest.approx(sum(want) / 2, rel=1e-5)
