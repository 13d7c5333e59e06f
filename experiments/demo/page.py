"""The demo's page, out/demo/demo.png: what the teacher sees, what the student learns from it.

A column is a class. Above are a picture, its noisy latent, and the teacher's tokens of it as
colours: f_u, f_c and f_g = f_u + s (f_c - f_u). Below are samples, of the same noise, of four
moments of stage 2, and the losses of both stages.
"""

import re
from pathlib import Path

import numpy as np

import common
from build_teacher import load_teacher
from common import say
from experiments.checkpoints.plot import new_figure, read_log
from experiments.checkpoints.probe import both_features, find_latents, noisy, pca_rgb
from vae_latents import find_vae, to_images

DEMO = Path("out/demo")
T = 0.5  # the noise level of what is shown


def seen_by_the_teacher(path) -> tuple[dict, list[str]]:
    """({title: pictures (classes, S, S, 3) uint8}, names) of each class's first image, as it is,
    with noise, and as the teacher's tokens in three principal components of all that is shown."""
    teacher, saved = load_teacher(path)
    folder = find_latents(saved["args"]["data"], teacher, saved["meta"]["classes"])
    vae, s, depth = find_vae(None, folder.meta), saved["scale"], saved["depth"]
    labels = folder.labels.numpy()
    firsts = np.array([np.flatnonzero(labels == label)[0] for label in np.unique(labels)])
    x0, x_t, t, y = noisy(folder, firsts, T, "cpu")
    f_c, f_u = both_features(teacher, x_t, t, y, [depth])[depth]
    colours = pca_rgb(f_u, f_c, f_u + s * (f_c - f_u))
    rows = {"picture": to_images(vae, x0), f"noisy,\nt = {T:g}": to_images(vae, x_t)}
    titles = "f_u:\nno label", "f_c:\nlabel", f"f_g:\ns = {s:g}"
    return rows | dict(zip(titles, colours, strict=True)), folder.meta["classes"]


def samples(demo, classes) -> dict[str, np.ndarray]:
    """{title: pictures (classes, S, S, 3) uint8} of the samples, by the step of their network."""
    paths = {int(re.sub(r".*-", "", path.name)): path for path in demo.glob("samples-*")}
    rows = {}
    for step, path in sorted(paths.items()):
        with common.reading(path / "samples.npz", "is no file of samples; run make demo"):
            rows[f"step\n{step}"] = np.load(path / "samples.npz")["arr_0"][:classes]
    return rows


def draw_rows(figure, rows: dict, names: list[str], title: str):
    """Pictures, {title: (columns, S, S, 3)}, a row for each title and a column for each name."""
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for line, (row, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(row, fontsize=10, rotation=0, ha="right", va="center")
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(name, fontsize=9)


def draw_losses(figure, runs: dict):
    """L_diff of the runs, {name: folder}, to the left, their auxiliary losses to the right."""
    axes = figure.subplots(1, 2)
    titles = {"loss_diff": "L_diff", "loss_align": "L_align", "loss_guide": "L_guide"}
    for number, (name, run) in enumerate(runs.items()):
        log = read_log(run)
        for key in log.keys() & titles.keys():
            axis = axes[int(key != "loss_diff")]
            axis.plot(log["step"], log[key], color=f"C{number}", label=f"{titles[key]}, {name}")
    for axis in axes:
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)


def main():
    figure = new_figure(8.4, 11.4)
    above, middle, below = figure.subfigures(3, 1, height_ratios=[5, 4.1, 2.2])
    rows, names = seen_by_the_teacher(DEMO / "teacher/teacher.pt")
    draw_rows(above, rows, names, "What the teacher sees: its tokens after block dt, as colours")
    drawn = samples(DEMO, len(names))
    runs = {"stage 1": DEMO / "stage1", "stage 2": DEMO / "stage2"}
    title = "What stage 2's student draws, from the same noise (cfg 3)"
    draw_rows(middle, drawn, names, title)
    draw_losses(below, runs)
    with common.atomic_write(DEMO / "demo.png") as file:
        figure.savefig(file, format="png", dpi=110)
    say(f"Look at {DEMO}/demo.png")


if __name__ == "__main__":
    common.run(main)
