"""What measuring costs: the monitor's share of the training time in the study that `lop-run` runs without words.

Permuted digits, three hidden layers of 64 units, 3 replicas, 3 epochs of each task, in three arms; measured at the end of each task. Each way trains the same tasks, and all
run in turn, round after round. The processor time inside the monitor is taken apart from the rest of the same run, so that a ratio (the time without measuring over the time
with it) does not suffer from neighbours; the goal is a cost of less than 5 %, a ratio of 1/1.05.
"""
import statistics
import time
from functools import partial

from lop_nb.config import Adam, MetricsConfig
from lop_nb.data import load
from lop_nb.interventions import ContinualBackprop, L2Init
from lop_nb.learner import Evaluate, Learner, Online
from lop_nb.metrics import known
from lop_nb.models import MLP
from lop_nb.monitor import Monitor, OtherTasks
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels

from .core import clocks, spread

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


class Shares:
    "A row of its own kind: what is inside the monitor against what is outside it"
    name = "monitor"
    def __init__(self, quick): self.tasks, self.variants = (1, dict(list(VARIANTS.items())[:2])) if quick else (10, VARIANTS)

    def measure(self, rounds, seconds):
        data, each, wall = load("digits"), {k: [] for k in self.variants}, {k: [] for k in self.variants}
        study(data, VARIANTS["nothing"], 1)
        for _ in range(rounds):
            for k, what in self.variants.items():
                began = clocks()[1]; each[k].append(study(data, what, self.tasks)); wall[k].append(clocks()[1] - began)
        return dict(name=self.name, what=f"the default study: permuted digits, 64-64-64-64-10, 3 replicas, three arms of {self.tasks} tasks, measured after each", unit="tasks/s", note="",
                    rounds=rounds, seconds=seconds, limit=None, ways={k: self.way(k, each[k], wall[k]) for k in each}, ratios=[self.ratio(k, each[k]) for k in list(each)[1:]])

    def way(self, k, each, wall):
        n = self.tasks * len(ARMS)
        role = {"nothing": "plain", "the default's five": "ours"}.get(k, "also")
        return dict(role=role, missing=None, memory_mib=None) | spread([n / sum(map(sum, r.values())) for r in each]) | dict(wall_rate=statistics.median(n / w for w in wall))

    def ratio(self, k, each):
        shares = [sum(out for _, out in r.values()) / sum(map(sum, r.values())) for r in each]
        goal = 1 / 1.05 if k == "the default's five" else None; r = statistics.median(shares)
        return dict(of="ours" if goal else k, over="nothing", ratio=r, low=min(shares), high=max(shares), goal=goal, met=None if goal is None else r >= goal)


def rows(quick=False): return dict(monitor=partial(Shares, quick))
