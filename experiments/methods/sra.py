"""SRA (Jiang et al. 2026, arXiv 2505.02831; code: vvvvvjdy/SRA) on this repository's loop.

A head on block m at t learns block n of the EMA at t' = max(t - 0.2 u, 0), u ~ U(0, 1), same noise,
same label: smooth L1, weight 0.2, all t; m, n = 3, 8 of 12 (B), 6, 16 of 24 (L), 8, 20 of 28
(XL), other depths in proportion to B. From the code: head D -> 2D -> D with SiLU, beta 0.05. Not
done: its lower weight after epoch 149, and 1 - cosine with weight 0.5, its newest default.
"""

import copy

import torch.nn as nn
import torch.nn.functional as F

import common
import models
from experiments.methods.method import Baseline, share, train_baseline
from models import xavier_linear


class Sra(Baseline):
    name = "sra"
    weight = 0.2

    def __init__(self, args):
        super().__init__(args)
        depth = models.parse_name(args.model)[0].depth
        self.ema_depth = 20 if depth == 28 else depth * 2 // 3  # n

    @staticmethod
    def blocks(size):
        return {"depth": 8 if size.depth == 28 else max(1, size.depth // 4)}  # m

    def projector(self, model):
        D = model.width
        head = nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D))
        return head.apply(xavier_linear)

    def target(self, batch):
        n, teacher = self.ema_depth, copy.copy(self.ema)  # a view with the EMA's own weights
        teacher._modules = dict(teacher._modules)  # cutting the view leaves the EMA whole
        t = (batch.t - 0.2 * batch.u).clamp(min=0)
        x_t = batch.x0 + t.view(-1, 1, 1, 1) * batch.velocity  # (1 - t) x0 + t eps
        return teacher.cut(n)(x_t, t, batch.y_input, taps=[n])[1][n].float()

    def distance(self, prediction, target):
        loss = F.smooth_l1_loss(prediction, target, beta=0.05, reduction="none")
        return loss.flatten(1).mean(dim=1)

    def extra_cost(self, model):
        """The projector, and the EMA's forward pass up to block n."""
        forward = share(self.args) * self.ema_depth / model.depth / 3
        return forward + super().extra_cost(model)


def main():
    train_baseline(Sra, __doc__)


if __name__ == "__main__":
    common.run(main)
