"""Internal Guidance (Zhou et al. 2025, arXiv 2512.24176; code: CVL-UESTC/Internal-Guidance).

A second final layer, on the tokens after an early block, learns the velocity, too: mean square,
weight 0.5, all t. Sampling with head + w (v - head) costs no evaluation: guide_by.py --by internal.
From the code: the head hears t and label as the final layer does, is zero at first, and averaged;
block 8 of L's 24 and XL's 28. From others' notes on the paper: block 4 of B's 12; B's best w is 1.9
at all t, or 2.3 where t >= 0.3, which is not done here. For other depths, a third is a guess.
"""

from types import SimpleNamespace

import torch.nn as nn
from torch.optim.swa_utils import AveragedModel

import common
from common import UserError
from experiments.methods.method import Baseline, share, train_baseline
from models import FinalLayer, unpatchify


class Head(nn.Module):
    """Tokens (n, T, D) -> velocity (n, C, H, W), for images of `t` and label `y_input`, set before.
    `average` is the layer's, because the loop averages the network alone."""

    def __init__(self, model, args):
        super().__init__()
        self.network = [model]  # in a list, so that its weights are not the head's
        self.layer = FinalLayer(model.width, model.patch, model.in_channels)
        for p in self.layer.parameters():
            nn.init.zeros_(p)

        def averaged(average, p, steps):  # as State.update does
            ramp = steps.item() / (9 + steps.item()) if args.ema_ramp else 1.0
            return average.lerp(p, 1 - min(args.ema, ramp))

        self.average = AveragedModel(self.layer, avg_fn=averaged).requires_grad_(False)

    def forward(self, tokens):
        model = self.network[0]
        c = model.t_embedder(self.t) + model.y_embedder["embedding_table"](self.y_input)
        return unpatchify(self.layer(tokens, c), model.patch, model.in_channels)


class Internal(Baseline):
    name = "internal"
    calls = 0  # of `target`: one for each share of a step

    @staticmethod
    def blocks(size):
        return {"depth": min(8, size.depth // 3)}

    def projector(self, model):
        self.head = Head(model, self.args)
        return self.head

    def target(self, batch):
        self.head.t, self.head.y_input = batch.t, batch.y_input
        if self.calls % self.args.accum == 0:  # average what the last step has made of it
            self.head.average.update_parameters(self.head.layer)
        self.calls += 1
        return batch.velocity

    def extra_cost(self, model):
        """A product with D for each number of the latent; once an image, the modulation and t."""
        D, numbers = model.width, model.in_channels * model.input_size**2
        weights = D * numbers + 3 * D * D + 256 * D
        return share(self.args) * 2 * weights / model.forward_flops()


class InternalGuidance(nn.Module):
    """head + w (v - head), of what models.load_checkpoint gave; a network to sample.sample."""

    def __init__(self, model, saved):
        super().__init__()
        if saved["args"].get("stage") != "internal":
            raise UserError("--by internal: the checkpoint is none of internal_guidance.py's")
        self.model, self.depth, self.w = model, saved["args"]["depth"], 1.0
        self.head = Head(model, SimpleNamespace(**saved["args"]))
        self.head.load_state_dict(saved["projector"])
        self.head.average.update_parameters(self.head.layer)  # the last step is not in it yet
        self.head.layer = self.head.average.module

    def forward(self, x, t, y):
        velocity, tokens = self.model(x, t, y, taps=[self.depth])
        self.head.t, self.head.y_input = t, y
        weak = self.head(tokens[self.depth])
        return (weak + self.w * (velocity - weak),)


def main():
    train_baseline(Internal, __doc__)


if __name__ == "__main__":
    common.run(main)
