"""Are captions that no image had drawn as asked? A table over guidance and PLADIS's lambda.

    python -m experiments.text.compare stage2=out/text-stage2 vanilla=out/text-vanilla \\
        --judge data/text-judge.pt --out out/text.jsonl --figure out/text.png

All cells have the same captions and the same noise; Heun, 16 steps. Each adds a line of JSON to
--out, and a run that was killed goes on. The figures are judge.py's: shares of the samples. The
picture has red frames where the judge sees something else.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch

import common
import models
from common import UserError, progress, setting
from experiments.checkpoints.plot import new_figure
from experiments.cifar10.frontier import append, named_checkpoints, read_figures
from experiments.methods import pladis, text
from experiments.text.captions import grammar, groups
from experiments.text.judge import answers, figures, load, right, truth
from sample import initial_noise, sample
from vae_latents import find_vae, to_images

KEYS = "name", "step", "group", "cfg", "lambda", "num", "seed"  # what a line is known by


@dataclass
class Settings:
    judge: str = "data/text-judge.pt"  # from judge.py
    out: str = "out/text.jsonl"  # file to add the lines to
    groups: str = "seen,new pair,new figure"  # of captions, as in captions.py, with commas
    scales: str = "1,3"  # of guidance, with commas
    lambdas: str = "0,1,2"  # PLADIS's, with commas; 0 is the attention that was trained
    num: int = setting(500, at_least=1)  # samples of each group; a quarter has one figure
    seed: int = setting(0, at_least=0)  # of captions and noise
    figure: str | None = None  # picture of some held-out captions, at the last scale, lambda 0


def asked(captions, group, num, seed) -> np.ndarray:
    """The labels (num,) of some captions of a group; every fourth has one figure, if any has."""
    own, shown = groups(), grammar()
    rng = np.random.default_rng((seed, len(group)))
    rows = [row for row, caption in enumerate(captions) if own[caption] == group]
    single = [row for row in rows if len(shown[captions[row]]) == 1]
    pairs = [row for row in rows if len(shown[captions[row]]) == 2]
    choices = [single if i % 4 == 0 and single else pairs for i in range(num)]
    return np.array([rows[rng.integers(len(rows))] for rows in choices])


class Painter:
    """A checkpoint, its VAE, its captions."""

    def __init__(self, path):
        self.network, saved = models.load_checkpoint(path, null_label_for="--scales")
        self.step, self.captions = saved["step"], saved["meta"]["classes"]
        if self.captions != [*grammar()]:
            raise UserError(f"{path}: has other captions than captions.py draws; train on those")
        self.vae = find_vae(None, saved["meta"])

    @torch.no_grad()
    def paint(self, labels, seed, cfg, strength=0.0) -> torch.Tensor:
        """Images (n, S, S, 3) uint8 of labels (n,), with PLADIS's lambda `strength`."""
        network, parts = self.network, []
        shape = network.in_channels, network.input_size, network.input_size
        for block in network.blocks:
            pladis.install(block.cross, lam=strength)
        batches = np.split(np.arange(len(labels)), range(100, len(labels), 100))
        for rows in progress("sampled: batch", batches):
            noise, _ = initial_noise(seed, rows, shape)
            y = torch.from_numpy(labels[rows])
            x0 = sample(network, noise, y, network.num_classes, steps=16, mode="heun", cfg=cfg)
            parts.append(torch.from_numpy(to_images(self.vae, x0)))
        return torch.cat(parts)

    def truths(self, labels) -> torch.Tensor:
        """The judge's right answers (n, 5)."""
        shown = grammar()
        return torch.tensor([truth(shown[self.captions[label]]) for label in labels])


def measure(name, painter, judge, args):
    """Add the lines of one checkpoint that are not there yet."""
    done = [tuple(line[key] for key in KEYS) for line in read_figures(args.out)]
    for group in args.groups.split(","):
        labels = asked(painter.captions, group, args.num, args.seed)
        for cfg in map(float, args.scales.split(",")):
            for strength in map(float, args.lambdas.split(",")):
                cell = name, painter.step, group, cfg, strength, args.num, args.seed
                if cell not in done:
                    found = answers(judge, painter.paint(labels, args.seed, cfg, strength))
                    line = dict(zip(KEYS, cell, strict=True))
                    append(args.out, {**line, **figures(found, painter.truths(labels))})


def draw(painters, judge, args):
    """A figure of four captions of each held-out group, three samples of each network."""
    captions = next(iter(painters.values())).captions
    wanted = ("new pair", 4), ("new figure", 4)
    labels = np.concatenate([asked(captions, group, n, args.seed + 1) for group, n in wanted])
    figure = new_figure(10, 1.2 + 2.6 * len(painters))
    axes = np.atleast_1d(figure.subplots(len(painters), 1))
    for axis, (name, painter) in zip(axes, painters.items(), strict=True):
        images = painter.paint(np.tile(labels, 3), args.seed, float(args.scales.split(",")[-1]))
        wrong = ~right(answers(judge, images), painter.truths(np.tile(labels, 3)))
        side = images.shape[1] + 6
        sheet = np.full((3 * side, len(labels) * side, 3), 255, np.uint8)
        for i, image in enumerate(images.numpy()):
            top, left = i // len(labels) * side, i % len(labels) * side
            if wrong[i]:
                sheet[top + 1 : top + side - 1, left + 1 : left + side - 1] = (220, 30, 30)
            sheet[top + 3 : top + side - 3, left + 3 : left + side - 3] = image
        axis.imshow(sheet, interpolation="nearest")
        axis.set_ylabel(f"{name}, {painter.step:,} steps")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    lines = [re.sub(" (left|right) of ", r"\n\1 of\n", captions[label]) for label in labels]
    axes[0].set_xticks((np.arange(len(labels)) + 0.5) * side, lines, fontsize=8)
    axes[0].xaxis.tick_top()
    return figure


def main():
    names = named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    models.build_for = text.build_for
    judge, painters = load(args.judge), {name: Painter(path) for name, path in names.items()}
    for name, painter in painters.items():
        measure(name, painter, judge, args)
    if args.figure:
        with common.atomic_write(args.figure) as file:
            draw(painters, judge, args).savefig(file, format="png", dpi=100)


if __name__ == "__main__":
    common.run(main)
