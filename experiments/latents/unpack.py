"""An image folder OUT/<class>/* from data that lie in tables, archives or arrays.

    python -m experiments.latents.unpack SOURCE OUT

SOURCE is one of these, or a folder of files of the first two kinds:
- *.parquet, as datasets of the Hugging Face Hub have it: a column of encoded images and one of
  labels (needs pyarrow);
- *.tar, as webdataset writes it: files of one key are one picture, and KEY.cls is its label;
- *.npz, as MedMNIST has it: <split>_images (N, S, S[, 3]) uint8 and <split>_labels;
- a folder that torchvision.datasets.CIFAR10, CIFAR100 or MNIST has downloaded into.
Encoded images keep their bytes; arrays become PNG. OUT must be new, and is there when it is whole.
"""

import json
import os
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import UserError, progress, say, setting
from vae_latents import ENDINGS


@dataclass
class Settings:
    source: str = setting("", positional=True)  # file or folder to unpack
    out: str = setting("", positional=True)  # image folder to make
    split: str = "train"  # of arrays and of torchvision's folders: train, test (MedMNIST: val)
    image: str = "image"  # parquet's column of images
    label: str = "label"  # parquet's column of labels


# ---- One function a kind: each gives (class, ending, the encoded picture) one by one


def from_parquet(path, args):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: needs pyarrow; run pip install pyarrow") from error
    file = parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    for column in (args.image, args.label):
        if column not in columns:
            fix = f"give --image and --label of {', '.join(columns)}"
            raise UserError(f"{path}: has no column {column}; {fix}")
    about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
    feature = about.get("info", {}).get("features", {}).get(args.label, {})
    names = feature.get("names")
    for batch in file.iter_batches(columns=[args.image, args.label]):
        for row in batch.to_pylist():
            image, label = row[args.image], row[args.label]
            data = image["bytes"] if isinstance(image, dict) else image
            if not isinstance(data, bytes):
                raise UserError(
                    f"{path}: column {args.image} holds no encoded images; give another"
                )
            with Image.open(BytesIO(data)) as picture:
                ending = f".{picture.format.lower()}"
            yield names[label] if names else str(label), ending, data


def from_tar(path, args):
    """The key of a picture is its path up to the first dot of its name, as webdataset has it."""
    parts, key = {}, None

    def whole():
        images = [ending for ending in parts if ending in ENDINGS]
        if images and ".cls" not in parts:
            beside = ", ".join(sorted(parts.keys() - set(images))) or "nothing"
            raise UserError(f"{path}: {key} has no .cls (but {beside}); write one with its class")
        return [(parts[".cls"].decode().strip(), ending, parts[ending]) for ending in images[:1]]

    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if (folder, stem) != key:
                yield from whole()
                parts, key = {}, (folder, stem)
            parts[f".{ending.lower()}"] = archive.extractfile(member).read()
        yield from whole()


def as_png(pixels) -> bytes:
    file = BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, format="PNG")
    return file.getvalue()


def from_npz(path, args):
    with np.load(path) as arrays:
        wanted = f"{args.split}_images", f"{args.split}_labels"
        if not set(wanted) <= set(arrays):
            fix = f"give --split of {', '.join(sorted(arrays))}"
            raise UserError(f"{path}: has no {' and '.join(wanted)}; {fix}")
        images, labels = (arrays[name] for name in wanted)
    if images.dtype != np.uint8 or labels.size != len(labels):  # a column, or flat
        raise UserError(f"{path}: must hold uint8 images, one label for each; it has several")
    for pixels, label in zip(images, labels.reshape(-1), strict=True):
        yield str(label), ".png", as_png(pixels)


def from_torchvision(path, args):
    from torchvision import datasets

    places = {
        "cifar-10-batches-py": datasets.CIFAR10,
        "cifar-100-python": datasets.CIFAR100,
        "MNIST": datasets.MNIST,
    }
    kind = next((kind for place, kind in places.items() if (path / place).is_dir()), None)
    if kind is None:
        known = ", ".join(places)
        raise UserError(f"{path}: holds no .parquet, .tar or {known}; give such a file or folder")
    with common.reading(path, "is not whole; download it again"):
        data = kind(path, train=args.split == "train", download=False)
    for pixels, label in zip(data.data, data.targets, strict=True):
        name = data.classes[label].split(" - ")[0]  # MNIST's are "0 - zero"
        yield name, ".png", as_png(pixels)


READERS = {".parquet": from_parquet, ".tar": from_tar, ".npz": from_npz}


def unpacked(source, args):
    """All pictures of SOURCE."""
    if source.is_file():
        if source.suffix not in READERS:
            raise UserError(f"{source}: must end in {', '.join(READERS)}, or be a folder")
        yield from READERS[source.suffix](source, args)
        return
    files = [path for path in sorted(source.iterdir()) if path.suffix in (".parquet", ".tar")]
    for path in progress("unpacked: file", files):
        yield from READERS[path.suffix](path, args)
    if not files:
        yield from from_torchvision(source, args)


def main():
    args = common.parse_settings(Settings, __doc__)
    source, out = Path(args.source), Path(args.out)
    if not source.exists():
        raise UserError(f"{source}: is not there; give a file or a folder")
    if out.exists():
        raise UserError(f"{out}: exists already; give another folder")
    part = out.with_name(f"{out.name}.part")  # a killed run's is begun again
    shutil.rmtree(part, ignore_errors=True)
    counts = Counter()
    for name, ending, data in unpacked(source, args):
        if not name or name in (".", "..") or "/" in name:
            raise UserError(f"{source}: the class {name!r} cannot name a folder; rename it")
        folder = part / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{counts.total():07d}{ending}").write_bytes(data)
        counts[name] += 1
    if not counts:
        raise UserError(f"{source}: holds no pictures; give another file or folder")
    os.rename(part, out)
    shown = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())[:10])
    say(f"{out}: {counts.total()} pictures of {len(counts)} classes ({shown})")


if __name__ == "__main__":
    common.run(main)
