"""The demo's last page: one picture, out/demo/demo.png, and a table, of what this run measured.

Stage 2 and vanilla SiT side by side, from the same noise, after the same total compute (the
teacher's training and forward passes counted); their losses; the probe's table as bars; and the
teacher's features as colours, one projection for all of them.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import say

import numpy as np
import torch

from build_teacher import extrapolate, load_teacher
from experiments.plot import new_figure, read_log
from experiments.probe import both_features, noisy, pca_rgb
from experiments.report import compute, read_run
from sample import grid
from vae_latents import LatentFolder

DEMO = Path("out/demo")
CFG = 3  # the guidance of the samples that are shown


def judged() -> dict:
    """{folder of samples: what the classifier said}."""
    rows = map(json.loads, (DEMO / "judged.jsonl").read_text().splitlines())
    return {Path(row["samples"]).parent.name: row for row in rows}


def last_step(run) -> int:
    return read_run(DEMO / run)[1]


def cost(run, step) -> float:
    """Total compute of a run until `step`, in steps of the vanilla student."""
    return compute(DEMO / run, step, "SiT-Ti/4")


def samples(axis, folder, title, classes, rows=6):
    """The first samples of a network, a class in each column."""
    with np.load(DEMO / folder / "samples.npz") as file:
        sheet = grid(file["arr_0"][: 10 * rows], 10)
    axis.imshow(sheet)
    axis.set_title(title, fontsize=10)
    axis.set_xticks((np.arange(10) + 0.5) * sheet.width / 10, classes, fontsize=7)
    axis.set_yticks([])


def curves(axis):
    for run, colour, label in (
        ("stage2", "tab:red", "stage 2"),
        ("vanilla", "tab:gray", "vanilla"),
    ):
        records = read_log(DEMO / run)
        steps, losses = [r["step"] for r in records], [r["loss_diff"] for r in records]
        axis.plot(steps, losses, color=colour, label=f"L_diff, {label}")
        if run == "stage2":
            guide = [record["loss_guide"] for record in records]
            label = "L_guide, stage 2: zero outside 0.4 <= t <= 0.7"
            axis.plot(steps, guide, color=colour, linestyle=":", label=label)
    axis.set(xlabel="steps", ylim=(0, None))
    axis.set_title("The losses: L_diff hardly tells the two apart", fontsize=10)
    axis.legend(fontsize=8)


def bars(axis, depth):
    table = json.loads((DEMO / "probe/probe.json").read_text())["blocks"][str(depth)]
    colours = ["tab:gray", "tab:blue", *["tab:red"] * (len(table) - 2)]
    drawn = axis.bar(range(len(table)), list(table.values()), color=colours)
    axis.bar_label(drawn, fmt="%.2f", fontsize=8)
    axis.axhline(0.1, color="black", linestyle=":", linewidth=1, label="chance")
    names = [name.replace("f_g ", "f_g, s = ") for name in table]
    axis.set_xticks(range(len(table)), names, fontsize=8)
    axis.set(ylabel="k-NN accuracy", ylim=(0, 1.1))
    axis.set_title(
        "How loudly the teacher's features say the class (f_u was not told it)", fontsize=10
    )
    axis.legend(fontsize=8)


@torch.no_grad()
def features(axis, folder, classes, lines=4, columns=10):
    """What the teacher makes of 40 noisy images of each class: a square is an image, its colour the
    mean of its tokens in three principal components, the same for f_u, f_c and f_g."""
    teacher, file = load_teacher(DEMO / "teacher/teacher.pt")
    labels, number = folder.labels.numpy(), lines * columns
    rows = np.concatenate([np.flatnonzero(labels == i)[:number] for i in range(len(classes))])
    _, x_t, t, y = noisy(folder, rows, 0.5, "cpu")
    both = both_features(teacher, x_t, t, y, [teacher.depth])[teacher.depth]
    f_c, f_u = (tokens.mean(dim=1, keepdim=True) for tokens in both)
    bands = pca_rgb(f_u, f_c, extrapolate(f_c, f_u, file["scale"]))
    for band, (squares, name) in enumerate(zip(bands, ("f_u", "f_c", "f_g"), strict=True)):
        picture = squares.reshape(len(classes), lines, columns, 3).swapaxes(0, 1)
        top = band * (lines + 1)
        extent = (0, len(classes) * columns, top + lines, top)
        axis.imshow(picture.reshape(lines, -1, 3), extent=extent, interpolation="nearest")
        axis.text(-1, top + lines / 2, name, ha="right", va="center", fontsize=9)
    for label in range(1, len(classes)):
        axis.axvline(label * columns, color="white", linewidth=4)
    axis.set(xlim=(0, len(classes) * columns), ylim=(3 * lines + 2, 0), yticks=[])
    title = (
        f"Each square is a noisy image, its colour the teacher's features; s = {file['scale']:g}"
    )
    axis.set_title(title, fontsize=10)
    axis.set_xticks((np.arange(len(classes)) + 0.5) * columns, classes, fontsize=8)
    axis.set_frame_on(False)


def draw(found, folder):
    classes, steps = folder.meta["classes"], last_step("stage2")
    figure = new_figure(15, 9.5)
    figure.get_layout_engine().set(h_pad=0.1)
    top, middle, bottom = figure.add_gridspec(3, 1, height_ratios=(5, 4, 3))
    networks = {
        "stage2": f"Stage 2, {steps:,} steps",
        "vanilla-steps": f"Vanilla, {steps:,} steps",
        "vanilla": f"Vanilla, as much compute, {last_step('vanilla'):,} steps",
    }
    for cell, (name, title) in zip(top.subgridspec(1, 3), networks.items(), strict=True):
        name = f"samples-{name}-cfg{CFG}"
        title = f"{title}: a CNN recognises {100 * found[name]['agreement']:.0f} %"
        samples(figure.add_subplot(cell), name, title, classes)
    left, right = middle.subgridspec(1, 2)
    curves(figure.add_subplot(left))
    bars(figure.add_subplot(right), load_teacher(DEMO / "teacher/teacher.pt")[0].depth)
    features(figure.add_subplot(bottom), folder, classes)
    return figure


def table(found) -> str:
    """Stage 2 against vanilla after as many steps, and after the same total compute."""
    steps, more = last_step("stage2"), last_step("vanilla")
    columns = {"stage2": ("stage2", steps), "vanilla-steps": ("vanilla", steps)}
    columns["vanilla"] = "vanilla", more
    lines = [f"{'':38}{'stage 2':>10}{'vanilla':>12}{'vanilla':>12}"]
    lines.append(f"{'steps':38}" + "".join(f"{step:11,}" for _, step in columns.values()))
    total = "".join(f"{cost(*column):11,.0f}" for column in columns.values())
    lines.append(f"{'total compute, in vanilla steps':38}{total}")
    for cfg in (1, CFG):
        rows = [found[f"samples-{name}-cfg{cfg}"] for name in columns]
        shares = "".join(f"{100 * row['agreement']:9.1f} %" for row in rows)
        lines.append(f"{f'class asked for, cfg {cfg}':38}{shares}")
        distances = "".join(f"{row['FD-CNN']:11.2f}" for row in rows)
        lines.append(f"{f'FD-CNN, cfg {cfg} (lower is better)':38}{distances}")
    return "\n".join(lines)


def main():
    found, folder = judged(), LatentFolder("data/shapes")
    with models.atomic_write(DEMO / "demo.png") as file:
        draw(found, folder).savefig(file, format="png", dpi=80)
    say(f"\n{table(found)}")
    say("A CNN judges 300 samples; FD-CNN is a distance in its features, not FID. One seed.")
    say(f"Look at {DEMO}/demo.png")


if __name__ == "__main__":
    models.run(main)
