"""Stage 1 (arXiv 2601.07773), and THE training loop: stage 2 and every other method run on it.
In this order: settings, draws, losses, loop, state, log; last, stage 1 itself.

    torchrun --nproc_per_node=8 train_stage1.py                 # SiT-XL/2, the paper's settings

Training is a function of the step: (seed, epoch) decides the order of the images, (seed, k) all
that is random in step k, for the whole batch, of which each process takes its rows. So the same
command continues a killed run: on a CPU bit for bit, with more than two processes to rounding.
"""

import contextlib
import copy
import functools
import json
import math
import os
import signal
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import models
from common import UserError, fingerprint, say, setting, warn
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
    t_min: float = setting(0.4, at_least=0, at_most=1)  # L_aux counts from here (released: 0)
    t_max: float = setting(0.7, at_least=0, at_most=1)  # up to here (as released: 1)
    projector_dim: int = 2048  # hidden width of the projector
    qk_norm: bool = True  # LayerNorm on each head's queries and keys
    compile: bool | None = setting(None, change="free")  # torch.compile (default: on CUDA only)
    device: str = setting("auto", change="free")  # cpu, cuda, cuda:N; auto is cuda if there is one
    log_every: int = setting(100, change="free")  # steps between lines of the log
    save_every: int = setting(10_000, change="free")  # steps between checkpoints
    keep: int = setting(3, change="free")  # newest checkpoints to keep; the last one continues
    snapshots: int | None = setting(None, change="free")  # steps between averages, all kept
    init: str | None = None  # start from this checkpoint's average or weights, not at random


@functools.lru_cache(maxsize=2)
def order_of_epoch(num_images, seed, epoch) -> np.ndarray:
    """The order of the images in one epoch, (num_images,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


@dataclass
class Batch:
    """What a step knows of n images; make_batch adds y and the rest. [rows] cuts all alike."""

    indices: torch.Tensor  # (n,) int64, which images of the latent folder they are
    t: torch.Tensor  # (n,), 0 = data, 1 = noise
    drop: torch.Tensor  # (n,) bool, whose label is replaced by the null label
    posterior: torch.Tensor  # (n, C, H, W), noise of the VAE's posterior
    eps: torch.Tensor  # (n, C, H, W), noise
    u: torch.Tensor  # (n,), one more uniform number, for losses that draw something themselves
    y: torch.Tensor = None  # (n,) int64, the labels
    y_input: torch.Tensor = None  # (n,) int64, what the network is told: y or the null label
    x0: torch.Tensor = None  # (n, C, H, W), latents
    x_t: torch.Tensor = None  # (n, C, H, W), (1 - t) x0 + t eps
    velocity: torch.Tensor = None  # (n, C, H, W), eps - x0, what the network predicts

    def __getitem__(self, rows):
        return Batch(**{name: x[rows] for name, x in vars(self).items() if x is not None})


def draw(step, args, folder, device) -> Batch:
    """The draws of the whole batch, alike on every process. q is stratified: each image gets a
    uniform q, together they cover [0, 1], and a range of t = t_of(q) is a slice of the batch."""
    B, N = args.batch_size, len(folder)
    # A generator for this step alone; the odd factor keeps the seeds of two runs apart
    generator = torch.Generator(device).manual_seed((args.seed * 0x9E3779B1 + step) % 2**32)
    options = {"generator": generator, "device": device}
    in_stratum, drop = torch.rand(2, B, **options)
    posterior, eps = torch.randn(2, B, *folder.shape, **options)
    u = torch.rand(B, **options)  # whatever is new is drawn last, so that older draws stay
    q = (torch.arange(B, device=device) + in_stratum) / B  # q_i in [i, i + 1) / B
    places = range(step * B, (step + 1) * B)  # in all epochs, one behind the other
    indices = [order_of_epoch(N, args.seed, i // N)[i % N] for i in places]
    return Batch(torch.tensor(indices), models.t_of(q), drop < args.label_drop, posterior, eps, u)


def rows_in_range(batch_size, shares, t_min, t_max) -> slice:
    """A slice that covers every row of a share with t_min <= t <= t_max. Row j of share w is
    stratum w + j * shares, so one slice serves all shares. The losses mask the extra rows."""
    q_min, q_max = models.q_of(t_min), models.q_of(t_max)
    first_stratum = max(0, math.floor(q_min * batch_size - 1e-3))  # 1e-3: the rounding of t
    end_stratum = min(batch_size, math.ceil(q_max * batch_size + 1e-3))
    return slice(first_stratum // shares, math.ceil(end_stratum / shares))


def make_batch(folder, draws) -> Batch:
    """SiT's linear interpolant (arXiv 2401.08740, section 2) of latents and a step's draws."""
    device, null_label = draws.t.device, len(folder.meta["classes"])
    moments, y = (x.to(device, non_blocking=True) for x in folder.read(draws.indices))
    mean, std = moments.float().chunk(2, dim=1)  # each (n, C, H, W)
    x0 = folder.meta["scale"] * (mean + std * draws.posterior)  # a sample of the posterior
    y_input = torch.where(draws.drop, null_label, y)
    noise_level = draws.t.view(-1, 1, 1, 1)
    x_t = (1 - noise_level) * x0 + noise_level * draws.eps
    return replace(draws, y=y, y_input=y_input, x0=x0, x_t=x_t, velocity=draws.eps - x0)


class Projector(nn.Module):
    """An auxiliary loss's MLP, D -> hidden -> hidden -> out, on tokens (N, T, D). With
    `to_latent` = (patch, channels) it answers in latent space, (N, C, H, W): stage 1's P1."""

    def __init__(self, width, out=None, hidden=2048, to_latent=None):
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        layers += [nn.Linear(hidden, out or width)]
        if to_latent:
            layers += [nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)]
            layers += [nn.Linear(width, to_latent[0] ** 2 * to_latent[1])]
        self.mlp, self.to_latent = nn.Sequential(*layers), to_latent
        self.apply(models.xavier_linear)

    def forward(self, tokens):
        if self.to_latent is None:
            return self.mlp(tokens)
        return models.unpatchify(self.mlp(tokens), self.to_latent[0], self.to_latent[1])


class Auxiliary:
    """An auxiliary loss on the tokens of one block; for one of your own, write a subclass with
    `target`. L = L_diff + weight L_aux of each loss in its first `until` steps. L_aux: mean over
    the WHOLE batch of distance(projector(h_depth), target), 0 outside t_min <= t <= t_max."""

    name = "aux"  # in the log and the checkpoint; a run with other names is not continued
    identity = None  # what must stay the same in a continued run, such as a teacher's hash
    teacher = None  # a network that is dropped when the loss ends
    module = optimizer = rows = ema = None  # set by the loop: projector, its AdamW, slice, EMA

    def __init__(self, args: TrainSettings, depth: int, weight=0.5, until=math.inf):
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

    def __init__(self, model, losses):
        super().__init__()
        self.model, self.losses = model, losses
        self.projectors = nn.ModuleList(loss.module for loss in losses if loss.module)

    def forward(self, x_t, t, y_input, velocity, targets):
        """[L_diff, L_aux of each loss], means over n images; a target of None: it has ended."""
        taps = [loss.depth for loss in self.losses if loss.module]  # None: ended, or weight 0
        prediction, tokens = self.model(x_t, t, y_input, taps=taps)
        values = [(prediction.float() - velocity).square().flatten(1).mean(dim=1).mean()]
        for loss, target in zip(self.losses, targets, strict=True):
            if target is None:
                values.append(torch.zeros_like(values[0]))
                continue
            times = t[loss.rows]
            answer = loss.module(tokens[loss.depth][loss.rows]).float()
            distance = loss.distance(answer, target)
            if (answer.shape, distance.shape) != (target.shape, times.shape):
                shapes = [*answer.shape], [*target.shape], [*distance.shape]
                raise UserError(f"loss {loss.name}: answer, target, distance do not fit: {shapes}")
            mask = ((times >= loss.t_min) & (times <= loss.t_max)).float()
            values.append((distance * mask).sum() / len(x_t))  # over all n, not those in range
        return values


def train(args: TrainSettings, *losses: Auxiliary):
    """Train args.model on args.data into args.out, with all `losses` whose weight is not 0."""
    device, rank, world = common.setup(args.device)
    shares = world * args.accum  # into which every batch is cut
    folder, state = begin(args, losses, device, shares)  # from scratch, or from a checkpoint
    network = parallel(LossNetwork(state.model, losses), args)
    log = Log(args, losses, state, rank)
    say(f"{args.model} on {device}: steps {state.step} to {args.steps}")

    with heard_signals() as heard:
        for step in range(state.step, args.steps):  # the number of steps done so far
            if ended := [loss for loss in losses if loss.module and loss.until == step]:
                network = None  # its memory is free before the next one's is taken
                for loss in ended:
                    loss.teacher = loss.module = loss.optimizer = None
                network = parallel(LossNetwork(state.model, losses), args)

            draws = draw(step, args, folder, device)  # the whole batch, alike on every process
            values = torch.zeros(1 + len(losses), device=device)  # the step's losses
            for w in range(rank, shares, world):  # this process's shares of it
                batch = make_batch(folder, draws[w::shares])
                if world > 1:  # DDP averages the gradients over processes with the last share
                    network.require_backward_grad_sync = w + world >= shares
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    targets = [loss.module and loss.target(batch[loss.rows]) for loss in losses]
                    diff, *aux = network(batch.x_t, batch.t, batch.y_input, batch.velocity, targets)
                added = sum(loss.weight * value for loss, value in zip(losses, aux, strict=True))
                ((diff + added) / args.accum).backward()
                values += torch.stack([diff, *aux]).detach() / args.accum
            if world > 1:
                dist.all_reduce(values)  # for the log
                values /= world
            state.update(args, values)  # clip, AdamW, EMA

            stopping = any(common.gather(bool(heard)))  # all processes stop after the same step
            if state.step % args.log_every == 0:
                log.write()
            if args.snapshots and state.step % args.snapshots == 0:
                state.save(args, folder, rank, "snapshot")
            if stopping or state.step % args.save_every == 0 or state.step == args.steps:
                state.save(args, folder, rank, "ckpt")
            if stopping and state.step < args.steps:
                say(f"stopped by a signal after step {state.step}, which is saved; run it again")
                raise SystemExit(143)  # not 0: what needs the finished run must not follow
    say(f"{args.out}: done at step {args.steps}")


def begin(args, losses, device, shares):
    """(LatentFolder, State). --out is locked before it is read; a new one is made last."""
    folder = LatentFolder(args.data)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    args.stage = "+".join(loss.name for loss in losses)  # what a continued run must repeat
    args.t_of_quarters = str(models.t_of(torch.tensor([0.25, 0.5, 0.75])))  # t's distribution
    if len({"diff", *(loss.name for loss in losses)}) <= len(losses):
        raise UserError(f"losses {args.stage}: each needs a name of its own")
    if len(folder.meta["classes"]) == 1:
        warn(f"{args.data}: has one class, whose label can guide nothing")
    if args.batch_size % shares:
        raise UserError(f"--batch-size {args.batch_size}: is not divisible by {shares} shares")
    init = args.init and (args.init, *models.load_checkpoint(args.init, "best"))
    args.init = init and fingerprint(*init[1].state_dict().values())[:12]  # by content
    lock = common.lock(args.out) if Path(args.out).exists() else None
    newest = next(iter(models.checkpoints(args.out)), None)
    saved = continued(newest, args, folder) if newest else None
    start = saved["step"] if saved else 0
    running = [loss for loss in losses if loss.weight > 0 and start < min(loss.until, args.steps)]
    for loss in running:
        loss.prepare(folder, device)  # such as a teacher, of which it sets the identity
    ours = vars(args), start, folder.meta["identity"], [loss.identity for loss in losses]
    if len(set(common.gather(str(ours)))) > 1:
        raise UserError("processes have different settings, checkpoints, latents or teachers")
    state = State(args, folder, device, losses, running, None if saved else init)
    state.lock = lock or common.lock(args.out)
    for loss in losses:
        loss.ema = state.ema
        loss.rows = rows_in_range(args.batch_size, shares, loss.t_min, loss.t_max)
    if saved:
        state.load(saved, newest)
    return folder, state


def parallel(network, args):
    """`network`, compiled and in DDP; in few buckets, because each cuts the compiled graph."""
    if args.compile:
        network = torch.compile(network, dynamic=False)
        say("compiling; on a GPU this takes about two minutes")
    several = dist.is_initialized() and dist.get_world_size() > 1
    return DDP(network, gradient_as_bucket_view=True, bucket_cap_mb=250) if several else network


def adamw(weights, args) -> torch.optim.AdamW:
    """The optimizer of some weights, maybe in several groups with rates of their own."""
    optimizer = torch.optim.AdamW(weights, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    optimizer.rates = [group["lr"] for group in optimizer.param_groups]  # after the warm-up
    return optimizer


def start_from(init, model, args, classes):
    """Take over --init's weights; of a network of other classes, the null label's row alone."""
    path, source, saved = init
    weights, table = source.state_dict(), "y_embedder.embedding_table.weight"
    if len(saved["meta"]["classes"]) == len(classes):
        models.check_classes(path, saved["meta"]["classes"], classes)
    else:
        say(f"{path}: has other classes; all labels but the null one start anew")
        weights[table] = torch.cat([model.state_dict()[table][:-1], weights[table][-1:]])
    with common.reading(path, "does not fit --model or --data"):  # names the tensor
        model.load_state_dict(weights)
    say(f"starts from step {saved['step']} of {path}, whose weights are {args.init}")


class State:
    """All that a step changes, saved and loaded whole: networks, optimizers, step, sums."""

    def __init__(self, args, folder, device, losses=(), running=(), init=None):
        torch.manual_seed(args.seed)
        self.model = model = models.build_for(vars(args), folder.meta)
        if init:
            start_from(init, model, args, folder.meta["classes"])
        for loss in running:
            if not 1 <= loss.depth <= model.depth:
                raise UserError(f"loss {loss.name}, depth {loss.depth}: use 1 to {model.depth}")
            loss.module = loss.projector(model).to(device)
            weights = list(loss.module.parameters())
            loss.optimizer = adamw(weights, args) if weights else None  # or AdamW fails
        model.to(device)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = adamw(list(model.parameters()), args)
        # By how their parts' names in a checkpoint end. The first one's end in nothing
        self.losses = {f"_{loss.name}" if i else "": loss for i, loss in enumerate(losses)}
        self.step, self.lock = 0, None  # steps done so far; what keeps other runs out
        # Sums since the last line: L_diff, each L_aux, gradient norm, number of steps
        self.sums = torch.zeros(3 + len(losses), dtype=torch.float64, device=device)

    def update(self, args, values):
        """Clip, AdamW, EMA."""
        own = [loss.optimizer for loss in self.losses.values() if loss.optimizer]
        optimizers = [self.optimizer, *own]
        groups = [group for each in optimizers for group in each.param_groups]
        weights = [weight for group in groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, args.clip)
        for optimizer in optimizers:
            for group, rate in zip(optimizer.param_groups, optimizer.rates, strict=True):
                group["lr"] = rate * min(1, (self.step + 1) / max(1, args.warmup))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ramp = (1 + self.step) / (10 + self.step) if args.ema_ramp else 1.0
        weights = [p.detach() for p in self.model.parameters()]  # or autograd records it all
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - min(args.ema, ramp))
        self.sums += torch.cat([values, norm.reshape(1), torch.ones(1, device=values.device)])
        self.step += 1

    def check(self, args):
        """End the run before what is not finite is logged or saved; `sums` keep a NaN."""
        path = Path(args.out, ".lock")
        if self.lock and not (path.exists() and os.path.samefile(path, self.lock.fileno())):
            now = os.path.realpath(f"/proc/self/fd/{self.lock.fileno()}")  # where it has gone
            raise UserError(f"{args.out}: was moved; go on beside {now}, with its checkpoints")
        tensors = [self.sums, *self.model.parameters(), *self.ema.parameters()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            newest = next(iter(models.checkpoints(args.out)), "the beginning")
            fix = f"continue from {newest} with a lower --lr, --clip or weight"
            raise UserError(f"step {self.step} (or one since the last line) is not finite; {fix}")

    def parts(self) -> dict:
        """What has a state dict, by its name in a checkpoint; None if its loss has ended."""
        parts = {"model": self.model, "ema": self.ema, "opt": self.optimizer}
        for name, loss in self.losses.items():  # "projector", then "projector_NAME" of a second
            parts |= {f"projector{name}": loss.module, f"projector_opt{name}": loss.optimizer}
        return parts

    def save(self, args, folder, rank, kind):
        """Write `kind`-<step>.pt whole or not at all; all processes learn whether it worked. A
        "ckpt" continues the run; a "snapshot" is the average alone, for a curve, and stays."""
        self.check(args)
        parts = self.parts() if kind == "ckpt" else {"ema": self.ema}
        content = {name: part and part.state_dict() for name, part in parts.items()}
        content |= {f"identity{name}": loss.identity for name, loss in self.losses.items()}
        content |= {"format": models.FORMAT, "step": self.step, "sums": self.sums.tolist()}
        content |= {"args": vars(args), "meta": folder.meta}
        path = Path(args.out) / f"{kind}-{self.step:07d}.pt"
        failure = None
        try:
            if rank == 0:
                with common.atomic_write(path) as file:
                    torch.save(content, file)
                others = [old for old in models.checkpoints(args.out) if old != path]
                for old in [*others[args.keep - (kind == "ckpt") :], *path.parent.glob("*.pt.tmp")]:
                    old.unlink(missing_ok=True)  # .tmp: what a killed save has left
        except (UserError, OSError) as error:
            failure = f"stopped after step {self.step}: {error}; run it again"
        if failure := common.gather(failure)[0]:
            raise UserError(failure)

    def load(self, saved, path):
        for name, loss in self.losses.items():
            if loss.module and saved[f"identity{name}"] not in (None, loss.identity):
                raise UserError(f"{path}: was trained with another teacher; give that one")
        with common.reading(path, "is damaged, or of another network"):
            for name, part in self.parts().items():
                if part:
                    part.load_state_dict(copy.deepcopy(saved[name]))  # nothing stays mapped
            self.step = saved["step"]
            self.sums.copy_(torch.tensor(saved["sums"], dtype=torch.float64))


def continued(path, args, folder) -> dict:
    """The checkpoint at `path`; UserError if it was trained with other settings or latents."""
    saved = models.read_checkpoint(path)
    step, wrong = saved["step"], []
    change = {f.name: f.metadata.get("change") for f in fields(args)}
    older = {"t_of_quarters": "tensor([0.2500, 0.5000, 0.7500])"}  # what older versions lack
    before = {f.name: f.default for f in fields(args)} | older | saved["args"]
    same = saved["meta"]["identity"] == folder.meta["identity"]
    before["data"] = args.data if same else "(other latents)"  # the content counts
    for key, old in sorted(before.items()):
        if old == getattr(args, key, None) or change.get(key) == "free":
            continue  # a setting that the code no longer has must have been None
        difference = f"{common.flag(key)} {old} -> {getattr(args, key, '(no such setting)')}"
        if change.get(key) == "printed" and old != 0:  # a weight of 0 taught nothing
            say(f"continued with {difference}")
        else:
            wrong.append(difference)
    if wrong:
        raise UserError(f"{path}: was trained with other settings: {', '.join(wrong)}")
    if step != int(path.stem.removeprefix("ckpt-")) or step > args.steps:
        raise UserError(f"{path}: is of step {step}; was it renamed, or --steps lowered?")
    return saved


class Log:
    """log.jsonl, the same in every run of these settings, and the line for the terminal."""

    def __init__(self, args, losses, state, rank):
        self.args, self.state, self.rank = args, state, rank
        self.names = ["loss_diff", *(f"loss_{loss.name}" for loss in losses), "grad_norm"]
        self.path = Path(args.out) / "log.jsonl"
        self.time, self.step = time.time(), state.step  # of the last line
        if rank == 0 and self.path.exists():
            with common.atomic_write(self.path) as file:  # without what followed the checkpoint
                for line in self.path.read_bytes().splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a kill
                        if json.loads(line)["step"] <= state.step:
                            file.write(line + b"\n")

    def write(self):
        """Append the means since the last line, print them, and begin new sums."""
        self.state.check(self.args)
        *sums, count = self.state.sums.tolist()
        self.state.sums.zero_()
        if self.rank > 0:
            return
        step, lr = self.state.step, self.state.optimizer.param_groups[0]["lr"]
        means = dict(zip(self.names, (total / count for total in sums), strict=True))
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **means, "lr": lr}) + "\n")
        except OSError as error:  # a full disk stops the run only if the checkpoint fails, too
            warn(f"{self.path}: could not be written ({error})")
        seconds = (time.time() - self.time) / (step - self.step)  # of a step
        self.time, self.step = time.time(), step
        rate, left = self.args.batch_size / seconds, (self.args.steps - step) * seconds / 60
        shown = "  ".join(f"{name[5:]} {value:.4f}" for name, value in means.items())
        say(f"step {step}/{self.args.steps}  {shown}  {rate:.0f} images/s  {left:.1f} min left")


@contextlib.contextmanager
def heard_signals():
    """A list that is not empty after the first signal; the second does what it did before."""
    heard = []

    def hear(number, frame):
        heard.append(time.time())
        if heard[-1] > heard[0] + 1:  # torchrun sends each signal twice within a moment
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # the last: Slurm's
    numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # as nohup does
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- Stage 1: L = L_diff + 0.5 L_align, where 0.4 <= t <= 0.7
class Alignment(Auxiliary):
    """From h_d1, P1 answers in latent space what the whole network does, or the clean latent."""

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
