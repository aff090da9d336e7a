"Rows B15 to B24, B29 and B31 to B35 of the sources: winning tickets along a stream, each as a test."
import json

import pandas as pd
import pytest
import torch

from lop_nb import figures
from lop_nb.compose import compose
from lop_nb.experiments import load_run, run_study
from lop_nb.imp import random_masks
from lop_nb.masks import densities, full
from lop_nb.ntk import kernel, kernel_measures, mean_gradient_inner_product
from lop_nb.overlap import aggregate, average, chance, jaccard, pair_overlap, pairs, plastic_masks
from lop_nb.pipeline import Tickets, arm_table, run_tickets, ticket_rows
from lop_nb.records import read_records
from lop_nb.runtime import LopError, generator

WORDS = ["+experiment=tickets/all", "dataset=digits", "dataset.examples_per_class=30", "dataset.normalize=unit", "model.hidden_sizes=[32]", "stream.tasks=3", "training.replicas=2", "training.epochs=2", "optimizer.lr=0.005",
         "tickets.tasks=[0,1,2]", "tickets.targets=[0.2]", "tickets.rounds=[3]", "tickets.new_tasks=2", "logging.progress=false", "metrics.probe_size=100"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    cfg = compose(WORDS)
    folder = tmp_path_factory.mktemp("tickets")/"run"; run_tickets(cfg, folder)
    return Tickets(cfg, folder)


def test_B15_iterative_magnitude_pruning(study):
    "after R rounds each matrix keeps its share to within a weight, biases stay, and each round keeps a part of the one before"
    for task in study.t.tasks:
        masks = study.found(task, .2, 3)
        assert set(masks) == {"linear_0.weight", "out.weight"}
        for k, m in masks.items(): assert (m.flatten(1).sum(1) - .2 * m[0].numel()).abs().max() <= 1 and abs(densities(masks)[k] - .2).max() < max(1e-3, 1/m[0].numel())
    rows = ticket_rows(study.root).query("kind == 'masks' and metric == 'density' and layer == ''")
    for r, d in rows.groupby("task").value.mean().items(): assert abs(d - .2**(r/3)) < 2e-3


def test_B16_an_accuracy_for_each_round(study):
    "R + 1 test accuracies for each ticket; the last is that of the final mask after training it"
    t = ticket_rows(study.root).query("kind == 'masks' and metric == 'test_accuracy'").groupby(["start", "replica"])
    assert (t.size() == 4).all() and (t.task.nunique() == 4).all() and t.value.last().mean() > .2


def test_B17_tickets_of_one_start_differ(study):
    "same start weights, same pictures, other data order: other masks"
    masks = study.found(0, .2, 3)["linear_0.weight"]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[2], masks[3])
    start = study.start(0)["linear_0.weight"]; assert torch.equal(start[0], start[1]) and not torch.equal(start[1], start[2])
    x = study.stream(study.of)[1].train.fetch(torch.arange(5).expand(4, -1))[0]; assert torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2])


def test_B18_overlap_of_masks(study):
    "Jaccard over all matrices: 1 for equal masks, p/(2 − p) at random; mean and deviation over pairs, and all tickets at once"
    m = {"w": torch.rand(20, 100, 100, generator=generator(0, "m")) < .2}
    assert (jaccard(m, m)["all"] == 1).all() and (jaccard(*pairs(m))["all"].mean() - .2/1.8).abs() < .002 and (chance(*pairs(m))["all"] - .2/1.8).abs().max() < .02
    o = pd.read_csv(study.root/"overlap.csv").query("layer == 'all'").set_index(["task", "seed", "measure"])["mean"]
    for n, s in enumerate(study.networks):
        mine = {k: v[2*n:2*n + 2] for k, v in study.found(2, .2, 3).items()}; t = pair_overlap(mine).set_index(["layer", "measure"])
        assert o[2, s, "jaccard"] == pytest.approx(t.loc["all", "jaccard"]["mean"]) and o[2, s, "n_way"] == pytest.approx(o[2, s, "jaccard"])       # two tickets: one pair
        live = {k: v[n:n + 1].expand(2, *v.shape[1:]) for k, v in study.live(2).items()}; both = {k: (m & live[k]).double() for k, m in mine.items()}
        assert o[2, s, "live_jaccard"] == pytest.approx((sum((m[0]*m[1]).sum() for m in both.values()) / sum(m.amax(0).sum() for m in both.values())).item())


def test_B19_accuracy_of_tickets(study):
    "each ticket is trained from its snapshot and tested, beside the whole network: one accuracy for each ticket and task"
    df = ticket_rows(study.root).query("kind == 'trials' and metric == 'test_accuracy' and run in ['dense', 'ticket']")
    assert (df.groupby(["run", "start"]).size() == 4).all() and set(df.start) == {0, 1, 2}
    t = arm_table(study).set_index(["run", "task"]); assert t.loc[("ticket", 1), "mean"] == pytest.approx(df.query("run == 'ticket' and start == 1").value.mean())


def test_B20_random_masks(study):
    "random masks under the same protocol; by themselves each weight with the target's probability, or exactly so many"
    kept = full(study.start(0), ["linear_0.weight"]); n = kept["linear_0.weight"][0].numel()
    coins, exact = random_masks(kept, .2, study.own, exact=False), random_masks(kept, .2, study.own)
    assert (densities(coins)["linear_0.weight"] - .2).abs().max() < 4*(.16/n)**.5 and len(set(coins["linear_0.weight"].flatten(1).sum(1).tolist())) > 1
    assert exact["linear_0.weight"].flatten(1).sum(1).unique().tolist() == [round(.2*n)]
    df = ticket_rows(study.root).query("kind == 'trials' and run == 'random'"); assert (df[df.metric == "test_accuracy"].groupby("start").size() == 4).all()


def test_B21_plasticity_of_a_ticket(study):
    "a ticket and the whole network on tasks they have never seen, each starting task in files of its own"
    df = ticket_rows(study.root).query("kind == 'plasticity' and metric == 'test_accuracy'")
    assert (df.groupby(["run", "start", "seed"]).task.nunique() == 2).all() and set(df.run) == {"dense", "ticket"} and df.groupby(["run", "start"]).ngroups == 6


def test_B22_plasticity_of_parameters(study):
    "the mean size of the gradient of each weight, an array for each matrix, on the pictures of the task itself"
    for task in study.t.tasks:
        g = study.gradient_sizes(task); start = study.start(task, 1)
        assert all(g[k].shape == start[k].shape and (g[k] >= 0).all() for k in ("linear_0.weight", "out.weight"))
    assert not torch.equal(study.gradient_sizes(0)["out.weight"], study.gradient_sizes(1)["out.weight"])


def test_B23_masks_of_plastic_parameters(study):
    "as many of the largest gradients in each matrix as the ticket keeps there; the overlap of a mask with itself is 1"
    g, one = study.gradient_sizes(0), {k: m[:1] for k, m in study.found(0, .2, 3).items()}
    plastic = plastic_masks({k: v[:1] for k, v in g.items()}, one)
    for k, m in plastic.items(): assert m.sum() == one[k].sum() and g[k][:1][m].min() >= g[k][:1][~m].max()
    assert jaccard(plastic, plastic)["all"].item() == 1
    o = pd.read_csv(study.root/"overlap.csv").query("measure == 'parameter_overlap' and layer == 'all' and task == 0").iloc[0]
    assert o["mean"] == pytest.approx(jaccard(one, plastic)["all"].item())


def test_B24_one_mask_of_several(study):
    "first, intersection, union, and average of the tickets of one network, from the stored masks"
    mine = {k: m[:2] for k, m in study.found(1, .2, 3).items()}; k = "linear_0.weight"; a, b = mine[k]
    assert torch.equal(aggregate(mine, "first")[k][0], a) and torch.equal(aggregate(mine, "intersection")[k][0], a & b) and torch.equal(aggregate(mine, "union")[k][0], a | b)
    assert torch.equal(average(mine)[k][0], (a.double() + b)/2)
    mean = aggregate(mine, "average", generator=generator(0, "masks"))[k][0]; assert mean.sum() == a.sum() and not (mean & ~(a | b)).any() and not (a & b & ~mean).any()


def test_B29_figures_from_the_run_itself(study):
    "figures are made from the folder of the run, by the run: no archive, no second config"
    made = study.root/"figures"
    assert (made/"ticket_overlap.png").is_file() and (made/"parameter_overlap.png").is_file()
    t = pd.read_csv(made/"parameter_overlap.csv"); assert set(t.task) == {0, 1, 2}
    rows = study.figure_rows()["overlap"]; acc = read_records(study.folder/"records.parquet").query("metric == 'test_accuracy'").groupby("task").value.mean()
    assert rows.query("metric == 'test_accuracy'").groupby("task").value.mean().to_dict() == pytest.approx(acc.to_dict())
    figures.ticket_overlap(rows)


def test_B31_empirical_tangent_kernel(study):
    "of a snapshot: symmetric, positive semidefinite, with trace, effective rank and alignment; and source B's scalar under a name that says what it is"
    nets, task = load_run(study.folder).snapshot("backprop", 1), study.stream(study.networks)[1]; x, y = task.train.fetch(torch.arange(20).expand(2, -1))
    K = kernel(nets, x); assert K.shape == (2, 200, 200) and torch.equal(K, K.mT) and torch.linalg.eigvalsh(K).min() > -1e-8 * K.diagonal(dim1=1, dim2=2).sum()
    m = kernel_measures(K, y, 10); assert {"ntk_trace", "ntk_effective_rank", "ntk_alignment"} <= set(m) and (m["ntk_trace"] > 0).all()
    assert mean_gradient_inner_product(nets, x.unflatten(1, (10, 2)), y.unflatten(1, (10, 2)), task.loss).shape == (2,)


def test_B32_a_stream_for_a_masked_copy(study):
    "the stream of new tasks for the whole network and for the ticket, whose mask holds in every task"
    df = ticket_rows(study.root).query("kind == 'plasticity'"); d = df.query("metric == 'density' and layer == ''")
    assert set(d.run) == {"ticket"} and (d.value - .2).abs().max() < 1e-2 and set(d.task) == {0, 1}


def test_B33_one_command_for_all(study):
    "all stages in the order of need; called again nothing is trained; a stage without what it needs says which command makes it"
    done = {f: f.stat().st_mtime_ns for f in study.folder.rglob("done")}
    run_tickets(study.cfg, study.folder); assert {f: f.stat().st_mtime_ns for f in study.folder.rglob("done")} == done
    words = [*WORDS[1:], "tickets.targets=[0.3]"]
    for stage, says in {"accuracy": "tickets/masks", "overlap": "tickets/masks", "plasticity": "tickets/masks"}.items():
        with pytest.raises(LopError, match=says): run_tickets(compose([f"+experiment=tickets/{stage}", *words]), study.folder)
    words = [w for w in WORDS[1:] if not w.startswith(("tickets", "stream.tasks"))] + ["stream.tasks=2", "tickets.tasks=[0,1]", "tickets.masks=1", "tickets.rounds=[1]"]; home = study.folder.parent/"by_steps"
    run_study(compose(["+experiment=tickets/lop", *words, "logging.snapshot_tasks=1"]), home)
    run_tickets(compose(["+experiment=tickets/all", *words, "tickets.stages=[lop]"]), home); assert (home/"tickets"/"report.txt").is_file()
    run_tickets(compose(["+experiment=tickets/all", *words, "tickets.stages=[lop,masks]"]), home)   # one by one is the same as all at once
    with pytest.raises(LopError, match="tickets/lop"): run_tickets(compose(["+experiment=tickets/masks", *WORDS[1:]]), study.folder.parent/"nothing")


def test_B34_report(study):
    "a table of whole network, tickets and random masks by task and density, with intervals"
    text = (study.root/"report.txt").read_text(); t = arm_table(study).set_index(["run", "task"])
    for arm in ("dense", "ticket", "random"): assert f"{t.loc[(arm, 2), 'mean']:.4f} ± {t.loc[(arm, 2), 'half']:.4f}" in text


def test_B35_the_same_again(study, tmp_path):
    "a study made anew, and one that was stopped in a search, have the same masks and records to the bit"
    again = Tickets(study.cfg, tmp_path/"again"); again.lop(); again.masks()
    for task in study.t.tasks:
        for k, m in again.found(task, .2, 3).items(): assert torch.equal(m, study.found(task, .2, 3)[k])
    a, b = (read_records(s.root/"masks"/"task_000001_p0.2_r3") for s in (study, again)); pd.testing.assert_frame_equal(a, b)
    assert json.loads((again.root/"masks"/"task_000001_p0.2_r3"/"about.json").read_text())["masks"] == 2
