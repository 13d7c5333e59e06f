"""What the baselines share: flags, how one is trained, and what one adds to a training step.

A baseline is a subclass of `Baseline` with a `main` that calls `train_baseline`. Its cost, for the
report, is in vanilla steps of the same network, which are three forward passes; matrix products are
counted, two FLOPs per multiply-add.
"""

from dataclasses import dataclass

import torch.nn as nn

import common
import models
from common import UserError, setting
from models import Size
from train_stage1 import Auxiliary, TrainSettings, rows_in_range, train


@dataclass
class BaselineSettings(TrainSettings):
    out: str | None = None  # folder of the run (default: out/ and the loss's name)
    t_min: float = setting(0.0, at_least=0, at_most=1)  # the loss counts from this t on
    t_max: float = setting(1.0, at_least=0, at_most=1)  # and up to this one
    weight: float | None = setting(None, above=0)  # weight of the loss (default: the paper's)
    depth: int | None = setting(None, at_least=1)  # block (default: the paper's, by size)


class Baseline(Auxiliary):
    """An auxiliary loss of another paper; it needs `target` and often more, as any Auxiliary."""

    Settings = BaselineSettings  # flags of its own: a dataclass that inherits from this one
    weight = 0.5  # the paper's

    def __init__(self, args):
        super().__init__(args, args.depth, args.weight)

    @staticmethod
    def blocks(size: Size) -> dict[str, int]:
        """{a flag that names a block: the paper's block for this size}."""
        raise NotImplementedError

    def extra_cost(self, model) -> float:
        """What the loss adds to a step: the projector, unless a subclass says more."""
        return projector_cost(model, self.projector(model), self.args)


def complete(args, Loss: type[Baseline]):
    """Fill in what the flags left to the method; UserError for a block that is not there."""
    size, _ = models.parse_name(args.model)
    args.out = args.out or f"out/{Loss.name}"
    args.weight = args.weight or Loss.weight
    for name, paper in Loss.blocks(size).items():
        block = getattr(args, name) or paper
        if block > size.depth:
            blocks = f"{args.model} has blocks 1 to {size.depth}"
            raise UserError(f"{common.flag(name)} {block}: {blocks}")
        setattr(args, name, block)


def train_baseline(Loss: type[Baseline], doc: str):
    args = common.parse_settings(Loss.Settings, doc)
    complete(args, Loss)
    train(args, Loss(args))


# ---- Costs


def share(args) -> float:
    """The share of a batch that the auxiliary loss works on, on one process."""
    rows = rows_in_range(args.batch_size, args.accum, args.t_min, args.t_max)
    return (rows.stop - rows.start) * args.accum / args.batch_size


def projector_cost(model, projector, args) -> float:
    """Forward and backward of a projector's linear layers, on every token of the share."""
    tokens = (model.input_size // model.patch) ** 2
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return share(args) * 3 * 2 * tokens * weights / (3 * model.forward_flops())
