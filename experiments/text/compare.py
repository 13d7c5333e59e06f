"""Are captions that no image had drawn as asked? A table over guidance and PLADIS's lambda, a picture.

    python -m experiments.text.compare stage2=out/text-stage2 vanilla=out/text-vanilla \\
        --judge data/text-judge.pt --out out/text-compare/table.jsonl --figure out/text.png

All cells have the same captions and the same noise; Heun, 16 steps. A line of JSON goes to --out for
each; a run that was killed goes on. Its figures are judge.py's, each a share of the samples.
"""

from dataclasses import dataclass

import numpy as np
import torch

import common
import models
from common import UserError, progress, setting
from experiments.checkpoints.plot import new_figure
from experiments.cifar10.frontier import append, named_checkpoints, read_figures
from experiments.methods import text
from experiments.text.captions import grammar, groups
from experiments.text.judge import answers, figures, load, truth
from sample import initial_noise, sample
from vae_latents import find_vae, to_images

SHOWN = 8  # captions in the picture, of each group that is held out


@dataclass
class Settings:
    judge: str = "data/text-judge.pt"  # from judge.py
    out: str = "out/text-compare.jsonl"  # file to add the lines to
    groups: str = "seen,new pair,new figure"  # of captions, as in captions.py, with commas
    scales: str = "1,3"  # of guidance, with commas
    lambdas: str = "0,1,2"  # PLADIS's, with commas; 0 is the attention that was trained
    num: int = setting(500, at_least=1)  # samples of each group
    seed: int = setting(0, at_least=0)  # of captions and noise
    figure: str | None = None  # a picture of some samples of held-out captions, at the last scale


def asked(captions, group, num, seed) -> np.ndarray:
    """The labels (num,) of some captions of a group; two figures in three quarters of them."""
    own, shown = groups(), grammar()
    rng = np.random.default_rng((seed, len(group)))
    rows = [row for row, caption in enumerate(captions) if own[caption] == group]
    single = [row for row in rows if len(shown[captions[row]]) == 1]
    pairs = [row for row in rows if len(shown[captions[row]]) == 2]
    choices = [single if i % 4 == 0 and single else pairs for i in range(num)]
    return np.array([rows[rng.integers(len(rows))] for rows in choices])


@torch.no_grad()
def samples(model, vae, labels, seed, cfg) -> torch.Tensor:
    """Images (n, S, S, 3) uint8 of these labels, by Heun in 16 steps."""
    shape, parts = (model.in_channels, model.input_size, model.input_size), []
    for rows in progress(
        "sampled: batch", np.split(np.arange(len(labels)), range(100, len(labels), 100))
    ):
        noise, _ = initial_noise(seed, rows, shape)
        y = torch.from_numpy(labels[rows])
        x0 = sample(model, noise, y, model.num_classes, steps=16, mode="heun", cfg=cfg)
        parts.append(torch.from_numpy(to_images(vae, x0)))
    return torch.cat(parts)


def measure(name, path, args, done):
    """Add the lines of one checkpoint that are not there yet."""
    model, saved = models.load_checkpoint(path, "ema", "--scales")
    vae, judge, captions = find_vae(None, saved["meta"]), load(args.judge), saved["meta"]["classes"]
    shown = grammar()
    for group in args.groups.split(","):
        labels = asked(captions, group, args.num, args.seed)
        truths = torch.tensor([truth(shown[captions[label]]) for label in labels])
        for cfg in map(float, args.scales.split(",")):
            for strength in map(float, args.lambdas.split(",")):
                cell = {"name": name, "step": saved["step"], "group": group, "cfg": cfg}
                cell |= {"lambda": strength, "num": args.num, "seed": args.seed}
                if cell in done:
                    continue
                with pladis(strength):
                    images = samples(model, vae, labels, args.seed, cfg)
                append(args.out, {**cell, **figures(answers(judge, images), truths)})


def main():
    names = named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    models.build_for = text.build_for
    keys = "name", "step", "group", "cfg", "lambda", "num", "seed"
    done = [{key: line[key] for key in keys} for line in read_figures(args.out)]
    for name, path in names.items():
        measure(name, path, args, done)


if __name__ == "__main__":
    common.run(main)
