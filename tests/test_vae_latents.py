"""Images to latents: the crop, every kind of image file, encoding by processes and after kills."""

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, group, start_group
from PIL import Image

import common
import vae_latents
from common import UserError
from experiments.demo import shapes
from experiments.latents import small_vae
from experiments.latents.small_vae import from_uint8
from vae_latents import AutoencoderKL, LatentFolder, find_vae, open_image


def digest(folder):
    files = [f for f in sorted(folder.iterdir()) if not f.name.startswith(".")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_shapes_are_a_function_of_the_index():
    draw = shapes.draw_shape
    assert [draw(i, 32)[0] for i in range(12)] == [*shapes.FIGURES, *list(shapes.FIGURES)[:4]]
    assert draw(7, 32)[1].tobytes() == draw(7, 32)[1].tobytes()
    assert len({draw(i, 32)[1].tobytes() for i in range(100)}) == 100


def test_crop_is_adms(tmp_path):
    """The halvings, the bicubic resize and the cut, written out again with other calls."""
    pixels = np.random.default_rng(0).integers(0, 256, (301, 517, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), tmp_path / "a.png"
    image.save(file)
    halved = image.resize((258, 150), Image.BOX).resize((129, 75), Image.BOX)
    scaled = halved.resize((round(129 * 64 / 75), 64), Image.BICUBIC)
    left = (scaled.width - 64) // 2
    assert np.array_equal(open_image(file, 64), np.asarray(scaled)[:, left : left + 64])
    small = halved.resize((64, 37), Image.BOX).resize((round(64 * 32 / 37), 32), Image.BICUBIC)
    left = (small.width - 32) // 2
    assert np.array_equal(open_image(file, 32), np.asarray(small)[:, left : left + 32])
    Image.fromarray(pixels[:32, :32]).save(file)
    assert np.array_equal(open_image(file, 32), pixels[:32, :32])
    assert np.array_equal(open_image(file), pixels[:32, :32])


def test_every_mode_becomes_the_right_rgb(tmp_path):
    def rgb(image, ending="png", **options):
        image.save(tmp_path / f"a.{ending}", **options)
        return open_image(tmp_path / f"a.{ending}").astype(int)

    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    want = np.stack([grey] * 3, axis=2)
    assert np.array_equal(rgb(Image.fromarray(grey)), want)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(rgb(sixteen), want)  # scaled, not clipped
    palette = Image.fromarray(want).convert("P", palette=Image.ADAPTIVE, colors=64)
    assert np.abs(rgb(palette) - want).max() <= 8
    clear = Image.fromarray(np.dstack([want, np.zeros_like(grey)]))
    assert (rgb(clear) == 255).all()  # wholly transparent: the white behind it
    half = Image.fromarray(np.dstack([np.zeros_like(want), np.full_like(grey, 128)]))
    assert abs(rgb(half)[0, 0, 0] - 127) <= 1
    assert rgb(Image.fromarray(want).convert("CMYK"), "tiff").shape == (32, 32, 3)


def test_a_phones_picture_is_upright(tmp_path):
    """EXIF orientation 6: the camera was turned; viewers show the picture turned back."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "a.png"), np.rot90(pixels, -1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of three classes, PNG and JPEG, sizes mixed, one nested; and a VAE file."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(70):
        folder = root / "images" / f"class {i % 3}" / ("deep" if i == 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        image = shapes.draw_shape(i, 32)[1].resize((32 + i % 5, 40))
        name = "new\nline 6.png" if i == 6 else f"{i}.{'png' if i % 2 else 'jpg'}"
        image.save(folder / name)
    (root / "images" / "class 1" / "notes.txt").write_text("not an image")
    torch.manual_seed(0)
    state = AutoencoderKL((8, 16), layers=1).state_dict()
    torch.save({"model": state, "scale": 0.9}, root / "vae.pt")
    return root


def flags(pictures, out, *more):
    flags = ["--images", pictures / "images", "--vae", pictures / "vae.pt", "--out", out]
    return [*flags, "--image-size", 32, "--batch-size", 8, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def encoded(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "a"
    call(vae_latents, *flags(pictures, out))
    return out


def test_latent_folder_holds_what_it_promises(pictures, encoded):
    folder = LatentFolder(encoded)
    names = sorted(f for f in os.listdir(encoded) if not f.startswith("."))
    assert names == ["files.json", "labels.npy", "meta.json", "moments.npy"]
    assert folder.meta["classes"] == ["class 0", "class 1", "class 2"] and len(folder) == 70
    assert folder.meta["scale"] == 0.9 and folder.shape == (4, 16, 16)
    assert np.bincount(folder.labels).tolist() == [24, 23, 23]
    assert folder.meta["num_images"] == 70 and folder.meta["image_size"] == 32


def test_rows_are_the_moments_and_labels_of_the_files_that_are_named(pictures, encoded):
    folder = LatentFolder(encoded)
    files = json.loads((encoded / "files.json").read_text())
    rows = [0, 5, 40, 69]
    source = Path(folder.meta["source"])
    assert source == pictures / "images" and len(files) == 70
    images = np.stack([open_image(source / files[row], 32) for row in rows])
    vae = find_vae(None, folder.meta)
    with torch.no_grad():
        want = torch.cat(vae.encode(from_uint8(images)), dim=1)
    moments, labels = folder.read(torch.tensor(rows))
    torch.testing.assert_close(moments.float(), want, rtol=2e-3, atol=1e-3)
    assert moments.dtype == torch.float16 and labels.dtype == torch.int64
    assert [folder.meta["classes"][y] for y in labels] == [files[i].split("/")[0] for i in rows]


def test_the_vae_is_compared_where_it_is_found(pictures, encoded, tmp_path):
    """A changed file behind the same path is not the VAE that made the latents."""
    meta = json.loads((encoded / "meta.json").read_text())
    saved = torch.load(pictures / "vae.pt", weights_only=True)
    other = {k: v + 0.01 for k, v in saved["model"].items()}
    torch.save({"model": other, "scale": 0.9}, tmp_path / "vae.pt")
    meta["vae"]["path"] = str(tmp_path / "vae.pt")
    with pytest.raises(UserError, match="is not the VAE that made"):
        find_vae(None, meta)
    assert find_vae(tmp_path / "vae.pt", meta).scale == 0.9  # --vae insists


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_encoding_killed_and_repeated_is_byte_identical(
    pictures, encoded, processes, tmp_path, capsys
):
    """kill -9 after 1, 2, 3 chunks until it gets through; with 3 processes, the whole group."""
    command, kills = [ROOT / "vae_latents.py", *flags(pictures, tmp_path / "b")], 0
    for chunks in (1, 2, 4):
        members = start_group(processes, *command)
        while all(member.poll() is None for member in members):
            done = list((tmp_path / "b").glob("done-*.part.npy"))
            if done and np.load(done[0]).sum() >= 8 * chunks:
                for member in members:
                    member.kill()
                kills += 1
                break
            time.sleep(0.002)
        for member in members:
            member.communicate()
        if not (tmp_path / "b/meta.json").exists():
            with pytest.raises(UserError, match="is no complete latent folder"):
                LatentFolder(tmp_path / "b")
    for _, err, status in group(processes, *command):
        assert status == 0, err
    assert kills and digest(tmp_path / "b") == digest(encoded)
    if processes == 1:  # by a Python of its own
        again = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        assert "complete already" in again.stdout
    else:
        call(vae_latents, *command[1:])
        assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize("unreadable", [0, 3])
@pytest.mark.parametrize("write", [1, 2, 3])
def test_an_encoding_killed_in_its_last_lines_is_not_lost(
    unreadable, write, pictures, tmp_path, monkeypatch
):
    """Killed when all is encoded, before meta.json: nothing is encoded again."""
    shutil.copytree(pictures / "images", tmp_path / "images")
    shutil.copy(pictures / "vae.pt", tmp_path)
    for i in range(unreadable):
        (tmp_path / f"images/class {i % 2}/{3 * i}bad.png").write_bytes(b"no image")
    out, real, writes = tmp_path / "b", common.atomic_write, []

    def killed(path):
        if path.name != "moments.npy" and ".part" not in path.name:  # made at the beginning
            writes.append(path)
        if len(writes) == write:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(common, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        call(vae_latents, *flags(tmp_path, out))
    assert (out / "moments.npy").exists() and not (out / "meta.json").exists()
    monkeypatch.setattr(common, "atomic_write", real)
    call(vae_latents, *flags(tmp_path, tmp_path / "whole"))
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    call(vae_latents, *flags(tmp_path, out))
    assert digest(out) == digest(tmp_path / "whole")
    assert len(LatentFolder(out)) == 70


def test_unreadable_images_are_left_out_counted_and_listed(pictures, encoded, tmp_path, capsys):
    """Truncated, empty, and a pipe, which is no file: the run goes on without them."""
    shutil.copytree(pictures / "images", tmp_path / "images")
    shutil.copy(pictures / "vae.pt", tmp_path)
    bad = tmp_path / "images" / "class 2"
    whole = (bad / "2.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (bad / "empty.png").write_bytes(b"")
    os.mkfifo(bad / "pipe.png")
    shutil.move(bad / "cut.jpg", tmp_path / "images/class 0/0cut.jpg")  # and one at the beginning
    call(vae_latents, *flags(tmp_path, tmp_path / "out"))
    said = capsys.readouterr()
    listed = (tmp_path / "out/unreadable.txt").read_text()
    warning = next(line for line in said.err.splitlines() if "unreadable.txt" in line)
    assert warning.startswith("warning: ") and "2" in warning and "70 images" in said.out
    assert "2 in them" in said.out  # a text and the pipe
    for name in ("cut.jpg", "empty.png"):
        assert name in listed and name in warning, name
    assert len(listed.splitlines()) == 2
    folder, whole = LatentFolder(tmp_path / "out"), LatentFolder(encoded)
    names = json.loads((tmp_path / "out/files.json").read_text())
    wanted = json.loads((encoded / "files.json").read_text())
    assert sorted(names) == sorted(wanted) and len(folder) == 70
    rows = [wanted.index(name) for name in names]  # the order is not promised
    assert torch.equal(folder.labels, whole.labels[rows])
    difference = folder.moments.astype(float) - whole.moments[rows]  # other chunks: rounding
    assert np.abs(difference).max() < 2e-3
    left = {file.name for file in (tmp_path / "out").iterdir() if not file.name.startswith(".")}
    assert left == {"files.json", "labels.npy", "meta.json", "moments.npy", "unreadable.txt"}
    call(vae_latents, *flags(tmp_path, tmp_path / "out"))
    assert "complete already" in capsys.readouterr().out


def test_a_class_of_which_nothing_can_be_read_is_refused(pictures, tmp_path):
    shutil.copytree(pictures / "images", tmp_path / "images")
    shutil.copy(pictures / "vae.pt", tmp_path)
    (tmp_path / "images/emu").mkdir()
    (tmp_path / "images/emu/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="emu"):
        call(vae_latents, *flags(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out/meta.json").exists()
    assert "emu" in (tmp_path / "out/unreadable.txt").read_text()


def test_other_files_and_suspicious_classes_are_said(pictures, tmp_path, capsys):
    shutil.copytree(pictures / "images" / "class 0", tmp_path / "images" / "train")
    shutil.copy(pictures / "vae.pt", tmp_path)
    (tmp_path / "images/train/movie.mp4").write_bytes(b"no image")
    call(vae_latents, *flags(tmp_path, tmp_path / "out"))
    said = capsys.readouterr()
    assert re.search(r"24 images of 1 classes \(train\).*\b1\b", said.out)
    assert "warning: " in said.err and "becomes a class: train" in said.err


def test_a_linked_class_folder_is_followed(pictures, encoded, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("class 0", "class 1", "class 2"):
        (tmp_path / "images" / name).symlink_to(pictures / "images" / name)
    shutil.copy(pictures / "vae.pt", tmp_path)
    call(vae_latents, *flags(tmp_path, tmp_path / "out"))
    assert np.array_equal(np.load(tmp_path / "out/moments.npy"), np.load(encoded / "moments.npy"))


def test_a_disk_that_is_too_small_is_an_error_before_the_work(pictures, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"part.npy: could not be .* make room.*No space left"):
        call(vae_latents, *flags(pictures, tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == [".lock"]
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    call(vae_latents, *flags(pictures, tmp_path / "out"))
    assert LatentFolder(tmp_path / "out").meta["num_images"] == 70


def test_a_disk_that_cannot_be_mapped_is_named(pictures, encoded, tmp_path, monkeypatch):
    """Private maps alone, as on FUSE with direct_io: latents are read there, but not made there."""
    real = mmap.mmap

    def private(number, length, access=mmap.ACCESS_WRITE, **more):
        if access == mmap.ACCESS_WRITE:  # a shared one
            raise OSError(errno.ENODEV, "No such device")
        return real(number, length, access=access, **more)

    monkeypatch.setattr(mmap, "mmap", private)
    with pytest.raises(UserError, match=r"part.npy: could not be .* local disk .*No such device"):
        call(vae_latents, *flags(pictures, tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == [".lock"]
    folder = LatentFolder(encoded)
    assert folder.read(torch.arange(len(folder)))[0].isfinite().all()


@pytest.mark.slow
def test_small_vae_round_trip(tmp_path):
    """150 steps on drawn shapes bring the error well under that of one colour per image."""
    shapes.write(tmp_path / "images", 200, 32)
    images = np.stack([open_image(f) for f in sorted((tmp_path / "images").rglob("*.png"))])
    vae = small_vae.train_small_vae(images, factor=2, steps=150)
    with torch.no_grad():
        mean, _ = vae.encode(from_uint8(images))
        decoded = vae_latents.to_images(vae, mean * vae.scale).astype(np.float64)
    assert 0.7 < (mean * vae.scale).std() < 1.3  # unit variance
    flat = ((images - images.mean(axis=(1, 2), keepdims=True)) ** 2).mean()
    assert ((decoded - images) ** 2).mean() < 0.5 * flat


@pytest.mark.parametrize("steps", [1, 10])
def test_small_vae_of_few_steps(steps):
    vae = small_vae.train_small_vae(np.zeros((4, 8, 8, 3), np.uint8), factor=2, steps=steps)
    assert np.isfinite(vae.scale)


def test_a_finished_folder_of_other_images_is_left_alone(pictures, encoded, tmp_path):
    before = digest(encoded)
    shutil.copytree(pictures / "images" / "class 0", tmp_path / "images" / "class 0")
    shutil.copy(pictures / "vae.pt", tmp_path)
    with pytest.raises(UserError, match="another --out"):
        call(vae_latents, *flags(tmp_path, encoded))
    assert digest(encoded) == before


def test_the_verdict_on_a_damaged_folder_is_one(pictures, encoded, tmp_path):
    """Training and vae_latents.py say the same of a folder whose moments were cut."""
    shutil.copytree(encoded, tmp_path / "a")
    data = (encoded / "moments.npy").read_bytes()
    (tmp_path / "a/moments.npy").write_bytes(data[: len(data) // 2])
    for attempt in (LatentFolder, lambda out: call(vae_latents, *flags(pictures, out))):
        with pytest.raises(UserError, match="make it anew"):
            attempt(tmp_path / "a")


def test_a_fingerprint_is_of_the_content_wherever_it_lies():
    """A VAE that has moved to a card is the same one; numpy cannot have a tensor of a card."""

    class Card(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

        def numpy(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def __array__(self, *args, **kwargs):
            return self.numpy()

    x = torch.arange(6.0).reshape(2, 3)
    here = vae_latents.fingerprint(1.0, x)
    assert vae_latents.fingerprint(1.0, x.as_subclass(Card)) == here
    assert vae_latents.fingerprint(1.0, x.numpy()) == here
    assert vae_latents.fingerprint(1.0, x.T.contiguous().T) == here  # strides do not count
    assert vae_latents.fingerprint(1.0, x + 1) != here
