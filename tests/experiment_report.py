"""The experiment's table and pictures, from what tests/experiment.sh left in out/cifar10.

    python tests/experiment_report.py          # -> assets/cifar10_{curves,samples,features}.png, and the tables on stdout
"""
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from build_teacher import all_features, load_teacher, noisy, pca_rgb
from models import DEPTHS, Projector, build, load_checkpoint
from sample import grid
from train_stage1 import guided_rows
from vae_latents import LatentFolder, find_vae, to_uint8

matplotlib.use("Agg")
import matplotlib.pyplot as plt

E, ASSETS = Path("out/cifar10"), ROOT / "assets"
LEGEND = {"vanilla": ("vanilla SiT", "tab:gray"), "stage1": ("stage 1 (VAE alignment)", "tab:blue"),
          "ours": ("Self-Transcendence", "tab:red")}


def judged():
    """{run: {step: (FD-CNN, agreement)}} of every run that was measured."""
    results = {}
    for path in sorted(E.glob("*/samples-*/judged.json")):
        row = json.loads(path.read_text())
        run = results.setdefault(path.parent.parent.name, {})
        run[int(path.parent.name.removeprefix("samples-"))] = row["FD-CNN"], row["agreement"]
    return {name: dict(sorted(run.items())) for name, run in sorted(results.items())}


def arguments(name):
    return load_checkpoint(E / name / "ckpt.pt")[1]["args"]


def cost(name):
    """Multiply-adds of a training step by what runs in it, in vanilla steps: (this run's step, its teacher's whole training)."""
    args = arguments(name)
    model = build(args["model"], 8, 4, 10)
    tokens, B = (model.input_size // model.patch) ** 2, args["batch_size"]
    rows = guided_rows(B, 1, args["t_min"], args["t_max"])
    share = (rows.stop - rows.start) / B
    vanilla = 3 * model.forward_flops()
    if args.get("align_weight") == 0:
        return 1.0, 0.0
    projector = Projector(model.width, args["projector_dim"])
    head = 3 * 2 * tokens * sum(p.numel() for p in projector.parameters() if p.ndim == 2) * share
    if "teacher" not in args:
        return 1 + head / vanilla, 0.0
    _, depth, _ = DEPTHS[args["model"]]
    twice = 2 * share * model.forward_flops() * depth / model.depth
    before = Path(args["teacher"]).parent.name
    return 1 + (head + twice) / vanilla, cost(before)[0] * arguments(before)["steps"]


def curves(results):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for name, run in results.items():
        kind, _, seed = name.partition("-seed")
        if kind not in LEGEND or not seed:
            continue
        label, colour = LEGEND[kind]
        step_cost, before = cost(name)
        steps, fd = list(run), [fd for fd, _ in run.values()]
        style = dict(color=colour, marker="o", markersize=4, linestyle="-" if seed == "1" else "--")
        last = arguments(name)["steps"] if kind == "stage1" else None
        short = [s for s in steps if s <= min(max(r) for r in results.values())]
        axes[0].plot(short, fd[:len(short)], label=f"{label}, seed {seed}", **style)
        axes[1].plot([before + s * step_cost for s in steps], fd, label=f"{label}, seed {seed}", **style)
    axes[0].set(xlabel="optimizer steps of batch 32", ylabel="FD-CNN (lower is better)", title="at equal steps")
    axes[1].set(xlabel="total compute, in vanilla steps, teacher counted", title="at equal compute")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ASSETS / "cifar10_curves.png", dpi=110)


def side_by_side(results, rows=5):
    """The same noise through three networks after the same steps: ten classes in columns, `rows` images of each."""
    step = max(results["ours-seed1"])
    sheets = [grid(np.load(E / f"{name}-seed1/samples-{step}/samples.npz")["arr_0"][:10 * rows], 10).resize((480, 48 * rows), Image.LANCZOS)
              for name in LEGEND]
    sheet = Image.new("RGB", (sum(s.width for s in sheets) + 16 * (len(sheets) - 1), sheets[0].height + 18), "white")
    for number, (picture, (label, _)) in enumerate(zip(sheets, LEGEND.values())):
        sheet.paste(picture, (number * (picture.width + 16), 18))
        ImageDraw.Draw(sheet).text((number * (picture.width + 16) + 2, 3), f"{label}, {step} steps", fill="black")
    sheet.save(ASSETS / "cifar10_samples.png", optimize=True)


@torch.no_grad()
def features(images=6, tile=64):
    """Rows: images. Columns: the image, then for three t: x_t, the vanilla network's h_ds, the teacher's f_c and f_g, as PCA colours."""
    vanilla, file = load_checkpoint(E / "vanilla-seed1" / f"ckpt-{arguments('ours-seed1')['steps']:07d}.pt", weights="model")
    args = arguments("ours-seed1")
    teacher, _ = load_teacher(args["teacher"])
    _, dt, ds = DEPTHS[args["model"]]
    folder = LatentFolder(args["data"])
    vae = find_vae(None, folder.meta, args["data"])
    rows = np.array([int((folder.labels == label).nonzero()[3]) for label in range(images)])
    columns = {"image": to_uint8(vae.decode(noisy(folder, rows, 0.5, "cpu", 0)[0] / vae.scale))}
    for t in (0.4, 0.55, 0.7):
        x0, x_t, times, y = noisy(folder, rows, t, "cpu", 0)
        f_c, f_u = teacher(x_t, times, y), teacher(x_t, times, torch.full_like(y, 10))
        columns[f"x_t, t = {t:g}"] = to_uint8(vae.decode(x_t / vae.scale))
        columns[f"vanilla h_{ds}" + " " * int(10 * t)] = pca_rgb(all_features(vanilla, x_t, times, y, {ds})[ds])
        columns[f"f_c = h_{dt}" + " " * int(10 * t)] = pca_rgb(f_c)
        columns[f"f_g, s={args['guide_scale']:g}" + " " * int(10 * t)] = pca_rgb(f_u + args["guide_scale"] * (f_c - f_u))
    sheet = Image.new("RGB", (len(columns) * (tile + 6), 18 + images * (tile + 4)), "white")
    for column, (title, cells) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((column * (tile + 6), 3), title.strip(), fill="black", font_size=9)
        for row, cell in enumerate(cells):
            sheet.paste(Image.fromarray(cell).resize((tile, tile), Image.NEAREST), (column * (tile + 6), 18 + row * (tile + 4)))
    sheet.save(ASSETS / "cifar10_features.png", optimize=True)


if __name__ == "__main__":
    results = judged()
    steps = sorted({step for run in results.values() for step in run})
    print("| FD-CNN, agreement after steps |" + "".join(f" {step} |" for step in steps) + "\n|---|" + "---|" * len(steps))
    for name, run in results.items():
        print(f"| {name} |" + "".join(f" {run[s][0]:.2f}, {100 * run[s][1]:.1f} % |" if s in run else " |" for s in steps))
    for name in results:
        step_cost, before = cost(name)
        last = [json.loads(line) for line in (E / name / "log.jsonl").read_text().splitlines()][-10:]
        print(f"{name}: a step costs {step_cost:.2f} vanilla steps, its teacher {before:.0f}; last {len(last)} log lines: "
              + ", ".join(f"{key} {np.mean([line[key] for line in last]):.4f}" for key in last[0] if key.startswith("loss")))
    curves(results)
    side_by_side(results)
    features()
