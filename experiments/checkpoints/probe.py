"""Look at a network's features before they teach: a k-NN table by block and s, and a picture.

    python -m experiments.checkpoints.probe out/stage1   # -> out/probe/

To choose dt and s, read the table: the k-NN accuracy of f_u, f_c and f_g by block. f_c and f_g were
told the label, so it says how loudly they repeat the class, not how well they see it; f_u was not
told. A good s lies near the start of the plateau.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
import models
from common import UserError, progress, say, setting, warn
from experiments.latents import diffusers_vae
from vae_latents import LatentFolder, find_vae, to_images


def noisy(folder, rows, t, device, seed=0):
    """(x0, x_t, t (n,), labels) of images `rows` at one t, with noise that only `seed` decides."""
    mean, std = torch.from_numpy(folder.moments[rows]).float().chunk(2, dim=1)
    generator = torch.Generator().manual_seed(seed)
    x0 = folder.meta["scale"] * (mean + std * torch.randn(mean.shape, generator=generator))
    x_t = (1 - t) * x0 + t * torch.randn(mean.shape, generator=generator)
    times = torch.full((len(rows),), t, device=device)
    return x0.to(device), x_t.to(device), times, folder.labels[rows].to(device)


@torch.no_grad()
def both_features(model, x_t, t, y, depths) -> dict:
    """{d: (f_c, f_u)}, each (n, T, D) float32, of the blocks d in `depths`."""
    null = torch.full_like(y, model.num_classes)
    f_c, f_u = (model(x_t, t, labels, taps=depths)[1] for labels in (y, null))
    return {d: (f_c[d].float(), f_u[d].float()) for d in depths}


def knn_accuracy(features, labels, k=10) -> float:
    """Share of the second half whose k nearest in the first half (cosine) vote for its label."""
    features = F.normalize(features - features.mean(dim=0), dim=1)
    half = len(features) // 2
    near, nearest = (features[half:] @ features[:half].T).topk(min(k, half), dim=1)
    votes = F.one_hot(labels[:half][nearest], int(labels.max()) + 1)
    votes = (votes * near.exp().unsqueeze(2)).sum(dim=1)  # a nearer one's vote weighs more
    return (votes.argmax(dim=1) == labels[half:]).double().mean().item()


def probe(model, folder, depths, scales, num, t, device) -> dict:
    """{depth: {"f_u": k-NN accuracy, "f_c": .., "f_g 30": ..}} of mean-pooled features. Pooling is
    linear, so the mean of f_g is extrapolated from those of f_c and f_u."""
    rows = np.random.default_rng(0).permutation(len(folder))[:num]
    pooled = {depth: ([], []) for depth in depths}
    for part in progress("probe: batch", np.split(rows, range(64, len(rows), 64))):
        _, x_t, times, y = noisy(folder, part, t, device, seed=int(part[0]))
        for depth, both in both_features(model, x_t, times, y, depths).items():
            for parts, tokens in zip(pooled[depth], both, strict=True):
                parts.append(tokens.mean(dim=1))
    labels, table = folder.labels[rows].to(device), {}
    for depth, both in pooled.items():
        f_c, f_u = (torch.cat(parts) for parts in both)
        features = {"f_u": f_u, "f_c": f_c}
        features.update({f"f_g {s:g}": f_u + s * (f_c - f_u) for s in scales})
        table[depth] = {name: round(knn_accuracy(f, labels), 4) for name, f in features.items()}
    return table


def pca_rgb(*features) -> list[np.ndarray]:
    """Each of `features`, tokens (n, T, D), as colours (n, side, side, 3) uint8: three principal
    components of all of them together, so that the same colour means the same everywhere."""
    flat = torch.cat([tokens.flatten(0, 1) for tokens in features]).double()
    flat = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    colours = flat @ vectors[:, -3:].flip(1)
    low, high = colours.quantile(torch.tensor([0.02, 0.98]).to(colours), dim=0)
    colours = (((colours - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255).byte().cpu()
    side = int(features[0].shape[1] ** 0.5)
    parts = colours.split([tokens.shape[0] * tokens.shape[1] for tokens in features])
    return [part.reshape(-1, side, side, 3).numpy() for part in parts]


@torch.no_grad()
def picture(model, folder, vae, depth, s, t, device, rows=8) -> Image.Image:
    """Rows are images; columns the image and, as colours, f_u, f_c, f_g after block `depth`."""
    labels = folder.labels.unique()[:rows]
    firsts = np.array([int((folder.labels == label).nonzero()[0]) for label in labels])
    x0, x_t, times, y = noisy(folder, firsts, t, device)
    f_c, f_u = both_features(model, x_t, times, y, [depth])[depth]
    colours = pca_rgb(f_u, f_c, f_u + s * (f_c - f_u))
    titles = "f_u", f"f_c = h_{depth}", f"f_g, s = {s:g}"
    columns = {"image": to_images(vae, x0), **dict(zip(titles, colours, strict=True))}
    sheet = Image.new("RGB", (len(columns) * 112, 18 + len(y) * 112), "white")
    for column, (title, cells) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((column * 112 + 4, 3), title, fill="black")
        for row, cell in enumerate(cells):
            cell = Image.fromarray(cell).resize((108, 108), Image.NEAREST)
            sheet.paste(cell, (column * 112, 18 + row * 112))
    return sheet


@dataclass
class Settings:
    ckpt: str = setting("", positional=True)  # a run's folder, or one of its checkpoints
    data: str | None = None  # latent folder (default: the run's)
    vae: str | None = None  # VAE of the picture (default: the one that made the latents)
    out: str = "out/probe"  # folder for probe.json and features.png
    weights: str = setting("model", choices=["model", "ema"])  # raw weights (paper) or their EMA
    depth: int | None = setting(None, at_least=1)  # block dt (default: by size)
    num: int | None = setting(None, at_least=2)  # images (default: 20 a class, 2000 at least)
    scales: str = "3,10,30"  # scales s to try; the picture shows the last
    t: float = setting(0.5, above=0, below=1)  # noise level
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def find_latents(path, model, classes) -> LatentFolder:
    """At least two latents, of the shape and the classes that the network knows."""
    folder = LatentFolder(path)
    here = (len(folder.meta["classes"]), *folder.shape)
    known = (model.num_classes, model.in_channels, model.input_size, model.input_size)
    if here != known or len(folder) < 2:
        what = f"{len(folder)} latents, (classes, C, H, W) {here}"
        raise UserError(f"{path}: has {what}; needed: several of {known}")
    models.check_classes(path, folder.meta["classes"], classes)
    return folder


def main():
    args = common.parse_settings(Settings, __doc__)
    scales = [float(s) for s in args.scales.split(",") if re.fullmatch(r"\d+(\.\d+)?", s)]
    if len(scales) < len(args.scales.split(",")):
        raise UserError(f"--scales {args.scales}: give numbers such as 3,10,30")
    model, saved = models.load_checkpoint(args.ckpt, args.weights, null_label_for="f_u")
    size, _ = models.parse_name(saved["args"]["model"])
    depth, device = args.depth or size.teacher_depth, common.setup(args.device)[0]
    if depth > model.depth:
        raise UserError(f"--depth {depth}: the network has blocks 1 to {model.depth}")
    data, few = args.data or saved["args"].get("data"), 20 * model.num_classes
    if not data:
        raise UserError(f"{args.ckpt}: does not name its latents; give --data")
    folder = find_latents(data, model, saved["meta"]["classes"])
    num = args.num or max(2000, few)
    if min(num, len(folder)) < few or model.num_classes < 2:
        warn("to mean much, the table needs 2 classes and 20 images of each")
    through_diffusers = folder.meta["vae"].get("decoder") == "diffusers"
    find = diffusers_vae.find_vae if through_diffusers else find_vae
    vae, model = find(args.vae, folder.meta).to(device), model.to(device)
    depths = {*range(2, model.depth + 1, max(1, model.depth // 8)), depth, size.student_depth}
    table = probe(model, folder, sorted(depths), scales, num, args.t, device)
    say(f"k-NN accuracy at t = {args.t:g}; f_c and f_g were told the label, f_u was not")
    say("block  " + "".join(f"{title:>9}" for title in table[depth]))
    for block, accuracies in table.items():
        cells = "".join(f"{accuracy:9.3f}" for accuracy in accuracies.values())
        say(f"{block:5}  {cells}{'   <- dt' if block == depth else ''}")
    out = Path(args.out)
    with common.atomic_write(out / "probe.json") as file:
        file.write(json.dumps({"t": args.t, "blocks": table}, indent=1).encode())
    with common.atomic_write(out / "features.png") as file:
        picture(model, folder, vae, depth, scales[-1], args.t, device).save(file, format="PNG")
    say(f"look at {out}/features.png")


if __name__ == "__main__":
    common.run(main)
