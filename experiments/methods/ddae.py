"""Self-conditioning after DDAE++ (arXiv 2505.10999), after its abstract: the middle tells the rest.

    python -m experiments.methods.ddae train --align-weight 0 --data data/latents --out out/ddae
    python -m experiments.methods.ddae sample --ckpt out/ddae --out out/ddae-samples
    python -m experiments.methods.ddae frontier ddae-1=out/ddae --scales 1,2

c' = c + W LayerNorm(mean over tokens of h_m): what follows the middle block m, depth / 2, is told
what that block has seen. W is zero at first. Guessed, because no code is public: the mean (not a
CLS token), no dependence of its scale on t, the block. Left out: the contrastive loss. This is no
judgement of the paper. It is a network of one's own on the loop: build_for makes models.SiT.
"""

import sys
from unittest import mock

import torch.nn as nn
import torch.nn.functional as F

import common
import models
import sample
import train_stage1
from experiments.cifar10 import frontier
from models import SiT, unpatchify


class SelfConditioned(SiT):
    """A SiT whose blocks after the middle have one more condition. It has no taps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.reroute = nn.Linear(self.width, self.width, bias=False)
        nn.init.zeros_(self.reroute.weight)

    def forward(self, x, t, y, taps=()):
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        for depth, block in enumerate(self.blocks, 1):
            h = block(h, c)
            if depth == self.depth // 2:
                c = c + self.reroute(F.layer_norm(h.mean(dim=1), [self.width]))
        return unpatchify(self.final_layer(h, c), self.patch, self.in_channels), {}


def extra_cost(model):
    """W, of one vector an image, as a share of a training step."""
    return 2 * model.width**2 / model.forward_flops()


def main():
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    verbs = {"train": train_stage1, "sample": sample, "frontier": frontier}
    if verb not in verbs:
        raise common.UserError("ddae.py: give `train`, `sample` or `frontier`, then its flags")
    with mock.patch.object(models, "SiT", SelfConditioned):
        verbs[verb].main()


if __name__ == "__main__":
    common.run(main)
