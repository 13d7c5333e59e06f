"""Benchmarks, printed as a table; not tests. Two things are compared in turns, in one run, as the median of their ratios.

    python tests/bench.py                     # on the CPU: the step against the naive one, sampling, fid.py, start-up
    python tests/bench.py --device cuda       # every GPU figure: the step, MFU, memory, loader, VAE, sampling, teacher's precision
    python tests/bench.py --only precision    # one part: step, precision, mfu, loader, vae, sampling, fid, help
"""
import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid
from build_teacher import Teacher, guided_features
from models import DEPTHS, Projector, build
from sample import sample
from train_stage1 import PEAK_TFLOPS, TwoLosses, draw, guided_rows, latent_stream
from vae_latents import AutoencoderKL, LatentFolder


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(device, repeats, **what):
    """Time each callable once per round, in turns: {name: [seconds of each round]}."""
    times = {name: [] for name in what}
    for function in what.values():
        function()
        function()
    for _ in range(repeats):
        for name, function in what.items():
            sync(device)
            start = time.perf_counter()
            function()
            sync(device)
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times, slow, fast):
    return statistics.median(a / b for a, b in zip(times[slow], times[fast]))


def awake(model):
    """Fill the zero-initialised layers, so that every path carries signal."""
    for p in model.parameters():
        if p.numel() and p.abs().sum() == 0:
            nn.init.normal_(p, std=0.02)
    return model


class Step:
    """One stage-2 training step: ours, the naive one, or a vanilla one. `like` lends its networks and batch, to save memory."""

    def __init__(self, kind, name, size, batch, device, compiled=None, like=None):
        torch.manual_seed(0)
        self.kind, self.device, self.batch = kind, device, batch
        naive = kind.startswith("naive")
        _, self.dt, self.ds = DEPTHS[name]
        self.rows = guided_rows(batch, 1, 0.4, 0.7)
        if like:
            for part in ("model", "teacher", "projector", "ema", "t", "noise", "velocity", "x_t", "y_true", "y"):
                setattr(self, part, getattr(like, part))
        else:
            self.model = awake(build(name, size, 4, 1000)).to(device)
            self.projector = Projector(self.model.width).to(device)
            self.ema = copy.deepcopy(self.model).requires_grad_(False)
            self.teacher = None if kind == "vanilla" else Teacher(awake(build(name, size, 4, 1000)), self.dt).to(device)
            t, drop, _, noise = draw(0, batch, (4, size, size), 0, device)
            x0 = torch.randn(noise.shape, device=device)
            self.t, self.noise, self.velocity = t, noise, noise - x0
            self.x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
            self.y_true = torch.arange(batch, device=device)
            self.y = torch.where(drop, 1000, self.y_true)
        guided = kind == "ours"
        self.losses = TwoLosses(self.model, self.projector if guided else None, self.ds if guided else None, self.rows)
        if compiled:
            self.losses = torch.compile(self.losses, dynamic=False, mode=compiled)
            if guided:
                self.teacher.compile(dynamic=False, mode=compiled)
        self.parameters = [*self.model.parameters(), *(self.projector.parameters() if guided or kind == "naive" else [])]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=None if naive else True)

    def autocast(self, dtype=torch.bfloat16):
        return torch.autocast(self.device.type, dtype, enabled=self.device.type == "cuda")

    def loss(self):
        if self.kind.startswith("naive"):  # the authors' way: both labels over the whole batch, the mask afterwards
            with self.autocast():
                with torch.no_grad():
                    h, c = self.teacher.model.embed(torch.cat([self.x_t, self.x_t]), torch.cat([self.t, self.t]),
                                                    torch.cat([self.y_true, torch.full_like(self.y_true, 1000)]))
                    for block in self.teacher.model.blocks:
                        h = block(h, c)
                    f_cond, f_uncond = h.float().chunk(2)
                    f_guided = f_uncond + 30 * (f_cond - f_uncond)
                v, tokens = self.model(self.x_t, self.t, self.y, tap=self.ds)
                diff = (v.float() - self.velocity).square().flatten(1).mean(1)
                answer = self.projector(tokens)
            mask = ((self.t >= 0.4) & (self.t <= 0.7)).float()
            aux = (answer.float() - f_guided).square().flatten(1).mean(1)
            weight = 0.5 if self.kind == "naive" else 0.0  # "naive after": guidance has ended, teacher and projector run on
            return diff.mean() + weight * (aux * mask).mean()
        with self.autocast():
            if self.kind == "vanilla":
                return self.losses(self.x_t, self.t, self.y, self.velocity)[0].mean()
            r = self.rows
            target = guided_features(self.teacher, self.x_t[r], self.t[r], self.y_true[r], 30.0)
            diff, aux = self.losses(self.x_t, self.t, self.y, self.velocity, target)
        mask = ((self.t[r] >= 0.4) & (self.t[r] <= 0.7)).float()
        return diff.mean() + 0.5 * (aux * mask).sum() / self.batch

    def __call__(self):
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.kind.startswith("naive"):
            for average, p in zip(self.ema.parameters(), self.model.parameters()):
                average.mul_(0.9999).add_(p.data, alpha=1 - 0.9999)  # .data: neither update is recorded by autograd
        else:
            torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.model.parameters()], 1e-4)


def arithmetic(model, projector, teacher_depth=0):
    """FLOPs in vanilla steps of what an auxiliary loss adds on the whole batch: the projector, and the teacher's two forwards."""
    tokens = (model.input_size // model.patch) ** 2
    head = 3 * 2 * tokens * sum(p.numel() for p in projector.parameters() if p.ndim == 2)
    return (2 * model.forward_flops() * teacher_depth / model.depth + head) / (3 * model.forward_flops())


def bench_step(device, repeats):
    cuda = device.type == "cuda"
    for name, size, batch in ([("SiT-B/2", 32, 256), ("SiT-XL/2", 32, 32)] if cuda else [("SiT-S/2", 16, 32), ("SiT-B/2", 16, 16)]):
        naive = Step("naive", name, size, batch, device)
        steps = {"naive": naive, "naive after": Step("naive after", name, size, batch, device, like=naive)}
        for kind in ("ours", "vanilla"):
            steps[kind] = Step(kind, name, size, batch, device, compiled="default" if cuda else None, like=naive)
        with torch.no_grad():
            a, b = steps["naive"].loss().item(), steps["ours"].loss().item()
        start = time.perf_counter()
        times = in_turns(device, repeats, **steps)
        print(f"\n{name}, latents {size} x {size}, batch {batch}, {'bf16, ours compiled' if cuda else 'float32, eager'} "
              f"(warm-up and {repeats} rounds {time.perf_counter() - start:.0f} s)\n  same weights, same t: loss naive {a:.6f}, ours {b:.6f}")
        for kind, seconds in times.items():
            print(f"  {kind:12} {1e3 * statistics.median(seconds):9.1f} ms")
        extra, rows = arithmetic(naive.model, naive.projector, naive.dt), naive.rows
        guided, whole = 1 + extra * (rows.stop - rows.start) / batch, 1 + extra
        for title, slow, fast, expected in (("naive / ours while guided  ", "naive", "ours", whole / guided),
                                            ("naive / ours after guidance", "naive after", "vanilla", whole),
                                            ("ours guided / vanilla      ", "ours", "vanilla", guided)):
            print(f"  {title} {ratio(times, slow, fast):5.2f}x   (multiply-adds alone: {expected:.2f}x)")


def rounded(dtype_bits):
    """A forward pre-hook that rounds a linear layer's input to TF32's 10 explicit mantissa bits, as the tensor cores do."""
    def hook(module, args):
        x = args[0].contiguous().view(torch.int32)
        return (((x + (1 << (22 - dtype_bits))) & ~((1 << (23 - dtype_bits)) - 1)).view(torch.float32),)
    return hook


def bench_precision(device, repeats):
    """The error of f_g at s = 30 against float32, relative in the norm, after 300 steps of training on class-dependent latents."""
    print(f"\nf_g at s = 30, relative error against float32 ({device.type})\n  {'size':10} {'|f_c - f_u| / |f_u|':>20} {'TF32':>9} {'float16':>9} {'bfloat16':>9}")
    for name, size, steps in (("SiT-S/2", 16, 300), ("SiT-B/2", 16, 100)):
        torch.manual_seed(0)
        model = build(name, size, 4, 10).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
        prototypes = torch.randn(10, 4, size, size, device=device)
        def batch(n):
            y = torch.randint(0, 10, (n,), device=device)
            t = torch.rand(n, device=device)
            x0, eps = 0.7 * prototypes[y] + 0.7 * torch.randn(n, 4, size, size, device=device), torch.randn(n, 4, size, size, device=device)
            return (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps, t, y, eps - x0
        for step in range(steps):
            x_t, t, y, velocity = batch(4)
            y = torch.where(torch.rand(4, device=device) < 0.1, 10, y)
            (model(x_t, t, y)[0] - velocity).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        x_t, t, y, _ = batch(16)
        t = 0.4 + 0.3 * t
        teacher = Teacher(model.eval(), 8)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

        @torch.no_grad()
        def features(dtype=None, tf32=False):
            hooks = []
            if tf32 and device.type == "cuda":
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            elif tf32:  # the weights once, the inputs by a hook; attention's products stay in float32 here
                copied = copy.deepcopy(teacher)
                for m in copied.modules():
                    if isinstance(m, nn.Linear):
                        m.weight.data = rounded(10)(m, (m.weight.data,))[0]
                        hooks.append(m.register_forward_pre_hook(rounded(10)))
            net = copied if hooks else teacher
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                f_c, f_u = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])).float().chunk(2)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            return f_u + 30 * (f_c - f_u), (f_c - f_u).norm() / f_u.norm()

        exact, gap = features()
        errors = [((features(dtype, tf32)[0] - exact).norm() / exact.norm()).item()
                  for dtype, tf32 in ((None, True), (torch.float16, False), (torch.bfloat16, False))]
        print(f"  {name:10} {gap.item():20.4f} " + " ".join(f"{error:9.2e}" for error in errors), flush=True)


def bench_mfu(device, repeats):
    """SiT-XL/2 at 64 images: share of the dense bf16 peak by the model's own FLOPs, and of a large matmul's rate in this run;
    eager, compiled, with CUDA graphs, with tuned kernels. (On a CPU a tiny model, to see that it runs.)"""
    cuda = device.type == "cuda"
    name, size, batch, side = ("SiT-XL/2", 32, 64, 8192) if cuda else ("SiT-Ti/2", 8, 8, 512)
    kind = torch.cuda.get_device_name(device) if cuda else "a CPU"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in kind), float("nan"))
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    counters = torch._dynamo.utils.counters
    print(f"\n{name}, {batch} images, bf16, on {kind}: forward, backward, clip, AdamW, EMA")
    for mode in (None, "default", "reduce-overhead", "max-autotune-no-cudagraphs") if cuda else (None, "default"):
        torch._dynamo.reset()
        counters.clear()
        step = Step("vanilla", name, size, batch, device, compiled=mode)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        sync(device)
        compile_s = time.perf_counter() - start
        times = in_turns(device, repeats, step=step, matmul=lambda: a @ a)
        seconds, ceiling = statistics.median(times["step"]), 2 * side ** 3 / statistics.median(times["matmul"]) / 1e12
        achieved = 3 * step.model.forward_flops() * batch / seconds / 1e12
        print(f"  {mode or 'eager':27} {1e3 * seconds:7.1f} ms  {batch / seconds:6.0f} images/s  {achieved:6.2f} TFLOP/s = {100 * achieved / peak:5.1f} % of "
              f"peak, {100 * achieved / ceiling:5.1f} % of a matmul  first step {compile_s:.0f} s, {counters['stats'].get('unique_graphs', 0)} graphs, "
              f"{len(counters['graph_break'])} breaks" + (f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if cuda else ""), flush=True)
        if mode == "default":  # what the single EMA call brings
            pairs = list(zip(step.ema.parameters(), step.model.parameters()))
            averages, weights = map(list, zip(*pairs))
            times = in_turns(device, repeats, foreach=lambda: torch._foreach_lerp_(averages, [w.detach() for w in weights], 1e-4),
                             loop=lambda: [e.mul_(0.9999).add_(p.data, alpha=1e-4) for e, p in pairs])
            print(f"    EMA alone: {1e3 * statistics.median(times['foreach']):.2f} ms, a loop over parameters takes {ratio(times, 'loop', 'foreach'):.1f}x that")
            del pairs, averages, weights  # or the next mode's peak memory would hold them
        del step


def bench_loader(device, repeats):
    """The loader alone on 200,000 latents of 256-px images: images/s, read from the page cache (the file was just written)."""
    import json
    with tempfile.TemporaryDirectory() as where:
        N, path = 200000, Path(where)
        moments = np.lib.format.open_memmap(path / "moments.npy", mode="w+", dtype=np.float16, shape=(N, 8, 32, 32))
        for part in np.array_split(np.arange(N), 100):
            moments[part] = np.float16(0.5)
        np.save(path / "labels.npy", np.arange(N) % 1000)
        (path / "meta.json").write_text(json.dumps({"format": 1, "num_images": N, "channels": 4, "height": 32, "width": 32,
                                                    "classes": list(range(1000)), "scale": 1.0}))
        folder, order, steps = LatentFolder(path), np.random.default_rng(0).permutation(N), 200
        free = torch.cuda.mem_get_info
        for kind in ("on the device", "pinned, read ahead") if device.type == "cuda" else ("memory map",):
            if kind.startswith("pinned"):
                torch.cuda.mem_get_info = lambda device: (0, 0)  # as if they did not fit
            stream = latent_stream(folder, range(steps), lambda s: order[s * 64:(s + 1) * 64], device)
            next(stream)  # the upload, once a run, is not what is measured
            sync(device)
            start = time.perf_counter()
            for moments, labels in stream:
                pass
            sync(device)
            rate = 64 * (steps - 1) / (time.perf_counter() - start)
            print(f"\nloader alone, {N} latents of 8 x 32 x 32 float16, page cache, {kind}: {rate:.0f} images/s")
        torch.cuda.mem_get_info = free


def bench_vae(device, repeats):
    vae = AutoencoderKL().eval().to(device, memory_format=torch.channels_last)
    n = 16 if device.type == "cuda" else 1
    x = torch.rand(n, 3, 256, 256, device=device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    z = torch.randn(n, 4, 32, 32, device=device)

    @torch.no_grad()
    def run(function, argument, dtype):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is not None):
            return function(argument)

    times = in_turns(device, repeats, encode=lambda: run(vae.encode, x, None), encode_bf16=lambda: run(vae.encode, x, 1),
                     decode=lambda: run(vae.decode, z, None), decode_bf16=lambda: run(vae.decode, z, 1))
    exact, low = run(vae.encode, x, None)[0], run(vae.encode, x, 1)[0]
    print(f"\nStable Diffusion's VAE at 256 px, random weights; bf16's error of the mean {((low - exact).norm() / exact.norm()).item():.1e} (relative)")
    for name, seconds in times.items():
        print(f"  {name:12} {n / statistics.median(seconds):8.1f} images/s")


def bench_sampling(device, repeats):
    """sample() against its network evaluations alone, with guidance in an interval: the ratio should be near 1."""
    name, size, n, steps = ("SiT-XL/2", 32, 32, 25) if device.type == "cuda" else ("SiT-S/2", 16, 16, 10)
    model = awake(build(name, size, 4, 1000)).eval().to(device)
    y, noise = torch.arange(n, device=device), torch.randn(n, 4, size, size, device=device)
    times = torch.linspace(1, 0, steps + 1)[:-1].tolist()

    @torch.no_grad()
    def alone():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for t in times:
                k = 2 if t <= 0.65 else 1
                model(noise.repeat(k, 1, 1, 1), torch.full((k * n,), t, device=device), y.repeat(k))

    result = in_turns(device, repeats, sampler=lambda: sample(model, noise, y, 1000, steps, "euler", 1.9, 0.0, 0.65), alone=alone)
    print(f"\nsampling, {name}, {n} images, {steps} Euler steps, cfg 1.9 for t <= 0.65: {ratio(result, 'sampler', 'alone'):.3f}x its network evaluations")


def bench_fid(device, repeats):
    import scipy.linalg
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(6000, 2048)) @ rng.normal(size=(2048, 2048)) / 45 for _ in range(2))
    args = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    result = {}

    def theirs():
        result["sqrtm"] = ((args[0] - args[2]) ** 2).sum() + np.trace(args[1] + args[3] - 2 * scipy.linalg.sqrtm(args[1] @ args[3]).real)

    def ours():
        result["eigh"] = fid.frechet_distance(*args)

    times = {"sqrtm": [], "eigh": []}
    for _ in range(3):
        for name, function in (("sqrtm", theirs), ("eigh", ours)):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    print(f"\nFrechet distance, 2048 x 2048: sqrtm {statistics.median(times['sqrtm']):.1f} s, eigh {statistics.median(times['eigh']):.1f} s, ratio "
          f"{ratio(times, 'sqrtm', 'eigh'):.1f}x, relative difference {abs(result['sqrtm'] / result['eigh'] - 1):.1e}")
    start = time.perf_counter()
    x, y = (torch.randn(10000, 2048, device=device) for _ in range(2))
    fid.precision_recall(x, y)
    sync(device)
    print(f"precision and recall, 10,000 x 10,000: {time.perf_counter() - start:.1f} s, at most 1024 x 10,000 distances held")


def bench_help(device, repeats):
    print("\n--help, seconds, and `import torch` alone")
    for command in ["-c import torch", *(f"{name}.py --help" for name in ("vae_latents", "train_stage1", "build_teacher", "train_stage2", "sample", "fid"))]:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command.split(" ", 1)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - start)
        print(f"  {command:28} {statistics.median(seconds):.1f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--only")
    args = p.parse_args()
    device = torch.device(args.device if args.device != "cuda" else "cuda:0")
    parts = {"step": bench_step, "precision": bench_precision, "mfu": bench_mfu, "loader": bench_loader, "vae": bench_vae,
             "sampling": bench_sampling, "fid": bench_fid, "help": bench_help}
    for name, part in parts.items():
        if args.only in (None, name):
            part(device, args.repeats)
