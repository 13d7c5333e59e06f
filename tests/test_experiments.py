"""The scripts in experiments/: converters, what a bad input gets, the report, the shell scripts."""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, script, tiny, write_checkpoint, write_folder
from PIL import Image

import build_teacher
import models
import sample
from common import UserError
from experiments.checkpoints import convert_sit, plot, probe
from experiments.cifar10 import judge as judging
from experiments.cifar10 import report
from experiments.demo import shapes
from experiments.latents import convert_vae, small_vae
from experiments.methods import repa_features
from models import load_checkpoint
from vae_latents import AutoencoderKL, LatentFolder, load_vae

TABLE = "y_embedder.embedding_table.weight"


def refused(module, *flags, says, out=None):
    """The one line that a script says of a mistake; `out` is not made."""
    with pytest.raises((UserError, OSError)) as caught:
        call(module, *flags)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in says), text
    assert out is None or not out.exists()
    return text


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- convert_vae.py


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL((8, 16), layers=1)


@pytest.fixture
def folder(vae, tmp_path):
    """A folder of diffusers, with its config.json."""
    path = tmp_path / "vae"
    path.mkdir()
    torch.save(vae.state_dict(), path / "diffusion_pytorch_model.bin")
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.13025}
    (path / "config.json").write_text(json.dumps(config))
    return path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("source", ["vae", "vae/diffusion_pytorch_model.bin", ""])
def test_the_scale_is_the_configs(source, vae, folder, tmp_path):
    out = tmp_path / "out.pt"
    call(convert_vae, tmp_path / source, out)  # "": a whole pipeline with vae/ inside
    assert load_vae(out).scale == 0.13025 and same(load_vae(out).state_dict(), vae.state_dict())


def test_a_scale_is_never_assumed(folder, tmp_path):
    out = tmp_path / "out.pt"
    refused(convert_vae, folder, out, "--scale", 0.5, says=["--scale 0.5", "0.13025"], out=out)
    change_config(folder, scaling_factor=None)
    refused(convert_vae, folder, out, says=["--scale", "scaling_factor"], out=out)
    (folder / "config.json").unlink()
    refused(convert_vae, folder, out, says=["--scale", "scaling_factor"], out=out)
    refused(convert_vae, folder, out, "--scale", "inf", says=["--scale"], out=out)
    call(convert_vae, folder, out, "--scale", 0.5)
    assert load_vae(out).scale == 0.5


@pytest.mark.parametrize("key", ["latents_mean", "_class_name"])
def test_other_kinds_of_vaes_are_refused_by_name(key, folder, tmp_path):
    wrong = {"latents_mean": [1, 2], "_class_name": "AutoencoderDC"}[key]
    change_config(folder, **{key: wrong})
    refused(
        convert_vae, folder, tmp_path / "o", says=["config.json", str(wrong)], out=tmp_path / "o"
    )


@pytest.mark.parametrize("kind", ["missing", "nan", "text", "empty"])
def test_bad_weights_leave_no_file(kind, vae, folder, tmp_path):
    state, weights = vae.state_dict(), folder / "diffusion_pytorch_model.bin"
    if kind == "missing":
        del state["quant_conv.weight"]
    if kind == "nan":
        state["quant_conv.weight"][0] = float("nan")
    torch.save(state, weights)
    if kind == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    if kind == "empty":
        weights.unlink()
    says = {"missing": "quant_conv.weight", "nan": "not finite", "text": "LFS pointer"}
    says = says.get(kind, "diffusion_pytorch_model.safetensors or .bin")
    refused(convert_vae, folder, tmp_path / "out.pt", says=[says], out=tmp_path / "out.pt")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("module", [convert_vae, convert_sit])
def test_what_is_there_is_not_replaced(module, folder, tmp_path):
    (tmp_path / "out.pt").write_text("dear")
    refused(module, folder, tmp_path / "out.pt", says=["out.pt", "already"])
    assert (tmp_path / "out.pt").read_text() == "dear"


def boom():
    Path("boom").touch()


class Boom:
    def __reduce__(self):
        return boom, ()


def test_callbacks_in_a_checkpoint_are_neither_imported_nor_run(vae, tmp_path, monkeypatch, capsys):
    """Lightning keeps its callbacks by class: they are left out, and said."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("lightning_of_theirs")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    module.boom = boom
    monkeypatch.setattr(boom, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    whole = {f"first_stage_model.{key}": value for key, value in vae.state_dict().items()}
    whole["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    content = {"state_dict": whole, "callbacks": {module.Callback: {"best": None}, "x": Boom()}}
    torch.save(content, tmp_path / "sd.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    call(convert_vae, tmp_path / "sd.ckpt", tmp_path / "out.pt", "--scale", 0.5)
    said = capsys.readouterr().out
    assert "lightning_of_theirs.Callback" in said and "lightning_of_theirs.boom" in said
    assert same(load_vae(tmp_path / "out.pt").state_dict(), vae.state_dict())
    assert module.__name__ not in sys.modules and not (tmp_path / "boom").exists()


@pytest.mark.slow
def test_the_command_that_load_vae_names(vae, tmp_path):
    torch.save(vae.state_dict(), tmp_path / "theirs.bin")
    with pytest.raises(UserError) as caught:
        load_vae(tmp_path / "theirs.bin")
    result = run_named(str(caught.value), tmp_path / "out.pt", "--scale", "0.5")
    assert result.returncode == 0, result.stderr
    assert same(load_vae(tmp_path / "out.pt").state_dict(), vae.state_dict())


def run_named(message, out, *more):
    """Run the command `python -m experiments. ... convert_... PATH OUT` that a message names."""
    name, path = re.search(r"python -m (experiments\.\w+\.convert_\w+) (\S+) OUT", message).groups()
    return script(name, path, out, *more)


# ---- convert_sit.py

SAYS = {"path_type": "linear", "prediction": "v", "cfg_prob": 0.1, "num_classes": 7}
SAID = ["--classes", 7, "--path", "linear", "--prediction", "v"]


@pytest.fixture
def vae_file(vae, tmp_path):
    torch.save({"model": vae.state_dict(), "scale": 0.5}, tmp_path / "vae.pt")
    return tmp_path / "vae.pt"


@pytest.fixture
def model():
    return tiny(num_classes=7)


@pytest.fixture
def repa(model, tmp_path):
    """repa(changes of the state, **changes of the arguments): the path of such a checkpoint."""

    def save(changes=None, **says):
        state = {**model.state_dict(), **(changes or {})}
        content = {"ema": state, "model": state, "args": argparse.Namespace(**{**SAYS, **says})}
        torch.save(content, tmp_path / "repa.pt")
        return tmp_path / "repa.pt"

    return save


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module.", "ema_model.", "shadow."])
def test_wrappers_and_half_precision(wrapper, model, vae_file, tmp_path):
    state = {wrapper + key: value.half() for key, value in model.state_dict().items()}
    state[f"{wrapper}projectors.0.weight"] = torch.zeros(2)
    torch.save({"ema": state}, tmp_path / "theirs.pt")
    call(convert_sit, tmp_path / "theirs.pt", tmp_path / "out.pt", "--vae", vae_file, *SAID)
    ours, saved = load_checkpoint(tmp_path / "out.pt")
    wanted = {key: value.half().float() for key, value in model.state_dict().items()}
    assert same(ours.state_dict(), wanted)
    assert {value.dtype for value in saved["ema"].values()} == {torch.float32}
    meta, kept = saved["meta"], load_vae(vae_file)
    assert meta["classes"] == [str(i) for i in range(7)]
    assert (meta["scale"], meta["vae"]["identity"], meta["identity"]) == (
        0.5,
        kept.identity(),
        None,
    )


def test_what_a_checkpoint_does_not_say_has_to_be_said(model, vae_file, tmp_path):
    torch.save({"ema": model.state_dict()}, tmp_path / "theirs.pt")
    theirs, out = tmp_path / "theirs.pt", tmp_path / "out.pt"
    refused(convert_sit, theirs, out, *SAID, says=["theirs.pt", "--vae"], out=out)
    for place in (0, 2, 4):
        given = SAID[:place] + SAID[place + 2 :]
        says = ["theirs.pt", SAID[place]]
        refused(convert_sit, theirs, out, "--vae", vae_file, *given, says=says, out=out)
    given = [*SAID, "--classes", 5]
    refused(convert_sit, theirs, out, "--vae", vae_file, *given, says=["8 rows", "5"], out=out)


@pytest.mark.parametrize(
    "says,word",
    [
        ({"path_type": "cosine"}, "cosine"),
        ({"path_type": "Linear", "prediction": "velocity"}, "Linear"),  # SiT's own
        ({"prediction": "x"}, "prediction x"),
        ({"model": "SiT-B/2"}, "SiT-B/2"),
        ({"num_classes": 9}, "9"),
    ],
)
def test_checkpoints_that_say_otherwise_are_refused(says, word, repa, vae_file, tmp_path):
    flags = [repa(**says), tmp_path / "out.pt", "--vae", vae_file]
    refused(convert_sit, *flags, says=["repa.pt", word], out=tmp_path / "out.pt")


def test_a_predicted_variance_is_refused(model, repa, vae_file, tmp_path):
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    twice = {name: torch.cat(2 * [model.state_dict()[name]]) for name in names}
    flags = [repa(twice), tmp_path / "out.pt", "--vae", vae_file]
    refused(convert_sit, *flags, says=["learn_sigma"], out=tmp_path / "out.pt")


def test_other_heads_channels_and_contradicting_flags_are_refused(repa, vae_file, tmp_path):
    out, norms = tmp_path / "out.pt", "blocks.0.attn.q_norm.weight"
    flags = [out, "--vae", vae_file]
    refused(convert_sit, repa({norms: torch.ones(16)}), *flags, says=["8 heads", "4"], out=out)
    refused(convert_sit, repa(), *flags, "--classes", 3, says=["--classes 3", "7"], out=out)
    deep = AutoencoderKL((8, 16), 8, layers=1)
    torch.save({"model": deep.state_dict(), "scale": 0.5}, vae_file)
    refused(convert_sit, repa(), *flags, says=["4 channels", "8"], out=out)


def test_a_table_without_a_null_row_samples_but_does_not_guide(model, repa, vae_file, tmp_path):
    out = tmp_path / "out.pt"
    source = repa({TABLE: model.state_dict()[TABLE][:7]}, cfg_prob=0.0)
    call(convert_sit, source, out, "--vae", vae_file)
    ours = load_checkpoint(out)[0].state_dict()
    assert torch.equal(ours[TABLE][:7], model.state_dict()[TABLE][:7])
    assert not ours[TABLE][7].any()
    flags = ["--ckpt", out, "--num-images", 2, "--steps", 1, "--device", "cpu"]
    call(sample, *flags, "--out", tmp_path / "plain")
    assert (tmp_path / "plain/samples.npz").exists()
    refused(sample, *flags, "--cfg", 2, "--out", tmp_path / "cfg", says=["--cfg", "null label"])
    teacher = ["--ckpt", out, "--out", tmp_path / "teacher"]
    refused(build_teacher, *teacher, says=["null label"], out=tmp_path / "teacher")
    refused(probe, out, "--data", tmp_path, "--out", tmp_path / "p", says=["null label"])


def test_a_null_row_that_was_never_trained_is_not_used(repa, vae_file, tmp_path):
    call(convert_sit, repa(cfg_prob=0.0), tmp_path / "out.pt", "--vae", vae_file)
    refused(build_teacher, "--ckpt", tmp_path / "out.pt", says=["null label"])


def test_weights_that_are_not_there_are_not_invented(model, vae_file, tmp_path):
    torch.save({"model": model.state_dict(), "steps": 5}, tmp_path / "theirs.pt")
    call(convert_sit, tmp_path / "theirs.pt", tmp_path / "out.pt", "--vae", vae_file, *SAID)
    assert same(load_checkpoint(tmp_path / "out.pt", "model")[0].state_dict(), model.state_dict())
    with pytest.raises(UserError, match="--weights model"):
        load_checkpoint(tmp_path / "out.pt")


def test_an_average_of_few_steps_is_not_used(model, vae_file, tmp_path):
    both = {"ema": model.state_dict(), "model": model.state_dict(), "steps": 5}
    torch.save({**both, "args": argparse.Namespace(**SAYS)}, tmp_path / "theirs.pt")
    call(convert_sit, tmp_path / "theirs.pt", tmp_path / "out.pt", "--vae", vae_file)
    with pytest.raises(UserError, match="--weights model"):
        load_checkpoint(tmp_path / "out.pt")


def old_checkpoint(path, model):
    """A checkpoint of format 1: one optimizer, latents without an identity."""
    saved = torch.load(write_checkpoint(path, model), weights_only=True)
    del saved["meta"]["identity"]
    torch.save({**saved, "format": 1, "opt": {"state": {}, "param_groups": []}}, path)
    return path


def test_an_old_checkpoint_teaches_once_converted(model, tmp_path):
    old = old_checkpoint(tmp_path / "old.pt", model)
    call(convert_sit, old, tmp_path / "out.pt")
    ours, saved = load_checkpoint(tmp_path / "out.pt")
    assert same(ours.state_dict(), model.state_dict())
    assert (saved["format"], saved["step"], saved["meta"]["identity"]) == (models.FORMAT, 7, None)
    call(build_teacher, "--ckpt", tmp_path / "out.pt", "--out", tmp_path / "teacher")
    refused(convert_sit, tmp_path / "out.pt", tmp_path / "o", says=["out.pt", "today's format"])
    torch.save({"scale": 30.0, "config": {}, "source": {"ckpt": "run"}}, tmp_path / "teacher.pt")
    says = ["teacher.pt", "old teacher", "run", "build_teacher.py"]
    refused(convert_sit, tmp_path / "teacher.pt", tmp_path / "o", says=says, out=tmp_path / "o")


@pytest.mark.slow
def test_the_command_that_load_checkpoint_names(model, vae_file, tmp_path):
    torch.save({"ema": model.state_dict()}, tmp_path / "theirs.pt")
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "theirs.pt")
    flags = ["--vae", vae_file, *SAID]
    result = run_named(str(caught.value), tmp_path / "out.pt", *flags)
    assert result.returncode == 0, result.stderr
    assert same(load_checkpoint(tmp_path / "out.pt")[0].state_dict(), model.state_dict())


# ---- Sizes of 0, odd sizes, one image, missing files, other numbers of classes


@pytest.fixture
def images(tmp_path):
    shapes.write(tmp_path / "images", 12, 16)
    return tmp_path / "images"


@pytest.mark.parametrize("flags", ["--num 0", "--size 0", "--size 7", "--size 1e3", "--num -1"])
def test_shapes_of_impossible_sizes(flags, tmp_path):
    refused(shapes, tmp_path / "s", *flags.split(), says=flags.split()[:1], out=tmp_path / "s")


def test_one_drawing_is_one_class(tmp_path):
    call(shapes, tmp_path / "s", "--num", 1, "--size", 8)
    assert [f.name for f in tmp_path.rglob("*.png")] == ["00000.png"]
    assert [f.name for f in (tmp_path / "s").iterdir()] == ["circle"]


VAE_FLAGS = (
    "--size 15|--size 0|--size 12 --factor 8|--steps 0|--batch-size 0|--num 0|--lr 0|--seed -1"
)


@pytest.mark.parametrize("flags", [*VAE_FLAGS.split("|"), "--lr 1e9", "--factor 3"])
def test_small_vae_with_bad_settings(flags, images, tmp_path):
    out = tmp_path / "vae.pt"
    given = ["--size", 16, "--steps", 12, "--device", "cpu", "--out", out, *flags.split()]
    refused(small_vae, images, *given, says=flags.split()[:1], out=out)


def test_small_vae_of_bad_images(images, tmp_path):
    out = ["--size", 16, "--device", "cpu", "--out", tmp_path / "vae.pt"]
    refused(small_vae, tmp_path / "none", *out, says=["none", "No such file"], out=out[-1])
    for file in images.rglob("*.png"):
        file.write_text("no picture")
    refused(small_vae, images, *out, says=["none of its images can be read"], out=out[-1])
    shutil.rmtree(images)
    call(shapes, images, "--num", 1, "--size", 16)
    call(small_vae, images, *out, "--steps", 2)
    call(small_vae, images, *out, "--steps", 2)  # is there already
    out[-1].write_text("no VAE")
    refused(small_vae, images, *out, says=["vae.pt"])


@pytest.fixture
def pictures(tmp_path):
    """A latent folder of 24 images of three classes, with the images that it was encoded from."""
    folder = write_folder(tmp_path / "data", num=24, classes=3)
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(24)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    (folder / "files.json").write_text(json.dumps(names))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "source": str(folder)}))
    return folder


@pytest.mark.parametrize("flags", ["--steps 0", "--width 0", "--seed -1", "--steps x"])
def test_a_judge_with_bad_settings(flags, pictures, tmp_path):
    out = tmp_path / "judge.pt"
    given = ["train", pictures, "--out", out, *flags.split()]
    refused(judging, *given, says=flags.split()[:1], out=out)


@pytest.mark.parametrize("module,first", [(judging, ["train"]), (repa_features, ["--data"])])
def test_too_few_or_lost_images_for_a_cnn(module, first, pictures, tmp_path):
    few, more = write_folder(tmp_path / "few", num=1, classes=1), ["--steps", 1]
    more += ["--model", "SiT-Ti/4"] if module is repa_features else ["--out", tmp_path / "judge.pt"]
    refused(module, *first, few, *more, says=["few", "1 images"])
    refused(module, *first, tmp_path / "none", *more, says=["none"])
    (pictures / "3.png").unlink()
    refused(module, *first, pictures, *more, says=["data", "3.png"], out=tmp_path / "judge.pt")


def test_features_of_a_patch_that_does_not_tile(pictures):
    meta = json.loads((pictures / "meta.json").read_text())
    (pictures / "meta.json").write_text(json.dumps({**meta, "height": 12, "width": 12}))
    np.save(pictures / "moments.npy", np.load(pictures / "moments.npy")[:, :, :12, :12])
    refused(
        repa_features, "--data", pictures, "--model", "SiT-Ti/8", says=["--model SiT-Ti/8", "12"]
    )


def test_a_judge_of_photographs(latents, tmp_path, recwarn):
    judge = tmp_path / "judge.pt"
    flags = ["--augment", "--round-trips", "--steps", 2, "--width", 4, "--out", judge]
    call(judging, "train", latents, *flags)
    assert not recwarn.list
    cnn, saved = judging.load(judge)
    folder = LatentFolder(latents)
    vae = load_vae(folder.meta["vae"]["path"])
    mean = torch.tensor(folder.moments[:, :4]).float()
    with torch.no_grad():
        pixels = torch.cat([vae.decode(one[None]) for one in mean]).permute(0, 2, 3, 1)
    by_hand = (127.5 * (pixels.clamp(-1, 1) + 1)).round()
    decoded = judging.round_trips(folder)
    assert (decoded - by_hand).abs().max() <= 1  # one at a time, it rounds otherwise
    held = torch.tensor([i % 10 == i // 10 % 10 for i in range(len(folder))])
    found = judging.measure(cnn, saved, decoded[held], folder.labels[held])
    assert saved["round_trips"] == [found["FD-CNN"], found["agreement"]]


def test_augmented_images_are_mirrored_and_rolled():
    torch.manual_seed(0)
    images, seen = torch.randint(256, (20, 16, 16, 3), dtype=torch.uint8), set()
    for _ in range(50):
        batch = judging.augmented(images)
        for number, image in enumerate(batch):
            for mirror, down, right in itertools.product((0, 1), range(-3, 4), range(-3, 4)):
                source = np.fliplr(images[number]) if mirror else images[number].numpy()
                if np.array_equal(np.roll(source, (down, right), axis=(0, 1)), image):
                    seen.add((mirror, down, right))
                    break
            else:
                raise AssertionError(f"image {number} is no rolled image or mirror of it")
    assert {mirror for mirror, _, _ in seen} == {0, 1}
    assert {down for _, down, _ in seen} == {right for *_, right in seen} == {*range(-3, 4)}


def test_a_round_trip_has_its_image_s_label():
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1])

    class Sees(torch.nn.Module):
        """Knows the class by the pixels; `trust` in it rises if the labels say the same."""

        def __init__(self):
            super().__init__()
            self.trust = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images):
            return None, self.trust * torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 3)

    images = labels.byte().view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    cnn = Sees()
    judging.fit(cnn, torch.cat([images, images]), labels, torch.arange(7, 14), steps=50)
    assert cnn.trust > 0.05  # 50 steps of up to 0.003


def write_samples(path, images=4, side=32, labels=(0, 1, 2, 0), dtype=np.uint8, **more):
    np.savez(path, arr_0=np.zeros((images, side, side, 3), dtype), labels=np.array(labels), **more)
    return path


def test_judging(pictures, tmp_path, capsys):
    judge, npz = tmp_path / "judge.pt", tmp_path / "samples.npz"
    call(judging, "train", pictures, "--out", judge, "--steps", 1, "--width", 4)
    capsys.readouterr()
    call(judging, "judge", judge, write_samples(npz))
    record = json.loads(capsys.readouterr().out)
    assert record.keys() == {"samples", "FD-CNN", "agreement", "precision", "recall"}
    others = {
        "16 px": {"side": 16},
        "1 images": {"images": 1, "labels": [0]},
        "labels to 3 of 3": {"labels": [0, 1, 2, 3]},  # of latents with more classes
        "float64": {"dtype": np.float64},
        "(4, 32, 32, 3)": {"labels": [0, 1]},
    }
    for says, wrong in others.items():
        says = "32 px" if says == "16 px" else says
        refused(judging, "judge", judge, write_samples(npz, **wrong), says=["samples.npz", says])
    np.savez(npz, mu=np.zeros(3))
    refused(judging, "judge", judge, npz, says=["samples.npz", "arr_0"])
    refused(judging, "judge", judge, tmp_path / "none.npz", says=["none.npz"])
    refused(judging, "judge", npz, npz, says=["samples.npz"])
    whole = torch.load(judge, weights_only=True)
    for part in ("model", "classes", "mu", "sigma", "reference"):
        torch.save({key: value for key, value in whole.items() if key != part}, judge)
        refused(judging, "judge", judge, npz, says=["judge.pt", part, "judge.py train"])
    for wrong in ([], ["judge"], ["judge", judge], ["draw", judge]):
        refused(judging, *wrong, says=["train DATA", "judge FILE"])


def test_probe_of_latents_that_it_cannot_look_at(runs, latents, tmp_path):
    run, out = runs / "stage1", ["--device", "cpu", "--out", tmp_path / "p"]
    for name, other in {
        "classes": {"classes": 9},
        "side": {"shape": (4, 8, 8)},
        "one": {"num": 1},
    }.items():
        data = write_folder(tmp_path / name, **other)
        says = [str(data), "(8, 4, 16, 16)"]
        refused(probe, run, "--data", data, *out, says=says, out=out[-1])
    refused(probe, run, "--data", tmp_path / "none", *out, says=["none"], out=out[-1])
    refused(probe, tmp_path / "none", *out, says=["none"])
    for flags in ("--scales 3,x", "--scales nan", "--depth 9", "--depth 0", "--num 1", "--t 1"):
        refused(probe, run, *flags.split(), *out, says=flags.split(), out=out[-1])
    lost = torch.load(next(run.glob("*.pt")), weights_only=True)
    lost["args"].pop("data")
    torch.save(lost, tmp_path / "lost.pt")
    refused(probe, tmp_path / "lost.pt", *out, says=["lost.pt", "--data"], out=out[-1])


def test_probe_of_two_images(runs, latents, tmp_path, capsys):
    call(probe, runs / "stage1", "--num", 2, "--out", tmp_path / "p", "--device", "cpu")
    assert "20 images of each" in capsys.readouterr().err
    assert Image.open(tmp_path / "p/features.png").size[0] == 4 * 112


def test_plots_of_logs(tmp_path):
    run, out = tmp_path / "run", tmp_path / "curves.png"
    refused(plot, run, "--out", out, says=["log.jsonl", "no such file"], out=out)
    run.mkdir()
    for text in ("", "{}\n", "[1]\n", '{"step": 1, "loss_diff": "much"}\n', "\xff\n"):
        (run / "log.jsonl").write_text(text)
        refused(plot, run, "--out", out, says=["log.jsonl", "--log-every"], out=out)
    lines = [{"step": step, "loss_diff": 1.0, "loss_guide": 0.0} for step in (1, 2)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    assert plot.read_log(run) == {"step": [1, 2], "loss_diff": [1, 1], "loss_guide": [0, 0]}
    call(plot, run, "--out", out)
    assert Image.open(out).size == (1000, 400)
    refused(plot, says=["runs"])


# ---- report.py


def write_judged(runs, row, seed, step, distance, share):
    path = runs / f"{row}-seed{seed}/samples-{step}/judged.json"
    path.parent.mkdir(parents=True)
    figures = {"FD-CNN": distance, "agreement": share, "precision": 0.9, "recall": 0.2}
    path.write_text(json.dumps(figures))
    return path


def test_worth_in_vanilla_steps():
    falls = [(3000, 20.0), (4500, 19.0), (6000, 18.5)]
    assert report.worth(falls, 19.5, "FD-CNN") == "3,750"
    assert report.worth(falls, 18.75, "FD-CNN") == "5,250"
    assert report.worth(falls, 18.5, "FD-CNN") == "6,000"
    assert report.worth(falls, 18.4, "FD-CNN") == "more than 6,000"
    assert report.worth(falls, 20.1, "FD-CNN") == "at most 3,000"
    rises = [(step, -value) for step, value in falls]
    assert report.worth(rises, -19.5, "agreement") == "3,750"
    assert report.worth(rises, -18.4, "agreement") == "more than 6,000"
    level = [(3000, 0.3), (6000, 0.3)]
    assert report.worth(level, 0.4, "agreement") == "more than 6,000"
    uneven = [(3000, 20.0), (4500, 19.0), (6000, 19.2), (7500, 18.0)]
    assert report.worth(uneven, 19.1, "FD-CNN") == "4,350"  # where it is reached first


def test_the_larger_student_in_the_report(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    monkeypatch.setattr(report, "compute", lambda run, step, student: step + len(student))
    for seed in (1, 2, 3):
        for step, distance in ((3000, 20.0), (4500, 19.0), (6000, 18.0)):
            write_judged(runs, "W-vanilla", seed, step, distance + seed, 0.3)
        write_judged(runs, "W-descN", seed, 3000, 18.5 + seed, 0.4)
    write_judged(runs, "W-relN", 1, 3000, 12, 0.2)
    call(report, "--runs", runs, "--figure", tmp_path / "figure.png")
    lines = capsys.readouterr().out.splitlines()
    row = "1, 2, 3 | 3,000 | 3,007 | 20.50 ± 1.00 | 40.0 ± 0.0 | 0.900 ± 0.000 | 0.200 ± 0.000"
    assert f"| W-descN | {row} |" in lines
    assert lines.index(f"| W-descN | {row} |") > 2  # vanilla first
    for seed in (1, 2, 3):
        assert f"| W-descN | {seed} | 3,007 | 5,250 | more than 6,000 |" in lines
    assert "| W-relN | 1 | 3,007 | more than 6,000 | at most 3,000 |" in lines
    assert not any("W-vanilla" in line for line in lines[lines.index("") :])
    assert Image.open(tmp_path / "figure_larger.png").size == (840, 400)
    assert not (tmp_path / "figure.png").exists()  # no row of the small student


def test_the_bars_of_a_figure_reach_the_least_and_the_greatest():
    """Of a single point, too, which has no line."""
    seeds = {i: {"compute": 3000, "agreement": share} for i, share in enumerate((0.2, 0.5, 0.3))}
    axis = report.new_figure(4, 4).subplots()
    report.draw_row(axis, {3000: seeds}, "agreement", "a row", "tab:red")
    ((bar,),) = (part.get_segments() for part in axis.containers[0][2])
    assert bar == pytest.approx(np.array([[3.0, 20.0], [3.0, 50.0]]))


def test_a_report_of_bad_files(tmp_path, runs):
    flags = ["--runs", tmp_path / "r", "--figure", tmp_path / "f.png"]
    refused(report, *flags, says=["cifar10.sh"], out=flags[-1])
    judged = write_judged(tmp_path / "r", "vanilla", 1, 3, 20, 0.3)
    refused(report, *flags, says=["vanilla-seed1", "ckpt"], out=flags[-1])  # no checkpoint
    for text in ("", "[]", '{"FD-CNN": 3}', '{"FD-CNN": "x", "agreement": 1}'):
        judged.write_text(text)
        refused(report, *flags, says=["judged.json", "judge.py judge"], out=flags[-1])


@pytest.mark.parametrize("stage", ["repa", "sra", "internal"])
def test_every_baselines_cost_is_found(stage):
    assert report.find_baseline(stage).name == stage
    with pytest.raises(UserError, match="unheard"):
        report.find_baseline("unheard")


# ---- The shell scripts

FAKE = f"""#!{sys.executable} -IS
import os, pathlib, signal, sys, time
words = " ".join(sys.argv[1:])
with open(os.environ["CALLS"], "a") as file:
    file.write(words + "\\n")
if "--out" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
def save(*_):
    with open(os.environ["CALLS"], "a") as file:
        file.write("saved\\n")
    sys.exit(143)
if os.environ.get("FAILS", "methods.sra") in words:
    while "ENDLESS" in os.environ and "starts" not in open(os.environ["ENDLESS"]).read():
        time.sleep(0.02)
    sys.exit(1)
if "ENDLESS" in os.environ and "train_stage1" in words:
    signal.signal(signal.SIGTERM, save)
    print("starts", flush=True)
    signal.pause()
"""


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project's, and what runs a shell script there."""
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    started = []

    def run(name, fake=False, **env):
        folder = Path(sys.executable).parent
        if fake:
            folder = tmp_path / "bin"
            folder.mkdir(exist_ok=True)
            (folder / "python").write_text(FAKE)
            (folder / "python").chmod(0o755)
        env = {"CALLS": str(tmp_path / "calls"), "MARK": str(tmp_path), **env}
        env["PATH"] = f"{folder}:{os.environ['PATH']}"
        command = ["bash", tmp_path / "experiments" / name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **env}, **pipes))
        return started[-1]

    run.folder = tmp_path
    yield run
    for pid in living(tmp_path):
        os.kill(pid, signal.SIGKILL)


def living(mark) -> list[int]:
    """The processes that were started with MARK=mark."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}".encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:  # it has ended, or is not ours
            pass
    return found


def wait_for(sign, process):
    """Return when `sign()` is true, or fail when the process ends before."""
    while not sign():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


RUNS = ("stage1", "stage2", "vanilla")  # of each seed of compare.sh
SECOND = "out/compare/second.log"  # what the second core's training says


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_comparison_alone_is_ended_and_its_trainings_save(number, project):
    """Both trainings, of which one is behind a second shell, hear SIGTERM, whatever ended it."""
    process = project("demo/compare.sh", fake=True, ENDLESS=SECOND)
    assert any("starts" in line for line in process.stdout)
    log = project.folder / SECOND
    wait_for(lambda: "starts" in log.read_text(), process)
    assert len(living(project.folder)) == 4
    os.kill(process.pid, number)
    assert process.wait(600) == 128 + (15 if number == signal.SIGHUP else number)
    assert living(project.folder) == []
    assert (project.folder / "calls").read_text().splitlines().count("saved") == 2


@pytest.mark.slow
def test_a_comparison_that_fails_ends_the_other_training(project):
    """Seed 0's stage 1 fails while seed 2's trains."""
    process = project("demo/compare.sh", fake=True, ENDLESS=SECOND, FAILS="compare/seed0/stage1")
    assert process.wait(600) == 1
    assert living(project.folder) == []
    calls = (project.folder / "calls").read_text()
    assert "saved" in calls and "build_teacher" not in calls


@pytest.mark.slow
def test_the_demo_alone_is_ended_and_its_training_saves(project):
    process = project("demo/demo.sh", fake=True, ENDLESS="1")
    assert any("starts" in line for line in process.stdout)
    process.terminate()
    assert process.wait(600) == 128 + signal.SIGTERM
    assert living(project.folder) == []
    assert (project.folder / "calls").read_text().splitlines().count("saved") == 1


@pytest.mark.slow
def test_the_demos_commands_and_the_comparisons(project):
    """Each run is trained once, and takes what the command before it has made."""
    assert project("demo/demo.sh", fake=True).wait(600) == 0
    assert project("demo/compare.sh", fake=True).wait(600) == 0
    calls = (project.folder / "calls").read_text().splitlines()
    trained = [call for call in calls if "train_stage" in call]
    outs = [re.search(r"--out (\S+)", words)[1] for words in trained]
    kinds = [f"out/compare/seed{seed}/{run}" for seed in (0, 2, 4, 6) for run in RUNS]
    assert sorted(outs) == sorted(["out/demo/stage1", "out/demo/stage2", *kinds])
    for words in trained:
        if "train_stage2" in words:
            teacher = re.search(r"--teacher (\S+)/teacher.pt", words)[1]
            (built,) = [c for c in calls if "build_teacher" in c and f"--out {teacher}" in c]
            assert re.search(r"--ckpt (\S+)", built)[1] in outs
            steps = re.search(r" --steps (\d+)", words)[1]
            assert f"--guide-steps {steps} " in words  # guidance to the end
    for seed in (0, 2, 4, 6):
        seeds = [re.search(r"--seed (\d+)", c)[1] for c in trained if f"seed{seed}/" in c]
        assert sorted(seeds) == sorted(map(str, (seed, seed + 1, seed + 1)))
    assert sum("sample.py" in words for words in calls) == 4 + 4 * 3 * 2
    assert "experiments.demo.page" in "".join(calls) and "demo.compare" in calls[-1]


@pytest.mark.slow
def test_the_experiments_rows(project):
    """Each row's commands run; one that fails does not stop the others, and is told."""
    process = project(
        "cifar10/cifar10.sh", fake=True, JOBS="3", ONLY="^(W-.*|N|P|sra)-seed|features"
    )
    said = process.stdout.read()
    assert process.wait(600) == 1
    calls = (project.folder / "calls").read_text().splitlines()
    trained = [call for call in calls if "train_stage" in call]
    larger = [call for call in trained if "SiT-W/2" in call]
    assert len(larger) == 3 + 3 + 2 and all("--lr 1e-3" in call for call in larger)
    vanilla = [call for call in larger if "--align-weight 0" in call]
    assert [re.search(r"--steps (\d+)", call)[1] for call in vanilla] == 3 * ["6000"]
    for seed, other in ((1, 2), (2, 3), (3, 1)):
        (call,) = [call for call in larger if f"W-descN-seed{seed}" in call]
        assert f"N-seed{other}/teacher-6000/teacher.pt" in call and "--steps 3000" in call
        for step in (3000, 4500, 6000):
            assert any(f"W-vanilla-seed{seed}/samples-{step}" in call for call in calls)
    assert any("P-seed3/teacher-6000" in c and "W-descP-seed2" in c for c in larger)
    assert any("--guide-weight 0.15" in c and "W-relN-seed2" in c for c in larger)
    assert said.count("failed: see") == 3  # the rows of SRA
    assert "experiments.cifar10.report" in calls[-1]
    words = {tuple(call.split()[:2]) for call in calls}
    scripts = {second if first == "-m" else first for first, second in words}
    files = [
        f"{name.replace('.', '/')}.py" if "/" not in name and name.startswith("exp") else name
        for name in scripts
    ]
    assert all((ROOT / name).is_file() for name in files), scripts


@pytest.mark.slow
def test_rows_are_taken_up_where_they_are(project):
    only = {"ONLY": "^N-seed2", "JOBS": "1"}
    assert project("cifar10/cifar10.sh", fake=True, **only).wait(600) == 0
    run = project.folder / "out/cifar10/N-seed2"
    (run / "ckpt-0006000.pt").touch()
    for step in (3000, 6000):
        (run / f"teacher-{step}/teacher.pt").touch()
    (project.folder / "calls").unlink()
    assert project("cifar10/cifar10.sh", fake=True, **only).wait(600) == 0
    assert "train_stage1" not in (project.folder / "calls").read_text()


@pytest.mark.slow
def test_the_experiment_alone_is_ended_and_its_trainings_save(project):
    calls = project.folder / "calls"
    process = project("cifar10/cifar10.sh", fake=True, JOBS="2", ENDLESS="1")
    logs = project.folder / "out/cifar10"
    wait_for(lambda: sum("starts" in f.read_text() for f in logs.glob("*.log")) == 2, process)
    process.terminate()
    assert process.wait(600) == 128 + signal.SIGTERM
    assert living(project.folder) == []
    assert calls.read_text().splitlines().count("saved") == 2
