"""Benchmarks, printed as tables. Two things are compared in turns, in one run, as the median ratio.

    python experiments/bench.py                   # on the CPU
    python experiments/bench.py --device cuda     # every GPU figure
    python experiments/bench.py --only step       # one part

step: a guided step against the naive one and a vanilla one. precision: rounding errors of f_g and
of the time embedding. mfu: the share of the card's peak. loader, vae, sampling, fid, help: their
speed.
"""

import contextlib
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import say, setting

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F

import fid
import train_stage2
from build_teacher import extrapolate
from experiments.baselines.cost import projector_cost, share
from experiments.probe import both_features
from sample import sample
from train_stage1 import Losses, State, draw, latent_stream, make_batch, rows_in_range
from vae_latents import AutoencoderKL, LatentFolder

ROOT = Path(__file__).resolve().parent.parent
# Dense bf16 TFLOP/s, by a part of the card's name
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}

# ---- Timing


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device) -> float:
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def in_turns(device, repeats, warmup=2, **what):
    """Time each callable once a round, in turns: {name: [seconds of each round]}."""
    times = {name: [] for name in what}
    for function in what.values():
        for _ in range(warmup):
            function()
    for _ in range(repeats):
        for name, function in what.items():
            times[name].append(seconds_of(function, device))
    return times


def ratio(times, slow, fast) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def autocast(device, dtype=torch.bfloat16):
    """Mixed precision on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, dtype, enabled=device.type == "cuda")


def awake(model):
    """Fill the zero-initialised layers, so that every path carries signal."""
    for p in model.parameters():
        if p.numel() and p.abs().sum() == 0:
            nn.init.normal_(p, std=0.02)
    return model


# ---- The training step


class Step:
    """One training step on one batch; calling it trains. The kinds:

    "ours": stage 2 as train_stage2.py runs it, teacher and projector on the slice of t alone.
    "vanilla": the same loop without an auxiliary loss, as it runs after guidance has ended.
    "naive": both labels through the teacher and the projector on the whole batch, the mask
    afterwards; AdamW and EMA parameter by parameter. The release does so, with a slower teacher.
    "naive after": the same when guidance has ended, and teacher and projector still run.

    `like` lends its networks and its batch: less memory, and the same loss.
    """

    def __init__(self, kind, name, size, batch, device, compiled=None, like=None):
        torch.manual_seed(0)
        self.kind, self.device, self.naive = kind, device, kind.startswith("naive")
        self.args = train_stage2.Settings(model=name, batch_size=batch, lr=1e-5)
        if like:
            self.guidance, self.batch, self.state = like.guidance, like.batch, copy.copy(like.state)
        else:
            self.guidance = self.new_guidance(size)
            self.batch = self.new_batch(size)
            self.state = self.new_state(size)
        if kind == "vanilla":
            self.state.projector = None
        self.weight = 0.0 if kind == "naive after" else 0.5
        self.rows = rows_in_range(batch, 1, self.args.t_min, self.args.t_max)
        networks = [self.state.model, self.state.projector]
        if kind == "naive after":
            networks.pop()
        parameters = [p for network in networks if network for p in network.parameters()]
        options = {"lr": self.args.lr, "weight_decay": 0, "fused": None if self.naive else True}
        self.state.optimizer = torch.optim.AdamW(parameters, **options)
        self.losses = Losses(self.state.model, self.state.projector, self.guidance, self.rows)
        if compiled:
            self.losses = torch.compile(self.losses, dynamic=False, mode=compiled)
            if kind == "ours":
                self.guidance.teacher.compile(dynamic=False, mode=compiled)

    def new_guidance(self, size):
        sizes, _ = models.parse_name(self.args.model)
        guidance = train_stage2.Guidance(self.args, sizes.student_depth)
        guidance.s = 30.0
        if self.kind != "vanilla":
            teacher = awake(models.build(self.args.model, size)).cut(sizes.teacher_depth)
            guidance.teacher = teacher.eval().requires_grad_(False).to(self.device)
        return guidance

    def new_batch(self, size):
        number, shape = self.args.batch_size, (4, size, size)
        mean_and_std = torch.randn(number, *shape), torch.full((number, *shape), 0.1)
        moments, labels = torch.cat(mean_and_std, dim=1), torch.arange(number)
        inputs = (x.to(self.device) for x in (labels, moments, labels))
        return make_batch(*inputs, draw(0, number, shape, 0, self.device), 1.0, 1000)

    def new_state(self, size):
        meta = {"height": size, "channels": 4, "classes": range(1000)}
        auxiliary = None if self.kind == "vanilla" else self.guidance
        state = State(self.args, meta, self.device, auxiliary)
        awake(state.model)
        return state

    def both(self):
        """(L_diff, L_guide)."""
        with autocast(self.device):
            if self.naive:
                return self.naive_losses()
            batch = self.batch
            guided = self.kind == "ours"
            target = self.guidance.target(batch[self.rows]) if guided else None
            return self.losses(batch.x_t, batch.t, batch.told, batch.velocity, target)

    def naive_losses(self):
        batch, teacher, depth = self.batch, self.guidance.teacher, self.guidance.depth
        with torch.no_grad():
            labels = torch.cat([batch.y, torch.full_like(batch.y, 1000)])
            twice = batch.x_t.repeat(2, 1, 1, 1), batch.t.repeat(2), labels
            tokens = teacher.forward(*twice, taps=[teacher.depth])[1]  # forward is never compiled
            f_guided = extrapolate(*tokens[teacher.depth].float().chunk(2), 30.0)
        prediction, tokens = self.state.model(batch.x_t, batch.t, batch.told, taps=[depth])
        answer = self.state.projector(tokens[depth])
        diff = (prediction.float() - batch.velocity).square().flatten(1).mean(dim=1)
        guide = (answer.float() - f_guided).square().flatten(1).mean(dim=1)
        mask = ((batch.t >= self.args.t_min) & (batch.t <= self.args.t_max)).float()
        return diff.mean(), (guide * mask).mean()

    def loss(self):
        diff, guide = self.both()
        return diff + self.weight * guide

    def __call__(self):
        diff, guide = self.both()
        (diff + self.weight * guide).backward()
        if self.naive:
            self.naive_update()
        else:
            self.state.update(self.args, torch.stack([diff, guide]).detach())

    def naive_update(self):
        optimizer = self.state.optimizer
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loop_ema(self.state)


def loop_ema(state):
    """The EMA as a loop over parameters; .data keeps both updates out of autograd's record."""
    for average, p in zip(state.ema.parameters(), state.model.parameters(), strict=True):
        average.mul_(0.9999).add_(p.data, alpha=1e-4)


def foreach_ema(state):
    weights = [p.detach() for p in state.model.parameters()]
    torch._foreach_lerp_(list(state.ema.parameters()), weights, 1e-4)


def bench_step(device, repeats):
    sizes = [("SiT-S/2", 16, 32), ("SiT-B/2", 16, 16)]
    if device.type == "cuda":
        sizes = [("SiT-B/2", 32, 256), ("SiT-XL/2", 32, 32)]
    for name, size, batch in sizes:
        compare_steps(name, size, batch, device, repeats)


def compare_steps(name, size, batch, device, repeats):
    compiled, how = None, "float32, eager"
    if device.type == "cuda":
        compiled, how = "default", "bf16, ours compiled"
    naive = Step("naive", name, size, batch, device)
    steps = {"naive": naive}
    steps["naive after"] = Step("naive after", name, size, batch, device, like=naive)
    for kind in ("ours", "vanilla"):
        steps[kind] = Step(kind, name, size, batch, device, compiled, like=naive)
    with torch.no_grad():
        loss = {kind: steps[kind].loss().item() for kind in ("naive", "ours")}
    start = time.perf_counter()
    times = in_turns(device, repeats, **steps)
    took = f"warm-up and {repeats} rounds {time.perf_counter() - start:.0f} s"
    say(f"\n{name}, latents {size} x {size}, batch {batch}, {how} ({took})")
    say(f"  same weights, same t: loss naive {loss['naive']:.6f}, ours {loss['ours']:.6f}")
    for kind, seconds in times.items():
        say(f"  {kind:12} {1e3 * statistics.median(seconds):9.1f} ms")
    show_ratios(naive, times)


def show_ratios(naive, times):
    """The measured ratios, and what they would be if multiply-adds alone took time."""
    model, teacher, part = naive.state.model, naive.guidance.teacher, share(naive.args)
    forwards = 2 * teacher.forward_flops() / (3 * model.forward_flops())  # f_c and f_u
    extra = forwards + projector_cost(model, naive.state.projector, naive.args) / part
    guided, whole = 1 + extra * part, 1 + extra
    for title, slow, fast, expected in (
        ("naive / ours while guided  ", "naive", "ours", whole / guided),
        ("naive / ours after guidance", "naive after", "vanilla", whole),
        ("ours guided / vanilla      ", "ours", "vanilla", guided),
    ):
        measured = ratio(times, slow, fast)
        say(f"  {title} {measured:5.2f}x   (multiply-adds alone: {expected:.2f}x)")


# ---- Precision


@contextlib.contextmanager
def tf32(enabled):
    """TF32 matrix products on a GPU, or none."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = enabled
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def rounded(x):
    """float32 rounded to TF32's 10 explicit bits of mantissa, as the tensor cores do."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def round_inputs(module, inputs):
    return (rounded(inputs[0]),)


def emulated_tf32(network):
    """A copy whose linear layers compute in TF32, on a CPU too; attention stays in float32."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(round_inputs)
    return network


def toy_batch(prototypes, n):
    """x_t, t, y and velocity of class-dependent latents: a prototype of each class, and noise."""
    device, shape = prototypes.device, prototypes.shape[1:]
    y = torch.randint(0, len(prototypes), (n,), device=device)
    t = torch.rand(n, device=device)
    x0 = 0.7 * prototypes[y] + 0.7 * torch.randn(n, *shape, device=device)
    eps = torch.randn(n, *shape, device=device)
    x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps
    return x_t, t, y, eps - x0


def briefly_trained(name, size, steps, device):
    """(A SiT after `steps` steps on the toy latents, the class prototypes)."""
    torch.manual_seed(0)
    model = models.build(name, size, 4, 10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0)
    prototypes = torch.randn(10, 4, size, size, device=device)
    for _ in range(steps):
        x_t, t, y, velocity = toy_batch(prototypes, 4)
        told = torch.where(torch.rand(4, device=device) < 0.1, 10, y)
        (model(x_t, t, told)[0] - velocity).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), prototypes


def features(teacher, batch, dtype=None):
    """(f_c, f_u), in float32 arithmetic or under autocast to `dtype`."""
    with torch.autocast(batch[0].device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        return both_features(teacher, *batch, [teacher.depth])[teacher.depth]


def feature_errors(teacher, batch):
    """|f_c - f_u| / |f_u|; then the relative error of f_g at s = 30 in TF32, float16, bfloat16."""
    f_c, f_u = features(teacher, batch)
    exact = extrapolate(f_c, f_u, 30)
    with tf32(True):
        copied = teacher if batch[0].is_cuda else emulated_tf32(teacher)
        guided = [extrapolate(*features(copied, batch), 30)]
    for dtype in (torch.float16, torch.bfloat16):
        guided.append(extrapolate(*features(teacher, batch, dtype), 30))
    errors = [((f_g - exact).norm() / exact.norm()).item() for f_g in guided]
    return ((f_c - f_u).norm() / f_u.norm()).item(), *errors


@torch.no_grad()
def neighbours(model, strata=256):
    """How well the network tells neighbouring t's apart, for a batch of `strata`.

    The difference of their time embeddings against float64's, as (cosine, length over the true
    length), means over all pairs: of the MLP under bfloat16 autocast; of the float32 MLP, as
    models.py has it; and of what the blocks' adaLN layers make of that one under autocast, which
    is silu(c) in bfloat16.
    """
    device, label = model.pos_embed.device, model.y_embedder["embedding_table"].weight[0]
    t = (torch.arange(strata, device=device) + 0.5) / strata
    inputs = []
    hook = model.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: inputs.append(args[0]))
    now = model.t_embedder(t)
    hook.remove()
    with torch.autocast(device.type, torch.bfloat16):
        before = model.t_embedder.mlp(inputs[0])
    exact = copy.deepcopy(model.t_embedder).double()(t)
    read = F.silu(now + label).bfloat16()
    return [
        compare_differences(before, exact),
        compare_differences(now, exact),
        compare_differences(read, F.silu(exact + label)),
    ]


def compare_differences(embeddings, exact):
    found, true = embeddings.double().diff(dim=0), exact.diff(dim=0)
    cosine = F.cosine_similarity(found, true, dim=1).mean().item()
    return cosine, (found.norm(dim=1) / true.norm(dim=1)).mean().item()


def bench_precision(device, repeats):
    """Errors after a short training on class-dependent latents, for there f_c differs from f_u."""
    trained = {"SiT-S/2": 300, "SiT-B/2": 100}
    trained = {name: briefly_trained(name, 16, steps, device) for name, steps in trained.items()}
    say(f"\nf_g at s = 30, relative error against float32 ({device.type})")
    titles = f"{'TF32':>9} {'float16':>9} {'bfloat16':>9}"
    say(f"  {'size':10} {'|f_c - f_u| / |f_u|':>20} {titles}")
    times = {}
    for name, (model, prototypes) in trained.items():
        x_t, t, y, _ = toy_batch(prototypes, 16)
        with tf32(False):
            times[name] = neighbours(model)
            gap, *errors = feature_errors(model.cut(8), (x_t, 0.4 + 0.3 * t, y))
        say(f"  {name:10} {gap:20.4f} " + " ".join(f"{error:9.2e}" for error in errors))
    say("\ntime embeddings of neighbouring t's, 1/256 apart: their difference against float64's,")
    say("cosine (1 is right) and length (1 is right)")
    titles = f"{'MLP in bfloat16':>18} {'in float32 (now)':>18} {'as adaLN reads it':>18}"
    say(f"  {'size':10} {titles}")
    for name, found in times.items():
        cells = [f"{cosine:.4f}, {length:.2f}x" for cosine, length in found]
        say(f"  {name:10} " + " ".join(f"{cell:>18}" for cell in cells))


# ---- The share of the card's peak


def bench_mfu(device, repeats):
    """SiT-XL/2 in four modes of torch.compile; on a CPU a tiny one, to see that this runs."""
    modes, setting = (None, "default"), ("SiT-Ti/2", 8, 8, 512)
    card = "a CPU"
    if device.type == "cuda":
        modes += ("reduce-overhead", "max-autotune-no-cudagraphs")
        setting, card = ("SiT-XL/2", 32, 64, 8192), torch.cuda.get_device_name(device)
    name, size, batch, side = setting
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in card), float("nan"))
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    say(f"\n{name}, {batch} images, {card}: forward, backward, clip, AdamW, EMA")
    for mode in modes:
        one_mode(mode, (name, size, batch, device), square, peak, repeats)


def one_mode(mode, step_of, square, peak, repeats):
    """A line: speed, share of the dense bf16 peak, and of a large matmul's rate in this run."""
    device = square.device
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = Step("vanilla", *step_of, compiled=mode)
    first = seconds_of(step, device)
    times = in_turns(device, repeats, step=step, matmul=lambda: square @ square)
    seconds = statistics.median(times["step"])
    ceiling = 2 * len(square) ** 3 / statistics.median(times["matmul"]) / 1e12
    images = step.args.batch_size / seconds
    achieved = 3 * step.state.model.forward_flops() * images / 1e12
    line = f"{1e3 * seconds:7.1f} ms  {images:6.0f} images/s  {achieved:6.2f} TFLOP/s = "
    line += f"{100 * achieved / peak:5.1f} % of peak, {100 * achieved / ceiling:5.1f} % of a matmul"
    say(f"  {mode or 'eager':27} {line}{compilation(first, device)}")
    if mode == "default":
        bench_ema(step, repeats)


def compilation(first, device) -> str:
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"].get("unique_graphs", 0), len(counters["graph_break"])
    text = f"  first step {first:.0f} s, {graphs} graphs, {breaks} breaks"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


def bench_ema(step, repeats):
    """What one call for all parameters brings."""
    state = step.state
    how = {"foreach": lambda: foreach_ema(state), "loop": lambda: loop_ema(state)}
    times = in_turns(step.device, repeats, **how)
    alone = 1e3 * statistics.median(times["foreach"])
    more = ratio(times, "loop", "foreach")
    say(f"    EMA alone: {alone:.2f} ms, a loop over parameters takes {more:.1f}x that")


# ---- The loader, the VAE, the sampler


def write_latents(path, num):
    """A folder of `num` latents of 256-px images, all alike."""
    shape = {"dtype": np.float16, "shape": (num, 8, 32, 32)}
    moments = np.lib.format.open_memmap(path / "moments.npy", mode="w+", **shape)
    for part in np.array_split(np.arange(num), 100):
        moments[part] = np.float16(0.5)
    np.save(path / "labels.npy", np.arange(num) % 1000)
    meta = {"format": 1, "num_images": num, "channels": 4, "height": 32, "width": 32}
    meta.update(classes=list(range(1000)), scale=1.0)
    (path / "meta.json").write_text(json.dumps(meta))


def bench_loader(device, repeats):
    """The loader alone, from the page cache: the file was just written."""
    num = 200_000
    with tempfile.TemporaryDirectory() as where:
        write_latents(Path(where), num)
        folder = LatentFolder(where)
        say(f"\nloader alone, {num} latents of 8 x 32 x 32 float16, page cache, batches of 64")
        if device.type != "cuda":
            return say(f"  memory map: {loader_rate(folder, device):.0f} images/s")
        say(f"  on the GPU: {loader_rate(folder, device):.0f} images/s")
        small = types.SimpleNamespace(total_memory=0)  # as if they did not fit
        with mock.patch("torch.cuda.get_device_properties", return_value=small):
            say(f"  pinned, read ahead: {loader_rate(folder, device):.0f} images/s")


def loader_rate(folder, device, steps=200) -> float:
    args = types.SimpleNamespace(steps=steps, batch_size=64, seed=0)
    stream = latent_stream(folder, args, 0, range(1), 1, device)
    next(stream)  # the upload, once a run, is not what is measured

    def read():
        for share_of_a_step in stream:
            for x in share_of_a_step:
                x.to(device, non_blocking=True)

    seconds = seconds_of(read, device)
    return 64 * (steps - 1) / seconds


def bench_vae(device, repeats):
    """Stable Diffusion's VAE, encoder and decoder, in float32 (TF32 on a GPU) and in bfloat16."""
    vae = AutoencoderKL().eval().to(device, memory_format=torch.channels_last)
    n, side = (16, 256) if device.type == "cuda" else (1, 64)  # bfloat16 crawls on most CPUs
    images = torch.rand(n, 3, side, side, device=device).mul(2).sub(1)
    images = images.contiguous(memory_format=torch.channels_last)
    latents = torch.randn(n, 4, side // 8, side // 8, device=device)

    @torch.no_grad()
    def encode(bf16=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return vae.encode(images)[0]

    @torch.no_grad()
    def decode(bf16=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return vae.decode(latents)

    how = {"encode": encode, "encode bf16": lambda: encode(True)}
    how.update({"decode": decode, "decode bf16": lambda: decode(True)})
    times = in_turns(device, repeats, **how)
    exact, low = encode(), encode(True)
    error = ((low - exact).norm() / exact.norm()).item()
    say(f"\nStable Diffusion's VAE at {side} px, random weights; "
        f"bf16's error of the mean {error:.1e} (relative)")  # fmt: skip
    for name, seconds in times.items():
        say(f"  {name:12} {n / statistics.median(seconds):8.1f} images/s")


def bench_sampling(device, repeats):
    """sample() against its network evaluations alone: the ratio should be near 1."""
    name, size, n, steps = "SiT-S/2", 16, 16, 10
    if device.type == "cuda":
        name, size, n, steps = "SiT-XL/2", 32, 32, 25
    model = awake(models.build(name, size)).eval().to(device)
    y, noise = torch.arange(n, device=device), torch.randn(n, 4, size, size, device=device)
    times = torch.linspace(1, 0, steps + 1)[:-1].tolist()

    @torch.no_grad()
    def evaluations():
        with autocast(device):
            for t in times:
                k = 2 if t <= 0.65 else 1
                at = torch.full((k * n,), t, device=device)
                model(noise.repeat(k, 1, 1, 1), at, y.repeat(k))

    def sampler():
        how = {"steps": steps, "mode": "euler", "cfg": 1.9, "interval": (0.0, 0.65)}
        return sample(model, noise, y, 1000, **how)

    found = in_turns(device, repeats, sampler=sampler, alone=evaluations)
    say(f"\nsampling, {name}, {n} images, {steps} Euler steps, cfg 1.9 for t <= 0.65: "
        f"{ratio(found, 'sampler', 'alone'):.3f}x its network evaluations")  # fmt: skip


# ---- fid.py, and how long --help takes


def bench_fid(device, repeats):
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        x = rng.normal(size=(6000, 2048)) @ rng.normal(size=(2048, 2048)) / 45
        sides += [x.mean(0), np.cov(x, rowvar=False)]
    mu1, sigma1, mu2, sigma2 = sides
    found = {}

    def sqrtm():
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        found["sqrtm"] = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)

    def eigh():
        found["eigh"] = fid.frechet_distance(*sides)

    times = in_turns(torch.device("cpu"), 3, warmup=0, sqrtm=sqrtm, eigh=eigh)
    medians = ", ".join(f"{name} {statistics.median(s):.1f} s" for name, s in times.items())
    say(f"\nFrechet distance, 2048 x 2048: {medians}, ratio {ratio(times, 'sqrtm', 'eigh'):.1f}x, "
        f"relative difference {abs(found['sqrtm'] / found['eigh'] - 1):.1e}")  # fmt: skip
    real, fake = (torch.randn(10000, 2048, device=device) for _ in range(2))
    seconds = seconds_of(lambda: fid.precision_recall(real, fake), device)
    say(f"precision and recall, 10,000 x 10,000: {seconds:.1f} s, "
        "at most 1024 x 10,000 distances held")  # fmt: skip


def bench_help(device, repeats):
    say("\n--help, seconds, and `import torch` alone")
    scripts = "vae_latents train_stage1 build_teacher train_stage2 sample fid".split()
    commands = {"import torch": ["-c", "import torch"]}
    commands.update({f"{name}.py --help": [f"{name}.py", "--help"] for name in scripts})
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "check": True}
    for title, command in commands.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], **quiet)
            seconds.append(time.perf_counter() - start)
        say(f"  {title:28} {statistics.median(seconds):.1f}")


PARTS = {
    "step": bench_step,
    "precision": bench_precision,
    "mfu": bench_mfu,
    "loader": bench_loader,
    "vae": bench_vae,
    "sampling": bench_sampling,
    "fid": bench_fid,
    "help": bench_help,
}


@dataclass
class Settings:
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    repeats: int = setting(7, "rounds of each comparison", at_least=1)
    only: str | None = setting(None, "one part alone (default: all)", choices=[*PARTS])


def main():
    args = models.parse_settings(Settings, __doc__)
    device, _, _ = models.setup(args.device)
    for name, part in PARTS.items():
        if args.only in (None, name):
            part(device, args.repeats)


if __name__ == "__main__":
    models.run(main)
