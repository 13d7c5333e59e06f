"""experiments/machine/bench.py and experiments/machine/smoke.sh, on a CPU, with tiny sizes."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, call, ok, write_folder
from torch.utils.flop_counter import FlopCounterMode

import train_stage1
from common import UserError
from experiments.machine import bench
from vae_latents import LatentFolder

CPU = torch.device("cpu")
KINDS = ("vanilla", "stage 1", "stage 2", "naive", "naive, after guidance", "as released")
TINY = "--device cpu --model SiT-P/8 --batch-size 8".split()


@pytest.fixture
def networks():
    """Tiny networks whose zero-initialised layers are filled, so that every path carries signal."""
    networks = bench.Networks("SiT-P/8", 8, bench.RandomLatents(16), CPU)
    torch.manual_seed(0)
    for p in networks.state.model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return networks


def batch_of(networks):
    draws = bench.draw(0, networks.args, networks.folder, CPU)
    return bench.make_batch(networks.folder, draws)


def numbers(losses):
    return [loss.item() for loss in losses]


def take_projector(step, other):
    if other.auxiliary.module:
        step.auxiliary.module.load_state_dict(other.auxiliary.module.state_dict())


# ---- bench.py's steps


def test_the_naive_step_has_the_same_loss(networks):
    """The authors' way, the whole batch and the mask afterwards, against ours, the slice."""
    batch, ours = batch_of(networks), networks.step("stage 2", "eager")
    losses = numbers(ours.losses(batch))
    assert losses[1] > 0
    for kind in ("naive", "naive, after guidance", "as released"):
        naive = networks.step(kind, "eager")
        take_projector(naive, ours)
        assert numbers(naive.losses(batch)) == pytest.approx(losses, rel=1e-6)
        assert naive.auxiliary.weight == (0 if "after" in kind else 0.5)
        assert naive.rows == slice(0, 8) and ours.rows == slice(3, 6)


def test_the_naive_step_draws_each_t_by_itself(networks, monkeypatch):
    seen, make_batch = [], bench.make_batch

    def remember(folder, draws):
        seen.append(draws.t)
        return make_batch(folder, draws)

    monkeypatch.setattr(bench, "make_batch", remember)
    networks.step("stage 2", "eager")()
    networks.step("naive", "eager")()
    assert (seen[0].diff() > 0).all()  # strata, in order
    assert not (seen[1].diff() > 0).all()


@pytest.mark.parametrize("kind, weight", [("vanilla", 0), ("stage 1", 0.5)])
def test_a_step_is_the_loops(kind, weight, tmp_path):
    """Three steps here and three of train_stage1.py end with the same weights, bit for bit."""
    folder = LatentFolder(write_folder(tmp_path / "latents"))
    networks = bench.Networks("SiT-P/8", 8, folder, CPU)
    step = networks.step(kind, "eager")
    if kind == "stage 1":
        loss = train_stage1.Alignment(networks.args, step.auxiliary.depth)
        train_stage1.State(networks.args, folder, CPU, [loss], [loss])
        step.auxiliary.module.load_state_dict(loss.module.state_dict())
    for _ in range(3):
        step()
    flags = f"--model SiT-P/8 --batch-size 8 --lr {networks.args.lr} --steps 3 --device cpu".split()
    where = ["--data", tmp_path / "latents", "--out", tmp_path / "run"]
    call(train_stage1, *flags, "--align-weight", weight, *where)
    saved = torch.load(tmp_path / "run/ckpt-0000003.pt", weights_only=True)
    for name, tensor in networks.state.model.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
    for name, tensor in networks.state.ema.state_dict().items():
        assert torch.equal(tensor, saved["ema"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vanilla", "stage 1", "stage 2", "as released"])
def test_compiled_or_not_the_losses_are_the_same(kind, networks, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    assert len(networks.teacher.blocks) == 3  # of the whole network
    networks.state.model.blocks = networks.state.model.blocks[:2]  # compiled sooner
    batch, eager = batch_of(networks), networks.step(kind, "eager")
    for mode in ("blocks", "whole"):
        step = networks.step(kind, mode)
        take_projector(step, eager)
        losses = numbers(eager.losses(batch))
        assert numbers(step.losses(batch)) == pytest.approx(losses, rel=1e-5)
    torch.compiler.reset()


def test_one_compilation_serves_all_blocks(networks, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    networks.step("vanilla", "blocks")()
    networks.step("stage 1", "blocks")()
    assert counters["stats"]["unique_graphs"] == 1
    networks.step("stage 2", "blocks")()
    assert counters["stats"]["unique_graphs"] == 2  # the teacher's: another batch, no gradient
    torch.compiler.reset()


def test_a_twin_trains_the_same_parameters(networks):
    model = networks.state.model
    twin = bench.twin(model, "blocks")
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(block._compiled_call_impl for block in twin.blocks)
    assert not any(block._compiled_call_impl for block in model.blocks)


def test_a_precision_holds_whatever_is_around_it(networks):
    batch, teacher = batch_of(networks), networks.teacher
    inputs = batch.x_t, batch.t, batch.y, 30.0
    exact = bench.guided_features(teacher, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bench.guided_features(bench.in_precision(teacher), *inputs), exact)
    rough = bench.guided_features(bench.in_precision(teacher, torch.bfloat16), *inputs)
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind):
    """Of a step whose network is large enough that what is left out does not matter: the patch
    embedding's gradient with respect to the images, and what attention computes twice."""
    networks = bench.Networks("SiT-Ti/4", 8, bench.RandomLatents(16), CPU)
    step = networks.step(kind, "eager")
    with FlopCounterMode(display=False) as counter:
        step()
    assert step.flops() == pytest.approx(counter.get_total_flops(), rel=0.03)


# ---- bench.py's figures


def bench_figures(monkeypatch, tmp_path, *flags, wanted=("eager", "naive", "stage 2 / vanilla")):
    """bench.py in this process, without its alarm, for the plan's figures with `wanted` in their
    names, and none that compiles; what it wrote."""
    plan = bench.plan

    def short_plan(*inputs):
        for name, measure in plan(*inputs):
            if "whole" not in name and any(word in name for word in wanted):
                yield name, measure

    monkeypatch.setattr(bench, "plan", short_plan)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(signal, "setitimer", lambda *inputs: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    call(bench, *TINY, "--out", tmp_path / "bench.json", *flags)
    return json.loads((tmp_path / "bench.json").read_text())["figures"]


def test_each_figure_is_printed_and_written(monkeypatch, tmp_path, capsys):
    figures = bench_figures(monkeypatch, tmp_path, "--only", "images: ")
    lines = capsys.readouterr().out.splitlines()
    assert "torch" in lines[0] and "3 forward passes" in lines[0]
    names = [f"{kind}, eager" for kind in KINDS[:4]]
    names += ["naive / stage 2", "naive, after guidance / vanilla", "stage 2 / vanilla"]
    assert set(figures) == {f"SiT-P/8, 8 images: {name}" for name in [*names, "sampling, eager"]}
    for name, found in figures.items():
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
        assert all(number > 0 for number in found.values())
    vanilla = figures["SiT-P/8, 8 images: vanilla, eager"]
    assert vanilla["images/s"] == pytest.approx(8 / vanilla["ms"] * 1000)
    assert list(vanilla) == ["ms", "images/s", "TFLOP/s", "s for the first step"]


@pytest.mark.slow
def test_the_precision_of_f_g(monkeypatch, tmp_path):
    flags = "--only precision --train-steps 50".split()
    figures = bench_figures(monkeypatch, tmp_path, *flags, wanted=["precision"])
    [found] = figures.values()
    gap, exact, half, brain = found.values()
    assert gap > 10 * exact  # training taught it the classes: more than rounding, how much varies
    assert exact < 0.01 < half < brain < 100  # 23, 10 and 7 bits of mantissa
    assert 4 < brain / half < 16


def test_what_does_not_fit_is_one_line_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    speed = bench.Networks.speed

    def on_a_small_card(self, kind, mode, peak):
        if kind == "stage 2":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return speed(self, kind, mode, peak)

    monkeypatch.setattr(bench.Networks, "speed", on_a_small_card)
    figures = bench_figures(monkeypatch, tmp_path, "--only", ", eager")
    reason = figures["SiT-P/8, 8 images: stage 2, eager"]
    assert reason.startswith("not measured, OutOfMemoryError: CUDA out of memory")
    assert figures["SiT-P/8, 8 images: naive, eager"]["ms"] > 0
    told = [line for line in capsys.readouterr().out.splitlines() if "OutOfMemory" in line]
    assert len(told) == 1


def test_on_a_card_all_that_is_asked_for_is_measured():
    names = [name for name, _ in bench.plan("blocks", 989, 100)]
    for kind in ("vanilla", "stage 1", "stage 2"):
        assert f"{kind}, blocks" in names and f"{kind}, blocks / whole" in names
    assert {"naive, blocks", "as released, eager", "sampling, blocks"} <= set(names)
    assert {"naive / stage 2", "as released / stage 2", "naive, after guidance / vanilla"} <= set(
        names
    )


@pytest.mark.parametrize(
    "card, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce GTX 1080", None),
        ("a CPU", None),
    ],
)
def test_the_peak_of_a_card(card, peak):
    assert next((value for part, value in bench.PEAKS.items() if part in card), None) == peak


@pytest.mark.parametrize("flags", [["--only", "nothing"], ["--model", "SiT-Q/2"], ["--minutes", 0]])
def test_a_mistake_is_said_and_nothing_written(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "setitimer", lambda *inputs: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=flags[0]):
        call(bench, "--device", "cpu", "--out", tmp_path / "bench.json", *flags)
    assert not (tmp_path / "bench.json").exists()


# The alarm rings when the first network is to be compiled whole, not by the clock
RINGS = f"""
    import os, signal, sys, tempfile
    sys.path.insert(0, {str(ROOT)!r})
    tempfile.tempdir = os.path.join(os.path.dirname(__file__), "scratch")
    import common
    from experiments.machine import bench
    def ring(*args):
        os.kill(os.getpid(), signal.SIGALRM)
        raise AssertionError("nobody heard the alarm")
    bench.parallel, bench.ROUNDS = ring, 1
    signal.setitimer = lambda which, seconds: print("alarm", which, seconds)
    common.run(bench.main)
"""


@pytest.mark.slow
def test_the_time_is_kept_and_what_is_left_is_said(tmp_path):
    scratch, code = tmp_path / "scratch", tmp_path / "rings.py"
    scratch.mkdir()
    code.write_text(textwrap.dedent(RINGS))
    flags = [*TINY, "--minutes", 0.4, "--train-steps", 5, "--out", tmp_path / "bench.json"]
    out = ok(code, *flags)
    assert f"alarm {signal.ITIMER_REAL:d} 24.0" in out
    last = out.splitlines()[-1].partition("no time left for: ")[2]
    assert "vanilla, whole" in last or "stage 1, whole" in last
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    for name, found in figures.items():
        assert (found is None) == (name in last.split("; "))
    assert figures["autoencoder"]["images/s encoded"] > 0
    assert not [path for path in scratch.iterdir() if path.name.startswith("tmp")]


# ---- smoke.sh

SMOKE = ROOT / "experiments/machine/smoke.sh"
STEPS = "random stopped continued teacher stage2 torchrun logs probe samples guided fid".split()


def smoke(tmp_path, python="", device="cpu", **kwargs):
    """Start smoke.sh; `python`: a bash script that takes Python's place."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    path = f"{os.path.dirname(os.path.abspath(sys.executable))}:{os.environ['PATH']}"
    if python:
        (tmp_path / "bin/python").write_text(f"#!/usr/bin/env bash\n{python}\n")
        (tmp_path / "bin/python").chmod(0o755)
        path = f"{tmp_path}/bin:{path}"
    env = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([SMOKE, "--device", device], env=env, **pipes, **kwargs)


def left_behind(tmp_path):
    """Command lines of processes that still work below `tmp_path`."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in lines.splitlines() if str(tmp_path) in line]


@pytest.mark.slow
def test_the_whole_chain(tmp_path):
    process = smoke(tmp_path)
    out, errors = process.communicate(timeout=550)
    lines = out.splitlines()
    assert process.returncode == 0, out + errors
    assert [line.split()[0] for line in lines[:-1]] == STEPS
    assert all(re.fullmatch(r"\w+ +\d+ s  ok", line) for line in lines[:-1])
    assert re.fullmatch(r"11 steps, 0 failed, \d+ s", lines[-1])
    assert not errors and not left_behind(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


# Plays every script: the training that is to be stopped says that it runs, and waits for a signal
PLAYS = """
case "$*" in
    *"--steps 1000000"*)
        trap 'echo "stopped by a signal after step 7, which is saved"; exit 143' TERM
        echo "step 5/1000000"
        while :; do sleep 0.05; done ;;
    *train_stage1*) case "$*" in *"--steps 27 "*) ;; *) exit 9 ;; esac ;;
esac
"""


def test_nothing_fails(tmp_path):
    process = smoke(tmp_path, PLAYS)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and not errors, out + errors
    assert out.splitlines()[-1].startswith("11 steps, 0 failed, ")


def test_after_a_failure_the_rest_goes_on(tmp_path):
    fails = 'case "$*" in *checkpoints.probe*) echo "probe.py: error: no such run"; exit 2 ;; esac'
    process = smoke(tmp_path, fails + PLAYS)
    out, _ = process.communicate(timeout=600)
    lines = out.splitlines()
    assert process.returncode == 1
    assert re.fullmatch(r"probe +\d+ s  FAILED, exit status 2", lines[STEPS.index("probe")])
    assert lines[STEPS.index("probe") + 1] == "    probe.py: error: no such run"
    assert sum(line.endswith("  ok") for line in lines) == 10
    assert lines[-1].startswith("11 steps, 1 failed, ")
    logs = lines[-2].removeprefix("the logs are in ")
    assert sorted(name.name for name in (tmp_path / "tmp").iterdir()) == [os.path.basename(logs)]


def test_an_end_that_is_not_the_wanted_one_is_a_failure(tmp_path):
    """A training that hears SIGTERM and ends as if it were done."""
    process = smoke(tmp_path, PLAYS.replace("exit 143", "exit 0"))
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "stopped" in out
    assert re.search(r"^stopped +\d+ s  FAILED, exit status 0$", out, re.MULTILINE)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_runs(number, status, tmp_path):
    waits = 'echo begun > "$TMPDIR/begun"; trap "exit 0" TERM; while :; do sleep 0.05; done'
    process = smoke(tmp_path, waits)
    while not list((tmp_path / "tmp").glob("*/begun")):
        assert process.poll() is None
        time.sleep(0.05)
    assert left_behind(tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=600) == status
    assert not left_behind(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


def test_another_device_is_refused():
    result = subprocess.run([SMOKE, "--device", "tpu"], capture_output=True, text=True)
    assert result.returncode == 2 and "--device cuda|cpu" in result.stderr


def test_they_are_short():
    assert len((ROOT / "experiments/machine/bench.py").read_text().splitlines()) <= 320
    assert len(SMOKE.read_text().splitlines()) <= 90
