"""External features that repa.py aligns with, of a CNN: DATA/cnn.npy, (N, T, D_e) float16.

    python -m experiments.methods.repa_features --data data/cifar10 --model SiT-Ti/2

A small residual CNN, trained here to classify the folder's own images; its last map, averaged over
the patch of each token. It saw the labels, which REPA's DINOv2 did not: say so beside any figure.
It shares neither architecture nor seed with the judge, cifar10/judge.py. cnn.json beside
it: the FLOPs of its training and of encoding, and its accuracy on images kept out of the training.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import models
from common import UserError, say, setting
from experiments.cifar10.judge import BATCH, describe, fit, held_out, source_images
from experiments.latents.small_vae import from_uint8
from vae_latents import LatentFolder, ResnetBlock


@dataclass
class Settings:
    data: str = "data/imagenet256"  # latent folder whose images are there
    model: str = "SiT-XL/2"  # the network to train: its patch says how many tokens
    steps: int = setting(1500, at_least=1)  # the CNN's training steps, of 128 images
    seed: int = setting(1, at_least=0)  # the CNN's seed


class CNN(nn.Module):
    """Images (n, S, S, 3) uint8 -> feature maps (n, 96, S / 4, S / 4), logits (n, classes)."""

    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 48, 4, stride=2, padding=1),
            ResnetBlock(48, 48, groups=8),
            nn.Conv2d(48, 96, 4, stride=2, padding=1),
            ResnetBlock(96, 96, groups=8),
            nn.GroupNorm(8, 96),
        )
        self.head = nn.Linear(96, classes)  # on the map's mean; not part of the features

    def forward(self, images):
        maps = self.layers(from_uint8(images))
        return maps, self.head(maps.mean(dim=(2, 3)))


@torch.no_grad()
def tokens(cnn, images, grid) -> torch.Tensor:
    """(n, grid * grid, 96), in the order of the network's tokens."""
    return F.adaptive_avg_pool2d(cnn(images)[0], grid).flatten(2).transpose(1, 2)


def main():
    args = common.parse_settings(Settings, __doc__)
    folder, (_, patch) = LatentFolder(args.data), models.parse_name(args.model)
    if folder.meta["height"] % patch:
        raise UserError(f"--model {args.model}: does not tile a side of {folder.meta['height']}")
    images, held = source_images(folder), held_out(len(folder))
    torch.manual_seed(args.seed)
    cnn = CNN(len(folder.meta["classes"]))
    fit(cnn, images, folder.labels, torch.nonzero(~held)[:, 0], args.steps)
    grid, out = folder.meta["height"] // patch, folder.path / "cnn.npy"
    with FlopCounterMode(display=False) as counter:
        tokens(cnn, images[:1], grid)
    flops = counter.get_total_flops()  # of one image; a training step is three forward passes
    info = {"flops_training": 3 * BATCH * args.steps * flops, "flops_encoding": len(images) * flops}
    _, guesses = describe(cnn, images[held])
    info["accuracy"] = (guesses == folder.labels[held]).double().mean().item()
    features = [tokens(cnn, part, grid).half().numpy() for part in images.split(BATCH)]
    with common.atomic_write(out) as file:
        np.save(file, np.concatenate(features))
    with common.atomic_write(out.with_suffix(".json")) as file:
        file.write(json.dumps(info).encode())
    say(f"{out}: {len(folder)} images, {grid * grid} tokens; {info}")


if __name__ == "__main__":
    common.run(main)
