"The rows of the sources' feature table that speak of theory: each test says in our words what its row asks for."
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lop_nb.activity import slopes
from lop_nb.data import load
from lop_nb.layers import make_activation
from lop_nb.models import MLP
from lop_nb.ranks import effective_rank, spectrum
from lop_nb.replicas import Replicas
from lop_nb.runtime import generator
from lop_nb.theory import alpha_f, duplicate_pairs, equal_rank, flat_relu, flat_tanh, saturated_units, persistence, predicted_rank, spread_after, stage_rows

NBS = Path(__file__).resolve().parents[2]/"nbs"


def stored(name): return pd.read_parquet(NBS/"experiments"/"results"/f"{name}.parquet")


def figures(notebook):
    "How many pictures the notebook has stored, and its code"
    cells = json.loads((NBS/notebook).read_text())["cells"]
    outs = [o for c in cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    return len(outs), "".join("".join(c["source"]) for c in cells)


@pytest.mark.parametrize("act", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_A83_a_number_for_each_stage(act, norm):
    "at every stage, from the input to the logits: effective rank of the centred covariance; frozen units (flat slope on 95 % of the samples) before each activation; copies by |Pearson| above .95 among units that vary, as a share of all units"
    nets = Replicas(lambda: MLP(64, 10, hidden_sizes=[32, 16], activation=act, normalization=norm, dropout_p=0.), seeds=[0, 1])
    x = load("digits").train.x[:200].float().flatten(1).expand(2, -1, -1)/16
    rows = stage_rows(nets, x); parts = ["Lin", "Nrm", "ActIn", "Act"] if norm != "none" else ["Lin", "ActIn", "Act"]
    assert list(rows) == ["Input", *(f"H{i}_{p}" for i in (1, 2) for p in parts), "Out_Logits"]
    for stage, h in rows.items():
        lam = np.linalg.eigvalsh(np.cov(h[0].double().numpy().T)).clip(0); p = lam[lam > 0]/lam.sum()
        assert abs(effective_rank(h[0], centred=True, squared=True) - math.exp(-(p*np.log(p)).sum())) < 1e-3
        assert duplicate_pairs(h).shape == (2, h.shape[-1], h.shape[-1])
        if stage.endswith("ActIn"): assert torch.equal(saturated_units(slopes(make_activation(act), h)), ((slopes(make_activation(act), h).abs() < 1e-3).double().mean(1) >= .95))


def test_A83_the_study_is_stored():
    "MNIST, four layers of 512, 15 epochs, three activations × three normalisations × three seeds, with the row's three columns at each stage and a rank progression for each activation"
    df = stored("stages"); mnist = df[df.run.str.startswith("mnist")]
    assert set(mnist.run) == {f"mnist/{a}/{n}" for a in ("relu", "tanh", "sigmoid") for n in ("none", "batch", "layer")} and (mnist.groupby("run").seed.nunique() == 3).all()
    assert {"effective_rank", "saturated_fraction", "duplicate_fraction"} <= set(df.metric) and mnist.epoch.max() == 15
    assert set(df[(df.metric == "effective_rank") & (df.run == "mnist/relu/batch")].layer) == {"Input", "Out_Logits", *(f"H{i}_{p}" for i in range(1, 5) for p in ("Lin", "Nrm", "Act"))}
    drawn, _ = figures("experiments/07_stages.ipynb"); assert drawn >= 3


def test_A84_an_unchanged_network_keeps_everything():
    "persistence is #(S_t ∩ S_t+1) / #S_t of each layer's frozen units and pairs of copies: 100 % where nothing changes, and what a loop over sets says elsewhere"
    nets = Replicas(lambda: MLP(64, 10, hidden_sizes=[32], normalization="none", dropout_p=0.), seeds=[0, 1, 2])
    with torch.no_grad(): nets.params["linear_0.bias"][:, :9] = -100.; nets.params["linear_0.weight"][:, 10] = 2*nets.params["linear_0.weight"][:, 11]; nets.params["linear_0.bias"][:, 10] = 2*nets.params["linear_0.bias"][:, 11]
    x = load("digits").train.x[:300].float().flatten(1)/16; order = torch.randperm(64, generator=generator(0, "task", 1))
    sets = []
    for task in (x, x, x[:, order]):
        rows = stage_rows(nets, task.expand(3, -1, -1)); sets.append((saturated_units(slopes(F.relu, rows["H1_ActIn"])), duplicate_pairs(rows["H1_Lin"]).flatten(-2)))
    for kind in (0, 1):
        before, same, after = (s[kind] for s in sets)
        assert before.any(-1).all() and (persistence(before, same) == 1).all()
        for r in range(3):
            S, T = (set(t[r].nonzero()[:, 0].tolist()) for t in (before, after))
            assert abs(persistence(before, after)[r] - len(S & T)/len(S)) < 1e-6


def test_A84_the_study_is_stored():
    "the pictures as they are, then seven permutations, 15 epochs each: persistence of both sets in each layer and seed, beside its chance"
    df = stored("persistence")
    assert df.task.nunique() == 8 and (df.groupby("run").seed.nunique() == 3).all() and set(df[df.metric == "saturated_persistence"].layer) == {"H1_Act", "H2_Act"}
    assert {f"{k}_{what}" for k in ("saturated", "duplicate") for what in ("persistence", "pictures", "share")} <= set(df.metric)
    assert df[df.metric.str.contains("persistence|pictures|share")].value.dropna().between(0, 1).all()


@pytest.mark.parametrize("name, raw, centred", [("relu", 0, .467), ("tanh", .1778, .1778), ("gelu", .0720, .3188)])
def test_A85_alpha(name, raw, centred):
    "quadrature and Gauss-Hermite agree to 1e-6, and both with our notes' numbers, raw and centred"
    f = make_activation(name)
    for c, want in ((False, raw), (True, centred)):
        a, h = alpha_f(f, c), alpha_f(f, c, how="hermite")
        assert abs(a - h) < 1e-6 and abs(a - want) < 5e-4


def test_A85_ranks_and_flat_slopes():
    "rank 10 in 50 units becomes full behind each of five activations; the effective rank's formula holds at ε = .01 with the variance and not with the raw moment; closed forms of flat slopes; four figures"
    g = generator(0, "A85"); x = torch.randn(10_000, 10, generator=g, dtype=torch.float64) @ torch.randn(10, 50, generator=g, dtype=torch.float64)
    count = lambda h: int((spectrum(h, centred=True).square() > 1e-6*spectrum(h, centred=True)[0]**2).sum())
    assert count(x) == 10 and all(count(make_activation(k)(x)) == 50 for k in ("relu", "tanh", "gelu", "sigmoid", "elu"))
    for name in ("relu", "tanh", "gelu"):
        f = make_activation(name); gain = lambda r: r - equal_rank(100, .01)
        exact = gain(equal_rank(100, spread_after(f, .01).item()))
        assert abs(gain(predicted_rank(100, .01, alpha_f(f).item()))/exact - 1) < .15
        assert name == "tanh" or abs(gain(predicted_rank(100, .01, alpha_f(f, centred=False).item()))/exact - 1) > .7
    z = torch.randn(200_000, generator=g, dtype=torch.float64)
    assert abs((slopes(lambda z: torch.tanh(20*z), z) < 1e-4).double().mean() - flat_tanh(20.)) < 5e-3
    assert abs((slopes(lambda z: F.relu(z - 1), z) == 0).double().mean() - flat_relu(-1.)) < 5e-3
    drawn, code = figures("api/38_theory.ipynb"); assert drawn >= 5 and all(k in code for k in ("ReLU(az + b)", "SELU(az + b)", "tanh(a(z + b))", "sigmoid(a(z + b))"))


def test_A86_four_variants_over_a_hundred_steps():
    "gradient ascent of ‖Y‖² for one linear layer, plain, batch, layer and weight norm: mean and deviation of the pairwise cosines over 100 steps, three seeds, 1000 × 1000"
    df = stored("normalization")
    assert {"none", "batch", "layer", "weight"} <= set(df.kind) and (df.groupby("kind").seed.nunique() == 3).all() and df.step.max() == 100
    assert {f"{side} {k}" for side in ("units", "rows") for k in ("mean", "std")} <= set(df.metric)
    start = df[(df.step == 0) & (df.metric == "rows std")].value
    assert (start - 1/math.sqrt(1000)).abs().max() < 1e-3                      # random rows of 1000 numbers
    plain = df[(df.kind == "none") & (df.metric == "objective")].pivot(index="step", columns="seed", values="value").iloc[1:]
    assert (plain.diff().iloc[1:] > 0).all().all()                             # it climbs
    assert figures("experiments/06_normalization.ipynb")[0] >= 2


def test_A87_three_pictures_of_a_true_manifold():
    "a manifold with its field, trajectories and tangency, of a network and a task that exist: on w₁ = w₂ the gradient has no part across, off it it has, on any labels; and the pictures are there"
    x, n = torch.randn(300, generator=generator(0, "A87"), dtype=torch.float64), torch.tensor([1., -1., 0.], dtype=torch.float64)
    def gradient(p, y): return torch.func.grad(lambda p: ((p[2]*(F.softplus(p[0]*x) + F.softplus(p[1]*x)) - y)**2).mean())(p)
    for seed in range(5):
        g = generator(seed, "labels"); y, p = torch.randn(300, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
        assert gradient(p, y) @ n != 0
        p[1] = p[0]; assert gradient(p, y) @ n == 0 and gradient(p, y).norm() > 0
    _, code = figures("api/38_theory.ipynb"); assert code.count('projection="3d"') >= 1 and "plt.subplots(1, 3, figsize=(12, 4), subplot_kw" in code
