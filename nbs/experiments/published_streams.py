"""The runs behind 08_bit_flipping, 09_clipping and 10_online_mnist: `LOP_DATA=DIR python nbs/experiments/published_streams.py STUDY RUN FOLDER`

A run is what `lop-run` does with the words in `runs`; it goes to FOLDER/STUDY/RUN, and the same command goes on with a run that was stopped. `... STUDY collect FOLDER` writes what the
notebooks read to nbs/experiments/results. What is held against the published figures, and how near it must come, was written here before any run was looked at.
"""
import sys
from pathlib import Path

import pandas as pd

from lop_nb.compose import compose
from lop_nb.experiments import run_study
from lop_nb.records import read_records

_bits = ["+experiment=bit-flipping/nature", "stream.tasks=100", "training.replicas=100", "training.seed=1000"]
_clip = ["+experiment=streaming/clipping", "logging.snapshot_tasks=100"]
_mnist = ["+experiment=permuted-mnist/nature", "training.replicas=1", "metrics.bin=null"]
_narrow = [*_mnist, "model.hidden_sizes=[100,100,100]", "stream.tasks=148", "training.replicas=3"]
_rate = "intervention.continual_backprop.replacement_rate"

runs = {
    "bit_flipping": {f"{net}_{flip}_{arm}": [*_bits, *words, f"stream.flip={flip}", f"intervention.arms=[{arm}]"] for flip in ("all", "one") for arm in ("backprop", "continual_backprop")
                     for net, words in dict(relu=[], tanh=["model.activation=tanh"], linear=["model.hidden_sizes=[]"]).items() if (net, arm) != ("linear", "continual_backprop")},
    "clipping": {name: [*_clip, f"intervention.arms=[{arm}]", f"training.seed={seed}"] for name, arm, seed in (
        ("backprop", "backprop", 42), ("weight_clipping", "weight_clipping", 42), ("backprop_more", "backprop", 45))},   # the last was added when the first was half way, see 09_clipping
    "online_mnist": {
        "narrow_0.003": [*_narrow, "optimizer.lr=0.003", "intervention.arms=[backprop]"],
        **{f"narrow_0.003_cbp_{rate}": [*_narrow, "optimizer.lr=0.003", "intervention.arms=[continual_backprop]", f"{_rate}={rate}"] for rate in (1e-4, 1e-5, 1e-6)},
        **{f"wide_{lr}": [*_mnist, f"optimizer.lr={lr}", "stream.tasks=50", "intervention.arms=[backprop]"] for lr in (.003, .01)},
        **{f"wide_0.003_cbp_{rate}": [*_mnist, "optimizer.lr=0.003", "stream.tasks=50", "intervention.arms=[continual_backprop]", f"{_rate}={rate}"] for rate in (1e-4, 1e-5)}}}

metrics = dict(bit_flipping=["online_loss", "dead_fraction"], clipping=["online_accuracy", "online_loss", "weight_norm"],
               online_mnist=["online_accuracy", "dead_fraction", "effective_rank", "weight_norm"])

# Online squared error, bins of 20,000 examples, means of 100 runs, read from a figure (Dohare et al., 2024): {run: {after so many examples: value, or lowest and highest}}.
# The figure is made by the code's default, which draws all slow bits anew (flip=all) and counts the biases its own way (count=published). A first set of our runs, with one bit flipped at a time
# and half biases, was looked at before that was found out by reading their code; these have other seeds. Read to .02: the line of the linear learner, which does not change, was read as .87 to .91. Nearer than .02 plus two standard errors of the difference counts as the same.
bit_flipping = dict(relu_all_backprop={20e3: .62, 100e3: .83, 200e3: 1., 500e3: 1.27, 1e6: (1.19, 1.29)}, tanh_all_backprop={20e3: .43, 100e3: .61, 500e3: .87, 1e6: .89},
                    linear_all_backprop={20e3: (.87, .91), 1e6: (.87, .91)})
digitised = .02

# Online accuracy in per cent, means of 30 runs, from the published logs (Elsayed et al., 2024): {run: {(first task, last): value}}. Within .3 points counts as the same.
clipping = dict(backprop={(1, 1): 90.54, (1, 10): 91.01, (91, 100): 86.44, (191, 200): 83.74, (291, 300): 82.75, (1, 300): 85.45},
                weight_clipping={(1, 1): 88.81, (1, 10): 89.88, (91, 100): 90.80, (191, 200): 90.83, (291, 300): 90.82, (1, 300): 90.76})

# Online accuracy of a task in per cent, read from a figure (Dohare et al., 2024): {run: {task: value, or lowest and highest}}. Within .3 points counts as the same.
online_mnist = {"wide_0.01": {1: (93.9, 94.3), 2: 94.65}, "wide_0.003": {1: 94.09, 11: 95.16, 50: 94.92}, "narrow_0.003": {1: 92.3, 5: 92.87, 50: 89.73, 100: 88.15, 148: (0, 88)}}
points = .3


def collect(study, folder):
    "What the notebook reads: the rows of `metrics`, one column for the run"
    parts = []
    for run in runs[study]:
        at = Path(folder)/study/run
        if not (at/"config.yaml").is_file(): continue
        df = read_records(at)
        parts.append(df[df.metric.isin(metrics[study])].assign(run=run)[["run", "seed", "task", "examples", "layer", "metric", "value"]])
    df = pd.concat(parts, ignore_index=True)
    df.assign(value=df.value.astype("float32"), **{k: df[k].astype("category") for k in ("run", "layer", "metric")}).to_parquet(Path(__file__).parent/"results"/f"{study}.parquet", compression="zstd")


if __name__ == "__main__":
    study, run, folder = sys.argv[1:]
    if run == "collect": collect(study, folder)
    else: run_study(compose([*runs[study][run], "resume=true"]), Path(folder)/study/run)
