"""What the experiment's networks draw and see, from what experiments/cifar10.sh left.

    python experiments/pictures.py      # assets/cifar10_samples.jpg, assets/cifar10_features.png

Samples: the same noise and labels through several networks, after the same steps. Features: of the
student without guidance, and of the teacher, as principal components in colours. On stdout: how
much of the features' variance lies between the classes, which is what s brings.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import UserError, say, setting

import numpy as np
import torch
from PIL import Image, ImageDraw

from build_teacher import extrapolate, load_teacher
from experiments.probe import noisy, pca_rgb
from sample import grid
from vae_latents import LatentFolder, decode, find_vae

# Title over the samples: the run they come from
NETWORKS = {
    "vanilla SiT": "vanilla-seed1",
    "as described, Ti teacher": "descTi-seed1",
    "as released, N teacher": "relN-seed1",
}
TIMES = (0.4, 0.55, 0.7)


def side_by_side(runs: Path) -> Image.Image:
    """Ten classes in columns, of each network that has its RUN/picture/samples.npz."""
    files = {title: runs / name / "picture/samples.npz" for title, name in NETWORKS.items()}
    files = {title: file for title, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"{runs}: no {NETWORKS['vanilla SiT']}/picture/samples.npz or others there")
    sheet = Image.new("RGB", (len(files) * 490 - 10, 18 + 288), "white")
    for number, (title, file) in enumerate(files.items()):
        with models.reading(file), np.load(file) as samples:
            drawn = grid(samples["arr_0"][:60], 10).resize((480, 288), Image.LANCZOS)
        sheet.paste(drawn, (number * 490, 18))
        ImageDraw.Draw(sheet).text((number * 490 + 2, 3), title, fill="black")
    return sheet


@torch.no_grad()
def both_features(teacher, x_t, times, y):
    """(f_c, f_u), each (n, T, D)."""
    null = torch.full_like(y, teacher.num_classes)
    f_c, f_u = (teacher(x_t, times, label, taps=[teacher.depth])[1] for label in (y, null))
    return f_c[teacher.depth], f_u[teacher.depth]


@torch.no_grad()
def feature_columns(vanilla, teacher, folder, s, images=6) -> list:
    """[(title, pictures (images, .., .., 3) uint8)]: the images, then four columns for each t."""
    vae = find_vae(None, folder.meta, folder.path)
    depth = models.parse_name(vanilla.name)[0].student_depth
    labels = range(min(images, len(folder.meta["classes"])))
    rows = np.array([int((folder.labels == label).nonzero()[3]) for label in labels])
    columns = [("image", decode(vae, noisy(folder, rows, 0.5, "cpu")[0]))]
    for t in TIMES:
        _, x_t, times, y = noisy(folder, rows, t, "cpu")
        f_c, f_u = both_features(teacher, x_t, times, y)
        h = vanilla(x_t, times, y, taps=[depth])[1][depth]
        columns.append((f"x_t, t = {t:g}", decode(vae, x_t)))
        columns.append((f"vanilla h_{depth}", pca_rgb(h)))
        columns.append((f"f_c = h_{teacher.depth}", pca_rgb(f_c)))
        columns.append((f"f_g, s = {s:g}", pca_rgb(extrapolate(f_c, f_u, s))))
    return columns


def feature_sheet(columns, tile=64) -> Image.Image:
    size = len(columns) * (tile + 6), 18 + len(columns[0][1]) * (tile + 4)
    sheet = Image.new("RGB", size, "white")
    for column, (title, cells) in enumerate(columns):
        place = column * (tile + 6)
        ImageDraw.Draw(sheet).text((place, 3), title, fill="black", font_size=9)
        for row, cell in enumerate(cells):
            cell = Image.fromarray(cell).resize((tile, tile), Image.NEAREST)
            sheet.paste(cell, (place, 18 + row * (tile + 4)))
    return sheet


def share_between_classes(features, y) -> float:
    """The share of all tokens' variance that lies between the means of the classes."""
    means = torch.stack(
        [features[y == label].mean(dim=(0, 1)) for label in range(int(y.max()) + 1)]
    )
    centre = features.mean(dim=(0, 1))
    between = (means[y] - centre).square().sum() * features.shape[1]
    return (between / (features - centre).square().sum()).item()


def between_classes(teacher, folder, images=50):
    """Print that share for f_c and f_g, over `images` of each class."""
    labels = folder.labels.numpy()
    rows = [np.flatnonzero(labels == label)[:images] for label in np.unique(labels)]
    for t in TIMES:
        _, x_t, times, y = noisy(folder, np.concatenate(rows), t, "cpu")
        f_c, f_u = both_features(teacher, x_t, times, y)
        gap = ((f_c - f_u).norm() / f_u.norm()).item()
        features = {"f_c": f_c, **{f"f_g {s}": extrapolate(f_c, f_u, s) for s in (3, 10, 30)}}
        shares = (f"{k} {100 * share_between_classes(f, y):.0f} %" for k, f in features.items())
        say(f"t = {t:g}: |f_c - f_u| / |f_u| = {gap:.2f}; between classes: {'  '.join(shares)}")


@dataclass
class Settings:
    runs: str = setting("out/cifar10", "folder of experiments/cifar10.sh")
    vanilla: str = setting("vanilla-seed1", "run whose features are shown")
    teacher: str = setting("Ti-seed2/teacher-6000", "folder of the teacher, in RUNS")
    step: int = setting(6000, "the run's checkpoint", at_least=1)
    scale: float = setting(10.0, "s", at_least=1)
    out: str = setting("assets", "folder for the two pictures")


def main():
    args = models.parse_settings(Settings, __doc__)
    runs, out = Path(args.runs), Path(args.out)
    with models.atomic_write(out / "cifar10_samples.jpg") as file:
        side_by_side(runs).save(file, format="JPEG", quality=92)
    path = runs / args.vanilla / f"ckpt-{args.step:07d}.pt"
    vanilla, file = models.load_checkpoint(path, weights="model")
    teacher, _ = load_teacher(runs / args.teacher / "teacher.pt")
    folder = LatentFolder(file["args"]["data"])
    sheet = feature_sheet(feature_columns(vanilla, teacher, folder, args.scale))
    with models.atomic_write(out / "cifar10_features.png") as file:
        sheet.save(file, format="PNG", optimize=True)
    between_classes(teacher, folder)


if __name__ == "__main__":
    models.run(main)
