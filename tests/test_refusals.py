"""Bad input: status 2, one line on stderr that names the file or flag, nothing changed."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import TRAIN, call, script, write_folder
from PIL import Image

import common
import train_stage1
import vae_latents
from common import UserError


@pytest.fixture
def train(tmp_path):
    out = ["--out", tmp_path / "out", "--steps", 4]
    return [*TRAIN, "--data", write_folder(tmp_path / "data"), *out]


# ---- latent folders


@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py"])
def test_no_latents(refused, tmp_path, name):
    flags = ["--data", tmp_path / "nowhere", "--out", tmp_path / "o", "--device", "cpu"]
    refused(name, *flags, says=["nowhere", "vae_latents.py"])
    assert not (tmp_path / "o").exists()


def damage(folder, what):
    meta = json.loads((folder / "meta.json").read_text())
    labels, moments = np.load(folder / "labels.npy"), np.load(folder / "moments.npy")
    changed_labels = {
        "short labels": labels[:-3],
        "foreign labels": labels + 1,
        "negative labels": labels - 1,
        "labels in two columns": np.stack([labels, labels], axis=1),
        "labels of floats": labels.astype(float),
    }
    if what == "half-encoded":
        os.rename(folder / "meta.json", folder / "done-0.part.npy")
    elif what == "truncated":
        data = (folder / "moments.npy").read_bytes()
        (folder / "moments.npy").write_bytes(data[: len(data) // 2])
    elif what == "no moments":
        (folder / "moments.npy").unlink()
    elif what == "moments of float32":
        np.save(folder / "moments.npy", moments.astype(np.float32))
    elif what == "not json":
        (folder / "meta.json").write_text("{")
    elif what in changed_labels:
        np.save(folder / "labels.npy", changed_labels[what])
    else:
        changed = {"version": {"format": 99}, "other shape": {"height": 8}, "no scale": {}}
        changed.update({"scale of nan": {"scale": float("nan")}, "scale of 0": {"scale": 0}})
        meta.pop("scale" if what == "no scale" else "", None)
        (folder / "meta.json").write_text(json.dumps({**meta, **changed[what]}))


DAMAGES = {
    "half-encoded": "is no complete latent folder",
    "version": "format 99",
    "truncated": "make it anew",
    "no moments": "moments.npy",
    "moments of float32": "float32",
    "not json": "make it anew",
    "short labels": "45",
    "foreign labels": "labels 1 to 10",
    "negative labels": "labels -1 to 8",
    "labels in two columns": "labels",
    "labels of floats": "float64",
    "other shape": "moments.npy",
    "no scale": "scale",
    "scale of nan": "nan",
    "scale of 0": "scale",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_latents(refused, train, tmp_path, what):
    damage(tmp_path / "data", what)
    refused("train_stage1.py", *train, says=[tmp_path / "data", DAMAGES[what]])
    assert not (tmp_path / "out").exists()


# ---- image folders and VAEs


@pytest.fixture
def vae(tmp_path):

    state = vae_latents.AutoencoderKL((8, 8), layers=1).state_dict()
    torch.save({"model": state, "scale": 1.0}, tmp_path / "vae.pt")
    return ["--vae", tmp_path / "vae.pt", "--image-size", 32, "--device", "cpu"]


KINDS = {"none": "nowhere", "flat": "needs a folder for each class", "empty class": "cat"}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_image_folders(refused, tmp_path, vae, kind):
    images = tmp_path / ("nowhere" if kind == "none" else "images")
    if kind != "none":
        images.mkdir()
        Image.new("RGB", (32, 32)).save(images / "a.png")
    if kind == "empty class":
        (images / "cat").mkdir()
        (images / "cat/notes.txt").write_text("no image")
    out = tmp_path / "o"
    refused("vae_latents.py", "--images", images, *vae, "--out", out, says=[images, KINDS[kind]])
    assert not out.exists()


def test_unwritable_or_bad_vae(refused, tmp_path, vae):
    (tmp_path / "images/cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images/cat/a.png")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "text.bin").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    flags = ["vae_latents.py", "--images", tmp_path / "images", *vae]
    refused(*flags, "--out", tmp_path / "file" / "o", says=["file/o"])
    texts = {"none.bin": "No such file", "text.bin": "hello", "other.pt": "scale"}
    for name, says in texts.items():
        refused(*flags, "--vae", tmp_path / name, "--out", tmp_path / "o", says=[name, says])
    refused(*flags, "--vae", tmp_path, "--out", tmp_path / "o", says=["convert_vae"])
    whole = torch.load(tmp_path / "vae.pt", weights_only=True)
    for scale in (0, -1.0, float("nan"), float("inf"), "large", None, [1.0]):
        torch.save({**whole, "scale": scale}, tmp_path / "scale.pt")
        scaled = ["--vae", tmp_path / "scale.pt", "--out", tmp_path / "o"]
        refused(*flags, *scaled, says=["scale.pt", "scale"])
    torch.save({"model": {"a": torch.zeros(1)}, "scale": 1.0}, tmp_path / "no.pt")
    refused(*flags, "--vae", tmp_path / "no.pt", "--out", tmp_path / "o", says=["no.pt", "no VAE"])
    refused(*flags, "--image-size", 31, "--out", tmp_path / "o", says=["--image-size"])
    refused(*flags, "--batch-size", 0, "--out", tmp_path / "o", says=["--batch-size 0"])
    assert not (tmp_path / "o").exists()


# ---- flags


BAD_FLAGS = {
    "--batch-size 9 --accum 2": "--batch-size 9",
    "--batch-size 0": "--batch-size 0",
    "--align-depth 9": "loss align, depth 9: use 1 to 8",
    "--align-depth 0": "--align-depth 0",
    "--t-min 0.7 --t-max 0.4": "--t-min 0.7",
    "--t-min 0.5 --t-max 0.5": "--t-max 0.5",
    "--model SiT-H/2": "XL",
    "--model banana": "banana",
    "--lr -1": "--lr -1.0",
    "--lr nan": "--lr nan: must be a finite number",
    "--model=": "--model: must be a word",
    "--lr inf": "--lr inf",
    "--t-min nan": "--t-min nan: must be a finite number",
    "--ema nan": "--ema nan",
    "--label-drop nan": "--label-drop nan",
    "--keep 0": "--keep 0",
    "--accum 0": "--accum 0",
    "--warmup -1": "--warmup -1",
    "--save-every 0": "--save-every 0",
    "--clip nan": "--clip nan: must be a finite number",
    "--ema 1": "--ema 1.0",
    "--label-drop 1": "--label-drop",
    "--align-weight -1": "--align-weight",
    "--align-weight nan": "--align-weight nan",
    "--seed -1": "--seed",
    f"--seed {2**64}": "--seed",
    "--steps many": "--steps",
    "--setps 4": "--setps",
    "--device tpu9": "must be one of cpu",
    "--device mps": "must be one of cpu",
    "--device cuda:99": "cuda:99",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_training_flags(refused, train, tmp_path, flags):
    refused("train_stage1.py", *train, *flags.split(), says=[BAD_FLAGS[flags]])
    assert not (tmp_path / "out").exists()


def test_the_first_line_names_the_device(train, capsys):
    call(train_stage1, *train)
    assert "SiT-Ti/8 on cpu: steps 0 to 4" in capsys.readouterr().out


def test_rank_alone_is_not_torchrun(train, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    call(train_stage1, *train)
    assert (tmp_path / "out/ckpt-0000004.pt").exists()


def test_out_that_cannot_be(refused, train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused("train_stage1.py", *train, "--out", tmp_path / "file", says=[tmp_path / "file"])
    deeper = tmp_path / "file" / "deeper"
    refused("train_stage1.py", *train, "--out", deeper, says=[tmp_path / "file"])


@pytest.mark.slow
def test_processes_of_different_settings(train):
    """Batches that do not divide, and one process started with another rate: said once, by one."""
    result = script("train_stage1.py", *train, "--batch-size", 9, processes=2)
    assert "--batch-size 9: is not divisible by 2" in result.stderr
    assert result.stderr.count("error: --batch-size") == 1


def test_processes_must_agree(train, monkeypatch):
    monkeypatch.setattr(common, "gather", lambda item=None: [item, f"{item} of --lr 1"])
    with pytest.raises(UserError, match="different settings"):
        call(train_stage1, *train)


def test_patch_that_does_not_tile(refused, tmp_path):
    data = write_folder(tmp_path / "d", shape=(4, 4, 4))
    flags = [*TRAIN, "--data", data, "--out", tmp_path / "o"]
    refused("train_stage1.py", *flags, says=["SiT-Ti/8", "patch", "4"])


# ---- checkpoints


@pytest.fixture
def run_copy(runs, latents, tmp_path):
    shutil.copytree(runs / "stage1", tmp_path / "stage1")
    return [*TRAIN, "--data", latents, "--out", tmp_path / "stage1"]


def test_continuing_with_other_arguments(refused, run_copy, tmp_path, runs):
    flags = ["train_stage1.py", *run_copy, "--steps", 12]
    err = refused(*flags, "--ema", 0.5, "--batch-size", 16, says=["--ema 0.9999 -> 0.5"])
    assert "--batch-size 8 -> 16" in err and "--steps" not in err
    refused(*flags[:-1], 6, says=["--steps", "step 8"])
    refused(*flags, "--data", write_folder(tmp_path / "d"), says=["--data (other latents)"])
    stage2 = ["train_stage2.py", *flags[1:], "--seed", 0]
    refused(*stage2, "--teacher", runs / "teacher/teacher.pt", says=["--stage align -> guide"])


def test_a_loss_that_ended_does_not_come_back(refused, run_copy):
    """Its projector is gone with it."""
    call(train_stage1, *run_copy, "--steps", 10, "--align-weight", 0)
    flags = ["train_stage1.py", *run_copy, "--steps", 12, "--align-weight", 0.5]
    refused(*flags, says=["--align-weight 0.0 -> 0.5"])


def test_a_rate_may_be_changed_and_that_is_said(run_copy, tmp_path, capsys):
    flags = ["--steps", 12, "--lr", 0.5, "--clip", 2, "--align-weight", 0.25]
    call(train_stage1, *run_copy, *flags)
    out = capsys.readouterr().out
    for change in ("--lr 0.001 -> 0.5", "--clip 1.0 -> 2.0", "--align-weight 0.5 -> 0.25"):
        assert f"continued with {change}" in out
    records = [json.loads(line) for line in (tmp_path / "stage1/log.jsonl").open()]
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert [record["lr"] for record in records] == [1e-3] * 4 + [0.5] * 2


def flipped(data):
    """One bit of the middle, which lies in a tensor, the other way."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


CHECKPOINTS = {
    "cut": "b'PK",
    "bit": "checksum",
    "version 99": "version",
    "version 1": "its format is",
    "no step": "step",
    "no args": "args",
    "no optimizer": "opt",
    "text": "b'a checkpoint'",
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoints(refused, run_copy, tmp_path, kind):
    path = tmp_path / "stage1/ckpt-0000008.pt"
    data = path.read_bytes()
    if " " in kind:
        saved = torch.load(path, weights_only=True)
        missing = {"no step": "step", "no args": "args", "no optimizer": "opt"}
        saved.pop(missing.get(kind), None)
        if kind.startswith("version"):
            saved["format"] = int(kind.split()[1])
        torch.save(saved, path)
    else:
        texts = {"cut": data[: len(data) // 2], "bit": flipped(data), "text": b"a checkpoint"}
        path.write_bytes(texts[kind])
    refused("train_stage1.py", *run_copy, "--steps", 12, says=[path, CHECKPOINTS[kind]])
    if kind in ("cut", "bit", "text", "no args"):
        refused("sample.py", "--ckpt", path, "--out", tmp_path / "o", says=[path])
        refused("build_teacher.py", "--ckpt", path, "--out", tmp_path / "o", says=[path])
    assert not (tmp_path / "o").exists()


def test_a_step_that_is_not_finite_ends_the_run_and_nothing_of_it_is_kept(refused, tmp_path):
    """A rate of 1e38 in one step: the loss and the gradient are finite, the weights are not."""
    flags = [*TRAIN, "--data", write_folder(tmp_path / "d"), "--out", tmp_path / "o"]
    flags = ["train_stage1.py", *flags, "--steps", 4, "--lr", 1e38, "--save-every", 1]
    refused(*flags, "--log-every", 1, says=["not finite", "--lr"])
    for file in (tmp_path / "o").glob("*.pt"):
        saved = torch.load(file, weights_only=True)
        assert all(p.isfinite().all() for key in ("model", "ema") for p in saved[key].values())
    log = tmp_path / "o/log.jsonl"
    for line in log.open() if log.exists() else []:
        assert all(np.isfinite(value) for value in json.loads(line).values())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


READERS = {
    "sample.py": ["--ckpt"],
    "build_teacher.py": ["--ckpt"],
    "train_stage2.py": ["--teacher"],
    "vae_latents.py": ["--vae"],
    "fid.py": ["--weights"],
}


@pytest.mark.parametrize("name", READERS)
def test_a_malicious_pickle_does_not_run(refused, tmp_path, name):
    """What it holds is said by name, and never that it could be loaded all the same."""
    torch.save({"ema": Evil(tmp_path / "pwned")}, tmp_path / "evil.pt")
    raw = pickle.dumps({"ema": Evil(tmp_path / "pwned")}, protocol=2)
    (tmp_path / "raw.pt").write_bytes(raw)
    (tmp_path / "images/cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images/cat/a.png")
    others = {"vae_latents.py": ["--images", tmp_path / "images", "--image-size", 32]}
    others["train_stage2.py"] = [*TRAIN, "--data", write_folder(tmp_path / "data")]
    others["fid.py"] = [tmp_path / "images"]
    for file in ("evil.pt", "raw.pt"):
        given = [*READERS[name], tmp_path / file, *others.get(name, [])]
        given += [] if name == "fid.py" else ["--out", tmp_path / "o"]
        refused(name, *given, says=[file, "posix.system"])
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["labels.npy", "moments.npy"])
def test_a_malicious_array_does_not_run(refused, train, tmp_path, name):
    array = np.empty(1, dtype=object)
    array[0] = Evil(tmp_path / "pwned")
    np.save(tmp_path / "data" / name, array, allow_pickle=True)
    refused("train_stage1.py", *train, says=[tmp_path / "data"])
    (tmp_path / "data" / name).write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    refused("train_stage1.py", *train, says=[tmp_path / "data"])
    assert not (tmp_path / "pwned").exists()


# ---- probe.py


def test_probe_of_few_images(runs, tmp_path, capsys):
    from experiments.checkpoints import probe

    call(probe, runs / "stage1", "--num", 40, "--out", tmp_path / "p", "--device", "cpu")
    assert "20 images of each" in "".join(capsys.readouterr())
    table = json.loads((tmp_path / "p/probe.json").read_text())["blocks"]
    assert {"f_u", "f_c", "f_g 30"} <= table["5"].keys()
    assert Image.open(tmp_path / "p/features.png").size[0] == 4 * 112


# ---- fid


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of Inception weights: random ones; distances with it are not FID."""
    import fid

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "random.pt"
    torch.save(fid.InceptionV3().state_dict(), path)
    return ["--weights", path, "--device", "cpu"]


@pytest.mark.slow
def test_bad_fid_input(refused, tmp_path, weights):
    rng = np.random.default_rng(0)
    for name, side in (("a", 32), ("b", 48)):
        pixels = rng.integers(0, 256, (4, side, side, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 32, 32, 3)))
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    for kind in ("sizes", "broken"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / kind / "1.png")
    Image.new("RGB", (40, 32)).save(tmp_path / "sizes/2.png")
    (tmp_path / "broken/2.png").write_bytes(b"no image")

    def bad(*args, says):
        return refused("fid.py", *args, *weights, says=says)

    bad(tmp_path / "nowhere.npz", says=["nowhere.npz", "No such file"])
    bad(tmp_path / "other.npz", says=["other.npz", "fewer than two images"])
    bad(tmp_path / "none.npz", says=["none.npz", "fewer than two images"])
    bad(tmp_path / "floats.npz", says=["floats.npz", "uint8"])
    bad(tmp_path / "cut.npz", says=["cut.npz"])
    bad(tmp_path / "empty", says=["empty", "fewer than two images"])
    bad(tmp_path / "sizes", says=["sizes", "(32, 40, 3)", "--image-size"])
    bad(tmp_path / "broken", says=["2.png", "cannot be read"])
    bad(tmp_path / "a.npz", tmp_path / "b.npz", says=["32 x 32", "48 x 48"])
    bad(tmp_path / "a.npz", "--batch-size", 0, says=["--batch-size 0"])
    foo = [*weights[:2], "--device", "foo"]
    refused("fid.py", tmp_path / "a.npz", *foo, says=["--device foo", "must be one of cpu"])
    other = ["--weights", tmp_path / "other.npz"]
    refused("fid.py", tmp_path / "a.npz", *other, says=["other.npz"])
    refused("fid.py", "x", "--magic", says=["--magic"])
    missing = [tmp_path / "a.npz", tmp_path / "nowhere", *other]  # before the weights are read
    refused("fid.py", *missing, says=["nowhere", "No such file"])
    os.mkfifo(tmp_path / "pipe")
    bad(tmp_path / "pipe", says=["pipe", "Not a directory"])


def test_statistics_that_are_not_finite(refused, tmp_path, weights):
    stats = {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}
    np.savez(tmp_path / "stats.npz", **stats)
    pair = [tmp_path / "stats.npz", tmp_path / "stats.npz"]
    refused("fid.py", *pair, *weights, says=["stats.npz", "infs or NaNs"])


@pytest.mark.slow
def test_fid_of_few_images_is_a_number_with_a_warning(tmp_path, weights, capsys):
    """3 images on each side: constant columns, singular covariances, valid JSON."""
    import fid

    rng = np.random.default_rng(0)
    for name in "ac":
        pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
    call(fid, tmp_path / "a.npz", tmp_path / "c.npz", *weights)
    said = capsys.readouterr()
    assert "fewer images than features" in said.err and "biases FID" in said.err
    result = json.loads(said.out.splitlines()[-1])
    assert {"FID", "sFID"} <= result.keys() and 0 <= result["precision"] <= 1
    assert "NaN" not in said.out and "-0.0" not in said.out


@pytest.mark.slow
def test_a_distance_of_rounding_is_zero(tmp_path, weights, capsys, monkeypatch):
    import fid

    monkeypatch.setattr(fid, "frechet_distance", lambda *statistics: -1e-9)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    call(fid, tmp_path / "a.npz", tmp_path / "a.npz", *weights)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["FID"] == 0 and "-0.0" not in out and "e-" not in out
