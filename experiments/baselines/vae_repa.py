"""SRA 2, first called VAE-REPA (Wang et al. 2026, arXiv 2601.17830), on this repository's loop.

An MLP on block d (2 of B's 12, 8 of L's 24 and XL's 28) answers the clean VAE latent x0: smooth L1
with beta 0.05, weight 1, all t, an MLP of five layers. No code is public. Not known, so guessed:
the MLP's width 2D, which gives the 8 M parameters reported for B/2 and the 18 M for XL/2; its SiLU;
that its answer is a patch of the latent per token; the mean over the latent where the paper writes
a sum; x0 as the network's own scaled sample.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models import parse_name, parse_settings, run, setting, unpatchify, xavier_linear

from experiments.baselines.cost import projector_cost
from train_stage1 import Auxiliary, TrainSettings, train


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/vae_repa", "folder of the run: checkpoints and log.jsonl")
    t_min: float = setting(0.0, "L_vae counts from this t on", at_least=0, at_most=1)
    t_max: float = setting(1.0, "and up to this one", at_least=0, at_most=1)
    vae_weight: float = setting(1.0, "weight of L_vae", above=0)
    vae_depth: int | None = setting(None, "block d (default: by size)", at_least=1)


class VaeRepa(Auxiliary):
    name = "vae"

    def projector(self, model):
        hidden, out = 2 * model.width, model.patch**2 * model.in_channels
        layers = [nn.Linear(model.width, hidden), nn.SiLU()]
        for _ in range(3):
            layers += [nn.Linear(hidden, hidden), nn.SiLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, out)).apply(xavier_linear)

    def target(self, batch):
        return batch.x0

    def distance(self, prediction, target):
        patch = parse_name(self.args.model)[1]
        answer = unpatchify(prediction, patch, target.shape[1])
        loss = F.smooth_l1_loss(answer, target, beta=0.05, reduction="none")
        return loss.flatten(1).mean(dim=1)


def extra_cost(model, args) -> float:
    return projector_cost(model, VaeRepa(args, 1).projector(model), args)


def main():
    args = parse_settings(Settings, __doc__)
    args.vae_depth = args.vae_depth or parse_name(args.model)[0].align_depth
    train(args, VaeRepa(args, args.vae_depth, args.vae_weight))


if __name__ == "__main__":
    run(main)
