"""The two drawings of the README that explain: assets/extrapolation.svg, assets/slice.svg.

python experiments/diagrams.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import say, setting

import numpy as np

from build_teacher import extrapolate
from experiments.plot import new_figure
from train_stage1 import rows_in_range

GROUND, INK, BLUE, RED = "#f6f8fa", "#1f2328", "#0550ae", "#cf222e"  # readable on dark pages, too


def arrow(axis, start, end, colour, style="-"):
    line = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "linestyle": style}
    axis.annotate("", xy=end, xytext=start, arrowprops={**line, "shrinkA": 0, "shrinkB": 0})


def extrapolation(s=3.0):
    """f_u, f_c and f_g of two images, in two dimensions of the teacher's features."""
    figure = new_figure(6.4, 3.1)
    figure.set_facecolor(GROUND)
    axis = figure.add_subplot()
    axis.set_facecolor(GROUND)
    images = {  # f_u, then the small step that the label makes
        "cat": (np.array([1.0, 0.9]), np.array([0.6, 0.35]), BLUE),
        "ship": (np.array([1.5, 0.3]), np.array([0.75, -0.22]), RED),
    }
    for name, (f_u, step, colour) in images.items():
        f_c, f_g = f_u + step, extrapolate(f_u + step, f_u, s)
        arrow(axis, (0, 0), f_u, "#8c959f")
        arrow(axis, f_c, f_g, colour, ":")
        arrow(axis, f_u, f_c, colour)
        for text, place in ((f"f_u, a {name}", f_u), ("f_c", f_c), (f"f_g, a {name}", f_g)):
            axis.plot(*place, "o", color=colour if text[2] != "u" else "#8c959f", markersize=5)
            offset = {"f_u": (-44, 9), "f_c": (2, 8), "f_g": (8, -4)}[text[:3]]
            axis.annotate(text, place, offset, textcoords="offset points", color=INK)
    axis.text(-0.05, 3.0, f"f_g = f_u + s (f_c − f_u), here s = {s:g}", color=INK, fontsize=11)
    lines = (
        "grey: what the noisy picture says by itself",
        "solid: what knowing the class adds",
        "dotted: the same step, s times as long in all",
    )
    for number, line in enumerate(lines):
        axis.text(-0.05, 2.72 - 0.23 * number, line, color=INK, fontsize=8.5)
    axis.set(xlim=(-0.15, 4.8), ylim=(-0.6, 3.2))
    axis.axis("off")
    return figure


def batch_slice(batch=32, low=0.4, high=0.7):
    """A batch of 32 as a bar of strata of t, with the images that the auxiliary loss sees."""
    figure = new_figure(8, 1.7)
    figure.set_facecolor(GROUND)
    axis = figure.add_subplot()
    axis.set_facecolor(GROUND)
    rows = rows_in_range(batch, 1, low, high)
    u = np.random.default_rng(3).random(batch)
    for i in range(batch):
        inside = rows.start <= i < rows.stop
        counts = low <= (i + u[i]) / batch <= high
        colour = "#ffd8d3" if inside else "white"
        axis.bar(i + 0.5, 1, width=1, color=colour, edgecolor="#8c959f", linewidth=0.7)
        axis.plot(i + u[i], 0.5, "o", markersize=4, color=RED if counts else "#8c959f")
    middle = (rows.start + rows.stop) / 2
    axis.plot([rows.start, rows.stop], [1.2, 1.2], color=RED, linewidth=3, solid_capstyle="butt")
    text = "the slice: teacher and P2 run on these rows alone; the mask trims its ends"
    axis.text(middle, 1.42, text, ha="center", color=INK, fontsize=9)
    for t in (0, low, high, 1):
        axis.text(t * batch, -0.45, f"t = {t:g}", ha="center", color=INK, fontsize=9)
        axis.plot([t * batch] * 2, [-0.12, 0], color=INK, linewidth=1)
    note = f"image i of {batch} gets t = (i + u) / {batch}, with u uniform in [0, 1)"
    axis.text(batch / 2, -0.98, note, ha="center", color=INK, fontsize=9)
    axis.set(xlim=(-0.8, batch + 0.8), ylim=(-1.2, 1.9))
    axis.axis("off")
    return figure


@dataclass
class Settings:
    out: str = setting("assets", "folder for the two drawings")


def main():
    out = Path(models.parse_settings(Settings, __doc__).out)
    for name, draw in (("extrapolation", extrapolation), ("slice", batch_slice)):
        with models.atomic_write(out / f"{name}.svg") as file:
            draw().savefig(file, format="svg", metadata={"Date": None})
        say(out / f"{name}.svg")


if __name__ == "__main__":
    models.run(main)
