"""Dispersive loss (Wang & He 2025, arXiv 2506.09027) on this repository's loop: no teacher at all.

L_disp = log mean over all pairs i, j of exp(-|z_i - z_j|^2 / (size of z) / tau), where z_i is all
tokens of image i after one block, flattened: the paper's InfoNCE with squared L2 distance, tau 0.5,
weight 0.5, all t, pairs i = i kept. The division by z's size is the authors' code's, not the
paper's; that code was seen in copies alone, which have no tau. The block, a quarter of the depth,
is a guess. Pairs are those of one process's share of the batch, or of one part of --accum. L_disp
is below 0 and falls as the images move apart.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models import parse_name, parse_settings, run, setting

from train_stage1 import Auxiliary, TrainSettings, train


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/dispersive", "folder of the run: checkpoints and log.jsonl")
    t_min: float = setting(0.0, "images count from this t on", at_least=0, at_most=1)
    t_max: float = setting(1.0, "and up to this one", at_least=0, at_most=1)
    disp_weight: float = setting(0.5, "weight of L_disp", above=0)
    disp_depth: int | None = setting(None, "block (default: a quarter of the depth)", at_least=1)
    disp_tau: float = setting(0.5, "temperature tau", above=0)


class Dispersive(Auxiliary):
    name = "disp"

    def projector(self, model):
        return nn.Identity()

    def target(self, batch):
        return batch.t  # of no use: the images repel one another

    def distance(self, prediction, target):
        z = prediction.flatten(1)
        with torch.autocast(z.device.type, enabled=False):  # squares cancel below: float32
            z = z - z.mean(dim=0)
            dots = z @ z.T / z.shape[1]
        squares = dots.diagonal()
        apart = squares[:, None] + squares - 2 * dots  # (n, n), mean of (z_i - z_j)^2
        loss = torch.logsumexp(-apart.flatten() / self.args.disp_tau, dim=0)
        return (loss - 2 * math.log(len(z))).expand(len(z))  # the same for each image


def extra_cost(model, args) -> float:
    """Every pair's dot product over all tokens; its backward pass is twice the forward."""
    numbers = (model.input_size // model.patch) ** 2 * model.width
    return 2 * numbers * (args.batch_size // args.accum) / model.forward_flops()


def main():
    args = parse_settings(Settings, __doc__)
    depth = parse_name(args.model)[0].depth
    args.disp_depth = args.disp_depth or max(1, depth // 4)
    train(args, Dispersive(args, args.disp_depth, args.disp_weight))


if __name__ == "__main__":
    run(main)
