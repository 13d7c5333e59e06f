"""SRA (Jiang et al. 2026, arXiv 2505.02831; code: vvvvvjdy/SRA) on this repository's loop.

A head on block m at t learns block n of the EMA at t' = max(t - 0.2 u, 0), u ~ U(0, 1), same noise,
same label told: smooth L1, weight 0.2, all t; m, n = 3, 8 of 12 (B), 6, 16 of 24 (L), 8, 20 of 28
(XL), other depths in proportion to B. From the code: head D -> 2D -> D with SiLU, beta 0.05. Not
done: its lower weight after epoch 149, and 1 - cosine with weight 0.5, its newest default.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models import UserError, parse_name, parse_settings, run, setting, xavier_linear

from experiments.baselines.cost import projector_cost, share
from train_stage1 import Auxiliary, TrainSettings, train


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/sra", "folder of the run: checkpoints and log.jsonl")
    t_min: float = setting(0.0, "L_sra counts from this t on", at_least=0, at_most=1)
    t_max: float = setting(1.0, "and up to this one", at_least=0, at_most=1)
    sra_weight: float = setting(0.2, "weight of L_sra", above=0)
    sra_depth: int | None = setting(None, "the network's block m (default: by depth)", at_least=1)
    ema_depth: int | None = setting(None, "the EMA's block n (default: by depth)", at_least=1)


class Sra(Auxiliary):
    name = "sra"

    def projector(self, model):
        D = model.width
        head = nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D))
        return head.apply(xavier_linear)

    def target(self, batch):
        n, teacher = self.args.ema_depth, copy.copy(self.ema)  # a view with the EMA's own weights
        teacher._modules = dict(teacher._modules)  # cutting the view leaves the EMA whole
        t = (batch.t - 0.2 * batch.u).clamp(min=0)
        x_t = batch.x0 + t.view(-1, 1, 1, 1) * batch.velocity  # (1 - t) x0 + t eps
        return teacher.cut(n)(x_t, t, batch.told, taps=[n])[1][n].float()

    def distance(self, prediction, target):
        loss = F.smooth_l1_loss(prediction, target, beta=0.05, reduction="none")
        return loss.flatten(1).mean(dim=1)


def extra_cost(model, args) -> float:
    forward = share(args) * args.ema_depth / model.depth / 3  # the EMA's, up to block n
    return forward + projector_cost(model, Sra(args, 1).projector(model), args)


def main():
    args = parse_settings(Settings, __doc__)
    depth = parse_name(args.model)[0].depth
    m, n = (8, 20) if depth == 28 else (max(1, depth // 4), depth * 2 // 3)
    args.sra_depth, args.ema_depth = args.sra_depth or m, args.ema_depth or n
    if args.ema_depth > depth:
        raise UserError(f"--ema-depth {args.ema_depth}: {args.model} has blocks 1 to {depth}")
    train(args, Sra(args, args.sra_depth, args.sra_weight))


if __name__ == "__main__":
    run(main)
