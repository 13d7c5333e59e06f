"""How many captions that no image had are drawn as asked: a table over guidance and PLADIS's lambda.

    python -m experiments.text.compare stage2=out/text-stage2 vanilla=out/text-vanilla \\
        --judge data/text-judge.pt --out out/text-compare

Every cell has the same captions and the same noise; Heun, 16 steps. A line of JSON each goes to
table.jsonl, and a run that was killed goes on; the last scale's pictures to NAME-lambda.png.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import models
from common import UserError, progress, say, setting
from experiments.methods import text
from experiments.text import judge
from experiments.text.captions import grammar, groups
from sample import grid, initial_noise, sample
from vae_latents import find_vae, to_images


@dataclass
class Settings:
    judge: str = "data/text-judge.pt"  # from judge.py
    out: str = "out/text-compare"  # folder of table.jsonl and the grids
    groups: str = "seen,new pair,new figure"  # of captions, as in captions.py, with commas
    scales: str = "1,3"  # of guidance, with commas
    lambdas: str = "0,1,2"  # PLADIS's, with commas; 0 is the attention that was trained
    num: int = setting(500, at_least=1)  # samples of each group
    seed: int = setting(0, at_least=0)  # of captions and noise


def asked(captions, group, num, seed) -> np.ndarray:
    """The labels (num,) of some captions of a group; two figures in three quarters of them."""
    own, shown = groups(), grammar()
    rng = np.random.default_rng((seed, len(group)))
    rows = [row for row, caption in enumerate(captions) if own[caption] == group]
    single = [row for row in rows if len(shown[captions[row]]) == 1]
    pairs = [row for row in rows if len(shown[captions[row]]) == 2]
    choices = [single if i % 4 == 0 and single else pairs for i in range(num)]
    return np.array([rows[rng.integers(len(rows))] for rows in choices])
