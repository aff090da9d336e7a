"The first published number, run as its command says, with one seed and one task."
import os

import pytest

from lop_nb.compose import compose
from lop_nb.data import verify
from lop_nb.experiments import run_study
from lop_nb.records import read_records
from lop_nb.runtime import LopError


def there(name):
    try: verify(name); return True
    except LopError: return False


@pytest.mark.skipif(not os.environ.get("LOP_DATA") or not there("mnist"), reason="LOP_DATA has no MNIST")
def test_raw_pixels_silence_most_of_a_layer_in_one_task(tmp_path):
    "source: test accuracy 0.952 and 0.605 silent units; tolerances set before running"
    df = read_records(run_study(compose(["+experiment=tickets/lop", "stream.tasks=1", "training.replicas=1", "logging.figures=false", "logging.progress=false"]), tmp_path/"run"))
    value = lambda metric: df[df.metric == metric].value.item()
    assert abs(value("test_accuracy") - .952) <= .006
    assert abs(value("dead_fraction") - .60) <= .08
