"""Stage 1: train a SiT whose shallow block is aligned with VAE latent space; THE training loop.

    torchrun --nproc_per_node=8 train_stage1.py                 # SiT-XL/2, the paper's settings

L = L_diff + 0.5 L_align where 0.4 <= t <= 0.7 (Self-Transcendence, arXiv 2601.07773). Training
is a function of the step: the order of images comes from (seed, epoch), all that is random in
step k from (seed, k), drawn for the whole batch and cut into shares. So the same command again
continues a killed run, on a CPU bit for bit, for any number of processes but for rounding.
"""

import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import AdamW

import models
from models import Projector, UserError, say, setting, warn
from vae_latents import LatentFolder


@dataclass
class TrainSettings:
    data: str = "data/imagenet256"  # latent folder, from vae_latents.py
    out: str = "out/stage1"  # folder of the run: checkpoints and log.jsonl
    model: str = "SiT-XL/2"  # size and patch, as in models.SIZES
    steps: int = 400_000  # steps in all, continued or not
    batch_size: int = 256  # images in a step, all processes together
    accum: int = 1  # shares of the batch that each process does in turn
    lr: float = setting(1e-4, above=0)  # AdamW's rate, constant after the warm-up
    warmup: int = setting(0, at_least=0)  # steps of linear warm-up
    clip: float = setting(1.0, above=0)  # largest gradient norm
    ema: float = setting(0.9999, at_least=0, below=1)  # decay of the averaged weights
    ema_ramp: bool = False  # decay at most (1 + step) / (10 + step), for short runs
    label_drop: float = setting(0.1, at_least=0, below=1)  # fraction of null labels
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)  # seed of everything random
    t_min: float = setting(0.4, at_least=0, at_most=1)  # L_aux counts from here (as released: 0)
    t_max: float = setting(0.7, at_least=0, at_most=1)  # up to here (as released: 1)
    projector_dim: int = 2048  # hidden width of the projector
    qk_norm: bool = True  # LayerNorm on each head's queries and keys
    compile: bool | None = None  # torch.compile (default: on CUDA only)
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one
    log_every: int = 100  # steps between lines of the log
    save_every: int = 10_000  # steps between checkpoints
    keep: int = 3  # newest checkpoints that are kept; the last one continues


# What may differ when a run is continued; a change of the second line's is printed
FREE = set("out steps accum compile device log_every save_every keep teacher guide_scale".split())
FREE_BUT_SAID = "lr clip align_weight guide_weight"

# ---- What is random in a step, drawn for the whole batch


@functools.lru_cache(maxsize=2)
def permutation(images, seed, epoch) -> np.ndarray:
    """The order of the images in one epoch, (images,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(images)


@dataclass
class Draws:
    """All that is random in a step, for n images; `draws[rows]` cuts every field alike."""

    indices: torch.Tensor  # (n,) int64, which images of the latent folder they are
    t: torch.Tensor  # (n,), 0 = data, 1 = noise
    drop: torch.Tensor  # (n,) bool, whose label is replaced by the null label
    posterior: torch.Tensor  # (n, C, H, W), noise of the VAE's posterior
    eps: torch.Tensor  # (n, C, H, W), noise
    u: torch.Tensor  # (n,), one more uniform number, for losses that draw something themselves

    def __getitem__(self, rows):
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})


def draw(step, args, folder, device) -> Draws:
    """The draws of the whole batch, the same on every process. t is stratified: each image gets
    a uniform t, together they cover [0, 1], and a range of t is a slice of the batch."""
    B, N = args.batch_size, len(folder)
    generator = torch.Generator(device).manual_seed((args.seed * 0x9E3779B1 + step) % 2**32)
    options = {"generator": generator, "device": device}
    in_stratum, drop = torch.rand(2, B, **options)
    posterior, eps = torch.randn(2, B, *folder.shape, **options)
    u = torch.rand(B, **options)
    t = (torch.arange(B, device=device) + in_stratum) / B  # t_i in [i, i + 1) / B
    places = range(step * B, (step + 1) * B)  # epoch after epoch
    indices = [permutation(N, args.seed, i // N)[i % N] for i in places]
    return Draws(torch.tensor(indices), t, drop < args.label_drop, posterior, eps, u)


def rows_in_range(batch, shares, t_min, t_max) -> slice:
    """A slice that covers every row of a share with t_min <= t <= t_max. Row j of share w is
    stratum w + j * shares, so one slice serves all shares. `Losses` masks the extra rows."""
    first_stratum = max(0, math.floor(t_min * batch - 1e-3))  # 1e-3: the rounding of t
    end_stratum = min(batch, math.ceil(t_max * batch + 1e-3))
    return slice(first_stratum // shares, math.ceil(end_stratum / shares))


# ---- One step: the batch, the auxiliary loss, both losses


@dataclass
class Batch(Draws):
    """The draws of n images, and what the images add."""

    y: torch.Tensor  # (n,) int64, the labels
    told: torch.Tensor  # (n,) int64, the labels that the network is told: y or the null label
    x0: torch.Tensor  # (n, C, H, W), latents
    x_t: torch.Tensor  # (n, C, H, W), (1 - t) x0 + t eps
    velocity: torch.Tensor  # (n, C, H, W), eps - x0, what the network predicts


def make_batch(folder, draws) -> Batch:
    """SiT's linear interpolant (arXiv 2401.08740, section 2) of latents and a step's draws."""
    device, null_label = draws.t.device, len(folder.meta["classes"])
    moments, y = (x.to(device, non_blocking=True) for x in folder.read(draws.indices))
    mean, std = moments.float().chunk(2, dim=1)
    x0 = folder.meta["scale"] * (mean + std * draws.posterior)  # a sample of the posterior
    told = torch.where(draws.drop, null_label, y)
    noise_level = draws.t.view(-1, 1, 1, 1)
    x_t = (1 - noise_level) * x0 + noise_level * draws.eps
    return Batch(**vars(draws), y=y, told=told, x0=x0, x_t=x_t, velocity=draws.eps - x0)


class Auxiliary:
    """An auxiliary loss on the tokens of one block. One of your own is a subclass with `target`.
    L = L_diff + weight L_aux in the first `until` steps, then L_diff. L_aux is the mean over
    the WHOLE batch of distance(projector(h_depth), target), zero outside t_min <= t <= t_max."""

    name = "aux"  # in the log and the checkpoint, which another loss does not continue
    identity = None  # what must stay the same in a continued run, such as a teacher's hash
    teacher = None  # a network that is dropped when the loss ends
    ema: nn.Module  # the averaged network, set by the loop

    def __init__(self, args: TrainSettings, depth: int, weight=0.5, until=sys.maxsize):
        self.args, self.depth, self.weight, self.until = args, depth, weight, until
        self.t_min, self.t_max = args.t_min, args.t_max
        if self.t_min >= self.t_max:
            raise UserError(f"--t-min {self.t_min}: must be below --t-max {self.t_max}")

    def prepare(self, folder: LatentFolder, device: torch.device):
        """Load and check what the loss needs; called once, if any step is left that has it."""

    def projector(self, model: nn.Module) -> nn.Module:
        return Projector(model.width, hidden=self.args.projector_dim)

    def target(self, batch: Batch) -> torch.Tensor:
        """What the projector must answer, (n, ...), without gradient, for n images in range."""
        raise NotImplementedError

    def distance(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(n, ...), (n, ...) -> (n,): the mean square, unless a subclass says otherwise."""
        return (prediction - target).square().flatten(1).mean(dim=1)


class Losses(nn.Module):
    """The network and both losses in one module: what DDP wraps and torch.compile compiles."""

    def __init__(self, model, projector, auxiliary, rows):
        super().__init__()
        self.model, self.projector = model, projector
        self.auxiliary, self.rows = auxiliary, rows

    def forward(self, x_t, t, told, velocity, target=None):
        """(L_diff, L_aux), means over n images; `target` is of the images in `rows` alone."""
        aux, rows = self.auxiliary, self.rows
        taps = [aux.depth] if self.projector else []
        prediction, tokens = self.model(x_t, t, told, taps=taps)
        error = (prediction.float() - velocity).square()
        loss_diff = error.flatten(1).mean(dim=1).mean()
        if self.projector is None:
            return loss_diff, torch.zeros_like(loss_diff)
        answer = self.projector(tokens[aux.depth][rows]).float()
        mask = ((t[rows] >= aux.t_min) & (t[rows] <= aux.t_max)).float()
        distance = aux.distance(answer, target)
        if distance.shape != mask.shape:
            raise UserError(f"{aux.name}.distance: one number per image, not {distance.shape}")
        return loss_diff, (distance * mask).sum() / len(x_t)  # zero outside the range of t


class Alignment(Auxiliary):
    """Stage 1: P1 answers in latent space what the whole network does, or the clean latent."""

    name = "align"

    def projector(self, model):
        latent = model.patch, model.in_channels
        return Projector(model.width, hidden=self.args.projector_dim, to_latent=latent)

    def target(self, batch):
        return batch.velocity if self.args.align_target == "velocity" else batch.x0


# ---- The training loop of both stages


def train(args: TrainSettings, auxiliary: Auxiliary):
    """Train args.model on args.data into args.out, with `auxiliary` unless its weight is 0."""
    device, rank, world = models.setup(args.device)
    folder, shares = LatentFolder(args.data), world * args.accum
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if len(folder.meta["classes"]) == 1:
        warn(f"{args.data}: one class: its label can guide nothing")
    if args.batch_size % shares:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by {shares} shares")
    # Locked before its checkpoints are read; a new folder is made when nothing is missing
    held = models.lock(args.out) if Path(args.out).exists() else None
    newest = models.checkpoints(args.out)[:1]
    saved = continued(newest[0], args, folder, auxiliary) if newest else None
    start = saved["step"] if saved else 0
    has_aux = auxiliary.weight > 0 and start < min(auxiliary.until, args.steps)
    if has_aux:
        auxiliary.prepare(folder, device)
    same = {"latents": folder.meta["identity"], "teacher": auxiliary.identity}
    models.agree(settings=vars(args), checkpoint=start, **same)
    state = State(args, folder, device, auxiliary if has_aux else None)
    held = held or models.lock(args.out)  # until train returns
    if saved:
        state.load(saved, auxiliary)
    saved, auxiliary.ema = None, state.ema  # let go of the file: it may be deleted
    rows = rows_in_range(args.batch_size, shares, auxiliary.t_min, auxiliary.t_max)
    network = parallel(Losses(state.model, state.projector, auxiliary, rows), args)
    log = Log(args, auxiliary.name, state) if rank == 0 else None
    stop = Stop()
    say(f"{args.model} on {device}: steps {start} to {args.steps}")

    for step in range(start, args.steps):  # the number of steps done so far
        if has_aux and step == auxiliary.until:  # teacher and projector have done their work
            has_aux, network = False, None
            auxiliary.teacher = state.projector = state.projector_optimizer = None
            network = parallel(Losses(state.model, None, auxiliary, rows), args)

        draws = draw(step, args, folder, device)  # the whole batch, the same on every process
        losses = torch.zeros(2, device=device)
        for w in range(rank, shares, world):  # this process's shares of it
            batch = make_batch(folder, draws[w::shares])
            if world > 1:  # DDP averages the gradients over processes with the last share
                network.require_backward_grad_sync = w + world >= shares
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                target = auxiliary.target(batch[rows]) if has_aux else None  # stage 2: f_g
                inputs = batch.x_t, batch.t, batch.told, batch.velocity, target
                loss_diff, loss_aux = network(*inputs)
            ((loss_diff + auxiliary.weight * loss_aux) / args.accum).backward()
            losses += torch.stack([loss_diff, loss_aux]).detach() / args.accum
        if world > 1:
            dist.all_reduce(losses)  # for the log
            losses /= world
        state.update(args, losses)  # clip, AdamW, EMA

        # ---- log, save, leave
        stopping = any(models.gather(stop.asked))  # all processes stop after the same step
        logs = state.step % args.log_every == 0
        saves = state.step % args.save_every == 0 or state.step == args.steps or stopping
        if logs or saves:
            state.check_finite(args)
        if logs and rank == 0:
            log.write()
        if logs:
            state.sums.zero_()
        if saves:
            state.save(args, folder, auxiliary, rank)
        if stopping and state.step < args.steps:
            say(f"stopped by a signal after step {state.step}, which is saved; run it again")
            sys.exit(143)  # not 0: what needs the finished run must not follow
    say(f"{args.out}: done at step {args.steps}")


def parallel(losses, args):
    """Compiled and, among several processes, in DDP; few buckets, for each cuts the graph."""
    if args.compile:
        losses = torch.compile(losses, dynamic=False)
        say("compiling: on a card two minutes")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return losses
    return DDP(losses, gradient_as_bucket_view=True, bucket_cap_mb=250)


class State:
    """All that a step changes, saved and loaded whole: networks, optimizers, step, sums."""

    def __init__(self, args, folder, device, auxiliary=None):
        torch.manual_seed(args.seed)
        self.model = models.build_for(vars(args), folder.meta)
        self.projector = auxiliary.projector(self.model).to(device) if auxiliary else None
        if auxiliary and not 1 <= auxiliary.depth <= self.model.depth:
            depth = f"depth {auxiliary.depth} of the loss {auxiliary.name}"
            raise UserError(f"{depth}: {args.model} has blocks 1 to {self.model.depth}")
        self.model.to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        options = {"lr": args.lr, "betas": (0.9, 0.999), "weight_decay": 0.0, "fused": True}
        self.optimizer = AdamW(self.model.parameters(), **options)
        projecting = list(self.projector.parameters()) if self.projector else []
        self.projector_optimizer = AdamW(projecting, **options) if projecting else None
        self.step = 0  # steps done so far
        # Sums since the last line of the log: L_diff, L_aux, gradient norm, number of steps
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def parts(self) -> dict:
        """What a checkpoint holds, by name; what there is not any more is None."""
        networks = {"model": self.model, "ema": self.ema, "projector": self.projector}
        return {**networks, "opt": self.optimizer, "projector_opt": self.projector_optimizer}

    def update(self, args, losses):
        """Clip, AdamW, EMA."""
        optimizers = [o for o in (self.optimizer, self.projector_optimizer) if o]
        trained = [p for o in optimizers for p in o.param_groups[0]["params"]]
        norm = nn.utils.clip_grad_norm_(trained, args.clip)
        lr = args.lr * min(1, (self.step + 1) / max(1, args.warmup))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ramp = (1 + self.step) / (10 + self.step) if args.ema_ramp else 1.0
        weights = [p.detach() for p in self.model.parameters()]  # or autograd records it all
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - min(args.ema, ramp))
        self.sums += torch.cat([losses, norm.reshape(1), torch.ones(1, device=losses.device)])
        self.step += 1

    def check_finite(self, args):
        """End the run before what is not finite is logged or saved; `sums` keep a NaN."""
        tensors = [self.sums, *self.model.parameters(), *self.ema.parameters()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            newest = next(iter(models.checkpoints(args.out)), "the beginning")
            what = f"step {self.step} or one before is not finite (--log-every 1 finds it)"
            raise UserError(f"{what}; go on from {newest} with another --lr, --clip or weight")

    def save(self, args, folder, auxiliary, rank):
        """Write ckpt-<step>.pt whole or not at all; all processes learn whether it worked."""
        content = {name: part and part.state_dict() for name, part in self.parts().items()}
        content.update(format=models.FORMAT, step=self.step, sums=self.sums.tolist())
        content.update(args={**vars(args), "stage": auxiliary.name}, meta=folder.meta)
        content.update(identity=auxiliary.identity)
        failure, path = None, Path(args.out) / f"ckpt-{self.step:07d}.pt"
        try:
            if rank == 0:
                with models.atomic_write(path) as file:
                    torch.save(content, file)
                others = [old for old in models.checkpoints(args.out) if old != path]
                for old in [*others[args.keep - 1 :], *path.parent.glob("ckpt-*.pt.tmp")]:
                    old.unlink(missing_ok=True)  # .tmp: what a killed save has left
        except (UserError, OSError) as error:
            failure = f"stopped after step {self.step}: {error}; make room and run it again"
        if failure := models.gather(failure)[0]:
            raise UserError(failure)

    def load(self, saved, auxiliary):
        if self.projector and saved["identity"] not in (None, auxiliary.identity):
            raise UserError(f"{saved['path']}: was trained with another teacher; give that one")
        with models.reading(saved["path"], "is damaged, or of another network"):
            for name, part in self.parts().items():
                if part:
                    part.load_state_dict(copy.deepcopy(saved[name]))  # nothing stays mapped
            self.step = saved["step"]
            self.sums.copy_(torch.tensor(saved["sums"], dtype=torch.float64))


def continued(path, args, folder, auxiliary) -> dict:
    """The checkpoint at `path`; UserError if it was trained with other settings or latents."""
    with models.reading(path, models.CONVERT.format(path)):
        saved = models.load_file(path, models.FORMAT)
        before, step = saved["args"], saved["step"]
        same = saved["meta"]["identity"] == folder.meta["identity"]
        before["data"] = args.data if same else "(other latents)"
    now, wrong = {**vars(args), "stage": auxiliary.name}, []
    for key in (now.keys() & before.keys()) - FREE:
        change = f"{models.flag(key)} {before[key]} -> {now[key]}"
        if key in FREE_BUT_SAID.split() and before[key] not in (0, now[key]):
            say(f"continued with {change}")  # but after a weight of 0 no projector has learned
        elif before[key] != now[key]:
            wrong.append(change)
    if wrong:
        raise UserError(f"{path}: was trained with other settings: {', '.join(wrong)}")
    if step != int(path.stem.removeprefix("ckpt-")) or step > args.steps:
        raise UserError(f"{path}: is of step {step}, --steps {args.steps}; is its name right?")
    return {**saved, "path": path}


class Log:
    """log.jsonl, the same in every run of these settings, and the line for the terminal."""

    def __init__(self, args, name, state):
        self.args, self.name, self.state = args, name, state
        self.path, self.time, self.step = Path(args.out) / "log.jsonl", time.time(), state.step
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        with models.atomic_write(self.path) as file:  # what followed the checkpoint comes again
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a kill
                    if json.loads(line)["step"] <= state.step:
                        file.write(line + b"\n")

    def write(self):
        """Append the means since the last line, and say them."""
        *sums, count = self.state.sums.tolist()
        diff, aux, norm = (total / count for total in sums)
        step, lr = self.state.step, self.state.optimizer.param_groups[0]["lr"]
        record = {"step": step, "loss_diff": diff, f"loss_{self.name}": aux, "grad_norm": norm}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({**record, "lr": lr}) + "\n")
        except OSError as error:  # a full disk stops the run only if the checkpoint fails, too
            warn(f"{self.path}: could not be written ({error})")
        seconds = (time.time() - self.time) / (step - self.step)  # of a step
        self.time, self.step = time.time(), step
        rate, left = self.args.batch_size / seconds, (self.args.steps - step) * seconds / 60
        losses = f"step {step}/{self.args.steps}  diff {diff:.4f}  {self.name} {aux:.4f}"
        say(f"{losses}  grad {norm:.3f}  {rate:.0f} images/s  {left:.1f} min left")


class Stop:
    """The first signal asks to finish the step, save and leave; the second is Python's."""

    def __init__(self):
        self.asked, self.before = 0.0, {}  # the time of the first signal, Python's handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # Slurm's
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self.before[number] = signal.signal(number, self.hear)

    def hear(self, number, frame):
        if not self.asked:
            self.asked = time.time()
        elif time.time() > self.asked + 1:  # torchrun sends each signal twice within a moment
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)


@dataclass
class Settings(TrainSettings):
    steps: int = 200_000  # steps in all: 40 epochs of ImageNet
    align_weight: float = setting(0.5, at_least=0)  # weight of L_align; 0 is vanilla SiT
    align_depth: int | None = None  # block d1 (default: by size)
    align_target: str = setting("velocity", choices=["velocity", "latent"])  # what P1 answers


def main():
    args = models.parse_settings(Settings, __doc__)
    args.align_depth = args.align_depth or models.parse_name(args.model)[0].align_depth
    train(args, Alignment(args, args.align_depth, args.align_weight))


if __name__ == "__main__":
    models.run(main)
