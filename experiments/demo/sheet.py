"""The demo's last page: one picture, out/demo/demo.png, and a table, of what this run measured.

Stage 2 and vanilla SiT after the same total compute (the teacher's training and passes counted),
from the same noise; where the judge sees another class there is a frame.
"""

from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import say
from experiments.checkpoints.plot import new_figure
from experiments.cifar10 import judge
from experiments.cifar10.report import compute, read_run

DEMO, JUDGE = Path("out/demo"), Path("data/shapes/classifier.pt")
CFG = 3  # the guidance of the samples that are shown
ROWS = 5  # of pictures in each grid, a class a column
TILE = 112  # side of a tile in probe.py's picture, below a line of 18 pixels
NETWORKS = {"stage 2": ("stage2", "tab:blue"), "vanilla SiT": ("vanilla", "tab:gray")}


def framed_grid(cnn, images, labels, classes) -> np.ndarray:
    """The first ROWS samples of each class, as pixels; red frames where the judge sees another."""
    images, labels = images[: ROWS * classes], labels[: ROWS * classes]
    wrong = judge.describe(cnn, images)[1] != labels
    side = images.shape[1] + 6
    sheet = np.full((ROWS * side, classes * side, 3), 255, np.uint8)
    for i, image in enumerate(images.numpy()):
        top, left = i // classes * side, i % classes * side
        if wrong[i]:
            sheet[top + 1 : top + side - 1, left + 1 : left + side - 1] = (220, 30, 30)
        sheet[top + 3 : top + side - 3, left + 3 : left + side - 3] = image
    return sheet


def draw(grids: dict, bars: dict, classes: list[str]):
    """The sheet, 840 pixels wide where a page shows it. grids: {title: pixels}; bars: {guidance:
    {network: (share, number of samples)}}."""
    figure = new_figure(8.4, 6.6)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    figure.suptitle(f"the same noise, cfg {CFG}; red frames: a CNN sees another class", fontsize=11)
    for axis, (title, pixels) in zip(top.subplots(1, 2), grids.items(), strict=True):
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        middles = (np.arange(len(classes)) + 0.5) * pixels.shape[1] / len(classes)
        axis.set_xticks(middles, classes, fontsize=9, rotation=45)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axis, features = bottom.subplots(1, 2, width_ratios=[1, 1.4])
    for number, (name, (_, colour)) in enumerate(NETWORKS.items()):
        shares = np.array([found[name][0] for found in bars.values()])
        counts = np.array([found[name][1] for found in bars.values()])
        error = 100 * np.sqrt(shares * (1 - shares) / counts)
        places = np.arange(len(bars)) + 0.4 * number - 0.2
        drawn = axis.bar(places, 100 * shares, 0.38, yerr=error, color=colour, label=name)
        axis.bar_label(drawn, fmt="%.0f", label_type="center", color="white", fontsize=11)
    axis.set_xticks(range(len(bars)), bars, fontsize=10)
    axis.set_ylim(0, 100)
    axis.set_title("class as asked for, % ± standard error", fontsize=10)
    axis.legend(fontsize=10, loc="upper left")
    with common.reading(DEMO / "probe/features.png", "is no picture; run experiments/demo/demo.sh"):
        tiles = Image.open(DEMO / "probe/features.png").crop((0, 18, 4 * TILE, 18 + 3 * TILE))
    features.imshow(tiles)
    features.set_title("the teacher's 16 tokens as colours, t = 0.5, s = 10", fontsize=10)
    features.set_xticks(TILE * (np.arange(4) + 0.5), ["image", "f_u", "f_c", "f_g"], fontsize=10)
    features.set_yticks([])
    features.spines[:].set_visible(False)
    return figure


def main():
    cnn, saved = judge.load(JUDGE)
    classes = read_run(DEMO / "stage2")[1]["classes"]
    bars, grids, lines = {"no guidance": {}, f"guided, cfg {CFG}": {}}, {}, []
    for name, (run, _) in NETWORKS.items():
        step = read_run(DEMO / run)[2]
        cost = compute(DEMO / run, step, "SiT-Ti/4")
        cells = [name, f"{step:,}", f"{cost:,.0f}"]
        for cfg, shares in zip((1, CFG), bars.values(), strict=True):
            path = DEMO / f"samples-{run}-cfg{cfg}/samples.npz"
            samples = judge.read_samples(path, saved)
            judged = judge.measure(cnn, saved, *samples)
            shares[name] = judged["agreement"], len(samples[0])
            cells += [f"{100 * judged['agreement']:.1f} %", f"{judged['FD-CNN']:.2f}"]
        lines.append(cells)
        total = f" + teacher = {cost:,.0f}" if run == "stage2" else ""
        grids[f"{name}: {step:,} steps{total}"] = framed_grid(cnn, *samples, len(classes))
    with common.atomic_write(DEMO / "demo.png") as file:
        draw(grids, bars, classes).savefig(file, format="png", dpi=200)

    titles = ["", "steps", "total compute, in vanilla steps"]
    for cfg in (1, CFG):
        titles += [f"class asked for, cfg {cfg}", f"FD-CNN, cfg {cfg} (lower is better)"]
    for cells in zip(titles, *lines, strict=True):
        say("{:38}{:>14}{:>14}".format(*cells))
    say("A CNN judges the samples; FD-CNN is a distance in its features, not FID. One seed.")
    say(f"Look at {DEMO}/demo.png")


if __name__ == "__main__":
    common.run(main)
