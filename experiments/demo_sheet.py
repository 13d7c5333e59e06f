"""The demo's last page: one picture, out/demo/demo.png, and a table, of what this run measured.

Stage 2 and vanilla SiT after the same total compute (the teacher's training and forward passes
counted), from the same noise; the pictures whose class the judge does not see are framed. Below,
how many of all samples have their class, and the teacher's features as colours.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from experiments import classifier
from experiments.plot import new_figure
from experiments.report import compute, read_run
from models import say

DEMO, JUDGE = Path("out/demo"), Path("data/shapes/classifier.pt")
CFG = 3  # the guidance of the samples that are shown
ROWS = 5  # of pictures in each grid, a class a column
TILE = 112  # side of a tile in probe.py's picture
COLOURS = {"stage 2": "tab:red", "vanilla SiT": "tab:gray"}


def judged() -> dict:
    """{folder of samples: what the classifier said}."""
    with models.reading(DEMO / "judged.jsonl", "is not whole; run experiments/demo.sh"):
        rows = map(json.loads, (DEMO / "judged.jsonl").read_text().splitlines())
        return {Path(row["samples"]).parent.name: row for row in rows}


def framed_grid(cnn, images, labels, classes) -> np.ndarray:
    """The first ROWS samples of each class, as pixels; red frames where the judge sees another."""
    images, labels = images[: ROWS * classes], labels[: ROWS * classes]
    wrong = classifier.describe(cnn, images)[1] != labels
    side = images.shape[1] + 6
    sheet = np.full((ROWS * side, classes * side, 3), 255, np.uint8)
    for i, image in enumerate(images.numpy()):
        top, left = i // classes * side, i % classes * side
        if wrong[i]:
            sheet[top + 1 : top + side - 1, left + 1 : left + side - 1] = (220, 30, 30)
        sheet[top + 3 : top + side - 3, left + 3 : left + side - 3] = image
    return sheet


def feature_tiles(path) -> np.ndarray:
    """Of probe.py's picture: three images, and f_u, f_c and f_g of each."""
    with models.reading(path, "is no picture; remove it and run experiments/demo.sh"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
    rows = slice(18, 18 + 3 * TILE)  # 18: the line of titles
    return np.hstack([pixels[rows, i * TILE : (i + 1) * TILE] for i in (0, 3, 4, 5)])


def draw(grids: dict, bars: dict, classes: list[str]):
    """The sheet, 840 pixels wide where a page shows it. grids: {title: pixels}; bars: {guidance:
    {network: (share, number of samples)}}."""
    figure = new_figure(8.4, 6.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    for axis, (title, pixels) in zip(top.subplots(1, 2), grids.items(), strict=True):
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        middles = (np.arange(len(classes)) + 0.5) * pixels.shape[1] / len(classes)
        axis.set_xticks(middles, classes, fontsize=9, rotation=45)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axis, features = bottom.subplots(1, 2, width_ratios=[1, 1.4])
    for number, (name, colour) in enumerate(COLOURS.items()):
        shares = np.array([found[name][0] for found in bars.values()])
        counts = np.array([found[name][1] for found in bars.values()])
        error = 100 * np.sqrt(shares * (1 - shares) / counts)
        places = np.arange(len(bars)) + 0.4 * number - 0.2
        drawn = axis.bar(
            places, 100 * shares, 0.38, yerr=error, color=colour, label=name, capsize=4
        )
        axis.bar_label(drawn, fmt="%.0f", label_type="center", color="white", fontsize=11)
    axis.set_xticks(range(len(bars)), bars, fontsize=10)
    axis.set_ylim(0, 100)
    axis.set_title("samples with the class asked for, %", fontsize=10)
    axis.legend(fontsize=10, loc="upper left")
    features.imshow(feature_tiles(DEMO / "probe/features.png"))
    features.set_title("the teacher's features, as colours", fontsize=10)
    features.set_xticks(TILE * (np.arange(4) + 0.5), ["image", "f_u", "f_c", "f_g"], fontsize=10)
    features.set_yticks([])
    features.spines[:].set_visible(False)
    return figure


def main():
    found, (_, meta, same) = judged(), read_run(DEMO / "stage2")
    more, classes = read_run(DEMO / "vanilla")[2], meta["classes"]
    columns = {"stage2": ("stage2", same), "vanilla-steps": ("vanilla", same)}
    columns["vanilla"] = "vanilla", more
    cnn, saved = classifier.load(JUDGE)
    bars, grids = {}, {}
    for cfg in (1, CFG):
        how = f"guided, cfg {cfg}" if cfg > 1 else "no guidance"
        bars[how] = {}
        for title, name in (("stage 2", "stage2"), ("vanilla SiT", "vanilla")):
            folder = f"samples-{name}-cfg{cfg}"
            samples = classifier.read_samples(DEMO / folder / "samples.npz", saved)
            bars[how][title] = found[folder]["agreement"], len(samples[0])
            if cfg == CFG:
                heading = f"{title}, {columns[name][1]:,} steps, cfg {cfg}"
                grids[heading] = framed_grid(cnn, *samples, len(classes))
    with models.atomic_write(DEMO / "demo.png") as file:
        draw(grids, bars, classes).savefig(file, format="png", dpi=200)

    costs = [compute(DEMO / run, steps, "SiT-Ti/4") for run, steps in columns.values()]
    lines = {"": [run for run, _ in columns.values()]}
    lines["steps"] = [f"{steps:,}" for _, steps in columns.values()]
    lines["total compute, in vanilla steps"] = [f"{cost:,.0f}" for cost in costs]
    for cfg in (1, CFG):
        rows = [found[f"samples-{name}-cfg{cfg}"] for name in columns]
        lines[f"class asked for, cfg {cfg}"] = [f"{100 * row['agreement']:.1f} %" for row in rows]
        distances = [f"{row['FD-CNN']:.2f}" for row in rows]
        lines[f"FD-CNN, cfg {cfg} (lower is better)"] = distances
    for name, cells in lines.items():
        say(f"{name:38}" + "".join(f"{cell:>12}" for cell in cells))
    say("A CNN judges the samples; FD-CNN is a distance in its features, not FID. One seed.")
    say(f"Look at {DEMO}/demo.png")


if __name__ == "__main__":
    models.run(main)
