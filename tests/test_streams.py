"Streams are permutations, partitions and labels as promised, the same for a seed whoever its neighbours are."
import torch
import torch.nn.functional as F
import pytest
from hypothesis import given, settings, strategies as st

from lop_nb.data import load
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels, RandomLabels, from_record, mask_logits, masked_cross_entropy, split_sizes

DATA = load("digits")
KINDS = [lambda **kw: PermutedPixels(DATA, tasks=4, **kw), lambda **kw: ClassSplit(DATA, tasks=4, classes_per_task=2, **kw), lambda **kw: RandomLabels(DATA, tasks=4, **kw)]
seeds = st.lists(st.integers(0, 2**31), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seeds=seeds, k=st.integers(0, 3))
def test_a_replica_has_the_tasks_of_its_seed(kind, seeds, k):
    together = kind(seeds=seeds)[k]
    pick = torch.arange(50).expand(len(seeds), -1)
    x, y = together.train.fetch(pick)
    for r, s in enumerate(seeds):
        alone = kind(seeds=[s])[k]
        assert alone.train.n == together.train.n
        xr, yr = alone.train.fetch(pick[:1])
        assert torch.equal(xr[0], x[r]) and torch.equal(yr[0], y[r]) and torch.equal(alone.classes[0], together.classes[r])


@pytest.mark.parametrize("kind", KINDS)
def test_fetch_equals_looking_at_one_example_at_a_time(kind):
    stream = kind(seeds=[3, 4]); task = stream[2]
    for view in filter(None, (task.train, task.val, task.test)):
        pick = torch.randint(view.n, (2, 20), generator=torch.Generator().manual_seed(0))
        x, y = view.fetch(pick)
        for r in range(2):
            for b in range(20):
                row = view.rows[r, pick[r, b]]
                if row < 0: continue
                pixels = view.split.x[row].flatten()
                if view.pixels is not None: pixels = pixels[view.pixels[r]]
                assert torch.equal(x[r, b].flatten(), DATA.scale(pixels.view(1, 8, 8), stream.normalize).flatten())
                assert y[r, b] == (view.split.y[row] if view.labels is None else view.labels[r, row])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), k=st.integers(0, 1000))
def test_a_permutation_is_one_and_is_shared_by_the_splits(seed, k):
    task = PermutedPixels(DATA, tasks=1001, seeds=[seed])[k]
    assert torch.equal(task.train.pixels[0].sort()[0], torch.arange(64))
    assert torch.equal(task.train.pixels, task.test.pixels) and torch.equal(task.train.pixels, task.val.pixels)


def test_colours_move_together():
    from dataclasses import replace
    colour = lambda s: replace(s, x=s.x.expand(-1, 3, -1, -1) + torch.tensor([0, 1, 2], dtype=torch.uint8).view(3, 1, 1))
    data = replace(DATA, train=colour(DATA.train), val=colour(DATA.val), test=colour(DATA.test), mean=[0.]*3, std=[1.]*3)
    x, _ = PermutedPixels(data, tasks=1, normalize="raw255")[0].train.fetch(torch.arange(5)[None])
    difference = (x[0, :, 1] - x[0, :, 0]) % 256
    assert (difference == 1).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), per=st.integers(1, 10))
def test_a_class_split_is_a_partition(seed, per):
    stream = ClassSplit(DATA, tasks=None, classes_per_task=per, seeds=[seed])
    drawn = [c for k in range(len(stream)) for c in stream._draw(seed, k).tolist()]
    assert sorted(drawn) == list(range(10)) and len(stream) == -(-10 // per)
    for task in stream:
        _, y = task.train.fetch(torch.arange(task.train.n)[None])
        counts = y[0].bincount(minlength=10)
        assert torch.equal(counts > 0, task.classes[0]) and counts[counts > 0].unique().numel() == 1
        valid = task.test.rows[0][task.test.valid[0]]
        assert torch.equal(valid.sort()[0], torch.isin(DATA.test.y, task.classes[0].nonzero()[:, 0]).nonzero()[:, 0])


@settings(max_examples=30, deadline=None)
@given(tasks=st.integers(1, 12) | st.none(), per=st.integers(1, 12) | st.none())
def test_split_sizes_are_legal_or_refused(tasks, per):
    try: n, k = split_sizes(10, tasks, per)
    except LopError: assert (per or 0) > 10 or (tasks and (tasks - 1) * (per or -(-10 // tasks)) >= 10); return
    assert n == (tasks or -(-10 // k)) and k == (per or -(-10 // (tasks or 1))) and (n - 1) * k < 10


@settings(max_examples=30, deadline=None)
@given(active=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), seed=st.integers(0, 1000))
def test_the_masked_loss_is_that_of_the_sliced_logits(active, seed):
    g = torch.Generator().manual_seed(seed); classes = torch.tensor([active]); ids = classes[0].nonzero()[:, 0]
    z = torch.randn(1, 8, 6, dtype=torch.float64, generator=g, requires_grad=True); where = torch.randint(len(ids), (8,), generator=g)
    masked_cross_entropy(z, ids[where][None], classes).sum().backward()
    sliced = z.detach()[0][:, ids].requires_grad_(); F.cross_entropy(sliced, where, reduction="sum").backward()
    assert (z.grad[0][:, ids] - sliced.grad).abs().max() < 1e-12 and (z.grad[0][:, ~classes[0]] == 0).all()
    assert classes[0][mask_logits(z, classes).argmax(-1)].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_makes_the_stream_again(kind):
    import json
    stream = kind(seeds=[5, 6]); again = from_record(json.loads(json.dumps(stream.record())), DATA)
    assert again.record() == stream.record()
    assert kind(seeds=[5, 7]).record()["fingerprint"] != stream.record()["fingerprint"]


@pytest.mark.parametrize("make, says", [
    (lambda: ClassSplit(DATA, tasks=6, classes_per_task=2), "At most 5 tasks"), (lambda: ClassSplit(DATA, tasks=1, classes_per_task=11), "10"),
    (lambda: ClassSplit(DATA, partitions=[[0], []]), "no class"), (lambda: ClassSplit(DATA, partitions=[[10]]), "unknown"),
    (lambda: RandomLabels(DATA, examples=10**6), "1293"), (lambda: PermutedPixels(DATA, tasks=0), "at least 1")])
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(LopError, match=says): make()
