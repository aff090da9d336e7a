"What the two sources say of their data, row by row."
import shutil
import socket
from pathlib import Path

import pytest
import torch
from test_data import HERE, each, make_archive, needs, own_cache  # noqa: F401
from torchvision.datasets import ImageFolder

from lop_nb import data as module
from lop_nb.augment import ColorJitter, Flip, PaddedCrop, Rotation, recipe
from lop_nb.compose import compose
from lop_nb.data import Source, fetch, load, sources, status, stratified, tiny_base
from lop_nb.runtime import LopError, generator

every = each("mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kw): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse); monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tiny_mock(tmp_path, monkeypatch):
    "An archive of 200 classes with one training and one validation picture each, in place of the download"
    archive, root = tmp_path/"mock.zip", tmp_path/"root"; wnids = make_archive(archive, classes=200, train=1, val=1)
    monkeypatch.setattr(module, "download_url", lambda url, root, filename, md5: (Path(root).mkdir(exist_ok=True), shutil.copy(archive, Path(root)/filename)))
    monkeypatch.setattr(module, "tiny_whole", dict(classes=200, train=1, val=1))
    return root, wnids


@pytest.mark.parametrize("name, input_size, side, colours, classes", [
    pytest.param("mnist", 784, 28, 1, 10, marks=needs("mnist")), pytest.param("cifar10", 3072, 32, 3, 10, marks=needs("cifar10")), pytest.param("cifar100", 3072, 32, 3, 100, marks=needs("cifar100"))])
def test_A21_sizes(name, input_size, side, colours, classes):
    "What is loaded has the inputs, the side, the colours and the classes that the sources list for it."
    data = load(name, HERE)
    assert (data.input_size, data.shape, data.num_classes) == (input_size, (colours, side, side), classes)
    assert {int(c) for s in (data.train, data.val, data.test) for c in s.y.unique()} == set(range(classes))


def test_A21_sizes_of_tiny_imagenet(tiny_mock):
    "Tiny ImageNet has 12288 inputs, 64 pixels a side, 3 colours and 200 classes."
    root, _ = tiny_mock; fetch("tiny_imagenet", root); data = load("tiny_imagenet", root)
    assert (data.input_size, data.shape, data.num_classes) == (12288, (3, 64, 64), 200)


def test_A22_constants():
    "Each data set has the normalisation constants of the sources; one that isn't known gets a half."
    want = dict(mnist=([.1307], [.3081]), cifar10=([.4914, .4822, .4465], [.2023, .1994, .2010]), cifar100=([.5071, .4867, .4408], [.2675, .2565, .2761]), tiny_imagenet=([.485, .456, .406], [.229, .224, .225]))
    for name, (mean, std) in want.items(): assert (sources[name].mean, sources[name].std) == (mean, std)
    unknown = Source(None, None, None, "", ""); assert (unknown.mean, unknown.std) == ([.5], [.5])


@every
def test_A22_first_batch(name):
    "The first shuffled batch of 500, normalised as by default, has a mean within 0.1 of 0 in each colour."
    data = load(name, HERE); assert compose([f"dataset={name}"]).dataset.normalize == "standardize"
    x = data.scale(data.train.x[torch.randperm(len(data.train), generator=generator(0, "order"))[:500]])
    assert (x.mean((0, 2, 3)).abs() < .1).all()


def test_A23_settings():
    "The augmentations have the sizes of the sources."
    assert recipe("mnist").transforms == (Rotation(10),)
    assert recipe("cifar10").transforms == recipe("cifar100").transforms == (PaddedCrop(4), Flip(.5))
    assert recipe("tiny_imagenet").transforms == (PaddedCrop(8), Flip(.5), ColorJitter(.1, .1, .1))


@every
def test_A23_two_fetches(name):
    "One picture fetched several times differs with augmentation, and never without."
    x = load(name, HERE).train.x[torch.zeros(12, dtype=torch.long)]; augment = recipe(name); gen = generator(0, "augment")
    assert len(augment(x, augment.draw(12, gen)).flatten(1).unique(dim=0)) > 6
    assert len(x.flatten(1).unique(dim=0)) == 1 and compose(["training.no_augment=true"]).training.no_augment


@each("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
def test_A24_offline_with_a_true_validation_split(name, offline):
    "With the data there nothing asks the network; validation examples are some of the training ones and are no longer trained on; the test split stays whole."
    data, whole = load(name, HERE), load(name, HERE, val=0.); fetch(name, HERE)
    kept = stratified(whole.train.y, .1, 0)
    assert torch.equal(data.val.x, whole.train.x[kept]) and torch.equal(data.train.x, whole.train.x[~kept])
    assert len(data.train) + len(data.val) == len(whole.train) and abs(len(data.val) - len(whole.train)/10) < 1
    share = data.val.y.bincount() / whole.train.y.bincount(); assert ((share - .1).abs() < 1 / whole.train.y.bincount()).all()
    assert len(whole.val) == 0 and torch.equal(data.test.x, whole.test.x) and torch.equal(data.test.y, whole.test.y)


def test_A25_tiny_imagenet_from_a_mock(tiny_mock):
    "The archive becomes 200 folders of training and 200 of validation pictures with one map from classes to labels, and is deleted; verifying finds it whole."
    root, wnids = tiny_mock
    assert status(root)[-1]["state"] == "missing"
    fetch("tiny_imagenet", root)
    train, val = (ImageFolder(tiny_base(root)/s) for s in ("train", "val"))
    assert len(train.classes) == len(val.classes) == 200 and train.class_to_idx == val.class_to_idx == {w: i for i, w in enumerate(wnids)}
    assert [p.name for p in root.iterdir()] == ["tiny-imagenet-200"] and status(root)[-1]["state"] == "ready"
    data = load("tiny_imagenet", root, val=0.)
    assert data.train.y.tolist() == train.targets and data.test.y.tolist() == val.targets == list(range(200))


@needs("mnist")
def test_B9_pixels_as_they_are_or_normalised():
    "Pixels become numbers as the code that declares .1307 and .3081 really does it (0 to 255), as 0 to 1, or with those two constants: an option says which."
    data = load("mnist", HERE); x = data.test.x[:500]
    assert torch.equal(data.scale(x, "raw255"), x.float()) and data.scale(x, "raw255").max() == 255
    assert torch.equal(data.scale(x, "unit"), x.float() / 255)
    assert (data.scale(x, "standardize").double() - (x.double()/255 - .1307)/.3081).abs().max() < 1e-6
    for how in ("raw255", "unit", "standardize"): assert compose([f"dataset.normalize={how}"]).dataset.normalize == how
    with pytest.raises(LopError, match="raw255, unit, symmetric, standardize"): data.scale(x, "none")
