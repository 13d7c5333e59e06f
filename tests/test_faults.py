"""Nothing is lost: kill -9 and resume, the same trajectory on any number of processes, signals, full disks, NaN."""
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train_stage1
import train_stage2
from conftest import ROOT, TRAIN, ok, write_folder

STEPS = 40


def state(out):
    return torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)


def same(a, b):
    """Bit for bit, tensors and all."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    x, y = state(a), state(b)
    for key in ("step", "model", "ema", "projector", "opt", "sums"):
        assert same(x[key], y[key]), key
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


def command(stage, data, out, teacher=None, steps=STEPS, processes=1, extra=()):
    name = f"train_stage{stage}.py"
    more = ["--teacher", str(teacher), "--guide-steps", str(steps // 2)] if stage == 2 else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *torchrun, str(ROOT / name), *map(str, TRAIN), "--data", str(data), "--out", str(out), "--steps", str(steps),
            *more, *map(str, extra)]


def start(*args, **kwargs):
    return subprocess.Popen(command(*args, **kwargs), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*args, processes=1, **kwargs):
    """Run to the end: several processes under torchrun, one within this process, which saves its start-up time."""
    if processes > 1:
        process = start(*args, processes=processes, **kwargs)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    argv, sys.argv = sys.argv, command(*args, **kwargs)[1:]
    try:
        (train_stage1 if args[0] == 1 else train_stage2).main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def teacher(runs):
    return runs / "teacher/teacher.pt"


def kills_survived(stage, data, teacher, whole, out, kills, rng):
    """Kill `kills` times at random moments of writing and training, then let it end: must equal the run `whole`."""
    survived, span = 0, 0.3
    while survived < kills:
        process = start(stage, data, out, teacher)
        while process.poll() is None and not any(out.glob("ckpt.pt*")):  # the first checkpoint is being written, or stands
            time.sleep(0.002)
        if survived:  # continuing: wait for it to have begun
            for line in process.stdout:
                if "steps" in line:
                    break
        time.sleep(rng.uniform(0, span))
        if process.poll() is not None:  # it came to the end before the kill: take back half of it, as if the disk were older
            milestones = sorted(out.glob("ckpt-*.pt"))
            shutil.copy(milestones[0], out / "ckpt.pt")
            span *= 0.7
            process.communicate()
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        survived += 1
        if (out / "ckpt.pt").exists():
            state(out)  # whole, whatever the moment
    finish(stage, data, out, teacher)
    assert_same_run(whole, out)
    return survived


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_runs_equal_the_uninterrupted_one(stage, data, teacher, tmp_path):
    """Stage 2 is killed on both sides of the step at which its guidance ends. KILLS=20 for the long version."""
    kills = int(os.environ.get("KILLS", 3))
    finish(stage, data, tmp_path / "whole", teacher)
    count = kills_survived(stage, data, teacher, tmp_path / "whole", tmp_path / "killed", kills, random.Random(stage))
    print(f"stage {stage}: {count} kills survived, final state and log bit for bit equal")


def test_resume_across_the_end_of_guidance(data, teacher, tmp_path):
    finish(2, data, tmp_path / "whole", teacher)
    for steps in (18, 20, 24):  # guidance ends after 20
        finish(2, data, tmp_path / "parts", teacher, extra=["--steps", steps, "--guide-steps", STEPS // 2])
    os.rename(teacher, f"{teacher}.away")  # neither the teacher nor its file is needed now
    try:
        finish(2, data, tmp_path / "parts", teacher)
    finally:
        os.rename(f"{teacher}.away", teacher)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stage", [1, 2])
def test_processes_and_accumulation_walk_the_same_trajectory(stage, data, teacher, tmp_path):
    """1, 2 and 4 processes, 2 and 4 accumulation steps, and a run that changes from 2 processes to 1 half-way."""
    flags = ["--clip", 10]
    finish(stage, data, tmp_path / "one", teacher, steps=50, extra=flags)
    want = torch.cat([p.flatten() for p in state(tmp_path / "one")["model"].values()])
    differences = {}
    ways = (("2 processes", 2, 1), ("4 processes", 4, 1), ("accum 2", 1, 2), ("accum 4", 1, 4), ("2 then 1", 2, 2))
    for name, processes, accum in ways if stage == 2 else ways[:1] + ways[3:4]:  # the loop is one; stage 2 has all of it
        if name == "2 then 1":
            finish(stage, data, tmp_path / name, teacher, steps=50, processes=2, extra=[*flags, "--accum", 2, "--steps", 26])
        finish(stage, data, tmp_path / name, teacher, steps=50, processes=1 if name == "2 then 1" else processes,
               extra=[*flags, "--accum", accum])
        got = torch.cat([p.flatten() for p in state(tmp_path / name)["model"].values()])
        differences[name] = ((got - want).norm() / want.norm()).item()
    print(f"stage {stage}: relative difference of parameters after 50 steps:", {k: f"{v:.1e}" for k, v in differences.items()})
    assert max(differences.values()) < 1e-5


def test_each_image_gets_the_same_draws_on_any_number_of_processes():
    """t, drop and both noises of image i, and its place in the batch, whatever the shares: exactly."""
    from train_stage1 import batch_indices, draw
    whole, indices = draw(5, 16, (4, 8, 8), 3, "cpu"), batch_indices(5, 16, 100, 3)
    for ways in (2, 4, 8):
        for way in range(ways):
            mine = batch_indices(5, 16, 100, 3)[way::ways]
            for i, image in enumerate(mine):
                place = np.flatnonzero(indices == image)[0]
                assert all(torch.equal(full[way::ways][i], full[place]) for full in whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_leaves_and_the_run_continues(number, processes, data, tmp_path):
    if processes == 2 and number == signal.SIGINT:
        number = signal.SIGTERM  # torchrun turns either into SIGTERM for its workers
    finish(1, data, tmp_path / "whole", processes=processes)
    process = start(1, data, tmp_path / "out", processes=processes, extra=["--log-every", 1, "--save-every", 1000])
    while not (tmp_path / "out/timing.jsonl").exists() or not (tmp_path / "out/timing.jsonl").read_text():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert "stopped by a signal after step" in out and "the same command continues" in out, out + err
    assert process.returncode == 143 or processes == 2  # torchrun itself reports the signal
    stopped = state(tmp_path / "out")["step"]
    assert 0 < stopped < STEPS and f"after step {stopped}," in out
    if processes == 1:
        finish(1, data, tmp_path / "out", extra=["--log-every", 2])
        x, y = state(tmp_path / "whole"), state(tmp_path / "out")
        assert same(x["model"], y["model"]) and same(x["opt"], y["opt"])


def test_a_second_signal_leaves_at_once(data, tmp_path):
    """Within one step of 64 parts, far longer than the signals are apart: it does not wait for the step's end, and saves nothing."""
    process = start(1, data, tmp_path / "out", steps=100000, extra=["--batch-size", 384, "--accum", 64, "--model", "SiT-S/2"])
    for line in process.stdout:
        if "steps 0" in line:
            break
    signals = 0
    while process.poll() is None and signals < 20:  # on a slow machine two may be met within a second, and count as one
        process.send_signal(signal.SIGINT)
        signals += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)
    assert process.wait(timeout=60) == 130 and signals > 1
    assert not (tmp_path / "out/ckpt.pt").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(data, tmp_path):
    """RLIMIT_FSIZE makes every longer write fail, as a full disk does."""
    out = tmp_path / "out"
    finish(1, data, out, steps=4)
    before = (out / "ckpt.pt").read_bytes()
    limited = subprocess.run(["bash", "-c", "trap '' XFSZ; ulimit -f 1000; exec \"$@\"", "x", *command(1, data, out, steps=8)], cwd=ROOT,
                             capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert limited.returncode == 2, limited.stderr
    assert "stopped after step 8" in limited.stderr and "could not be written" in limited.stderr and "Traceback" not in limited.stderr
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    finish(1, data, out, steps=8)
    finish(1, data, tmp_path / "whole", steps=8)
    assert_same_run(tmp_path / "whole", out)


def test_milestones_without_hard_links_are_copies(data, tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    finish(1, data, tmp_path / "out", steps=12, extra=["--keep", 2])
    assert sorted(f.name for f in (tmp_path / "out").glob("ckpt-*.pt")) == ["ckpt-0000008.pt", "ckpt-0000012.pt"]
    assert (tmp_path / "out/ckpt-0000012.pt").read_bytes() == (tmp_path / "out/ckpt.pt").read_bytes()
    assert torch.load(tmp_path / "out/ckpt-0000008.pt", weights_only=True)["step"] == 8


def test_only_the_last_milestones_are_kept(data, tmp_path):
    finish(1, data, tmp_path / "out", steps=20, extra=["--keep", 2])
    assert sorted(f.name for f in (tmp_path / "out").glob("ckpt-*.pt")) == ["ckpt-0000016.pt", "ckpt-0000020.pt"]
    assert state(tmp_path / "out")["step"] == 20


@pytest.mark.parametrize("processes", [1, 2])
def test_not_a_number_stops_before_the_step(processes, tmp_path):
    """One poisoned latent, past the check that opening the folder makes (there, 1 row in 2 is looked at)."""
    folder = write_folder(tmp_path / "data", num=8192)
    moments = np.load(folder / "moments.npy", mmap_mode="r+")
    from train_stage1 import batch_indices
    victim = next(i for i in batch_indices(5, 8, 8192, 0) if i % 2)  # first seen in step 6
    moments[victim] = np.nan
    moments.flush()
    process = start(1, folder, tmp_path / "out", processes=processes)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (3 if processes == 1 else 1), err  # torchrun's own status is 1 when a worker fails
    message = next(line for line in err.splitlines() if "not finite" in line)
    assert "step 6 is not finite" in message and "1 images with t from" in message and str(tmp_path / "out/ckpt.pt") in message
    if processes == 1:
        assert err.count("\n") == 1
    else:
        assert err.count("exitcode  : 3") == 2 or "exitcode" in err
    saved = state(tmp_path / "out")
    assert saved["step"] == 4 and all(torch.isfinite(p).all() for p in saved["model"].values())


def test_sampling_killed_and_repeated_is_the_same_for_any_batch_and_process_count(runs, tmp_path):
    flags = ["--ckpt", runs / "stage2/ckpt.pt", "--num-images", 12, "--steps", 4, "--cfg", 2, "--device", "cpu"]
    ok("sample.py", *flags, "--batch-size", 4, "--out", tmp_path / "a")
    want = np.load(tmp_path / "a/samples.npz")["arr_0"]
    process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *map(str, flags), "--batch-size", "4", "--out", str(tmp_path / "b")],
                               cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "b").glob("part-*.npz")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    ok("sample.py", *flags, "--batch-size", 4, "--out", tmp_path / "b", processes=2)
    assert np.array_equal(np.load(tmp_path / "b/samples.npz")["arr_0"], want)  # the same batch shape: bit for bit
    assert (tmp_path / "b/grid.png").exists() and not list((tmp_path / "b").glob("part-*"))
    ok("sample.py", *flags, "--batch-size", 5, "--out", tmp_path / "c")
    assert np.abs(np.load(tmp_path / "c/samples.npz")["arr_0"].astype(int) - want).max() <= 1  # another shape: rounding only
    assert "nothing to do" in ok("sample.py", *flags, "--batch-size", 4, "--out", tmp_path / "a")


def test_machines_that_do_not_share_out_are_told(data, tmp_path):
    """Two machines with an --out of their own: one finds a checkpoint, the other none; they must not train different networks."""
    finish(1, data, tmp_path / "one", steps=4)
    shutil.copytree(tmp_path / "one", tmp_path / "before")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    machines = [subprocess.Popen(command(1, data, tmp_path / out, steps=8), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                                      "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}) for rank, out in enumerate(("one", "other"))]
    for machine in machines:
        _, err = machine.communicate(timeout=120)
        assert machine.returncode == 2 and "all machines must share it" in err and "Traceback" not in err, err
    assert_same_run(tmp_path / "before", tmp_path / "one")
    assert not (tmp_path / "other/ckpt.pt").exists()
