"""Stage 1, and THE training loop, which stage 2 and every baseline run on, too.

    torchrun --nproc_per_node=8 train_stage1.py                 # SiT-XL/2, the paper's settings

In the order of reading: settings; what is random in a step; the batch; the losses; the loop; its
state; log and signals; and, last, all that is stage 1's own (Self-Transcendence, arXiv 2601.07773).

Training is a function of the step: (seed, epoch) decides the order of the images, (seed, k) all
that is random in step k. Both are drawn for the whole batch, of which each process takes its rows.
So the same command continues a killed run: bit for bit on a CPU, and to rounding with another
number of processes.
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
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import AdamW

import common
import models
from common import UserError, say, setting, warn
from models import unpatchify, xavier_linear
from vae_latents import LatentFolder


@dataclass
class TrainSettings:
    data: str = "data/imagenet256"  # latent folder, from vae_latents.py
    out: str = setting("out/stage1", change="free")  # folder of the run: checkpoints and log.jsonl
    model: str = "SiT-XL/2"  # size and patch, as in models.SIZES
    steps: int = setting(400_000, change="free")  # steps in all, continued or not
    batch_size: int = 256  # images in a step, all processes together
    accum: int = setting(1, change="free")  # shares of the batch that each process does in turn
    lr: float = setting(1e-4, above=0, change="printed")  # AdamW's rate, constant after the warm-up
    warmup: int = setting(0, at_least=0)  # steps of linear warm-up
    clip: float = setting(1.0, above=0, change="printed")  # largest gradient norm
    ema: float = setting(0.9999, at_least=0, below=1)  # decay of the averaged weights
    ema_ramp: bool = False  # decay at most (1 + step) / (10 + step), for short runs
    label_drop: float = setting(0.1, at_least=0, below=1)  # fraction of null labels
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)  # seed of everything random
    t_min: float = setting(0.4, at_least=0, at_most=1)  # L_aux counts from here (as released: 0)
    t_max: float = setting(0.7, at_least=0, at_most=1)  # up to here (as released: 1)
    projector_dim: int = 2048  # hidden width of the projector
    qk_norm: bool = True  # LayerNorm on each head's queries and keys
    compile: bool | None = setting(None, change="free")  # torch.compile (default: on CUDA only)
    device: str = setting(
        "auto", change="free"
    )  # cpu, cuda or cuda:N; auto is cuda if there is one
    log_every: int = setting(100, change="free")  # steps between lines of the log
    save_every: int = setting(10_000, change="free")  # steps between checkpoints
    keep: int = setting(
        3, change="free"
    )  # newest checkpoints that are kept; the last one continues


# ---- What is random in a step, drawn for the whole batch


@functools.lru_cache(maxsize=2)
def order_of_epoch(num_images, seed, epoch) -> np.ndarray:
    """The order of the images in one epoch, (num_images,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


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
    """The draws of the whole batch, the same on every process. q is stratified: each image gets
    a uniform q, together they cover [0, 1], and a range of t = t_of(q) is a slice of the batch."""
    B, N = args.batch_size, len(folder)
    # A generator for this step alone; the odd factor keeps the seeds of two runs apart
    generator = torch.Generator(device).manual_seed((args.seed * 0x9E3779B1 + step) % 2**32)
    options = {"generator": generator, "device": device}
    in_stratum, drop = torch.rand(2, B, **options)
    posterior, eps = torch.randn(2, B, *folder.shape, **options)
    u = torch.rand(B, **options)  # whatever is new is drawn last: older draws stay what they are
    q = (torch.arange(B, device=device) + in_stratum) / B  # q_i in [i, i + 1) / B
    places = range(step * B, (step + 1) * B)  # in all epochs, one behind the other
    indices = [order_of_epoch(N, args.seed, i // N)[i % N] for i in places]
    return Draws(torch.tensor(indices), models.t_of(q), drop < args.label_drop, posterior, eps, u)


def rows_in_range(batch_size, shares, t_min, t_max) -> slice:
    """A slice that covers every row of a share with t_min <= t <= t_max. Row j of share w is
    stratum w + j * shares, so one slice serves all shares. The losses mask the extra rows."""
    q_min, q_max = models.q_of(t_min), models.q_of(t_max)
    first_stratum = max(0, math.floor(q_min * batch_size - 1e-3))  # 1e-3: the rounding of t
    end_stratum = min(batch_size, math.ceil(q_max * batch_size + 1e-3))
    return slice(first_stratum // shares, math.ceil(end_stratum / shares))


# ---- The batch


@dataclass
class Batch(Draws):
    """The draws of n images, and what the images add."""

    y: torch.Tensor  # (n,) int64, the labels
    y_input: torch.Tensor  # (n,) int64, what the network is told: y or the null label
    x0: torch.Tensor  # (n, C, H, W), latents
    x_t: torch.Tensor  # (n, C, H, W), (1 - t) x0 + t eps
    velocity: torch.Tensor  # (n, C, H, W), eps - x0, what the network predicts


def make_batch(folder, draws) -> Batch:
    """SiT's linear interpolant (arXiv 2401.08740, section 2) of latents and a step's draws."""
    device, null_label = draws.t.device, len(folder.meta["classes"])
    moments, y = (x.to(device, non_blocking=True) for x in folder.read(draws.indices))
    mean, std = moments.float().chunk(2, dim=1)
    x0 = folder.meta["scale"] * (mean + std * draws.posterior)  # a sample of the posterior
    y_input = torch.where(draws.drop, null_label, y)
    noise_level = draws.t.view(-1, 1, 1, 1)
    x_t = (1 - noise_level) * x0 + noise_level * draws.eps
    return Batch(**vars(draws), y=y, y_input=y_input, x0=x0, x_t=x_t, velocity=draws.eps - x0)


# ---- The losses


class Projector(nn.Module):
    """An auxiliary loss's MLP, D -> hidden -> hidden -> out, on tokens (N, T, D). With
    `to_latent` = (patch, channels) it answers in latent space, (N, C, H, W): stage 1's P1."""

    def __init__(self, width, out=None, hidden=2048, to_latent=None):
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        layers.append(nn.Linear(hidden, out or width))
        if to_latent:
            patch, channels = to_latent
            layers.append(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6))
            layers.append(nn.Linear(width, patch**2 * channels))
        self.mlp, self.to_latent = nn.Sequential(*layers), to_latent
        self.apply(xavier_linear)

    def forward(self, tokens):
        answer = self.mlp(tokens)
        return unpatchify(answer, *self.to_latent) if self.to_latent else answer


class Auxiliary:
    """An auxiliary loss on the tokens of one block; for one of your own, write a subclass with
    `target`. L = L_diff + the sum of weight L_aux over all losses, each in its first `until`
    steps. L_aux is the mean over the WHOLE batch of distance(projector(h_depth), target), which
    is zero outside t_min <= t <= t_max."""

    name = "aux"  # in the log and the checkpoint; a run with other names is not continued
    identity = None  # what must stay the same in a continued run, such as a teacher's hash
    teacher = None  # a network that is dropped when the loss ends
    rows: slice  # the images of a share that can be in range, set by the loop
    ema: nn.Module  # the averaged network, set by the loop

    def __init__(self, args: TrainSettings, depth: int, weight=0.5, until=sys.maxsize):
        self.args, self.depth, self.weight, self.until = args, depth, weight, until
        self.t_min, self.t_max = args.t_min, args.t_max
        if self.t_min >= self.t_max:
            raise UserError(f"--t-min {self.t_min}: must be below --t-max {self.t_max}")

    def prepare(self, folder: LatentFolder, device: torch.device):
        """Load and check what the loss needs. Called once, if any step that has it is left."""

    def projector(self, model: nn.Module) -> nn.Module:
        return Projector(model.width, hidden=self.args.projector_dim)

    def target(self, batch: Batch) -> torch.Tensor:
        """What the projector must answer, (n, ...), without gradient, for n images in range."""
        raise NotImplementedError

    def distance(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(n, ...), (n, ...) -> (n,): the mean square, unless a subclass says otherwise."""
        return (prediction - target).square().flatten(1).mean(dim=1)


class LossNetwork(nn.Module):
    """The network with all losses on top: what DDP wraps and torch.compile compiles."""

    def __init__(self, model, projectors, losses):
        super().__init__()
        self.model, self.losses = model, losses
        self.projectors = nn.ModuleDict(projectors)  # by name, of the losses that have not ended

    def forward(self, x_t, t, y_input, velocity, targets):
        """[L_diff, L_aux of each loss], means over n images. `targets`: by name, of the images in
        the loss's rows alone; a loss without one has ended and is zero."""
        taps = [loss.depth for loss in self.losses if loss.name in targets]
        prediction, tokens = self.model(x_t, t, y_input, taps=taps)
        error = (prediction.float() - velocity).square()
        values = [error.flatten(1).mean(dim=1).mean()]
        for loss in self.losses:
            if loss.name not in targets:
                values.append(torch.zeros_like(values[0]))
                continue
            target, times = targets[loss.name], t[loss.rows]
            answer = self.projectors[loss.name](tokens[loss.depth][loss.rows]).float()
            if answer.shape != target.shape:
                shapes = f"{tuple(answer.shape)} and {tuple(target.shape)}"
                raise UserError(f"loss {loss.name}: answer and target differ in shape: {shapes}")
            distance = loss.distance(answer, target)
            if distance.shape != times.shape:
                shape = tuple(distance.shape)
                raise UserError(f"loss {loss.name}: distance must be one number an image: {shape}")
            mask = ((times >= loss.t_min) & (times <= loss.t_max)).float()
            values.append((distance * mask).sum() / len(x_t))  # over all n: zero out of range
        return values


# ---- The training loop, of both stages and all other methods


def train(args: TrainSettings, *losses: Auxiliary):
    """Train args.model on args.data into args.out, with each of `losses` whose weight is not 0."""
    device, rank, world = common.setup(args.device)
    shares = world * args.accum  # into which every batch is cut
    folder, state = begin(args, losses, device, shares)
    network = parallel(LossNetwork(state.model, state.projectors, losses), args)
    log = Log(args, losses, state, rank)
    say(f"{args.model} on {device}: steps {state.step} to {args.steps}")

    with Stop() as stop:
        for step in range(state.step, args.steps):  # the number of steps done so far
            if ended := [loss for loss in state.running if loss.until == step]:
                network = None  # its memory is free before the next one's is taken
                state.end(ended)
                network = parallel(LossNetwork(state.model, state.projectors, losses), args)

            draws = draw(step, args, folder, device)  # the whole batch, the same on every process
            values = torch.zeros(1 + len(losses), device=device)
            for w in range(rank, shares, world):  # this process's shares of it
                batch = make_batch(folder, draws[w::shares])
                if world > 1:  # DDP averages the gradients over processes with the last share
                    network.require_backward_grad_sync = w + world >= shares
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    targets = {loss.name: loss.target(batch[loss.rows]) for loss in state.running}
                    diff, *aux = network(batch.x_t, batch.t, batch.y_input, batch.velocity, targets)
                weighted = [loss.weight * value for loss, value in zip(losses, aux, strict=True)]
                ((diff + sum(weighted)) / args.accum).backward()
                values += torch.stack([diff, *aux]).detach() / args.accum
            if world > 1:
                dist.all_reduce(values)  # for the log
                values /= world
            state.update(args, values)  # clip, AdamW, EMA

            stopping = any(common.gather(stop.asked))  # all processes stop after the same step
            logs = state.step % args.log_every == 0
            saves = state.step % args.save_every == 0 or state.step == args.steps or stopping
            if logs or saves:
                state.check_finite(args)
            if logs:
                log.write()
            if saves:
                state.save(args, folder, rank)
            if stopping and state.step < args.steps:
                say(f"stopped by a signal after step {state.step}, which is saved; run it again")
                sys.exit(143)  # not 0: what needs the finished run must not follow
    say(f"{args.out}: done at step {args.steps}")


def begin(args, losses, device, shares):
    """(LatentFolder, State): everything before the first step. --out is locked before its
    checkpoints are read; a new --out is made last, when nothing is missing."""
    folder, out = LatentFolder(args.data), Path(args.out)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    names = ["diff", "model", *(loss.name for loss in losses)]
    if len(set(names)) < len(names):
        raise UserError(f"losses {', '.join(names[2:])}: each needs a name of its own")
    if len(folder.meta["classes"]) == 1:
        warn(f"{args.data}: has one class, whose label can guide nothing")
    if args.batch_size % shares:
        raise UserError(f"--batch-size {args.batch_size}: is not divisible by {shares} shares")
    for loss in losses:
        loss.rows = rows_in_range(args.batch_size, shares, loss.t_min, loss.t_max)
    lock = common.lock(out) if out.exists() else None
    newest = next(iter(models.checkpoints(out)), None)
    saved = continued(newest, args, folder, losses) if newest else None
    start = saved["step"] if saved else 0
    running = [loss for loss in losses if loss.weight > 0 and start < min(loss.until, args.steps)]
    for loss in running:
        loss.prepare(folder, device)
    identities = [folder.meta["identity"], *(loss.identity for loss in losses)]
    if len(set(common.gather(str((vars(args), start, identities))))) > 1:
        raise UserError("the processes have different settings, checkpoints, latents or teachers")
    state = State(args, folder, device, losses, running)
    state.lock = lock or common.lock(out)
    if saved:
        state.load(saved, newest)
    return folder, state


def parallel(network, args):
    """`network` compiled and, among several processes, in DDP: few buckets, because each cuts the
    compiled graph."""
    if args.compile:
        network = torch.compile(network, dynamic=False)
        say("compiling; on a GPU this takes about two minutes")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    return DDP(network, gradient_as_bucket_view=True, bucket_cap_mb=250)


def adamw(weights, args):
    """The optimizer of a network's weights. It may have groups with rates of their own."""
    return AdamW(weights, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class State:
    """All that a step changes, saved and loaded whole: networks, optimizers, step, sums."""

    def __init__(self, args, folder, device, losses=(), running=()):
        torch.manual_seed(args.seed)
        self.losses, self.running = losses, list(running)  # running: those that have not ended
        self.model = models.build_for(vars(args), folder.meta)
        networks = {"model": self.model}
        for loss in running:
            networks[loss.name] = loss.projector(self.model).to(device)
            if not 1 <= loss.depth <= self.model.depth:
                depth = f"depth {loss.depth} of the loss {loss.name}"
                raise UserError(f"{depth}: {args.model} has blocks 1 to {self.model.depth}")
        self.model.to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        for loss in losses:
            loss.ema = self.ema
        weights = {name: list(network.parameters()) for name, network in networks.items()}
        self.optimizers = {
            name: adamw(tensors, args) for name, tensors in weights.items() if tensors
        }
        self.rates = {}  # of each group, by its first weight, before the warm-up
        self.projectors = {loss.name: networks[loss.name] for loss in running}
        self.step = 0  # steps done so far
        # Sums since the last line: L_diff, each L_aux, gradient norm, number of steps
        self.sums = torch.zeros(3 + len(losses), dtype=torch.float64, device=device)
        self.groups()

    def groups(self) -> list[dict]:
        """All groups of weights. The rate that a group has when it is first seen is its own."""
        groups = [group for each in self.optimizers.values() for group in each.param_groups]
        for group in groups:
            self.rates.setdefault(group["params"][0], group["lr"])
        return groups

    def end(self, ended):
        """Forget the teacher, the projector and the optimizer of losses that have ended."""
        for loss in ended:
            self.running.remove(loss)
            loss.teacher = None
            del self.projectors[loss.name]
            self.optimizers.pop(loss.name, None)  # a projector without weights has none

    def update(self, args, values):
        """Clip, AdamW, EMA."""
        groups = self.groups()
        weights = [weight for group in groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, args.clip)
        for group in groups:
            rate = self.rates[group["params"][0]]
            group["lr"] = rate * min(1, (self.step + 1) / max(1, args.warmup))
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ramp = (1 + self.step) / (10 + self.step) if args.ema_ramp else 1.0
        weights = [p.detach() for p in self.model.parameters()]  # or autograd records it all
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - min(args.ema, ramp))
        self.sums += torch.cat([values, norm.reshape(1), torch.ones(1, device=values.device)])
        self.step += 1

    def check_finite(self, args):
        """End the run before what is not finite is logged or saved; `sums` keep a NaN."""
        tensors = [self.sums, *self.model.parameters(), *self.ema.parameters()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            newest = next(iter(models.checkpoints(args.out)), "the beginning")
            what = f"step {self.step} or one before is not finite (--log-every 1 finds it)"
            raise UserError(f"{what}; continue from {newest} with a lower --lr, --clip or weight")

    def parts(self) -> dict:
        """What has a state dict, by its name in a checkpoint; None if it is no longer there."""
        parts = {"model": self.model, "ema": self.ema, "opt": self.optimizers["model"]}
        for loss in self.losses:
            parts[self.key("projector", loss)] = self.projectors.get(loss.name)
            parts[self.key("projector_opt", loss)] = self.optimizers.get(loss.name)
        return parts

    def key(self, what, loss) -> str:
        """The name in a checkpoint of what belongs to a loss; the first loss has it as it is."""
        return what if loss is self.losses[0] else f"{what}_{loss.name}"

    def save(self, args, folder, rank):
        """Write ckpt-<step>.pt whole or not at all; all processes learn whether it worked."""
        content = {name: part and part.state_dict() for name, part in self.parts().items()}
        content.update({self.key("identity", loss): loss.identity for loss in self.losses})
        content.update(format=models.FORMAT, step=self.step, sums=self.sums.tolist())
        content.update(args=identifying(args, self.losses), meta=folder.meta)
        path = Path(args.out) / f"ckpt-{self.step:07d}.pt"
        failure = None
        try:
            if rank == 0:
                with common.atomic_write(path) as file:
                    torch.save(content, file)
                others = [old for old in models.checkpoints(args.out) if old != path]
                for old in [*others[args.keep - 1 :], *path.parent.glob("ckpt-*.pt.tmp")]:
                    old.unlink(missing_ok=True)  # .tmp: what a killed save has left
        except (UserError, OSError) as error:
            failure = f"stopped after step {self.step}: {error}; make room and run it again"
        if failure := common.gather(failure)[0]:
            raise UserError(failure)

    def load(self, saved, path):
        for loss in self.running:
            if saved[self.key("identity", loss)] not in (None, loss.identity):
                raise UserError(f"{path}: was trained with another teacher; give that one")
        with common.reading(path, "is damaged, or of another network"):
            for name, part in self.parts().items():
                if part:
                    part.load_state_dict(copy.deepcopy(saved[name]))  # nothing stays mapped
            self.step = saved["step"]
            self.sums.copy_(torch.tensor(saved["sums"], dtype=torch.float64))


def identifying(args, losses) -> dict:
    """What a checkpoint keeps of a run, to tell whether it may be continued."""
    quarters = models.t_of(torch.tensor([0.25, 0.5, 0.75])).tolist()  # the distribution of t
    names = "+".join(loss.name for loss in losses)
    return {**vars(args), "stage": names, "t_of_quarters": [round(t, 4) for t in quarters]}


def continued(path, args, folder, losses) -> dict:
    """The checkpoint at `path`; UserError if it was trained with other settings or latents."""
    saved = models.read_checkpoint(path)
    now, step = identifying(args, losses), saved["step"]
    defaults = {field.name: field.default for field in fields(args)}
    before = {**defaults, "t_of_quarters": [0.25, 0.5, 0.75], **saved["args"]}  # of older versions
    same = saved["meta"]["identity"] == folder.meta["identity"]
    before["data"] = args.data if same else "(other latents)"  # the content counts, not the path
    change = {field.name: field.metadata.get("change") for field in fields(args)}
    wrong = []
    for key in sorted(before):
        if before[key] == now.get(key) or change.get(key) == "free":
            continue
        difference = f"{common.flag(key)} {before[key]} -> {now.get(key, 'no such setting')}"
        if change.get(key) == "printed" and before[key] != 0:  # of weight 0 nothing has learned
            say(f"continued with {difference}")
        else:
            wrong.append(difference)
    if wrong:
        raise UserError(f"{path}: was trained with other settings: {', '.join(wrong)}")
    if step != int(path.stem.removeprefix("ckpt-")) or step > args.steps:
        raise UserError(f"{path}: is of step {step}; was it renamed, or --steps lowered?")
    return saved


# ---- The log, and signals


class Log:
    """log.jsonl, the same in every run of these settings, and the line for the terminal."""

    def __init__(self, args, losses, state, rank):
        self.args, self.state, self.rank = args, state, rank
        self.names = ["diff", *(loss.name for loss in losses)]
        self.path = Path(args.out) / "log.jsonl"
        self.time, self.step = time.time(), state.step
        if rank == 0 and self.path.exists():
            lines = self.path.read_bytes().splitlines()
            with common.atomic_write(self.path) as file:  # without what followed the checkpoint
                for line in lines:
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a kill
                        if json.loads(line)["step"] <= state.step:
                            file.write(line + b"\n")

    def write(self):
        """Append the means since the last line, print them, and begin new sums."""
        *sums, count = self.state.sums.tolist()
        self.state.sums.zero_()
        if self.rank > 0:
            return
        *values, norm = (total / count for total in sums)
        losses = dict(zip(self.names, values, strict=True))
        step, lr = self.state.step, self.state.optimizers["model"].param_groups[0]["lr"]
        record = {"step": step, **{f"loss_{name}": value for name, value in losses.items()}}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({**record, "grad_norm": norm, "lr": lr}) + "\n")
        except OSError as error:  # a full disk stops the run only if the checkpoint fails, too
            warn(f"{self.path}: could not be written ({error})")
        seconds = (time.time() - self.time) / (step - self.step)  # of a step
        self.time, self.step = time.time(), step
        rate, left = self.args.batch_size / seconds, (self.args.steps - step) * seconds / 60
        shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        far = f"step {step}/{self.args.steps}  {shown}  grad {norm:.3f}"
        say(f"{far}  {rate:.0f} images/s  {left:.1f} min left")


class Stop:
    """In `with Stop()`, the first signal asks to finish the step, save and leave; the second does
    what it did before."""

    def __enter__(self):
        self.asked, self.before = 0.0, {}  # the time of the first signal; the handlers before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # Slurm's
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self.before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number, frame):
        if not self.asked:
            self.asked = time.time()
        elif time.time() > self.asked + 1:  # torchrun sends each signal twice within a moment
            signal.signal(number, self.before[number])
            os.kill(os.getpid(), number)


# ---- Stage 1: L = L_diff + 0.5 L_align, where 0.4 <= t <= 0.7


class Alignment(Auxiliary):
    """P1 answers in latent space, from h_d1, what the whole network does, or the clean latent."""

    name = "align"

    def projector(self, model):
        latent = model.patch, model.in_channels
        return Projector(model.width, hidden=self.args.projector_dim, to_latent=latent)

    def target(self, batch):
        return batch.velocity if self.args.align_target == "velocity" else batch.x0


@dataclass
class Settings(TrainSettings):
    steps: int = setting(200_000, change="free")  # steps in all: 40 epochs of ImageNet
    align_weight: float = setting(0.5, at_least=0, change="printed")  # of L_align; 0: vanilla SiT
    align_depth: int | None = None  # block d1 (default: by size)
    align_target: str = setting("velocity", choices=["velocity", "latent"])  # what P1 answers


def main():
    args = common.parse_settings(Settings, __doc__)
    args.align_depth = args.align_depth or models.parse_name(args.model)[0].align_depth
    train(args, Alignment(args, args.align_depth, args.align_weight))


if __name__ == "__main__":
    common.run(main)
