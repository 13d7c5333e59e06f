"""The image folders that people have: EDM's list, shards, dark scans, copies."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import call, script, write_folder
from PIL import Image

import sample
import train_stage1
import train_stage2
import vae_latents
from common import UserError
from vae_latents import AutoencoderKL, Images, LatentFolder, open_image


def picture(seed):
    return Image.fromarray(
        np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)
    )


def folder(root, names, each=3):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(100 * number + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    state = AutoencoderKL((8, 8), layers=1).state_dict()
    torch.save({"model": state, "scale": 1.0}, tmp_path / "vae.pt")
    return tmp_path / "vae.pt"


def encode(images, vae, out, *flags, size=16):
    given = ["--images", images, "--vae", vae, "--image-size", size, "--device", "cpu"]
    call(vae_latents, *given, "--out", out, *flags)
    return LatentFolder(out)


# ---- folders that are no classes


def edm(root):
    """As EDM's dataset tool writes it: every shard holds images of every class."""
    folder(root, ["00000", "00001"], each=4)
    pairs = [[f"0000{s}/{i}.png", (s + i) % 3] for s in (1, 0) for i in range(4)]
    (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return root, dict(pairs)


def test_edms_list_has_the_labels_not_its_folders(vae, tmp_path):
    images, wanted = edm(tmp_path / "images")
    data = encode(images, vae, tmp_path / "data")
    names = json.loads((tmp_path / "data/files.json").read_text())
    assert data.meta["classes"] == ["0", "1", "2"]
    assert dict(zip(names, data.labels.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("content", ['{"labels": null}', '{"labels": [["00000/9.png", 1]]}', "[]"])
def test_a_list_that_says_no_labels_is_refused(content, vae, tmp_path):
    images, _ = edm(tmp_path / "images")
    (images / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="dataset.json: is no list of"):
        encode(images, vae, tmp_path / "data")
    assert not (tmp_path / "data").exists()


SHARDS = {
    "sidecars": (
        ["00000", "00001"],
        lambda d: [d / f"0000{s}/{i}.json" for s in (0, 1) for i in (0, 1)],
    ),
    "captions": (
        ["cats", "dogs"],
        lambda d: [d / f"{n}/{i}.txt" for n in ("cats", "dogs") for i in (0, 1)],
    ),
    "a table": (["0", "1", "10", "11"], lambda d: [d / "metadata.csv"]),
    "named shards": (["part-0001", "part-0002"], lambda d: [d / "metadata.jsonl"]),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_are_no_classes(kind, vae, tmp_path):
    names, files = SHARDS[kind]
    images = folder(tmp_path / "images", names, each=2)
    encode(images, vae, tmp_path / "before")  # without what lies beside, each folder is a class
    for path in files(images):
        path.write_text("{}")
    with pytest.raises(UserError, match="has folders like shards and .* like labels; write EDM's"):
        encode(images, vae, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("beside", ["classes.txt", "README.md", "n01440764/notes.txt"])
def test_classes_with_a_text_beside_them_are_classes(beside, vae, tmp_path):
    images = folder(tmp_path / "images", ["n01440764", "n01443537"])
    (images / beside).write_text("a list of names")
    assert len(encode(images, vae, tmp_path / "data")) == 6


# ---- numbers whose white is not known


@pytest.mark.parametrize(
    "white,warned", [(1023, True), (4095, True), (16383, True), (65535, False)]
)
def test_a_set_in_which_nothing_is_bright_is_said(white, warned, vae, tmp_path, capsys):
    """12 bits in a file of 16 become 16 grey levels, and the std of the latents looks normal."""
    ramp = np.linspace(0, white, 16 * 16).reshape(16, 16).astype(np.uint16)
    for name in ("healthy", "ill"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / "images" / name / "a.png")
    encode(tmp_path / "images", vae, tmp_path / "a")
    said = capsys.readouterr().err
    assert ("--white" in said) == warned
    encode(tmp_path / "images", vae, tmp_path / "b", "--white", white)
    assert "--white" not in capsys.readouterr().err
    grey = open_image(tmp_path / "images/ill/a.png", white=white)[:, :, 0]
    assert np.array_equal(grey, np.floor(ramp * 255.0 / white + 0.5).clip(max=255).astype(np.uint8))


# ---- identity, and what listing costs


def test_a_copy_with_other_times_is_the_same_data(vae, tmp_path, monkeypatch, capsys):
    images, calls = folder(tmp_path / "images", ["cat", "dog"], each=40), []
    real = AutoencoderKL.encode

    def killed(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(AutoencoderKL, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(images, vae, tmp_path / "data", "--batch-size", 32)
    copy = shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    encode(copy, vae, tmp_path / "data", "--batch-size", 32)
    assert calls == [32, 32, 32, 16]  # the first chunk was not made again
    encode(images, vae, tmp_path / "data")
    assert "is complete already" in capsys.readouterr().out


def test_listing_costs_two_calls_a_picture_at_most(tmp_path, monkeypatch):
    images, calls = folder(tmp_path / "images", ["cat", "dog"], each=50), []
    for name in ("stat", "lstat", "access"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=real, **k: (calls.append(a), f(*a, **k))[1])
    Images(images, 16)
    own = [a for a in calls if str(images) in str(a[0])]
    assert len(own) <= 2 * 100  # scandir's own entries are counted by strace: one stat a picture


@pytest.mark.parametrize("ending", [".jfif", ".gif", ".PNG"])
def test_what_pillow_opens_is_an_image(ending, vae, tmp_path):
    images = folder(tmp_path / "images", ["cat", "dog"], each=1)
    kind = {".jfif": "JPEG", ".gif": "GIF", ".PNG": "PNG"}[ending]
    picture(5).save(images / f"cat/more{ending}", format=kind)
    assert len(encode(images, vae, tmp_path / "data")) == 3


@pytest.mark.parametrize("size,right", [(28, True), (10, True), (2, False), (15, False)])
def test_an_image_size_is_a_multiple_of_the_vaes_factor(size, right, vae, tmp_path):
    images = folder(tmp_path / "images", ["cat", "dog"])
    if right:
        assert encode(images, vae, tmp_path / "data", size=size).shape == (4, size // 2, size // 2)
        return
    with pytest.raises(UserError, match=f"--image-size {size}: must be 2 times"):
        encode(images, vae, tmp_path / "data", size=size)


# ---- latents of another project, two label lists, a run that was moved, Slurm


def test_latents_without_a_vae_train_and_ask_for_it(vae, tmp_path):
    data = write_folder(tmp_path / "data", shape=(4, 8, 8))
    meta = json.loads((data / "meta.json").read_text())
    del meta["vae"]
    (data / "meta.json").write_text(json.dumps(meta))
    flags = "--model SiT-N/4 --batch-size 8 --steps 2 --projector-dim 16 --ema 0.1 --device cpu"
    call(train_stage1, *flags.split(), "--data", data, "--out", tmp_path / "run")
    draw = ["--ckpt", tmp_path / "run", "--num-images", 2, "--steps", 1, "--device", "cpu"]
    with pytest.raises(UserError, match="no path in meta.json.*--vae"):
        call(sample, *draw, "--out", tmp_path / "samples")
    call(sample, *draw, "--vae", vae, "--out", tmp_path / "samples")
    call(sample, *draw, "--latents", "--out", tmp_path / "latents")
    with np.load(tmp_path / "latents/latents.npz") as made:
        assert made["latents"].shape == (2, 4, 8, 8) and made["latents"].dtype == np.float32
        assert made["labels"].tolist() == [0, 1]


def test_the_same_names_in_another_order_do_not_teach(runs, latents, tmp_path, capsys):
    saved = torch.load(runs / "teacher/teacher.pt", weights_only=True)
    saved["meta"]["identity"] = None  # as of a converted checkpoint
    ours = saved["meta"]["classes"]
    flags = "--batch-size 8 --projector-dim 16 --device cpu --steps 1 --model SiT-Ti/8".split()
    for names, right in (([f"n{i}" for i in range(len(ours))], True), (ours[::-1], False)):
        saved["meta"]["classes"] = names
        torch.save(saved, tmp_path / "t.pt")
        given = ["--data", latents, "--teacher", tmp_path / "t.pt", "--out", tmp_path / str(right)]
        if right:
            call(train_stage2, *flags, *given)
            said = capsys.readouterr().err  # both lists' first are printed
            assert str(ours[:3]) in said and str(names[:3]) in said
        else:
            with pytest.raises(UserError, match="same classes in the same order"):
                call(train_stage2, *flags, *given)


def test_a_run_whose_folder_was_moved_stops_and_says_where_it_is(tmp_path, monkeypatch):
    data, out = write_folder(tmp_path / "data"), tmp_path / "run"
    args = dict(data=str(data), out=str(out), model="SiT-Ti/8", device="cpu", batch_size=8)
    args = train_stage1.Settings(**args, steps=8, save_every=2, projector_dim=16, ema=0.5)
    real = train_stage1.draw

    def moving(step, *rest):
        if step == 3:
            shutil.move(out, tmp_path / "moved")
        return real(step, *rest)

    monkeypatch.setattr(train_stage1, "draw", moving)
    with pytest.raises(UserError, match=f"{out}: was moved; .*{tmp_path}/moved"):
        train_stage1.train(args, train_stage1.Alignment(args, 2))
    assert not out.exists()
    assert [path.name for path in (tmp_path / "moved").glob("*.pt")] == ["ckpt-0000002.pt"]


@pytest.mark.slow
def test_slurms_tasks_are_told_of_torchrun(tmp_path):
    data = write_folder(tmp_path / "data")
    flags = "--model SiT-Ti/8 --batch-size 8 --steps 1 --projector-dim 16 --device cpu".split()
    given = [*flags, "--data", data, "--out", tmp_path / "run"]
    result = script("train_stage1.py", *given, env={"SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
    assert result.returncode == 0 and result.stderr.count("torchrun") == 1
