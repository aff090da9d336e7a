"The runs behind 19_tickets, on the embedded digits"
import sys
from pathlib import Path

import pandas as pd
import pytest

from lop_nb.compose import compose
from lop_nb.pipeline import run_tickets, verify_tickets

sys.path.insert(0, str(Path(__file__).parents[1]/"nbs"/"experiments"))
import tickets_study as study  # noqa: E402


@pytest.mark.parametrize("part, setting", [*((p, "raw") for p in study.parts if p != "reversal"), ("reversal", "standardised"), ("reversal", "carried")])
def test_each_part_is_one_that_can_be_made(part, setting):
    cfg = compose(study.words(part, setting)); verify_tickets(cfg)
    assert cfg.training.replicas == 5 and cfg.training.epochs == 10 and cfg.optimizer.lr == .001 and cfg.model.hidden_sizes == [256]
    assert cfg.tickets.faithful == part.startswith("published") and cfg.optimizer.reinit_optimizer == (setting != "carried")


def test_from_networks_to_what_the_notebook_reads(tmp_path, monkeypatch):
    small = ["dataset=digits", "dataset.normalize=unit", "model.hidden_sizes=[16]", "training.replicas=2", "training.epochs=1", "stream.tasks=51", "metrics.kernel_size=5", "metrics.epochs=1", "logging.progress=false", "tickets.tasks=[50]"]
    full = study.words; monkeypatch.setattr(study, "words", lambda part, setting, *more: full(part, setting, *more, *small))
    monkeypatch.setattr(study, "settings", dict(raw=[])); monkeypatch.setattr(study, "rates", (.01,)); monkeypatch.setattr(study, "__file__", str(tmp_path/"study.py")); (tmp_path/"results").mkdir()
    monkeypatch.setitem(study.parts, "result", [w for w in study.parts["result"] if "arms" not in w])
    for part in "lop", "result", "published", "published_aged", "corrected": run_tickets(compose(study.words(part, "raw")), tmp_path/"raw")
    study.steps(tmp_path, "raw"); study.collect(tmp_path)
    arms, overlap, ages = (pd.read_parquet(tmp_path/"results"/f"tickets_{name}.parquet") for name in ("arms", "overlap", "ages"))
    assert set(arms.way) == {"tickets", "as_coded", "steps_0.01"} and set(arms.run) == {"dense", "ticket", "random"}
    each = arms[(arms.metric == "test_accuracy") & arms.end & (arms.run == "ticket")].groupby(["way", "density", "rounds"]).replica.nunique()
    assert each["steps_0.01", .05, 5] == 2 and each["as_coded", .05, 10] == 4 and each["tickets", .05, 5] == 6          # one, two and three masks of each network
    weight = arms[(arms.metric == "weight_norm") & (arms.run == "ticket") & (arms.density == .05) & (arms.rounds == 5) & ~arms.end].set_index(["way", "replica"]).value
    assert weight["steps_0.01"].tolist() == pytest.approx(weight["tickets"][[0, 3]].tolist())       # the same tickets
    assert set(overlap.part) == {"published", "published_aged", "corrected", "result"} and {"jaccard", "live_jaccard", "matched"} <= set(overlap.measure)
    assert set(ages.task) == set(range(51)) and set(ages.seed) == {42, 43}
