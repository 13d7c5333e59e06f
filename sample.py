"""Sampling: ODE (Euler, Heun) and SDE (Euler-Maruyama) with classifier-free guidance.

    python sample.py --ckpt out/stage2 --num-images 100 --cfg 2

Writes samples.npz and grid.png; a cut-off run continues. Image i depends on (--seed, i) alone,
for any number of processes; another --batch-size rounds otherwise (a CPU: a few pixels by 1).
"""

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import models
from models import UserError, say, setting
from vae_latents import chunks_to_do, decode, find_vae, fingerprint, progress, shared_array


@torch.no_grad()
def sample(model, noise, y, num_classes, steps=250, mode="sde", cfg=1, interval=(0, 1), seeds=()):
    """Integrate dx = v dt (mode "euler", "heun") or REPA's reverse SDE ("sde") from t = 1 to 0.
    model: SiT or any callable (x, t, y) -> (velocity, ...). noise (N, C, H, W) is x at t = 1, y
    (N,) int64, `num_classes` the null label. v_u + cfg (v_c - v_u) where t is in `interval`, else
    v_c. `seeds`, for the SDE's noise: one int for each image (default: 0, 1, 2, ...). Returns
    scaled latents (N, C, H, W) in float64."""
    x = noise.double()  # the state in float64, the network in its own precision
    dtype = next(model.parameters()).dtype if isinstance(model, torch.nn.Module) else x.dtype

    def network(x, t, labels):
        times = x.new_full((len(x),), t, dtype=dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return model(x.to(dtype), times, labels)[0].double()

    def velocity(x, t):
        v_cond = network(x, t, y)
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return v_cond
        v_uncond = network(x, t, torch.full_like(y, num_classes))
        return v_uncond + cfg * (v_cond - v_uncond)

    if mode == "sde":  # Euler-Maruyama: diffusion w(t) = 2 t, drift v - w/2 score
        generators = [torch.Generator().manual_seed(s + 1) for s in seeds or range(len(x))]
        times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
        for t, t_next in pairwise(times):
            v, dt = velocity(x, t), t_next - t
            score = -((1 - t) * v + x) / t
            x = x + (v - t * score) * dt  # affine in v: a guided velocity is a guided drift
            if t_next > 0:  # the last step is deterministic
                fresh = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators]
                x = x + math.sqrt(2 * t * -dt) * torch.stack(fresh).to(x.device)
        return x
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        x_next = x + (t_next - t) * v
        if mode == "heun" and t_next > 0:  # at t = 0 there is nothing left to correct with
            x_next = x + (t_next - t) * 0.5 * (v + velocity(x_next, t_next))
        x = x_next
    return x


def initial_noise(seed, indices, shape):
    """Noise (n, *shape) and a seed for each image, functions of (seed, index) alone."""
    hashes = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in indices]
    seeds = [int.from_bytes(digest[:4], "little") for digest in hashes]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), seeds


def find_label(word: str, names: list[str]) -> int:
    """The label that a word of --classes means: a class's name, or the label itself.
    UserError for a word that means two: "name:7" and "label:7" say which."""
    found = {}
    for i, name in enumerate(names):
        if word in (name, f"name:{name}", str(i), f"label:{i}"):
            found[i] = name
    if len(found) != 1:
        known = f"name:{word} or label:{word}? Labels run from 0 to {len(names) - 1}"
        raise UserError(f"--classes {word}: is {found}; {known}")
    return next(iter(found))


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
    ckpt: str = "out/stage2"  # a run's folder, or a checkpoint
    out: str = "out/samples"  # folder for samples.npz and grid.png
    weights: str = setting("ema", choices=["ema", "model"])  # which of the checkpoint's
    vae: str | None = None  # VAE to decode with (default: the training latents')
    num_images: int = 100  # images in all; the paper: 50000
    classes: str | None = None  # names or labels, with commas (default: all)
    labels: str = setting("balanced", choices=["balanced", "random"])  # classes in turn, drawn
    mode: str = setting("sde", choices=["euler", "heun", "sde"])  # the sampler
    steps: int = 250  # steps from t = 1 to 0; Heun evaluates twice in each
    cfg: float = setting(1.0, at_least=1)  # guidance scale; 1: none; the paper's XL/2: 1.9
    guidance_low: float = setting(0.0, at_least=0, at_most=1)  # guide where t >= this
    guidance_high: float = setting(1.0, at_least=0, at_most=1)  # and t <= this; the paper: 0.65
    batch_size: int = 128  # images at once in each process
    seed: int = setting(0, at_least=0)  # seed of all noise
    compile: bool = False  # torch.compile: it pays from 8 batches on a card on
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def main():
    args = models.parse_settings(Settings, __doc__)
    if args.guidance_low > args.guidance_high:
        raise UserError("--guidance-low: must be at most --guidance-high")
    model, saved = models.load_checkpoint(args.ckpt, args.weights, "--cfg" if args.cfg != 1 else "")
    vae, names = find_vae(args.vae, saved["meta"]), saved["meta"]["classes"]
    classes, turns = list(range(len(names))), np.arange(args.num_images)
    if args.classes:
        classes = [find_label(word.strip(), names) for word in args.classes.split(",")]
    if args.labels == "random":
        turns = np.random.default_rng(args.seed).integers(2**63, size=args.num_images)
    y = torch.tensor(classes)[turns % len(classes)]
    how = (args.steps, args.mode, args.cfg, (args.guidance_low, args.guidance_high))
    # The tag is a hash of all that the images depend on
    recipe = [how, args.num_images, args.seed, y, vae.identity()]
    tag = fingerprint(*recipe, *model.state_dict().values())[:12]
    device, rank, world = models.setup(args.device)
    out, samples = Path(args.out), Path(args.out) / "samples.npz"
    parts = [out / f"{name}-{tag}.part.npy" for name in ("images", "done")]
    held = models.lock(out)  # noqa: F841 (until main returns)
    if samples.exists():
        with models.reading(samples, "not these samples; choose another --out"):
            if np.load(samples)["tag"].item() != tag:
                raise ValueError("of other settings or weights")
        return say(f"{samples}: is complete already")
    model, vae = model.to(device), vae.to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if args.compile else model
    shape = (model.in_channels, model.input_size, model.input_size)
    side = model.input_size * vae.factor
    images = shared_array(parts[0], (args.num_images, side, side, 3), np.uint8, rank)
    done = shared_array(parts[1], (args.num_images,), np.uint8, rank)
    todo = chunks_to_do(done, args.batch_size, rank, world)
    for rows in progress("sampled: batch", todo, world):
        noise, seeds = initial_noise(args.seed, rows, shape)
        inputs = noise.to(device), y[rows].to(device), model.num_classes
        images[rows] = decode(vae, sample(network, *inputs, *how, seeds))
        images.flush()
        done[rows] = 1  # when the rows are on disk
    models.gather(None)  # rank 0 waits for the others
    if rank == 0:
        columns = min(len(classes) if len(classes) <= 40 else 10, args.num_images)
        with models.atomic_write(out / "grid.png") as file:
            grid(images[: 10 * columns], columns).save(file, format="PNG")
        with models.atomic_write(samples) as file:  # streamed from the disk
            np.savez(file, arr_0=images, labels=y, tag=tag, settings=json.dumps(vars(args)))
        for part in parts:
            part.unlink()
        first_row = ", ".join(names[label] for label in y[:columns])
        say(f"{samples}: {args.num_images} images; {out}/grid.png begins with {first_row}")


if __name__ == "__main__":
    models.run(main)
