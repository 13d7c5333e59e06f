"""A table of what each judge says of pictures that are worse in a known way, in Markdown.

    python -m experiments.cifar10.instrument HELD --vae FILE --judge FILES --outside FILES

HELD/<class>/* are real pictures that no judge was fitted on. The rows: the pictures themselves, the
same after the VAE, blurred, with noise, as JPEGs, with steps at the borders of patches, with wrong
labels, and of half of the classes alone. A judge that can be trusted orders each kind as an eye
does: the stronger, the larger its distance and the smaller its share of the class asked for. The
last lines say where it does not. Distances of two judges have different scales; read each one
against its own first row, which is what real pictures get.
"""

import io
import itertools
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
from PIL import Image

import common
from common import UserError, say, setting
from experiments.cifar10.frontier import check_judges, load_judges
from experiments.cifar10.outside import read_pictures, round_trips
from vae_latents import Images, load_vae

PATCH = 8  # pixels: SiT-*/4 on latents of half the pictures' side


@dataclass
class Settings:
    images: str = setting("", positional=True)  # folder of held-out pictures, HELD/<class>/*
    vae: str = "data/cifar10-vae.pt"  # the VAE whose decoder made the samples
    judge: str = "out/cifar10/classifier.pt"  # files of judge.py, with commas
    outside: str = "out/outside.pt"  # files of outside.py, with commas
    num: int = setting(2000, at_least=2)  # pictures in each row
    image_size: int = setting(32, at_least=8)  # side of the pictures in pixels
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)  # of the choice of pictures, and of noise
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


# ---- Ways to make pictures (N, S, S, 3) uint8 worse


def to_uint8(pixels) -> torch.Tensor:
    return torch.from_numpy(np.uint8(np.clip(np.round(pixels), 0, 255)))


def blurred(pictures, sigma) -> torch.Tensor:
    """A Gaussian blur of `sigma` pixels."""
    return to_uint8(scipy.ndimage.gaussian_filter(pictures.double().numpy(), (0, sigma, sigma, 0)))


def noisy(pictures, std, rng) -> torch.Tensor:
    """Gaussian noise of `std` grey levels, independent in each pixel and channel."""
    return to_uint8(pictures.numpy() + rng.normal(scale=std, size=pictures.shape))


def as_jpeg(pictures, quality) -> torch.Tensor:
    """Compressed on a grid that is moved by half a block. Pictures that are JPEGs already would
    suffer least from their own quality, and most where its steps are half of the new ones."""
    decoded = []
    for picture in pictures.numpy():
        wider = np.pad(picture, ((4, 4), (4, 4), (0, 0)), mode="edge")
        Image.fromarray(wider).save(file := io.BytesIO(), "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file))[4:-4, 4:-4])
    return torch.from_numpy(np.stack(decoded))


def patched(pictures, std, rng) -> torch.Tensor:
    """Each patch of 8 x 8 pixels is brighter or darker by a number of deviation `std`."""
    side = -(-pictures.shape[1] // PATCH)
    shifts = rng.normal(scale=std, size=(len(pictures), side, side, 1))
    shifts = shifts.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    size = pictures.shape[1]
    return to_uint8(pictures.numpy() + shifts[:, :size, :size])


def rows_of_table(pictures, labels, vae, classes, seed):
    """(kind, strength in words, pictures, labels) of each row. Those of one kind get worse."""
    rng = np.random.default_rng(seed)
    yield "real", "", pictures, labels
    yield "VAE round trip", "", round_trips(vae, pictures), labels
    for sigma in (0.5, 1, 2):
        yield "blur", f"{sigma:g} px", blurred(pictures, sigma), labels
    for std in (8, 16, 32):
        yield "noise", f"{std} levels", noisy(pictures, std, rng), labels
    for quality in (90, 50, 20, 5):
        yield "JPEG", f"quality {quality}", as_jpeg(pictures, quality), labels
    for std in (4, 8, 16):
        yield "patches", f"{std} levels", patched(pictures, std, rng), labels
    wrong = (labels + 1) % classes
    half = torch.where(torch.arange(len(labels)) % 2 == 0, labels, wrong)
    yield "wrong labels", "half of them", pictures, half
    yield "wrong labels", "all", pictures, wrong


# ---- The table


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def table(found, names) -> list[str]:
    """`found`: [(kind, strength, {judge: figures})]."""
    heads = [f"{name}: {what}" for name in names for what in ("distance", "class", "P, R")]
    lines = [line(["pictures", *heads]), line(["---", *["--:"] * len(heads)])]
    for kind, strength, figures in found:
        cells = [f"{kind}, {strength}" if strength else kind]
        for name in names:
            known = figures[name]
            both = f"{known['precision']:.2f}, {known['recall']:.2f}"
            cells += [f"{known['distance']:.1f}", f"{100 * known['class']:.1f} %", both]
        lines.append(line(cells))
    return lines


def orders(found, name) -> list[str]:
    """What the judge `name` does not order as an eye does; real pictures begin every kind."""
    real, wrong = found[0][2][name], []
    for kind in ("VAE round trip", "blur", "noise", "JPEG", "patches", "wrong labels"):
        figures = [real, *(known[name] for this, _, known in found if this == kind)]
        distances, shares = ([each[key] for each in figures] for key in ("distance", "class"))
        if kind != "wrong labels" and any(a >= b for a, b in itertools.pairwise(distances)):
            wrong.append(f"{kind} by distance")
        if any(a <= b for a, b in itertools.pairwise(shares)):
            wrong.append(f"{kind} by class")
    return wrong


def main():
    args = common.parse_settings(Settings, __doc__)
    device, _, _ = common.setup(args.device)
    judges, vae = load_judges(args.judge, args.outside, device), load_vae(args.vae)
    images, found = Images(args.images, args.image_size), []
    classes = len(images.classes)
    check_judges(judges, args.images, args.image_size, images.classes)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(images.files), generator=generator).tolist()
    first_half = [row for row in order if images.labels[row] < classes / 2][: args.num]
    if len(first_half) < args.num:
        problem = f"half of its classes have {len(first_half)} pictures"
        raise UserError(f"--num {args.num}: {args.images} is too small, {problem}; give fewer")
    pictures, labels = read_pictures(images, order[: args.num])
    rows = rows_of_table(pictures, labels, vae, classes, args.seed)
    half = "half of the classes", "", *read_pictures(images, first_half)
    for kind, strength, seen, asked in itertools.chain(rows, [half]):
        figures = {name: known.measure(seen, asked) for name, known in judges.items()}
        found.append((kind, strength, figures))
        say(f"judged: {kind} {strength}")
    for text in ("", *table(found, judges), ""):
        say(text)
    for name in judges:
        wrong = ", ".join(orders(found, name)) or "nothing"
        say(f"- {name} does not order as an eye does: {wrong}.")


if __name__ == "__main__":
    common.run(main)
