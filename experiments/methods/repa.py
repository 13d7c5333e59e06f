"""REPA (Yu et al. 2025, arXiv 2410.06940; code: sihyun-yu/REPA) on this repository's loop.

L_repa is minus the cosine similarity of MLP(h_d) and an external encoder's feature of the clean
image (--features, row i of image i), mean over tokens: their sign, so it falls from 0 towards -1.
Weight 0.5, all t, the whole run. Block d: 8 of XL's 28 (their README), 8 of L's 24 and 4 of B's 12
(scripts of works built on REPA), so for other depths a third.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import common
import models
from common import UserError, fingerprint
from experiments.methods.method import Baseline, BaselineSettings, train_baseline
from train_stage1 import Projector

REMEDY = "make it with repa_features.py"


@dataclass
class Settings(BaselineSettings):
    features: str = "data/imagenet256/cnn.npy"  # (N, T, D_e), such as repa_features.py's


class Repa(Baseline):
    name = "repa"
    Settings = Settings

    @staticmethod
    def blocks(size):
        return {"depth": min(8, size.depth // 3)}

    def read_features(self) -> np.ndarray:
        with common.reading(self.args.features, f"is no array (N, T, D_e); {REMEDY}"):
            features = np.load(self.args.features, mmap_mode="r")
            _, _, _ = features.shape
        return features

    def prepare(self, folder, device):
        self.features, (_, patch) = self.read_features(), models.parse_name(self.args.model)
        shape, wanted = self.features.shape, (len(folder), (folder.meta["height"] // patch) ** 2)
        if shape[:2] != wanted:
            raise UserError(
                f"{self.args.features}: is {shape}, not {wanted} images, tokens; {REMEDY}"
            )
        some = self.features[:: max(1, len(folder) // 64)].copy()
        self.identity = fingerprint(shape, some)

    def projector(self, model):
        width = self.read_features().shape[2]
        return Projector(model.width, width, self.args.projector_dim)

    def target(self, batch):
        return torch.from_numpy(self.features[batch.indices.cpu().numpy()]).to(batch.x0)

    def distance(self, prediction, target):
        return -F.cosine_similarity(prediction, target, dim=2).mean(dim=1)


def main():
    train_baseline(Repa, __doc__)


if __name__ == "__main__":
    common.run(main)
