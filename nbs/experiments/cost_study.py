"""The runs behind 11_cost.ipynb: `OMP_NUM_THREADS=1 LOP_DATA=DIR python nbs/experiments/cost_study.py`

Each point is a process of its own, which writes one row to nbs/experiments/results/cost.parquet; points that are there are not run again.
`cost_study.py billion FOLDER` makes the long run (its records go to FOLDER) and writes results/billion.parquet.
"""
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lop_nb.bitflips import BitFlips
from lop_nb.config import SGD, Adam
from lop_nb.data import load
from lop_nb.learner import Callback, Learner, Online
from lop_nb.models import MLP
from lop_nb.records import Records
from lop_nb.replicas import Replicas
from lop_nb.streams import PermutedPixels

results = Path(__file__).parent/"results"
workloads = dict(
    minibatch=dict(inputs=784, outputs=10, spec=Adam(), batch=32, examples=1000, base=dict(width=128, depth=2, replicas=1)),
    deep_stream=dict(inputs=784, outputs=10, spec=SGD(momentum=0.), batch=1, examples=1000, base=dict(width=128, depth=3, replicas=1)),
    bit_flips=dict(inputs=20, outputs=1, spec=SGD(momentum=0.), batch=1, examples=10_000, base=dict(width=5, depth=1, replicas=1)))
axes = [("minibatch", "width", [16, 64, 256, 1024]), ("minibatch", "depth", [1, 2, 4, 8, 16]), ("minibatch", "replicas", [1, 4, 16, 64]), ("minibatch", "tasks", [1, 10, 100]),
        ("deep_stream", "width", [16, 64, 256, 1024]), ("deep_stream", "depth", [1, 2, 4, 8, 16]), ("deep_stream", "replicas", [1, 4, 16]), ("deep_stream", "tasks", [1, 10, 100]),
        ("bit_flips", "width", [5, 20, 80, 320]), ("bit_flips", "replicas", [1, 4, 16, 64, 256, 1024]), ("bit_flips", "tasks", [1, 10, 100, 1000])]
compared = "width", "replicas"   # the axes along which torch is measured too


def memory(what="VmRSS"):
    "Megabytes of this process: VmRSS now, VmHWM at most"
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1024


def learner(workload, engine, width, depth, replicas, tasks, data, **kw):
    w = workloads[workload]
    nets = Replicas(partial(MLP, w["inputs"], w["outputs"], hidden_sizes=[width]*depth, normalization="none", dropout_p=0.), range(replicas))
    stream = BitFlips(tasks=tasks, examples=w["examples"]) if data is None else PermutedPixels(data, tasks=tasks)
    return Learner(nets, stream, w["spec"], epochs=1, batch_size=w["batch"], engine=engine, defaults=[Online()], **kw)


def cpu(f):
    began = time.process_time(); f()
    return time.process_time() - began


def measure(workload, engine, axis, width, depth, replicas, tasks=None):
    "One row: CPU seconds for each example of a replica, the median of three runs, and what memory the run needed beyond a tiny one"
    torch.set_num_threads(1)
    data = None if workload == "bit_flips" else load("mnist", examples_per_class=100)
    make = partial(learner, workload, engine, width, depth, replicas, data=data)
    learner(workload, engine, 4, depth, 1, 1, data).fit()
    before = memory(); Path("/proc/self/clear_refs").write_text("5")
    first = cpu(lambda: make(tasks=tasks or 1).fit()); peak = memory("VmHWM") - before
    first = cpu(lambda: make(tasks=1).fit()) if tasks is None else first     # without what had to be compiled
    n = tasks or int(np.clip(1 / first, 1, 1000))
    runs = [cpu(make(tasks=n).fit) for _ in range(3 if first * n < 20 else 1)]
    numbers = sum(p[0].numel() for p in make(tasks=1).replicas.params.values())
    return dict(workload=workload, engine=engine, axis=axis, width=width, depth=depth, replicas=replicas, tasks=n, examples=workloads[workload]["examples"] * n, weights=numbers,
                seconds=float(np.median(runs)), low=min(runs), high=max(runs), megabytes=peak)


def points():
    for workload, axis, values in axes:
        for engine in ("numba", "torch") if axis in compared else ("numba",):
            for v in values:
                if engine == "torch" and workload != "minibatch" and v > 256: continue
                yield dict(workload=workload, engine=engine, axis=axis, **workloads[workload]["base"] | {axis: v})


def study():
    file = results/"cost.parquet"; rows = pd.read_parquet(file).to_dict("records") if file.exists() else []
    key = lambda r: (r["workload"], r["engine"], r["axis"], r[r["axis"]])
    done = set(map(key, rows))
    for p in (p for p in points() if key(p) not in done):
        out = subprocess.run([sys.executable, __file__, "point", json.dumps(p)], capture_output=True, text=True)
        if out.returncode: sys.exit(out.stderr)
        rows.append(json.loads(out.stdout.splitlines()[-1])); print(*rows[-1].values(), flush=True)
        pd.DataFrame(rows).to_parquet(file)


class Notes(Callback):
    "Memory and CPU time of the process, now and then"
    def __init__(self, every): self.every, self.rows = every, []
    def after_task(self, learner):
        if (learner.at.task + 1) % self.every == 0: self.rows.append(dict(examples=learner.at.examples, megabytes=memory(), seconds=time.process_time())); print(self.rows[-1], flush=True)


def billion(folder, tasks=100_000):
    "One network, one example at a time: a billion of them, with a flip after every 10,000"
    torch.set_num_threads(1); notes = Notes(tasks // 100)
    run = learner("bit_flips", "numba", 5, 1, 1, tasks, None, callbacks=[notes], store=Records(folder)).fit()
    loss = run.records.query("metric == 'online_loss'").sort_values("task").value.to_numpy()
    pd.DataFrame(notes.rows).assign(loss=loss.reshape(len(notes.rows), -1).mean(1)).to_parquet(results/"billion.parquet")


if __name__ == "__main__":
    what = sys.argv[1:] or [""]
    if what[0] == "point": print(json.dumps(measure(**json.loads(what[1]))))
    elif what[0] == "billion": billion(what[1])
    else: study()
