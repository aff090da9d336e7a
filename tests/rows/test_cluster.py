"Rows A67 and B30 of the sources: grids and tickets on a cluster; where SLURM is installed, on one of this machine alone."
import os
import shutil
import socket
import subprocess
import time

import pytest

from lop_nb.cluster import array_script
from lop_nb.compose import compose
from lop_nb.config import presets
from lop_nb.records import read_records

CONF = """ClusterName=lop
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
KillWait=5
SlurmctldPort={port}
SlurmdPort={more}
SlurmctldPidFile={d}/ctld.pid
SlurmdPidFile={d}/d.pid
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldLogFile={d}/ctld.log
SlurmdLogFile={d}/d.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A cluster of one node, that of this machine"
    missing = [p for p in ("slurmctld", "slurmd", "sbatch", "sinfo") if not shutil.which(p)]
    if missing or os.geteuid(): pytest.skip(f"no SLURM that this user can start ({', '.join(missing) or 'root alone can'})")
    d = tmp_path_factory.mktemp("slurm"); (d/"state").mkdir(); (d/"spool").mkdir()
    (d/"slurm.conf").write_text(CONF.format(d=d, host=socket.gethostname().split(".")[0], port=free_port(), more=free_port(), cpus=os.cpu_count()))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(SLURM_CONF=str(d/"slurm.conf"), WANDB_MODE="disabled", OMP_NUM_THREADS="1")
    servers = [subprocess.Popen([p, "-D"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for p in ("slurmctld", "slurmd")]
    try:
        for _ in range(300):
            if "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True).stdout: break
            time.sleep(.1)
        else: pytest.fail((d/"ctld.log").read_text()[-2000:])
        yield lambda script, folder: _send(script, folder, env)
    finally:
        for s in servers: s.terminate(); s.wait(20)


def _send(script, folder, env):
    folder.mkdir(parents=True, exist_ok=True); (folder/"job.sh").write_text(script)
    subprocess.run(["sbatch", "--test-only", folder/"job.sh"], env=env, check=True, capture_output=True)
    job = subprocess.run(["sbatch", "--parsable", folder/"job.sh"], env=env, check=True, capture_output=True, text=True).stdout.strip()
    for _ in range(600):
        if not (left := subprocess.run(["squeue", "-h", "-t", "pending,running,completing", "-j", job], env=env, capture_output=True, text=True).stdout.strip()): break
        time.sleep(.5)
    logs = "".join(f.read_text() for f in sorted(folder.glob("slurm-*.log")))
    assert not left and "lop-run: " not in logs and "Traceback" not in logs, left + logs


TINY = ["dataset=digits", "dataset.examples_per_class=10", "dataset.normalize=unit", "model.hidden_sizes=[8]", "training.epochs=1", "training.replicas=1", "logging.figures=false"]


def test_A67_a_grid_on_a_cluster(cluster, tmp_path):
    "an array script is written from any sweep, with a job for each run; each has its own folder, and sent again it goes on from there"
    for name in (p for p in presets() if p.startswith("cloning")): assert "--array=0-1\n" in array_script([f"+experiment={name}", "training.seed=1,2"], "runs")
    script = array_script([*TINY, "intervention=backprop", "stream.tasks=2", "optimizer.lr=0.001,0.01"], tmp_path/"sweep"); cluster(script, tmp_path/"sweep")
    rates = [compose_of(tmp_path/"sweep"/str(i)).optimizer.lr for i in range(2)]; assert rates == [.001, .01]
    before = read_records(tmp_path/"sweep"); cluster(script, tmp_path/"sweep"); assert read_records(tmp_path/"sweep").equals(before)


def compose_of(folder):
    from omegaconf import OmegaConf
    return OmegaConf.load(folder/"config.yaml")


def test_B30_tickets_on_a_cluster(cluster, tmp_path):
    "the tasks of a study of tickets as jobs of one array, in the folder of its networks; account and a day's time as source B's script has them"
    from lop_nb.experiments import run_study
    words = [*TINY, "stream.tasks=2", "tickets.masks=1", "tickets.rounds=[1]", "tickets.targets=[0.5]"]
    run_study(compose(["+experiment=tickets/lop", *words, "logging.snapshot_tasks=1", "logging.progress=false"]), tmp_path/"run")
    script = array_script(["+experiment=tickets/masks", *words, "tickets.tasks=[0],[1]", f"hydra.run.dir={tmp_path/'run'}"], tmp_path/"jobs"); cluster(script, tmp_path/"jobs")
    assert {f.parent.name for f in (tmp_path/"run"/"tickets"/"masks").rglob("done")} == {"task_000000_p0.5_r1", "task_000001_p0.5_r1"}
    day = array_script(["winning_tickets_masks", "tickets.tasks=[0],[50]", "hydra.run.dir=runs/lop"], "runs/jobs", account="dl"); assert "--account=dl" in day and "--time=24:00:00" in day
