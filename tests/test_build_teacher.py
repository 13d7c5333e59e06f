"""build_teacher.py and its teachers in stage 2: features, file, cost, and what does not fit."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    TRAIN,
    build,
    call,
    teacher_file,
    tiny,
    write_folder,
)
from torch.utils.flop_counter import FlopCounterMode

import build_teacher
import models
import train_stage1
import train_stage2
from build_teacher import guided_features, load_teacher
from models import SIZES
from vae_latents import LatentFolder


def teacher_features(teacher, x_t, t, y):
    """h_dt of a teacher, whose last block it is."""
    return teacher(x_t, t, y, taps=[teacher.depth])[1][teacher.depth]


# ---- features and file


def test_a_run_with_a_teacher_of_another_size(tmp_path):
    """Stage 1 of SiT-N/8, its teacher, a student SiT-Ti/8: width, depth and heads all differ."""
    flags = ["--data", write_folder(tmp_path / "d"), "--steps", 2, "--log-every", 1]
    call(train_stage1, *TRAIN, *flags, "--model", "SiT-N/8", "--out", tmp_path / "stage1")
    where = ["--ckpt", tmp_path / "stage1", "--out", tmp_path / "teacher"]
    call(build_teacher, *where, "--student", "SiT-Ti/8")
    teacher, file = load_teacher(tmp_path / "teacher/teacher.pt")
    assert (file["args"]["model"], file["step"], file["args"]["stage"]) == ("SiT-N/8", 2, "align")
    assert file["meta"]["identity"] == LatentFolder(tmp_path / "d").meta["identity"]
    assert (teacher.depth, teacher.width) == (SIZES["N"].teacher_depth, SIZES["N"].width)
    given = ["--teacher", tmp_path / "teacher/teacher.pt", "--out", tmp_path / "stage2"]
    call(train_stage2, *TRAIN, *flags, *given)
    lines = (tmp_path / "stage2/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss_guide"] > 0 for line in lines] == [True, True]
    student, saved = models.load_checkpoint(tmp_path / "stage2")
    assert saved["args"]["model"] == "SiT-Ti/8" and student.depth == SIZES["Ti"].depth


def test_teacher_file_gives_the_frozen_tap(tmp_path):
    model = tiny(seed=4)
    teacher, file = load_teacher(teacher_file(tmp_path, model, s=7.0, teacher_depth=3))
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert file["scale"] == 7.0 and teacher.depth == len(teacher.blocks) == 3
    x, t, y = torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([0, 5, 10])
    assert torch.equal(teacher_features(teacher, x, t, y), model.eval()(x, t, y, taps=[3])[1][3])


@pytest.mark.parametrize("classes", [10, 1000])
def test_guided_features(classes):
    """s = 1 is f_c, s = 0 is f_u, s = 30 the extrapolation; the null label is num_classes."""
    teacher = tiny(num_classes=classes).cut(5)
    x, t, y = torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([0, 5, 9])
    f_c = teacher_features(teacher, x, t, y)
    f_u = teacher_features(teacher, x, t, torch.full((3,), classes))
    assert (f_c - f_u).abs().max() > 1e-3
    for s, want, tolerance in (
        (1.0, f_c, 1e-5),
        (0.0, f_u, 1e-5),
        (30.0, f_u + 30 * (f_c - f_u), 1e-4),
    ):
        got = guided_features(teacher, x, t, y, s)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert got.dtype == torch.float32 and not got.requires_grad


# ---- what does not fit


def test_teachers_that_do_not_fit(refused, runs, latents, tmp_path):
    flags = ["train_stage2.py", *TRAIN, "--data", latents, "--out", tmp_path / "o", "--steps", 4]
    fits = [*flags, "--teacher", runs / "teacher/teacher.pt"]
    refused(*flags, "--teacher", tmp_path / "none.pt", says=["none.pt", "build_teacher.py"])
    refused(*fits, "--model", "SiT-Ti/4", says=["patch", "8", "4"])
    assert not (tmp_path / "o").exists()  # no folder of a run that never began
    refused(*fits, "--guide-depth", 99, says=["loss guide, depth 99"])
    refused(*fits, "--guide-scale", 0.5, says=["--guide-scale 0.5"])
    refused(*fits, "--guide-weight", 0, says=["--guide-weight"])
    refused(*fits, "--data", write_folder(tmp_path / "d5", classes=5), says=["teacher.pt"])
    small = write_folder(tmp_path / "d8", shape=(4, 8, 8))
    refused(*fits, "--data", small, says=["teacher.pt"])
    refused(*flags, "--teacher", tmp_path / "none.pt", says=["none.pt", "build_teacher.py"])
    ckpt = runs / "stage1/ckpt-0000008.pt"
    refused(*flags, "--teacher", ckpt, says=["ckpt-0000008.pt", "no teacher"])
    old = torch.load(runs / "teacher/teacher.pt", weights_only=True)
    source = {key: old.pop(key) for key in ("args", "meta", "step")}
    torch.save({**old, "format": 1, "source": source}, tmp_path / "old.pt")
    refused(*flags, "--teacher", tmp_path / "old.pt", says=["old.pt", "build_teacher.py"])
    assert not (tmp_path / "o").exists()


def relabelled(latents, path, **changes):
    """A copy of a latent folder with another meta.json."""
    shutil.copytree(latents, path)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, **changes}))
    return path


FACTS = {
    "latents": {"classes": [f"another {i}" for i in range(8)]},
    "classes": {"classes": [f"class {i}" for i in range(11)]},
    "scale": {"scale": 0.5},
    "VAE": {"vae": {"path": "vae.pt", "identity": "another"}},
}


@pytest.mark.parametrize("what", [*FACTS, "latents themselves"])
def test_a_teacher_of_other_latents_is_refused(refused, runs, latents, tmp_path, what):
    """By names, scale, VAE and content: the same shape with other numbers is other data."""
    folder = relabelled(latents, tmp_path / "latents", **FACTS.get(what, {}))
    if what == "latents themselves":
        moments = np.load(folder / "moments.npy")
        np.save(folder / "moments.npy", moments[::-1])
    flags = [*TRAIN, "--data", folder, "--out", tmp_path / "o", "--steps", 4]
    teacher = ["--teacher", runs / "teacher/teacher.pt"]
    refused("train_stage2.py", *flags, *teacher, says=["teacher.pt", what.split()[0]])
    assert not (tmp_path / "o").exists()


def test_a_converted_teacher_knows_labels_alone(refused, runs, latents, tmp_path, capsys):
    """A foreign checkpoint has no names of classes: as many are taken, with a warning."""
    saved = torch.load(runs / "teacher/teacher.pt", weights_only=True)
    flags = [*TRAIN, "--steps", 1, "--teacher", tmp_path / "t.pt"]
    numbers = [str(i) for i in range(len(saved["meta"]["classes"]))]
    saved["meta"].update(classes=numbers, identity=None)
    torch.save(saved, tmp_path / "t.pt")
    call(train_stage2, *flags, "--data", latents, "--out", tmp_path / "a")
    assert "does not say which latents" in capsys.readouterr().err
    more = ["--data", relabelled(latents, tmp_path / "more", classes=[*numbers, "one more"])]
    refused("train_stage2.py", *flags, *more, "--out", tmp_path / "b", says=["classes 8, not 9"])


def test_a_rebuilt_teacher_is_the_same_one_and_another_is_not(refused, runs, latents, tmp_path):
    """Its identity is its tensors and s, not its file's bytes; it matters while it guides."""
    teacher, out = tmp_path / "teacher.pt", tmp_path / "o"
    flags = [*TRAIN, "--data", latents, "--out", out, "--teacher", teacher, "--guide-steps", 8]
    saved = torch.load(runs / "teacher/teacher.pt", weights_only=True)
    torch.save(saved, teacher)
    call(train_stage2, *flags, "--steps", 4)
    torch.save({**saved, "args": {**saved["args"], "out": "moved"}}, teacher)
    call(train_stage2, *flags, "--steps", 6)
    torch.save({**saved, "scale": 7.0}, teacher)
    refused("train_stage2.py", *flags, "--steps", 8, says=["another teacher", "ckpt-0000006.pt"])
    torch.save(saved, teacher)
    s = ["--guide-scale", saved["scale"]]  # the teacher's own, said aloud
    refused("train_stage2.py", *flags, "--steps", 8, *s[:1], 8.0, says=["another teacher"])
    call(train_stage2, *flags, "--steps", 8, *s)
    teacher.unlink()
    call(train_stage2, *flags, "--steps", 10)


def test_building_a_teacher(refused, runs, tmp_path, capsys):
    ckpt = ["build_teacher.py", "--ckpt", runs / "stage1", "--out", tmp_path / "o"]
    refused(*ckpt, "--teacher-depth", 9, says=["--teacher-depth 9", "blocks 1 to 8"])
    refused(*ckpt, "--guide-scale", 0.9, says=["--guide-scale 0.9"])
    refused(*ckpt, "--guide-scale", "inf", says=["--guide-scale inf"])
    none = ["--ckpt", tmp_path / "none.pt", "--out", tmp_path / "o"]
    refused("build_teacher.py", *none, says=["none.pt", "is no checkpoint of this project"])
    refused(*ckpt, "--student", "SiT-H/2", says=["SiT-H/2"])
    assert not (tmp_path / "o").exists()
    vanilla = torch.load(runs / "stage1/ckpt-0000008.pt", weights_only=True)
    vanilla["args"]["align_weight"] = 0.0
    torch.save(vanilla, tmp_path / "vanilla.pt")
    call(build_teacher, "--ckpt", tmp_path / "vanilla.pt", "--out", tmp_path / "t")
    assert "--align-weight 0.0" in capsys.readouterr().out
    flags = ["--ckpt", tmp_path / "vanilla.pt", "--out", tmp_path / "t"]
    refused("build_teacher.py", *flags, says=["remove it"])  # one in use is not replaced


# ---- beside the file


def test_a_rejected_command_leaves_the_good_file_of_before(numbered, refused, tmp_path):
    """Write last: no command overwrites before it knows that its own result is good."""
    call(build_teacher, "--ckpt", numbered.run, "--out", tmp_path / "t")
    refused(build_teacher, "--ckpt", numbered.run, "--out", tmp_path / "t", says=["teacher.pt"])


def test_what_the_small_teacher_costs_is_printed(numbered, tmp_path, capsys):
    """In vanilla steps of the student, of three passes each, by torch's own count."""

    def passes(name, blocks=None):
        model = build(name, 16, 4, 12)
        model = model.cut(blocks) if blocks else model
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        return counter.get_total_flops()

    given = ["--ckpt", numbered.run, "--out", tmp_path, "--student", "SiT-Ti/4"]
    call(build_teacher, *given)
    said = " ".join(capsys.readouterr().out.split())
    numbers = re.search(
        r"as much as (\d+) steps of (\S+) .* ([\d.]+)% dearer \(all t: ([\d.]+)%", said
    )
    training, in_range, at_all = int(numbers[1]), float(numbers[3]) / 100, float(numbers[4]) / 100
    assert numbers[2] == "SiT-Ti/4" and training == round(
        2 * passes("SiT-N/4") / passes("SiT-Ti/4")
    )
    guided = 2 * passes("SiT-N/4", 4) / (3 * passes("SiT-Ti/4"))
    assert at_all == pytest.approx(guided, rel=0.05) and in_range == pytest.approx(
        0.3 * at_all, abs=1e-3
    )
