"The installed commands, as a person types them: results, refusals, Ctrl-C, kill -9 and resume."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
import torch

from lop_nb.checkpoints import checkpoints
from lop_nb.records import read_records
from lop_nb.tracking import read_wandb, wandb_key

BIN = Path(sys.executable).parent
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(WANDB_MODE="disabled", OMP_NUM_THREADS="1")   # IN_TEST hides progress bars
SMALL = ["stream.tasks=3", "training.epochs=1", "training.replicas=2"]
ARMS = ["backprop", "continual_backprop", "l2_init"]


def command(*words, **kw):
    return subprocess.run([BIN/words[0], *map(str, words[1:])], capture_output=True, text=True, env=ENV | kw.pop("env", {}), timeout=300, **kw)


def test_a_run_leaves_what_it_promises(tmp_path):
    done = command("lop-run", *SMALL, f"hydra.run.dir={tmp_path}/a")
    assert done.returncode == 0, done.stderr
    assert "backprop" in done.stdout and "overview.png" in done.stdout
    assert "%" in done.stderr, "a progress bar"
    assert {p.name for p in (tmp_path/"a").iterdir()} == {"config.yaml", "records.parquet", "summary.json", "stream.json", "draws.npz", "figures", "checkpoints"}
    summary = json.loads((tmp_path/"a"/"summary.json").read_text())
    assert summary["finished"] and list(summary["results"]) == ARMS and summary["seeds"] == [42, 43]
    df = pd.read_parquet(tmp_path/"a"/"records.parquet")
    assert list(df.columns) == "run replica seed task epoch step examples split layer metric value".split()
    shown = command("lop-show", tmp_path/"a")
    assert shown.returncode == 0 and "test_accuracy" in shown.stdout
    again = command("lop-run", *SMALL, f"hydra.run.dir={tmp_path}/a")
    assert again.returncode == 2 and "resume=true" in again.stderr
    compared = command("lop-show", tmp_path/"a", tmp_path/"a", "--figures", tmp_path/"both")
    assert compared.returncode == 0 and (tmp_path/"both"/"overview.png").exists()


def test_a_sweep_makes_a_folder_each(tmp_path):
    done = command("lop-run", "--multirun", *SMALL, "intervention=backprop", "logging.figures=false", "optimizer.lr=0.001,0.01", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0, done.stderr
    df = read_records(tmp_path/"sweep")
    assert df.run.nunique() == 2


@pytest.mark.parametrize("words, says", [      # one for each place where words are looked at; tests/test_config.py has the rest
    (["trainin.epochs=3"], "Did you mean 'training.epochs'?"),
    (["model=cnn", "model.conv_channels=[8,8,8,8]"], "Nothing is left at"),
    (["training.device=cuda:99"], "cuda:99"),
    (["hydra.run.dir=/dev/null/run"], "Cannot write"),
    (["nonsense"], "key=value"),
])
def test_bad_words_get_a_message(words, says, tmp_path):
    run_dir = [] if any("run.dir" in w for w in words) else [f"hydra.run.dir={tmp_path}/run"]
    done = command("lop-run", *words, *run_dir, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2


def test_truncated_data_gets_a_message(tmp_path):
    raw = tmp_path/"MNIST"/"raw"; raw.mkdir(parents=True)
    (raw/"train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b cut short")
    done = command("lop-run", "dataset=mnist", f"hydra.run.dir={tmp_path}/run", env=dict(LOP_DATA=str(tmp_path)))
    assert done.returncode == 2 and "train-images-idx3-ubyte.gz" in done.stderr and "lop-data mnist" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.parametrize("name", ["lop-run", "lop-show", "lop-data"])
def test_help_has_examples(name):
    done = command(name, "--help")
    assert done.returncode == 0 and done.stdout.count(name) >= 2


def start(folder, *more):
    return subprocess.Popen([BIN/"lop-run", *LONG, f"hydra.run.dir={folder}", *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)


LONG = ["stream.tasks=40", "training.epochs=2", "training.replicas=2", "logging.checkpoint_seconds=0.1", "logging.figures=false", "metrics.probe_size=100"]


def final(folder):
    return {arm: torch.load(checkpoints(folder/"checkpoints"/arm)[-1], weights_only=True) for arm in ARMS}


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(.01)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")/"run"
    process = start(folder); _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder


def test_two_runs_of_one_seed_are_the_same_bits(never_killed, tmp_path):
    process = start(tmp_path/"run"); process.communicate(timeout=300)
    pd.testing.assert_frame_equal(read_records(tmp_path/"run"), read_records(never_killed), check_exact=True)


def test_killed_and_resumed_equals_never_killed(never_killed, tmp_path):
    "kill -9 twice in each arm, at random moments, and go on each time"
    folder, rng = tmp_path/"run", random.Random()
    for arm in ARMS:
        for _ in range(2):
            seen = checkpoints(folder/"checkpoints"/arm)[-1:]
            process = start(folder, "resume=true")
            wait_for(lambda: checkpoints(folder/"checkpoints"/arm)[-1:] != seen, process)
            time.sleep(rng.uniform(0, .2))
            process.send_signal(signal.SIGKILL); process.wait(); process.stderr.close()
            assert not (folder/"records.parquet").exists(), "the run ended before it was killed"
            assert len(read_records(folder)) > 0
    shown = command("lop-show", folder)
    assert shown.returncode == 0 and "online_accuracy" in shown.stdout
    process = start(folder, "resume=true"); _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    pd.testing.assert_frame_equal(read_records(folder), read_records(never_killed), check_exact=True)
    for arm, want in final(never_killed).items():
        have = final(folder)[arm]
        assert have["at"] == want["at"]
        for k, v in want["replicas"]["params"].items(): assert torch.equal(have["replicas"]["params"][k], v), (arm, k)


def test_ctrl_c_keeps_what_was_computed(tmp_path):
    folder = tmp_path/"run"
    process = start(folder)
    wait_for(lambda: checkpoints(folder/"checkpoints"/"backprop"), process)
    time.sleep(.5)
    process.send_signal(signal.SIGINT); _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume=true" in err and "Traceback" not in err
    assert len(read_records(folder)) and not json.loads((folder/"summary.json").read_text())["finished"]


def test_wandb_gets_the_same_numbers(tmp_path):
    folder = tmp_path/"run"
    done = command("lop-run", *SMALL, "intervention=backprop", "use_wandb=true", "wandb_tags=[a]", "logging.figures=false", f"hydra.run.dir={folder}", env=dict(WANDB_MODE="offline"))
    assert done.returncode == 0, done.stderr
    told = read_wandb(next((folder/"wandb").rglob("*.wandb")), wait=20)
    logged = {(r["global_step"], k): v for r in told["rows"] for k, v in r.items() if "/seed_" in k}
    assert logged == pytest.approx({(r.step, f"{wandb_key(r.split, r.layer, r.metric)}/seed_{r.seed}"): r.value for r in read_records(folder).itertuples()})


def test_without_wandb_it_is_never_imported(tmp_path):
    code = f"import sys; sys.argv = ['lop-run', 'stream.tasks=1', 'training.epochs=1', 'intervention=backprop', 'logging.figures=false', 'hydra.run.dir={tmp_path}/run']; from lop_nb.cli import run; run(); assert 'wandb' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, timeout=120).returncode == 0


def test_a_run_may_be_resumed_with_other_views(tmp_path):
    "what only looks and shows may change between two parts of a run"
    words = [*SMALL, "intervention=backprop", "logging.figures=false", "logging.checkpoint_seconds=0", f"hydra.run.dir={tmp_path}/run"]
    assert command("lop-run", *words, "logging.progress=false").returncode == 0
    again = command("lop-run", *words, "resume=true")
    assert again.returncode == 0, again.stderr
