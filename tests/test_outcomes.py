"Outcomes against loops written from their definitions, and the bootstrap against scipy and against the truth."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from lop_nb.outcomes import (accuracy_matrix, average_online_accuracy, backward_transfer, bootstrap, by_task, end_of_task, expanded, final_average, forgetting, forward_transfer,
                             initial_accuracy, learning_speed, learning_speeds, of_run, outcome_table, plasticity_gap, warm_start_gap)
from lop_nb.runtime import LopError


def matrices(T, R=3, seed=0): return np.random.default_rng(seed).random((R, T, T))


# ---- matrices ----
@pytest.mark.parametrize("T", [2, 3, 7])
def test_the_definitions_as_loops(T):
    A, b = matrices(T), np.random.default_rng(1).random((3, T))
    for r, a in enumerate(A):
        assert final_average(A)[r] == pytest.approx(sum(a[T-1, j] for j in range(T)) / T, abs=1e-12)
        assert backward_transfer(A)[r] == pytest.approx(sum(a[T-1, j] - a[j, j] for j in range(T - 1)) / (T - 1), abs=1e-12)
        assert forgetting(A)[r] == pytest.approx(sum(max(a[i, j] for i in range(T - 1)) - a[T-1, j] for j in range(T - 1)) / (T - 1), abs=1e-12)
        assert forward_transfer(A, b)[r] == pytest.approx(sum(a[j-1, j] - b[r, j] for j in range(1, T)) / (T - 1), abs=1e-12)

def test_the_best_is_taken_over_what_was_measured():
    A = matrices(5); A[:, ~np.tri(5, dtype=bool)] = np.nan
    for r, a in enumerate(A): assert forgetting(A)[r] == pytest.approx(np.mean([max(a[i, j] for i in range(j, 4)) - a[4, j] for j in range(4)]), abs=1e-12)
    assert not np.isnan([backward_transfer(A), final_average(A)]).any() and np.isnan(forward_transfer(A, np.zeros((3, 5)))).all()

def test_a_replica_that_is_nan_is_nan_alone():
    A = matrices(4); A[1] = np.nan
    for f in (final_average, backward_transfer, forgetting): assert np.isnan(f(A)).tolist() == [False, True, False]
    assert np.isnan(learning_speed([[.1, .9], [.1, np.nan], [np.nan, .9]], [0, 1])).tolist() == [False, True, True]

@given(st.integers(2, 6), st.integers(0, 99), st.floats(-1, 1))
@settings(max_examples=30, deadline=None)
def test_properties_of_matrices(T, seed, c):
    A = matrices(T, seed=seed)
    f, bwt = forgetting(A), backward_transfer(A)
    assert (f >= -bwt - 1e-12).all()                                                     # the best is at least what it was when learnt
    np.testing.assert_allclose([forgetting(A + c), backward_transfer(A + c), final_average(A + c) - c], [f, bwt, final_average(A)], atol=1e-9)
    np.testing.assert_allclose(forgetting(A[1]), f[1]); np.testing.assert_allclose(forgetting(A[None])[0], f)

@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 3)), np.zeros((2, 0, 0))])
def test_what_is_no_matrix_is_refused(bad):
    for f in (final_average, backward_transfer, forgetting):
        with pytest.raises(LopError, match="a row and a column for each task"): f(bad)

def test_gaps():
    np.testing.assert_allclose(plasticity_gap([[.9, .7]], [[.8, .8]]), [[-.1, .1]])
    assert warm_start_gap(.7, .9) == pytest.approx(.2) and average_online_accuracy([[.2, .4], [1, 1]]).tolist() == pytest.approx([.3, 1])


# ---- learning speed ----
def slow_speed(v, t, level):
    for k in range(len(v)):
        if v[k] >= level:
            return t[k] if k == 0 or v[k] == v[k-1] else t[k-1] + (t[k] - t[k-1]) * (level - v[k-1]) / (v[k] - v[k-1])
    return np.inf

@given(st.lists(st.floats(.01, 1), min_size=2, max_size=6), st.floats(.1, 1), st.sampled_from([None, .5, 1.5]))
@settings(max_examples=60, deadline=None)
def test_learning_speed_as_a_loop(v, share, final):
    t = np.arange(len(v)) * 10.
    want = slow_speed(v, t, share * (v[-1] if final is None else final))
    assert learning_speed(v, t, share, final) == pytest.approx(want, abs=1e-6)
    assert learning_speed([v, v], t, share, final)[1] == pytest.approx(want, abs=1e-6)

def test_learning_speed_of_several_with_their_own_yardstick():
    np.testing.assert_allclose(learning_speed([[0., 1.], [0., 1.]], [0, 10], .5, [1., .4]), [5, 2])


# ---- the bootstrap ----
@pytest.mark.parametrize("method", ["percentile", "BCa", "basic"])
def test_the_plain_intervals_are_scipys(method):
    v = np.random.default_rng(3).exponential(size=40)
    low, high = stats.bootstrap((v,), np.mean, method=method, random_state=np.random.default_rng(7)).confidence_interval
    mine = bootstrap(v, method=method)
    spread = (high - low) * .05                                                          # other draws, 9,999 of them
    assert mine.estimate == v.mean() and abs(mine.low - low) < spread and abs(mine.high - high) < spread
    assert mine == bootstrap(v, method=method) != bootstrap(v, method=method, seed=1)

def test_the_expanded_level():
    assert expanded(10**7) == pytest.approx(.95, abs=1e-6)                              # nothing to mend
    assert expanded(5) == pytest.approx(1 - 2 * stats.norm.cdf(-(5/4)**.5 * 2.7764451), abs=1e-7)
    assert [expanded(n) > expanded(n + 1) for n in (2, 3, 10)] == [True]*3

def test_it_holds_the_truth_as_often_as_it_says():
    "400 studies of 10 normal replicas; four standard errors of a count of 400"
    rng, held = np.random.default_rng(0), dict(expanded=0, percentile=0)
    for _ in range(400):
        v = rng.normal(size=10)
        for m in held: _, low, high = bootstrap(v, method=m, resamples=999); held[m] += low <= 0 <= high
    assert abs(held["expanded"]/400 - .95) < 4 * (.95 * .05 / 400)**.5 and held["percentile"] < held["expanded"]

def test_pairs_are_drawn_together():
    a = np.random.default_rng(0).normal(10, 5, 12)
    pair = bootstrap((a, a + 1), lambda a, b: (b - a).mean())
    assert pair == pytest.approx((1, 1, 1), abs=1e-12)
    curves = np.stack([a, a], 1)
    np.testing.assert_allclose(bootstrap(curves), bootstrap(a), rtol=.05)               # whole replicas, not single numbers

def test_edges_of_the_bootstrap():
    assert bootstrap([.3]*5) == (.3, .3, .3)
    one = bootstrap([.3]); assert one.estimate == .3 and np.isnan(one[1:]).all()
    assert np.isnan(bootstrap([.1, np.nan, .2])).all()
    for bad in ([], 3., ([1., 2.], [1.])):
        with pytest.raises(LopError, match="at least one replica"): bootstrap(bad)
    with pytest.raises(LopError, match="Did you mean 'percentile'"): bootstrap([1., 2.], method="percentil")


# ---- records ----
def records(values, metric="test_accuracy", split="test", run="a", epoch=1):
    "Rows for values [R, T]; seeds 5, 6, …, a step a task"
    R, T = np.shape(values)
    return pd.DataFrame([dict(run=run, replica=r, seed=5 + r, task=t, epoch=epoch, step=10*(t + 1), examples=0, split=split, layer="", metric=metric, value=values[r][t]) for r in range(R) for t in range(T)])

def test_a_matrix_goes_into_records_and_comes_back():
    A = matrices(4)
    rows = pd.concat([records(A[:, :, j], "other_accuracy", f"test/{j}") for j in range(4)])
    start = pd.concat([records(A[:, :1, j] / 2, "other_accuracy", f"test/{j}", epoch=0).assign(step=0) for j in range(4)])
    df = pd.concat([start, rows]).sample(frac=1, random_state=0)                        # in any order
    np.testing.assert_array_equal(accuracy_matrix(df), A); np.testing.assert_array_equal(initial_accuracy(df), A[:, 0] / 2)
    want = dict(final_average=final_average(A), backward_transfer=backward_transfer(A), forgetting=forgetting(A), forward_transfer=forward_transfer(A, A[:, 0] / 2))
    for k, v in of_run(df).items(): np.testing.assert_allclose(v, want[k], atol=1e-12)
    assert set(of_run(df)) == set(want) and "forward_transfer" not in of_run(rows)

def test_the_last_value_of_a_task():
    df = pd.concat([records([[.1, .2]]), records([[.5, .6]]).assign(step=lambda d: d.step + 5)])
    assert by_task(df).tolist() == [[.5, .6]] and len(end_of_task(df)) == 2

def test_speeds_from_records():
    curve = pd.concat([records([[v, v]], "val_accuracy", "val", epoch=e).assign(step=lambda d: 100*d.task + 10*e) for e, v in enumerate([0., .5, 1.])])
    np.testing.assert_allclose(learning_speeds(curve), [[18, 18]]); np.testing.assert_allclose(learning_speeds(curve, final=[[.5, 1.]]), [[9, 18]])

def test_the_table():
    own, fresh = np.array([[.9, .5], [.9, .7], [.9, .6]]), np.full((3, 2), .9)
    df = pd.concat([records(own), records(own, "online_accuracy", "train")])
    t = outcome_table(df, records(fresh, run="fresh")).set_index("outcome")
    assert t.estimate.to_dict() == pytest.approx(dict(average_online_accuracy=.75, plasticity_gap=.15, plasticity_gap_last_task=.3)) and set(t.replicas) == {3}
    assert tuple(t.loc["plasticity_gap_last_task", ["estimate", "low", "high"]]) == pytest.approx(bootstrap([.4, .2, .3]), abs=1e-12)
    assert (t.low <= t.estimate).all() and (t.estimate <= t.high).all()
    for other in (records(fresh[:2]), records(fresh[:, :1]), records(fresh).assign(seed=0), records(fresh, "train_accuracy")):
        with pytest.raises(LopError, match="same tasks and seeds"): outcome_table(df, other)
    assert outcome_table(records(own, "dead_fraction")).empty
