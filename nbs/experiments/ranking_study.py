"""The runs behind 05_ranking.ipynb: `LOP_DATA=DIR python nbs/experiments/ranking_study.py FOLDER`

Trains the streams (networks and records go to FOLDER, and are not trained again if they are there), tries every checkpoint on held-out tasks
(FOLDER/ranking_NAME_OPTIMIZER.parquet), and writes what the notebook reads to nbs/experiments/results. The seeds stand in `regression` and `mnist`.
"""
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lop_nb.bitflips import BitFlips
from lop_nb.chains import MLP
from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.learner import Learner, Online
from lop_nb.ranking import Keep, all_values, held_out, over_tasks, rank_measures, score
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels

plain = dict(normalization="none", dropout_p=0.)


def regression():
    seeds = range(10); beyond = BitFlips(tasks=1000, examples=1)
    return dict(nets=Replicas(partial(MLP, 20, 1, hidden_sizes=[5, 5], **plain), seeds, "vmap"), stream=BitFlips(tasks=200, examples=1000), every=5, batch=4, lr=dict(sgd=.05, adam=.02),
                tasks=lambda seeds: held_out(beyond.seeded(seeds), range(300, 500, 20), "test"), curvature=range(300, 500, 20), few=32, rollouts=16, own=8, at_once=21)


def mnist():
    seeds = range(5); data = load("mnist", examples_per_class=100); beyond = PermutedPixels(data, tasks=200)
    return dict(nets=Replicas(partial(MLP, 784, 10, hidden_sizes=[100]*3, **plain), seeds), stream=PermutedPixels(data, tasks=120), every=8, batch=10, lr=dict(sgd=.1, adam=.003),
                tasks=lambda seeds: held_out(beyond.seeded(seeds), range(150, 154), examples=250), curvature=[150], few=40, rollouts=8, own=3, at_once=4)


studies = dict(regression=regression, mnist=mnist)


def train(s, optimizer, folder, name):
    "The kept networks, trained now or before"
    file = folder/f"{name}_{optimizer}.pt"
    if not file.exists():
        spec = SGD(lr=s["lr"][optimizer], momentum=0.) if optimizer == "sgd" else Adam(lr=s["lr"][optimizer]); keep = Keep(s["every"])
        run = Learner(s["nets"], s["stream"], spec, epochs=1, batch_size=s["batch"], callbacks=[keep], defaults=[Online()]).fit()
        torch.save(dict(kept=keep.kept), file); run.records.to_parquet(folder/f"{name}_{optimizer}.parquet")
    return torch.load(file)["kept"]


def measure(s, nets, task, initial): return all_values(nets, task, initial, few=s["few"], curvature=task.index in s["curvature"])


def study(name, optimizer, folder):
    "Train, score, write; parts are written as they come"
    s = studies[name](); kept, began, parts = train(s, optimizer, folder, name), time.time(), []
    rollouts = dict(published=dict(lr=1e-3, batch=4, rollouts=s["rollouts"]), own=dict(lr=s["lr"][optimizer], batch=s["batch"], rollouts=s["own"], optimizer=optimizer))
    moments = [m for m in kept if m % s["every"] == 0]
    for some in (moments[i:i + s["at_once"]] for i in range(0, len(moments), s["at_once"])):
        chosen = {0: kept[0]} | {m: kept[m] for m in some}
        frame = score(s["nets"], chosen, s["tasks"], partial(measure, s), rollouts, at_once=len(chosen))
        parts.append(frame if not parts else frame[frame.after > 0])
        pd.concat(parts, ignore_index=True).to_parquet(folder/f"part_{name}_{optimizer}.parquet")
        print(name, optimizer, "up to", some[-1], f"{time.time() - began:.0f} s", flush=True)
    (folder/f"part_{name}_{optimizer}.parquet").rename(folder/f"ranking_{name}_{optimizer}.parquet")


def summary(folder, out):
    "What the notebook reads: values (means over the held-out tasks), the ranking of every target, online loss and accuracy of the training"
    values, tables, online = [], [], []
    for name, optimizer in ((n, o) for n in studies for o in ("sgd", "adam")):
        run = dict(study=name, optimizer=optimizer); frame = over_tasks(pd.read_parquet(folder/f"ranking_{name}_{optimizer}.parquet")); values.append(frame.assign(**run))
        for rollout, target in ((r, t) for r in ("published", "own") for t in ("gain_1", "gain_10", "gain_100", "end_1", "end_10", "end_100")):
            tables.append(rank_measures(frame, target, rollout).rename_axis("metric").reset_index().assign(rollout=rollout, target=target, **run))
        records = pd.read_parquet(folder/f"{name}_{optimizer}.parquet"); online.append(records[records.metric.isin(["online_loss", "online_accuracy"])][["seed", "task", "metric", "value"]].assign(**run))
    for what, parts in dict(values=values, table=tables, online=online).items():
        frame = pd.concat(parts, ignore_index=True)
        frame.astype({c: "float32" for c in frame.select_dtypes("float64")}).to_parquet(out/f"ranking_{what}.parquet", compression="zstd")


if __name__ == "__main__":
    folder = Path(sys.argv[1]); folder.mkdir(exist_ok=True, parents=True)
    for name in studies:
        for optimizer in "sgd", "adam":
            if not (folder/f"ranking_{name}_{optimizer}.parquet").exists(): study(name, optimizer, folder)
    summary(folder, Path(__file__).parent/"results")
