"""How fast a machine is at all of it. Each figure is printed and written as soon as it is there.

    python -m experiments.machine.bench --device cuda     # five minutes at most -> out/bench.json
    python -m experiments.machine.bench --device cpu      # a small size, two minutes

Weights and latents are random. A step is made of the training loop's own parts: on a card compiled
block by block first, which starts in seconds; then whole, as the loop does it. See docs/speed.md.
"""

import copy
import gc
import json
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch

import common
import models
import train_stage1
from build_teacher import guided_features
from common import UserError, say, setting
from experiments.latents.small_vae import from_uint8
from experiments.machine import judging
from sample import sample
from train_stage1 import (
    Alignment,
    LossNetwork,
    State,
    adamw,
    draw,
    make_batch,
    parallel,
    rows_in_range,
)
from train_stage2 import Guidance
from vae_latents import AutoencoderKL, LatentFolder, to_images

ROUNDS = 7  # in which a step is timed; the median counts
# Dense bf16 TFLOP/s of a card, by a part of its name; the first that fits counts
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989}
PEAKS.update({"A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71})
COUNTED = "matrix products: 3 forward passes of network and projector, 2 of the teacher"

PAIRS = [("naive", "stage 2"), ("naive, after guidance", "vanilla"), ("stage 2", "vanilla")]


def seconds(function, calls=1, clock=time.perf_counter) -> float:
    """Of one call, the mean of `calls` in a row."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (clock() - start) / calls


class RandomLatents(LatentFolder):
    """Latents in memory: a pattern for each of ten classes, and noise."""

    def __init__(self, side, number=1024):
        self.labels, self.shape = torch.arange(number) % 10, (4, side, side)
        self.meta = {"classes": range(10), "channels": 4, "height": side, "scale": 1.0}
        mean = 0.7 * torch.randn(10, 4, side, side, generator=torch.manual_seed(0))[self.labels]
        self.moments = torch.cat([mean, torch.full_like(mean, 0.7)], dim=1).half().numpy()


def twin(network, mode):
    """A copy that shares the parameters. Its blocks are alike: one compilation serves all."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, shared)
    for part in {"eager": [], "blocks": network.blocks, "whole": [network]}[mode]:
        part.compile(dynamic=False)
    return network


def in_precision(teacher, dtype=None):
    """A twin that computes in float32, or under autocast to `dtype`, whatever is around it."""
    teacher = twin(teacher, "eager")
    options = {"dtype": dtype or torch.bfloat16, "enabled": dtype is not None}
    teacher.forward = torch.autocast(teacher.pos_embed.device.type, **options)(teacher.forward)
    return teacher


class Step:
    """A step of the training loop; calling it trains. `kind`: vanilla, stage 1, stage 2. Or naive:
    each image's t is independent, so teacher and projector run on all, the mask comes afterwards.
    naive, after guidance: with a weight of 0. as released: naive, the teacher outside autocast.
    `mode`: eager, blocks (compiled block by block) or whole (compiled whole, as the loop does)."""

    def __init__(self, networks, kind, mode):
        self.args, self.folder, self.device = networks.args, networks.folder, networks.device
        self.state, (size, _) = copy.copy(networks.state), models.parse_name(self.args.model)
        self.auxiliary = Alignment(self.args, size.align_depth)
        self.is_naive = kind not in ("vanilla", "stage 1", "stage 2")
        batch, t_min, t_max = self.args.batch_size, self.args.t_min, self.args.t_max
        self.rows = slice(0, batch) if self.is_naive else rows_in_range(batch, 1, t_min, t_max)
        if kind not in ("vanilla", "stage 1"):
            weight = 0.0 if kind == "naive, after guidance" else 0.5
            self.auxiliary = Guidance(self.args, size.student_depth, weight)
            self.auxiliary.s, self.auxiliary.teacher = 30.0, twin(networks.teacher, mode)
        if kind == "as released":
            self.auxiliary.teacher = in_precision(networks.teacher)
        if kind != "vanilla":
            projector = self.auxiliary.projector(self.state.model).to(self.device)
            self.auxiliary.module = projector
            self.auxiliary.optimizer = adamw(list(projector.parameters()), self.args)
        self.state.losses = {"": self.auxiliary}
        self.auxiliary.rows = self.rows
        model = twin(self.state.model, "blocks" if mode == "blocks" else "eager")
        self.network = LossNetwork(model, [self.auxiliary])
        if mode == "whole":
            self.network = parallel(self.network, self.args)

    def losses(self, batch):
        """(L_diff, L_aux)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            target = self.auxiliary.module and self.auxiliary.target(batch[self.rows])
            return self.network(batch.x_t, batch.t, batch.y_input, batch.velocity, [target])

    def __call__(self):
        draws = draw(self.state.step, self.args, self.folder, self.device)
        if self.is_naive:
            draws.t = torch.rand_like(draws.t)
        loss_diff, loss_aux = self.losses(make_batch(self.folder, draws))
        (loss_diff + self.auxiliary.weight * loss_aux).backward()
        self.state.update(self.args, torch.stack([loss_diff, loss_aux]).detach())

    def flops(self) -> int:
        """Of the matrix products; see COUNTED."""
        model, rows = self.state.model, self.rows.stop - self.rows.start
        total = 3 * self.args.batch_size * model.forward_flops()
        if self.auxiliary.teacher:
            total += 2 * rows * self.auxiliary.teacher.forward_flops()
        if projector := self.auxiliary.module:
            weights = sum(p.numel() for p in projector.parameters() if p.ndim == 2)
            total += 3 * 2 * rows * (model.input_size // model.patch) ** 2 * weights
        return total


class Networks:
    """One size's networks, which all steps train, and what is measured: {unit: number}."""

    def __init__(self, name, batch, folder, device):
        self.args = train_stage1.Settings(model=name, batch_size=batch, lr=5e-4, compile=True)
        self.folder, self.device, self.on_card = folder, device, device.type == "cuda"
        self.calls = 5 if self.on_card else 1  # in a row, each time that a step is timed
        self.state = State(self.args, folder, device, [Alignment(self.args, 1)])
        self.step = cache(partial(Step, self))

    @cached_property
    def teacher(self):
        depth = models.parse_name(self.args.model)[0].teacher_depth
        return copy.deepcopy(self.state.model).cut(depth).eval().requires_grad_(False)

    def speed(self, kind, mode, peak):
        step = self.step(kind, mode)
        first = seconds(step)
        if self.on_card:
            torch.cuda.reset_peak_memory_stats()
        step()
        taken = statistics.median(seconds(step, self.calls) for _ in range(ROUNDS))
        tflops = step.flops() / taken / 1e12
        figures = {"ms": 1e3 * taken, "images/s": self.args.batch_size / taken, "TFLOP/s": tflops}
        if peak:
            figures["% of the peak"] = 100 * tflops / peak
        if self.on_card:
            figures["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        return {**figures, "s for the first step": first}

    def ratio(self, slow, fast):
        """The median ratio of the times of two steps, each a (kind, mode), that run in turns."""
        a, b = self.step(slow[0], slow[1]), self.step(fast[0], fast[1])
        clock = time.perf_counter if self.on_card else time.process_time  # others use a CPU, too
        timed = partial(seconds, calls=self.calls, clock=clock)
        ratios = [timed(a) / timed(b) for _ in range(ROUNDS + 1)][1:]  # the first one compiles
        return {"times": statistics.median(ratios), "times by arithmetic": a.flops() / b.flops()}

    def sampling(self, mode):
        """Images a second with 250 steps of the SDE sampler, estimated from a tenth of them."""
        model, batch = twin(self.state.ema, mode), self.args.batch_size
        noise, figures = torch.randn(batch, *self.folder.shape, device=self.device), {}
        labels = torch.arange(batch, device=self.device) % model.num_classes
        run = partial(sample, model, noise, labels, model.num_classes, interval=(0.0, 0.65))
        run(steps=1)  # compiles
        for cfg, title in ((1.0, "images/s"), (1.9, "images/s with cfg 1.9 at t <= 0.65")):
            figures[title] = batch / (10 * seconds(partial(run, steps=25, cfg=cfg)))
        return figures

    @torch.no_grad()
    def autoencoder(self):
        """Stable Diffusion's, encoding and decoding as vae_latents.py and sample.py do it."""
        vae = AutoencoderKL().to(self.device, memory_format=torch.channels_last).eval()
        number, side = (32, 256) if self.on_card else (1, 64)
        pixels = torch.randint(0, 256, (number, side, side, 3), dtype=torch.uint8)
        latents, figures = torch.randn(number, 4, side // 8, side // 8), {"px": side}
        runs = {"encoded": lambda: torch.cat(vae.encode(from_uint8(pixels).to(self.device))).cpu()}
        runs["decoded"] = partial(to_images, vae, latents)
        for title, run in runs.items():
            run()
            figures[f"images/s {title}"] = number / seconds(run)
        return figures

    def precision(self, train_steps):
        """Errors of f_g (s = 30) against float64, after some steps on latents that show their
        class: without these, f_c and f_u hardly differ."""
        for _ in range(train_steps):
            self.step("vanilla", "eager")()
        rows = rows_in_range(self.args.batch_size, 1, self.args.t_min, self.args.t_max)
        batch = make_batch(self.folder, draw(0, self.args, self.folder, self.device)[rows])
        f_g = partial(guided_features, t=batch.t, y=batch.y, s=30.0)
        f_c, f_u = (f_g(self.teacher, batch.x_t, s=s) for s in (1.0, 0.0))
        figures = {"% from f_u to f_c": 100 * float((f_c - f_u).norm() / f_u.norm())}
        exact = f_g(copy.deepcopy(self.teacher).double(), batch.x_t.double())
        for dtype in (None, torch.float16, torch.bfloat16):
            error = f_g(in_precision(self.teacher, dtype), batch.x_t) - exact
            figures[f"% off in {dtype or 'float32'}"] = 100 * float(error.norm() / exact.norm())
        del self.teacher  # of a network that was trained; and a vanilla step's memory has none
        return figures


def plan(mode, peak, train_steps):
    """(Name, what measures it, given the networks): what starts in seconds, then what waits."""
    yield "precision of f_g", partial(Networks.precision, train_steps=train_steps)
    modes = dict.fromkeys(("vanilla", "stage 1", "stage 2", "naive"), mode)
    modes["as released"] = "eager"  # their loop compiles nothing
    for kind, how in modes.items():
        yield f"{kind}, {how}", partial(Networks.speed, kind=kind, mode=how, peak=peak)
    modes["naive, after guidance"] = mode
    for slow, fast in [*PAIRS, ("as released", "stage 2")]:
        ratio = partial(Networks.ratio, slow=(slow, modes[slow]), fast=(fast, modes[fast]))
        yield f"{slow} / {fast}", ratio
    yield f"sampling, {mode}", partial(Networks.sampling, mode=mode)
    for kind in ("vanilla", "stage 2", "stage 1"):
        yield f"{kind}, whole", partial(Networks.speed, kind=kind, mode="whole", peak=peak)
        for how in dict.fromkeys(["blocks", mode]):
            ratio = partial(Networks.ratio, slow=(kind, how), fast=(kind, "whole"))
            yield f"{kind}, {how} / whole", ratio


@dataclass
class Settings:
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one
    out: str = "out/bench.json"  # file for the figures
    minutes: float | None = setting(None, above=0)  # for all of it (default: 5 on a card, else 2)
    only: str = ""  # only the figures with this in their names
    model: str | None = None  # one size (default: by device)
    batch_size: int | None = setting(None, at_least=4)  # images in a step (default: by size)
    train_steps: int = setting(100, at_least=1)  # before the precision of f_g is measured


def main():
    args = common.parse_settings(Settings, __doc__)
    device, _, _ = common.setup(args.device)
    on_card = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_card else "a CPU"
    content = {"device": card, "torch": torch.__version__, "TFLOP/s count": COUNTED}
    say(f"{card}, torch {torch.__version__}; TFLOP/s count {COUNTED}")
    peak = next((value for part, value in PEAKS.items() if part in card), None)
    side, minutes, mode = (32, 5, "blocks") if on_card else (16, 2, "eager")
    sizes = [("SiT-XL/2", 32), ("SiT-B/2", 64)] if on_card else [("SiT-Ti/4", 16)]
    sizes = [(args.model, 32)] if args.model else sizes
    sizes = [(name, args.batch_size or batch) for name, batch in sizes]
    figures = [((*sizes[0], False), "autoencoder", Networks.autoencoder)]
    for name, batch in sizes:
        for title, measure in plan(mode, peak, args.train_steps):
            wanted = name, batch, "whole" in title
            figures.append((wanted, f"{name}, {batch} images: {title}", measure))
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    for title, measure in judging.PLAN.items():
        figures.append(((*sizes[-1], True), title, partial(measure, scratch=scratch.name)))
    figures = [f for f in figures if args.only in f[1] and (on_card or "released" not in f[1])]
    figures.sort(key=lambda figure: figure[0][2])  # what is compiled whole is late, judging last
    if not figures:
        raise UserError(f"--only {args.only}: no such figure; try naive, whole or sampling")
    content["figures"] = found = {name: None for _, name, _ in figures}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch.name  # nothing was compiled before

    def stop(number, frame):
        say(f"no time left for: {'; '.join(name for name in found if not found[name])}")
        judging.stop()
        scratch.cleanup()
        os._exit(0)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * (args.minutes or minutes))
    folder, built = RandomLatents(side), None
    for wanted, name, measure in figures:
        try:
            if built != wanted:
                networks, built = None, wanted
                torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
            networks = networks or Networks(wanted[0], wanted[1], folder, device)
            found[name] = measure(networks)
            line = ", ".join(f"{number:.4g} {unit}" for unit, number in found[name].items())
        except UserError:
            raise
        except Exception as error:  # on a small card: out of memory
            found[name] = line = f"not measured, {type(error).__name__}: {str(error)[:100]}"
        with common.atomic_write(args.out) as file:
            file.write(json.dumps(content, indent=1).encode())
        say(f"{name}: {line}")


if __name__ == "__main__":
    common.run(main)
