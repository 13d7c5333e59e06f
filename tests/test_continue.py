"""Nothing is lost, nothing hangs: kills, processes, signals, full disks, closed pipes, NaN."""

import contextlib
import errno
import re
import resource
import shutil
import signal
import subprocess
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TRAIN,
    batch_indices,
    call,
    group,
    script,
    signals_kept,
    start,
    torchrun,
    wait_for,
    write_folder,
)

import common
import models
import train_stage1
import train_stage2
from common import UserError
from vae_latents import LatentFolder

STEPS = 40


pytestmark = pytest.mark.slow


def newest(out):
    return models.checkpoints(out)[0]


def state(out):
    return torch.load(newest(out), map_location="cpu", weights_only=True)


def same(a, b):
    """Bit for bit, tensors and all."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    x, y = state(a), state(b)
    for key in ("step", "model", "ema", "projector", "opt", "projector_opt", "sums"):
        assert same(x[key], y[key]), key
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


def flags(stage, data, out, teacher=None, steps=STEPS, extra=()):
    more = ["--teacher", teacher, "--guide-steps", steps // 2] if stage == 2 else []
    small = [*TRAIN, "--model", "SiT-P/8"]
    given = [*small, "--data", data, "--out", out, "--steps", steps, *more, *extra]
    return list(map(str, given))


def begin(stage, *args, **kwargs):
    """Start a training that is to be interrupted."""
    return start(ROOT / f"train_stage{stage}.py", *flags(stage, *args, **kwargs))


def finish(stage, *args, processes=1, **kwargs):
    """Run to the end: one process within this one, several as torchrun starts them."""
    module = train_stage1 if stage == 1 else train_stage2
    if processes == 1:
        return call(module, *flags(stage, *args, **kwargs))
    for _, err, status in group(processes, module.__file__, *flags(stage, *args, **kwargs)):
        assert status == 0, err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    import build_teacher

    out = tmp_path_factory.mktemp("teacher")
    finish(1, data, out / "stage1", steps=4)
    call(build_teacher, "--ckpt", out / "stage1", "--out", out)
    return out / "teacher.pt"


BETWEEN = ["--log-every", 3]


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory):
    """The uninterrupted runs of both stages, by stage. A line of the log is of steps on both sides
    of a checkpoint."""
    out = tmp_path_factory.mktemp("whole")
    for stage in (1, 2):
        with signals_kept():
            finish(stage, data, out / str(stage), teacher, extra=BETWEEN)
    return {stage: out / str(stage) for stage in (1, 2)}


# ---- kills and continuing


KILLED = f"""
    import contextlib, os, sys
    sys.path.insert(0, {str(ROOT)!r})
    import common, train_stage1, train_stage2
    write = common.atomic_write
    @contextlib.contextmanager
    def killed(path):
        with write(path) as file:
            yield file
            if os.path.basename(path) == os.environ["KILLED_AT"]:
                file.flush()
                os.truncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
                os.kill(os.getpid(), 9)
    common.atomic_write = killed
    common.run((train_stage1, train_stage2)[int(os.environ["STAGE"]) - 1].main)
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_runs_equal_the_uninterrupted_one(stage, data, teacher, whole, tmp_path):
    """kill -9 while a checkpoint is half written, when one is there, and while another is half
    written; on both sides of guidance's end."""
    out, code = tmp_path / "killed", tmp_path / "killed.py"
    code.write_text(textwrap.dedent(KILLED))
    given = flags(stage, data, out, teacher, extra=BETWEEN)
    for step in (4, 16, 24):
        name, before = f"ckpt-{step:07d}.pt", models.checkpoints(out)[:1]
        env = {"STAGE": str(stage), "KILLED_AT": name if step != 16 else ""}
        process = start(code, *given, env=env)
        while step == 16 and process.poll() is None and not (out / name).exists():
            pass
        if step == 16:
            process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        if step != 16:
            assert (out / f"{name}.tmp").exists() and not (out / name).exists()
            assert {*before} <= {*models.checkpoints(out)}
        if models.checkpoints(out):
            state(out)  # whole, whatever the moment
    (out / "ckpt-0000015.pt.tmp").touch()  # of a signal's save that was killed: no step to save
    finish(stage, data, out, teacher, extra=BETWEEN)
    assert_same_run(whole[stage], out)
    assert not list(out.glob("*.tmp"))


def test_resume_across_the_end_of_guidance(data, teacher, whole, tmp_path):
    for steps in (18, 20, 24):  # guidance ends after 20
        extra = [*BETWEEN, "--steps", steps, "--guide-steps", STEPS // 2]
        finish(2, data, tmp_path / "parts", teacher, extra=extra)
    no_teacher = tmp_path / "no-teacher.pt"  # it is not needed now
    finish(2, data, tmp_path / "parts", no_teacher, extra=BETWEEN)
    assert_same_run(whole[2], tmp_path / "parts")


def test_what_guided_the_last_step_is_saved_and_then_dropped(data, teacher, tmp_path):
    finish(2, data, tmp_path / "a", teacher, extra=["--steps", 20])
    saved = state(tmp_path / "a")
    assert saved["projector"] and saved["projector_opt"]["state"]
    finish(2, data, tmp_path / "a", teacher)
    saved = state(tmp_path / "a")
    assert saved["projector"] is None and saved["projector_opt"] is None


WAYS = {"2 processes": (2, 1), "4 processes": (4, 1), "accum 4": (1, 4), "2 then 1": (2, 2)}


@pytest.fixture(scope="module")
def one(data, teacher, tmp_path_factory):
    """By stage, the run of one process that the others are compared with."""
    out = tmp_path_factory.mktemp("one")
    for stage in (1, 2):
        with signals_kept():
            finish(stage, data, out / str(stage), teacher, extra=["--clip", 10])
    return {stage: out / str(stage) for stage in (1, 2)}


@pytest.mark.parametrize("stage,ways", [(1, "2 processes"), *((2, way) for way in WAYS)])
def test_processes_and_accumulation_walk_the_same_trajectory(
    stage, ways, data, teacher, one, tmp_path
):
    processes, accum = WAYS[ways]
    extra = ["--clip", 10, "--accum", accum]
    if ways == "2 then 1":
        half = [*extra, "--steps", 22]
        finish(stage, data, tmp_path / "b", teacher, processes=2, extra=half)
        processes = 1
    finish(stage, data, tmp_path / "b", teacher, processes=processes, extra=extra)
    got, want = (
        torch.cat([p.flatten() for p in state(out)["model"].values()])
        for out in (tmp_path / "b", one[stage])
    )
    difference = ((got - want).norm() / want.norm()).item()
    print(f"stage {stage}, {ways}: relative difference of the parameters {difference:.1e}")
    assert difference < 1e-5


def test_each_image_gets_the_same_draws_on_any_number_of_processes(data):
    args = types.SimpleNamespace(batch_size=16, seed=3, label_drop=0.5)
    whole = train_stage1.draw(5, args, LatentFolder(data), "cpu")
    names = [name for name, value in vars(whole).items() if value is not None]
    assert {"indices", "t", "drop", "posterior", "eps"} <= {*names}
    for ways in (2, 4, 8):
        for way in range(ways):
            share = whole[way::ways]
            for i, image in enumerate(share.indices):
                (place,) = (whole.indices == image).nonzero()[0]
                for name in names:
                    assert torch.equal(getattr(share, name)[i], getattr(whole, name)[place]), name


# ---- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_leaves_and_the_run_continues(name, data, whole, tmp_path):
    extra = ["--log-every", 1, "--save-every", 1000]
    process = begin(1, data, tmp_path / "out", steps=100000, extra=extra)
    wait_for(process.stdout, "step 3/")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=600)
    stopped = int(re.search(r"stopped by a signal after step (\d+), which is saved", out)[1])
    assert process.returncode == 143 and not err and state(tmp_path / "out")["step"] == stopped
    if stopped < STEPS:
        finish(1, data, tmp_path / "out", extra=["--log-every", 2])
        x, y = state(whole[1]), state(tmp_path / "out")
        assert same(x["model"], y["model"]) and same(x["opt"], y["opt"])


def test_a_signal_to_torchrun_saves_and_leaves(data, tmp_path):
    extra = ["--log-every", 1, "--save-every", 1000]
    given = flags(1, data, tmp_path / "out", steps=100000, extra=extra)
    process = start(*torchrun(2), ROOT / "train_stage1.py", *given)
    wait_for(process.stdout, "step 3/")
    process.terminate()
    out, err = process.communicate(timeout=600)
    stopped = re.search(r"stopped by a signal after step (\d+), which is saved", out)
    assert stopped and state(tmp_path / "out")["step"] == int(stopped[1]), out + err


def test_nohup_is_respected(data, tmp_path):
    given = flags(1, data, tmp_path / "out", extra=["--log-every", 1])
    process = start(ROOT / "train_stage1.py", *given, ignored=[signal.SIGHUP])
    wait_for(process.stdout, "step 3/")
    process.send_signal(signal.SIGHUP)
    assert "done at step 40" in process.communicate()[0] and process.returncode == 0


def hears(process, number):
    """Whether a process has a handler of its own for this signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1


SECOND = {"SIGINT": 130, "SIGTERM": -signal.SIGTERM}  # what Python does with each


@pytest.mark.parametrize("name", SECOND)
def test_a_second_signal_leaves_at_once(name, data, tmp_path):
    """Within one step of 8,192 parts: it does not wait for the step's end, and saves nothing."""
    process = begin(
        1, data, tmp_path / "out", steps=2, extra=["--batch-size", 8192, "--accum", 8192]
    )
    while not hears(process, signal.SIGTERM):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pause = 2  # two within a second count as one, for torchrun doubles each
    while process.poll() is None:
        process.send_signal(getattr(signal, name))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=pause)
        pause = 60  # a third that comes soon would find Python at its end, and kill it
    assert process.returncode == SECOND[name] and process.stderr.read() == ""
    assert not models.checkpoints(tmp_path / "out")


def test_two_signals_within_a_moment_are_one(monkeypatch):
    """Torchrun sends its processes what the terminal sent them already."""
    now, killed = [100.0], []
    monkeypatch.setattr(train_stage1.time, "time", lambda: now[0])
    monkeypatch.setattr(train_stage1.os, "kill", lambda pid, number: killed.append(number))
    before = signal.getsignal(signal.SIGTERM)
    with train_stage1.heard_signals() as heard:
        hear = signal.getsignal(signal.SIGTERM)
        assert not heard and hear != before
        hear(signal.SIGTERM, None)
        now[0] += 0.5
        hear(signal.SIGTERM, None)
        assert heard and not killed
        now[0] += 1
        hear(signal.SIGTERM, None)
        assert killed == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


# ---- processes that fail


FAULTS = {
    "raises": ("raise ValueError('boom')", "boom"),
    "user": ("raise common.UserError('a mistake')", "error: a mistake"),
    "killed": ("os.kill(os.getpid(), 9)", "exitcode"),  # as torchrun calls it
}


@pytest.mark.parametrize("kind", FAULTS)
def test_one_of_two_processes_fails_and_all_are_gone(kind, data, tmp_path):
    """In the middle of a step, while the other waits for it in a collective. The one that is
    killed is torchrun's; of two that torchrun does not watch, the other ends by itself."""
    code = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import common, models, train_stage1
        update = train_stage1.State.update
        def faulty(self, *args):
            if self.step == 3 and os.environ["RANK"] == "1":
                {FAULTS[kind][0]}
            update(self, *args)
        train_stage1.State.update = faulty
        common.run(train_stage1.main)
    """
    (tmp_path / "faulty.py").write_text(textwrap.dedent(code))
    given = [tmp_path / "faulty.py", *flags(1, data, tmp_path / "out")]
    if kind == "killed":
        result = script(*given, processes=2)
        assert result.returncode != 0 and FAULTS[kind][1] in result.stderr, result.stderr
    else:
        ends = group(2, *given)
        assert all(status > 0 for *_, status in ends), ends
        assert FAULTS[kind][1] in ends[1][1], ends


def test_all_processes_learn_of_a_failed_save(data, tmp_path):
    """The one that writes is told by the disk, the other by the one that writes."""
    code = f"""
        import os, pathlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        import common, models, train_stage1
        write = common.atomic_write
        def full(path):
            if "ckpt-" in str(path):
                raise common.UserError("the disk is full")
            return write(path)
        common.atomic_write = full
        def main():
            try:
                train_stage1.main()
            except common.UserError as error:
                pathlib.Path({str(tmp_path)!r}, "told " + os.environ["RANK"]).write_text(str(error))
                raise
        common.run(main)
    """
    (tmp_path / "faulty.py").write_text(textwrap.dedent(code))
    given = flags(1, data, tmp_path / "out", steps=8)
    for _, err, status in group(2, tmp_path / "faulty.py", *given):
        assert status == 2 and "error: stopped after step 4" in err
    told = [(tmp_path / f"told {rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] and "the disk is full" in told[0]
    assert not models.checkpoints(tmp_path / "out")


def test_a_readers_exception_arrives_at_once(data, tmp_path, monkeypatch):
    def broken(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(train_stage1, "order_of_epoch", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        finish(1, data, tmp_path / "out")


def test_machines_that_do_not_share_out_are_told(data, tmp_path):
    """Two machines with an --out of their own: one finds a checkpoint, the other none."""
    finish(1, data, tmp_path / "one", steps=4)
    shutil.copytree(tmp_path / "one", tmp_path / "before")
    each = [flags(1, data, tmp_path / out, steps=8) for out in ("one", "other")]
    ends = group(2, ROOT / "train_stage1.py", each=each)
    errors = [err for _, err, _ in ends]
    assert all(status == 2 for *_, status in ends), errors
    assert not any("Traceback" in error for error in errors), errors
    assert any(re.search("different .*checkpoint", error) for error in errors), errors
    assert_same_run(tmp_path / "before", tmp_path / "one")
    assert not models.checkpoints(tmp_path / "other")


def test_two_runs_on_one_folder(data, tmp_path):
    """The second is refused; a dead one keeps nobody out."""
    process = begin(1, data, tmp_path / "out", steps=100000)
    wait_for(process.stdout, "step 2/")
    half = tmp_path / "out/ckpt-0000001.pt"
    half.write_bytes(b"half")  # what a run writes is not read beside it
    with pytest.raises(UserError, match="another run is using it"):
        finish(1, data, tmp_path / "out")
    half.unlink(missing_ok=True)  # the first run may have deleted it, as its oldest
    process.kill()
    process.communicate()
    saved = [int(file.stem[5:]) for file in models.checkpoints(tmp_path / "out")]
    finish(1, data, tmp_path / "out", steps=max(saved, default=0) + 2)


def test_a_file_system_without_locks_is_a_warning(data, runs, tmp_path, monkeypatch, capsys):
    """And another error of a lock is not taken for another run."""
    import sample

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "lockf", no_locks)
    finish(1, data, tmp_path / "out", steps=2)
    finish(1, data, tmp_path / "out", steps=4)
    said = [line for line in capsys.readouterr().err.splitlines() if "locks" in line]
    assert len(said) == 2 and all(str(tmp_path / "out") in line for line in said)
    assert state(tmp_path / "out")["step"] == 4
    call(
        sample, "--ckpt", runs / "stage2", "--num-images", 2, *SAMPLE, "--out", tmp_path / "samples"
    )
    assert f"warning: {tmp_path}/samples" in capsys.readouterr().err
    monkeypatch.setattr(common.fcntl, "lockf", lambda *args: (_ for _ in ()).throw(BlockingIOError))
    with pytest.raises(UserError, match="another run is using it"):
        finish(1, data, tmp_path / "out", steps=6)


# ---- disks, pipes and files


@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_of_a_run_stays_mapped_to_a_file(stage, data, teacher, tmp_path, monkeypatch):
    """A continued run lets its checkpoint go: deleted, it would still fill the disk. Seen from the
    operating system, in the first step."""
    shutil.copy(teacher, tmp_path / "teacher.pt")
    out, update, maps = tmp_path / "out", train_stage1.State.update, []
    finish(stage, data, out, tmp_path / "teacher.pt", steps=12, extra=["--steps", 4])

    def watched(self, *args):
        mapped = Path("/proc/self/maps").read_text().splitlines()
        maps.append([line for line in mapped if f"{tmp_path}/" in line])
        update(self, *args)

    monkeypatch.setattr(train_stage1.State, "update", watched)
    extra = ["--steps", 6, "--keep", 1]
    finish(stage, data, out, tmp_path / "teacher.pt", steps=12, extra=extra)
    assert maps == [[], []]
    assert [file.name for file in models.checkpoints(out)] == ["ckpt-0000006.pt"]


def test_a_full_disk_leaves_the_last_good_checkpoint(data, refused, tmp_path):
    """RLIMIT_FSIZE makes every longer write fail, as a full disk does."""
    out = tmp_path / "out"
    finish(1, data, out, steps=4)
    before, limits = newest(out).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before) > 1_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        says = ["stopped after step 8", "could not be written"]
        refused(train_stage1, *flags(1, data, out, steps=8), says=says, keeps=out / "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(out).read_bytes() == before and not list(out.glob("*.tmp"))
    finish(1, data, out, steps=8)
    finish(1, data, tmp_path / "whole", steps=8)
    assert_same_run(tmp_path / "whole", out)


def test_a_log_that_cannot_be_written_is_a_warning(data, tmp_path, monkeypatch, capsys):
    """A full disk stops a run only if its checkpoint fails, too."""
    log, update = tmp_path / "out/log.jsonl", train_stage1.State.update

    def spoiling(self, *args):
        update(self, *args)
        if self.step == 3:
            log.unlink()
            log.mkdir()

    monkeypatch.setattr(train_stage1.State, "update", spoiling)
    finish(1, data, tmp_path / "out", steps=6)
    said = capsys.readouterr()
    assert said.err.count(f"warning: {log}") == 2 and "step 6/6" in said.out
    assert state(tmp_path / "out")["step"] == 6


def test_a_closed_pipe_does_not_stop_the_run(data, tmp_path):
    process = begin(1, data, tmp_path / "out", extra=["--log-every", 1])
    wait_for(process.stdout, "step 2/")
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=600) == 0, process.stderr.read()
    assert state(tmp_path / "out")["step"] == STEPS


def test_only_the_runs_own_checkpoints_are_removed(data, tmp_path):
    """By number, not as text; the user's copies stay."""
    out = tmp_path / "out"
    finish(1, data, out, steps=8, extra=["--keep", 2])
    mine = ["ckpt-0-backup.pt", "ckpt-0000004-good.pt", "ckpt-best.pt"]
    for name in mine:
        shutil.copy(newest(out), out / name)
    finish(1, data, out, steps=20, extra=["--keep", 2])
    numbered = ["ckpt-0000016.pt", "ckpt-0000020.pt"]
    assert sorted(f.name for f in out.glob("*.pt")) == sorted([*mine, *numbered])
    shutil.copy(newest(out), out / "ckpt-10000000.pt")
    assert [f.name for f in models.checkpoints(out)][:2] == ["ckpt-10000000.pt", numbered[1]]


@pytest.mark.parametrize("processes", [1, 2])
def test_not_a_number_stops_without_saving(processes, tmp_path):
    """One poisoned latent: nothing of its step is logged or saved, and what there is stays."""
    folder = write_folder(tmp_path / "data")
    finish(1, folder, tmp_path / "out", steps=4)
    before = newest(tmp_path / "out").read_bytes(), (tmp_path / "out/log.jsonl").read_bytes()
    moments = np.load(folder / "moments.npy", mmap_mode="r+")
    first = {*batch_indices(5, 8, 48, 0)}  # not among the 48 whose hash is taken
    moments[min(first)] = np.nan  # seen in step 6 alone: an epoch is 6 steps
    moments.flush()
    saved = state(tmp_path / "out")
    saved["meta"]["identity"] = LatentFolder(folder).meta["identity"]
    torch.save(saved, newest(tmp_path / "out"))
    before = newest(tmp_path / "out").read_bytes(), before[1]
    given = flags(1, folder, tmp_path / "out")
    for _, err, status in group(processes, ROOT / "train_stage1.py", *given):
        assert status == 2 and err.count("\n") == 1, err
        assert "step 6 (or one since the last line) is not finite" in err
        assert "ckpt-0000004.pt" in err
    assert [file.name for file in models.checkpoints(tmp_path / "out")] == ["ckpt-0000004.pt"]
    assert newest(tmp_path / "out").read_bytes() == before[0]
    assert (tmp_path / "out/log.jsonl").read_bytes() == before[1]
    with pytest.raises(UserError, match="step 6 .or one since the last line. is not finite"):
        finish(1, folder, tmp_path / "out", extra=["--log-every", 1])  # finds the step
    log = (tmp_path / "out/log.jsonl").read_bytes()
    assert log.startswith(before[1]) and b'{"step": 5' in log and b'{"step": 6' not in log
    with pytest.raises(UserError, match="not finite"):  # nor at a signal or a save
        finish(1, folder, tmp_path / "out", extra=["--log-every", 100, "--save-every", 6])
    assert newest(tmp_path / "out").read_bytes() == before[0]


# ---- sampling


SAMPLE = ["--steps", 4, "--cfg", 2, "--device", "cpu"]


def pixels(out):
    with np.load(out / "samples.npz") as file:
        return file["arr_0"].astype(int)


def test_sampling_killed_and_repeated_is_the_same(runs, tmp_path):
    import sample

    given = ["--ckpt", runs / "stage2", "--num-images", 12, *SAMPLE]
    call(sample, *given, "--batch-size", 4, "--out", tmp_path / "a")
    want = pixels(tmp_path / "a")
    arguments = [*given, "--batch-size", 4, "--out", tmp_path / "b"]
    process = start(ROOT / "sample.py", *arguments)
    wait_for(process.stdout, "sampled: batch 1/3")
    process.kill()
    process.communicate()
    assert len(list((tmp_path / "b").glob("*.part.npy"))) == 2
    one = ["--ckpt", runs / "stage2", "--num-images", 1, *SAMPLE]
    call(sample, *one, "--out", tmp_path / "b")  # other settings leave those parts alone
    (tmp_path / "b/samples.npz").rename(tmp_path / "one.npz")
    assert len(list((tmp_path / "b").glob("*.part.npy"))) == 2
    assert all(status == 0 for *_, status in group(2, ROOT / "sample.py", *arguments))
    assert np.array_equal(pixels(tmp_path / "b"), want)  # the same batch shape: bit for bit
    assert (tmp_path / "b/grid.png").exists() and not list((tmp_path / "b").glob("*.part.npy"))
    call(sample, *given, "--batch-size", 5, "--out", tmp_path / "c")
    assert np.abs(pixels(tmp_path / "c") - want).max() <= 1  # another shape: rounding only


def test_images_of_latents_that_are_not_finite_are_not_written(runs, tmp_path, monkeypatch):
    import sample

    nan = torch.full((4, 4, 16, 16), torch.nan, dtype=torch.float64)
    monkeypatch.setattr(sample, "sample", lambda *args, **more: nan)
    given = ["--ckpt", runs / "stage2", "--num-images", 4, *SAMPLE, "--out", tmp_path / "a"]
    with pytest.raises(UserError, match="not finite"):
        call(sample, *given)
    assert not (tmp_path / "a/samples.npz").exists()


def test_what_was_never_saved_leaves_the_log(data, tmp_path):
    """Killed before its next save: what came after the checkpoint comes again, and what is no
    line of a log goes."""
    finish(1, data, tmp_path / "whole", steps=8)
    finish(1, data, tmp_path / "b", steps=4)
    with open(tmp_path / "b/log.jsonl", "ab") as file:
        file.write(b'[1]\nnot json\n{"loss": 1}\n{"step": "4"}\n\n{"step": 2, "lr": "\xff"}\n')
        file.write(b'{"step": 6, "loss_diff": 1}\n{"step": 2')
    finish(1, data, tmp_path / "b", steps=8)
    assert_same_run(tmp_path / "whole", tmp_path / "b")


def test_a_log_without_its_last_newline(data, tmp_path):
    finish(1, data, tmp_path / "whole", steps=8)
    finish(1, data, tmp_path / "b", steps=4)
    log = tmp_path / "b/log.jsonl"
    log.write_text(log.read_text().removesuffix("\n"))
    finish(1, data, tmp_path / "b", steps=8)
    assert_same_run(tmp_path / "whole", tmp_path / "b")


def test_sampling_does_not_repeat_what_is_done(runs, tmp_path, monkeypatch):
    import sample

    real, calls = sample.sample, []

    def counted(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(sample, "sample", counted)
    given = ["--ckpt", runs / "stage2", "--num-images", 12, *SAMPLE, "--batch-size", 4]
    with pytest.raises(KeyboardInterrupt):
        call(sample, *given, "--out", tmp_path / "a")
    call(sample, *given, "--out", tmp_path / "a")
    assert len(calls) == 4  # one, the one that was cut, and the two that were missing
