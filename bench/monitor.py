"""What measuring costs: the monitor's share of the training time in the default study.

    python bench/monitor.py [--tasks 10] [--rounds 3]

The study is the one that `lop-run` runs without words: permuted digits, three hidden layers of 64 units, 3 replicas, 3 epochs of each task, in three arms;
it is measured at the end of each task. Each variant trains the same tasks, and all run in turn, round after round. Time is the processor time of this process,
on one thread, so that neighbours do not count; the share is the time inside the monitor over the time outside it. A figure is the median over rounds.
"""
import argparse, statistics, sys, time
from functools import partial

import torch

from lop_nb.config import Adam, MetricsConfig
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop, L2Init
from lop_nb.learner import Evaluate, Learner, Online
from lop_nb.metrics import known
from lop_nb.models import MLP
from lop_nb.monitor import Monitor, OtherTasks
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels

CHEAP = MetricsConfig().names
SOURCE = ["dead_fraction", "duplicate_fraction", "effective_rank", "participation_ratio", "saturated_gradient_fraction"]   # the five that source A takes
VARIANTS = {"nothing": None, "the default's five": dict(names=CHEAP), "the source's five": dict(names=SOURCE), "all but normality": dict(names=[n for n in known if n != "non_gaussianity"]),
            f"all {len(known)} measures": dict(names=["all"]), "all, and histograms": dict(names=["all"], histograms=True), "all, of every module": dict(names=["all"], layers=[]),
            "other tasks' accuracy": "past"}
ARMS = dict(backprop=list, continual_backprop=lambda: [ContinualBackprop(replacement_rate=1e-3)], l2_init=lambda: [L2Init()])


def timed(callback):
    "The callback, with the processor time that its moments take in `spent`"
    callback.spent = 0.
    for moment in ("before_reset", "before_task", "after_epoch", "after_task"):
        def clocked(learner, f=getattr(callback, moment)):
            began = time.process_time(); f(learner); callback.spent += time.process_time() - began
        setattr(callback, moment, clocked)
    return callback


def study(data, what, tasks):
    "{arm: (processor seconds inside the monitor, outside it)}"
    return {arm: _arm(data, what, tasks, make()) for arm, make in ARMS.items()}


def _arm(data, what, tasks, intervene):
    make = partial(MLP, 64, 10, hidden_sizes=[64]*3, normalization="none", dropout_p=0.)
    looks = [] if what is None else [timed(OtherTasks(what) if isinstance(what, str) else Monitor(**what))]
    learner = Learner(Replicas(make, range(42, 45)), PermutedPixels(data, tasks=tasks), Adam(lr=1e-2), callbacks=looks + intervene, defaults=[Online(), Evaluate()])
    began = time.process_time(); learner.fit(); whole = time.process_time() - began
    inside = sum(c.spent for c in looks)
    return inside, whole - inside


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10); parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(); torch.set_num_threads(1)
    data, times = load("digits"), {k: [] for k in VARIANTS}
    study(data, VARIANTS["nothing"], 2)
    for _ in range(args.rounds):
        for k, what in VARIANTS.items(): times[k].append(study(data, what, args.tasks))
    print(f"torch {torch.__version__}, python {sys.version.split()[0]}, cpu, {args.tasks} tasks, {args.rounds} rounds\n\n"
          "| measured at the end of each task | ms a task | share of training, three arms | (low–high) | backprop alone |\n|---|---|---|---|---|")
    for k, each in times.items():
        share = lambda arms: [sum(r[a][0] for a in arms) / sum(r[a][1] for a in arms) for r in each]
        ms, whole = statistics.median(sum(i for i, _ in r.values()) for r in each) / args.tasks / len(ARMS) * 1000, share(ARMS)
        print(f"| {k} | {ms:.1f} | {statistics.median(whole):.1%} | {min(whole):.1%}–{max(whole):.1%} | {statistics.median(share(['backprop'])):.1%} |")
    print("\nTraining, ms a task: " + ", ".join(f"{a} {statistics.median(r[a][1] for r in times['nothing']) / args.tasks * 1000:,.0f}" for a in ARMS))


if __name__ == "__main__":
    main()
