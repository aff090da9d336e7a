"""The runs behind 19_tickets: `LOP_DATA=DIR python nbs/experiments/tickets_study.py PART FOLDER [SETTING [WORD...]]`

Five networks (seeds 42 to 46) go through 101 permutations of MNIST as the published study has it (784-256-10, Adam 1e-3 afresh for each task, ten epochs, batches of 32, raw pixels); tickets are searched at the starts of some.
A part is what `lop-run` does with the words below, in FOLDER/SETTING; the same command goes on with one that was stopped, and more words narrow it, so that machines can share it (`result FOLDER raw 'tickets.tasks=[50]'`). `... collect FOLDER` writes what the notebook reads to nbs/experiments/results.

Said before any of these runs.
Published numbers (`published`): with `faithful=true` they come out within the tolerances given there; they are those of one network, ours the mean of five, so networks were given room.
The result: at task 0 the ticket is the best of the masks at a twentieth; at task 50 random masks of a twentieth are ahead of the tickets, in each of five networks (one network of the published study: .90 and .38 to .43); live-unit tickets lie
between the two or above both; with biases reset random masks are no worse at any age. What would refute the reading that pruning at random helps because it revives dead units: random masks that are ahead in networks without dead units, or
live-unit tickets as bad as tickets. With standardised pixels few units die, so the reversal should not be there at task 50.
Said when those were done, before `steps`: weights that are large move little in a step of 1e-3, so tickets gain by larger ones; each arm at the best of four, random masks are still ahead after fifty tasks.
"""
import sys
from pathlib import Path

import pandas as pd

from lop_nb.compose import compose
from lop_nb.pipeline import Tickets, run_tickets, ticket_rows
from lop_nb.records import read_records

_base = ["+experiment=tickets/all", "stream.tasks=101", "training.replicas=5", "tickets.masks=3", "logging.figures=false", "metrics.names=[dead_fraction,effective_rank,weight_norm]", "metrics.probe_size=2000", "metrics.kernel_size=50", "metrics.epochs=10"]   # both at the start and at the end of a task
settings = {"raw": [], "standardised": ["dataset.normalize=standardize", "stream.tasks=51"], "carried": ["optimizer.reinit_optimizer=false", "stream.tasks=51"]}
_ages, _arms = "tickets.tasks=[0,10,50,100]", "tickets.arms=[dense,ticket,live_ticket,reinitialised,random_biases,synflow]"
_stages = "tickets.stages=[masks,accuracy,random_masks,parameter_plasticity,overlap]"
_coded = [_stages, "tickets.faithful=true", "tickets.masks=2"]
parts = {
    "lop": ["tickets.stages=[lop]", _ages],
    "published": [*_coded, "tickets.tasks=[0]", "tickets.targets=[0.2,0.05]", "tickets.rounds=[3,10]"],
    "published_aged": [*_coded, "tickets.tasks=[50]", "tickets.targets=[0.05]", "tickets.rounds=[10]"],
    "corrected": ["tickets.stages=[masks,accuracy,parameter_plasticity,overlap]", "tickets.arms=[ticket]", "tickets.tasks=[0,50]", "tickets.targets=[0.05]", "tickets.rounds=[10]"],   # what result has not
    "result": [_stages, _ages, _arms, "tickets.nested=true", "tickets.targets=[0.2,0.1,0.05]", "tickets.rounds=[3,4,5]"],
    "reversal": ["tickets.stages=[lop,masks,accuracy,random_masks]", "tickets.tasks=[0,50]", "tickets.arms=[dense,ticket]", "tickets.targets=[0.05]", "tickets.rounds=[5]"]}   # for the other settings

# Test accuracies and overlaps of the published study, and how near the mean of our five networks must come.
published = {("dense", 0, 1.): (.952, .006), ("random", 0, .05): (.940, .006), ("random", 50, .05): (.2964, .06), ("ticket", 50, .05): (.8374, .06), ("overlap", 0, .2): (26.1, 1.), ("overlap", 0, .05): (15.1, 1.)}


def words(part, setting, *more): return [*{w.partition("=")[0]: w for w in [*_base, *settings[setting], *parts[part], *more]}.values()]


rates = (3e-4, 3e-3, 1e-2)     # beside 1e-3


def steps(folder, setting):
    "A twentieth after fifty tasks with other step sizes: the same networks, and the first of their tickets"
    found = Tickets(compose(words("result" if setting == "raw" else "reversal", setting)), folder/setting).found
    for rate in rates:
        here = Tickets(compose(words("reversal", setting, "tickets.masks=1", f"optimizer.lr={rate}")), folder/setting)
        here.root, here.found = here.folder/f"steps_{rate}", lambda *of: {k: m[::3] for k, m in found(*of).items()}
        for arm in "dense", "ticket", "random": here.trial(arm, 50, .05, 5)


metrics = ["test_accuracy", "train_accuracy", "dead_fraction", "effective_rank", "weight_norm", "ntk_effective_rank", "ntk_trace"]


def collect(folder):
    arms, overlaps, ages = [], [], []
    for setting in settings:
        for at in [at for name in ("tickets", "as_coded", "steps_*") for at in sorted((folder/setting).glob(name)) if any(at.glob("*/**/done"))]:
            rows = ticket_rows(at); of = ["run", "start", "density", "rounds"]; rows = rows[(rows.kind == "trials") & rows.metric.isin(metrics)]
            step = rows.groupby(of).step; rows = rows.assign(end=rows.step == step.transform("max"))[lambda d: d.end | (d.step == step.transform("min"))]   # at its end, and at its start
            arms.append(rows.groupby([*of, "replica", "metric", "end"], sort=False).value.mean().reset_index().assign(setting=setting, way=at.name))
        if (folder/setting/"config.yaml").is_file():
            df = read_records(folder/setting); df = df[df.metric.isin(metrics) & df.epoch.isin([0, 10])]
            ages.append(df[["seed", "task", "epoch", "metric", "value"]].assign(setting=setting))
    for part in "published", "published_aged", "corrected", "result":
        tickets = Tickets(compose(words(part, "raw")), folder/"raw"); tickets.overlap()
        overlaps.append(pd.read_csv(tickets.root/"overlap.csv").assign(part=part, way=tickets.root.name))
    results = Path(__file__).parent/"results"
    for name, found in dict(tickets_arms=arms, tickets_overlap=overlaps, tickets_ages=ages).items():
        pd.concat(found, ignore_index=True).to_parquet(results/f"{name}.parquet", compression="zstd")


if __name__ == "__main__":
    part, folder, *more = sys.argv[1:]; setting, *more = more or ["raw"]
    if part == "collect": collect(Path(folder))
    elif part == "steps": steps(Path(folder), setting)
    else: run_tickets(compose(words(part, setting, *more)), Path(folder)/setting)
