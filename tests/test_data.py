"Splits, and files that are missing, damaged, cut short or in a place that can't be written."
import gzip
import os
import shutil

import pytest
import torch
from torchvision.datasets import MNIST

from lop_nb.data import fetch, load, mnist_files, sources, status, stratified, verify
from lop_nb.runtime import LopError

HERE = os.environ.get("LOP_DATA")
needs_mnist = pytest.mark.skipif(not HERE or not all(f.is_file() for f in mnist_files(HERE)), reason="LOP_DATA has no MNIST")


@pytest.fixture
def copy(tmp_path):
    "A root of its own with the real files"
    for f in mnist_files(HERE):
        to = tmp_path/f.relative_to(HERE); to.parent.mkdir(parents=True, exist_ok=True); shutil.copy(f, to)
    return tmp_path


@pytest.mark.parametrize("share", [0., .1, .37, .5])
def test_stratified_takes_the_share_to_within_one_example(share):
    y = torch.randint(7, (1000,), generator=torch.Generator().manual_seed(0))
    chosen = stratified(y, share, 3)
    assert chosen.sum() == round(share * 1000)
    assert ((y[chosen].bincount(minlength=7) - share * y.bincount()).abs() < 1).all()


def test_splits_share_no_picture_and_do_not_depend_on_the_caller():
    torch.manual_seed(1); a = load("digits"); torch.manual_seed(2); b = load("digits")
    assert all(torch.equal(getattr(a, s).x, getattr(b, s).x) for s in ("train", "val", "test"))
    whole = load("digits", val=0.)
    assert a.checksum == whole.checksum and len(whole.val) == 0
    together = torch.cat([a.train.x, a.val.x]).flatten(1).double() @ torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = whole.train.x.flatten(1).double() @ torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together.sort()[0], alone.sort()[0])
    assert not torch.equal(load("digits", seed=1).val.x, a.val.x)


def test_scale():
    data = load("digits"); x = data.test.x
    assert torch.equal(data.scale(x, "raw255"), x.float()) and torch.equal(data.scale(x, "unit"), x.float() / 255)
    want = (x.double() / 255 - data.mean[0]) / data.std[0]
    assert (data.scale(x, "standardize") - want).abs().max() < 1e-6
    with pytest.raises(LopError, match="raw255, unit, standardize"): data.scale(x, "none")


@needs_mnist
def test_mnist_is_what_torchvision_reads(copy):
    data = load("mnist", copy, val=0.)
    for split, train in (("train", True), ("test", False)):
        theirs = MNIST(copy, train=train, download=True)   # unpacks beside the archives
        assert torch.equal(getattr(data, split).x[:, 0], theirs.data) and torch.equal(getattr(data, split).y, theirs.targets)
    assert len(load("mnist", copy).val) == 6000


@needs_mnist
def test_a_root_that_can_only_be_read_will_do(copy):
    before = sorted(p.name for p in copy.rglob("*"))
    for p in [copy, *copy.rglob("*")]: p.chmod(p.stat().st_mode & ~0o222)
    try: load("mnist", copy)
    finally:
        for p in [copy, *copy.rglob("*")]: p.chmod(p.stat().st_mode | 0o200)
    assert sorted(p.name for p in copy.rglob("*")) == before


@needs_mnist
@pytest.mark.parametrize("harm, says", [("missing", "is missing"), ("cut", "is damaged"), ("bit", "is damaged"), ("empty", "is damaged")])
@pytest.mark.parametrize("which", range(4))
def test_a_bad_file_is_named_with_the_cure(copy, which, harm, says):
    f = list(mnist_files(copy))[which]; content = f.read_bytes()
    if harm == "missing": f.unlink()
    else: f.write_bytes(dict(cut=content[:-100], bit=content[:50] + bytes([content[50] ^ 1]) + content[51:], empty=b"")[harm])
    with pytest.raises(LopError) as e: load("mnist", copy)
    text = str(e.value)
    assert says in text and f.name in text and str(f.parent) in text and "lop-data mnist" in text and len(text.splitlines()) <= 2
    assert {r["name"]: r["state"] for r in status(copy)}["mnist"] == ("missing" if harm == "missing" else "damaged")


def test_a_download_that_fails_says_so(tmp_path, monkeypatch):
    def no_network(root): raise OSError("no route")
    monkeypatch.setattr(sources["mnist"], "fetch", no_network)
    with pytest.raises(LopError, match="could not be downloaded.*no route"): fetch("mnist", tmp_path)


@needs_mnist
def test_fetch_mends_a_damaged_file(copy, monkeypatch):
    f = list(mnist_files(copy))[1]; good = f.read_bytes(); f.write_bytes(good[:1000])
    def download(root): assert not f.exists(); f.write_bytes(good)
    monkeypatch.setattr(sources["mnist"], "fetch", download)
    fetch("mnist", copy); verify("mnist", copy)
    with gzip.open(f) as g: assert len(g.read()) == 60_008
