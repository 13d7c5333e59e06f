"""Bad input: exit status 2, one line on stderr that names the file or flag, no traceback, and nothing that existed is changed."""
import json
import os
import pickle
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TRAIN, script, write_folder

TRIED = []


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """refused(script, args..., says=[...]): run the script within this process, as __main__, and look at what it says."""
    def call(name, *args, says, keeps=tmp_path):
        before = {f: (f.read_bytes() if f.is_file() else None) for f in sorted(keeps.rglob("*")) if not f.is_symlink()}
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        err = capsys.readouterr().err
        assert stop.value.code == 2, err
        assert err.count("\n") == 1 and "Traceback" not in err, err
        for word in says:
            assert str(word) in err, err
        after = {f: (f.read_bytes() if f.is_file() else None) for f in before}
        assert before == after
        TRIED.append(err)
        return err
    return call


@pytest.fixture
def train(tmp_path):
    return [*TRAIN, "--data", write_folder(tmp_path / "data"), "--out", tmp_path / "out", "--steps", 4]


# ---- latent folders

def test_no_latents(refused, tmp_path):
    for name in ("train_stage1.py", "train_stage2.py"):
        refused(name, "--data", tmp_path / "nowhere", "--device", "cpu", says=["nowhere", "vae_latents.py --dataset shapes"])


def damage(folder, what):
    meta = json.loads((folder / "meta.json").read_text())
    if what == "half-encoded":
        os.rename(folder / "meta.json", folder / "plan.json")
    elif what == "version":
        (folder / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    elif what == "truncated":
        data = (folder / "moments.npy").read_bytes()
        (folder / "moments.npy").write_bytes(data[:len(data) // 2])
    elif what == "no moments":
        (folder / "moments.npy").unlink()
    elif what == "not json":
        (folder / "meta.json").write_text("{")
    elif what == "short labels":
        np.save(folder / "labels.npy", np.load(folder / "labels.npy")[:-3])
    elif what == "foreign labels":
        np.save(folder / "labels.npy", np.load(folder / "labels.npy") + 1)
    elif what == "other shape":
        (folder / "meta.json").write_text(json.dumps({**meta, "height": 8}))
    else:
        moments = np.load(folder / "moments.npy")
        moments[7, 0, 0, 0] = {"nan": np.nan, "infinity": np.inf}[what]
        np.save(folder / "moments.npy", moments)


@pytest.mark.parametrize("what,says", [
    ("half-encoded", "cut off"), ("version", "format 99"), ("truncated", "damaged"), ("no moments", "moments.npy"), ("not json", "damaged"),
    ("short labels", "45 labels for 48 images"), ("foreign labels", "10 classes"), ("other shape", "moments.npy"), ("nan", "image 7"), ("infinity", "image 7")])
def test_damaged_latents(refused, train, tmp_path, what, says):
    damage(tmp_path / "data", what)
    refused("train_stage1.py", *train, says=[tmp_path / "data", says])


# ---- image folders

@pytest.mark.parametrize("kind,says", [("none", "no such folder"), ("flat", "holds no folders"), ("empty class", "holds no images"), ("loop", "link back")])
def test_bad_image_folders(refused, tmp_path, kind, says):
    images = tmp_path / "images"
    if kind != "none":
        images.mkdir()
        Image.new("RGB", (32, 32)).save(images / "a.png")
    if kind in ("empty class", "loop"):
        (images / "cat").mkdir()
        (images / "cat/notes.txt").write_text("no image")
    if kind == "loop":
        Image.new("RGB", (32, 32)).save(images / "cat/a.png")
        (images / "cat/again").symlink_to(images / "cat", target_is_directory=True)
    refused("vae_latents.py", "--dataset", "folder", "--images", images, "--image-size", 32, "--out", tmp_path / "o", "--device", "cpu", says=["images", says])
    assert not (tmp_path / "o").exists()


def test_unwritable_or_bad_vae(refused, tmp_path):
    flags = ["--dataset", "shapes", "--num", 8, "--device", "cpu"]
    (tmp_path / "file").write_text("in the way")
    refused("vae_latents.py", *flags, "--vae-steps", 1, "--out", tmp_path / "file" / "o", says=["could not be written"])
    refused("vae_latents.py", *flags, "--vae", tmp_path / "none.bin", "--out", tmp_path / "o", says=["none.bin", "no such file"])
    (tmp_path / "text.bin").write_text("hello")
    refused("vae_latents.py", *flags, "--vae", tmp_path / "text.bin", "--out", tmp_path / "o", says=["text.bin", "cannot be read"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    refused("vae_latents.py", *flags, "--vae", tmp_path / "other.pt", "--out", tmp_path / "o", says=["other.pt", "not a KL autoencoder"])
    refused("vae_latents.py", *flags, "--image-size", 30, "--out", tmp_path / "o", says=["--image-size"])


# ---- flags of training

@pytest.mark.parametrize("flags,says", [
    (["--batch-size", "9", "--accum", "2"], "--batch-size 9"), (["--batch-size", "0"], "--batch-size 0"), (["--align-depth", "9"], "--align-depth 9"),
    (["--align-depth", "0"], "--align-depth 0"), (["--t-min", "0.7", "--t-max", "0.4"], "--t-min 0.7"), (["--t-min", "0.5", "--t-max", "0.5"], "t-min < t-max"),
    (["--model", "SiT-H/2"], "SiT-XL/2"), (["--model", "banana"], "banana"), (["--lr", "-1"], "--lr"), (["--ema", "1"], "--ema"),
    (["--label-drop", "1"], "--label-drop"), (["--align-weight", "-1"], "--align-weight"),
    (["--seed", "-1"], "--seed"), (["--steps", "many"], "--steps"), (["--setps", "4"], "--setps"), (["--device", "tpu9"], "tpu9"), (["--device", "cuda"], "CUDA")])
def test_bad_training_flags(refused, train, flags, says):
    if flags[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused("train_stage1.py", *train, *flags, says=[says])


def test_out_that_cannot_be(refused, train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused("train_stage1.py", *train, "--out", tmp_path / "file", says=[tmp_path / "file"])
    refused("train_stage1.py", *train, "--out", tmp_path / "file" / "deeper", says=[tmp_path / "file"])
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 32, 32, 3), np.uint8))
    refused("fid.py", tmp_path / "a.npz", "--weights", "random", "--device", "cpu", "--save-stats", tmp_path / "file" / "s", says=["file/s"])


def test_batch_not_divisible_by_processes(train):
    result = script("train_stage1.py", *train, "--batch-size", 9, processes=2)
    assert "--batch-size 9: not divisible by 2 processes" in result.stderr and result.stderr.count("error: --batch-size") == 1


def test_patch_that_does_not_tile(refused, tmp_path):
    data = write_folder(tmp_path / "d", shape=(4, 4, 4))
    refused("train_stage1.py", *TRAIN, "--data", data, "--out", tmp_path / "o", says=["SiT-Ti/8", "do not tile"])


# ---- checkpoints

@pytest.fixture
def run_copy(runs, latents, tmp_path):
    shutil.copytree(runs / "stage1", tmp_path / "stage1")
    return [*TRAIN, "--data", latents, "--out", tmp_path / "stage1"]


def test_continuing_with_other_arguments(refused, run_copy, tmp_path, runs):
    err = refused("train_stage1.py", *run_copy, "--steps", 12, "--lr", 0.5, "--align-weight", 0.25, says=["--lr 0.001 -> 0.5", "--align-weight 0.5 -> 0.25"])
    assert "--steps" not in err
    refused("train_stage1.py", *run_copy, "--steps", 6, says=["--steps 6", "step 8 already"])
    refused("train_stage1.py", *run_copy, "--steps", 12, "--data", write_folder(tmp_path / "other"), says=["--data (other latents)"])
    refused("train_stage2.py", *run_copy, "--steps", 12, "--seed", 0, "--teacher", runs / "teacher/teacher.pt", says=["--stage align -> guide"])


@pytest.mark.parametrize("kind,says", [("cut", "cannot be read"), ("version", "format 99"), ("directory", "is a directory"), ("text", "cannot be read")])
def test_bad_checkpoints(refused, run_copy, tmp_path, kind, says):
    path = tmp_path / "stage1/ckpt.pt"
    data = path.read_bytes()
    path.unlink()
    if kind == "cut":
        path.write_bytes(data[:len(data) // 2])
    elif kind == "version":
        (tmp_path / "x.pt").write_bytes(data)
        torch.save({**torch.load(tmp_path / "x.pt", weights_only=True), "format": 99}, path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("I am a checkpoint, really")
    refused("train_stage1.py", *run_copy, "--steps", 12, says=[path, says])
    if kind != "version":
        refused("sample.py", "--ckpt", path, "--out", tmp_path / "o", says=[path, says])
        refused("build_teacher.py", "--ckpt", path, "--out", tmp_path / "o", says=[path, says])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["sample.py", "build_teacher.py"])
def test_a_malicious_pickle_does_not_run(refused, tmp_path, name):
    torch.save({"ema": Evil(tmp_path / "pwned")}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"ema": Evil(tmp_path / "pwned")}, protocol=2))
    for file in ("evil.pt", "raw.pt"):
        refused(name, "--ckpt", tmp_path / file, "--out", tmp_path / "o", says=[file])
    refused("fid.py", tmp_path / "a.npz", "--weights", tmp_path / "evil.pt", says=["evil.pt"])
    assert not (tmp_path / "pwned").exists()


# ---- teachers

def test_teachers_that_do_not_fit(refused, runs, latents, tmp_path):
    flags = ["--out", tmp_path / "o", "--steps", 4]
    fits = [*TRAIN, "--data", latents, "--teacher", runs / "teacher/teacher.pt", *flags]
    refused("train_stage2.py", *fits, "--model", "SiT-S/8", says=["width is 128", "384"])
    refused("train_stage2.py", *fits, "--model", "SiT-Ti/4", says=["patch is 8"])
    refused("train_stage2.py", *fits, "--guide-depth", 5, says=["--guide-depth 5", "block 5"])
    refused("train_stage2.py", *fits, "--guide-depth", 99, says=["--guide-depth 99"])
    refused("train_stage2.py", *fits, "--guide-scale", 0.5, says=["--guide-scale 0.5"])
    refused("train_stage2.py", *fits, "--guide-weight", 0, says=["--guide-weight"])
    refused("train_stage2.py", *fits, "--data", write_folder(tmp_path / "d5", classes=5), says=["classes is 10", "5"])
    refused("train_stage2.py", *fits, "--data", write_folder(tmp_path / "d8", shape=(4, 8, 8)), says=["latent side is 16", "8"])
    refused("train_stage2.py", *fits, "--teacher", tmp_path / "none.pt", says=["none.pt", "build_teacher.py"])
    refused("train_stage2.py", *fits, "--teacher", runs / "stage1/ckpt.pt", says=["ckpt.pt", "not a teacher"])


def test_building_a_teacher(refused, runs, tmp_path, capsys, monkeypatch, latents):
    ckpt = ["--ckpt", runs / "stage1/ckpt.pt", "--out", tmp_path / "o", "--device", "cpu"]
    refused("build_teacher.py", *ckpt, "--teacher-depth", 9, says=["--teacher-depth 9", "blocks 1 to 8"])
    refused("build_teacher.py", *ckpt, "--guide-scale", 0.9, says=["--guide-scale 0.9"])
    refused("build_teacher.py", *ckpt, "--probe-scales", "a,b", says=["--probe-scales"])
    refused("build_teacher.py", "--ckpt", tmp_path / "none.pt", says=["none.pt", "train_stage1.py"])
    # from a vanilla run: allowed, with a warning
    vanilla = torch.load(runs / "stage1/ckpt.pt", weights_only=True)
    vanilla["args"]["align_weight"] = 0.0
    torch.save(vanilla, tmp_path / "vanilla.pt")
    monkeypatch.setattr(sys, "argv", ["build_teacher.py", "--ckpt", str(tmp_path / "vanilla.pt"), "--out", str(tmp_path / "t"), "--probe-num", "0", "--device", "cpu"])
    runpy.run_path(str(ROOT / "build_teacher.py"), run_name="__main__")
    assert "vanilla" in capsys.readouterr().out and (tmp_path / "t/teacher.pt").exists()


# ---- sampling

@pytest.mark.parametrize("flags,says", [
    (["--cfg", "0.5"], "--cfg 0.5"), (["--num", "0"], "--num"), (["--steps", "0"], "--steps"), (["--classes", "3,cat"], "--classes 3,cat"),
    (["--classes", "10"], "labels run from 0 to 9"), (["--guidance-low", "0.8", "--guidance-high", "0.2"], "--guidance-low"),
    (["--model", "SiT-XL/2"], "not --model SiT-XL/2"), (["--mode", "magic"], "--mode"), (["--vae", "/nowhere.bin"], "/nowhere.bin")])
def test_bad_sampling_flags(refused, runs, tmp_path, flags, says):
    refused("sample.py", "--ckpt", runs / "stage2/ckpt.pt", "--out", tmp_path / "o", "--device", "cpu", *flags, says=[says])
    assert not (tmp_path / "o").exists()


# ---- fid

def test_bad_fid_input(refused, tmp_path):
    rng = np.random.default_rng(0)
    for name, side in (("a", 32), ("b", 48)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 256, (4, side, side, 3), dtype=np.uint8))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 32, 32, 3)))
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    for kind in ("sizes", "broken"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / kind / "1.png")
    Image.new("RGB", (40, 32)).save(tmp_path / "sizes/2.png")
    (tmp_path / "broken/2.png").write_bytes(b"no image")
    random = ["--weights", "random", "--device", "cpu"]
    refused("fid.py", tmp_path / "none.npz", *random, says=["none.npz", "no such file"])
    refused("fid.py", tmp_path / "other.npz", *random, says=["other.npz", "neither arr_0 nor mu"])
    refused("fid.py", tmp_path / "floats.npz", *random, says=["floats.npz", "uint8"])
    refused("fid.py", tmp_path / "cut.npz", *random, says=["cut.npz"])
    refused("fid.py", tmp_path / "empty", *random, says=["empty", "without images"])
    refused("fid.py", tmp_path / "sizes", *random, says=["2.png", "40 x 32", "--image-size"])
    refused("fid.py", tmp_path / "broken", *random, says=["2.png", "cannot be read"])
    refused("fid.py", tmp_path / "a.npz", "--weights", tmp_path / "other.npz", says=["--weights", "other.npz"])
    refused("fid.py", "x", "--magic", says=["--magic"])


def test_fid_images_of_two_sizes_and_too_few(tmp_path):
    """By the command line, once: the sizes are refused, and the same size is compared with a warning on what few samples mean."""
    rng = np.random.default_rng(0)
    for name, side in (("a", 32), ("b", 48), ("c", 32)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8))
    result = script("fid.py", tmp_path / "a.npz", tmp_path / "b.npz", "--weights", "random", "--device", "cpu")
    assert result.returncode == 2 and "32 x 32" in result.stderr and "48 x 48" in result.stderr and "Traceback" not in result.stderr
    result = script("fid.py", tmp_path / "a.npz", tmp_path / "c.npz", "--weights", "random", "--device", "cpu")
    assert result.returncode == 0 and "fewer than the 2048 features" in result.stderr and "biased" in result.stderr
    assert {"FD-random", "sFD-random"} <= json.loads(result.stdout.splitlines()[-1]).keys()


def test_count(capsys):
    with capsys.disabled():
        print(f"\n{len(TRIED)} bad inputs refused in one line")
    assert all(line.split(":")[1].strip() == "error" for line in TRIED)
