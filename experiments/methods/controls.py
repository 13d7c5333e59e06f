"""Stage 2 with another target in place of f_g, to see what of f_g the student learns from.

    python -m experiments.methods.controls --target wrong --out out/wrong

The targets are tokens (n, T, D) as f_g = f_u + s (f_c - f_u) is, and all else is stage 2's, to the
draws, so that `true` is stage 2 itself, bit for bit. Each of the others keeps a part of f_g:

- wrong: f_g of the image's own x_t with a label drawn evenly among the other classes. It has f_g's
  length and its structure, but says a class that the image does not have.
- rescaled: f_c, each token of it made as long as f_g's. It has the length without the direction.
- shuffled: f_g of the next image of the same class in the batch, at that image's t. It says the
  class and nothing of the image. An image that is alone in its class keeps its own f_g: of 10
  images in range and 10 classes about two in five.
- other: f_g of an image of the same class, drawn from all of the data, at the same t and with the
  same noise. It is `shuffled` without the images that are alone, and without a change of t.

Nothing here is from the paper (arXiv 2601.07773), which has no such controls.
"""

from dataclasses import dataclass

import torch

import common
import models
import train_stage2
from build_teacher import guided_features
from common import UserError, setting
from train_stage1 import train

TARGETS = ["true", "wrong", "rescaled", "shuffled", "other"]


@dataclass
class Settings(train_stage2.Settings):
    target: str = setting("true", choices=TARGETS)  # what P2 answers


def wrong_labels(y, u, classes):
    """Labels (n,) that are not y (n,), even among the others, from uniform numbers u (n,)."""
    return (y + 1 + (u * (classes - 1)).long()) % classes


def next_of_class(y):
    """The row (n,) of the next image of the same class, around the end: a permutation."""
    rows = torch.arange(len(y), device=y.device)
    distance = (rows[None] - rows[:, None] - 1) % len(y)  # to itself n - 1, the farthest
    return distance.masked_fill(y[:, None] != y[None], len(y)).argmin(dim=1)


class Control(train_stage2.Guidance):
    """P2 regresses one of TARGETS."""

    def prepare(self, folder, device):
        if len(folder.meta["classes"]) == 1 and self.args.target == "wrong":
            raise UserError("--target wrong: the data has one class; take data with more")
        classes = range(len(folder.meta["classes"]))
        self.folder = folder
        self.images_of = [torch.nonzero(folder.labels == c)[:, 0] for c in classes]
        super().prepare(folder, device)

    def target(self, batch):
        return getattr(self, self.args.target)(batch)

    def features(self, batch, y, s=None):
        s = self.s if s is None else s
        return guided_features(self.teacher, batch.x_t, batch.t, y, s)

    def true(self, batch):
        return self.features(batch, batch.y)

    def wrong(self, batch):
        return self.features(batch, wrong_labels(batch.y, batch.u, self.teacher.num_classes))

    def rescaled(self, batch):
        f_cond = self.features(batch, batch.y, s=1)
        lengths = self.true(batch).norm(dim=2, keepdim=True)
        return f_cond * lengths / f_cond.norm(dim=2, keepdim=True)

    def shuffled(self, batch):
        return self.true(batch)[next_of_class(batch.y)]

    def other(self, batch):
        indices = []
        for y, u in zip(batch.y.tolist(), batch.u.tolist(), strict=True):
            same = self.images_of[y]
            indices.append(same[int(u * len(same))])
        moments, _ = self.folder.read(torch.stack(indices))
        mean, std = moments.to(batch.x0).chunk(2, dim=1)
        x0 = self.folder.meta["scale"] * (mean + std * batch.posterior)
        x_t = batch.x_t + (1 - batch.t.view(-1, 1, 1, 1)) * (x0 - batch.x0)
        return guided_features(self.teacher, x_t, batch.t, batch.y, self.s)


def main():
    args = common.parse_settings(Settings, __doc__)
    args.guide_depth = args.guide_depth or models.parse_name(args.model)[0].student_depth
    train(args, Control(args, args.guide_depth, args.guide_weight, args.guide_steps))


if __name__ == "__main__":
    common.run(main)
