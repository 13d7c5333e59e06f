"""The experiment's table and pictures, from what tests/experiment.sh left in out/cifar10.

    python tests/experiment_report.py          # -> assets/cifar10_{curves.png,samples.jpg,features.png}, and the tables on stdout
"""
import functools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import arithmetic
from build_teacher import all_features, load_teacher, noisy, pca_rgb
from models import DEPTHS, Projector, build, load_checkpoint
from sample import grid
from train_stage1 import guided_rows
from vae_latents import LatentFolder, find_vae, to_uint8

matplotlib.use("Agg")
import matplotlib.pyplot as plt

E, ASSETS = Path("out/cifar10"), ROOT / "assets"
RUNS = {"vanilla": "vanilla SiT", "stage1": "stage 1: aligned with the velocity", "s1": "stage 2, s = 1 (f_g = f_c)", "s3": "stage 2, s = 3",
        "s10": "stage 2, s = 10", "s30": "stage 2, s = 30", "half": "stage 2, s = 10, guided for half of the steps",
        "short": "stage 2, s = 10, teacher of a quarter of the steps", "latent": "stage 2, s = 10, teacher aligned with x0",
        "drop": "stage 2, s = 10, teacher trained with 30 % null labels", "light": "stage 2, s = 30, weight 0.05 (others: 0.5)"}
CURVES = {"vanilla": ("vanilla SiT", "tab:gray"), "stage1": ("stage 1", "tab:blue"), "s10": ("Self-Transcendence", "tab:red"),
          "half": ("..., guided for half of the steps", "tab:purple"), "short": ("..., teacher of a quarter of the steps", "tab:orange")}


def judged():
    """{(kind, seed): {step: (FD-CNN, agreement)}} of every run that was measured."""
    results = {}
    for path in sorted(E.glob("*-seed*/samples-*/judged.json")):
        row, (kind, seed) = json.loads(path.read_text()), path.parent.parent.name.rsplit("-seed", 1)
        results.setdefault((kind, int(seed)), {})[int(path.parent.name.removeprefix("samples-"))] = row["FD-CNN"], row["agreement"]
    return {key: dict(sorted(results[key].items())) for key in sorted(results, key=lambda key: (list(RUNS).index(key[0]), key[1]))}


@functools.cache
def arguments(name):
    return load_checkpoint(E / name / "ckpt.pt")[1]["args"]


@functools.cache
def cost(name):
    """Multiply-adds in vanilla steps, by what runs: (a step of this run while guided or aligned, its teacher's whole training)."""
    args = arguments(name)
    if args.get("align_weight") == 0:
        return 1.0, 0.0
    model, rows = build(args["model"], 8, 4, 10), guided_rows(args["batch_size"], 1, args["t_min"], args["t_max"])
    share, projector = (rows.stop - rows.start) / args["batch_size"], Projector(model.width, args["projector_dim"])
    if "teacher" not in args:
        return 1 + share * arithmetic(model, projector), 0.0
    source = load_teacher(args["teacher"])[1]["source"]
    before = cost(Path(source["ckpt"]).parent.name)[0] * source["step"]
    return 1 + share * arithmetic(model, projector, DEPTHS[args["model"]][1]), before


def total(name, step):
    """Everything that went into the network until `step`, in vanilla steps: its teacher's training, the teacher's forwards."""
    each, before = cost(name)
    guided = min(step, arguments(name).get("guide_steps", step))
    return before + guided * each + (step - guided)


def curves(results):
    """FD-CNN and agreement over steps, and over all compute that went into the network, its teacher's training and forwards too."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharey="row", sharex="col")
    for (kind, seed), run in results.items():
        if kind not in CURVES:
            continue
        label, colour = CURVES[kind]
        for row, scale in ((0, 1), (1, 100)):
            values = [scale * value[row] for value in run.values()]
            style = dict(color=colour, marker="os^"[seed - 1], markersize=4, linestyle=["-", "--", ":"][seed - 1])
            axes[row, 0].plot(list(run), values, label=label if seed == 1 else None, **style)
            axes[row, 1].plot([total(f"{kind}-seed{seed}", step) for step in run], values, **style)
    axes[0, 0].set(ylabel="FD-CNN (lower is better)", title="at equal steps (seeds 1, 2, 3: circle, square, triangle)")
    axes[0, 1].set(title="at equal total compute, teacher counted")
    axes[1, 0].set(xlabel="optimizer steps, batch 32", ylabel="class asked for, % (higher is better)")
    axes[1, 1].set(xlabel="vanilla steps' worth of floating-point operations")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ASSETS / "cifar10_curves.png", dpi=90)


def side_by_side():
    """The same noise and labels through three networks after the same steps (sample.py --cfg 3): ten classes in columns."""
    names = {"vanilla SiT": "vanilla-seed1", "stage 1": "stage1-seed1", "Self-Transcendence": "s10-seed1"}
    sheet = Image.new("RGB", (len(names) * 490 - 10, 18 + 288), "white")
    for number, (label, name) in enumerate(names.items()):
        picture = grid(np.load(E / name / "picture/samples.npz")["arr_0"][:60], 10).resize((480, 288), Image.LANCZOS)
        sheet.paste(picture, (number * 490, 18))
        ImageDraw.Draw(sheet).text((number * 490 + 2, 3), label, fill="black")
    sheet.save(ASSETS / "cifar10_samples.jpg", quality=92)


@torch.no_grad()
def features(images=6, tile=64):
    """Rows: images. Columns: the image, then for three t: x_t, the vanilla network's h_ds, the teacher's f_c and f_g, as PCA colours."""
    vanilla, _ = load_checkpoint(E / "vanilla-seed1" / f"ckpt-{arguments('s10-seed1')['steps']:07d}.pt", weights="model")
    args = arguments("s10-seed1")
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


@torch.no_grad()
def between_classes(images=50):
    """Share of all tokens' variance that lies between the classes' means, of f_c and f_g, over `images` of each class."""
    teacher, _ = load_teacher(arguments("s10-seed1")["teacher"])
    folder = LatentFolder(arguments("s10-seed1")["data"])
    rows = np.concatenate([np.flatnonzero(folder.labels.numpy() == label)[:images] for label in range(10)])
    for t in (0.4, 0.55, 0.7):
        _, x_t, times, y = noisy(folder, rows, t, "cpu", 0)
        f_c, f_u = teacher(x_t, times, y), teacher(x_t, times, torch.full_like(y, 10))
        line = f"t = {t:g}: |f_c - f_u| / |f_u| = {((f_c - f_u).norm() / f_u.norm()).item():.2f}; between classes:"
        for name, f in (("f_c", f_c), *((f"f_g {s}", f_u + s * (f_c - f_u)) for s in (3, 10, 30))):
            means = torch.stack([f[y == label].mean(dim=(0, 1)) for label in range(10)])[y]
            share = (means - f.mean(dim=(0, 1))).square().sum() * f.shape[1] / (f - f.mean(dim=(0, 1))).square().sum()
            line += f"  {name} {100 * share.item():.0f} %"
        print(line)


if __name__ == "__main__":
    results = judged()
    steps = sorted({step for run in results.values() for step in run})
    print("| FD-CNN, agreement after | seed |" + "".join(f" {step} |" for step in steps) + " compute |\n|---|---|" + "---|" * (len(steps) + 1))
    for (kind, seed), run in results.items():
        print(f"| {RUNS[kind]} | {seed} |" + "".join(f" {run[s][0]:.1f}, {100 * run[s][1]:.1f} % |" if s in run else " |" for s in steps)
              + f" {total(f'{kind}-seed{seed}', max(run)):.0f} |")
    print("\nmean of the last 10 log lines")
    for kind, seed in results:
        last = [json.loads(line) for line in (E / f"{kind}-seed{seed}/log.jsonl").read_text().splitlines()][-10:]
        print(f"{kind} seed {seed}: " + ", ".join(f"{key} {np.mean([line[key] for line in last]):.4f}" for key in last[0] if key.startswith("loss")))
    curves(results)
    side_by_side()
    features()
    between_classes()
