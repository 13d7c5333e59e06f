"""Sampling: ODE (Euler, Heun) and SDE (Euler-Maruyama) with classifier-free guidance; writes samples.npz and grid.png.

    python sample.py --ckpt out/stage2/ckpt.pt --num 100 --cfg 2
    torchrun --nproc_per_node=8 sample.py --num-images 50000 --cfg 1.9 --guidance-high 0.65   # torchrun claims --num

Image i depends on (--seed, i) alone, whatever the batch size and the number of processes. A cut-off run continues.
"""
import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from models import Parser, UserError, atomic_write, load_checkpoint, run, setup
from vae_latents import find_vae, load_vae, to_uint8

@torch.no_grad()
def sample(model, noise, y, num_classes, steps=250, mode="sde", cfg=1.0, guidance_low=0.0, guidance_high=1.0, seed=0):
    """Integrate dx = v dt (mode "euler", "heun") or REPA's reverse SDE (mode "sde") from t = 1 to 0.

    model: SiT or any callable (x, t, y) -> (velocity, ...); noise (N, C, H, W) at t = 1; y (N,) int64; `num_classes` is
    the null label. Guidance v_u + cfg (v_c - v_u) acts where guidance_low <= t <= guidance_high; elsewhere, and for
    cfg = 1, only the conditional branch is run. `seed`, for the SDE's noise: one int for each image, or the first's.
    Returns scaled latents (N, C, H, W) float64: divide by the VAE's scale before decoding. Equations: SiT, REPA.
    """
    x = noise.double()  # the state in float64, the network in its own precision
    null = torch.full_like(y, num_classes)
    dtype = next(model.parameters()).dtype if isinstance(model, torch.nn.Module) else x.dtype

    def drift(x, t):
        guided = cfg != 1.0 and guidance_low <= t <= guidance_high
        x_in, y_in = (torch.cat([x, x]), torch.cat([y, null])) if guided else (x, y)  # both branches in one batch
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            v = model(x_in.to(dtype), torch.full((len(x_in),), t, dtype=dtype, device=x.device), y_in)[0].double()
        if mode == "sde":
            score = -((1 - t) * v + x_in) / t
            v = v - 0.5 * (2 * t) * score  # w(t) = 2 t
        if guided:
            v_cond, v_uncond = v.chunk(2)
            v = v_uncond + cfg * (v_cond - v_uncond)
        return v

    if mode == "sde":
        seeds = seed if isinstance(seed, (list, tuple)) else range(seed, seed + len(x))
        generators = [torch.Generator().manual_seed(s + 1) for s in seeds]
        times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
        for t, t_next in zip(times, times[1:]):
            dt = t_next - t
            x = x + drift(x, t) * dt
            if t_next > 0:  # the last step is deterministic
                fresh = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float64) for g in generators])
                x = x + math.sqrt(2 * t * -dt) * fresh.to(x.device)
        return x
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:]):
        v = drift(x, t)
        x_next = x + (t_next - t) * v
        if mode == "heun" and t_next > 0:  # at t = 0 there is nothing left to correct with
            x_next = x + (t_next - t) * 0.5 * (v + drift(x_next, t_next))
        x = x_next
    return x

def initial_noise(seed, indices, shape):
    """Noise (n, *shape) and one seed per image, functions of (seed, index): the same image whatever the batch."""
    seeds = [int.from_bytes(hashlib.sha256(f"{seed} {i}".encode()).digest()[:4], "little") for i in indices]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]), seeds

def grid(images, columns):
    """Images (N, S, S, 3) uint8 -> one PIL image, row by row, small ones enlarged so that they can be seen."""
    rows, side = math.ceil(len(images) / columns), images.shape[1]
    sheet = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    sheet[:len(images)] = images
    sheet = sheet.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    zoom = max(1, 96 // side)
    return Image.fromarray(sheet).resize((columns * side * zoom, rows * side * zoom), Image.NEAREST)

def main():
    p = Parser(__doc__)
    p.add_argument("--ckpt", default="out/stage2/ckpt.pt", help="ours, REPA's or the authors' (default: %(default)s)")
    p.add_argument("--out", default="out/samples", metavar="DIR", help="samples.npz, grid.png (default: %(default)s)")
    p.add_argument("--model", help="size of a foreign checkpoint, such as SiT-XL/2; only checked, the file tells it")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="of the checkpoint (default: ema)")
    p.add_argument("--vae", metavar="FILE", help="VAE to decode with (default: the one that made the training latents)")
    p.add_argument("--num", "--num-images", type=int, default=100, help="images in all (default: 100; paper: 50000)")
    p.add_argument("--classes", help="comma-separated labels to cycle through (default: all classes in turn)")
    p.add_argument("--mode", choices=["euler", "heun", "sde"], default="sde", help="default: sde, Euler-Maruyama")
    p.add_argument("--steps", type=int, default=250, help="from t = 1 to 0 (default: 250; Heun: two evaluations each)")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1 is none (default: 1; paper's XL/2: 1.9)")
    p.add_argument("--guidance-low", type=float, default=0.0, help="guide only where t >= this (default: 0)")
    p.add_argument("--guidance-high", type=float, default=1.0, help="only where t <= this (default: 1; paper: 0.65)")
    p.add_argument("--batch-size", type=int, default=128, help="images at once in each process (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                   help="torch.compile (default: on CUDA, from 8 batches a process on, where it pays)")
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = p.parse_args()
    if args.num < 1 or args.steps < 1 or args.batch_size < 1:
        raise UserError("--num, --steps and --batch-size must be at least 1")
    if args.cfg < 1:
        raise UserError(f"--cfg {args.cfg}: guidance scales start at 1, which is no guidance")
    if not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise UserError("--guidance-low and --guidance-high must satisfy 0 <= low <= high <= 1")
    model, file = load_checkpoint(args.ckpt, args.model, args.weights)
    try:
        labels = [int(c) for c in args.classes.split(",")] if args.classes else list(range(model.num_classes))
    except ValueError:
        raise UserError(f"--classes {args.classes}: give whole numbers with commas between them, such as 207,360,387")
    if min(labels) < 0 or max(labels) >= model.num_classes:
        raise UserError(f"--classes {args.classes}: labels run from 0 to {model.num_classes - 1} in this checkpoint")
    if "meta" in file:
        vae = find_vae(args.vae, file["meta"], file["args"]["data"])
    elif args.vae:
        vae = load_vae(args.vae)
    else:
        raise UserError("--vae: this checkpoint does not say which VAE its latents come from; name the file")
    if vae.latent_channels != model.in_channels:
        raise UserError(f"--vae: has {vae.latent_channels} latent channels, the checkpoint {model.in_channels}")
    device, rank, world = setup(args.device)
    model, vae = model.to(device), vae.to(device, memory_format=torch.channels_last)
    many = device.type == "cuda" and args.num >= 8 * args.batch_size * world
    network = torch.compile(model) if (many if args.compile is None else args.compile) else model
    out = Path(args.out)

    # What the images depend on; parts made with anything else are not taken over
    recipe = {key: getattr(args, key) for key in ("ckpt", "weights", "vae", "num", "classes", "mode", "steps", "cfg",
                                                  "guidance_low", "guidance_high", "seed")}
    recipe.update(step=file.get("step"), modified=Path(args.ckpt).stat().st_mtime_ns)
    tag = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    part = lambda first: out / f"part-{tag}-{args.batch_size}-{first:07d}.npz"
    try:
        done = np.load(out / "samples.npz")["tag"].item() == tag
    except Exception:  # none there, half of one, or another program's
        done = False
    if done:
        return print(f"{out}/samples.npz: is complete already, nothing to do") if rank == 0 else None

    firsts, start, made = range(0, args.num, args.batch_size), time.time(), 0
    mine = firsts[rank::world]
    for number, first in enumerate(mine):
        indices = range(first, min(first + args.batch_size, args.num))
        if part(first).is_file():
            continue
        y = torch.tensor([labels[i % len(labels)] for i in indices])
        noise, seeds = initial_noise(args.seed, indices, (model.in_channels, model.input_size, model.input_size))
        latents = sample(network, noise.to(device), y.to(device), model.num_classes, args.steps, args.mode, args.cfg,
                         args.guidance_low, args.guidance_high, seeds)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            images = torch.cat([vae.decode(piece) for piece in (latents / vae.scale).float().split(32)])
        with atomic_write(part(first)) as f:
            np.savez(f, images=to_uint8(images), labels=y.numpy())
        made += len(indices)
        if rank == 0:
            rate = made / (time.time() - start)
            print(f"sampled {first + len(indices)}/{args.num}  {rate * world:.1f} images/s  "
                  f"{(len(mine) - number - 1) * args.batch_size / rate:.0f} s left", flush=True)
    if world > 1:
        dist.barrier()
    if rank == 0:
        parts = [np.load(part(first)) for first in firsts]
        images = np.concatenate([p["images"] for p in parts])
        with atomic_write(out / "grid.png") as f:
            shown = images[:min(100, len(images))]
            grid(shown, min(len(shown), len(labels) if len(labels) in range(4, 17) else 10)).save(f, format="PNG")
        with atomic_write(out / "samples.npz") as f:
            np.savez(f, arr_0=images, labels=np.concatenate([p["labels"] for p in parts]), tag=np.array(tag))
        for leftover in out.glob("part-*.npz"):
            leftover.unlink()
        print(f"{out}/samples.npz: {len(images)} images of {images.shape[1]} px; look at {out}/grid.png")

if __name__ == "__main__":
    run(main)
