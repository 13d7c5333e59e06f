"""A latent folder from REPA's preprocessed data: the same means and stds, without a picture.

    python -m experiments.latents.convert_repa_data DIR --vae data/sd-vae.pt --out data/imagenet256

DIR is what REPA's scripts call --data-dir, or the folder vae-sd in it: dataset.json, the labels,
and one .npy for each image, whose rows are the mean and the std of its posterior, unscaled. The VAE
is the one that encoded them (REPA's tool takes sd-vae-ft-mse unless told otherwise), which the
files do not say; it gives the scale, and decodes samples. The classes are numbers: dataset.json
knows no names, and --class-names gives them, one in each line, in the order of the numbers. The
same command continues a killed run.
"""

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import UserError, chunks_to_do, fingerprint, progress, say, setting, shared_array, warn
from vae_latents import DONE, LatentFolder, finish, load_vae


@dataclass
class Settings:
    source: str = setting("", positional=True)  # REPA's data folder, or its vae-sd
    vae: str | None = None  # VAE file that made them, from convert_vae.py
    out: str = "data/imagenet256"  # folder to make
    class_names: str | None = None  # text file, one name for each class (default: their numbers)
    batch_size: int = 256  # files read between two savings


class Encoded:
    """REPA's vae-sd folder, as `vae_latents.finish` takes an image folder: .names, .labels,
    .classes."""

    def __init__(self, folder: Path, class_names: str | None):
        self.folder = folder
        with common.reading(folder / "dataset.json", "holds no labels of REPA's tool"):
            labels = json.loads((folder / "dataset.json").read_text())["labels"]
            if not labels:
                raise ValueError("labels is empty: the images had no classes")
            pairs = sorted((name, label) for name, label in labels)  # REPA's own order
            self.names, self.labels = [list(column) for column in zip(*pairs, strict=True)]
            if any(type(label) is not int or label < 0 for label in self.labels):
                raise ValueError("its labels are not all whole numbers from 0 on")
        if len(set(self.names)) < len(self.names):
            twice = [name for name, count in Counter(self.names).items() if count > 1]
            raise UserError(f"{folder}/dataset.json: lists {twice[0]} twice; make it again")
        self.classes = self.name_classes(class_names)

    def name_classes(self, path: str | None) -> list[str]:
        count = max(self.labels) + 1
        names = [str(label) for label in range(count)]
        if path:
            with common.reading(path, "is no text file of class names"):
                names = Path(path).read_text().splitlines()
            if len(names) < count or len(set(names)) < len(names) or not all(names):
                what = f"has {len(set(names))} different names in {len(names)} lines"
                raise UserError(f"{path}: {what}; give one name for each of {count} classes")
        absent = set(range(len(names))) - set(self.labels)
        if absent:
            warn(f"{self.folder}: has no image of {len(absent)} classes, such as {min(absent)}")
        return names

    def read(self, name: str) -> np.ndarray:
        """One image's mean and std (2C, H, W)."""
        path = self.folder / name
        with common.reading(path, "is no array of REPA's tool; run that again for this image"):
            return np.load(path)

    def first(self, channels: int) -> np.ndarray:
        """The first image's mean and std, if this VAE can have made them."""
        first = self.read(self.names[0])
        shape = first.shape
        if len(shape) != 3 or shape[0] != 2 * channels or shape[1] != shape[2]:
            what = f"has shape {shape}; --vae has mean and std of {channels} channels each"
            raise UserError(f"{self.folder / self.names[0]}: {what}; give the VAE that made it")
        return first


def copy(source: Encoded, moments, done, batch_size):
    """Fill `moments` and `done` chunk by chunk."""
    with ThreadPoolExecutor(8) as pool:
        for rows in progress("read: batch", chunks_to_do(done, batch_size, 0, 1)):
            names = [source.names[row] for row in rows]
            for row, name, both in zip(rows, names, pool.map(source.read, names), strict=True):
                with np.errstate(over="ignore"):  # infinities are refused below
                    half = both.astype(np.float16)
                if both.shape != moments.shape[1:] or not np.isfinite(half).all():
                    what = f"has shape {both.shape}, numbers from {both.min()} to {both.max()}"
                    needed = f"float16 of shape {moments.shape[1:]} must hold them"
                    raise UserError(f"{source.folder / name}: {what}; {needed}")
                if half[len(half) // 2 :].min() < 0:
                    raise UserError(f"{source.folder / name}: has a std below 0; is it a logvar?")
                moments[row] = half
            moments.flush()
            done[rows] = DONE  # when the rows are on disk


def main():
    args = common.parse_settings(Settings, __doc__)
    folder = Path(args.source)
    folder = folder / "vae-sd" if (folder / "vae-sd").is_dir() else folder
    if not args.vae:
        raise UserError("give --vae FILE, the VAE that made the latents")
    vae, source = load_vae(args.vae), Encoded(folder, args.class_names)
    first, out = source.first(vae.latent_channels), Path(args.out)
    shape = first.shape
    tag = fingerprint(source.names, source.labels, source.classes, first, vae.identity())[:12]
    _lock = common.lock(out)  # until main returns
    part = out / f"done-{tag}.part.npy"
    if (out / "meta.json").is_file():
        if LatentFolder(out).meta.get("tag") != tag:
            raise UserError(f"{out}: holds other latents; choose another --out")
        return say(f"{out}: is complete already")
    others = [path for path in out.glob("done-*.part.npy") if path != part]
    if others or (out / "moments.npy").exists() and not part.exists():
        raise UserError(f"{out}: holds the beginning of other latents; choose another --out")
    done = shared_array(part, (len(source.names),), np.uint8, 0)
    moments = shared_array(out / "moments.npy", (len(source.names), *shape), np.float16, 0)
    copy(source, moments, done, args.batch_size)
    meta = {"tag": tag, "image_size": shape[1] * vae.factor, "source": os.path.abspath(folder)}
    meta["vae"] = {"path": os.path.abspath(args.vae), "identity": vae.identity()}
    finish(source, vae, moments, done, meta, out)
    part.unlink()


if __name__ == "__main__":
    common.run(main)
