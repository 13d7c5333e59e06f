"""DDAE++ (Xiang et al. 2025, arXiv 2505.10999): later blocks are told the network's own features.

    python experiments/baselines/ddae.py --data ...                    # train_stage1.py's flags
    python experiments/baselines/ddae.py sample --ckpt out/ddae ...    # sample.py itself refuses it

Public are the abstracts (features of an inner block are aggregated and guide the decoding layers,
1 % of cost) and FutureXiang/ddae_plus_plus, a README without code (July 2025). So, guesses are:
block depth / 2; the mean of its tokens, normalised; one linear layer, zero at first; added to c in
all later blocks and the final layer; gradients everywhere. Its contrastive loss is left out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models
import sample
from models import SiT, unpatchify
from train_stage1 import Auxiliary, TrainSettings, train


class SelfConditionedSiT(SiT):
    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.self_condition = nn.Linear(self.width, self.width)
        nn.init.zeros_(self.self_condition.weight)
        nn.init.zeros_(self.self_condition.bias)

    def forward(self, x, t, y, taps=()):
        """As SiT.forward, but for one line."""
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)  # (N, D)
        tapped = {}
        for depth, block in enumerate(self.blocks, 1):
            recompute = self.grad_checkpoint and self.training
            h = checkpoint(block, h, c, use_reentrant=False) if recompute else block(h, c)
            if depth == self.depth // 2:
                mean = F.layer_norm(h.mean(dim=1), [self.width], eps=1e-6)
                c = c + self.self_condition(mean)
            if depth in taps:
                tapped[depth] = h
        return unpatchify(self.final_layer(h, c), self.patch, self.in_channels), tapped

    def forward_flops(self):
        return super().forward_flops() + 2 * self.width**2


@dataclass
class Settings(TrainSettings):
    out: str = "out/ddae"  # folder of the run: checkpoints and log.jsonl


class SelfConditioning(Auxiliary):
    """No loss: what differs is the network."""

    name = "ddae"

    def __init__(self, args):
        super().__init__(args, depth=1, weight=0)

    def extra_cost(self, model):  # of a plain SiT's step
        return 2 * model.width**2 / model.forward_flops()


def main():
    with patch.object(models, "SiT", SelfConditionedSiT):  # what models.build makes
        if sys.argv[1:2] == ["sample"]:
            del sys.argv[1]
            sample.main()
        else:
            args = models.parse_settings(Settings, __doc__)
            train(args, SelfConditioning(args))


if __name__ == "__main__":
    models.run(main)
