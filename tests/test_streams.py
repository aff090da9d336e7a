"Streams are what they promise: the same for a seed whoever its neighbours are, balanced, refused in words; and passages meet both of their ends."
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lop_nb import config
from lop_nb.bitflips import BitFlips
from lop_nb.data import Dataset, Split, load
from lop_nb.runtime import LopError, generator
from lop_nb.streams import (Alternating, BinaryPairs, Chunks, ClassSplit, GrowingClasses, Passage, PermutedPixels, RotatedInputs, WarmStart,
                            check_passage, check_stream, deal, from_record, kinds, level, melt, rows_of, split_sizes)
from lop_nb.tasks import Stream, Task, View, hits, mask_logits, masked_cross_entropy, rotate


def colourful():
    "three colours, 7 classes of unequal size, no validation examples, pictures that are not square"
    g = torch.Generator().manual_seed(0)
    def split(sizes):
        y = torch.arange(7).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes), generator=g)] if sum(sizes) else torch.zeros(0, dtype=torch.int64)
        return Split(torch.randint(0, 256, (len(y), 3, 6, 4), generator=g, dtype=torch.uint8), y)
    return Dataset("colourful", split([20, 25, 31, 18, 22, 40, 19]), split([0]*7), split([5, 9, 4, 6, 7, 3, 8]), list("abcdefg"), [.4, .5, .6], [.2, .3, .25], "", "", "c1")


DATA = dict(digits=load("digits"), colourful=colourful())
SETTINGS = dict(permuted_pixels=dict(tasks=4), class_split=dict(tasks=3, classes_per_task=2), random_labels=dict(tasks=4, examples=60), permuted_labels=dict(tasks=4),
                rotated_inputs=dict(tasks=4), binary_pairs=dict(tasks=6), growing_classes=dict(tasks=3, classes_per_task=2), alternating=dict(tasks=5, hard_classes=3),
                warm_start=dict(fraction=.3, label_noise=.4), chunks=dict(tasks=4), stages=dict(tasks=3))
PICTURES = [k for k in kinds if k != BitFlips.name]      # streams of a data set; bit flips have tests of their own
EVERY = [pytest.param(k, d, id=f"{k}-{d}") for k in PICTURES for d in DATA]
WAYS = [pytest.param(k, d, how, id=f"{k}-{d}-{how}") for k in PICTURES for d in DATA for how in kinds[k].passages]
make = lambda kind, data="digits", seeds=(3, 5), **kw: kinds[kind](DATA[data], seeds=seeds, **SETTINGS[kind] | kw)
views = lambda task: [v for v in (task.train, task.val, task.test) if v is not None]
every = lambda view: torch.arange(view.n).expand(len(view.rows), -1)
now = lambda view, p: torch.full(view.rows.shape, float(p))   # all examples at one progress


def test_every_kind_is_here():
    assert kinds.keys() == config.streams().keys() == {*SETTINGS, BitFlips.name}
    for name, kind in kinds.items(): assert kind.name == name


# ---- streams of some examples

SOME = dict(permuted_pixels=PermutedPixels, permuted_labels=kinds["permuted_labels"])

@pytest.mark.parametrize("pool", ["train", "all"])
@pytest.mark.parametrize("kind", SOME)
def test_a_task_of_some_examples_has_none_twice_and_draws_them_anew(kind, pool):
    make = lambda seeds, **kw: SOME[kind](DATA["colourful"], tasks=4, seeds=seeds, pool=pool, examples=90, normalize="symmetric", **kw)
    d, stream = DATA["colourful"], make([3, 5]); source = d.train if pool == "train" else d.all; seen = []
    for k, task in enumerate(stream):
        view = task.train
        assert view.n == 90 and view.in_order and view.split is not d.test and all(len(r.unique()) == 90 for r in view.rows)
        x, y = view.fetch(every(view))
        for r in range(2):
            pixels = source.x[view.rows[r]].float().flatten(2)/127.5 - 1
            if kind == "permuted_pixels": assert torch.allclose(x[r].flatten(2), pixels[:, :, view.pixels[r]], atol=1e-6) and torch.equal(y[r], source.y[view.rows[r]])
            else: assert torch.allclose(x[r].flatten(2), pixels, atol=1e-6) and torch.equal(y[r], generated_names(stream, r, k)[source.y[view.rows[r]]])
        assert (task.val is task.test is None) if pool == "all" else task.test.n == len(d.test)
        alone = make([5])[k].train
        assert torch.equal(alone.rows[0], view.rows[1]) and torch.equal(alone.fetch(every(alone))[0][0], x[1])
        seen.append(view.rows)
    assert len({tuple(r.tolist()) for rows in seen for r in rows}) == 8
    again = from_record(json.loads(json.dumps(stream.record())), d)
    assert again.fingerprint() == stream.fingerprint() != make([3, 6]).fingerprint() and torch.equal(again[2].train.rows, seen[2])


def generated_names(stream, r, k): return torch.randperm(7, generator=generator(stream.seeds[r], "task", k))


def test_the_pool_of_all_is_train_then_val_then_test():
    d = DATA["digits"]; n, m = len(d.train), len(d.val)
    assert torch.equal(d.all.x[:n], d.train.x) and torch.equal(d.all.x[n:n + m], d.val.x) and torch.equal(d.all.y[n + m:], d.test.y) and len(d.all) == 1797
    task = PermutedPixels(d, pool="all", tasks=1)[0]
    assert torch.equal(task.train.rows[0], torch.arange(1797)) and not task.train.in_order and task.test is None


def test_a_stream_that_takes_all_draws_what_it_always_drew():
    "settings that are left alone change no draw: the record of an older stream is still good"
    for kind in SOME:
        stream = make(kind); old = stream.record(); settings = {k: v for k, v in old["settings"].items() if k not in ("pool", "examples")}
        assert from_record(old | dict(settings=settings), DATA["digits"]).fingerprint() == stream.fingerprint()
        n = 64 if kind == "permuted_pixels" else 10
        assert torch.equal(stream._draw(3, 1), torch.randperm(n, generator=generator(3, "task", 1)))


@pytest.mark.parametrize("kind", SOME)
def test_more_than_there_is_is_refused(kind):
    for pool, there in ("train", 1293), ("all", 1797):
        with pytest.raises(LopError, match=f"stream.pool={pool} has {there} examples"): SOME[kind](DATA["digits"], pool=pool, examples=there + 1)
        assert SOME[kind](DATA["digits"], pool=pool, examples=there)[0].train.n == there
    with pytest.raises(LopError, match="stream.examples=0"): check_stream(kind, dict(examples=0), 10)
    with pytest.raises(LopError, match="Choices: train, all"): check_stream(kind, dict(pool="test"), 10)


# ---- every kind

@pytest.mark.parametrize("kind, data", EVERY)
def test_a_replica_has_the_tasks_of_its_seed(kind, data):
    together = make(kind, data)
    for r, seed in enumerate((3, 5)):
        for both, alone in zip(together, make(kind, data, [seed])):
            assert both.train.n == alone.train.n and torch.equal(both.classes[r], alone.classes[0]) and both.name == alone.name
            for v, a in zip(views(both), views(alone)):
                n = a.n   # rows beyond are padding
                assert not v.valid[r, n:].any()
                (x, y), (xa, ya) = v.fetch(every(v)), a.fetch(every(a))
                assert torch.equal(x[r, :n], xa[0]) and torch.equal(y[r, :n], ya[0])


@pytest.mark.parametrize("kind, data", EVERY)
def test_draws_differ_between_tasks_and_seeds_and_don_t_depend_on_the_order_of_asking(kind, data):
    stream = make(kind, data); n = len(stream); first = {k: [stream._draw(s, k).tolist() for s in stream.seeds] for k in reversed(range(n))}
    for k in range(n): assert first[k] == [stream._draw(s, k).tolist() for s in stream.seeds]
    if kind == "stages": return                              # it draws nothing
    assert first[0] != first[n - 1] and len({json.dumps(first[k][0]) for k in range(n)}) == n
    assert any(a != b for a, b in first.values())


@pytest.mark.parametrize("kind, data", EVERY)
def test_what_is_fetched_has_the_shapes_types_and_labels_that_were_promised(kind, data):
    stream = make(kind, data); d = DATA[data]
    for k, task in enumerate(stream):
        assert task.index == k and task.classes.shape == (2, stream.num_classes) and task.train.valid.all()
        for view in views(task):
            assert view.n == 0 or view.rows.max() < len(view.split)
            x, y = view.fetch(every(view))
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and x.shape == (2, view.n, *d.shape) and y.shape == (2, view.n)
            assert x.isfinite().all() and ((0 <= y) & (y < stream.num_classes)).all()
            for r in range(2):
                ok = view.valid[r]
                assert len(view.rows[r][ok].unique()) == ok.sum() and task.classes[r][y[r][ok]].all()   # no row twice, no label outside


@pytest.mark.parametrize("kind, data", EVERY)
def test_fetch_equals_looking_at_one_example_at_a_time(kind, data):
    stream = make(kind, data, normalize="unit")
    for view in views(stream[1]):
        for r in range(2):
            for b in torch.arange(view.n)[::17].tolist():
                row = view.rows[r, b]
                if row < 0: continue
                pixels = view.split.x[row].float()
                if view.pixels is not None: pixels = torch.stack([c.flatten()[view.pixels[r]].view_as(c) for c in pixels])
                if view.angles is not None: pixels = rotate(pixels[None, None], view.angles[r:r + 1])[0, 0]
                x, y = view.fetch(torch.full((2, 1), b))
                assert (x[r, 0] - pixels / 255).abs().max() < 1e-6
                assert y[r, 0] == (view.split.y[row] if view.labels is None else view.labels[r, row])


@pytest.mark.parametrize("kind, data", EVERY)
def test_augmentation_sees_raw_pictures_and_a_plain_view_does_not_care_for_progress(kind, data):
    view = make(kind, data)[1].train; pick = every(view); seen = []
    def change(x): seen.append(x); return 255 - x
    x, y = view.fetch(pick, change, torch.rand(pick.shape))
    assert len(seen) == 1 and seen[0].dtype == torch.uint8 and torch.equal(seen[0], view.split.x[view.rows])
    assert torch.equal(x, view.look(255 - view.split.x[view.rows])) and torch.equal(y, view.fetch(pick)[1])


@pytest.mark.parametrize("kind, data", EVERY)
def test_a_record_makes_the_stream_again(kind, data):
    stream = make(kind, data); again = from_record(json.loads(json.dumps(stream.record())), DATA[data])
    assert again.record() == stream.record() and len(again) == len(stream) and type(again) is type(stream)
    for a, b in zip(stream, again):
        for v, w in zip(views(a), views(b)):
            for t, u in zip(v.fetch(every(v)), w.fetch(every(w))): assert torch.equal(t, u)
    assert kind == "stages" or make(kind, data, (3, 6)).record()["fingerprint"] != stream.record()["fingerprint"]
    assert stream.seeded([3, 6]).record() == make(kind, data, (3, 6)).record()
    with pytest.raises(LopError, match="Load the same data"): from_record(stream.record(), DATA["colourful" if data == "digits" else "digits"])
    with pytest.raises(LopError, match="draws other numbers"): from_record(stream.record() | dict(fingerprint="0"), DATA[data])
    with pytest.raises(LopError, match="Unknown stream"): from_record(stream.record() | dict(kind="permuted_pixel"), DATA[data])


@pytest.mark.parametrize("kind, data", EVERY)
def test_tasks_can_be_trained_on(kind, data):
    "chance is the loss of equal logits over what is active; nothing is infinite; inactive outputs get no gradient"
    stream = make(kind, data)
    for task in stream:
        _, y = task.train.fetch(every(task.train))
        z = torch.zeros(*y.shape, stream.num_classes, requires_grad=True); loss = task.loss(z, y)
        active = task.classes.sum(1, keepdim=True)
        assert (loss - active.log()).abs().max() < 1e-6
        loss.sum().backward()
        if task.active is not None: assert (z.grad.sum(1)[~task.classes] == 0).all()
        assert task.correct(z, y).dtype == torch.bool and task.correct_all(z, y).shape == y.shape


# ---- each kind

@pytest.mark.parametrize("kind", ["class_split", "growing_classes", "binary_pairs", "alternating"])
@pytest.mark.parametrize("data", DATA)
def test_classes_of_a_task_are_balanced(kind, data):
    d = DATA[data]; least = d.train.y.bincount().min()
    for task in make(kind, data):
        for r in range(2):
            counts = d.train.y[task.train.rows[r]].bincount()
            assert (counts[counts > 0] == least).all()
            drawn = counts.nonzero()[:, 0]; mine = task.test.rows[r][task.test.valid[r]]
            assert torch.equal(mine.sort()[0], torch.isin(d.test.y, drawn).nonzero()[:, 0])   # all of their test examples


@pytest.mark.parametrize("kind", ["warm_start", "chunks"])
@pytest.mark.parametrize("data", DATA)
def test_parts_have_their_share_of_each_class(kind, data):
    y = DATA[data].train.y; stream = make(kind, data)
    for k, share in [(0, .3), (1, 1)] if kind == "warm_start" else [(0, .25), (1, .5), (3, 1)]:
        for rows in stream[k].train.rows: assert (y[rows].bincount(minlength=len(y.bincount())) - share * y.bincount()).abs().max() < 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), k=st.integers(0, 1000))
def test_a_permutation_is_one_and_is_shared_by_the_splits(seed, k):
    task = PermutedPixels(DATA["digits"], tasks=1001, seeds=[seed])[k]
    assert torch.equal(task.train.pixels[0].sort()[0], torch.arange(64))
    assert torch.equal(task.train.pixels, task.test.pixels) and torch.equal(task.train.pixels, task.val.pixels)


def test_the_first_task_may_be_plain():
    plain, shuffled = (PermutedPixels(DATA["colourful"], tasks=2, first_permuted=f, seeds=[0]) for f in (False, True))
    assert torch.equal(plain[0].train.pixels[0], torch.arange(24)) and torch.equal(plain[1].train.pixels, shuffled[1].train.pixels)
    assert not torch.equal(shuffled[0].train.pixels[0], torch.arange(24))


def test_colours_move_together():
    x, _ = make("permuted_pixels", "colourful", normalize="raw255")[1].train.fetch(torch.arange(5).expand(2, -1))
    raw = DATA["colourful"].train.x[:5].float().flatten(2)
    for r in range(2): assert {tuple(c) for c in x[r, 0].flatten(1).T.tolist()} == {tuple(c) for c in raw[0].T.tolist()}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), per=st.integers(1, 10))
def test_a_class_split_is_a_partition_and_growing_classes_its_sums(seed, per):
    stream, growing = (kind(DATA["digits"], tasks=None, classes_per_task=per, seeds=[seed]) for kind in (ClassSplit, GrowingClasses))
    drawn = [c for k in range(len(stream)) for c in stream._draw(seed, k).tolist()]
    assert sorted(drawn) == list(range(10)) and len(stream) == len(growing) == -(-10 // per)
    for k in range(len(stream)): assert growing._draw(seed, k).tolist() == drawn[:(k + 1)*per]


@settings(max_examples=30, deadline=None)
@given(tasks=st.integers(-1, 12) | st.none(), per=st.integers(-1, 12) | st.none())
def test_split_sizes_are_legal_or_refused(tasks, per):
    bad = (tasks is not None and tasks < 1) or (per is not None and not 1 <= per <= 10) or (tasks is not None and (tasks - 1) * (per or -(-10 // tasks)) >= 10)
    try: n, k = split_sizes(10, tasks, per)
    except LopError as e: assert bad and str(e).startswith("stream."); return
    assert not bad and n == (tasks or -(-10 // k)) and k == (per or -(-10 // (tasks or 1))) and (n - 1) * k < 10


@pytest.mark.parametrize("max_angle", [180., 20.])
def test_angles_are_uniform_to_both_sides(max_angle):
    draws = torch.stack([RotatedInputs(DATA["digits"], max_angle=max_angle)._draw(s, k) for s in range(40) for k in range(1, 26)]).flatten() / max_angle
    assert draws.abs().max() <= 1 and draws.histc(10, -1, 1).min() > 65   # a hundred expected, ±3.5 standard deviations
    stream = RotatedInputs(DATA["digits"], tasks=2, max_angle=max_angle, seeds=[0])
    assert stream._draw(0, 0) == 0 and torch.equal(stream[0].train.fetch(torch.zeros(1, 1, dtype=int))[0][0, 0], DATA["digits"].scale(DATA["digits"].train.x[0]))


@settings(max_examples=30, deadline=None)
@given(turns=st.integers(-4, 4), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_quarter_turns_are_exact(turns, size, seed):
    x = torch.rand(2, 3, 2, size, size, generator=torch.Generator().manual_seed(seed))
    assert (rotate(x, torch.tensor([90.*turns, 0.]))[0] - torch.rot90(x[0], turns, (-2, -1))).abs().max() < 1e-5
    assert (rotate(x, torch.tensor([90.*turns, 0.]))[1] - x[1]).abs().max() < 1e-6


def test_a_turn_is_rigid_where_pictures_are_not_square():
    "a bright pixel of a 9×5 picture moves by the angle, whatever the picture's sides"
    for (i, j), (i2, j2) in {(4, 4): (2, 4 - 2), (5, 3): (3, 3), (3, 2): (4, 1)}.items():   # the middle is (4, 2)
        x, y = torch.zeros(2, 1, 1, 1, 9, 5); x[..., i, j] = y[..., i2, j2] = 1
        assert (rotate(x, torch.tensor([90.])) - y).abs().max() < 1e-5


def test_pairs_run_through_all_pairs_and_both_orders_come():
    stream = BinaryPairs(DATA["colourful"], tasks=21, seeds=[0])
    drawn = [stream._draw(0, k).tolist() for k in range(21)]
    assert len({frozenset(p) for p in drawn}) == 21 and {a < b for a, b in drawn} == {True, False}
    d = DATA["colourful"].train
    for k, t in enumerate(stream): assert torch.equal(stream._draw(0, k)[t.train.fetch(every(t.train))[1][0]], d.y[t.train.rows[0]])   # 0 is the first of them
    assert stream.num_classes == 2 and all(t.classes.shape == (1, 2) and t.active is None for t in stream)


@settings(max_examples=30, deadline=None)
@given(hard=st.integers(1, 10), easy=st.integers(1, 10), seed=st.integers(0, 99))
def test_alternating_tasks_have_their_number_of_classes_and_a_pack_is_dealt_once(hard, easy, seed):
    stream = Alternating(DATA["digits"], tasks=7, hard_classes=hard, easy_classes=easy, seeds=[seed]); packs = {}
    for k in range(7):
        drawn = stream._draw(seed, k).tolist(); assert len(set(drawn)) == len(drawn) == (hard, easy)[k % 2]
        pack, gone = deal([(hard, easy)[i % 2] for i in range(k + 1)], 10)
        assert gone + len(drawn) <= 10
        if pack and not gone: assert len(packs[pack - 1]) + len(drawn) > 10   # a new pack only where the old one had too little
        assert gone == len(packs.get(pack, [])); packs.setdefault(pack, []).extend(drawn)
    for dealt in packs.values(): assert len(set(dealt)) == len(dealt)


def test_an_easy_task_is_not_trivial():
    task = Alternating(DATA["digits"], tasks=2, seeds=[0])[1]; _, y = task.train.fetch(every(task.train))
    z = torch.zeros(*y.shape, 10, requires_grad=True); task.loss(z, y).sum().backward()
    assert task.active is None and len(y.unique()) == 1 and (z.grad != 0).all()


def test_warm_start_tells_the_truth_but_for_the_noise():
    d = DATA["digits"]; clean, noisy = (WarmStart(d, fraction=.5, label_noise=v, seeds=[1, 2]) for v in (0., 1.))
    for task in (*clean, noisy[1]): assert torch.equal(task.train.fetch(every(task.train))[1], d.train.y[task.train.rows])
    y = noisy[0].train.fetch(every(noisy[0].train))[1]; right = (y == d.train.y[noisy[0].train.rows]).float().mean()
    assert abs(right - .1) < .05 and y.unique().numel() == 10 and (y[0] != y[1]).any()   # all drawn anew: a tenth is right; 1,292 labels, six standard errors
    some = WarmStart(d, fraction=.5, label_noise=.25, seeds=[1]); drawn = some._draw(1, 0)
    assert abs((drawn[1] != d.train.y[drawn[0]]).float().mean() - .225) < .05
    for task in noisy:
        for view, split in (task.val, d.val), (task.test, d.test): assert torch.equal(view.fetch(every(view))[1][0], split.y)


@pytest.mark.parametrize("data", DATA)
def test_chunks_alone_are_a_partition_and_together_they_grow(data):
    d = DATA[data]; alone, grown = (Chunks(d, tasks=7, cumulative=c, seeds=[0, 1]) for c in (False, True))
    for r in range(2):
        rows = [t.train.rows[r] for t in alone]
        assert torch.equal(torch.cat(rows).sort()[0], torch.arange(len(d.train)))
        for k, t in enumerate(grown): assert torch.equal(t.train.rows[r].sort()[0], torch.cat(rows[:k + 1]).sort()[0])


def test_rows_of_takes_few_and_none():
    assert rows_of(torch.tensor([0, 1, 1, 2, 0]), [[0, 2], [1, 0]], True).tolist() == [[0, 3], [1, 0]]
    assert rows_of(torch.tensor([0, 1, 1, 2, 0]), [[2], [1]], False).tolist() == [[3, -1], [1, 2]]


# ---- loss and accuracy

@settings(max_examples=30, deadline=None)
@given(active=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), seed=st.integers(0, 1000))
def test_the_masked_loss_is_that_of_the_sliced_logits(active, seed):
    g = torch.Generator().manual_seed(seed); classes = torch.tensor([active]); ids = classes[0].nonzero()[:, 0]
    z = torch.randn(1, 8, 6, dtype=torch.float64, generator=g, requires_grad=True); where = torch.randint(len(ids), (8,), generator=g)
    masked_cross_entropy(z, ids[where][None], classes).sum().backward()
    sliced = z.detach()[0][:, ids].requires_grad_(); F.cross_entropy(sliced, where, reduction="sum").backward()
    assert (z.grad[0][:, ids] - sliced.grad).abs().max() < 1e-12 and (z.grad[0][:, ~classes[0]] == 0).all()
    assert classes[0][mask_logits(z, classes).argmax(-1)].all()


@settings(max_examples=30, deadline=None)
@given(active=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), seed=st.integers(0, 1000))
def test_a_soft_label_costs_the_mean_of_its_classes(active, seed):
    g = torch.Generator().manual_seed(seed); classes = torch.tensor([active]); z = torch.randn(1, 8, 6, dtype=torch.float64, generator=g, requires_grad=True)
    q = torch.rand(1, 8, 6, dtype=torch.float64, generator=g) * classes; q /= q.sum(-1, keepdim=True)
    soft = masked_cross_entropy(z, q, classes); soft.sum().backward()
    slow = sum(q[..., c] * masked_cross_entropy(z.detach(), torch.full((1, 8), c), classes) for c in classes[0].nonzero()[:, 0].tolist())
    assert (soft - slow).abs().max() < 1e-12 and (z.grad[0][:, ~classes[0]] == 0).all() and z.grad.isfinite().all()
    assert (z.grad - (mask_logits(z.detach(), classes).softmax(-1) - q)).abs().max() < 1e-12
    best = mask_logits(z, classes).argmax(-1)
    assert torch.equal(hits(mask_logits(z, classes), q), q.gather(-1, best[..., None])[..., 0])


def test_accuracy_among_the_task_s_classes_and_among_all():
    view = View(DATA["digits"], DATA["digits"].train, torch.zeros(1, 1, dtype=int), "unit"); classes = torch.zeros(1, 10, dtype=bool); classes[0, [3, 7]] = True
    z = torch.zeros(1, 2, 10); z[..., 0] = 5.; z[0, 0, 3] = z[0, 1, 7] = 1.
    task = Task("", 0, view, None, None, classes)
    assert task.correct(z, torch.tensor([[3, 3]])).tolist() == [[True, False]] and task.correct_all(z, torch.tensor([[3, 0]])).tolist() == [[False, True]]


# ---- refusals

@pytest.mark.parametrize("kind, wrong, says", [
    ("class_split", dict(tasks=6, classes_per_task=2), "stream.tasks=6: .*At most 5 tasks"), ("class_split", dict(tasks=1, classes_per_task=11), "stream.classes_per_task=11: there are 10"),
    ("class_split", dict(partitions=[[0], []]), "stream.partitions=.*no class"), ("class_split", dict(partitions=[[10]]), "class 10 is unknown"),
    ("class_split", dict(partitions=[[0, 1], [1]]), "class 1 is unknown or there twice"), ("class_split", dict(partitions=[]), "stream.partitions"),
    ("growing_classes", dict(tasks=6, classes_per_task=2), "stream.tasks=6: .*At most 5"), ("growing_classes", dict(classes_per_task=0), "stream.classes_per_task=0"),
    ("binary_pairs", dict(tasks=46), "stream.tasks=46: 10 classes have 45 pairs"), ("alternating", dict(hard_classes=11), "stream.hard_classes=11: .*there are 10"),
    ("alternating", dict(easy_classes=0), "stream.easy_classes=0: .*at least 1"), ("warm_start", dict(fraction=1.), r"stream.fraction=1.0: .*less than 1"),
    ("warm_start", dict(fraction=0.), "stream.fraction=0.0: .*more than 0"), ("warm_start", dict(label_noise=1.5), "stream.label_noise=1.5: .*at most 1"),
    ("rotated_inputs", dict(max_angle=0.), "stream.max_angle=0.0: .*180"), ("rotated_inputs", dict(max_angle=200.), "stream.max_angle=200.0: .*180"),
    ("random_labels", dict(examples=0), "stream.examples=0"), ("permuted_pixels", dict(tasks=0), "stream.tasks=0: .*at least 1"), ("chunks", dict(tasks=0), "stream.tasks=0")])
def test_what_the_numbers_of_classes_forbid_is_refused_with_and_without_data(kind, wrong, says):
    with pytest.raises(LopError, match=says): kinds[kind](DATA["digits"], **wrong)
    with pytest.raises(LopError, match=says): check_stream(kind, dict(name=kind) | wrong, config.sizes["digits"][2])


@pytest.mark.parametrize("kind, wrong, says", [("random_labels", dict(examples=10**6), "stream.examples=1000000: there are 1293"), ("chunks", dict(tasks=500), "stream.tasks=500: the smallest class has 125"),
                                               ("warm_start", dict(fraction=.001), "stream.fraction=0.001: the smallest class has 125")])
def test_what_the_data_forbid_is_refused(kind, wrong, says):
    check_stream(kind, wrong, 10)
    with pytest.raises(LopError, match=says): kinds[kind](DATA["digits"], **wrong)


def test_the_defaults_are_legal_for_the_digits_and_unknown_names_are_not():
    for name, c in config.streams().items(): assert len(kinds[name](None if name == BitFlips.name else DATA["digits"], **check_stream(name, config.settings(c), 10))) == check_stream(name, {}, 10).get("tasks", 2)
    with pytest.raises(LopError, match="Did you mean 'class_split'"): check_stream("class_splits", {}, 10)
    with pytest.raises(LopError, match="Did you mean 'tasks'"): check_stream("class_split", dict(task=3), 10)


# ---- passages

@settings(max_examples=60, deadline=None)
@given(share=st.floats(.01, .99), increments=st.integers(1, 50) | st.none(), seed=st.integers(0, 99))
def test_the_way_begins_at_0_ends_at_1_and_never_turns_back(share, increments, seed):
    p = torch.cat([torch.zeros(1), torch.rand(500, generator=torch.Generator().manual_seed(seed)), torch.tensor([share])]).sort()[0]
    a = level(p, share, increments)
    assert a[0] == 0 and (a.diff() >= 0).all() and (a[p >= share] == 1).all() and a.max() <= 1
    if increments is None: assert (a - (p / share).clamp(max=1)).abs().max() < 1e-6
    else: assert torch.isin(a, torch.arange(increments + 1) / increments).all()


def test_levels_last_equally_long():
    p = torch.arange(1000) / 1000 + .0005   # the middles of a thousand equal parts
    assert torch.equal(level(p, .4, 8).unique(return_counts=True)[1], torch.tensor([50]*8 + [600]))


@pytest.mark.parametrize("kind, data, how", WAYS)
def test_a_way_meets_the_old_task_and_the_new_one_bit_for_bit(kind, data, how):
    stream = make(kind, data); way = Passage(stream, how, .25, None)
    for k in range(1, len(stream)):
        old, new, task = stream[k - 1], stream[k], way[k]; train, pick = task.train, every(task.train)
        before = train.partner if how == "sampling" else pick
        hard = (lambda y: F.one_hot(y, way.num_classes).float()) if how == "labels" else (lambda y: y)
        for p, (x, y) in (0, old.train.fetch(before)), (.25, new.train.fetch(pick)), (.99, new.train.fetch(pick)):
            x2, y2 = train.fetch(pick, progress=now(train, p))
            assert torch.equal(x2, x) and torch.equal(y2, hard(y)) and x2.dtype == torch.float32
        for t, u in zip(train.fetch(pick), new.train.fetch(pick)): assert torch.equal(t, u)   # asked by a probe
        assert task.train.n == new.train.n and task.train.valid.all()                         # as many examples as at once
        for v, w in zip(views(task)[1:], views(new)[1:]):
            for t, u in zip(v.fetch(every(v)), w.fetch(every(w))): assert torch.equal(t, u)
    assert type(way[0].train) is View


@pytest.mark.parametrize("kind, data, how", WAYS)
def test_a_passage_is_made_again_from_its_record_and_a_replica_is_that_of_its_seed(kind, data, how):
    way = Passage(make(kind, data), how, .5, 4); again = from_record(json.loads(json.dumps(way.record())), DATA[data])
    assert again.record() == way.record() and way.seeded([7]).record() == Passage(make(kind, data, [7]), how, .5, 4).record() != way.record()
    for r, alone in enumerate([way.seeded([3]), way.seeded([5])]):
        views_ = way[1].train, again[1].train, alone[1].train
        (x, y), (x2, y2), (x1, y1) = (v.fetch(every(v), progress=now(v, .3)) for v in views_)
        assert torch.equal(x, x2) and torch.equal(y, y2) and torch.equal(x[r], x1[0]) and torch.equal(y[r], y1[0])


@pytest.mark.parametrize("kind", PICTURES)
def test_the_ways_that_a_stream_declares_are_those_that_its_tasks_allow(kind):
    "inputs: same rows, same labels; labels: same rows, same look"
    old, new = make(kind)[0].train, make(kind)[1].train
    rows = torch.equal(old.rows, new.rows); labels = rows and torch.equal(old.label(every(old)), new.label(every(new)))
    look = rows and torch.equal(*(v.fetch(every(v))[0] for v in (old, new)))
    assert ("inputs" in kinds[kind].passages) == (labels and not look) and ("labels" in kinds[kind].passages) == (look and not labels)
    for how in {"inputs", "labels"} - set(kinds[kind].passages):
        with pytest.raises(LopError, match=f"passage.how={how}: the tasks of {kind} .*sampling"): Passage(make(kind), how)


def test_a_declaration_that_is_false_is_found_out():
    class Liar(ClassSplit): passages = ("inputs", "labels", "sampling")
    for how in "inputs", "labels":
        with pytest.raises(LopError, match=f"passage.how={how}: tasks 0 and 1 don't have the same training rows"): Passage(Liar(DATA["digits"]), how)[1]


@settings(max_examples=20, deadline=None)
@given(p=st.floats(0, .4990234375), kind=st.sampled_from(["permuted_pixels", "rotated_inputs"]))
def test_mixed_inputs_are_the_formula(p, kind):
    stream = make(kind, "colourful", normalize="unit"); train = Passage(stream, "inputs", .5, None)[2].train; a = 2 * p
    x, y = train.fetch(every(train), progress=now(train, p)); (u, y0), (v, _) = (stream[k].train.fetch(every(train)) for k in (1, 2))
    assert (x - ((1 - a) * u + a * v)).abs().max() < 1e-6 and torch.equal(y, y0)


@settings(max_examples=30, deadline=None)
@given(a=st.floats(0, 1, width=32), old=st.integers(0, 4), new=st.integers(0, 4))
def test_melted_labels_are_the_formula(a, old, new):
    q = melt(torch.tensor(old), torch.tensor(new), torch.tensor(a), 5); one = lambda c: torch.eye(5)[c]
    half = melt(torch.full((101,), old), torch.full((101,), new), torch.arange(101) / 100, 5).argmax(-1)
    assert set(half[:50].tolist()) == {old} and set(half[51:].tolist()) == {new}
    assert (q - ((1 - 2*a) * one(old) + 2*a/5 if a < .5 else (2*a - 1) * one(new) + (2 - 2*a)/5)).abs().max() < 1e-6
    assert abs(q.sum() - 1) < 1e-6 and q.min() >= 0


@pytest.mark.parametrize("kind, data", EVERY)
def test_sampling_keeps_its_share_of_old_examples_and_each_place_changes_once(kind, data):
    stream = make(kind, data); way = Passage(stream, "sampling", .5, 10)
    for k in range(1, len(stream)):
        old, new, train = stream[k - 1].train, stream[k].train, way[k].train; n = train.n; last = torch.ones(2, n, dtype=bool)
        assert torch.equal(train.until.sort(1)[0], torch.arange(1, n + 1).expand(2, -1) / n)
        assert (train.until[0] != train.until[1]).any() and (train.partner[0] != train.partner[1]).any()
        uses = torch.stack([p.bincount(minlength=old.n) for p in train.partner])
        assert uses.shape == (2, old.n) and uses.max() - uses.min() <= 1   # unequal numbers of rows: each old example as often as any other
        for i in range(10):
            is_old = level(now(train, .05*i + .01), .5, 10) < train.until
            assert abs(is_old.float().mean() - (1 - i/10)) <= 1 / n + 1e-6 and (is_old <= last).all(); last = is_old
            _, y = train.fetch(every(train), progress=now(train, .05*i + .01))
            assert torch.equal(y, torch.where(is_old, old.label(train.partner), new.label(every(train))))


@pytest.mark.parametrize("how, kind", [("inputs", "permuted_pixels"), ("labels", "random_labels"), ("sampling", "permuted_pixels"), ("sampling", "class_split")])
def test_augmentation_is_done_once_to_raw_pictures(how, kind):
    train = Passage(make(kind), how, .5)[1].train; calls = []
    def change(x): calls.append(x.dtype); return 255 - x
    x, _ = train.fetch(every(train), change, now(train, .2)); plain, _ = train.fetch(every(train), progress=now(train, .2))
    assert calls == [torch.uint8]
    scaled = DATA["digits"]; lo, hi = (scaled.scale(torch.full((1, 1, 1), v, dtype=torch.uint8)).item() for v in (0, 255))
    assert (x + plain - (lo + hi)).abs().max() < 1e-5   # the negative of each picture, mixed or not


def test_between_class_splits_each_label_is_judged_among_its_own_task_s_classes():
    stream = ClassSplit(DATA["digits"], partitions=[[0, 1, 2], [3, 4]], seeds=[0, 1]); old, new = stream; task = Passage(stream, "sampling", .5, None)[1]
    g = generator(0, "z")
    for p in (0, .2, .4, .5, .8):
        _, y = task.train.fetch(every(task.train), progress=now(task.train, p)); z = torch.randn(*y.shape, 10, generator=g, requires_grad=True)
        loss = task.loss(z, y); loss.sum().backward()
        assert loss.isfinite().all() and z.grad.isfinite().all() and (z.grad[..., 5:] == 0).all()
        is_old = y < 3
        for t, mine in (old, is_old), (new, ~is_old): assert torch.equal(loss[mine], t.loss(z, y)[mine]) and torch.equal(task.correct(z, y)[mine], t.correct(z, y)[mine])
    assert task.active.sum(1).tolist() == [5, 5] and task.classes.sum(1).tolist() == [2, 2]
    x, y = task.test.fetch(every(task.test)); z = torch.randn(*y.shape, 10, generator=g); ok = task.test.valid
    assert torch.equal(task.loss(z, y)[ok], new.loss(z, y)[ok])   # what is reported of the new task is what an abrupt one reports


def test_few_places_hold_old_examples_of_all_classes():
    "the rows of a class split stand class by class: the first so many would be all of one class"
    train = Passage(ClassSplit(DATA["digits"], partitions=[[0, 1, 2, 3, 4, 5, 6], [7]], seeds=[0, 1]), "sampling", .5)[1].train
    for y in train.fetch(every(train), progress=now(train, 0))[1]: assert y.bincount(minlength=7).min() > 0 and len(y) == 125


def test_between_growing_classes_nothing_is_infinite():
    for task in Passage(make("growing_classes"), "sampling", .5):
        view = task.train
        for p in (0, .3, .9):
            _, y = view.fetch(every(view), progress=now(view, p)); assert task.loss(torch.zeros(*y.shape, 10), y).isfinite().all()


def test_soft_labels_are_scored_by_the_mass_on_the_prediction():
    task = Passage(make("random_labels"), "labels", .5, None)[1]; _, y = task.train.fetch(every(task.train), progress=now(task.train, .125))   # a = ¼
    old = make("random_labels")[0].train; z = F.one_hot(old.label(every(old)), 10).float()
    assert y.shape == (2, task.train.n, 10) and (task.correct(z, y) - .55).abs().max() < 1e-6 and torch.equal(task.correct_all(z, y), task.correct(z, y))
    assert (task.loss(torch.zeros_like(z), y) - torch.tensor(10.).log()).abs().max() < 1e-5


def test_none_is_the_stream_as_it_is():
    stream = make("class_split"); way = Passage(stream, "none")
    assert type(way[1].train) is View and from_record(way.record(), DATA["digits"]).record() == way.record() and len(way) == 3


@pytest.mark.parametrize("wrong, says", [(dict(how="input"), "Did you mean 'inputs'"), (dict(how="inputs"), "passage.how=inputs"), (dict(how="sampling", share=0.), "passage.share=0.0"),
                                         (dict(how="sampling", share=1.), "passage.share=1.0"), (dict(how="sampling", increments=0), "passage.increments=0")])
def test_wrong_passages_are_refused_with_and_without_data(wrong, says):
    with pytest.raises(LopError, match=says): Passage(make("class_split"), **wrong)
    with pytest.raises(LopError, match=says): check_passage("class_split", **wrong)


def test_a_stream_of_one_s_own_can_be_passed_through_and_has_the_binary_head_where_it_asks_for_one():
    class Mirrors(Stream):
        name = "mirrors"
        def _draw(self, seed, k): return torch.tensor([k % 2])
        def _task(self, k, flipped): return Task(f"mirror {k}", k, *self._views(angles=180. * flipped[:, 0]), self._every_class())
    way = Passage(Mirrors(DATA["digits"], tasks=2, seeds=[0]), "sampling")
    assert way[1].train.fetch(every(way[1].train), progress=now(way[1].train, .3))[0].shape == (1, 1293, 1, 8, 8)
    assert Passage(make("binary_pairs"), "sampling").num_classes == 2
