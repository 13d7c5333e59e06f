"""The external features that repa.py aligns with: DATA/<encoder>.npy, (N, T, D_e) float16.

    python experiments/baselines/repa_features.py --data data/cifar10 --model SiT-Ti/2

--encoder cnn: a small residual CNN, trained here to classify the folder's own images; its last map,
averaged over the patch of each token. It saw the labels, which DINOv2 did not: say so beside any
figure. It shares neither architecture nor seed with the judge, experiments/classifier.py.
--encoder dinov2: DINOv2 ViT-B/14 (arXiv 2304.07193) from torch.hub, on 224-px copies of 256-px
images, as REPA does. Written from the documentation of both; never run here.

DATA/<encoder>.json beside it: the FLOPs of encoding the folder and, for the CNN, of its training,
and its accuracy on images kept out of that.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models
from models import say, setting

from vae_latents import LatentFolder, ResnetBlock, from_uint8

BATCH = 128


@dataclass
class Settings:
    data: str = setting("data/imagenet256", "latent folder, from vae_latents.py")
    model: str = setting("SiT-XL/2", "the network to train: its patch says how many tokens")
    encoder: str = setting("dinov2", "whose features", choices=["cnn", "dinov2"])
    steps: int = setting(1500, "the CNN's training steps, of 128 images", at_least=1)
    seed: int = setting(1, "the CNN's seed", at_least=0)
    device: str = setting("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")


class CNN(nn.Module):
    """Images (n, 3, S, S) in [-1, 1] -> feature maps (n, 96, S / 4, S / 4)."""

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
        return self.layers(images)


def train_cnn(args, folder, grid, device):
    """(A function from rows to tokens (n, T, D), accuracy on a tenth kept out of the training)."""
    images, labels = folder.images(slice(None)), folder.labels.to(device)
    torch.manual_seed(args.seed)
    cnn = CNN(len(folder.meta["classes"])).to(device)
    optimizer = torch.optim.AdamW(cnn.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    order = np.random.default_rng(args.seed).permutation(len(labels))
    held, rows = np.split(order, [len(order) // 10 + 1])
    progress = models.Progress("CNN", args.steps)
    for step in range(args.steps):
        pick = rows[torch.randint(len(rows), (BATCH,)).numpy()]
        logits = cnn.head(cnn(from_uint8(images[pick]).to(device)).mean(dim=(2, 3)))
        loss = F.cross_entropy(logits, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, f"loss {loss.item():.3f}")

    def tokens(rows):
        maps = cnn(from_uint8(images[rows]).to(device))
        return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)

    with torch.no_grad():
        parts = np.array_split(held, len(held) // BATCH + 1)
        guesses = torch.cat([cnn.head(tokens(part).mean(dim=1)).argmax(dim=1) for part in parts])
    return tokens, (guesses == labels[held]).double().mean().item()


def load_dinov2(folder, grid, device):
    """A function from rows to DINOv2's normalised patch tokens (n, T, 768)."""
    dino = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14").to(device).eval()
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # ImageNet's
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def tokens(rows):
        x = ((from_uint8(folder.images(rows)).to(device) + 1) / 2 - mean) / std
        x = F.interpolate(x, 14 * grid, mode="bicubic")  # a patch of 14 x 14 pixels a token
        return dino.forward_features(x)["x_norm_patchtokens"]

    return tokens


def main():
    args = models.parse_settings(Settings, __doc__)
    device, _, _ = models.setup(args.device)
    folder, (_, patch) = LatentFolder(args.data), models.parse_name(args.model)
    grid, N, info = folder.meta["height"] // patch, len(folder), {}
    if args.encoder == "cnn":
        tokens, info["accuracy"] = train_cnn(args, folder, grid, device)
    else:
        tokens = load_dinov2(folder, grid, device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        D = tokens(np.arange(1)).shape[2]
    info["flops_encoding"] = N * counter.get_total_flops()
    if args.encoder == "cnn":  # a training step is three forward passes
        info["flops_training"] = 3 * BATCH * args.steps * counter.get_total_flops()
    out, progress = folder.path / f"{args.encoder}.npy", models.Progress("features", N)
    part, shape = out.with_suffix(".part"), (N, grid * grid, D)
    features = np.lib.format.open_memmap(part, "w+", np.float16, shape)
    for rows in np.array_split(np.arange(N), N // BATCH + 1):
        with torch.no_grad():
            features[rows] = tokens(rows).cpu().numpy()
        progress(rows[-1] + 1)
    features.flush()
    os.replace(part, out)
    out.with_suffix(".json").write_text(json.dumps(info))
    say(f"{out}: (images, tokens, channels) = {shape}; {info}")


if __name__ == "__main__":
    models.run(main)
