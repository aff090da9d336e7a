"Splits, and files that are missing, damaged, cut short or in a place that can't be written."
import gzip
import hashlib
import io
import os
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import platformdirs
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from lop_nb import data as module
from lop_nb.config import sizes
from lop_nb.data import by_class, fetch, idx_files, load, sources, status, stratified, tiny_base, verify
from lop_nb.runtime import LopError

HERE = os.environ.get("LOP_DATA")
CLASSES = dict(mnist=MNIST, fashion_mnist=FashionMNIST, cifar10=CIFAR10, cifar100=CIFAR100)


def mnist_files(root): return idx_files(MNIST, root)


def there(name): return name == "digits" or bool(HERE) and all(f.exists() for f in sources[name].files(HERE))


def needs(name): return pytest.mark.skipif(not there(name), reason=f"LOP_DATA has no {name}")


def each(*names): return pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in names])


needs_mnist = needs("mnist")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "no test reads or writes the person's own cache folder"
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *a: str(folder))
    return folder


def mine(name, to):
    "A root of its own with the real files of one data set"
    for f in sources[name].files(HERE):
        at = to/f.relative_to(HERE); at.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if f.is_dir() else shutil.copyfile)(f, at, **dict(copy_function=shutil.copyfile) if f.is_dir() else {})
    for p in [to, *to.rglob("*")]: p.chmod(p.stat().st_mode | 0o700)
    return to


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "A folder, and the address at which it is served"
    folder = tmp_path/"mirror"; folder.mkdir(); monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs=dict(poll_interval=.02)); thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}/"
        http.shutdown(); thread.join()


def write_list(root, folder="."):
    "The root's own list of what is in `folder`"
    files = [f for f in sorted((root/folder).rglob("*")) if f.is_file() and f.name != "SHA256SUMS"]
    (root/"SHA256SUMS").write_text("".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  ./{f.relative_to(root)}\n" for f in files))


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
    assert torch.allclose(data.scale(x, "symmetric"), (x.float()/255 - .5)/.5, atol=1e-6) and data.scale(torch.tensor([0, 255], dtype=torch.uint8), "symmetric").tolist() == [-1, 1]
    want = (x.double() / 255 - data.mean[0]) / data.std[0]
    assert (data.scale(x, "standardize") - want).abs().max() < 1e-6
    with pytest.raises(LopError, match="raw255, unit, symmetric, standardize"): data.scale(x, "none")


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
def test_fetch_mends_a_damaged_file(copy, mirror, monkeypatch):
    f = list(mnist_files(copy))[1]; good = f.read_bytes(); f.write_bytes(good[:1000])
    folder, address = mirror; mine("mnist", folder)
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}MNIST/raw/"])
    fetch("mnist", copy); verify("mnist", copy)
    with gzip.open(f) as g: assert len(g.read()) == 60_008
    assert sorted(p.name for p in copy.iterdir()) == ["MNIST", "mirror"]


@needs_mnist
def test_a_fetch_that_fails_leaves_what_was_there(copy, mirror, monkeypatch):
    f = list(mnist_files(copy))[1]; f.write_bytes(b"half"); before = {p: p.read_bytes() for p in mnist_files(copy)}
    monkeypatch.setattr(MNIST, "mirrors", [f"{mirror[1]}nowhere/"])
    with pytest.raises(LopError, match="could not be downloaded"): fetch("mnist", copy)
    assert {p: p.read_bytes() for p in mnist_files(copy)} == before and sorted(p.name for p in copy.iterdir()) == ["MNIST", "mirror"]


def reference(name):
    "What torchvision itself reads, its check set aside"
    if name in ("mnist", "fashion_mnist"): return None
    cls = type("Reference", (CLASSES[name],), dict(_check_integrity=lambda self: True))
    return [cls(HERE, train=t) for t in (True, False)]


@each("cifar10", "cifar100")
def test_cifar_is_what_torchvision_reads(name):
    data = load(name, HERE, val=0.)
    for ours, theirs in zip((data.train, data.test), reference(name)):
        assert torch.equal(ours.x, torch.stack([pil_to_tensor(picture) for picture, _ in theirs])) and ours.y.tolist() == theirs.targets
        assert ours.x.is_contiguous() and data.classes == theirs.classes


@needs("fashion_mnist")
def test_fashion_mnist_is_what_torchvision_reads(tmp_path):
    data = load("fashion_mnist", HERE, val=0.); root = mine("fashion_mnist", tmp_path)
    for ours, train in ((data.train, True), (data.test, False)):
        theirs = FashionMNIST(root, train=train, download=True)
        assert torch.equal(ours.x[:, 0], theirs.data) and torch.equal(ours.y, theirs.targets) and data.classes == theirs.classes
    pixels = data.train.x.double() / 255
    assert abs(pixels.mean() - data.mean[0]) < 1e-4 and abs(pixels.std() - data.std[0]) < 1e-4


@each("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
def test_the_sizes_of_the_config_are_those_of_the_data(name):
    data = load(name, HERE); colours, side, classes = sizes[name]
    assert data.shape == (colours, side, side)
    if name == "tiny_imagenet" and data.part: assert data.num_classes <= classes
    else: assert data.num_classes == classes
    assert set(sizes) == set(sources)
    assert len(data.mean) == len(data.std) == colours


@each("digits", "mnist", "cifar100", "tiny_imagenet")
def test_examples_per_class_takes_the_first(name):
    whole, few = load(name, HERE), load(name, HERE, examples_per_class=2)
    for s in ("train", "val", "test"):
        a, b = getattr(whole, s), getattr(few, s)
        want = [i for c in range(whole.num_classes) for i in (a.y == c).nonzero()[:2, 0].tolist()]
        assert torch.equal(b.x, a.x[sorted(want)]) and torch.equal(b.y, a.y[sorted(want)])
    with pytest.raises(LopError, match="examples_per_class=0"): load(name, HERE, examples_per_class=0)


# parts and their list

@needs("cifar10")
def test_a_part_is_accepted_with_its_list_alone(tmp_path):
    root = mine("cifar10", tmp_path); folder = root/"cifar-10-batches-py"
    with pytest.raises(LopError, match="data_batch_1 is damaged"): load("cifar10", root)
    write_list(root)
    data = load("cifar10", root)
    assert data.part and "part" in data._repr_markdown_() and load("digits").part is False
    assert {r["name"]: r["state"] for r in status(root)}["cifar10"] == "part"
    fetch("cifar10", root)   # nothing to do, so no network
    f = folder/"data_batch_3"; good = f.read_bytes(); f.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    with pytest.raises(LopError, match="data_batch_3 is damaged") as e: load("cifar10", root)
    assert "SHA256SUMS" in str(e.value)
    f.unlink()
    with pytest.raises(LopError, match="data_batch_3 is missing"): load("cifar10", root)


@needs_mnist
def test_a_whole_is_no_part_though_it_is_listed(copy):
    write_list(copy)
    assert load("mnist", copy).part is False and {r["name"]: r["state"] for r in status(copy)}["mnist"] == "ready"


@needs_mnist
def test_a_part_of_mnist(copy):
    f = next(f for f in mnist_files(copy) if f.name == "t10k-labels-idx1-ubyte.gz")
    with gzip.open(f) as g: content = g.read()
    f.write_bytes(gzip.compress(content)); write_list(copy)   # the same labels in another file
    data = load("mnist", copy)
    assert data.part and torch.equal(data.test.y, load("mnist", HERE).test.y)


# Tiny ImageNet, from a small archive made here

def jpeg(x): out = io.BytesIO(); to_pil_image(x).save(out, "JPEG"); return out.getvalue()


def picture(i, grey=False):
    "A 64×64 JPEG of its own"
    x = torch.randint(256, (1 if grey else 3, 8, 8), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
    return jpeg(x.repeat_interleave(8, 1).repeat_interleave(8, 2))


def make_archive(f, classes=4, train=3, val=2):
    "An archive with the lay of the original; classes in an order that isn't sorted"
    wnids = [f"n{(7 * c + 3) % 1000:08}" for c in range(classes)]
    with zipfile.ZipFile(f, "w") as z:
        put = lambda name, content: z.writestr(f"tiny-imagenet-200/{name}", content)
        put("wnids.txt", "\n".join(wnids)); put("words.txt", "".join(f"{w}\tname {w}, other name\n" for w in wnids))
        for c, w in enumerate(wnids):
            put(f"train/{w}/{w}_boxes.txt", "")
            for i in range(train): put(f"train/{w}/images/{w}_{i}.JPEG", picture(100*c + i, grey=i == 0))
        rows = [(f"val_{i*classes + c}.JPEG", w) for c, w in enumerate(wnids) for i in range(val)]
        for k, (name, _) in enumerate(rows): put(f"val/images/{name}", picture(10**6 + k))
        put("val/val_annotations.txt", "".join(f"{name}\t{w}\t0\t0\t9\t9\n" for name, w in rows))
        put("test/images/test_0.JPEG", picture(0))
    return sorted(wnids)


@pytest.fixture
def server(tmp_path, mirror, monkeypatch):
    "The archive, its address and its md5; a whole is what it holds"
    def serve(**kw):
        f = mirror[0]/"tiny-imagenet-200.zip"
        wnids = make_archive(f, **kw)
        monkeypatch.setattr(module, "tiny_url", mirror[1] + f.name); monkeypatch.setattr(module, "tiny_md5", hashlib.md5(f.read_bytes()).hexdigest())
        monkeypatch.setattr(module, "tiny_whole", dict(classes=4, train=3, val=2) | kw)
        return f, wnids, tmp_path/"root"
    return serve


def test_tiny_imagenet_is_fetched_and_read(server, monkeypatch):
    archive, wnids, root = server()
    fetch("tiny_imagenet", root)
    assert [p.name for p in root.iterdir()] == ["tiny-imagenet-200"] and archive.exists()
    train, val = (ImageFolder(tiny_base(root)/s) for s in ("train", "val"))   # read by torchvision's own
    assert train.classes == val.classes == wnids
    data = load("tiny_imagenet", root, val=0.)
    assert not data.part and data.classes == [f"name {w}" for w in wnids] and status(root)[-1]["state"] == "ready"
    for ours, theirs in ((data.train, train), (data.test, val)):
        assert torch.equal(ours.x, torch.stack([pil_to_tensor(p) for p, _ in theirs])) and ours.y.tolist() == theirs.targets
    assert (data.train.x[::3, :1] == data.train.x[::3]).all(), "a grey picture has three equal colours"
    monkeypatch.setattr(module, "download_url", lambda *a, **kw: pytest.fail("it is there already")); fetch("tiny_imagenet", root)


def test_both_lays_of_the_validation_pictures_are_read_alike(server, tmp_path):
    archive, wnids, root = server()
    with zipfile.ZipFile(archive) as z: z.extractall(root)
    a = load("tiny_imagenet", root); assert (tiny_base(root)/"val"/"images").is_dir(), "loading leaves the tree as it is"
    by_class(tiny_base(root)/"val"); b = load("tiny_imagenet", root)
    assert a.checksum == b.checksum


@pytest.mark.parametrize("when", ["unpack", "by_class"])
@pytest.mark.parametrize("left", [True, False], ids=["killed", "failed"])
def test_unpacking_that_stops_leaves_nothing_that_looks_whole(server, monkeypatch, when, left):
    _, _, root = server(); real = getattr(module, when)
    def stops(*args):
        if when == "unpack": real(*args)
        raise KeyboardInterrupt if left else OSError("disk full")
    monkeypatch.setattr(module, when, stops)
    if left: monkeypatch.setattr(module.shutil, "rmtree", lambda *a, **kw: None)   # a killed process tidies nothing
    with pytest.raises(KeyboardInterrupt if left else LopError): fetch("tiny_imagenet", root)
    assert status(root)[-1]["state"] == "missing"
    monkeypatch.undo(); assert (root/".tiny-imagenet-200.unpacking").exists() == left


def test_fetching_goes_on_after_a_kill(server, monkeypatch):
    _, _, root = server(); old = root/".tiny-imagenet-200.unpacking"/"tiny-imagenet-200"/"val"/"n1"/"images"
    old.mkdir(parents=True); (old/"val_0.JPEG").write_bytes(b"half")
    fetch("tiny_imagenet", root); assert not load("tiny_imagenet", root).part


def test_a_damaged_archive_is_refused(server, monkeypatch):
    archive, _, root = server(); archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(LopError, match="could not be downloaded"): fetch("tiny_imagenet", root)
    assert not tiny_base(root).exists()


def test_a_tree_that_is_not_whole_is_not_deleted(server):
    _, wnids, root = server(); fetch("tiny_imagenet", root); gone = tiny_base(root)/"train"/wnids[0]/"images"/f"{wnids[0]}_1.JPEG"; gone.unlink()
    with pytest.raises(LopError, match="11 \\+ 8 pictures"): load("tiny_imagenet", root)
    assert status(root)[-1]["state"] == "damaged"
    with pytest.raises(LopError, match="Move it away"): fetch("tiny_imagenet", root)
    assert tiny_base(root).is_dir()


@pytest.mark.parametrize("harm, says", [("cut", "is damaged"), ("bit", "is damaged"), ("gone", "is missing"), ("more", "not in SHA256SUMS"), ("class", "not in SHA256SUMS")])
def test_a_listed_tree_is_held_to_its_list(server, harm, says, monkeypatch):
    _, wnids, root = server(); fetch("tiny_imagenet", root); write_list(root)
    monkeypatch.setattr(module, "tiny_whole", dict(classes=200, train=500, val=50))
    assert load("tiny_imagenet", root).part
    f = tiny_base(root)/"val"/wnids[1]/"images"; f = sorted(f.iterdir())[0]; content = f.read_bytes()
    if harm == "cut": f.write_bytes(content[:-9])
    elif harm == "bit": f.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "gone": f.unlink()
    elif harm == "more": (f.parent/"more.JPEG").write_bytes(content)
    else: (tiny_base(root)/"val"/"n99").mkdir(); (tiny_base(root)/"val"/"n99"/"a.JPEG").write_bytes(content)
    with pytest.raises(LopError, match=says) as e: load("tiny_imagenet", root)
    assert "lop-data tiny_imagenet" in str(e.value)


@pytest.mark.parametrize("content, says", [(b"no picture", "can't be decoded"), (jpeg(torch.zeros(3, 1, 1, dtype=torch.uint8)), "1×1 pixels")])
def test_a_picture_that_is_none_is_named(server, content, says):
    _, wnids, root = server(); fetch("tiny_imagenet", root); f = tiny_base(root)/"train"/wnids[2]/"images"/f"{wnids[2]}_2.JPEG"; f.write_bytes(content)
    with pytest.raises(LopError, match=says) as e: load("tiny_imagenet", root)
    assert f.name in str(e.value)


def test_decoded_pictures_are_kept_and_kept_right(server, own_cache, monkeypatch):
    _, wnids, root = server(); fetch("tiny_imagenet", root); before = sorted(p.name for p in root.rglob("*"))
    first = load("tiny_imagenet", root); cache, = (own_cache/"decoded").iterdir()
    calls = []; real = module._decode_all
    monkeypatch.setattr(module, "_decode_all", lambda folders: calls.append(1) or real(folders))
    assert load("tiny_imagenet", root).checksum == first.checksum and not calls, "the second load decodes nothing"
    good = cache.read_bytes(); at = good.find(first.train.x[0].numpy().tobytes()[:64]); assert at > 0
    for bad in (good[:len(good)//2], good[:at] + bytes([good[at] ^ 1]) + good[at + 1:], b"", b"junk"):   # cut, one bit, empty, something else
        cache.write_bytes(bad); calls.clear()
        assert load("tiny_imagenet", root).checksum == first.checksum and len(calls) == 2
        assert load("tiny_imagenet", root).checksum == first.checksum and len(calls) == 2, "rebuilt once"
    f = tiny_base(root)/"train"/wnids[0]/"images"/f"{wnids[0]}_1.JPEG"; f.write_bytes(picture(77)); calls.clear()
    assert load("tiny_imagenet", root).checksum != first.checksum and len(calls) == 2, "another tree, another key"
    assert [p.name for p in (own_cache/"decoded").iterdir()] == [cache.name] and sorted(p.name for p in root.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_said(server, own_cache):
    _, _, root = server(); fetch("tiny_imagenet", root); (own_cache/"decoded").write_text("a file in the way")
    with pytest.warns(UserWarning, match="could not be kept"): load("tiny_imagenet", root)


@needs("tiny_imagenet")
def test_the_real_tiny_imagenet(tmp_path):
    data = load("tiny_imagenet", HERE, val=0.); base = tiny_base(HERE)
    train = ImageFolder(base/"train")
    assert torch.equal(data.train.x, torch.stack([pil_to_tensor(p) for p, _ in train])) and data.train.y.tolist() == train.targets
    of = dict(line.split("\t")[:2] for line in (base/"val"/"val_annotations.txt").read_text().splitlines())
    names = sorted(of, key=lambda n: (of[n], n))
    assert data.test.y.tolist() == [train.class_to_idx[of[n]] for n in names]
    assert torch.equal(data.test.x, torch.stack([pil_to_tensor(default_loader(str(base/"val"/"images"/n))) for n in names]))
    assert data.part == (len(train.classes) < 200) and "Egyptian cat" in data.classes


@each("mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
def test_the_root_is_left_as_it_is(name, tmp_path):
    root = mine(name, tmp_path/"root"); shutil.copyfile(f"{HERE}/SHA256SUMS", root/"SHA256SUMS") if Path(f"{HERE}/SHA256SUMS").is_file() else None
    if name == "tiny_imagenet": write_list(root)
    stamp = lambda: sorted((str(p), p.stat().st_mtime_ns) for p in [root, *root.rglob("*")])
    before = stamp(); load(name, root); assert stamp() == before
