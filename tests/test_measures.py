"What every measure of activations keeps: its type, its input, its neighbours; and that it reads nothing back."
import math
from functools import partial

import pytest, torch

import test_activity, test_copies, test_normality, test_ranks
from lop_nb.activity import distance, histogram, slopes
from lop_nb.copies import random_layers
from lop_nb.normality import non_gaussianity
from measuring import close, normal

EVERY = [*test_activity.PURE, *test_copies.PURE, *test_ranks.PURE, *(partial(non_gaussianity, kind=k) for k in test_normality.MOST)]
every = pytest.mark.parametrize("f", EVERY)


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_not_finite(f, poison, dtype):
    "One value spoils its own replica, layer, … and no other, and nothing raises"
    h = normal(2, 3, 12, 9, dtype=dtype); clean = f(h); h[1, 0, 4, 2] = poison; out = f(h)
    assert out[1, 0].isnan() and out.isnan().sum() == 1 and torch.equal(out[~out.isnan()], clean[~out.isnan()])
    assert f(torch.full((5, 4), poison, dtype=dtype)).isnan()

@every
def test_types(f):
    "Half precision is measured as the numbers that it holds; at least float32 comes back"
    h = normal(12, 9, dtype=torch.float32).relu()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert f(h.to(dtype)).dtype == torch.float32
        close(f(h.to(dtype)), f(h.to(dtype).double()), 1e-6)
    assert f(h.double()).dtype == torch.float64

@every
def test_input_is_left_alone(f):
    h = torch.randn(12, 9); before = h.clone()
    assert not f(h.requires_grad_()).isnan() and torch.equal(h, before)

OTHERS = [lambda h: histogram(h, torch.ones(4, device="meta"))[..., 0], lambda h: distance(h, h[0]), lambda h: slopes(torch.tanh, h)[..., 0, 0], lambda h: random_layers(h, [5, 4], repeats=3)[1][:, 0, 0, 0]]
@pytest.mark.parametrize("f", [*EVERY, *OTHERS])
def test_reads_nothing_back(f):
    "Meta tensors have no values: a branch on one, or an .item(), would raise"
    assert f(torch.empty(3, 20, 8, device="meta")).shape == (3,)
