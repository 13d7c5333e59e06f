"""Distance against class over guidance scales, of checkpoints, by a CNN and a judge from outside.

    python -m experiments.cifar10.frontier vanilla-1=out/vanilla guided-1=out/stage2 --scales 1,2
    python -m experiments.cifar10.frontier --out out/frontier.jsonl --figure frontier.png

The first command makes samples of each NAME=CHECKPOINT at each scale w, from the same noise and
the same labels for all, and appends one line of JSON for each to --out: step, settings, the figures
of each judge, `spectrum` and `borders` (see below). What is in --out already is not made again, so
that a killed command continues. Names that end in -1, -2, ... are seeds of one arm: the figure,
which the second command draws from --out alone, has their mean as a curve, and bars that reach from
the least to the greatest.
"""

import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import models
from common import UserError, fingerprint, progress, say, setting
from experiments.checkpoints.plot import new_figure
from experiments.cifar10 import judge, outside
from sample import grid, initial_noise, sample
from vae_latents import find_vae, to_images

BATCH = 125  # samples at once
GRID = 40  # samples in a grid, enlarged four times
BANDS = 5  # of the spectrum


@dataclass
class Settings:
    scales: str = "1,1.5,2,3,4"  # guidance scales w, with commas
    mode: str = setting("heun", choices=["euler", "heun"])  # the sampler
    steps: int = 8  # its steps; Heun evaluates twice in each but the last
    num: int = setting(5000, at_least=2)  # samples, of all classes in turn
    seed: int = setting(0, at_least=0)  # of the noise
    judge: str = "out/cifar10/classifier.pt"  # files of judge.py, with commas
    outside: str = "out/outside.pt"  # files of outside.py, with commas
    out: str = "out/frontier.jsonl"  # file of the figures
    grids: str | None = None  # folder for a picture of the first 40 samples of each
    figure: str | None = None  # picture of distance against class to draw from --out
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one
    compile: bool = False  # torch.compile the networks


# ---- What needs no network: the spectrum, the borders of patches


def spectrum(images) -> list[float]:
    """The strength of five bands of the grey picture, from coarse to fine, for (N, S, S, 3) uint8.
    A band's strength is its standard deviation in grey levels, from 0 to 255: the root of the mean
    square over pictures and pixels. The squares of the five add up to the variance within a
    picture. The bands have equal widths up to half a cycle a pixel; the last has the corners, too.
    """
    grey = np.asarray(images, np.float64).mean(axis=3)
    power = np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True), norm="forward")) ** 2
    frequency = np.fft.fftfreq(grey.shape[1])
    radius = np.hypot(frequency[:, None], frequency)  # in cycles a pixel
    band = np.minimum(radius / 0.5 * BANDS, BANDS - 1).astype(int)
    power = power.mean(axis=0)
    return [round(float(np.sqrt(power[band == i].sum())), 3) for i in range(BANDS)]


def borders(images, period) -> float:
    """The mean step between neighbouring pixels across the borders of patches of `period` pixels,
    divided by that of all other neighbours. 1: the borders cannot be seen. Pictures that were
    JPEGs are above 1 by themselves if the period is 8."""
    images = np.asarray(images, np.float64)
    across, others = [], []
    for axis in (1, 2):
        steps = np.abs(np.diff(images, axis=axis)).mean(axis=(0, 3 - axis, 3))
        is_border = np.arange(1, len(steps) + 1) % period == 0
        across.append(steps[is_border].mean())
        others.append(steps[~is_border].mean())
    return round(float(sum(across) / sum(others)), 4)


# ---- The judges


@dataclass
class Judge:
    """What a judge says and can judge. Each calls its distance and its share of classes alike."""

    measure: Callable  # pictures (N, S, S, 3) uint8 and labels (N,) -> a dict of figures
    identity: str  # another judge has another one
    size: int | None  # S; None for older files, which do not say it
    classes: int
    names: list[str] | None = None  # of the classes; None for older files, which do not say them


def load_judges(cnns, outsides, device) -> dict[str, Judge]:
    """{name: the judge} of paths with commas between them."""
    judges = {}
    for path in cnns.split(","):
        cnn, saved = judge.load(path)

        def by_cnn(images, labels, cnn=cnn, saved=saved):
            found = judge.measure(cnn, saved, images, labels)
            return {"distance": found.pop("FD-CNN"), "class": found.pop("agreement"), **found}

        identity = fingerprint(saved["mu"], *cnn.state_dict().values())
        names = saved.get("names")
        known = Judge(by_cnn, identity, saved.get("size"), saved["classes"], names)
        judges[f"cnn-{Path(path).stem}"] = known
    for path in outsides.split(","):
        known = outside.load(path)
        known.network.to(device)
        saved = known.saved
        identity = fingerprint(saved["mu"], saved["weight"])
        name = f"outside-{saved['input']}"
        names = saved.get("names")
        judges[name] = Judge(known.measure, identity, saved["size"], saved["classes"], names)
    if len(judges) < len(cnns.split(",")) + len(outsides.split(",")):
        problem = "two judges have one name, which is a CNN's file name or an outside judge's size"
        raise UserError(f"--judge, --outside: {problem}; give each of them once")
    return judges


def check_judges(judges, subject, size, names: list[str]):
    """UserError if a judge knows other pictures, or other classes, than `subject` has."""
    for name, known in judges.items():
        if (known.size or size, known.classes) != (size, len(names)):
            here = f"has {len(names)} classes and {size} pixels"
            wanted = f"but the judge {name} knows {known.classes} classes and {known.size} pixels"
            raise UserError(f"{subject}: {here}, {wanted}; give a judge of these pictures")
        if known.names:
            models.check_classes(f"{subject} (by {name})", names, known.names)


# ---- Samples and their figures


def named_checkpoints() -> dict:
    """{name: path} of the words NAME=PATH that begin the command line, and takes them off it."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    del sys.argv[1 : 1 + len(words)]
    pairs = [word.partition("=") for word in words]
    for word, (name, _, path) in zip(words, pairs, strict=True):
        if not name or not path:
            raise UserError(f"{word}: is no checkpoint with a name; write NAME=PATH")
    found = {name: path for name, _, path in pairs}
    if len(found) < len(pairs):
        raise UserError("NAME=PATH: two checkpoints have one name; give each a name of its own")
    return found


def read_figures(path) -> list[dict]:
    """The lines of a file of figures, none if it is not there."""
    path = Path(path)
    with common.reading(path, "is no file of figures; choose another --out"):
        lines = path.read_text().splitlines() if path.exists() else []
        return [dict(json.loads(line)) for line in lines]


def append(path, line):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    say(json.dumps(line))


def make_samples(network, vae, y, w, args, device) -> torch.Tensor:
    """Samples (N, S, S, 3) uint8 of the labels y (N,): image i depends on (--seed, i) alone."""
    shape, null = (network.in_channels, network.input_size, network.input_size), network.num_classes
    images = []
    for rows in progress(f"samples at w = {w:g}: batch", torch.arange(len(y)).split(BATCH)):
        noise, labels = initial_noise(args.seed, rows.tolist(), shape)[0], y[rows].to(device)
        x0 = sample(network, noise.to(device), labels, null, args.steps, args.mode, w)
        images.append(torch.from_numpy(to_images(vae, x0)))
    return torch.cat(images)


def measure_all(names, scales, args):
    """Append the line of each checkpoint and scale that --out does not have yet."""
    device, _, _ = common.setup(args.device)
    judges = load_judges(args.judge, args.outside, device)
    for name, path in names.items():
        null_label_for = "--scales" if max(scales) > 1 else ""
        network, saved = models.load_checkpoint(path, null_label_for=null_label_for)
        vae = find_vae(None, saved["meta"])
        size = network.input_size * vae.factor
        check_judges(judges, path, size, saved["meta"]["classes"])
        identities = [known.identity for known in judges.values()]
        tag = fingerprint(vae.identity(), *identities, *network.state_dict().values())[:12]
        period = network.patch * vae.factor
        network, vae = network.to(device), vae.to(device, memory_format=torch.channels_last)
        network.compile(dynamic=False, disable=not args.compile)
        y = torch.arange(args.num) % network.num_classes
        calls = args.steps if args.mode == "euler" else 2 * args.steps - 1
        for w in scales:
            line = {"name": name, "step": saved["step"], "w": w, "mode": args.mode}
            line.update(steps=args.steps, evaluations=calls, num=args.num, seed=args.seed, tag=tag)
            if any(line.items() <= known.items() for known in read_figures(args.out)):
                say(f"{name}, step {saved['step']}, w = {w:g}: is in {args.out} already")
                continue
            images = make_samples(network, vae, y, w, args, device)
            if args.grids:
                save_grid(images[:GRID], Path(args.grids) / f"{name}-{saved['step']}-w{w:g}.png")
            line.update({key: known.measure(images, y) for key, known in judges.items()})
            line.update(spectrum=spectrum(images), borders=borders(images, period))
            append(args.out, line)


def save_grid(images, path):
    """The pictures at four times their size, ten in a row."""
    enlarged = images.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2).numpy()
    with common.atomic_write(path) as file:
        grid(enlarged, 10).save(file, format="PNG")


# ---- The figure


def arms(lines) -> dict:
    """{(arm, step, mode, steps, num): {w: lines of its seeds}}: the curves of the figure."""
    found = {}
    for line in lines:
        arm = re.sub(r"-\d+$", "", line["name"])
        curve = found.setdefault(
            (arm, *(line[key] for key in ("step", "mode", "steps", "num"))), {}
        )
        curve.setdefault(line["w"], []).append(line)
    return {key: dict(sorted(curve.items())) for key, curve in sorted(found.items())}


def draw(lines):
    """Distance against class: a panel for each judge, a curve for each arm, w beside its points.
    A point is the mean over the seeds, its bars reach from the least to the greatest."""
    names = [key for key, value in lines[0].items() if isinstance(value, dict)]
    curves = arms(lines)
    samplers = {key[2:] for key in curves}
    figure = new_figure(5 * len(names), 4.8)
    for number, axis in enumerate(np.atleast_1d(figure.subplots(1, len(names)))):
        name = names[number]
        for colour, ((arm, step, *sampler), curve) in enumerate(curves.items()):
            label = f"{arm}, {step:,} steps"
            if len(samplers) > 1:
                label += ", {} {}, {:,} samples".format(*sampler)
            draw_curve(axis, curve, name, label, f"C{colour % 10}")
        axis.set(title=name, xlabel="class asked for, %", ylabel="distance, lower is better")
        axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def draw_curve(axis, curve, name, label, colour):
    """One arm by one judge: `curve` is {w: lines of its seeds}."""
    values = []  # of each w: the shares of the seeds, in percent, and their distances
    for lines in curve.values():
        figures = [line[name] for line in lines if name in line]
        values.append([[100 * f["class"] for f in figures], [f["distance"] for f in figures]])
    means = np.array([[statistics.mean(numbers) for numbers in point] for point in values])
    least = np.array([[min(numbers) for numbers in point] for point in values])
    greatest = np.array([[max(numbers) for numbers in point] for point in values])
    below, above = means - least, greatest - means
    bars = {"xerr": (below[:, 0], above[:, 0]), "yerr": (below[:, 1], above[:, 1])}
    style = {"color": colour, "marker": "o", "markersize": 3, "capsize": 2, "elinewidth": 0.8}
    seeds = max(map(len, curve.values()))
    axis.errorbar(*means.T, **bars, label=f"{label} ({seeds} seed{'s' * (seeds > 1)})", **style)
    for w, point in zip(curve, means, strict=True):
        where = {"xytext": (4, 4), "textcoords": "offset points"}
        axis.annotate(f"{w:g}", point, fontsize=8, color=colour, **where)


def main():
    names = named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    with common.reading("--scales", "needs numbers with commas, such as 1,1.5,2"):
        scales = [float(w) for w in args.scales.split(",")]
        if not all(1 <= w < float("inf") for w in scales):
            raise ValueError("a scale is at least 1")
    if not names and not args.figure:
        raise UserError("frontier.py: has nothing to do; give NAME=PATH ..., or --figure FILE")
    if names:
        measure_all(names, scales, args)
    if args.figure:
        lines = read_figures(args.out)
        if not lines:
            raise UserError(f"{args.out}: holds no figures to draw; give NAME=PATH to make some")
        with common.atomic_write(args.figure) as file:
            draw(lines).savefig(file, format="png", dpi=120)
        say(f"{args.figure}: distance against class")


if __name__ == "__main__":
    common.run(main)
