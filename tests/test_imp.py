"Tickets: invariants at every step and after every interruption, and what happens when one is broken."
import copy
from functools import partial

import pytest
import torch

from lop_nb import imp, masks
from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.config import SGD, Adam, AdamW, RMSprop
from lop_nb.data import load
from lop_nb.imp import Rounds, Search, criteria, ladder
from lop_nb.interventions import ContinualBackprop
from lop_nb.learner import Callback, Evaluate, Learner, Online
from lop_nb.masks import Mask, broken, density
from lop_nb.models import CNN, MLP, ResNet, ViT
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator
from lop_nb.streams import PermutedPixels, Stages

data = load("digits", examples_per_class=20)
pictures = dict(in_channels=1, img_size=8, num_classes=10, dropout_p=0.)
nets = dict(mlp=partial(MLP, 64, 10, hidden_sizes=[16, 12], normalization="batch", dropout_p=0.), plain=partial(MLP, 64, 10, hidden_sizes=[16, 12], normalization="none", dropout_p=0.),
            cnn=partial(CNN, conv_channels=[6, 6], fc_hidden_units=[8], **pictures), resnet=partial(ResNet, layers=[1, 1], base_channels=4, **pictures), vit=partial(ViT, patch_size=4, embed_dim=8, depth=1, n_heads=2, **pictures))


def searching(make=nets["plain"], rounds=2, target=.3, spec=Adam(lr=3e-3), callbacks=(), seeds=(0, 1), epochs=1, stream=None, engine="auto", dtype=None, **kw):
    search = Search(target, rounds, **kw)
    return Learner(Replicas(make, seeds, dtype=dtype), stream or Stages(data, tasks=rounds + 1), spec, epochs, 16, [search, *callbacks], engine=engine, defaults=[Online(), Evaluate()]), search


def state_of(learner, search):
    return [*learner.replicas.params.values(), *learner.replicas.buffers.values(), *search.masks.values(), *search.start.values()]


@pytest.mark.parametrize("net", nets)
@pytest.mark.parametrize("criterion", criteria)
def test_invariants_at_each_step(net, criterion):
    learner, search = searching(nets[net], criterion=criterion, check="step")
    seen = []
    class Look(Callback):
        def before_task(self, l): seen.append({k: m.clone() for k, m in search.masks.items()})
    learner.callbacks.append(Look()); learner.fit()
    for r, m in enumerate(seen):
        for k, v in m.items():
            want = ladder(.3, 2)[r][0] * v[0].numel()
            assert (v.flatten(1).sum(1) - want).abs().max() <= 1, (r, k)
            if r: assert not (v & ~seen[r - 1][k]).any(), (r, k)
    assert learner.engine.name == "torch"


@pytest.mark.parametrize("spec", [Adam(lr=3e-3), Adam(lr=3e-3, implementation="fused"), AdamW(lr=3e-3), SGD(lr=.05), SGD(lr=.05, nesterov=True, weight_decay=.01), RMSprop(lr=1e-3)], ids=lambda s: f"{s.name}-{s.implementation}-{s.weight_decay}")
def test_every_optimizer_keeps_zeros(spec):
    learner, _ = searching(spec=spec, check="step", rewind="none")
    learner.fit()


def test_continual_backprop_revives_no_weight():
    learner, search = searching(callbacks=[ContinualBackprop(replacement_rate=.05, maturity_threshold=3)], check="step")
    learner.fit()
    assert sum(c.replaced[g] for c in learner.callbacks if isinstance(c, ContinualBackprop) for g in c.replaced) > 0


@pytest.mark.parametrize("spec", [Adam(lr=3e-3), SGD(lr=.05)], ids=["adam", "sgd"])
@pytest.mark.parametrize("frozen", [False, True], ids=["pruned", "frozen"])
def test_kernel_and_torch_find_the_same_ticket(spec, frozen):
    found = {}
    for engine in "torch", "numba":
        learner, search = searching(spec=spec, frozen=frozen, engine=engine, dtype=torch.float64, epochs=3)
        learner.fit(); found[engine] = learner, search
        assert not broken(learner.replicas.params, search.masks, learner.optimizer, search.held)
    (a, sa), (b, sb) = found.values()
    for k in sa.masks: assert torch.equal(sa.masks[k], sb.masks[k]), k
    for k, p in a.replicas.params.items(): assert (p - b.replicas.params[k]).abs().max() < 1e-11, k


def test_a_replica_alone_and_among_others():
    alone, among = searching(engine="numba", seeds=[1]), searching(engine="numba", seeds=[0, 1, 2])
    for learner, _ in (alone, among): learner.fit()
    for k, m in alone[1].masks.items(): assert torch.equal(m[0], among[1].masks[k][1]), k
    for k, p in alone[0].replicas.params.items(): assert torch.equal(p[0], among[0].replicas.params[k][1]), k


class Stop(Callback):
    order = 99
    def __init__(self, step): self.step = step
    def after_step(self, learner):
        if learner.at.step == self.step: learner.stopping = True


@pytest.mark.parametrize("how", [dict(), dict(criterion="gradient"), dict(step=5), dict(rewind="none"), dict(frozen=True), dict(scope="global")], ids=str)
def test_stopped_anywhere_and_gone_on_with(how, tmp_path):
    whole, search = searching(**how); whole.fit(); n = whole.at.step
    for step in (1, 3, n // 3, n // 3 + 1, n // 2, 2 * n // 3 + 1, n - 1):
        first, _ = searching(callbacks=[Checkpoint(tmp_path/f"{step}"), Stop(step)], **how)
        with pytest.raises(KeyboardInterrupt): first.fit()
        rest, again = searching(callbacks=[Checkpoint(tmp_path/f"{step}"), Stop(-1)], **how)
        rest.load_state_dict(load_checkpoint(tmp_path/f"{step}")); rest.fit()
        for a, b in zip(state_of(whole, search), state_of(rest, again)): assert torch.equal(a, b), step


def test_the_last_mask_is_trained_before_it_is_tested():
    learner, search = searching(epochs=10, target=.5)
    learner.fit(); rows = learner.records.query("metric in ('test_accuracy', 'density') and layer == ''").pivot_table(index="task", columns="metric", values="value")
    assert len(rows) == 3 and abs(rows.density[2] - density(search.masks).mean()) < 1e-12 and rows.test_accuracy[2] > .5      # an untrained mask has about .1


MUTANTS = {   # each takes away one line that an invariant stands on
    "gradients are not masked": dict(after_backward=lambda self, l: None, hold=lambda self, l, m: None),
    "weights are not zero at first": dict(hold=lambda self, l, m: None)}
UNWOUND = {
    "weights are not rewound": lambda self, l: None,
    "memory survives the rewinding": lambda self, l: [l.replicas.params[k].data.copy_(self.start[k]) for k in self.start]}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("check", ["step", "epoch"])
def test_broken_on_purpose(mutant, check, monkeypatch):
    for f, g in MUTANTS[mutant].items(): monkeypatch.setattr(Mask, f, g)
    with pytest.raises(LopError, match="does not hold"): searching(check=check)[0].fit()


@pytest.mark.parametrize("mutant", UNWOUND)
def test_rewinding_is_seen(mutant, monkeypatch):
    "what a round starts from is the snapshot, bit for bit, with an optimizer that remembers nothing; without the line that does it, it is not"
    def starts_as_it_should():
        learner, search = searching(); ok = []
        class Look(Callback):
            order = 98
            def before_task(self, l):
                if l.at.task: ok.append(all(torch.equal(p, search.start[k] * search.masks.get(k, 1)) for k, p in l.replicas.params.items()) and not any(l.optimizer.state.values()))
        learner.callbacks.append(Look()); learner.fit()
        return all(ok) and len(ok) == 2
    assert starts_as_it_should()
    with monkeypatch.context() as m:
        m.setattr(Search, "wind_back", UNWOUND[mutant])
        assert not starts_as_it_should()


def test_a_weight_that_comes_back_is_seen(monkeypatch):
    learner, _ = searching()
    monkeypatch.setattr(imp, "prune", lambda scores, density, scope, alive, graph: {k: torch.rand(m.shape, generator=generator(learner.at.task, k)) < .5 for k, m in alive.items()})
    with pytest.raises(LopError, match="came back"): learner.fit()


@pytest.mark.parametrize("words, says", [(dict(target=0.), "more than 0"), (dict(target=1.5), "at most 1"), (dict(rounds=0), "at least 1 round"), (dict(target=.001), "nothing of"), (dict(criterion="size"), "magnitude"),
                                         (dict(scope="layers"), "layer, global, unit"), (dict(rewind="w"), "weights, rate, none"), (dict(scope="global", head=.5), "layer by layer")])
def test_refused(words, says):
    with pytest.raises(LopError, match=says): searching(**words)[0].fit()


def test_a_mask_of_another_network_changes_nothing():
    _, search = searching(); learner, found = searching(); learner.fit()
    other = Replicas(nets["mlp"], (0, 1)); other_params = {k: p.detach().clone() for k, p in other.params.items()}
    narrow = {k: m[:, :-1] for k, m in found.masks.items()}
    with pytest.raises(LopError, match="another architecture"): Learner(other, Stages(data, tasks=1), callbacks=[Mask(narrow)], defaults=[]).fit()
    for k, p in other.params.items(): assert torch.equal(p, other_params[k])


def test_rounds_are_one_task():
    stream = PermutedPixels(data, tasks=4, seeds=[3, 3])
    rounds = Rounds(stream, 2, 5)
    pick = torch.arange(7).expand(2, -1)
    for k in range(5): assert torch.equal(rounds[k].train.fetch(pick)[0], stream[2].train.fetch(pick)[0])
    assert copy.copy(rounds).record()["of"] == stream.record() and masks.density(masks.full({"w": torch.zeros(2, 3)}, ["w"])).tolist() == [1, 1]
