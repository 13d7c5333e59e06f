"""runs/slurm.sh against commands that stand for Slurm's: what it starts, stops and asks for again.

docs/jobs.md tells of the same script under Slurm itself.
"""

import os
import signal
import stat
import subprocess

import pytest
from conftest import ROOT

SRUN = """echo "srun $*" >> calls; while [ "$1" != torchrun ]; do shift; done; exec "$@" """
# It stops as a training does: SIGTERM, some work, an exit status that is not 0
TORCHRUN = """trap 'echo saved >> calls; exit 1' TERM
echo $$ > run; echo started; [ -z "$END" ] || exit $END
while :; do sleep 0.05; done"""
SCANCEL = """echo "scancel $*" >> calls; kill -TERM $(cat run)"""
SCONTROL = """[ $1 = show ] && echo node7 || echo "scontrol $*" >> calls"""


@pytest.fixture
def job(tmp_path):
    """A job of this script on two nodes; the variables are those that Slurm sets."""
    names = {"srun": SRUN, "torchrun": TORCHRUN, "scancel": SCANCEL, "scontrol": SCONTROL}
    for name, text in names.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    started = []

    def start(**more):
        env = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]", **more}
        env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "8"}
        started.append(
            subprocess.Popen(
                ["bash", ROOT / "runs/slurm.sh", "train_stage1.py", "--out", "a folder"],
                cwd=tmp_path,
                env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "END": "", **env},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        started[0].stdout.readline()  # of torchrun, which is there now
        return started[0]

    yield start
    if started[0].poll() is None:
        os.killpg(started[0].pid, signal.SIGKILL)
    started[0].communicate()


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def test_one_torchrun_a_node_finds_the_first_node(job, tmp_path):
    assert job(END="0").wait(timeout=60) == 0
    (line,) = calls(tmp_path)  # nothing is requeued
    assert "--nnodes=2 --nproc_per_node=8" in line and "--rdzv_endpoint=node7:22345" in line
    assert line.endswith(" train_stage1.py --out a folder")


def test_the_time_limit_stops_the_run_and_asks_for_another(job, tmp_path):
    process = job()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 1
    _, *later = calls(tmp_path)
    assert later == ["scancel --signal=TERM 12345", "saved", "scontrol requeue 12345"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGCONT])
def test_scancel_and_requeue_wait_for_the_checkpoint(number, job, tmp_path):
    """Slurm sends these to the shell and to the run; the shell must outlive the run."""
    process = job()
    process.send_signal(number)
    os.kill(int((tmp_path / "run").read_text()), signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert calls(tmp_path)[1:] == ["saved"]  # Slurm itself requeues, or does not


def test_a_run_that_fails_by_itself_stays_failed(job, tmp_path):
    assert job(END="2").wait(timeout=60) == 2
    assert len(calls(tmp_path)) == 1
