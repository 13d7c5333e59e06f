"""SRA 2, first called VAE-REPA (Wang et al. 2026, arXiv 2601.17830), on this repository's loop.

    python -m experiments.methods.vae_repa --data data/latents --out out/vae

L = L_diff + L_vae: an MLP on the tokens of block d answers the patch of the clean latent x0 at each
token's place; smooth L1 with beta 0.05, mean over the latent, weight 1, all t, the whole run. Block
d: 2 of B's 12, 8 of L's 24 and XL's 28. x0 is in the latent folder, so that nothing is encoded.

No code is public. From the paper: the blocks, the distance and its beta, an MLP of five layers, 4 %
more products. Guessed: the MLP's width 2D, which gives the 8 M parameters reported for B/2 and the
18 M for XL/2; its SiLU; that its answer is a patch of the latent for each token; the mean over the
latent where the paper writes a sum; that x0 is the network's own scaled sample of the posterior.
Stage 1 of Self-Transcendence is its sibling: a square, another MLP, the velocity, 0.4 <= t <= 0.7.
"""

import torch.nn as nn
import torch.nn.functional as F

import common
from experiments.methods.method import Baseline, train_baseline
from models import unpatchify, xavier_linear


class LatentHead(nn.Module):
    """Tokens (n, T, D) -> latents (n, C, H, W), by five linear layers."""

    def __init__(self, width, patch, channels):
        super().__init__()
        hidden, out = 2 * width, patch**2 * channels
        layers = [nn.Linear(width, hidden), nn.SiLU()]
        for _ in range(3):
            layers += [nn.Linear(hidden, hidden), nn.SiLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, out)).apply(xavier_linear)
        self.patch, self.channels = patch, channels

    def forward(self, tokens):
        return unpatchify(self.mlp(tokens), self.patch, self.channels)


class VaeRepa(Baseline):
    name = "vae"
    weight = 1.0

    @staticmethod
    def blocks(size):
        return {"depth": size.align_depth}

    def projector(self, model):
        return LatentHead(model.width, model.patch, model.in_channels)

    def target(self, batch):
        return batch.x0

    def distance(self, prediction, target):
        loss = F.smooth_l1_loss(prediction, target, beta=0.05, reduction="none")
        return loss.flatten(1).mean(dim=1)


def main():
    train_baseline(VaeRepa, __doc__)


if __name__ == "__main__":
    common.run(main)
