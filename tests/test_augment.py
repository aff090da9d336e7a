"Augmentation against torchvision, picture by picture; and that a picture depends on nothing but itself and its draws."
import os

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from lop_nb.augment import Augment, ColorJitter, Flip, PaddedCrop, Rotation, jitter, recipe, recipes, turn
from lop_nb.config import sizes
from lop_nb.data import load, sources
from lop_nb.runtime import LopError, generator

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]
ALL = Augment(Rotation(25), PaddedCrop(3), Flip(.4), ColorJitter(.4, .3, .2))


def pictures(n, shape, seed=0): return torch.randint(256, (n, *shape), generator=generator(seed, "pictures"), dtype=torch.uint8)


def real(name):
    there = os.environ.get("LOP_DATA") and all(f.exists() for f in sources[name].files(None))
    return load(name).train.x[:200] if there else pictures(200, (sizes[name][0], *[sizes[name][1]]*2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flip_and_crop_and_rotation_are_torchvisions(shape):
    n = 300; x = pictures(n, shape); pad = 5
    flip, crop, rotation = Augment(Flip(.3)), Augment(PaddedCrop(pad)), Augment(Rotation(10))
    d = flip.draw(n, generator(1, "a"))
    assert torch.equal(flip(x, d), torch.stack([tv.horizontal_flip(p) if f else p for p, f in zip(x, d["flip"].tolist())]))
    d = crop.draw(n, generator(1, "a"))
    assert torch.equal(crop(x, d), torch.stack([tv.crop(tv.pad(p, pad), top, left, *shape[1:]) for p, (top, left) in zip(x, d["corner"].tolist())]))
    angles = (2*torch.rand(n, generator=generator(2, "a")) - 1).double() * 180   # the whole circle
    turned = turn(x, torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], 1).float())
    assert torch.equal(turned, torch.stack([tv.rotate(p, a) for p, a in zip(x, angles.tolist())]))
    d = rotation.draw(n, generator(1, "a")); cos, sin = d["turn"].double().unbind(1)
    assert torch.equal(rotation(x, d), torch.stack([tv.rotate(p, a) for p, a in zip(x, torch.rad2deg(torch.atan2(sin, cos)).tolist())]))
    for right in range(4):   # whole quarters are exact
        a = torch.tensor(90. * right).deg2rad().double(); assert torch.equal(turn(x, torch.stack([a.cos(), a.sin()]).float().expand(n, 2)), x.rot90(right, (-2, -1)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op, theirs", list(enumerate([tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation])))
def test_each_colour_change_is_torchvisions_to_one_level(shape, op, theirs):
    n = 100; x = pictures(n, shape, seed=op); x[:20] = x[:20] // 8 + 220; x[20:40] //= 8   # very bright, very dark
    factors = torch.ones(n, 3); factors[:, op] = 2*torch.rand(n, generator=generator(op, "a"))
    ours = jitter(x, factors, torch.arange(3).expand(n, 3))
    want = torch.stack([theirs(p, f) for p, f in zip(x, factors[:, op].tolist())])
    assert (ours.int() - want.int()).abs().max() <= 1 and (ours != want).float().mean() < .01
    if shape[0] == 3 or op < 2: assert (ours != x).float().mean() > .5, "it does something"


def test_colour_changes_in_the_order_drawn():
    n = 200; x = pictures(n, (3, 32, 32)); augment = recipe("tiny_imagenet"); j = augment.transforms[-1]; d = j.draw(n, generator(0, "a"))
    ops = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
    def one(p, factors, order):
        for k in order.tolist(): p = ops[k](p, factors[k].item())
        return p
    want = torch.stack([one(*row) for row in zip(x, d["factors"], d["order"])])
    assert (Augment(j)(x, d).int() - want.int()).abs().max() <= 1
    assert (Augment(j)(x, d | dict(order=d["order"].flip(1))).int() - want.int()).abs().max() > 1, "the order matters"


def test_draws_are_of_the_range_and_even():
    n = 20_000; d = ALL.draw(n, generator(0, "a"))
    assert all(len(v) == n for v in d.values())
    angle = torch.rad2deg(torch.atan2(*d["turn"].unbind(1)[::-1]))
    assert angle.abs().max() <= 25.001 and abs(angle.mean()) < .5 and abs(angle.std() - 50/12**.5) < .3
    counts = torch.stack([d["corner"][:, i].bincount(minlength=7) for i in (0, 1)]); assert counts.shape == (2, 7) and ((counts/n - 1/7).abs() < .012).all()   # 4.8 standard errors
    assert abs(d["flip"].double().mean() - .4) < .017
    for i, s in enumerate((.4, .3, .2)): f = d["factors"][:, i]; assert f.min() >= 1 - s - 1e-6 and f.max() <= 1 + s + 1e-6 and abs(f.std() - s/3**.5) < .01
    _, counts = d["order"].unique(dim=0, return_counts=True); assert len(counts) == 6 and ((counts/n - 1/6).abs() < .013).all()


def test_draws_come_from_the_generator_alone():
    torch.manual_seed(0); a = ALL.draw(9, generator(0, "augment")); torch.manual_seed(1); b = ALL.draw(9, generator(0, "augment")); c = ALL.draw(9, generator(1, "augment"))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)
    before = torch.get_rng_state(); ALL(pictures(9, (3, 8, 8)), a); assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 31)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_depends_on_itself_and_its_draws_alone(shape, threads):
    "bit for bit, however the batch is cut or stacked"
    n, before = 60, torch.get_num_threads(); x = pictures(n, shape); d = ALL.draw(n, generator(0, "a")); kept = x.clone()
    whole = ALL(x, d); torch.set_num_threads(threads)
    try:
        for size in (1, 7, 59): assert torch.equal(torch.cat([ALL(x[i:i + size], {k: v[i:i + size] for k, v in d.items()}) for i in range(0, n, size)]), whole)
        assert torch.equal(ALL(x.view(3, 20, *shape), {k: v.view(3, 20, *v.shape[1:]) for k, v in d.items()}), whole.view(3, 20, *shape))
    finally: torch.set_num_threads(before)
    assert torch.equal(ALL(x[0], {k: v[0] for k, v in d.items()}), whole[0]), "a single picture without leading axes"
    rows = torch.randint(n, (4, 5, 6), generator=generator(3, "a"))
    assert torch.equal(ALL(x[rows], {k: v[rows] for k, v in d.items()}), whole[rows])
    assert torch.equal(ALL(x.flip(0), {k: v.flip(0) for k, v in d.items()}), whole.flip(0))
    assert torch.equal(x, kept) and whole.dtype == torch.uint8, "the pictures given are left as they are"


@pytest.mark.parametrize("name", sizes)
def test_recipes(name):
    augment = recipe(name)
    if name == "digits": assert augment is None; return
    x = real(name); d = augment.draw(len(x), generator(0, "a")); out = augment(x, d)
    assert out.shape == x.shape and out.dtype == torch.uint8 
    assert (out != x).flatten(1).any(1).float().mean() > (.6 if "mnist" in name else .9)   # small turns move no pixel of ink by half a pixel
    assert set(recipes) == set(sizes) - {"digits"} and recipe("my own") is None


def test_nothing_drawn_nothing_changed():
    x = pictures(10, (3, 32, 32)); none = Augment(Rotation(0), PaddedCrop(0), Flip(0), ColorJitter(0, 0, 0))
    assert torch.equal(none(x, none.draw(10, generator(0, "a"))), x)
    assert torch.equal(Augment()(x, Augment().draw(10, generator(0, "a"))), x)
    assert ALL(x[:0], ALL.draw(0, generator(0, "a"))).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("make, says", [(lambda: Flip(-.1), "p=-0.1"), (lambda: PaddedCrop(-1), "padding=-1"), (lambda: Rotation(400), "degrees=400"), (lambda: ColorJitter(.1, 2, .1), "contrast=2"),
    (lambda: ALL(torch.zeros(2, 3, 8, 8), ALL.draw(2, generator(0, "a"))), "uint8"), (lambda: ALL(pictures(2, (2, 8, 8)), ALL.draw(2, generator(0, "a"))), "1 or 3 colours"),
    (lambda: ALL(pictures(3, (3, 8, 8)), ALL.draw(2, generator(0, "a"))), r"draws of \[2\]"), (lambda: Augment(Flip(), Flip()), "twice")])
def test_what_is_refused(make, says):
    with pytest.raises(LopError, match=says): make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    x = pictures(50, (3, 64, 64)); d = ALL.draw(50, generator(0, "a")); there = ALL(x.cuda(), d)
    assert there.is_cuda and (there.cpu().int() - ALL(x, d).int()).abs().max() <= 1
    cut = torch.cat([ALL(x[i:i + 7].cuda(), {k: v[i:i + 7].cuda() for k, v in d.items()}) for i in range(0, 50, 7)])
    assert torch.equal(cut, there)
