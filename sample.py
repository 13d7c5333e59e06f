"""Sampling: ODE (Euler, Heun) and SDE (Euler-Maruyama) with classifier-free guidance.

    python sample.py --ckpt out/stage2 --num 100 --cfg 2
    torchrun --nproc_per_node=8 sample.py --num-images 50000 --cfg 1.9 --guidance-high 0.65

Writes samples.npz and grid.png. Image i depends on (--seed, i) alone, whatever the batch size and
the number of processes; a cut-off run continues. (torchrun claims --num, hence --num-images.)
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import models
from models import UserError, say, setting

import numpy as np
import torch
from PIL import Image

from vae_latents import chunks_to_do, decode, find_vae, load_vae, shared_array


@torch.no_grad()
def sample(model, noise, y, num_classes, steps=250, mode="sde", cfg=1.0, interval=(0, 1), seed=0):
    """Integrate dx = v dt (mode "euler", "heun") or REPA's reverse SDE ("sde") from t = 1 to 0.
    model: SiT or any callable (x, t, y) -> (velocity, ...). noise (N, C, H, W) is x at t = 1, y
    (N,) int64, `num_classes` the null label. v_u + cfg (v_c - v_u) acts where t is in `interval`;
    elsewhere only the conditional branch runs. `seed`, for the SDE's noise: one int for each image,
    or the first's. Returns scaled latents (N, C, H, W) in float64."""
    x = noise.double()  # the state in float64, the network in its own precision
    null = torch.full_like(y, num_classes)
    dtype = next(model.parameters()).dtype if isinstance(model, torch.nn.Module) else x.dtype

    def drift(x, t):
        guided = cfg != 1.0 and interval[0] <= t <= interval[1]
        x_in = torch.cat([x, x]) if guided else x  # both branches in one batch
        y_in = torch.cat([y, null]) if guided else y
        times = torch.full((len(x_in),), t, dtype=dtype, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            v = model(x_in.to(dtype), times, y_in)[0].double()
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
        for t, t_next in zip(times, times[1:], strict=False):
            dt = t_next - t
            x = x + drift(x, t) * dt
            if t_next > 0:  # the last step is deterministic
                fresh = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators]
                x = x + math.sqrt(2 * t * -dt) * torch.stack(fresh).to(x.device)
        return x
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:], strict=False):
        v = drift(x, t)
        x_next = x + (t_next - t) * v
        if mode == "heun" and t_next > 0:  # at t = 0 there is nothing left to correct with
            x_next = x + (t_next - t) * 0.5 * (v + drift(x_next, t_next))
        x = x_next
    return x


def initial_noise(seed, indices, shape):
    """Noise (n, *shape) and a seed for each image: functions of (seed, index), not of the batch."""
    hashes = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in indices]
    seeds = [int.from_bytes(h[:4], "little") for h in hashes]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), seeds


def grid(images, columns) -> Image.Image:
    """Images (N, S, S, 3) uint8, row by row, small ones enlarged so that they can be seen."""
    side = images.shape[1] * max(1, 96 // images.shape[1])
    sheet = Image.new("RGB", (columns * side, math.ceil(len(images) / columns) * side), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((side, side), Image.NEAREST)
        sheet.paste(tile, (i % columns * side, i // columns * side))
    return sheet


@dataclass
class Settings:
    ckpt: str = setting("out/stage2", "a run's folder or a checkpoint: ours, REPA's, the authors'")
    out: str = setting("out/samples", "folder for samples.npz and grid.png")
    weights: str = setting("ema", "which of the checkpoint's", choices=["ema", "model"])
    vae: str | None = setting(None, "VAE to decode with (default: the training latents')")
    num: int = setting(100, "images in all; the paper: 50000", at_least=1, alias="num-images")
    classes: str | None = setting(None, "labels or names, with commas (default: all in turn)")
    mode: str = setting("sde", "the sampler", choices=["euler", "heun", "sde"])
    steps: int = setting(250, "steps from t = 1 to 0; Heun evaluates twice in each", at_least=1)
    cfg: float = setting(1.0, "guidance scale; 1: none; the paper's XL/2: 1.9", at_least=1)
    guidance_low: float = setting(0.0, "guide where t >= this", at_least=0, at_most=1)
    guidance_high: float = setting(1.0, "and t <= this; the paper: 0.65", at_least=0, at_most=1)
    batch_size: int = setting(128, "images at once in each process", at_least=1)
    seed: int = setting(0, "seed of all noise", at_least=0)
    compile: bool | None = setting(None, "torch.compile (default: on CUDA from 8 batches on)")
    device: str = setting("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")


def main():
    args = models.parse_settings(Settings, __doc__)
    if args.guidance_low > args.guidance_high:
        raise UserError("--guidance-low and --guidance-high must satisfy low <= high")
    model, file = models.load_checkpoint(args.ckpt, args.weights)
    meta = file.get("meta")
    names = meta["classes"] if meta else [str(label) for label in range(model.num_classes)]
    known = {key: i for i, name in enumerate(names) for key in (str(i), name)}
    wanted = args.classes.split(",") if args.classes else names
    if set(wanted) - known.keys():
        labels = f"labels run from 0 to {len(names) - 1}, names from {names[0]} to {names[-1]}"
        raise UserError(f"--classes {args.classes}: not all are classes; {labels}")
    labels = [known[name] for name in wanted]
    if not meta and not args.vae:
        raise UserError("--vae: the checkpoint does not say whose latents it makes; name the file")
    vae = find_vae(args.vae, meta, file["args"]["data"]) if meta else load_vae(args.vae)
    if vae.latent_channels != model.in_channels:
        raise UserError(f"--vae: has {vae.latent_channels} channels, not {model.in_channels}")

    # What the images depend on: what was made with anything else is not taken over
    how = (args.steps, args.mode, args.cfg, (args.guidance_low, args.guidance_high))
    recipe = [how, args.num, args.seed, labels, vae.identity()]
    tag = models.fingerprint(*recipe, *model.state_dict().values())[:12]
    device, rank, world = models.setup(args.device)
    models.agree(settings=tag, batch_size=args.batch_size)
    out, samples = Path(args.out), Path(args.out) / "samples.npz"
    held = models.lock(out) if rank == 0 else None  # noqa: F841 (until main returns)
    if samples.exists():
        with models.reading(samples), np.load(samples) as old:
            if "tag" not in old or old["tag"].item() != tag:
                raise UserError(f"{samples}: holds other samples; choose another --out")
        return say(f"{samples}: is complete already, nothing to do")

    model, vae = model.to(device), vae.to(device, memory_format=torch.channels_last)
    pays = device.type == "cuda" and args.num >= 8 * args.batch_size * world
    network = torch.compile(model) if (pays if args.compile is None else args.compile) else model
    y = torch.tensor([labels[i % len(labels)] for i in range(args.num)])
    shape = (model.in_channels, model.input_size, model.input_size)
    side = model.input_size * 2 ** (len(vae.channels) - 1)
    parts = [out / f"{name}-{tag}.part.npy" for name in ("images", "done")]
    images = shared_array(parts[0], (args.num, side, side, 3), np.uint8, rank)
    done = shared_array(parts[1], (args.num,), np.uint8, rank)
    todo, made = chunks_to_do(done, args.batch_size, rank, world), 0
    progress = models.Progress("sampled", sum(map(len, todo)), world)
    for rows in todo:
        noise, seeds = initial_noise(args.seed, rows, shape)
        inputs = noise.to(device), y[rows].to(device), model.num_classes
        images[rows] = decode(vae, sample(network, *inputs, *how, seeds))
        images.flush()
        done[rows] = 1  # when the rows are on disk
        made += len(rows)
        progress(made)
    models.gather(None)  # rank 0 waits for the others
    if rank == 0:
        columns = len(labels) if len(labels) <= 40 else 10
        with models.atomic_write(out / "grid.png") as f:
            grid(images[: 10 * columns], min(columns, args.num)).save(f, format="PNG")
        with models.atomic_write(samples) as f:  # streamed from the disk
            np.savez(f, arr_0=images, labels=y.numpy(), tag=np.array(tag))
        for part in parts:
            part.unlink()
        shown = ", ".join(names[label] for label in labels) if columns == len(labels) else "mixed"
        say(f"{samples}: {args.num} images of {side} px; look at {out}/grid.png, columns: {shown}")


if __name__ == "__main__":
    models.run(main)
