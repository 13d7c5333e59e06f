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
from experiments.pictures import both_features
from experiments.plot import new_figure, read_log
from experiments.probe import noisy, pca_rgb
from experiments.report import compute
from vae_latents import LatentFolder, decode, find_vae

DEMO = Path("out/demo")
CFG = 3  # the guidance of the samples that are shown


def judged() -> dict:
    """{folder of samples: what the classifier said}."""
    rows = map(json.loads, (DEMO / "judged.jsonl").read_text().splitlines())
    return {Path(row["samples"]).parent.name: row for row in rows}


def last_step(run) -> int:
    return int(models.checkpoints(DEMO / run)[0].stem.removeprefix("ckpt-"))


def cost(run, step) -> float:
    """Total compute of a run until `step`, in steps of the vanilla student."""
    return compute(DEMO / run, step, "SiT-Ti/4")


def tiles(images) -> np.ndarray:
    """Images (rows, columns, S, S, 3) as one picture."""
    rows, columns, side = images.shape[:3]
    return images.swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def name_columns(axis, names, side):
    axis.set_xticks(np.arange(len(names)) * side + side / 2, names, fontsize=8)
    axis.set_yticks([])


def samples(axis, folder, title, classes, rows=6):
    """The first samples of a network, a class in each column."""
    with np.load(DEMO / folder / "samples.npz") as file:
        images = file["arr_0"][: 10 * rows]
    axis.imshow(tiles(images.reshape(rows, 10, *images.shape[1:])))
    axis.set_title(title, fontsize=10)
    name_columns(axis, classes, images.shape[1])


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
            axis.plot(steps, guide, color=colour, linestyle=":", label="L_guide, stage 2")
    axis.set(xlabel="steps", title="The losses: L_diff hardly tells the two apart")
    axis.legend(fontsize=8)


def bars(axis, depth):
    table = json.loads((DEMO / "probe/probe.json").read_text())["blocks"][str(depth)]
    axis.bar(
        range(len(table)), list(table.values()), color=["tab:gray", "tab:blue", *["tab:red"] * 9]
    )
    names = [name.replace("f_g ", "f_g, s = ") for name in table]
    axis.set_xticks(range(len(table)), names, fontsize=8)
    axis.set(title="How often the nearest features are of the same class", ylim=(0, 1))


@torch.no_grad()
def features(axis, folder, classes):
    """Two images of each class, and under each what the teacher makes of it, as colours."""
    teacher, file = load_teacher(DEMO / "teacher/teacher.pt")
    rows = [np.flatnonzero(folder.labels.numpy() == label)[:2] for label in range(len(classes))]
    x0, x_t, t, y = noisy(folder, np.concatenate(rows), 0.5, "cpu")
    f_c, f_u = both_features(teacher, x_t, t, y)
    images = decode(find_vae(None, folder.meta, folder.path), x0)
    side, lines = images.shape[1], [images]
    for cells in pca_rgb(f_u, f_c, extrapolate(f_c, f_u, file["scale"])):
        lines.append(cells.repeat(side // cells.shape[1], 1).repeat(side // cells.shape[2], 2))
    axis.imshow(tiles(np.stack(lines)))
    axis.set_title("The teacher's features of noisy images (t = 0.5), as colours", fontsize=10)
    name_columns(axis, classes, 2 * side)
    labels = "image", "f_u", "f_c", f"f_g, s = {file['scale']:g}"
    axis.set_yticks(np.arange(len(labels)) * side + side / 2, labels, fontsize=8)


def draw(found, folder):
    classes = folder.meta["classes"]
    figure = new_figure(13, 10)
    grid = figure.add_gridspec(3, 2, height_ratios=(6, 4, 3.6))
    networks = ("stage2", "Stage 2, Self-Transcendence"), ("vanilla", "Vanilla SiT, same compute")
    for column, (run, title) in enumerate(networks):
        name = f"samples-{run}-cfg{CFG}"
        right = 100 * found[name]["agreement"]
        title = f"{title}: {right:.0f} % are what they should be"
        samples(figure.add_subplot(grid[0, column]), name, title, classes)
    curves(figure.add_subplot(grid[1, 0]))
    bars(figure.add_subplot(grid[1, 1]), load_teacher(DEMO / "teacher/teacher.pt")[0].depth)
    features(figure.add_subplot(grid[2, :]), folder, classes)
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
    say("A CNN is the judge; FD-CNN is a distance in its features, not FID. One seed.")
    say(f"Look at {DEMO}/demo.png")


if __name__ == "__main__":
    models.run(main)
