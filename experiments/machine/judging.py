"""What bench.py measures of fid.py and of vae_latents.py's listing: rate, memory, distances, calls.

The pictures are noise and the Inception weights are random: the same work, no scores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import fid
import vae_latents

ROOT = Path(fid.__file__).parent
ROUNDS = 5  # in which two programs are timed in turns; the median counts
WEIGHTS = fid.WEIGHTS.rpartition("/")[2]

# fid.py with a cheap network in Inception's place: what is left is what the data costs
WITHOUT_NETWORK = """
import sys, torch, common, fid

class Cheap(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
    def forward(self, images):
        x = images.flatten(1)[:, :2048].float()
        return x, x[:, :2023], x[:, :1008].softmax(dim=1)

fid.load_inception = lambda weights: Cheap()
common.run(fid.main)
"""


def noise(number, side):
    shape = number, side, side, 3
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def write_folder(folder, pixels, classes=1):
    """An image folder of these pictures as PNG, in FOLDER/<class>."""
    for i, picture in enumerate(pixels):
        path = Path(folder, f"class {i % classes}", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


RUNNING = []  # the program that is being measured


def stop():
    """End what is being measured, because bench.py's time is over."""
    for process in RUNNING:
        process.kill()


def finished(*command, **env):
    """(Wall seconds, CPU seconds, peak KiB) of a program that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    RUNNING[:] = [process]
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)  # of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    RUNNING.clear()
    if process.returncode:
        raise RuntimeError(f"{command[:2]} failed: {errors.decode()[-200:]}")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss


def rate(networks, scratch, number=64, side=256):
    """Pictures a second of whole commands, a folder against statistics: fid.py, pytorch-fid."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        scratch = Path(folder)
        pictures = write_folder(scratch / "pictures", noise(number, side)) / "class 0"
        mixed = np.random.default_rng(0).normal(size=(2048, 2048)) / 2048
        np.savez(scratch / "real.npz", mu=np.ones(2048), sigma=mixed @ mixed.T + np.eye(2048))
        weights = scratch / "hub/checkpoints" / WEIGHTS  # where pytorch-fid looks first
        weights.parent.mkdir(parents=True)
        torch.save(fid.InceptionV3().state_dict(), weights)
        given = [pictures, scratch / "real.npz", "--device", networks.device]
        commands = {"fid.py": ["fid.py", *given, "--weights", weights]}
        if find_spec("pytorch_fid"):
            workers = ["--num-workers", os.cpu_count()]
            commands["pytorch-fid"] = ["-m", "pytorch_fid", *given, *workers]
        taken = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, command in commands.items():
                taken[name].append(finished(*command, TORCH_HOME=str(scratch)))
    figures = {}
    for name, runs in taken.items():
        wall, cpu, _ = (statistics.median(values) for values in zip(*runs, strict=True))
        figures |= {f"pictures/s by {name}": number / wall, f"CPU s by {name}": cpu}
    if len(taken) == 2:
        for unit, which in (("wall", 0), ("CPU", 1)):
            pairs = zip(*taken.values(), strict=True)
            ratios = [theirs[which] / ours[which] for ours, theirs in pairs]
            figures[f"times pytorch-fid's rate, {unit}"] = statistics.median(ratios)
    return figures


def memory(networks, scratch, numbers=(256, 1280), side=256):
    """KiB that a picture in a samples.npz adds to fid.py's peak, with a cheap network."""
    peaks = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for number in numbers:
            samples = Path(folder, f"{number}.npz")
            np.savez(samples, arr_0=noise(number, side))
            given = ["-c", WITHOUT_NETWORK, samples, samples, "--device", "cpu"]
            peaks.append(finished(*given)[2])
            samples.unlink()
    growth = (peaks[1] - peaks[0]) / (numbers[1] - numbers[0])
    return {"KiB a picture, both sides": growth, "KiB of its pixels": 3 * side**2 / 1024}


def plain_precision_recall(real, fake, k=3):
    """The textbook's way, a row of blocks at a time: each product of distances is taken twice."""
    real, fake = real - real.mean(dim=0), fake - real.mean(dim=0)

    def share_within(points, manifold):
        nth = min(k + 1, len(manifold))
        radii = torch.cat([torch.cdist(m, manifold).kthvalue(nth)[0] for m in manifold.split(1024)])
        within = [(torch.cdist(p, manifold) <= radii).any(dim=1) for p in points.split(1024)]
        return torch.cat(within).double().mean().item()

    return share_within(fake, real), share_within(real, fake)


def distances(networks, scratch, reals=1024, fakes=5120):
    """Seconds of precision and recall in 2048 features, and the textbook's way over ours."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(n, 2048, generator=generator) for n in (reals, fakes)]
    real, fake = (points.to(networks.device) for points in sets)
    on_card = networks.device.type == "cuda"
    taken = {fid.precision_recall: [], plain_precision_recall: []}
    for _ in range(ROUNDS):
        for function, seconds in taken.items():
            clock = time.perf_counter if on_card else time.process_time
            start = clock()
            found = function(real, fake)  # numbers, so that a card has finished
            seconds.append(clock() - start)
    assert found == fid.precision_recall(real, fake)
    ours, plain = taken.values()
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    return {"s": statistics.median(ours), "times the textbook's": statistics.median(ratios)}


class Counted:
    """An os.DirEntry whose calls of stat() are counted in `calls`."""

    def __init__(self, entry, calls):
        self.entry, self.calls = entry, calls

    def __getattr__(self, name):
        return getattr(self.entry, name)

    def __fspath__(self):
        return self.entry.path

    def stat(self, **options):
        self.calls.append(self.entry.path)
        return self.entry.stat(**options)


def listing(networks, scratch, number=200):
    """Calls of stat() that vae_latents.py makes for a picture while it lists a folder."""
    calls, scandir = [], os.scandir

    def counting(function):
        return lambda path, *more, **options: calls.append(path) or function(path, *more, **options)

    with tempfile.TemporaryDirectory(dir=scratch) as folder, ExitStack() as patches:
        write_folder(folder, noise(number, 8), classes=4)
        for name in ("stat", "lstat"):
            patches.enter_context(patch.object(os, name, counting(getattr(os, name))))
        found = patch.object(os, "scandir", lambda path: [Counted(e, calls) for e in scandir(path)])
        patches.enter_context(found)
        vae_latents.Images(folder, 8)
    pictures = [path for path in calls if str(path).endswith(".png")]
    return {"stat calls a picture": len(pictures) / number}


PLAN = {
    "fid.py: 64 pictures of 256 px": rate,
    "fid.py: memory": memory,
    "fid.py: precision and recall, 1,024 against 5,120": distances,
    "vae_latents.py: listing": listing,
}
