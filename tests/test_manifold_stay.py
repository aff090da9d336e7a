"Who stays a clone under which rule: the table of 39_cloning, each of its rows, shortened to 20 steps."
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parent.parent/"nbs"/"experiments"
sys.path.insert(0, str(EXPERIMENTS))
import stay_study as study  # noqa: E402

COPIES, EQUITABLE, GONE = 1e-24, 1e-20, 1e-8     # departures: what rounding may make of copies and of an equitable start in float64; and what it can't
SINGLE = 1e-12                                   # of copies in float32
DIVIDED = 1e-20                                  # a bias before batch norm, or the weight of a constant pixel, has no gradient but rounding, 1e-17; over ε = 1e-8 that is 1e-9 of the rate each step


@pytest.mark.parametrize("kind,rule", study.cases())
def test_who_stays(kind, rule):
    copies, equitable = study.stay(kind, rule, 20)[20]
    make, how, *stays, why = study.rules[rule]
    bounds = (SINGLE if how.get("dtype") == torch.float32 else DIVIDED if rule.startswith(("Adam", "RMSprop")) else COPIES), EQUITABLE
    for value, stay, bound in zip((copies, equitable), stays, bounds):
        if stay is not None: assert value < bound if stay else value > GONE, why


def test_adam_divides_rounding_too():
    "copies under Adam part, by rounding, where batch norm leaves no gradient: in the biases before it and the weights of constant pixels; with layer norm nowhere"
    base, big = study.start("mlp"); study.train(big, torch.optim.Adam(big.params.values(), .003), 100)
    parts = {n: p[0].unflatten(0, (-1, 3)) for n, p in big.params.items() if p.shape[1] % 3 == 0}
    apart = {n: (q - q[:, :1]).abs().max().item() for n, q in parts.items()}
    unseen = "linear_0.weight", "linear_0.bias", "linear_1.bias"
    assert all(apart[n] > 1e-13 for n in unseen) and max(v for n, v in apart.items() if n not in unseen) < 1e-14
    assert study.stay("vit", "Adam", 100)[100][0] < 1e-28


def test_muon_leaves_by_rounding_alone():
    "in exact arithmetic it would stay: with the rounding of the gradients taken off at each step it does"
    left, kept = (study.stay("mlp", rule, 200) for rule in ("Muon", "Muon, rounding taken off"))
    assert max(left[200]) > 1e-4 and max(left[20]) < 1e-20 and all(max(pair) < 1e-24 for pair in kept.values())
    block = torch.randn(4, 6, dtype=torch.float64).repeat_interleave(3, 0).repeat_interleave(3, 1)[None]
    done = study.Muon([torch.nn.Parameter(block)]).orthogonal(block)[0].unflatten(0, (4, 3)).unflatten(2, (6, 3))
    assert (done - done[:, :1, :, :1]).abs().max() < 1e-12


def test_data_parallel():
    "two processes, each with half of each batch; without batch norm they do what one would"
    found = study.data_parallel(20)
    for kind, ((copies, equitable), total) in found.items(): assert copies < COPIES and equitable < EQUITABLE, kind
    base, big = study.start("vit"); study.train(big, torch.optim.SGD(big.params.values(), .02), 20)
    assert abs(found["vit"][1] - sum(p.detach().sum().item() for p in big.params.values())) < 1e-9


def test_the_published_table_is_this_one():
    table = pd.read_parquet(EXPERIMENTS/"results"/"stay.parquet")
    assert set(table.rule) == {*study.rules, "SGD, two processes"} and table.step.max() == 400
    assert {(r.network, r.rule) for r in table.itertuples()} == {*study.cases(), *((kind, "SGD, two processes") for kind in study.networks)}
    for rule, why in {(r.rule, r.why) for r in table.itertuples()}: assert rule == "SGD, two processes" or study.rules[rule][4] == why
