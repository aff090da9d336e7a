"A run stopped at any step, and taken up by a new learner from its checkpoint, is the run that was never stopped."
from functools import partial

import pandas as pd
import pytest
import torch

from lop_nb.augment import Augment, PaddedCrop, Rotation
from lop_nb.config import Adam, NoisySGD
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop, L2Init
from lop_nb.checkpoints import Checkpoint, EarlyStopping, load_checkpoint
from lop_nb.learner import Callback, Evaluate, Learner, Online
from lop_nb.models import MLP
from lop_nb.monitor import Monitor
from lop_nb.records import Records
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels, Passage

DATA = load("digits")
BATCHES = -(-len(DATA.train) // 32)   # of an epoch; an epoch's last step, the first of the next, and those of a task are where mistakes would be
ARMS = dict(backprop=lambda: [], cbp=lambda: [ContinualBackprop(.01, 10)], l2_init=lambda: [L2Init()], all_at_once=lambda: [])   # the last: all that draws and resets


class Stop(Callback):
    def __init__(self, step=None): self.step = step
    def after_step(self, learner): learner.stopping = learner.stopping or learner.at.step == self.step


def learner(arm, folder, step=None, resume_at=None, seeds=(0, 1), **optimizer):
    nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[12, 8], dropout_p=.1), seeds)
    spec, stream, more = Adam(lr=.01, **optimizer), PermutedPixels(DATA, tasks=3), {}
    if arm == "all_at_once": spec, stream, more = NoisySGD(), Passage(stream, "inputs"), dict(augment=Augment(Rotation(30), PaddedCrop(1)), head_reset="reinit")
    callbacks = [Online(), Evaluate(), Monitor(["dead_fraction", "effective_rank"]), *ARMS[arm](), Stop(step), Checkpoint(folder/"checkpoints", 1e9)]
    return Learner(nets, stream, spec, epochs=2, callbacks=callbacks, store=Records(folder/"records", resume_at=resume_at), defaults=(), **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {arm: learner(arm, tmp_path_factory.mktemp(arm)).fit() for arm in ARMS}


@pytest.mark.parametrize("step", [1, 33, BATCHES - 1, BATCHES, BATCHES + 1, 2*BATCHES, 2*BATCHES + 1, 6*BATCHES - 1, 6*BATCHES])
@pytest.mark.parametrize("arm", ARMS)
def test_stopped_anywhere(arm, step, tmp_path, whole):
    first = learner(arm, tmp_path, step)
    with pytest.raises(KeyboardInterrupt): first.fit()
    assert first.at.step == step
    first.store.close()
    state = load_checkpoint(tmp_path/"checkpoints")
    second = learner(arm, tmp_path, resume_at=state["rows"]); second.load_state_dict(state); second.fit()
    for k, p in (second.replicas.params | second.replicas.buffers).items():
        assert torch.equal(p, (whole[arm].replicas.params | whole[arm].replicas.buffers)[k]), k
    pd.testing.assert_frame_equal(second.records, whole[arm].records, check_exact=True)


def test_a_fresh_optimizer_for_each_task(tmp_path):
    run = learner("backprop", tmp_path, reinit_optimizer=True).fit()
    steps = {int(s["step"]) for s in run.optimizer.state.values()}
    assert steps == {2 * BATCHES}


def test_a_replica_alone_draws_what_it_draws_among_others(tmp_path, whole):
    "noise, dropout, augmentation, passages and new heads: all of it is the replica's own"
    alone = learner("all_at_once", tmp_path, seeds=[1]).fit()
    for k, p in (alone.replicas.params | alone.replicas.buffers).items(): assert torch.equal(p[0], (whole["all_at_once"].replicas.params | whole["all_at_once"].replicas.buffers)[k][1]), k


def test_augmentation_does_not_depend_on_how_batches_are_fetched(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("lop_nb.learner.chunk_bytes", 1)      # one batch at a time
    other = learner("all_at_once", tmp_path).fit()
    for k, p in other.replicas.params.items(): assert torch.equal(p, whole["all_at_once"].replicas.params[k]), k


@pytest.mark.parametrize("step", [BATCHES - 1, BATCHES, 3*BATCHES, 5*BATCHES + 7])
def test_early_stopping_can_be_taken_up(step, tmp_path):
    def early(stop):
        nets = Replicas(partial(MLP, 64, 10, hidden_sizes=[12], dropout_p=.2), [0, 1])
        return Learner(nets, PermutedPixels(DATA, tasks=2), Adam(lr=.05), epochs=6, callbacks=[EarlyStopping(1), Stop(stop), Checkpoint(tmp_path, 1e9)])
    whole = early(None).fit()
    with pytest.raises(KeyboardInterrupt): early(step).fit()
    state = [torch.load(f, weights_only=True) for f in sorted(tmp_path.glob("*.pt")) if int(f.stem) == step][0]
    second = early(None); second.load_state_dict(state); second.fit()
    for k, p in second.replicas.params.items(): assert torch.equal(p, whole.replicas.params[k]), k
    assert whole.records.query("metric == 'val_loss'").groupby(["task", "seed"]).epoch.max().min() < 6, "nothing was stopped early"
