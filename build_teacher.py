"""The teacher: the frozen stage-1 network cut at block dt, its features extrapolated as guidance extrapolates outputs.

    python build_teacher.py                   # out/stage1/ckpt.pt -> out/teacher/: teacher.pt, teacher.png, probe.json

    f_c = h_dt(x_t, t, label)    f_u = h_dt(x_t, t, null label)    f_g = f_u + s (f_c - f_u)

Self-Transcendence (arXiv 2601.07773): f_g is structurally clean, as stage 1 made it, and discriminative, as s makes it.
To choose dt and s on other data, read the table this prints: the k-NN accuracy of f_u, f_c and f_g by block and scale.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw

from models import DEPTHS, Parser, SiT, UserError, atomic_write, load_checkpoint, load_file, load_state, run, setup
from vae_latents import LatentFolder, find_vae, to_uint8

FORMAT = 1  # of teacher.pt

class Teacher(nn.Module):
    """The embedders and blocks 1..dt of a SiT, frozen: (x_t, t, y) -> h_dt (N, T, D). Takes the SiT apart."""

    def __init__(self, model, depth):
        super().__init__()
        self.depth, self.num_classes = depth, model.num_classes
        self.shape = (model.in_channels, model.input_size, model.patch, model.width)
        model.blocks, model.final_layer = model.blocks[:depth], None
        self.model = model
        self.eval().requires_grad_(False)

    def forward(self, x_t, t, y):
        h, c = self.model.embed(x_t, t, y)
        for block in self.model.blocks:
            h = block(h, c)
        return h

@torch.no_grad()
def guided_features(teacher, x_t, t, y, scale):
    """f_g = f_u + s (f_c - f_u), (N, T, D) float32, for x_t (N, C, H, W), t (N,) and true labels y (N,).
    f_c - f_u is a small difference of large numbers, and s = 30 multiplies its rounding error.
    """
    null = torch.full_like(y, teacher.num_classes)
    # f_g off by (s = 30; tests/bench.py --only precision): bfloat16 2.6 to 3.8 %, float16 0.3 to 0.5 %
    with torch.autocast(x_t.device.type, torch.float16, enabled=x_t.is_cuda):
        f = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null])).float()
    f_cond, f_uncond = f.chunk(2)
    return f_uncond + scale * (f_cond - f_uncond)

def load_teacher(path):
    """(Teacher, the file's dict) from a teacher.pt; UserError where it is absent, damaged or of another version."""
    if not Path(path).exists():
        raise UserError(f"{path}: no teacher there; make it with: python build_teacher.py --ckpt out/stage1/ckpt.pt")
    file = load_file(path)
    if file.get("format") != FORMAT or "config" not in file:
        raise UserError(f"{path}: not a teacher of format {FORMAT}; make it again with build_teacher.py")
    teacher = Teacher(SiT(**file["config"]), file["config"]["depth"])
    load_state(teacher.model, file["model"], path)
    return teacher, file

# ---- The probe and the picture
@torch.no_grad()
def all_features(model, x_t, t, y, depths):
    """Tokens (n, T, D) after each block in `depths`: {depth: tokens}."""
    h, c = model.embed(x_t, t, y)
    features = {}
    for depth, block in enumerate(model.blocks, 1):
        h = block(h, c)
        if depth in depths:
            features[depth] = h.float()
    return features

def noisy(folder, rows, t, device, seed=0):
    """(x0, x_t at one t, t (n,), labels) of images `rows`, with noise that depends on the seed alone."""
    mean, std = torch.from_numpy(folder.moments[rows]).float().chunk(2, dim=1)
    generator = torch.Generator().manual_seed(seed)
    x0 = folder.meta["scale"] * (mean + std * torch.randn(mean.shape, generator=generator))
    x_t = (1 - t) * x0 + t * torch.randn(mean.shape, generator=generator)
    return x0.to(device), x_t.to(device), torch.full((len(rows),), t, device=device), folder.labels[rows].to(device)

def knn_accuracy(features, labels, k=10):
    """Share of the second half whose k nearest neighbours (cosine) in the first half vote for its label."""
    features = nn.functional.normalize(features - features.mean(dim=0), dim=1)
    half = len(features) // 2
    near, nearest = (features[half:] @ features[:half].T).topk(min(k, half), dim=1)  # a nearer one's vote weighs more
    votes = (nn.functional.one_hot(labels[:half][nearest], int(labels.max()) + 1) * near.exp().unsqueeze(2)).sum(dim=1)
    return (votes.argmax(dim=1) == labels[half:]).double().mean().item()

def probe(model, folder, depths, scales, num, t, device):
    """k-NN accuracy of mean-pooled features by block: {depth: {"f_u": .., "f_c": .., "f_g 30": ..}}.

    Both f_c and f_g were told the label, so this measures how strongly a feature says it; f_u was not told. Pooling is
    linear, so f_g's mean is extrapolated from the means of f_c and f_u, and one pass serves every scale.
    """
    rows = np.random.default_rng(0).permutation(len(folder))[:num]
    pooled = {(depth, which): [] for depth in depths for which in "cu"}
    for part in np.array_split(rows, -(-len(rows) // 64)):
        _, x_t, times, y = noisy(folder, part, t, device, seed=int(part[0]))
        for which, labels in (("c", y), ("u", torch.full_like(y, model.num_classes))):
            for depth, tokens in all_features(model, x_t, times, labels, depths).items():
                pooled[depth, which].append(tokens.mean(dim=1))
    labels, table = folder.labels[rows].to(device), {}
    for depth in depths:
        f_c, f_u = (torch.cat(pooled[depth, which]) for which in "cu")
        features = {"f_u": f_u, "f_c": f_c, **{f"f_g {s:g}": f_u + s * (f_c - f_u) for s in scales}}
        table[depth] = {name: round(knn_accuracy(f, labels), 4) for name, f in features.items()}
    return table

def pca_rgb(tokens):
    """Tokens (n, T, D) -> (n, side, side, 3) uint8: the first three principal components over all n images."""
    n, T, D = tokens.shape
    flat = tokens.reshape(n * T, D).double()
    flat = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    colours = flat @ vectors[:, -3:].flip(1)
    low, high = torch.quantile(colours, torch.tensor([0.02, 0.98], dtype=colours.dtype, device=colours.device), dim=0)
    side = int(T ** 0.5)
    colours = ((colours - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255
    return colours.byte().reshape(n, side, side, 3).cpu().numpy()

def picture(model, folder, vae, student_depth, depth, scale, t, device, rows=8):
    """Rows = images; columns = image, noisy latent, and PCA of h_ds, f_c, f_u, f_g, as in the paper's figures."""
    each_class = [int((folder.labels == label).nonzero()[0]) for label in folder.labels.unique()[:rows]]
    x0, x_t, times, y = noisy(folder, np.array(each_class), t, device)
    with torch.no_grad():
        images = to_uint8(vae.decode(x0 / vae.scale))
    conditional = all_features(model, x_t, times, y, {student_depth, depth})
    f_uncond = all_features(model, x_t, times, torch.full_like(y, model.num_classes), {depth})[depth]
    f_cond = conditional[depth]
    f_guided = f_uncond + scale * (f_cond - f_uncond)
    latent = ((x_t[:, :3].permute(0, 2, 3, 1) / 4 + 0.5) * 255).clamp(0, 255).byte().cpu().numpy()
    columns = {"image": images, f"x_t, t = {t:g}": latent, f"h_{student_depth}": pca_rgb(conditional[student_depth]),
               f"f_c = h_{depth}": pca_rgb(f_cond), "f_u": pca_rgb(f_uncond), f"f_g, s = {scale:g}": pca_rgb(f_guided)}
    tile, head = 112, 18
    sheet = Image.new("RGB", (len(columns) * tile, head + len(y) * tile), "white")
    for column, (title, cells) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((column * tile + 4, 3), title, fill="black")
        for row, cell in enumerate(cells):
            cell = Image.fromarray(cell).resize((tile - 4, tile - 4), Image.NEAREST)
            sheet.paste(cell, (column * tile, head + row * tile))
    return sheet

def main():
    p = Parser(__doc__)
    p.add_argument("--ckpt", default="out/stage1/ckpt.pt", help="stage 1's checkpoint (default: %(default)s)")
    p.add_argument("--data", metavar="DIR", help="latent folder for probe and picture (default: the one stage 1 saw)")
    p.add_argument("--out", default="out/teacher", metavar="DIR", help="default: %(default)s")
    p.add_argument("--teacher-depth", type=int, help="block dt (default: the paper's for the size: 19 for XL, 8 for B)")
    p.add_argument("--guide-scale", type=float, default=30.0, help="s (default: 30, the authors' script)")
    p.add_argument("--weights", choices=["model", "ema"], default="model", help="raw (default, paper) or EMA")
    p.add_argument("--probe-num", type=int, help="images in the k-NN probe, or 0 (default: 2000, or 20 per class)")
    p.add_argument("--probe-scales", default="3,10,30", help="scales s to try (default: %(default)s)")
    p.add_argument("--t", type=float, default=0.5, help="noise level of probe and picture (default: 0.5)")
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = p.parse_args()
    if args.guide_scale < 1:
        raise UserError(f"--guide-scale {args.guide_scale}: must be at least 1, where f_g is f_c")
    if not 0 < args.t < 1 or (args.probe_num or 0) < 0:
        raise UserError("--t must lie between 0 and 1, and --probe-num not be negative")
    try:
        scales = [float(s) for s in args.probe_scales.split(",")]
    except ValueError:
        raise UserError(f"--probe-scales {args.probe_scales}: give numbers with commas between them, such as 3,10,30")
    if not Path(args.ckpt).exists():
        raise UserError(f"{args.ckpt}: no such checkpoint; train stage 1 first: python train_stage1.py")
    model, file = load_checkpoint(args.ckpt, weights=args.weights)
    _, depth, student_depth = DEPTHS[model.name]
    depth = depth if args.teacher_depth is None else args.teacher_depth
    if not 1 <= depth <= model.depth:
        raise UserError(f"--teacher-depth {depth}: {model.name} has blocks 1 to {model.depth}")
    made_by = file.get("args") or {}
    if (made_by if isinstance(made_by, dict) else vars(made_by)).get("align_weight") == 0:
        print(f"warning: {args.ckpt} is a vanilla run (--align-weight 0); the paper's is aligned", flush=True)
    args.probe_num = max(2000, 20 * model.num_classes) if args.probe_num is None else args.probe_num
    device, _, _ = setup(args.device)
    model, out = model.to(device), Path(args.out)
    data = args.data or (file["args"]["data"] if "meta" in file else None)
    if args.probe_num:
        if data is None:
            raise UserError("--data: the checkpoint does not say which latents it saw; name them, or --probe-num 0")
        folder = LatentFolder(data)
        vae = find_vae(None, folder.meta, data).to(device)
        depths = sorted({*range(2, model.depth + 1, max(1, model.depth // 8)), depth, student_depth})
        table = probe(model, folder, depths, scales, args.probe_num, args.t, device)
        header, num = list(table[depth]), min(args.probe_num, len(folder))
        print(f"k-NN accuracy at t = {args.t:g} of mean-pooled features; f_c and f_g were told the label, f_u was not\n"
              "block  " + "".join(f"{title:>9}" for title in header))
        for block, line in table.items():
            print(f"{block:5}  " + "".join(f"{line[title]:9.3f}" for title in header) + "   <- dt" * (block == depth))
        with atomic_write(out / "probe.json") as f:
            f.write(json.dumps({"t": args.t, "num": num, "blocks": table}, indent=1).encode())
        sheet = picture(model, folder, vae, student_depth, depth, args.guide_scale, args.t, device)
        with atomic_write(out / "teacher.png") as f:
            sheet.save(f, format="PNG")
    config = {"depth": depth, "width": model.width, "heads": model.blocks[0].attn.heads, "patch": model.patch,
              "input_size": model.input_size, "in_channels": model.in_channels, "num_classes": model.num_classes,
              "qk_norm": isinstance(model.blocks[0].attn.q_norm, nn.LayerNorm)}
    teacher = Teacher(model, depth)
    with atomic_write(out / "teacher.pt") as f:
        source = {"ckpt": str(args.ckpt), "weights": args.weights, "step": file.get("step"), "model": model.name}
        state = {key: value.cpu() for key, value in teacher.model.state_dict().items()}
        torch.save({"format": FORMAT, "config": config, "model": state, "scale": args.guide_scale, "source": source}, f)
    print(f"{out}/teacher.pt: {model.name} after step {file.get('step')}, blocks 1 to {depth} of {model.depth}, "
          f"s = {args.guide_scale:g}" + f"; look at {out}/teacher.png" * bool(args.probe_num))

if __name__ == "__main__":
    run(main)
