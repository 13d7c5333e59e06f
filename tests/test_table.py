"""experiments/methods/table.py: what a row runs, what the tables say, what several losses cost."""

import copy
import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, build, call, write_checkpoint, write_folder
from torch.utils.flop_counter import FlopCounterMode

import build_teacher
import common
import models
import train_stage1
from common import UserError
from experiments.cifar10 import frontier, report
from experiments.methods import (
    attention_separation,
    ddae,
    internal_guidance,
    internal_sampled,
    measured_release,
    stage2_internal,
    table,
)
from sample import initial_noise, sample
from vae_latents import find_vae, to_images

JUDGES = ("cnn-judge", "outside-160")


def figures(name, step, w, distance, share):
    line = {"name": name, "step": step, "w": w, "spectrum": [1.0]}
    for number, judge in enumerate(JUDGES):
        known = {"distance": distance * (1 + 9 * number), "class": share, "recall": 0.25}
        line[judge] = {**known, "precision": 0.9}
    return line


def write_run(out, name, steps, align_weight):
    """Checkpoints of a run, with the settings that its cost is counted by."""
    model = build("SiT-P/8", 16, 4, 10)
    for step in steps:
        path = write_checkpoint(out / name / f"ckpt-{step:07d}.pt", model, "SiT-P/8", step)
        saved = copy.deepcopy(common.load_file(path))  # which is mapped, and written anew
        saved["args"].update(align_weight=align_weight, t_min=0.0, t_max=1.0, accum=1)
        saved["args"].update(projector_dim=16, align_target="velocity")
        torch.save(saved, path)


@pytest.fixture
def out(tmp_path):
    """Vanilla to 400 steps, stage 1 to 200, with figures at every 100."""
    write_run(tmp_path, "vanilla-1", (200, 400), 0.0)
    write_run(tmp_path, "stage1-1", (200,), 0.5)
    write_run(tmp_path, "stage1-2", (200,), 0.5)
    lines = [figures("vanilla-1", step, 1.0, 40 - step / 20, 0.1) for step in (100, 200, 300, 400)]
    lines += [figures("vanilla-1", 200, 2.0, 28, 0.3), figures("vanilla-1", 400, 2.0, 22, 0.4)]
    for seed in (1, 2):
        lines += [figures(f"stage1-{seed}", 100, 1.0, 24 + 2 * seed, 0.05)]
        lines += [figures(f"stage1-{seed}", 200, 1.0, 10 + 2 * seed, 0.15)]
        lines += [figures(f"stage1-{seed}", 200, w, 12 - w, 0.2 + 0.1 * w) for w in (2.0, 3.0)]
    (tmp_path / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"row": "stage1", "seed": 1, "steps": 50, "cpu_seconds": 30.0, "commit": "abc"}
    runs = [about, {**about, "steps": 150, "cpu_seconds": 210.0, "commit": "def"}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in runs))
    return tmp_path


def test_show(out, capsys):
    call(table, "show", "--out", out)
    lines = capsys.readouterr().out.splitlines()
    vanilla = "| vanilla SiT | {} | {} | {}; 10.0 % | {}; {} % (w = 2) | {}; 10.0 % | "
    vanilla += "{}; {} % (w = 2) | 0.250; 0.250 |  |  | 1 |"
    assert vanilla.format(200, 200, "30.0", "28.0", "30.0", "300.0", "280.0", "30.0") in lines
    assert vanilla.format(400, 400, "20.0", "22.0", "40.0", "200.0", "220.0", "40.0") in lines
    # A projector 48 -> 16 -> 16 -> 48 -> 256 on each of four tokens, three passes of three
    weights = 48 * 16 + 16 * 16 + 16 * 48 + 48 * 256
    step = 1 + 2 * 4 * weights / build("SiT-P/8", 16, 4, 10).forward_flops()
    stage1 = next(text for text in lines if text.startswith("| stage 1 | 200 |"))
    cells = [cell.strip() for cell in stage1.strip("|").split("|")]
    assert int(cells[2]) == pytest.approx(200 * step, abs=1)
    assert cells[3] == "13.0 ± 1.4; 15.0 ± 0.0 %"  # of 12 and 14
    assert cells[4] == "9.0 ± 0.0; 50.0 ± 0.0 % (w = 3)"  # the better of both w
    assert cells[-3:] == ["4", "abc, def", "1, 2"]  # 240 s for 200 steps
    # 27 after 100 steps, 13 after 200: vanilla's 20 is reached half way; 5 and 15 %: its 10, too
    target = next(text for text in lines if text.startswith("| the target"))
    assert target == "| the target | 20 | 0.1 | 200 | 0.1 |"
    reached = [text for text in lines if text.startswith("| stage 1 |")][-1]
    half = [int(number) for number in re.findall(r"\d+", reached)[1:]]
    assert half == pytest.approx([150 * step] * 4, abs=1)
    own = [text for text in lines if text.startswith("| vanilla SiT |")][-1]
    assert own == "| vanilla SiT | 400 | at most 100 | 400 | at most 100 |"


def test_run_trains_and_then_judges_each_checkpoint(tmp_path, monkeypatch):
    """Guidance scales at the end, none on the way; vanilla is twice as long."""
    ran = []

    def pretended(command, **kwargs):
        if command[1] == "-m":
            ran.append(" ".join(map(str, command[2:])))
        if command[2] == "train_stage1":
            write_run(tmp_path, "vanilla-3", (10, 20, 30, 40), 0.0)
        return SimpleNamespace(returncode=0, stdout="abc\n")

    monkeypatch.setattr(subprocess, "run", pretended)
    flags = ["--out", tmp_path, "--steps", 20, "--every", 10, "--seed", 3, "--data", "the data"]
    call(table, "run", "vanilla", *flags, "--scales", "1,2,3")
    assert "--align-weight 0 " in ran[0] and "--data the data " in ran[0]
    assert f"--seed 3 --steps 40 --save-every 10 --keep 99 --out {tmp_path}/vanilla-3" in ran[0]
    judged = [re.search(r"vanilla-3=.*ckpt-0*(\d+).pt --scales (\S+) ", text) for text in ran[1:]]
    wanted = [("10", "1"), ("20", "1,2,3"), ("30", "1"), ("40", "1,2,3")]
    assert [match.groups() for match in judged] == wanted
    about = json.loads((tmp_path / "runs.jsonl").read_text())
    assert (about["row"], about["steps"], about["commit"]) == ("vanilla", 40, "abc")
    call(table, "run", "vanilla", *flags)  # nothing is left to train: no second line
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_a_row_says_what_it_needs(tmp_path):
    for row, wanted in (("stage2", "row teacher first"), ("repa", "row features first")):
        with pytest.raises(UserError, match=wanted):
            call(table, "run", row, "--out", tmp_path, "--data", tmp_path)
    with pytest.raises(UserError, match="is none of teacher, features, vanilla"):
        call(table, "run", "other", "--out", tmp_path)
    with pytest.raises(UserError, match="holds no figures yet"):
        call(table, "show", "--out", tmp_path)


def test_every_row_is_a_module_whose_flags_are_right(tmp_path, monkeypatch, capsys):
    """Each command is parsed by its own script, up to the point where it would read the data."""
    for name, row in table.ROWS.items():
        args = table.Settings(row=name, data=str(tmp_path / "none"), out=str(tmp_path))
        for command in filter(None, (row.train, row.then)):
            module, *flags = table.words(command, args)
            monkeypatch.setattr("sys.argv", [module, *flags])
            script = __import__(module, fromlist=["main"])
            with pytest.raises(UserError, match="none|teacher-run") as error:
                script.main()
            assert "flags" not in str(error.value)


def test_the_page_gets_the_tables_between_its_marks(out, capsys):
    page = out / "page.md"
    page.write_text("before\n<!-- table show: begin -->\nold\n<!-- table show: end -->\nafter\n")
    for _ in range(2):  # the second time in place of the first
        call(table, "show", "--out", out, "--page", page)
    head, text, tail = re.split("<!-- table show: (?:begin|end) -->\n", page.read_text())
    assert (head, tail) == ("before\n", "after\n")
    assert text.strip() in capsys.readouterr().out
    page.write_text("no marks")
    with pytest.raises(UserError, match="no place for a table"):
        call(table, "show", "--out", out, "--page", page)
    assert page.read_text() == "no marks"


def test_internal_guidance_is_sampled_by_its_own(latents, tmp_path, monkeypatch):
    """At w = 1 as frontier samples; at w = 99 by head + 99 (v - head), without CFG."""
    run, seen = tmp_path / "internal", []
    call(internal_guidance, *TRAIN, "--data", latents, "--steps", 4, "--out", run)

    def judges(*args):
        known = frontier.Judge(lambda images, y: seen.append(images) or {}, "x", 32, 8, None)
        return {"a judge": known}

    monkeypatch.setattr(frontier, "load_judges", judges)
    flags = [f"internal-1={run}", "--num", 8, "--steps", 2, "--mode", "euler", "--device", "cpu"]
    call(frontier, *flags, "--scales", 1, "--out", tmp_path / "cfg.jsonl")
    call(internal_sampled, *flags, "--scales", "1,99", "--out", tmp_path / "own.jsonl")
    assert models.load_checkpoint is internal_sampled.load_checkpoint  # it was given back
    plain, own, guided = seen
    assert torch.equal(plain, own)
    model, saved = models.load_checkpoint(run)
    network = internal_guidance.InternalGuidance(model, saved)
    network.w = 99.0
    noise, _ = initial_noise(0, range(8), (4, 16, 16))
    x0 = sample(network, noise, torch.arange(8), 8, 2, "euler", 1.0)
    vae = find_vae(None, saved["meta"]).to(memory_format=torch.channels_last)
    wanted = torch.from_numpy(to_images(vae, x0))
    assert (guided.int() - wanted.int()).abs().max() <= 1  # in batches of other sizes
    assert (guided.int() - plain.int()).abs().max() > 1


def test_the_compute_of_several_losses_is_what_torch_counts(tmp_path):
    """Stage 2 with a head, with measured release, and separated attention, counted as they run."""
    data, runs = write_folder(tmp_path / "data"), tmp_path / "runs"

    def counted(script, name, *flags):
        train = [*TRAIN, "--model", "SiT-P/8", "--projector-dim", 256, "--data", data]
        with FlopCounterMode(display=False) as counter:
            call(script, *train, "--out", runs / name, *flags)
        return counter.get_total_flops()

    vanilla_step = counted(train_stage1, "vanilla", "--align-weight", 0, "--steps", 2) / 2
    teacher = counted(train_stage1, "teacher-run", "--steps", 2)
    call(build_teacher, "--ckpt", runs / "teacher-run", "--out", runs / "teacher")
    guided = ["--teacher", runs / "teacher/teacher.pt", "--t-min", 0, "--t-max", 1, "--steps", 4]
    both = counted(stage2_internal, "both", *guided, "--guide-steps", 2)
    wanted = (teacher + both) / vanilla_step
    assert report.compute(runs / "both", 4, "SiT-P/8") == pytest.approx(wanted, rel=0.02)
    release = ["--release-over", 20, "--release-below", 1, "--log-every", 1]
    measured = counted(measured_release, "measured", *guided, *release, "--steps", 6)
    wanted = (teacher + measured) / vanilla_step
    assert report.compute(runs / "measured", 6, "SiT-P/8") == pytest.approx(wanted, rel=0.02)
    model = build("SiT-P/8", 16, 4, 10)
    own = counted(attention_separation, "separated", "--steps", 2) / 2 / vanilla_step
    assert 1 + attention_separation.extra_cost(model) == pytest.approx(own, rel=0.01)
    assert report.compute(runs / "separated", 2, "SiT-P/8") == pytest.approx(2)
    size, _ = models.parse_name("SiT-P/8")
    ours = ddae.SelfConditioned(size, 8, 16, 4, 10, True)
    networks, inputs = (ours, model), (torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.tensor([0]))
    flops = []
    for network in networks:
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
        flops.append(counter.get_total_flops())
    assert 1 + ddae.extra_cost(model) == pytest.approx(flops[0] / flops[1], rel=1e-3)
