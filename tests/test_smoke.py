"Every network on every data set that it fits: two tasks, few pictures, through the installed command."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lop_nb.config import sizes
from lop_nb.data import verify
from lop_nb.experiments import load_run
from lop_nb.runtime import LopError

BUDGET = ["training=continual", "stream.tasks=2", "stream.classes_per_task=2", "training.epochs=1", "training.replicas=1", "training.batch_size=16", "dataset.examples_per_class=12",
          "metrics.probe_size=16", "logging.figures=false"]


def there(name):
    try: verify(name); return True
    except LopError: return False


@pytest.mark.parametrize("data", sizes)
def test_every_network_on(data, tmp_path):
    if not there(data): pytest.skip(f"{data} is not under LOP_DATA")
    networks = ["mlp", "cnn", "resnet", "vit"] + ["vgg"] * (data == "cifar10")     # the VGG-style network was made for 32 pixels
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    done = subprocess.run([Path(sys.executable).parent/"lop-run", "--multirun", f"dataset={data}", f"model={','.join(networks)}", *BUDGET, f"hydra.sweep.dir={tmp_path}"], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    for i, name in enumerate(networks):
        run = load_run(tmp_path/str(i))
        assert run.config.model.name == name.replace("vgg", "cnn") and len(run.models["backprop"]) == 1
        last = run.records.query("metric == 'test_accuracy'")
        assert last.task.tolist() == [0, 1] and np.isfinite(run.records.value).all()
        assert len(set(run.records.layer)) > 2, "hidden layers were measured"
