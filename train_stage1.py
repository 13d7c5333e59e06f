"""Stage 1: train a SiT whose shallow block is aligned with VAE latent space. Also the training loop of stage 2.

    torchrun --nproc_per_node=8 train_stage1.py                   # SiT-XL/2 on data/imagenet256, the paper's settings
    python train_stage1.py --data data/shapes --model SiT-Ti/2    # --align-weight 0: the vanilla baseline

L = L_diff + 0.5 L_align (Self-Transcendence, arXiv 2601.07773, stage 1). The same command again continues the run.

Training is a function of the step: the data order comes from (seed, epoch); noise, t, posterior sample and label drop
of step k from (seed, k), drawn for the global batch and cut by process. So a killed run continues, on a CPU bit for
bit, and any number of processes or accumulation steps walks the same trajectory, up to the order of its sums.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from models import (DEPTHS, Parser, Projector, UserError, atomic_write, build, gather, load_file, load_state, run,
                    setup)
from sample import grid, initial_noise, sample
from vae_latents import LatentFolder, find_vae, to_uint8

FORMAT = 1  # of ckpt.pt
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense bf16
FREE_TO_CHANGE = {"data", "out", "steps", "accum", "compile", "grad_checkpoint", "device", "log_every", "save_every",
                  "sample_every", "keep", "teacher"}  # when a run is continued; everything else would be another run

# ---- Everything random, as a function of (seed, step)
def batch_indices(step, batch, N, seed):
    """Which images the global batch of `step` (from 0) holds: (batch,) int64. Every epoch is a permutation of all N."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.concatenate([permutation(N, seed, epoch)[places[places // N == epoch] % N]
                           for epoch in range(places[0] // N, places[-1] // N + 1)])

@functools.lru_cache(maxsize=2)
def permutation(N, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(N)

def draw(step, batch, shape, seed, device, label_drop=0.1):
    """What is random in a step of the global batch: t (B,), label drop (B,), posterior noise and noise (B, *shape).
    t is stratified: t_i = (i + u_i) / B. Each image's stratum is drawn evenly, for the batch comes from a random
    permutation; t covers [0, 1] with less variance than independent draws; and a range of t is a range of i.
    """
    generator = torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2 ** 32)
    u, drop = torch.rand(2, batch, generator=generator, device=device)
    posterior, noise = torch.randn(2, batch, *shape, generator=generator, device=device)
    return (torch.arange(batch, device=device) + u) / batch, drop < label_drop, posterior, noise

def guided_rows(batch, ways, t_min, t_max):
    """The slice of each of `ways` shares (way w holds strata w, w + ways, ...) in which t_min <= t <= t_max can occur.
    One slice for all shares, so shapes are static; the strata at its ends are masked exactly. (1e-3 of a stratum: more
    than rounding t to float32 can carry a sample across an edge.)
    """
    first, last = max(0, math.floor(t_min * batch - 1e-3)), min(batch, math.ceil(t_max * batch + 1e-3))
    return slice(first // ways, -(-last // ways))

# ---- The two losses
class TwoLosses(nn.Module):
    """The network, its projector and both losses: what DDP wraps and torch.compile compiles.
    forward: x_t (n, C, H, W), t (n,), y (n,), velocity as x_t, target (of the auxiliary loss) for the `rows` alone
    -> L_diff of each image (n,), auxiliary loss of each image in `rows` (m,), unmasked (None without projector).
    """
    def __init__(self, model, projector=None, depth=None, rows=None):
        super().__init__()
        self.model, self.projector, self.depth, self.rows = model, projector, depth, rows

    def forward(self, x_t, t, y, velocity, target=None):
        v, tokens = self.model(x_t, t, y, tap=self.depth)
        diff = (v.float() - velocity).square().flatten(1).mean(dim=1)
        if self.projector is None:
            return diff, None
        prediction = self.projector(tokens[self.rows])  # h_d of block `depth`, only where the mask can be 1
        return diff, (prediction.float() - target).square().flatten(1).mean(dim=1)

# ---- Latents: on the device when they fit, else read ahead from the memory map into pinned memory
def latent_stream(folder, steps, rows_of, device):
    """Yield (moments (n, 2C, H, W) float16, labels (n,)) on `device` for each step, of the images rows_of(step)."""
    on_device = device.type == "cuda" and folder.moments.nbytes < 0.3 * torch.cuda.mem_get_info(device)[0]
    if on_device or device.type == "cpu":
        moments = torch.from_numpy(folder.moments[:]).to(device) if on_device else folder.moments
        labels = folder.labels.to(device)
        for rows in map(rows_of, steps):
            if on_device:  # from pinned memory, so that the host does not wait for the device
                rows = torch.from_numpy(rows).pin_memory().to(device, non_blocking=True)
            yield torch.as_tensor(moments[rows]), labels[rows]
        return
    ready = queue.Queue(maxsize=4)

    def read():
        for rows in map(rows_of, steps):
            ready.put((torch.from_numpy(folder.moments[rows]).pin_memory(), folder.labels[rows].pin_memory()))

    threading.Thread(target=read, daemon=True).start()
    for _ in steps:
        yield tuple(x.to(device, non_blocking=True) for x in ready.get(timeout=600))  # a dead disk ends the run

# ---- The training loop of both stages
def train(args, tap, make_projector, make_target, weight, until, aux_name):
    """Train args.model on args.data into args.out with L = L_diff + weight * L_aux up to step `until`, then L_diff.
    tap: the block whose tokens the projector sees. make_projector(model) -> Projector. make_target(model, device) ->
    target(x_t, t, y, x0, velocity) for the images in the slice; called only if the run still has steps to guide.
    """
    # ---- devices and data
    device, rank, world = setup(args.device)
    folder = LatentFolder(args.data)
    meta, B = folder.meta, args.batch_size
    shape, num_classes = (meta["channels"], meta["height"], meta["width"]), len(meta["classes"])
    ways = world * args.accum  # shares of the global batch; this process works on shares rank, rank + world, ...
    if B % ways:
        raise UserError(f"--batch-size {B}: not divisible by {world} processes x --accum {args.accum}")
    n, rows = B // ways, guided_rows(B, ways, args.t_min, args.t_max)
    compiling = args.compile if args.compile is not None else device.type == "cuda"
    out, checkpoint = Path(args.out), Path(args.out) / "ckpt.pt"

    # ---- network, projector, EMA, optimizer
    torch.manual_seed(args.seed)
    model = build(args.model, meta["height"], meta["channels"], num_classes, args.qk_norm).to(device)
    model.grad_checkpoint = args.grad_checkpoint
    if not 1 <= tap <= model.depth:
        raise UserError(f"--{aux_name}-depth {tap}: {args.model} has blocks 1 to {model.depth}")
    projector = make_projector(model).to(device) if weight else None
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    weights, averages = [p.detach() for p in model.parameters()], list(ema.parameters())  # no graph of averages
    parameters = [*model.parameters(), *(projector.parameters() if projector else ())]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    start, sums = 0, torch.zeros(4, dtype=torch.float64, device=device)  # since a log line: L_diff, L_aux, grad, steps

    # ---- continue where the last checkpoint stands
    args.stage = aux_name  # so that one stage never continues the other's run
    if checkpoint.exists():
        saved = load_file(checkpoint)
        if saved.get("format") != FORMAT:
            raise UserError(f"{checkpoint}: format {saved.get('format')}, not {FORMAT}; choose another --out")
        old = saved["args"]
        changed = [f"--{key.replace('_', '-')} {old[key]} -> {value}" for key, value in vars(args).items()
                   if key in old and key not in FREE_TO_CHANGE and old[key] != value]
        changed += ["--data (other latents)"] * (saved["meta"] != meta)
        if changed:
            raise UserError(f"{checkpoint}: was trained with other arguments: {', '.join(changed)}; "
                            "give the same ones to continue it, or choose another --out")
        start = saved["step"]
        if args.steps < start:
            raise UserError(f"--steps {args.steps}: {checkpoint} is at step {start} already")
        load_state(model, saved["model"], checkpoint)
        load_state(ema, saved["ema"], checkpoint)
        if projector:
            load_state(projector, saved["projector"], checkpoint)
        optimizer.load_state_dict(saved["opt"])
        sums.copy_(torch.tensor(saved["sums"]))
        del saved
    if len(set(gather(start))) > 1:
        raise UserError(f"--out {out}: the processes see checkpoints of different steps; all machines must share it")
    if start == args.steps:
        return print(f"{checkpoint}: is at step {start}, nothing to do (--steps is the total)") if rank == 0 else None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "timing.jsonl"):  # forget what was logged after the checkpoint: it will be again
            lines = (out / name).read_text().splitlines() if (out / name).exists() else []
            with atomic_write(out / name) as file:
                for line in lines:
                    with contextlib.suppress(ValueError):  # a line cut short by a kill
                        if json.loads(line)["step"] <= start:
                            file.write(f"{line}\n".encode())
        print(f"{args.model}, {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {len(folder)} latents {shape}, "
              f"{world} x {device.type}, batch {B} = {ways} x {n}, steps {start} to {args.steps}", flush=True)

    def wrap(losses):
        losses = torch.compile(losses, dynamic=False) if compiling else losses
        gpu = [device.index] if device.type == "cuda" else None
        return losses if world == 1 else DDP(losses, gpu, gradient_as_bucket_view=True, broadcast_buffers=False,
                                             bucket_cap_mb=250)  # few: the compiled graph is cut at each bucket

    def save(step):
        """Write ckpt.pt whole or not at all; all processes learn whether it worked."""
        failure = [None]
        if rank == 0:
            try:
                with atomic_write(checkpoint) as file:
                    torch.save({"format": FORMAT, "step": step, "args": vars(args), "meta": meta, "sums": sums.tolist(),
                                "model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(),
                                "projector": projector.state_dict() if projector else None}, file)
                if step % args.save_every == 0:  # a milestone: a second name for the same file
                    milestone = out / f"ckpt-{step:07d}.pt"
                    milestone.unlink(missing_ok=True)
                    try:
                        os.link(checkpoint, milestone)
                    except OSError:  # a file system without hard links: a copy
                        with atomic_write(milestone) as file, open(checkpoint, "rb") as whole:
                            file.writelines(whole)
                    for old in sorted(out.glob("ckpt-*.pt"))[:-args.keep or None]:
                        old.unlink()
            except (UserError, OSError) as error:
                failure = [str(error)]
        if world > 1:
            dist.broadcast_object_list(failure, device="cpu")
        if failure[0]:
            raise UserError(f"stopped after step {step}: {failure[0]}; make room and run the same command again")

    # ---- signals: finish the step, save, leave; a second one leaves at once (torchrun doubles each within a moment)
    asked = []

    def on_signal(number, frame):
        if asked and time.time() - asked[0] > 1:
            os._exit(128 + number)
        asked.append(time.time())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    # ---- the steps
    mine = range(rank, ways, world)
    rows_of = lambda step: np.concatenate([batch_indices(step, B, len(folder), args.seed)[way::ways] for way in mine])
    stream = latent_stream(folder, range(start, args.steps), rows_of, device)
    target = make_target(model, device) if projector and start < until else None
    network = wrap(TwoLosses(model, projector, tap, rows) if target else TwoLosses(model))
    flops, kind = 3 * model.forward_flops(), torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in kind), None)
    pending, clock, clock_step = [], time.time(), start

    for step in range(start, args.steps):  # steps done so far
        if target and step == until:  # guidance ends: neither teacher nor projector runs from here on
            target = network = None  # not held while the next is wrapped
            network = wrap(TwoLosses(model))

        # What the whole batch sees, drawn on every process alike; then this process's shares
        t, drop, posterior, noise = draw(step, B, shape, args.seed, device, args.label_drop)
        moments, labels = next(stream)
        stats, seen = torch.zeros(2, device=device), []
        for way, moments_i, y_true in zip(mine, moments.split(n), labels.split(n)):
            share = slice(way, None, ways)
            mean, std = moments_i.float().chunk(2, dim=1)
            t_i, eps = t[share], noise[share]
            x0 = meta["scale"] * (mean + std * posterior[share])
            x_t = (1 - t_i.view(-1, 1, 1, 1)) * x0 + t_i.view(-1, 1, 1, 1) * eps
            velocity = eps - x0
            y = torch.where(drop[share], num_classes, y_true)  # the null label
            sync = contextlib.nullcontext() if world == 1 or way == mine[-1] else network.no_sync()
            with sync, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                if target:
                    inside = target(x_t[rows], t_i[rows], y_true[rows], x0[rows], velocity[rows])
                    diff, aux = network(x_t, t_i, y, velocity, inside)
                    mask = ((t_i[rows] >= args.t_min) & (t_i[rows] <= args.t_max)).float()
                    loss_aux = (aux * mask).sum() / n  # zero outside the range, then the mean over the WHOLE batch
                else:
                    diff, _ = network(x_t, t_i, y, velocity)
                    loss_aux = torch.zeros((), device=device)
                loss_diff = diff.mean()
                ((loss_diff + weight * loss_aux) / args.accum).backward()
            stats += torch.stack([loss_diff, loss_aux]).detach() / args.accum
            seen.append((t_i, diff.detach()))

        norm = nn.utils.clip_grad_norm_(parameters, args.clip)
        if world > 1:
            dist.all_reduce(stats)
            stats /= world
        bad = ~(torch.isfinite(stats).all() & torch.isfinite(norm))
        optimizer.found_inf = bad.float()  # 1: the fused kernel withholds the update; the host need not ask
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step)) if args.ema_ramp else args.ema
        torch._foreach_lerp_(averages, weights, 1 - decay)
        sums += torch.cat([stats, norm.reshape(1), torch.ones(1, device=device)])
        done = step + 1

        stop = torch.tensor(len(asked))
        if world > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)  # on the CPU, over gloo: all processes stop after the same step
        logging, saving = done % args.log_every == 0, bool(done % args.save_every == 0 or done == args.steps or stop)

        # The verdict on a step: read at once on a CPU, a step later on a GPU, when it has long been computed
        event = torch.cuda.Event() if device.type == "cuda" else None
        pending.append((done, bad.to("cpu", non_blocking=True), event, seen))
        if event:
            event.record()
        while len(pending) > (device.type == "cuda" and not (logging or saving)):
            number, verdict, event, seen = pending.pop(0)
            if event:
                event.synchronize()
            if verdict.item():
                stop_not_finite(number, seen, checkpoint, rank, world)

        if logging and rank == 0:
            loss_diff, loss_aux, grad_norm, count = sums.tolist()
            record = {"step": done, "loss_diff": loss_diff / count, f"loss_{aux_name}": loss_aux / count,
                      "grad_norm": grad_norm / count, "lr": optimizer.param_groups[0]["lr"]}
            rate, clock, clock_step = (done - clock_step) * B / (time.time() - clock), time.time(), done
            tflops = rate * flops / world / 1e12
            append(out / "log.jsonl", record)  # the same in every run of these arguments; the clock apart
            append(out / "timing.jsonl", {"step": done, "images_per_s": round(rate, 1), "tflops": round(tflops, 3)})
            print(f"step {done}/{args.steps}  diff {loss_diff / count:.4f}  {aux_name} {loss_aux / count:.4f}  "
                  f"grad {grad_norm / count:.3f}  {rate:.0f} images/s  {tflops:.2f} TFLOP/s"
                  + (f" = {100 * tflops / peak:.0f} % MFU" if peak else "")
                  + f"  {(args.steps - done) * B / rate / 60:.1f} min left", flush=True)
            sums.zero_()
        if saving:
            save(done)
        if args.sample_every and done % args.sample_every == 0 and rank == 0 and not stop:
            preview(ema, meta, args, device, out / f"grid-{done:07d}.png")
        if stop and done < args.steps:
            if rank == 0:
                print(f"stopped by a signal after step {done}, which is saved; the same command continues", flush=True)
            sys.exit(143)  # not 0: what needs the finished run must not follow
    if rank == 0:
        print(f"{checkpoint}: done at step {args.steps}", flush=True)

def append(path, record):
    """Add a line to a log. A full disk costs a warning here; it stops the run only if the checkpoint fails, too."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"warning: {path}: could not be written ({error})", file=sys.stderr)

def stop_not_finite(step, seen, checkpoint, rank, world):
    """End the run, status 3 on every process: the step was not taken, and nothing was saved after it."""
    t = sum(gather(torch.cat([t_i[~torch.isfinite(diff)] for t_i, diff in seen]).tolist()), [])
    if rank == 0:
        where = f"{len(t)} images with t from {min(t):.3f} to {max(t):.3f}" if t else "the other loss or the gradient"
        resume = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        print(f"error: step {step} is not finite ({where}); it was not taken; {resume}", file=sys.stderr, flush=True)
    if world > 1:
        dist.barrier()
    sys.exit(3)

def preview(ema, meta, args, device, path):
    """A grid of EMA samples (30 Euler steps, no guidance), always from the same noise and labels."""
    try:
        vae = find_vae(None, meta, args.data).to(device)
        y = torch.arange(30, device=device) % min(10, ema.num_classes)
        noise, _ = initial_noise(args.seed, range(len(y)), (ema.in_channels, ema.input_size, ema.input_size))
        latents = sample(ema, noise.to(device), y, ema.num_classes, steps=30, mode="euler")
        with torch.no_grad(), atomic_write(path) as file:
            grid(to_uint8(vae.decode((latents / vae.scale).float())), min(10, ema.num_classes)).save(file, format="PNG")
    except UserError as error:  # a picture is not worth the run
        print(f"warning: no preview ({error})", file=sys.stderr, flush=True)

# ---- Flags of both stages, and stage 1 itself
def training_flags(doc, out, seed, aux):
    p, flag = Parser(doc), argparse.BooleanOptionalAction
    p.add_argument("--data", default="data/imagenet256", metavar="DIR", help="latent folder (default: %(default)s)")
    p.add_argument("--out", default=out, metavar="DIR", help="gets ckpt.pt, log.jsonl, grids (default: %(default)s)")
    p.add_argument("--model", default="SiT-XL/2", help="name in models.SIZES (default: %(default)s, the paper's)")
    p.add_argument("--steps", type=int, default=400000, help="total to reach, continued or not (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=256, help="images in a step, all processes together (paper: 256)")
    p.add_argument("--accum", type=int, default=1, help="parts each process's share is worked through in (default: 1)")
    p.add_argument("--lr", type=float, default=1e-4, help="AdamW's, constant after --warmup (default: 1e-4, paper)")
    p.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up (default: 0, paper)")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default: 1.0, paper)")
    p.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights (default: 0.9999, paper)")
    p.add_argument("--ema-ramp", action="store_true", help="decay at most (1 + step) / (10 + step): for short runs")
    p.add_argument("--label-drop", type=float, default=0.1, help="share of null labels (default: 0.1, paper)")
    p.add_argument("--seed", type=int, default=seed, help="of everything random (default: %(default)s)")
    p.add_argument("--t-min", type=float, default=0.4, help=f"{aux} counts from this t on (default: 0.4, paper)")
    p.add_argument("--t-max", type=float, default=0.7, help="and up to this one (default: 0.7, paper)")
    p.add_argument("--projector-dim", type=int, default=2048, help="projector's hidden width (default: 2048, paper)")
    p.add_argument("--qk-norm", action=flag, default=True, help="LayerNorm on queries and keys (default: on, paper)")
    p.add_argument("--compile", action=flag, default=None, help="torch.compile (default: on CUDA only)")
    p.add_argument("--grad-checkpoint", action="store_true", help="recompute blocks when going back: saves memory")
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    p.add_argument("--log-every", type=int, default=100, help="steps (default: 100)")
    p.add_argument("--save-every", type=int, default=10000, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--keep", type=int, default=3, help="milestones kept beside ckpt.pt (default: 3)")
    p.add_argument("--sample-every", type=int, default=10000, help="steps between grids, or 0 (default: %(default)s)")
    return p

def checked(args):
    for name in ("steps", "batch_size", "accum", "log_every", "save_every", "keep", "projector_dim"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.t_min < args.t_max <= 1:
        raise UserError(f"--t-min {args.t_min} --t-max {args.t_max}: must satisfy 0 <= t-min < t-max <= 1")
    if args.lr <= 0 or args.clip <= 0 or args.seed < 0 or not all(0 <= x < 1 for x in (args.ema, args.label_drop)):
        raise UserError("--lr and --clip must be positive, --ema and --label-drop in [0, 1), --seed not negative")
    return args

def main():
    p = training_flags(__doc__, "out/stage1", 0, "L_align")
    p.add_argument("--align-weight", type=float, default=0.5, help="of L_align; 0 is vanilla SiT (default: 0.5, paper)")
    p.add_argument("--align-depth", type=int, help="block d1, aligned (default: by size, paper: 8 for XL, 2 for B)")
    p.add_argument("--align-target", choices=["velocity", "latent"], default="velocity",
                   help="what P1 answers: the velocity eps - x0 (default, the authors' code) or the clean latent x0")
    p.set_defaults(steps=200000)  # 40 epochs of ImageNet; the paper's teacher
    args = checked(p.parse_args())
    if args.align_weight < 0:
        raise UserError(f"--align-weight {args.align_weight}: must not be negative")
    if args.align_depth is None:
        args.align_depth = DEPTHS.get(args.model, (1, 1, 1))[0]

    def make_projector(model):  # P1: tokens of block d1 -> the answer in VAE latent space
        return Projector(model.width, args.projector_dim, to_latent=(model.patch, model.in_channels))

    def make_target(model, device):
        return lambda x_t, t, y, x0, velocity: velocity if args.align_target == "velocity" else x0

    # L_align = mean over C, H, W of (P1(h_d1) - target)^2 where 0.4 <= t <= 0.7, for all of stage 1
    train(args, args.align_depth, make_projector, make_target, args.align_weight, args.steps, "align")

if __name__ == "__main__":
    run(main)
