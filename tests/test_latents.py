"""Images to latents: the sources, the crop, every kind of image file, encoding by several processes and after kills."""
import hashlib

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, ok, script
from vae_latents import SHAPES, AutoencoderKL, LatentFolder, Shapes, center_crop, find_vae, to_rgb, to_uint8


def digest(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_shapes_are_a_function_of_the_index():
    a, b = Shapes(100, 32), Shapes(5000, 32)
    assert all(np.array_equal(a.load(i), b.load(i)) for i in (0, 7, 99))
    assert a.labels[:12].tolist() == [*range(10), 0, 1] and a.names == list(SHAPES)
    assert len({a.load(i).tobytes() for i in range(100)}) == 100


def test_crop_is_adms():
    """The halvings, the bicubic resize and the cut, written out again with other calls."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 517, 3), dtype=np.uint8))
    halved = image.resize((258, 150), Image.BOX).resize((129, 75), Image.BOX)
    scaled = halved.resize((round(129 * 64 / 75), 64), Image.BICUBIC)
    left = (scaled.width - 64) // 2
    assert np.array_equal(center_crop(image, 32), np.asarray(Image.fromarray(np.asarray(
        halved.resize((64, 37), Image.BOX).resize((round(64 * 32 / 37), 32), Image.BICUBIC))))[:, (55 - 32) // 2:(55 - 32) // 2 + 32])
    assert center_crop(image, 64).shape == (64, 64, 3)
    assert np.array_equal(center_crop(image, 64), np.asarray(scaled)[:, left:left + 64])
    exact = np.asarray(image)[:32, :32]
    assert np.array_equal(center_crop(Image.fromarray(exact), 32), exact)


def test_every_mode_becomes_the_right_rgb():
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    want = np.stack([grey] * 3, axis=2)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(grey))), want)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(grey.astype(np.uint16) * 257))), want)  # 16 bits: scaled, not clipped
    palette = Image.fromarray(want).convert("P", palette=Image.ADAPTIVE, colors=64)
    assert np.abs(np.asarray(to_rgb(palette)).astype(int) - want).max() <= 8
    alpha = Image.fromarray(np.dstack([want, np.zeros_like(grey)]))  # wholly transparent: the white behind it
    assert (np.asarray(to_rgb(alpha)) == 255).all()
    half = Image.fromarray(np.dstack([np.zeros_like(want), np.full_like(grey, 128)]))
    assert abs(int(np.asarray(to_rgb(half))[0, 0, 0]) - 127) <= 1
    assert np.asarray(to_rgb(Image.fromarray(want).convert("CMYK"))).shape == (32, 32, 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of three classes, PNG and JPEG, sizes mixed, one nested, names awkward; and a VAE file."""
    root = tmp_path_factory.mktemp("pictures")
    source = Shapes(70, 32)
    for i in range(70):
        folder = root / "images" / f"class {i % 3}" / ("deep" if i == 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(source.load(i)).resize((32 + i % 5, 40))
        image.save(folder / (f"new\nline {i}.png" if i == 6 else f"{i}.{'png' if i % 2 else 'jpg'}"))
    (root / "images" / "class 1" / "notes.txt").write_text("not an image")
    torch.manual_seed(0)
    torch.save({"model": AutoencoderKL((8, 16), layers=1).state_dict(), "scale": 0.9}, root / "vae.pt")
    return root


def encode(pictures, out, *more, **kwargs):
    return script("vae_latents.py", "--dataset", "folder", "--images", pictures / "images", "--image-size", 32, "--vae", pictures / "vae.pt",
                  "--batch-size", 8, "--out", out, "--device", "cpu", *more, **kwargs)


@pytest.fixture(scope="module")
def encoded(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "a"
    assert encode(pictures, out).returncode == 0
    return out


def test_latent_folder_holds_what_it_promises(pictures, encoded):
    folder = LatentFolder(encoded)
    assert sorted(os.listdir(encoded)) == ["images.npy", "labels.npy", "meta.json", "moments.npy"]
    assert folder.meta["classes"] == ["class 0", "class 1", "class 2"] and folder.meta["num_images"] == 70
    assert folder.meta["scale"] == 0.9 and folder.meta["vae"]["sha256"] == hashlib.sha256((pictures / "vae.pt").read_bytes()).hexdigest()
    assert np.bincount(folder.labels).tolist() == [24, 23, 23]
    vae = find_vae(None, folder.meta, encoded)
    images = torch.from_numpy(folder.images([5, 40]).copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean, std = vae.encode(images)
    torch.testing.assert_close(torch.from_numpy(folder.moments[[5, 40]]).float(), torch.cat([mean, std], 1), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("processes", [1, 3])
def test_encoding_killed_and_repeated_is_byte_identical(pictures, encoded, processes, tmp_path):
    """kill -9 at random moments until it gets through; with 3 processes, the whole group is killed."""
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"] if processes == 3 else []),
               str(ROOT / "vae_latents.py"), "--dataset", "folder", "--images", str(pictures / "images"), "--image-size", "32", "--vae",
               str(pictures / "vae.pt"), "--batch-size", "8", "--out", str(tmp_path / "b"), "--device", "cpu"]
    rng, kills = random.Random(processes), 0
    for attempt in range(4):
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + rng.uniform(0.3, 0.8)  # from the first sign of work on
        while process.poll() is None and (not (tmp_path / "b").exists() or time.time() < deadline):
            time.sleep(0.01)
            if not (tmp_path / "b").exists():
                deadline = time.time() + rng.uniform(0.0, 0.5)
        if process.poll() is None:
            os.killpg(process.pid, 9)
            kills += 1
        process.wait()
        if not (tmp_path / "b/meta.json").exists():
            with pytest.raises(Exception, match="cut off|no latents"):
                LatentFolder(tmp_path / "b")
    result = encode(pictures, tmp_path / "b", processes=processes)
    assert result.returncode == 0, result.stderr
    assert kills and digest(tmp_path / "b") == digest(encoded)
    assert "nothing to do" in encode(pictures, tmp_path / "b").stdout


def test_unreadable_images_stop_the_run_or_are_left_out(pictures, encoded, tmp_path):
    """Truncated, empty, a zip renamed, a bomb, 1 x 5000: all are named and counted; --skip-bad leaves out just them."""
    import shutil
    import zipfile
    shutil.copytree(pictures / "images", tmp_path / "images")
    bad = tmp_path / "images" / "class 2"
    whole = (pictures / "images" / "class 2" / "2.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (bad / "empty.png").write_bytes(b"")
    with zipfile.ZipFile(bad / "zipped.jpg", "w") as z:
        z.writestr("a", "b")
    Image.new("RGB", (1, 5000)).save(bad / "thin.png")
    Image.new("1", (20000, 20000)).save(bad / "bomb.png")
    moved = tmp_path / "here"
    moved.mkdir()
    shutil.copy(pictures / "vae.pt", tmp_path)
    result = encode(tmp_path, tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    for name in ("cut.jpg", "empty.png", "zipped.jpg", "thin.png", "bomb.png", "5 of 75", "--skip-bad"):
        assert name in result.stderr, name
    assert not (tmp_path / "out/meta.json").exists()
    result = encode(tmp_path, tmp_path / "out", "--skip-bad")
    assert result.returncode == 0 and "left out 5 of 75" in result.stdout
    assert np.array_equal(np.load(tmp_path / "out/moments.npy"), np.load(encoded / "moments.npy")) or \
        np.abs(np.load(tmp_path / "out/moments.npy").astype(float) - np.load(encoded / "moments.npy")).max() < 2e-3
    assert np.array_equal(np.load(tmp_path / "out/labels.npy"), np.load(encoded / "labels.npy"))


def test_small_vae_round_trip(tmp_path):
    """300 steps on drawn shapes already bring the error well under that of the best single colour per image."""
    ok("vae_latents.py", "--dataset", "shapes", "--num", 200, "--vae-factor", 2, "--vae-steps", 300, "--out", tmp_path / "d", "--device", "cpu",
       env={"OMP_NUM_THREADS": "2"})
    folder = LatentFolder(tmp_path / "d")
    vae = find_vae(None, folder.meta, tmp_path / "d")
    images = folder.images(slice(0, 64)).astype(np.float64)
    with torch.no_grad():
        decoded = to_uint8(vae.decode(torch.from_numpy(folder.moments[:64].copy()).float()[:, :4])).astype(np.float64)
    x0 = folder.meta["scale"] * torch.from_numpy(folder.moments[:].copy()).float()[:, :4]
    assert 0.7 < x0.std() < 1.3  # unit variance
    error, flat = ((decoded - images) ** 2).mean(), ((images - images.mean(axis=(1, 2), keepdims=True)) ** 2).mean()
    assert error < 0.5 * flat


def test_other_arguments_for_an_existing_folder_are_refused(pictures, encoded):
    before = digest(encoded)
    result = encode(pictures, encoded, "--batch-size", 4)
    assert result.returncode == 2 and "chunk" in result.stderr and digest(encoded) == before
