"""REPA with DINOv2's features, computed in each step from the pictures' files, not from a disk.

    python -m experiments.methods.repa_dino --data data/imagenet256 --model SiT-B/2 --no-qk-norm

As files the features of ImageNet take 504 GB and are read at random. The pictures are on a disk
anyway, and the latent folder names them: files.json, and "source" in meta.json.

REPA's preprocessing (Yu et al. 2025, arXiv 2410.06940; code): the crop in [0, 1], ImageNet's
mean and deviation, bicubic to 224 px for 256, 448 for 512; then DINOv2's tokens without the class
token. The encoder comes from torch.hub and costs a forward pass an image (ViT-B at 224: 46 GFLOPs).
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import models
from common import UserError, fingerprint
from experiments.methods.method import BaselineSettings, train_baseline
from experiments.methods.repa import Repa
from train_stage1 import Projector
from vae_latents import open_image

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
WIDTHS = {"vits14": 384, "vitb14": 768, "vitl14": 1024, "vitg14": 1536}  # of DINOv2's tokens


@dataclass
class Settings(BaselineSettings):
    encoder: str = "dinov2_vitb14"  # its name in facebookresearch/dinov2 on torch.hub
    images: str | None = None  # folder of the pictures (default: where the latents came from)


class RepaDino(Repa):
    name = "repa"
    Settings = Settings

    def load_encoder(self) -> torch.nn.Module:
        """The frozen encoder. Its forward_features gives "x_norm_patchtokens" (n, T, D_e)."""
        return torch.hub.load("facebookresearch/dinov2", self.args.encoder)

    def prepare(self, folder, device):
        root = self.args.images or folder.meta.get("source")
        if not root or not (folder.path / "files.json").is_file():
            raise UserError(
                f"{folder.path}: does not name its pictures; give --images, encode anew"
            )
        names = json.loads((folder.path / "files.json").read_text())
        self.files = [Path(root, name) for name in names]
        if not self.files[0].is_file():
            raise UserError(f"{self.files[0]}: is not there; say with --images where they are now")
        _, patch = models.parse_name(self.args.model)
        self.size = folder.meta["image_size"]
        self.side = 14 * (folder.meta["height"] // patch)  # so that both have as many tokens
        self.teacher = self.load_encoder().eval().requires_grad_(False).to(device)
        self.identity = fingerprint(*self.teacher.state_dict().values())
        self.pool = ThreadPoolExecutor(8)

    def projector(self, model):
        return Projector(model.width, WIDTHS[self.args.encoder[-6:]], self.args.projector_dim)

    @torch.no_grad()
    def target(self, batch):
        files = [self.files[i] for i in batch.indices.tolist()]
        pixels = np.stack(list(self.pool.map(lambda path: open_image(path, self.size), files)))
        images = torch.from_numpy(pixels).to(batch.x0.device).permute(0, 3, 1, 2) / 255
        mean, deviation = (images.new_tensor(x).view(1, 3, 1, 1) for x in (MEAN, DEVIATION))
        images = F.interpolate((images - mean) / deviation, self.side, mode="bicubic")
        return self.teacher.forward_features(images)["x_norm_patchtokens"].float()


def main():
    train_baseline(RepaDino, __doc__)


if __name__ == "__main__":
    common.run(main)
