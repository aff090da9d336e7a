"""The runs behind 13_escape and 14_questions: `LOP_DATA=DIR python nbs/experiments/cloning_study.py RUN FOLDER`

A run is what `lop-run` does with the words in `runs`; it goes to FOLDER/RUN, and the same command goes on with a run that was stopped. `all` makes every run of one group: `... escape all FOLDER`.
`... collect FOLDER` writes what the notebooks read to nbs/experiments/results/cloning.parquet.
"""
import sys
import warnings
from pathlib import Path

import pandas as pd

from lop_nb.compose import compose
from lop_nb.experiments import run_study
from lop_nb.records import read_records

# Source A's main figure: an MLP of five layers with batch normalisation on CIFAR-10. There 20 + 500 epochs of 50,000 pictures; here 10 + 60 of 9,000, so that two cores can do it in an hour.
# Said before the runs: R² at the end is 1 under SGD and Adam, and lowest with noise, then with dropout; the clone's effective rank ends above the base's with noise and dropout, and not under SGD;
# its training loss ends below the base's with noise and dropout, and equals it to .05 under SGD.
_published = ["training=cloning", "model=mlp", "dataset=cifar10", "model.dropout_p=0", "optimizer=plain_sgd", "optimizer.lr=0.01", "training.initial_epochs=10", "training.epochs=60",
              "training.seed=40", "training.replicas=5", "metrics.names=[effective_rank,dead_fraction]", "metrics.epochs=5", "intervention.arms=[backprop,clone,scratch,wide]"]
_noise = ["optimizer=noisysgd", "optimizer.momentum=0", "optimizer.lr=0.01", "optimizer.noise_decay=0.999"]
published = {"sgd": [], "noise": _noise, "dropout": ["model.dropout_p=0.1"], "adam": ["optimizer=adam", "optimizer.lr=0.001"]}

# Twenty networks on the digits, too small for them, and what may drive their clones apart. (Where the base has room enough, its loss and with it all gradients vanish before clones part: with 32 units a layer R² stays above .99.)
_digits = ["training=cloning", "dataset=digits", "model=mlp", "model.hidden_sizes=[4,4]", "model.normalization=none", "model.dropout_p=0", "optimizer=plain_sgd", "optimizer.lr=0.1", "training.batch_size=32",
           "training.initial_epochs=5", "training.epochs=100", "training.replicas=20", "metrics.names=[effective_rank,duplicate_fraction,saturated_fraction]", "metrics.epochs=5", "intervention.arms=[backprop,clone]"]
_kick, _noisy = ["intervention.clone.noise=0.001"], ["optimizer=noisysgd", "optimizer.momentum=0", "optimizer.lr=0.1"]
escape = {
    "nothing": [], **{f"noise_{s}": [*_noisy, f"optimizer.noise_scale={s}", "optimizer.noise_decay=0.999"] for s in (.003, .01, .03, .1)}, **{f"decay_{d}": [*_noisy, f"optimizer.noise_decay={d}"] for d in (0, .9, .99, 1)},
    **{f"dropout_{p}": [f"model.dropout_p={p}"] for p in (.02, .05, .1, .2, .4)}, "kick": _kick,
    **{f"kick_{name}": [*_kick, *words] for name, words in dict(momentum=["optimizer=sgd", "optimizer.lr=0.01"], adam=["optimizer=adam", "optimizer.lr=0.003"], adamw=["optimizer=adamw", "optimizer.lr=0.003"],
                                                              rmsprop=["optimizer=rmsprop", "optimizer.lr=0.003"]).items()},
    **{f"kick_wd_{d}": [*_kick, f"optimizer.weight_decay={d}"] for d in (.001, .01)}, **{f"kick_{n}": [*_kick, f"model.normalization={n}"] for n in ("batch", "layer")},
    **{f"kick_batch_{b}": [*_kick, f"training.batch_size={b}"] for b in (4, 128)}, **{f"kick_{s}": [f"intervention.clone.noise={s}"] for s in (.0001, .01, .1)}, "kick_equitable": [*_kick, "intervention.clone.equitable=true"],
    **{f"tanh_wd_{d}": ["model.activation=tanh", f"optimizer.weight_decay={d}"] for d in (0, .001, .01)}}
groups = dict(published={k: [*_published, *v] for k, v in published.items()}, escape={k: [*_digits, *v] for k, v in escape.items()})
keep = ["effective_rank", "dead_fraction", "saturated_fraction", "train_loss", "test_accuracy", "cloning_r2", "cloning_r2_corrected", "cloning_r2_published"]


def words_of(run, words):
    "Later words take the place of earlier ones"
    return [*{w.partition("=")[0]: w for w in words}.values(), "logging.progress=false", "logging.figures=false", "resume=true"]


def collect(folder):
    parts = []
    for group, runs in groups.items():
        for run in runs:
            at = Path(folder)/group/run
            if not (at/"config.yaml").is_file(): continue
            df = read_records(at); df = df[df.metric.isin(keep) & (df.epoch % 5 == 0)].rename(columns=dict(run="arm"))
            parts.append(df.assign(group=group, run=run)[["group", "run", "arm", "seed", "task", "epoch", "metric", "value"]])
    df = pd.concat(parts, ignore_index=True)
    df = df.groupby(["group", "run", "arm", "seed", "task", "epoch", "metric"], sort=False).value.mean().reset_index()   # over layers
    df.assign(value=df.value.astype("float32"), **{k: df[k].astype("category") for k in ("group", "run", "arm", "metric")}).to_parquet(Path(__file__).parent/"results"/"cloning.parquet", compression="zstd")


if __name__ == "__main__":
    if sys.argv[1] == "collect": collect(sys.argv[2])
    else:
        group, which, folder = sys.argv[1:]; warnings.filterwarnings("ignore", "Dropout at")
        for run, words in groups[group].items():
            if which in (run, "all"): run_study(compose(words_of(run, words)), Path(folder)/group/run); print(run, flush=True)
