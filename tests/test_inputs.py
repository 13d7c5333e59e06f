"""Nothing silently wrong: image folders, scales, identities, odd files, foreign checkpoints.

Each test is a situation that somebody met with this project or a neighbouring one. What would
change a result without a word is refused in one line, or said. Where a message names a command,
the test runs it.
"""

import argparse
import importlib
import io
import json
import re
import shlex
import shutil
import struct
import sys
import types

import numpy as np
import pytest
import torch
from conftest import (
    ENCODE,
    EULER,
    SMALL,
    call,
    encode,
    folder,
    picture,
    samples_in,
)
from PIL import Image

import build_teacher
import fid
import models
import sample
import train_stage1
import train_stage2
import vae_latents
from common import UserError
from vae_latents import AutoencoderKL, LatentFolder, open_image


def command_in(text, **words):
    """(The module, its arguments) of the command that a message names, with `words` put in."""
    name, *arguments = shlex.split(re.search(r"python -m (experiments\.\w+\.\w+ [^;()]*)", text)[1])
    assert words.keys() <= {*arguments}, text
    arguments = [str(words.get(word, word)) for word in arguments]
    return importlib.import_module(name), *arguments


# ---- image folders


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_hidden_files_are_no_images_and_are_counted(place, vae, tmp_path, capsys):
    """What a notebook and a Mac leave: folders and files whose names begin with a dot."""
    images = folder(tmp_path / "images", ["cat", "dog", "fox"])
    hidden = (images if place == "beside" else images / "dog") / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(images / "dog/0.png", hidden / "0-checkpoint.png")
    if place == "inside":
        shutil.copy(images / "cat/0.png", images / "cat/.0.png")
        (images / "cat/._1.png").write_bytes(b"\0\5\26\7")
    data = LatentFolder(encode(images, vae, tmp_path / "data"))
    out = capsys.readouterr().out
    assert data.meta["classes"] == ["cat", "dog", "fox"] and len(data) == 9
    files = json.loads((tmp_path / "data/files.json").read_text())
    assert not [name for name in files if "/." in f"/{name}"]
    said = next(line for line in out.splitlines() if "hidden, linked" in line)
    assert re.search(r"\b1\b" if place == "beside" else r"\b3\b", said.split("(cat, dog, fox)")[1])


def test_a_folder_within_a_hidden_one_is_as_good_as_any(vae, few, tmp_path, capsys):
    """Hidden is what is hidden below the folder that was given."""
    images = folder(tmp_path / ".cache/images", ["cat", "dog"])
    assert len(LatentFolder(encode(images, vae, tmp_path / ".cache/data"))) == 6
    call(fid, images)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num"] == 6


def test_a_hidden_link_does_not_cost_the_picture_behind_it(vae, tmp_path):
    images = folder(tmp_path / "images", ["cat", "dog"])
    (images / "cat/.thumbnail.png").symlink_to(images / "cat/1.png")
    (images / ".all").symlink_to(images / "dog", target_is_directory=True)
    assert len(LatentFolder(encode(images, vae, tmp_path / "data"))) == 6


def test_each_file_counts_once(vae, few, tmp_path, capsys):
    """A link to its own folder, to the folder above, to a neighbour's picture; a broken one."""
    images = folder(tmp_path / "images", ["cat", "dog"])
    (images / "cat/again").symlink_to(images / "cat", target_is_directory=True)
    (images / "dog/above").symlink_to(images, target_is_directory=True)
    (images / "dog/cat.png").symlink_to(images / "cat/0.png")
    (images / "dog/gone.png").symlink_to(images / "dog/nowhere.png")
    data = LatentFolder(encode(images, vae, tmp_path / "data"))
    assert len(data) == 6 and np.bincount(data.labels).tolist() == [3, 3]
    assert not (tmp_path / "data/unreadable.txt").exists()
    call(fid, images)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num"] == 6


def test_a_class_that_is_a_link_to_another_is_refused_by_name(vae, refused, tmp_path):
    images = folder(tmp_path / "images", ["cat", "dog"])
    (images / "emu").symlink_to(images / "cat", target_is_directory=True)
    given = ["--images", images, "--vae", vae, "--out", tmp_path / "data", *ENCODE]
    refused(vae_latents, *given, says=["emu"])
    assert not (tmp_path / "data").exists()


NESTED = {
    "one level deeper": ["photos/cat", "photos/dog"],
    "Train": ["Train/cat", "validation/cat"],
    "VAL": ["VAL", "dog"],
    "__MACOSX": ["__MACOSX", "cat"],
}


@pytest.mark.parametrize("kind", NESTED)
def test_folders_that_are_hardly_classes_are_a_warning(kind, vae, tmp_path, capsys):
    images = folder(tmp_path / "images", NESTED[kind])
    encode(images, vae, tmp_path / "data")
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert str(images) in warning and NESTED[kind][0].split("/")[0] in warning


def test_usual_classes_are_no_warning_and_loose_pictures_are_counted(vae, tmp_path, capsys):
    images = folder(tmp_path / "images", ["cat", "dog"])
    for i in range(4):
        picture(i).save(images / f"extra{i}.jpg")
    encode(images, vae, tmp_path / "data")
    said = capsys.readouterr()
    assert said.err == "" and len(LatentFolder(tmp_path / "data")) == 6
    assert re.search(r"\b4\b", said.out.split("(cat, dog)")[1].splitlines()[0])


def with_exif(exif, image):
    """A JPEG with these bytes in its EXIF segment."""
    image.save(buffer := io.BytesIO(), "JPEG", quality=95)
    data = buffer.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def ifd(*entries):
    """A block of EXIF, little-endian."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


TURNED = (0x0112, 3, 1, 6)  # orientation 6: the camera stood on its right side


EXIFS = {
    "blank": (b"Exif\0\0", False),
    "garbage": (b"Exif\0\0garbage-here", False),
    "doubled": (b"Exif\0\0" + ifd(TURNED), None),  # whether it can be had is Pillow's affair
    "cut": (ifd(TURNED)[:14], False),
    "of text": (ifd((0x0112, 2, 1, 6)), False),
    "turned": (ifd(TURNED), True),
    "turned, an odd pointer": (ifd(TURNED, (0x8769, 8, 1, 0xFFFF)), True),
    "turned, an odd resolution": (ifd(TURNED, (0x011A, 2, 1, 0x41)), True),
    "turned, an odd width": (ifd(TURNED, (0xA005, 7, 3, 0x41)), True),
    "turned, an odd maker": (ifd(TURNED, (0x010F, 11, 1, 0x7FC00000)), True),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the same EXIF
@pytest.mark.parametrize("kind", EXIFS)
def test_metadata_never_costs_a_picture_nor_a_known_orientation(kind, tmp_path):
    exif, turned = EXIFS[kind]
    image = picture(7).resize((40, 24))
    (tmp_path / "plain.jpg").write_bytes(with_exif(b"", image))
    (tmp_path / "odd.jpg").write_bytes(with_exif(exif, image))
    plain, odd = open_image(tmp_path / "plain.jpg"), open_image(tmp_path / "odd.jpg")
    upright = np.rot90(plain, -1)
    readings = {True: [upright], False: [plain], None: [plain, upright]}[turned]
    assert any(np.array_equal(odd, reading) for reading in readings)


def test_a_png_with_exif_of_no_header_and_a_large_profile(tmp_path):
    """As one camera program writes it; and a text that Pillow takes for an attack at 1 MB."""
    raw = b"\x00\x08\x00\x02\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01\x00\x00"
    image = picture(8)
    image.save(tmp_path / "exif.png", exif=raw)
    image.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    for name in ("exif.png", "profile.png"):
        assert np.array_equal(open_image(tmp_path / name), np.asarray(image))


def test_depths_are_scaled_knowingly_or_left_out_by_name(vae, tmp_path, capsys):
    """The same grey ramp as every kind of file that a microscope or a renderer writes."""
    images, ramp = tmp_path / "images/cat", np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    images.mkdir(parents=True)
    whole = {"8.png": ramp, "16.png": ramp.astype(np.uint16) * 257}
    whole["16.tif"] = whole["16.png"]
    unknown = {"int32.tif": ramp.astype(np.int32), "float.tif": (ramp / 255).astype(np.float32)}
    unknown["float255.tif"] = ramp.astype(np.float32)
    for name, pixels in {**whole, **unknown}.items():
        Image.fromarray(pixels).save(images / name)
    for name in whole:
        assert np.array_equal(open_image(images / name)[:, :, 0], ramp), name
    data = encode(tmp_path / "images", vae, tmp_path / "data")
    assert len(LatentFolder(data)) == 3
    listed, said = (data / "unreadable.txt").read_text(), capsys.readouterr().err
    for name in unknown:
        assert name in listed and name in said and "32 bits" in listed


def test_what_a_mac_leaves_and_a_cut_jpeg_cost_no_work(vae, tmp_path, capsys, monkeypatch):
    images = folder(tmp_path / "images", ["cat", "dog"], each=10, ending="jpg")
    for name in ("cat/._0.jpg", "dog/._1.jpg"):
        (images / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(4000))
    whole = (images / "dog/5.jpg").read_bytes()
    (images / "dog/5.jpg").write_bytes(whole[: len(whole) // 2])
    data = encode(images, vae, tmp_path / "data")
    assert len(LatentFolder(data)) == 19 and "5.jpg" in (data / "unreadable.txt").read_text()
    said = capsys.readouterr()
    assert "19 images" in said.out and "5.jpg" in said.err
    assert not list(data.glob("*.part*")) and not list(data.glob("*.tmp"))
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    encode(images, vae, data)
    assert "complete already" in capsys.readouterr().out


# ---- the scale of the latents


def test_the_std_of_the_scaled_latents_is_printed_and_kept(numbered, tmp_path, capsys):
    """Against samples of the posterior."""
    data = LatentFolder(encode(numbered.images, numbered.vae, tmp_path / "data"))
    mean, std = np.split(data.moments.astype(np.float64), 2, axis=1)
    eps = np.random.default_rng(0).normal(size=(50, *std.shape))
    want = (data.meta["scale"] * (mean + std * eps)).std()
    said = capsys.readouterr()
    assert abs(data.meta["std"] - want) < 5e-3 and f"{data.meta['std']:.3f}" in said.out
    assert said.err == ""


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_std_far_from_one_is_a_warning(factor, numbered, tmp_path, capsys):
    saved = torch.load(numbered.vae, weights_only=True)
    torch.save({**saved, "scale": factor * saved["scale"]}, tmp_path / "vae.pt")
    data = LatentFolder(encode(numbered.images, tmp_path / "vae.pt", tmp_path / "data"))
    assert data.meta["std"] == pytest.approx(factor * LatentFolder(numbered.data).meta["std"])
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and str(data.meta["scale"]) in err


def diffusers(vae, path, scale=0.13025):
    """A folder as diffusers saves it, with the scale in its config.json."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    state = torch.load(vae, weights_only=True)["model"]
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "scaling_factor": scale}
    (path / "config.json").write_text(json.dumps(config))
    return path


BACK = {  # diffusers' names, CompVis'
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}


def compvis(state):
    named = {}
    for key, value in state.items():
        for now, before in BACK.items():
            key = key.replace(now, before)
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{1 - int(m[1])}.", key)
        key = key.replace(".resnets", ".block").replace(".upsamplers.0", ".upsample")
        linear = "attn_1" in key and value.dim() == 2
        named[key] = value[:, :, None, None].contiguous() if linear else value
    return named


def foreign_vae(kind, vae, path):
    """A file or folder with the weights of the VAE file `vae`, as another project has it."""
    from safetensors.torch import save_file

    state = torch.load(vae, weights_only=True)["model"]
    if kind == "folder":
        return diffusers(vae, path / "vae")
    if kind == "file of a folder":
        return diffusers(vae, path / "vae") / "diffusion_pytorch_model.safetensors"
    if kind == "safetensors":
        save_file(compvis(state), path / "vae-ema-pruned.safetensors")
        return path / "vae-ema-pruned.safetensors"
    if kind == "bin":
        torch.save(state, path / "vae.bin")
        return path / "vae.bin"
    whole = {f"first_stage_model.{key}": value for key, value in compvis(state).items()}
    whole["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    content = {"epoch": 1, "state_dict": whole}
    if kind == "whole, with callbacks":  # keyed by a class of another library
        module = types.ModuleType("lightning_of_old.callbacks")
        made = {"__module__": module.__name__}
        module.ModelCheckpoint = type("ModelCheckpoint", (), made)
        sys.modules.update({module.__name__: module, "lightning_of_old": module})
        content["callbacks"] = {module.ModelCheckpoint: {"monitor": "val/loss"}}
    torch.save(content, path / "sd.ckpt")
    for name in ("lightning_of_old.callbacks", "lightning_of_old"):
        sys.modules.pop(name, None)
    return path / "sd.ckpt"


VAES = ["folder", "file of a folder", "safetensors", "bin", "whole", "whole, with callbacks"]


@pytest.mark.parametrize("kind", VAES)
def test_a_vae_of_another_project_is_refused_and_the_named_command_converts_it(
    kind, numbered, refused, tmp_path
):
    """No scale is assumed: it is in the config beside the weights, or is given."""
    source = foreign_vae(kind, numbered.vae, tmp_path)
    given = ["--images", numbered.images, "--out", tmp_path / "data", *ENCODE]
    err = refused(vae_latents, *given, "--vae", source, says=[source, "convert_vae"])
    assert not (tmp_path / "data").exists()
    if kind == "whole, with callbacks":
        assert "lightning_of_old.callbacks.ModelCheckpoint" in err
    command = command_in(err, OUT=tmp_path / "mine.pt")
    if "folder" not in kind:  # nothing beside these files says the scale
        refused(*command, says=["--scale"])
        assert not (tmp_path / "mine.pt").exists()
        command += "--scale", 0.13025
    call(*command)
    data = LatentFolder(encode(numbered.images, tmp_path / "mine.pt", tmp_path / "data"))
    assert data.meta["scale"] == 0.13025
    assert np.array_equal(data.moments, LatentFolder(numbered.data).moments)


# ---- the identity of data


def test_the_same_content_under_another_path_is_the_same_data(numbered, tmp_path):
    """Two jobs of a queue, each with a scratch folder of its own."""
    shutil.copytree(numbered.images, tmp_path / "job2/images")
    shutil.copy(numbered.vae, tmp_path / "job2/vae.pt")
    data = encode(tmp_path / "job2/images", tmp_path / "job2/vae.pt", tmp_path / "job2/data")
    assert LatentFolder(data).meta["identity"] == LatentFolder(numbered.data).meta["identity"]
    shutil.copytree(numbered.run, tmp_path / "run")
    call(train_stage1, *SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 3)
    call(build_teacher, "--ckpt", numbered.run, "--out", tmp_path)
    stage2 = ["--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "stage2", "--steps", 1]
    call(train_stage2, *SMALL, "--data", data, *stage2)


CHANGES = ["one image", "order", "labels", "scale", "a class's name"]


@pytest.mark.parametrize("what", CHANGES)
def test_another_content_under_the_same_path_is_refused(what, numbered, refused, tmp_path):
    """The folder was replaced by one of other pictures, names as they were."""
    shutil.copytree(numbered.run, tmp_path / "run")
    data = shutil.copytree(numbered.data, tmp_path / "data")
    given = [*SMALL, "--data", data, "--steps", 4]
    call(train_stage1, *given[:-1], 2, "--out", tmp_path / "run")
    moments, labels = np.load(data / "moments.npy"), np.load(data / "labels.npy")
    meta = json.loads((data / "meta.json").read_text())
    if what == "one image":
        moments[5, 0, 3, 3] += 0.25
    elif what == "order":
        moments = moments[::-1]
    elif what == "labels":
        labels[[0, 5]] = labels[[5, 0]]
    elif what == "scale":
        meta["scale"] *= 1.01
    else:
        meta["classes"][3] = "three"
    np.save(data / "moments.npy", moments)
    np.save(data / "labels.npy", labels)
    (data / "meta.json").write_text(json.dumps(meta))
    refused(train_stage1, *given, "--out", tmp_path / "run", says=["--data", "other latents"])
    call(build_teacher, "--ckpt", numbered.run, "--out", tmp_path)
    stage2 = ["--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "stage2"]
    refused(train_stage2, *given, *stage2, says=["teacher.pt"])
    assert not (tmp_path / "stage2").exists()


@pytest.mark.parametrize("what", ["content", "one of the same size", "one less", "one more"])
def test_changed_pictures_under_the_same_names_are_noticed(what, numbered, refused, tmp_path):
    """Encoded again into the same --out: not "complete already" with the old latents."""
    images = shutil.copytree(numbered.images, tmp_path / "images")
    for name in ("0/1.png", "3/0.png"):  # of one size in bytes, so that the time alone tells
        Image.fromarray(np.asarray(picture(1))).save(images / name, compress_level=0)
    data = encode(images, numbered.vae, tmp_path / "data")
    if what == "content":
        picture(999).save(images / "3/0.png")
    elif what == "one of the same size":
        size = (images / "3/0.png").stat().st_size
        picture(999).save(images / "3/0.png", compress_level=0)
        assert (images / "3/0.png").stat().st_size == size
    elif what == "one less":
        (images / "3/0.png").unlink()
    else:
        picture(999).save(images / "3/new.png")
    given = ["--images", images, "--vae", numbered.vae, "--out", data, *ENCODE]
    refused(vae_latents, *given, says=[data, "another --out"])


@pytest.mark.parametrize("what", ["added", "changed", "removed", "the VAE"])
def test_an_encoding_that_was_killed_before_its_images_changed(
    what, numbered, tmp_path, monkeypatch
):
    """Nothing is deleted on suspicion: it names the folder and what to do, and touches nothing."""
    images = shutil.copytree(numbered.images, tmp_path / "images")
    vae, data = shutil.copy(numbered.vae, tmp_path / "vae.pt"), tmp_path / "data"
    run, calls = AutoencoderKL.encode, []

    def killed(self, pixels):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return run(self, pixels)

    monkeypatch.setattr(AutoencoderKL, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(images, vae, data)
    monkeypatch.setattr(AutoencoderKL, "encode", run)
    assert list(data.glob("*.part.npy"))
    if what == "removed":
        (images / "11/1.png").unlink()
    elif what == "the VAE":
        saved = torch.load(vae, weights_only=True)
        torch.save({**saved, "scale": 0.8}, vae)
    else:
        picture(999).save(images / "11" / ("new.png" if what == "added" else "1.png"))
    before = {f.name: f.read_bytes() for f in data.iterdir()}
    with pytest.raises(UserError, match=f"{data}: holds a part of other latents; remove it, or"):
        encode(images, vae, data)
    assert {f.name: f.read_bytes() for f in data.iterdir()} == before
    encode(images, vae, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.part.npy"))


def test_an_encoding_that_was_killed_goes_on_without_a_word_of_change(
    numbered, tmp_path, capsys, monkeypatch
):
    run, calls = AutoencoderKL.encode, []

    def counted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, pixels)

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        encode(numbered.images, numbered.vae, tmp_path / "data")
    capsys.readouterr()
    encode(numbered.images, numbered.vae, tmp_path / "data")
    assert calls == [8, 8, 8, 8] and capsys.readouterr().err == ""
    for name in ("moments.npy", "labels.npy", "files.json"):
        wanted = (numbered.data / name).read_bytes()
        assert (tmp_path / "data" / name).read_bytes() == wanted


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int16, np.uint32, np.dtype(">i8")])
def test_labels_of_another_integer_type_are_the_same_labels(kind, numbered, tmp_path):
    data = shutil.copytree(numbered.data, tmp_path / "data")
    np.save(data / "labels.npy", np.load(data / "labels.npy").astype(kind))
    call(train_stage1, *SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 2)
    log = (tmp_path / "run/log.jsonl").read_bytes()
    assert log == (numbered.run / "log.jsonl").read_bytes()


# ---- one class


def test_one_class_is_a_warning_before_training(vae, tmp_path, capsys):
    """Faces: f_c and f_u cannot differ by a label that is always the same."""
    data = encode(folder(tmp_path / "images", ["faces"], each=8), vae, tmp_path / "data")
    assert "faces" in capsys.readouterr().err
    given = [*SMALL, "--data", data, "--steps", 1]
    call(train_stage1, *given, "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and str(data) in said and "one class" in said


# ---- checkpoints


FOREIGN = {
    "no average": lambda state: {"model": state, "opt": {}, "steps": 5},
    "compiled": lambda state: {"ema": {f"_orig_mod.{k}": v for k, v in state.items()}},
    "wrapped": lambda state: {"ema": {f"module.{k}": v for k, v in state.items()}},
    "weights alone": lambda state: state,
    "with a Namespace": lambda state: {"ema": state, "args": argparse.Namespace(cfg_prob=0.1)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_another_project_is_refused_and_the_named_command_converts_it(
    kind, numbered, refused, tmp_path
):
    state = torch.load(models.checkpoints(numbered.run)[0], weights_only=True)["model"]
    source = tmp_path / "0400000.pt"
    torch.save(FOREIGN[kind](state), source)
    given = ["--num-images", 2, *EULER, "--vae", numbered.vae, "--out", tmp_path / "out"]
    err = refused(sample, "--ckpt", source, *given, says=[source, "convert_sit"])
    teach = ["--ckpt", source, "--out", tmp_path / "teacher"]
    refused(build_teacher, *teach, says=[source, "convert_sit"])
    command = command_in(err, OUT=tmp_path / "mine.pt", FILE=numbered.vae)
    call(*command, "--classes", 12, "--path", "linear", "--prediction", "v")
    weights = ["--weights", "model" if kind == "no average" else "ema"]
    if kind == "no average":
        refused(sample, "--ckpt", tmp_path / "mine.pt", *given, says=["mine.pt", "--weights model"])
    call(sample, "--ckpt", tmp_path / "mine.pt", *given, *weights)
    want = ["--ckpt", numbered.run, "--weights", "model", "--out", tmp_path / "want"]
    call(sample, *given[:-2], *want)
    assert np.array_equal(
        samples_in(tmp_path / "out")["arr_0"], samples_in(tmp_path / "want")["arr_0"]
    )


def test_a_label_table_without_a_null_row_samples_plainly_alone(numbered, refused, tmp_path):
    """REPA trains so with --cfg-prob 0: the last class is not the null label."""
    state = torch.load(models.checkpoints(numbered.run)[0], weights_only=True)["model"]
    table = "y_embedder.embedding_table.weight"
    says = {"path_type": "linear", "prediction": "v", "cfg_prob": 0.0, "num_classes": 12}
    state = {**state, table: state[table][:12]}
    theirs = {"ema": state, "model": state, "args": argparse.Namespace(**says)}
    torch.save(theirs, tmp_path / "repa.pt")
    mine = tmp_path / "mine.pt"
    convert_sit = importlib.import_module("experiments.checkpoints.convert_sit")
    call(convert_sit, tmp_path / "repa.pt", mine, "--vae", numbered.vae)
    given = ["--ckpt", mine, "--num-images", 12, *EULER]
    refused(sample, *given, "--cfg", 2, "--out", tmp_path / "no", says=["null label"])
    refused(build_teacher, "--ckpt", mine, "--out", tmp_path / "no", says=["null"])
    assert not (tmp_path / "no").exists()
    call(sample, *given, "--out", tmp_path / "out")
    assert samples_in(tmp_path / "out")["labels"].tolist() == list(range(12))


def test_a_checkpoint_of_the_older_format_samples_and_teaches_once_it_is_converted(
    numbered, refused, tmp_path
):
    """By the command that the message names. It cannot be continued: its run is another one."""
    shutil.copytree(numbered.run, tmp_path / "run")
    path = models.checkpoints(tmp_path / "run")[0]
    saved = torch.load(path, weights_only=True)
    del saved["projector_opt"], saved["identity"], saved["meta"]["identity"]
    torch.save({**saved, "format": 1}, path)
    run = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--steps", 4]
    refused(train_stage1, *run, says=[path, "convert_sit"])
    given = ["--num-images", 4, *EULER, "--out", tmp_path / "samples"]
    err = refused(sample, "--ckpt", tmp_path / "run", *given, says=[path, "convert_sit"])
    call(*command_in(err, OUT=tmp_path / "mine.pt", FILE=numbered.vae))
    call(sample, "--ckpt", tmp_path / "mine.pt", *given)
    call(sample, "--ckpt", numbered.run, *given[:-1], tmp_path / "want")
    got, want = (samples_in(tmp_path / out)["arr_0"] for out in ("samples", "want"))
    assert np.array_equal(got, want)
    call(build_teacher, "--ckpt", tmp_path / "mine.pt", "--out", tmp_path)
    stage2 = ["--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "stage2"]
    call(train_stage2, *SMALL, "--data", numbered.data, "--steps", 1, *stage2)


def test_a_checkpoint_under_another_step_is_said(numbered, refused, tmp_path):
    """mv ckpt-0000002.pt ckpt-0000050.pt: what the message advises works, and nothing is lost."""
    shutil.copytree(numbered.run, tmp_path / "run")
    wrong, right = (tmp_path / f"run/ckpt-00000{step}.pt" for step in ("50", "02"))
    right.rename(wrong)
    run = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--keep", 1]
    refused(train_stage1, *run, "--steps", 4, says=[wrong, "step 2", "name"])
    refused(train_stage1, *run, "--steps", 60, says=[wrong, "step 2", "name"])
    wrong.rename(right)
    call(train_stage1, *run, "--steps", 4)
    assert [file.name for file in models.checkpoints(tmp_path / "run")] == ["ckpt-0000004.pt"]


def test_what_was_just_saved_is_never_deleted(numbered, tmp_path, monkeypatch):
    """A copy under a higher step appears while the run is at work."""
    update = train_stage1.State.update

    def copying(self, *args):
        update(self, *args)
        if self.step == 3:
            shutil.copy(tmp_path / "run/ckpt-0000002.pt", tmp_path / "run/ckpt-0000090.pt")
            shutil.copy(tmp_path / "run/ckpt-0000002.pt", tmp_path / "run/ckpt.pt")

    monkeypatch.setattr(train_stage1.State, "update", copying)
    run = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--keep", 1]
    call(train_stage1, *run, "--steps", 6)
    assert (tmp_path / "run/ckpt-0000006.pt").exists()
    assert (tmp_path / "run/ckpt.pt").exists()  # of a name that is the user's


def test_a_block_that_is_not_there_makes_no_folder(numbered, refused, tmp_path):
    given = [*SMALL, "--data", numbered.data, "--out", tmp_path / "run", "--steps", 2]
    refused(train_stage1, *given, "--align-depth", 7, says=["depth 7", "1 to 6"])
    call(build_teacher, "--ckpt", numbered.run, "--out", tmp_path)
    teacher = ["--teacher", tmp_path / "teacher.pt", "--guide-depth", 7]
    refused(train_stage2, *given, *teacher, says=["depth 7", "1 to 6"])
    assert not (tmp_path / "run").exists()


# ---- files that are not what their names say


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3347\n"


PAGE = "<!doctype html><html><head><title>Sign in</title></head></html>\n" * 40


def stranger(kind, path):
    """A file of this kind under a name that says something else, and what a message calls it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pointer":
        path.write_text(POINTER)
    elif kind == "page":
        path.write_text(PAGE)
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "npy":
        np.save(path.with_suffix(".npy"), np.zeros((4, 3, 32, 32), np.uint8))
        path.with_suffix(".npy").replace(path)
    elif kind == "npz":
        np.savez(io_ := io.BytesIO(), something=np.zeros(3))
        path.write_bytes(io_.getvalue())
    elif kind == "pickle":
        np.save(path.with_suffix(".npy"), {"mu": np.zeros(3)}, allow_pickle=True)
        path.with_suffix(".npy").replace(path)
    return {"pointer": "Git LFS pointer", "page": "<!doctype html>"}.get(kind, str(path))


STRANGERS = ["pointer", "page", "nothing", "npy", "npz", "pickle"]


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_under_the_names_of_files_are_called_what_they_are(
    kind, numbered, refused, monkeypatch, tmp_path
):
    """Under every flag that names a file, and in every folder that is read."""
    path, out = tmp_path / "file.pt", ["--out", tmp_path / "out"]
    name = stranger(kind, path)
    images = ["--images", numbered.images, *ENCODE]
    train = [*SMALL, "--data", numbered.data, *out]
    refused(vae_latents, *images, "--vae", path, *out, says=[path, name])
    refused(sample, "--ckpt", path, *EULER, *out, says=[path, name])
    refused(sample, "--ckpt", numbered.run, "--vae", path, *EULER, *out, says=[path, name])
    refused(build_teacher, "--ckpt", path, *out, says=[path, name])
    refused(train_stage2, *train, "--teacher", path, says=[path, name])
    refused(fid, numbered.images, "--weights", path, says=[path, name])
    stranger(kind, tmp_path / "old/ckpt-0000004.pt")
    old = ["--out", tmp_path / "old", "--steps", 8]
    refused(
        train_stage1,
        *SMALL,
        "--data",
        numbered.data,
        *old,
        says=["ckpt-0000004.pt", *name.split(str(path))],
    )
    refused(sample, "--ckpt", tmp_path / "old", *EULER, *out, says=["ckpt-0000004.pt"])
    for part in ("labels.npy", "moments.npy", "meta.json"):
        data = tmp_path / part
        shutil.copytree(numbered.data, data)
        stranger(kind, data / part)
        refused(train_stage1, *SMALL, "--data", data, *out, says=[data])
    stranger(kind, tmp_path / "samples/samples.npz")
    samples = ["--num-images", 2, *EULER, "--out", tmp_path / "samples"]
    refused(sample, "--ckpt", numbered.run, *samples, says=["samples.npz"])
    assert not (tmp_path / "out").exists()


def test_our_own_files_under_each_others_flags(numbered, refused, monkeypatch, tmp_path):
    """A VAE, a checkpoint, a teacher, samples: each is refused where another is wanted."""
    call(build_teacher, "--ckpt", numbered.run, "--out", tmp_path)
    call(sample, "--ckpt", numbered.run, "--num-images", 2, *EULER, "--out", tmp_path / "samples")
    files = {"vae": numbered.vae, "ckpt": models.checkpoints(numbered.run)[0]}
    files.update(teacher=tmp_path / "teacher.pt", npz=tmp_path / "samples/samples.npz")
    out, images = ["--out", tmp_path / "out"], ["--images", numbered.images, *ENCODE]
    train = [*SMALL, "--data", numbered.data, *out]
    for kind, path in files.items():
        if kind != "vae":
            refused(vae_latents, *images, "--vae", path, *out, says=[path])
            refused(sample, "--ckpt", numbered.run, "--vae", path, *EULER, *out, says=[path])
        if kind != "ckpt":
            refused(sample, "--ckpt", path, *EULER, *out, says=[path])
            refused(build_teacher, "--ckpt", path, *out, says=[path])
        if kind != "teacher":
            refused(train_stage2, *train, "--teacher", path, says=[path])
        refused(fid, numbered.images, "--weights", path, "--device", "cpu", says=[path])
        with monkeypatch.context() as patch:
            patch.setattr(fid, "load_inception", lambda weights: Few())
            if kind != "npz":
                refused(fid, path, numbered.images, "--device", "cpu", says=[path])
        refused(train_stage1, *train, "--data", path, says=[path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_under_the_names_of_images(kind, vae, refused, few, tmp_path):
    """Left out by name when encoding, refused by name when a metric is at stake."""
    images = folder(tmp_path / "images", ["cat", "dog"])
    stranger(kind, images / "cat/0.png")
    data = encode(images, vae, tmp_path / "data")
    assert len(LatentFolder(data)) == 5 and "cat/0.png" in (data / "unreadable.txt").read_text()
    refused(fid, images, says=["cat/0.png"])


class Few(torch.nn.Module):
    """Three features in Inception's place."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        means = images.float().mean(dim=(2, 3))
        return means, 2 * means, means.softmax(dim=1)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda weights: Few())


def archive(path, **content):
    np.savez(path, **content)
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


MU, SIGMA = np.zeros(3), np.eye(3)


ARCHIVES = {
    "mu alone": {"mu": MU},
    "sigma alone": {"sigma": SIGMA},
    "mu_s alone": {"mu": MU, "sigma": SIGMA, "mu_s": MU},
    "images and mu alone": {"arr_0": PIXELS, "mu": MU},
    "sigma of one row": {"mu": MU, "sigma": np.zeros(3)},
    "sigma of another side": {"mu": MU, "sigma": np.eye(4)},
    "mu of a table": {"mu": SIGMA, "sigma": SIGMA},
    "mu of text": {"mu": np.array(["a", "b", "c"]), "sigma": SIGMA},
    "mu of nan": {"mu": MU * np.nan, "sigma": SIGMA},
    "sigma of infinity": {"mu": MU, "sigma": np.full((3, 3), np.inf)},
    "channels first": {"arr_0": PIXELS.transpose(0, 3, 1, 2)},
    "floats": {"arr_0": PIXELS / 255},
    "nan": {"arr_0": np.full((4, 8, 8, 3), np.nan, np.float32)},
    "grey": {"arr_0": PIXELS[..., 0]},
    "with alpha": {"arr_0": np.zeros((4, 8, 8, 4), np.uint8)},
    "one image": {"arr_0": PIXELS[:1]},
    "no image": {"arr_0": PIXELS[:0]},
    "an image": {"arr_0": PIXELS[0]},
    "other names": {"images": PIXELS},
    "an object": {"arr_0": PIXELS, "names": np.array([{}], dtype=object)},
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("side", ["samples", "reference"])
def test_archives_that_no_metric_can_use_are_refused(kind, side, refused, few, tmp_path):
    bad = archive(tmp_path / "bad.npz", **ARCHIVES[kind])
    good = archive(tmp_path / "good.npz", arr_0=PIXELS)
    sides = [bad, good] if side == "samples" else [good, bad]
    refused(fid, *sides, "--device", "cpu", says=[bad])


def test_npy_files_are_named_as_what_they_are(refused, few, tmp_path):
    """Statistics as a pickled dict, and images (N, 3, S, S)."""
    np.save(tmp_path / "stats.npy", {"mu": MU, "sigma": SIGMA}, allow_pickle=True)
    np.save(tmp_path / "images.npy", PIXELS)
    for name in ("stats.npy", "images.npy"):
        says = [tmp_path / name, ".npz", "arr_0", "mu", "sigma"]
        refused(fid, tmp_path / name, "--device", "cpu", says=says)


# ---- fid


def test_fid_says_what_makes_numbers_incomparable(numbered, few, tmp_path, capsys):
    """How many images each side has, and how ours were sampled; nobody else's word for it."""
    given = ["--ckpt", numbered.run, "--num-images", 14, *EULER, "--cfg", 1.5, "--labels", "random"]
    call(sample, *given, "--out", tmp_path / "ours")
    settings = '{"lr": 1}'
    theirs = archive(
        tmp_path / "theirs.npz", arr_0=np.zeros((9, 32, 32, 3), np.uint8), settings=settings
    )
    stats = archive(tmp_path / "stats.npz", mu=MU, sigma=SIGMA)
    capsys.readouterr()
    call(fid, tmp_path / "ours", theirs)
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert result["num"] == 14 and result["reference_num"] == 9 and "lr" not in said
    assert {"labels": "random", "mode": "euler", "steps": 2, "cfg": 1.5}.items() <= result[
        "sampled"
    ].items()
    call(fid, theirs, stats)
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["reference_num"] is None


def test_hidden_files_do_not_count_in_fid(few, tmp_path, capsys):
    images = folder(tmp_path / "images", ["cat", "dog"])
    (images / "dog/.ipynb_checkpoints").mkdir()
    shutil.copy(images / "dog/0.png", images / "dog/.ipynb_checkpoints/0.png")
    shutil.copy(images / "dog/0.png", images / ".0.png")
    (images / "notes.txt").write_text("no image")
    call(fid, images)
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["num"] == 6
    assert re.search(rf"{images}: .*\b3\b", said)


CACHES = ["cut", "another network's", "pointer"]


@pytest.mark.parametrize("kind", CACHES)
def test_a_damaged_cache_of_inception_names_the_file_to_delete(
    kind, monkeypatch, refused, tmp_path
):
    """And once it is deleted it comes again, whatever folders are missing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "new/hub"))
    cached = tmp_path / "new/hub/checkpoints" / fid.WEIGHTS.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    if kind == "another network's":
        torch.save({"weight": torch.zeros(3)}, cached)
    else:
        cached.write_bytes(POINTER.encode() if kind == "pointer" else b"\x80\x02}")
    good = archive(tmp_path / "good.npz", arr_0=PIXELS)
    refused(fid, good, says=[cached, "delete"])
    shutil.rmtree(tmp_path / "new")
    asked = []

    def download(url, path, hash_prefix=None, **more):
        asked.append((url, hash_prefix))
        with open(path, "wb") as file:
            file.write(b"what came instead")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    refused(fid, good, says=[cached, "delete"])  # nor is what comes believed
    assert asked == [(fid.WEIGHTS, "6726825d")]


def test_no_way_to_the_weights_is_one_line(monkeypatch, refused, tmp_path):
    def download(*args, **more):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "new/hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    good = archive(tmp_path / "good.npz", arr_0=PIXELS)
    refused(fid, good, says=[fid.WEIGHTS, "--weights"])
