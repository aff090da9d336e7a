"The runs of 12_remedies: each remedy with the step size that suits it, the same tasks, order and budget. `python remedies_study.py` writes results/remedies*.parquet."
from pathlib import Path

import pandas as pd

from lop_nb.compose import compose
from lop_nb.experiments import make_data, make_learner
from lop_nb.records import Records

OUT = Path(__file__).parent / "results"
STEPS = .001, .003, .01, .03
ARMS = {   # what `lop-run` is told
    "backprop": "intervention=backprop",
    "continual backprop": "intervention=continual_backprop intervention.continual_backprop.replacement_rate=0.001",
    "L2-Init": "intervention=l2_init",
    "weight clipping": "intervention=weight_clipping",
    "shrink and perturb, each step": "intervention=shrink_and_perturb",
    "shrink and perturb, each task": "intervention=shrink_and_perturb intervention.shrink_and_perturb.when=task intervention.shrink_and_perturb.fresh=true intervention.shrink_and_perturb.shrink=0.6 intervention.shrink_and_perturb.noise=0.4",
    "decoupled decay": "intervention=backprop optimizer=adamw optimizer.weight_decay=0.1",
    "dropout": "intervention=backprop model.dropout_p=0.1",
    "online normalisation": "intervention=online_norm"}


def run(arm, lr, seed, replicas, tasks):
    "Records of one arm"
    cfg = compose([*ARMS[arm].split(), f"optimizer.lr={lr}", f"training.seed={seed}", f"training.replicas={replicas}", f"stream.tasks={tasks}", "training.no_augment=true",
                   "logging.progress=false", "metrics.names=[dead_fraction,weight_norm]", "metrics.probe_size=200"])
    store = Records(); make_learner(cfg, cfg.intervention.arms[0], make_data(cfg, "cpu"), store=store).fit()
    return store.frame().assign(run=arm, lr=lr)


def tuned():
    "Online accuracy over ten tasks of two seeds that the comparison does not use"
    rows = []
    for arm in ARMS:
        for lr in STEPS:
            df = run(arm, lr, 100, 2, 10); rows.append(dict(run=arm, lr=lr, online_accuracy=df[df.metric == "online_accuracy"].value.mean())); print(rows[-1], flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tried = tuned(); tried.to_parquet(OUT / "remedies_tuned.parquet")
    best = tried.loc[tried.groupby("run").online_accuracy.idxmax()].set_index("run").lr
    df = pd.concat([run(arm, best[arm], 42, 5, 30) for arm in ARMS])
    df[df.metric.isin(["online_accuracy", "test_accuracy", "dead_fraction", "weight_norm"])].to_parquet(OUT / "remedies.parquet")
