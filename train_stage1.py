"""Stage 1: train a SiT whose shallow block is aligned with VAE latent space; THE training loop.

    torchrun --nproc_per_node=8 train_stage1.py                   # SiT-XL/2, the paper's settings
    python train_stage1.py --data data/shapes --model SiT-Ti/4 --batch-size 32 --steps 2000

L = L_diff + 0.5 L_align (Self-Transcendence, arXiv 2601.07773). The same command again continues.

Training is a function of the step: the order of images comes from (seed, epoch), all that is random
in step k from (seed, k), drawn for the global batch and cut by process. So a killed run continues,
on a CPU bit for bit, and any number of processes walks the same trajectory up to its sums' order.
"""

import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import models
from models import Projector, UserError, say, setting

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from vae_latents import LatentFolder

FORMAT = 1  # of a checkpoint


@dataclass
class TrainSettings:
    data: str = setting("data/imagenet256", "latent folder, from vae_latents.py")
    out: str = setting("out/stage1", "folder of the run: checkpoints and log.jsonl")
    model: str = setting("SiT-XL/2", "size and patch, as in models.SIZES")
    steps: int = setting(400_000, "steps in all, continued or not", at_least=1)
    batch_size: int = setting(256, "images in a step, all processes together", at_least=1)
    accum: int = setting(1, "shares of the batch that each process does in turn", at_least=1)
    lr: float = setting(1e-4, "AdamW's rate, constant after the warm-up", above=0)
    warmup: int = setting(0, "steps of linear warm-up", at_least=0)
    clip: float = setting(1.0, "largest gradient norm", above=0)
    ema: float = setting(0.9999, "decay of the averaged weights", at_least=0, below=1)
    ema_ramp: bool = setting(False, "decay at most (1 + step) / (10 + step), for short runs")
    label_drop: float = setting(0.1, "fraction of null labels", at_least=0, below=1)
    seed: int = setting(0, "seed of everything random", at_least=0, at_most=2**63 - 1)
    t_min: float = setting(0.4, "L_aux counts from this t (as released: 0)", at_least=0, at_most=1)
    t_max: float = setting(0.7, "and up to this one (as released: 1)", at_least=0, at_most=1)
    projector_dim: int = setting(2048, "hidden width of the projector", at_least=1)
    qk_norm: bool = setting(True, "LayerNorm on each head's queries and keys")
    compile: bool | None = setting(None, "torch.compile (default: on CUDA only)")
    grad_checkpoint: bool = setting(False, "recompute blocks in the backward pass: saves memory")
    device: str = setting("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")
    log_every: int = setting(100, "steps between lines of the log", at_least=1)
    save_every: int = setting(10_000, "steps between checkpoints", at_least=1)
    keep: int = setting(3, "checkpoints kept, the newest of which continues the run", at_least=1)


# What may differ when a run is continued; a change of the second line's is printed and logged
FREE = "data out steps accum compile grad_checkpoint device log_every save_every keep teacher"
FREE_BUT_SAID = ("lr", "clip", "weight")  # and every ..._weight but one of 0

# ---- Everything random, as a function of (seed, step)


@functools.lru_cache(maxsize=2)
def permutation(N, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(N)


def batch_indices(step, batch, N, seed):
    """The images of the global batch of `step`, (batch,) int64. An epoch is a permutation of N."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = np.unique(places // N)
    parts = [permutation(N, seed, int(e))[places[places // N == e] % N] for e in epochs]
    return np.concatenate(parts)


def draw(step, batch, shape, seed, device, label_drop=0.1):
    """The global batch's t, label drop (B,), posterior noise, noise (B, *shape) and u (B,).
    t is stratified: t_i = (i + u_i) / B. The images come in random order, so each gets a uniform t;
    together they cover [0, 1] with less variance; and a range of t is a slice of the batch."""
    generator = torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2**32)
    in_stratum, drop = torch.rand(2, batch, generator=generator, device=device)
    posterior, noise = torch.randn(2, batch, *shape, generator=generator, device=device)
    u = torch.rand(batch, generator=generator, device=device)
    t = (torch.arange(batch, device=device) + in_stratum) / batch
    return t, drop < label_drop, posterior, noise, u


def rows_in_range(batch, shares, t_min, t_max):
    """The rows of a share that can have t_min <= t <= t_max; share w has strata w, w + shares, ...
    The same for all shares, so shapes are static (256 images in 4 shares, 0.4 to 0.7: strata 102 to
    179, rows 25 to 44); strata at the ends are masked exactly. 1e-3: the rounding of t."""
    first = max(0, math.floor(t_min * batch - 1e-3))
    last = min(batch, math.ceil(t_max * batch + 1e-3))
    return slice(first // shares, math.ceil(last / shares))


# ---- One step: the batch, the auxiliary loss, both losses


@dataclass
class Batch:
    """What a step knows of n images; `batch[rows]` cuts every field alike."""

    indices: torch.Tensor  # (n,) int64, which images of the latent folder they are
    y: torch.Tensor  # (n,) int64, their labels
    told: torch.Tensor  # (n,) int64, the labels that the network is told: y or the null label
    t: torch.Tensor  # (n,), 0 = data, 1 = noise
    x0: torch.Tensor  # (n, C, H, W), latents
    eps: torch.Tensor  # (n, C, H, W), noise
    x_t: torch.Tensor  # (n, C, H, W), (1 - t) x0 + t eps
    velocity: torch.Tensor  # (n, C, H, W), eps - x0, what the network predicts
    u: torch.Tensor  # (n,), one more uniform number, for losses that draw something themselves

    def __getitem__(self, rows):
        return Batch(**{name: value[rows] for name, value in vars(self).items()})


def make_batch(indices, moments, y, draws, scale, null_label) -> Batch:
    """SiT's linear interpolant (arXiv 2401.08740, section 2) of latents and this step's draws."""
    t, drop, posterior, eps, u = draws
    mean, std = moments.float().chunk(2, dim=1)
    x0 = scale * (mean + std * posterior)  # a sample of the VAE's posterior
    told = torch.where(drop, null_label, y)
    noise_level = t.view(-1, 1, 1, 1)
    x_t = (1 - noise_level) * x0 + noise_level * eps
    return Batch(indices, y, told, t, x0, eps, x_t, eps - x0, u)


class Auxiliary:
    """An auxiliary loss on the tokens of one block. A loss of your own is a subclass with `target`.
    L = L_diff + weight L_aux in the first `until` steps, then L_diff. L_aux is the mean over the
    WHOLE batch of distance(projector(h_depth), target) where t_min <= t <= t_max, else zero."""

    name = "aux"  # in the log and the checkpoint, which another loss does not continue
    identity = None  # what must stay the same when the run is continued, such as a teacher's hash
    teacher = None  # a network that is dropped when the loss ends
    ema: nn.Module  # the averaged network, set by the loop

    def __init__(self, args: TrainSettings, depth: int, weight=0.5, until=sys.maxsize):
        self.args, self.depth, self.weight, self.until = args, depth, weight, until
        self.t_min, self.t_max = args.t_min, args.t_max
        if self.t_min >= self.t_max:
            raise UserError(f"--t-min {self.t_min} --t-max {self.t_max}: t-min must be smaller")

    def prepare(self, folder: LatentFolder, device: torch.device):
        """Load and check what the loss needs; called once, if any step is left that has it."""

    def projector(self, model: nn.Module) -> nn.Module:
        return Projector(model.width, hidden=self.args.projector_dim)

    def target(self, batch: Batch) -> torch.Tensor:
        """What the projector must answer, (n, ...), without gradient, for images in the range."""
        raise NotImplementedError

    def distance(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(n, ...), (n, ...) -> (n,): the mean square, unless a subclass says otherwise."""
        return (prediction - target).square().flatten(1).mean(dim=1)


class Losses(nn.Module):
    """The network and both losses in one module: what DDP wraps and torch.compile compiles."""

    def __init__(self, model, projector, auxiliary, rows):
        super().__init__()
        self.model, self.projector, self.auxiliary, self.rows = model, projector, auxiliary, rows

    def forward(self, x_t, t, told, velocity, target=None):
        """(L_diff, L_aux), means over n images; `target` is that of the images in `rows` alone."""
        aux, rows = self.auxiliary, self.rows
        prediction, tokens = self.model(x_t, t, told, taps=[aux.depth] if self.projector else [])
        loss_diff = (prediction.float() - velocity).square().flatten(1).mean(dim=1).mean()
        if self.projector is None:
            return loss_diff, torch.zeros_like(loss_diff)
        answer = self.projector(tokens[aux.depth][rows]).float()
        mask = ((t[rows] >= aux.t_min) & (t[rows] <= aux.t_max)).float()
        distance = aux.distance(answer, target)
        if distance.shape != mask.shape:
            raise UserError(f"{aux.name}.distance: one number per image, not {[*distance.shape]}")
        return loss_diff, (distance * mask).sum() / len(x_t)  # zero outside the range of t


class Alignment(Auxiliary):
    """Stage 1: P1 answers in VAE latent space what the whole network does, or the clean latent."""

    name = "align"

    def projector(self, model):
        latent, hidden = (model.patch, model.in_channels), self.args.projector_dim
        return Projector(model.width, hidden=hidden, to_latent=latent)

    def target(self, batch):
        return batch.velocity if self.args.align_target == "velocity" else batch.x0


# ---- The training loop of both stages


def train(args: TrainSettings, auxiliary: Auxiliary):
    """Train args.model on args.data into args.out, with `auxiliary` unless its weight is 0."""
    signals = Signals()
    device, rank, world = models.setup(args.device)
    folder, B = LatentFolder(args.data), args.batch_size
    # Locked before its checkpoints are read; a new folder is made when nothing is missing any more
    held = models.lock(args.out) if rank == 0 and Path(args.out).exists() else None
    meta, null_label = folder.meta, len(folder.meta["classes"])
    shares = world * args.accum  # share w of the global batch has its images w, w + shares, ...
    my_shares = range(rank, shares, world)  # those that this process works through
    if B % shares:
        raise UserError(f"--batch-size {B}: not divisible by {shares} (processes x --accum)")
    saved = continued(args, meta, auxiliary)
    start = saved["step"] if saved else 0
    has_aux = auxiliary.weight > 0 and start < min(auxiliary.until, args.steps)
    if has_aux:
        auxiliary.prepare(folder, device)
    held = models.lock(args.out) if rank == 0 and not held else held  # until train returns
    models.agree(settings=vars(args), latents=meta, checkpoint=start, teacher=auxiliary.identity)
    if start == args.steps:
        return say(f"{args.out}: is at step {start}, nothing to do (--steps is the total)")
    state = State(args, meta, device, auxiliary if has_aux else None)
    auxiliary.ema = state.ema
    if saved:
        state.load(saved, auxiliary)
    rows = rows_in_range(B, shares, auxiliary.t_min, auxiliary.t_max)
    network = parallel(Losses(state.model, state.projector, auxiliary, rows), args, device)
    stream = latent_stream(folder, args, start, my_shares, shares, device)
    log = Log(args, auxiliary.name, state, saved) if rank == 0 else None
    saved = None  # or the mapped file would keep its place on the disk when it is deleted
    signals.saved = start

    for step in range(start, args.steps):  # the number of steps done so far
        if has_aux and step == auxiliary.until:  # neither teacher nor projector is needed any more
            has_aux, network, auxiliary.teacher = False, None, None  # freed before the next is made
            state.drop_projector()
            network = parallel(Losses(state.model, None, auxiliary, rows), args, device)

        # ---- the batch: drawn whole on every process alike, then this process's shares of it
        draws = draw(step, B, folder.shape, args.seed, device, args.label_drop)
        losses = torch.zeros(2, device=device)
        for w in my_shares:
            latents = [x.to(device, non_blocking=True) for x in next(stream)]
            cut = [whole[w::shares] for whole in draws]
            batch = make_batch(*latents, cut, meta["scale"], null_label)

            # ---- both losses, and their gradient
            last = world == 1 or w == my_shares[-1]
            with contextlib.nullcontext() if last else network.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    target = auxiliary.target(batch[rows]) if has_aux else None  # stage 2: f_g
                    inputs = batch.x_t, batch.t, batch.told, batch.velocity, target
                    loss_diff, loss_aux = network(*inputs)
                loss = loss_diff + auxiliary.weight * loss_aux
                (loss / args.accum).backward()  # with the last share DDP averages over processes
            losses += torch.stack([loss_diff, loss_aux]).detach() / args.accum
        if world > 1:
            dist.all_reduce(losses)  # for the log
            losses /= world

        # ---- clip, AdamW, EMA
        state.update(args, losses)

        # ---- log, save, leave
        done, stop = step + 1, signals.agreed(world)
        logs = done % args.log_every == 0
        saves = done % args.save_every == 0 or done == args.steps or stop
        if logs or saves:
            state.stop_unless_finite(args, rank)
        line = log.write() if logs and rank == 0 else ""
        if logs:
            state.sums.zero_()
        if saves:
            state.save(args, meta, auxiliary, rank)
            signals.saved = done
        if line:  # after saving: a terminal that is gone must not cost work
            say(line)
        if stop and done < args.steps:
            say(f"stopped by a signal after step {done}, which is saved; run the same again")
            sys.exit(143)  # not 0: what needs the finished run must not follow
    say(f"{args.out}: done at step {args.steps}")


def parallel(losses, args, device):
    """Compiled and, with several processes, wrapped so that gradients are averaged."""
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    losses = torch.compile(losses, dynamic=False) if compiled else losses
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return losses
    # torch renamed the flag after 2.11; the only buffer is the constant position table
    buffers = "forward_sync_buffers" if hasattr(DDP, "broadcast_buffers") else "broadcast_buffers"
    cards = [device.index] if device.type == "cuda" else None
    # Few buckets, because the compiled graph is cut at each
    return DDP(losses, cards, gradient_as_bucket_view=True, bucket_cap_mb=250, **{buffers: False})


class State:
    """Everything that a step changes, saved and loaded whole: networks, optimizer, step, sums."""

    def __init__(self, args, meta, device, auxiliary=None):
        torch.manual_seed(args.seed)
        latent = meta["height"], meta["channels"], len(meta["classes"])
        self.model = models.build(args.model, *latent, args.qk_norm)
        self.projector = auxiliary.projector(self.model).to(device) if auxiliary else None
        if auxiliary and not 1 <= auxiliary.depth <= self.model.depth:
            blocks = f"{args.model} has blocks 1 to {self.model.depth}"
            raise UserError(f"--{auxiliary.name}-depth {auxiliary.depth}: {blocks}")
        self.model.to(device).grad_checkpoint = args.grad_checkpoint
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        params = [p for net in (self.model, self.projector) if net for p in net.parameters()]
        options = {"lr": args.lr, "betas": (0.9, 0.999), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(params, **options)
        # since the last line of the log: sums of L_diff, L_aux, gradient norm, and the steps
        self.step, self.sums = 0, torch.zeros(4, dtype=torch.float64, device=device)

    def drop_projector(self):
        for p in self.projector.parameters():
            self.optimizer.state.pop(p, None)
        self.projector = None
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())

    def update(self, args, losses):
        """Clip, AdamW, EMA. A step that is not finite is withheld, without asking the device."""
        group = self.optimizer.param_groups[0]
        norm = nn.utils.clip_grad_norm_(group["params"], args.clip)
        finite = torch.isfinite(losses).all() & torch.isfinite(norm)
        self.optimizer.found_inf = (~finite).float()  # 1: the fused kernel leaves the weights alone
        group["lr"] = args.lr * min(1.0, (self.step + 1) / max(1, args.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ramp = (1 + self.step) / (10 + self.step) if args.ema_ramp else 1.0
        weights = [p.detach() for p in self.model.parameters()]  # or autograd records the average
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - min(args.ema, ramp))
        self.sums += torch.cat([losses, norm.reshape(1), torch.ones(1, device=losses.device)])
        self.step += 1

    def stop_unless_finite(self, args, rank):
        """End the run, status 3 on every process: `sums` keeps a NaN until here, unsaved."""
        tensors = [*self.model.parameters(), *self.ema.parameters(), self.sums]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            newest = next(iter(models.checkpoints(args.out)), "none")
            what = f"a step from {self.step - self.sums[3] + 1:.0f} to {self.step} is not finite"
            advice = "--log-every 1 finds it, another --lr, --clip or weight may pass it"
            if rank == 0:
                say(f"error: {what}; {advice}; newest checkpoint: {newest}", sys.stderr)
            sys.exit(3)

    def save(self, args, meta, auxiliary, rank):
        """Write ckpt-<step>.pt whole or not at all; all processes learn whether it worked."""
        content = {"format": FORMAT, "step": self.step, "meta": meta, "sums": self.sums.tolist()}
        content.update(args={**vars(args), "stage": auxiliary.name}, identity=auxiliary.identity)
        content.update(model=self.model.state_dict(), ema=self.ema.state_dict())
        content.update(projector=self.projector and self.projector.state_dict())
        content.update(opt=self.optimizer.state_dict())
        failure = None
        try:
            if rank == 0:
                with models.atomic_write(Path(args.out) / f"ckpt-{self.step:07d}.pt") as file:
                    torch.save(content, file)
                killed = Path(args.out).glob("ckpt-*.pt.tmp")  # what a killed save has left
                for old in [*models.checkpoints(args.out)[args.keep :], *killed]:
                    old.unlink(missing_ok=True)
        except (UserError, OSError) as error:
            failure = f"stopped after step {self.step}: {error}; make room and run the same again"
        if failure := models.gather(failure)[0]:
            raise UserError(failure)

    def load(self, saved, auxiliary):
        if self.projector and saved.get("identity") not in (None, auxiliary.identity):
            raise UserError(f"{saved['path']}: was trained with another teacher; give that one")
        with models.reading(saved["path"]):
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            if self.projector:
                self.projector.load_state_dict(saved["projector"])
            params = range(len(self.optimizer.param_groups[0]["params"]))  # fewer after L_aux's end
            moments = {i: m for i, m in saved["opt"]["state"].items() if i in params}
            groups = [{**saved["opt"]["param_groups"][0], "params": list(params)}]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            if any(state["exp_avg"].shape != p.shape for p, state in self.optimizer.state.items()):
                raise ValueError("its optimizer's moments are not of this network")
            self.step = saved["step"]
            self.sums.copy_(torch.tensor(saved["sums"]))


def continued(args, meta, auxiliary) -> dict | None:
    """The newest checkpoint in --out, or None; UserError if it was trained with other settings."""
    path = next(iter(models.checkpoints(args.out)), None)
    if path is None:
        return None
    saved = models.load_file(path)
    with models.reading(path):
        before, step, latents = saved["args"], saved["step"], saved["meta"]
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, not {FORMAT}")
    now = {**vars(args), "stage": auxiliary.name}
    changed = [k for k in now if k in before and k not in FREE.split() and before[k] != now[k]]
    lines = {k: f"--{k.replace('_', '-')} {before[k]} -> {now[k]}" for k in changed}
    wrong = [lines[k] for k in changed if not k.endswith(FREE_BUT_SAID) or not before[k]]
    wrong += ["--data (other latents)"] if latents != meta else []
    if wrong:
        same = "give the same to continue it, or choose another --out"
        raise UserError(f"{path}: was trained with other settings: {', '.join(wrong)}; {same}")
    if args.steps < step:
        raise UserError(f"--steps {args.steps}: {path} is at step {step} already")
    return {**saved, "path": path, "changed": list(lines.values())}


class Log:
    """log.jsonl, the same in every run of these settings, and the line for the terminal."""

    def __init__(self, args, name, state, saved):
        self.args, self.name, self.state = args, name, state
        self.clock, self.clock_step = time.time(), state.step
        self.flops = 3 * state.model.forward_flops()  # the backward pass is two forward
        self.path = Path(args.out) / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        with models.atomic_write(self.path) as file:  # what came after the checkpoint comes again
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a kill
                    record = json.loads(line)  # a change that was never saved did not happen
                    if record["step"] < state.step + ("changed" not in record):
                        file.write(f"{line}\n".encode())
        say(f"{args.model}, steps {state.step} to {args.steps}")
        if saved and saved["changed"]:
            say(f"continued with {', '.join(saved['changed'])}")
            self.append({"step": state.step, "changed": saved["changed"]})

    def append(self, record):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk stops the run only if the checkpoint fails, too
            say(f"warning: {self.path}: could not be written ({error})", sys.stderr)

    def write(self) -> str:
        """Append the means since the last line; return the line for the terminal."""
        *sums, count = self.state.sums.tolist()
        step, lr = self.state.step, self.state.optimizer.param_groups[0]["lr"]
        diff, aux, norm = (total / count for total in sums)
        record = {"step": step, "loss_diff": diff, f"loss_{self.name}": aux, "grad_norm": norm}
        self.append({**record, "lr": lr})
        rate = (step - self.clock_step) * self.args.batch_size / (time.time() - self.clock)
        self.clock, self.clock_step = time.time(), step
        left = (self.args.steps - step) * self.args.batch_size / rate / 60
        losses = f"diff {diff:.4f}  {self.name} {aux:.4f}  grad {norm:.3f}"
        speed = f"{rate:.0f} images/s  {rate * self.flops / 1e12:.2f} TFLOP/s  {left:.1f} min left"
        return f"step {step}/{self.args.steps}  {losses}  {speed}"


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP: finish the step, save, leave. A second one leaves at once."""

    def __init__(self):
        self.asked, self.saved = False, None  # the step last saved, once the loop runs
        heard, pipe = os.pipe()
        os.set_blocking(pipe, False)
        signal.set_wakeup_fd(pipe)  # C code writes to it, however busy the main thread is
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self.listen, args=[heard], daemon=True).start()

    def listen(self, heard):
        first = None
        while number := os.read(heard, 1)[0]:
            if self.saved is None or (first and time.time() > first + 1):
                say(f"left at once; nothing was saved since step {self.saved or 0}", sys.stderr)
                os._exit(128 + number)
            first = first or time.time()  # torchrun sends each signal twice within a moment
            self.asked = True

    def agreed(self, world) -> bool:
        asked = torch.tensor(int(self.asked))  # of any process: all stop after the same step
        if world > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)  # on the CPU, over gloo
        return bool(asked)


def latent_stream(folder, args, start, my_shares, shares, device):
    """(indices, moments, labels) of `my_shares` of each step, cut as train cuts its draws."""
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    resident = folder.moments.nbytes < 0.3 * memory  # then they stay on the GPU
    where = device if resident else "cpu"
    say(f"{len(folder)} latents, {'on the GPU' if resident else 'read from disk'}")

    def indices():
        for step in range(start, args.steps):
            order = torch.from_numpy(batch_indices(step, args.batch_size, len(folder), args.seed))
            yield from (order[w::shares].to(where, non_blocking=True) for w in my_shares)

    tensors = torch.arange(len(folder)), torch.from_numpy(folder.moments), folder.labels
    data = torch.utils.data.TensorDataset(*(x.to(where) for x in tensors))
    pinned = {"pin_memory": cuda and not resident}  # no workers: they would die of a signal first
    return iter(torch.utils.data.DataLoader(data, sampler=indices(), batch_size=None, **pinned))


@dataclass
class Settings(TrainSettings):
    steps: int = setting(200_000, "steps in all: 40 epochs of ImageNet", at_least=1)
    align_weight: float = setting(0.5, "weight of L_align; 0 is vanilla SiT", at_least=0)
    align_depth: int | None = setting(None, "block d1 (default: by size)", at_least=1)
    align_target: str = setting("velocity", "what P1 answers", choices=["velocity", "latent"])


def main():
    args = models.parse_settings(Settings, __doc__)
    args.align_depth = args.align_depth or models.parse_name(args.model)[0].align_depth
    train(args, Alignment(args, args.align_depth, args.align_weight))


if __name__ == "__main__":
    models.run(main)
