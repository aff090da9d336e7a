"The rows of the sources' feature table that speak of tasks: each test says in our words what its row asks for."
import json
import os

import pytest
import torch
import torch.nn.functional as F

from lop_nb.data import Dataset, Split, load
from lop_nb.runtime import LopError
from lop_nb.streams import ClassSplit, PermutedPixels, check_stream, from_record, masked_cross_entropy

DIGITS = load("digits")


def there(name):
    "the data set, or a skip with the reason"
    try: return load(name, val=0.)
    except LopError as e: pytest.skip(str(e).splitlines()[0])


def test_A9_partitions_by_hand():
    "[[0,1],[2,3],[4,5,6],[7,8,9]] are four tasks of 2, 2, 3 and 3 classes, those and in that order, in every replica, with the rows of just these classes"
    wanted = [[0, 1], [2, 3], [4, 5, 6], [7, 8, 9]]
    stream = ClassSplit(DIGITS, partitions=wanted, seeds=[42, 7])
    assert len(stream) == 4
    for classes, task in zip(wanted, stream):
        for r in range(2):
            assert task.classes[r].nonzero()[:, 0].tolist() == classes
            for view in (task.train, task.val, task.test): assert view.split.y[view.rows[r][view.valid[r]]].unique().tolist() == classes


@pytest.mark.parametrize("tasks, per, shapes", [(5, 2, [2]*5), (None, 3, [3, 3, 3, 1]), (4, None, [3, 3, 3, 1]), (None, None, [10]), (3, 2, [2]*3)])
def test_A35_classes_are_shuffled_by_the_seed_and_cut(tasks, per, shapes):
    "seed 42 puts ten classes in the order 7 3 2 8 5 6 9 4 0 1, cut one task after the other; what is left open is ⌈C / other⌉, with neither one task of all"
    stream = ClassSplit(DIGITS, tasks=tasks, classes_per_task=per, seeds=[42])
    order, parts = iter([7, 3, 2, 8, 5, 6, 9, 4, 0, 1]), [stream._draw(42, k).tolist() for k in range(len(stream))]
    assert parts == [[next(order) for _ in range(n)] for n in shapes]
    assert [t.classes[0].nonzero()[:, 0].tolist() for t in stream] == [sorted(p) for p in parts]


@pytest.mark.parametrize("settings", [dict(tasks=6, classes_per_task=2), dict(tasks=11, classes_per_task=None), dict(tasks=2, classes_per_task=10)])
def test_A35_too_many_tasks_are_refused_in_words(settings):
    "more tasks than there are classes for: the message names the setting, the classes that there are and how many tasks would do"
    with pytest.raises(LopError, match=rf"stream\.tasks={settings['tasks']}: .*10 classes that there are. At most \d+ tasks"): ClassSplit(DIGITS, **settings)
    with pytest.raises(LopError, match="At most"): check_stream("class_split", settings, 10)


def test_A42_the_loss_is_over_the_active_classes():
    "cross-entropy over a task's classes is cross-entropy of the logits sliced to them, and inactive rows of the head have a gradient of exactly 0"
    stream = ClassSplit(DIGITS, seeds=[42, 1]); task = stream[1]
    x, y = task.train.fetch(torch.arange(32).expand(2, -1))
    head = torch.randn(2, 64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = x.flatten(2).double() @ head
    loss = task.loss(z, y); loss.sum().backward()
    for r in range(2):
        ids = task.classes[r].nonzero()[:, 0]
        assert (loss[r] - F.cross_entropy(z[r][:, ids], torch.searchsorted(ids, y[r]), reduction="none")).abs().max() < 1e-12
        assert (head.grad[r][:, ~task.classes[r]] == 0).all() and (head.grad[r][:, ids] != 0).any()
    assert torch.equal(loss, masked_cross_entropy(z, y, task.classes))


def is_permuted(data, seeds=(0, 1), tasks=3):
    "every task, the first too, is all examples with their places shuffled by its own permutation, shared by the splits, and the record makes it again"
    stream = PermutedPixels(data, tasks=tasks, seeds=seeds, normalize="raw255")
    again = from_record(json.loads(json.dumps(stream.record())), data); C, H, W = data.shape; seen = []
    for task, other in zip(stream, again):
        assert task.train.n == len(data.train) and task.test.n == len(data.test)
        for view, same in (task.train, other.train), (task.test, other.test):
            pick = torch.arange(min(view.n, 50)).expand(len(seeds), -1); (x, y), (x2, y2) = view.fetch(pick), same.fetch(pick)
            assert torch.equal(x, x2) and torch.equal(y, y2)
            for r in range(len(seeds)):
                assert torch.equal(view.pixels[r].sort()[0], torch.arange(H*W)) and torch.equal(view.pixels, task.train.pixels)
                assert torch.equal(x[r].flatten(2), view.split.x[pick[r]].float().flatten(2)[..., view.pixels[r]]) and torch.equal(y[r], view.split.y[pick[r]])
                seen.append(tuple(task.train.pixels[r].tolist()))
    assert len(set(seen)) == tasks * len(seeds) and tuple(range(H*W)) not in seen


@pytest.mark.skipif(not os.environ.get("LOP_DATA"), reason="LOP_DATA is not set")
def test_B8_permuted_mnist():
    "each task shuffles the 784 pixels of all 60,000 + 10,000 pictures by one uniform permutation, task 0 too; the record gives back the same data for all tasks"
    data = there("mnist")
    assert (len(data.train), len(data.test), data.input_size) == (60_000, 10_000, 784)
    is_permuted(data)


def test_B8_is_the_same_with_the_embedded_data():
    "permuted pixels on the digits: the first task is shuffled too, and the record gives back the same data for all tasks"
    is_permuted(DIGITS, tasks=6)


def test_B36_permuted_colour_pictures():
    "pictures of CIFAR's shape: a pixel moves with its three colours, the same way in all pictures of a task"
    g = torch.Generator().manual_seed(0)
    some = lambda n: Split(torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(n) % 10)
    data = Dataset("colour", some(100), some(20), some(60), [str(i) for i in range(10)], [.5]*3, [.25]*3, "", "", "c0")
    is_permuted(data)


@pytest.mark.skipif(not os.environ.get("LOP_DATA"), reason="LOP_DATA is not set")
def test_B36_permuted_cifar10():
    "the permuted CIFAR-10 stream is there"
    data = there("cifar10")
    assert data.shape == (3, 32, 32)
    is_permuted(data)
