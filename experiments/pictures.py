"""What the experiment's networks draw and see, from what experiments/cifar10.sh left.

    python experiments/pictures.py      # assets/cifar10_samples.jpg, assets/cifar10_features.png

Samples: the same noise and labels through two networks after the same steps. Features: how much of
the variance of the teacher's f_c and f_g lies between the classes, which is what s brings.
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
from experiments.plot import new_figure
from experiments.probe import both_features, noisy
from sample import grid
from vae_latents import LatentFolder

# Title over the samples: the run they come from
NETWORKS = {"vanilla SiT": "vanilla-seed1", "stage 2, N teacher": "descN-seed1"}
TIMES = (0.4, 0.55, 0.7)
SCALES = (1, 3, 10, 30)


def side_by_side(runs: Path, step: int, classes: list[str], tile=48, rows=5) -> Image.Image:
    """Ten classes in named columns, of each network that has its RUN/picture/samples.npz."""
    files = {title: runs / name / "picture/samples.npz" for title, name in NETWORKS.items()}
    files = {title: file for title, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"{runs}: no {NETWORKS['vanilla SiT']}/picture/samples.npz or others there")
    width, top = 10 * tile + 20, 36
    sheet = Image.new("RGB", (len(files) * width - 20, top + rows * tile), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, file) in enumerate(files.items()):
        with models.reading(file), np.load(file) as samples:
            drawn = grid(samples["arr_0"][: 10 * rows], 10)
        left = number * width
        sheet.paste(drawn.resize((10 * tile, rows * tile), Image.LANCZOS), (left, top))
        draw.text((left + 2, 2), f"{title}, {step:,} steps", fill="black", font_size=13)
        for column, name in enumerate(classes[:10]):
            draw.text((left + column * tile + 1, 21), name, fill="black", font_size=8)
    return sheet


def share_between_classes(features, y) -> float:
    """The share of all tokens' variance that lies between the means of the classes."""
    means = torch.stack(
        [features[y == label].mean(dim=(0, 1)) for label in range(int(y.max()) + 1)]
    )
    centre = features.mean(dim=(0, 1))
    between = (means[y] - centre).square().sum() * features.shape[1]
    return (between / (features - centre).square().sum()).item()


def between_classes(teacher, folder, images=50) -> dict:
    """{t: [that share of f_g for each s of SCALES]}, over `images` of each class; s = 1 is f_c."""
    labels, table = folder.labels.numpy(), {}
    rows = np.concatenate([np.flatnonzero(labels == label)[:images] for label in np.unique(labels)])
    for t in TIMES:
        _, x_t, times, y = noisy(folder, rows, t, "cpu")
        f_c, f_u = both_features(teacher, x_t, times, y, [teacher.depth])[teacher.depth]
        table[t] = [share_between_classes(extrapolate(f_c, f_u, s), y) for s in SCALES]
    return table


def bars(table: dict):
    figure = new_figure(6, 2.8)
    axis = figure.subplots()
    for number, (t, shares) in enumerate(table.items()):
        places = np.arange(len(SCALES)) + 0.25 * (number - 1)
        axis.bar(places, [100 * share for share in shares], width=0.22, label=f"t = {t:g}")
    names = [f"f_g, s = {s}" if s > 1 else "f_c" for s in SCALES]
    axis.set_xticks(range(len(SCALES)), names)
    axis.set(ylabel="variance between classes, %")
    axis.legend(fontsize=8)
    return figure


@dataclass
class Settings:
    runs: str = setting("out/cifar10", "folder of experiments/cifar10.sh")
    data: str = setting("data/cifar10-latents", "latent folder")
    teacher: str = setting("N-seed2/teacher-6000", "folder of the teacher, in RUNS")
    step: int = setting(6000, "the runs' checkpoint", at_least=1)
    out: str = setting("assets", "folder for the two pictures")


def main():
    args = models.parse_settings(Settings, __doc__)
    runs, out, folder = Path(args.runs), Path(args.out), LatentFolder(args.data)
    sheet = side_by_side(runs, args.step, folder.meta["classes"])
    with models.atomic_write(out / "cifar10_samples.jpg") as file:
        sheet.save(file, format="JPEG", quality=92)
    teacher, _ = load_teacher(runs / args.teacher / "teacher.pt")
    table = between_classes(teacher, folder)
    with models.atomic_write(out / "cifar10_features.png") as file:
        bars(table).savefig(file, format="png", dpi=100)
    for t, shares in table.items():
        cells = (f"s = {s} {100 * x:.0f} %" for s, x in zip(SCALES, shares, strict=True))
        say(f"t = {t:g}: between classes: {'  '.join(cells)}")


if __name__ == "__main__":
    models.run(main)
