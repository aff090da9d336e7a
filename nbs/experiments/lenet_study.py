"""LeNet-300-100 on MNIST, the first lottery ticket experiment (Frankle and Carbin, 2019, section 2): the runs behind 18_lenet

    LOP_DATA=DIR OMP_NUM_THREADS=1 python nbs/experiments/lenet_study.py run FOLDER        # goes on where it was stopped
    python nbs/experiments/lenet_study.py collect FOLDER                                   # writes results/lenet.parquet
    ... run FOLDER quick; ... collect FOLDER quick                                         # two rounds of 300 steps on 600 digits: does it run? Writes FOLDER/lenet.parquet

The recipe: 784-300-100-10, ReLU, normal weights of Glorot's variance, biases zero; MNIST, 55,000 training, 5,000 validation and 10,000 test examples, standardised; Adam 1.2e-3,
batches of 60, 50,000 steps a round; 15 rounds, each of which removes the smallest 20 % of what is left of each hidden layer and 10 % of the head, and rewinds the rest to its
first values; three networks. Validation loss every 100 steps (at the end of the block of three steps that passes the mark); where it is least, training would have been stopped.
The control has a ticket's mask, its batches and other first weights, drawn anew.

Said before any run. `published` has two columns: the paper's, and a re-run's by others (five seeds). A mean of ours is "inside" if it lies between the two columns, widened
by `tolerance`: .1 points of accuracy, since a difference of two networks on 10,000 examples has a standard error of about that; 15 points of the share by which training
stops earlier, the band that the re-run gave itself; a fifth of a ratio of steps. Expected is that all are inside; what is not has to be explained in the notebook.
"""
import io
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lop_nb.checkpoints import Checkpoint, load_checkpoint
from lop_nb.config import Adam
from lop_nb.data import load
from lop_nb.imp import Search, ladder
from lop_nb.learner import Callback, Learner, evaluate
from lop_nb.masks import Mask
from lop_nb.models import MLP
from lop_nb.plots import interval
from lop_nb.records import Records, read_records
from lop_nb.replicas import Replicas
from lop_nb.runtime import LopError, generator, write_atomic
from lop_nb.tasks import Stream, Task

seeds, lr, batch, head, each = [0, 1, 2], 1.2e-3, 60, .5, .8     # each: share of a layer that a round keeps
whole = dict(rounds=15, steps=50_000, every=100, again=[3, 7, 9, 15], data=dict(val=5000/60_000))
quick = dict(rounds=2, steps=300, every=50, again=[2], data=dict(val=5000/60_000, examples_per_class=60))
OUT = Path(__file__).parent/"results"/"lenet.parquet"

# quantity: (the paper, the re-run, tolerance); round 3 keeps 51.28 % of the weights, 7: 21.07, 9: 13.52, 15: 3.58
published = {
    "stops earlier, 21.07 %":               (.38, .214, .15),          # 1 − steps of the ticket / steps of the dense network
    "accuracy, 13.52 %":                    (.0030, .0021, .001),      # ticket − dense, where each stops
    "accuracy, 3.58 %":                     (0., .0011, .001),
    "accuracy at 50,000 steps, 13.52 %":    (.0035, .0028, .001),
    "re-initialised / ticket, steps, 21.07 %": (2.51, 1.94, .4),
    "ticket − re-initialised, accuracy, 21.07 %": (.005, .0039, .001),
    "re-initialised / ticket, steps, 3.58 %": (2.4, 3.9, .5),          # the re-run's range; the paper gives none
    "ticket − re-initialised, accuracy, 3.58 %": (.01, .01, .001),     # "about a point"
    "accuracy, dense":                      (.9786, .9824, .0014)}     # the re-run's range, and the standard error of one network


class Passes(Stream):
    "Each task is the same examples: as many as wanted, from passes over them in random order"
    name = "passes"
    def __init__(self, data, tasks, examples, first=0, **kw): super().__init__(data, tasks=tasks, examples=examples, first=first, **kw)
    def _draw(self, seed, k):
        gen, n, wanted = generator(seed, "order", self.settings["first"] + k), len(self.data.train), self.settings["examples"]
        return torch.cat([torch.randperm(n, generator=gen) for _ in range(-(-wanted // n))])[:wanted]
    def _task(self, k, rows): return Task(f"round {self.settings['first'] + k}", k, self._view("train", rows, in_order=True), *self._views(splits=("val", "test")), self._every_class())


def early_stop(
    steps, # of a curve
    losses # validation loss there
):         # step
    "Where the validation loss is least, the first time; `LopError` if it is nowhere a number"
    losses = np.asarray(losses, float)
    if np.isnan(losses).all(): raise LopError("No validation loss is a number: the network was never of use. Take a smaller step size.")
    return int(np.asarray(steps)[np.nanargmin(losses)])


class Validate(Callback):
    "Validation loss every so many steps of a round; where it is least, and at the end, test accuracy"
    longest = 3     # steps of a block, at whose end it looks
    def __init__(self, every): self.every, self.least, self.at, self.test = every, None, None, None
    def before_task(self, learner): self.least, self.at, self.test = (torch.full((len(learner.replicas),), v) for v in (torch.inf, 0., 0.))
    def after_block(self, learner):
        at = learner.at.batch
        if at // self.every == (at - len(learner.sizes)) // self.every: return
        seen = evaluate(learner.replicas, learner.task, learner.task.val)
        learner.log_all({("val", "", f"val_{k}"): v for k, v in seen.items()})
        better = seen["loss"] < self.least
        if better.any(): self.keep(learner, better, seen["loss"], at)
    def keep(self, learner, better, loss, at):
        new = loss, torch.full_like(loss, at), evaluate(learner.replicas, learner.task, learner.task.test)["accuracy"]
        self.least, self.at, self.test = (torch.where(better, v, was) for v, was in zip(new, (self.least, self.at, self.test)))
    def after_task(self, learner):
        end = evaluate(learner.replicas, learner.task, learner.task.test)["accuracy"]
        learner.log_all({("test", "", "stop_accuracy"): self.test, ("", "", "stop_iteration"): self.at, ("test", "", "end_accuracy"): end})
    def state_dict(self): return dict(least=self.least, at=self.at, test=self.test)
    def load_state_dict(self, state): vars(self).update(state)


class Masks(Callback):
    "The mask of each round, in a file"
    def __init__(self, folder, search): self.folder, self.search = folder, search
    def after_task(self, learner):
        buffer = io.BytesIO(); torch.save(self.search.masks, buffer)
        self.folder.mkdir(parents=True, exist_ok=True); write_atomic(mask_file(self.folder, learner.at.task), buffer.getbuffer())
        print(f"{self.folder.parent.name}: round {learner.at.task}", {k: learner.latest[k] for k in [("", "", "density"), ("", "", "stop_iteration"), ("test", "", "stop_accuracy")]}, flush=True)
    after_task.order = 50


def mask_file(folder, k): return folder/f"round_{k:02}.pt"


def networks(): return Replicas(partial(MLP, 784, 10, hidden_sizes=[300, 100], activation="relu", normalization="none", dropout_p=0., init="glorot"), seeds)


def train(folder, nets, callbacks, s, tasks=1, first=0):
    "A run in its folder, or what is left of it"
    state = load_checkpoint(folder/"checkpoints"); store = Records(folder, resume_at=state["rows"] if state else 0)
    stream = Passes(load("mnist", **s["data"]), tasks, s["steps"] * batch, first, seeds=seeds, normalize="standardize")
    learner = Learner(nets, stream, Adam(lr=lr), 1, batch, [*callbacks, Validate(s["every"]), Checkpoint(folder/"checkpoints", 300)], engine="numba", store=store, defaults=[])
    if state: learner.load_state_dict(state)
    if not learner.finished: learner.fit()
    store.close()


def search(folder, s):
    found = Search(each ** s["rounds"], s["rounds"], scope="layer", head=head)
    train(folder/"tickets", networks(), [found, Masks(folder/"tickets"/"masks", found)], s, s["rounds"] + 1)


def again(folder, s, k):
    "The mask of round k on other weights"
    file, nets = mask_file(folder/"tickets"/"masks", k), networks()
    if not file.is_file(): raise LopError(f"The mask of round {k} is not in {folder}. Let the search come so far: lenet_study.py run {folder}.")
    nets.reset("again", k)
    train(folder/f"again_{k:02}", nets, [Mask(torch.load(file, weights_only=True))], s, first=k)


def read(at, arm, k, steps):
    "Records of a run as rows of the result: `k` is the round of its first task"
    df = read_records(at); df = df.assign(arm=arm, round=df.task + k, iteration=df.step - df.task * steps)
    return df[df.metric.isin(["val_loss", "val_accuracy", "stop_accuracy", "stop_iteration", "end_accuracy"]) | ((df.metric == "density") & (df.layer == ""))][["arm", "round", "seed", "iteration", "metric", "value"]]


def collect(folder, s=whole, out=OUT):
    "Write what the notebook reads; `LopError` if a run has not ended"
    wanted = {"tickets": ("ticket", 0, s["rounds"] + 1)} | {f"again_{k:02}": ("re-initialised", k, 1) for k in s["again"]}
    missing = [n for n, (*_, tasks) in wanted.items() if not ended(folder/n, tasks)]
    if missing: raise LopError(f"Not finished in {folder}: {', '.join(missing)}. Go on with: lenet_study.py run {folder}")
    df = pd.concat([read(folder/n, arm, k, s["steps"]) for n, (arm, k, _) in wanted.items()], ignore_index=True)
    for key, g in df.groupby(["arm", "round", "seed"]):
        curve, stop = g[g.metric == "val_loss"], g[g.metric == "stop_iteration"].value.item()
        if early_stop(curve.iteration, curve.value) != stop: raise LopError(f"{key}: the curve is least at {early_stop(curve.iteration, curve.value)}, and {stop} is recorded. The records are of several runs: use another folder.")
    df.assign(value=df.value.astype("float32"), arm=df.arm.astype("category"), metric=df.metric.astype("category")).to_parquet(out, compression="zstd")
    return df


def ended(at, tasks):
    state = load_checkpoint(at/"checkpoints")
    return bool(state) and state["at"]["done"] and state["at"]["task"] == tasks - 1


def quantities(df):
    "Each network's own, a row a network: the columns of `published`"
    get = lambda metric, k, arm="ticket": df[(df.metric == metric) & (df["round"] == k) & (df.arm == arm)].set_index("seed").value.astype(float).sort_index()
    stop, accuracy, other = partial(get, "stop_iteration"), partial(get, "stop_accuracy"), "re-initialised"
    ours = [1 - stop(7) / stop(0), accuracy(9) - accuracy(0), accuracy(15) - accuracy(0), get("end_accuracy", 9) - get("end_accuracy", 0), stop(7, other) / stop(7), accuracy(7) - accuracy(7, other),
            stop(15, other) / stop(15), accuracy(15) - accuracy(15, other), accuracy(0)]
    return pd.DataFrame(dict(zip(published, ours, strict=True)))


def against(df):
    "Our means, with 95 % intervals over networks, beside what was published"
    values = quantities(df).melt(var_name="quantity", ignore_index=False)
    t = interval(values, ["quantity"]).set_index("quantity")[["mean", "half"]].loc[list(published)]
    columns = pd.DataFrame(published, index=["paper", "re-run", "tolerance"]).T
    low, high = columns[["paper", "re-run"]].min(axis=1) - columns.tolerance, columns[["paper", "re-run"]].max(axis=1) + columns.tolerance
    return columns.join(t).assign(inside=(low <= t["mean"]) & (t["mean"] <= high))


def main(command, folder, size="whole"):
    folder, s = Path(folder), dict(whole=whole, quick=quick)[size]
    if command == "collect": collect(folder, s, OUT if s is whole else folder/OUT.name); return
    search(folder, s)
    for k in s["again"]: again(folder, s, k)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main(*sys.argv[1:])
