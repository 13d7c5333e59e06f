"""REPA (Yu et al. 2025, arXiv 2410.06940; code: sihyun-yu/REPA) on this repository's loop.

L_repa is minus the cosine similarity of MLP(h_d) and an external encoder's feature of the clean
image (--features, from repa_features.py), mean over tokens: their sign, so it falls from 0 towards
-1. Weight 0.5, all t, the whole run. Block d: 8 of XL's 28 (their README), 8 of L's 24 and 4 of B's
12 (scripts of works built on REPA), so for other depths a third.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models
from models import Projector, UserError, setting

from experiments.baselines.cost import projector_cost
from train_stage1 import Auxiliary, TrainSettings, train


@dataclass
class Settings(TrainSettings):
    out: str = setting("out/repa", "folder of the run: checkpoints and log.jsonl")
    t_min: float = setting(0.0, "L_repa counts from this t on", at_least=0, at_most=1)
    t_max: float = setting(1.0, "and up to this one", at_least=0, at_most=1)
    features: str = setting("data/imagenet256/dinov2.npy", "(N, T, D_e), from repa_features.py")
    repa_weight: float = setting(0.5, "weight of L_repa", above=0)
    repa_depth: int | None = setting(None, "block d (default: depth / 3, at most 8)", at_least=1)


class Repa(Auxiliary):
    name = "repa"

    def prepare(self, folder, device):
        path, (_, patch) = self.args.features, models.parse_name(self.args.model)
        with models.reading(path):
            self.features = features = np.load(path, mmap_mode="r")  # row i is of image i
        N, T = len(folder), (folder.meta["height"] // patch) ** 2
        if features.ndim != 3 or features.shape[:2] != (N, T):
            what = f"not ({N} images, {T} tokens, D_e); make it with repa_features.py"
            raise UserError(f"--features {path}: its shape is {features.shape}, {what}")
        self.identity = models.fingerprint(features.shape, features[:: max(1, N // 64)].copy())

    def projector(self, model):
        return Projector(model.width, self.features.shape[2], self.args.projector_dim)

    def target(self, batch):
        return torch.from_numpy(self.features[batch.indices.cpu().numpy()]).to(batch.x0)

    def distance(self, prediction, target):
        return -F.cosine_similarity(prediction, target, dim=2).mean(dim=1)


def extra_cost(model, args) -> float:
    width = np.load(args.features, mmap_mode="r").shape[2]  # the encoder's cost is in its .json
    return projector_cost(model, Projector(model.width, width, args.projector_dim), args)


def main():
    args = models.parse_settings(Settings, __doc__)
    args.repa_depth = args.repa_depth or min(8, models.parse_name(args.model)[0].depth // 3)
    train(args, Repa(args, args.repa_depth, args.repa_weight))


if __name__ == "__main__":
    models.run(main)
