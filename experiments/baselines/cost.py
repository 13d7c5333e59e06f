"""What a baseline adds to a training step, in vanilla steps of the same network; for the report.

Each script has `extra_cost(model, args) -> float`, built from these. Matrix products are counted,
two FLOPs per multiply-add, as in SiT.forward_flops; a vanilla step is three forward passes.
"""

import sys
from pathlib import Path

import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_stage1 import rows_in_range


def share(args) -> float:
    """The share of a batch that the auxiliary loss works on, on one process."""
    rows = rows_in_range(args.batch_size, args.accum, args.t_min, args.t_max)
    return (rows.stop - rows.start) * args.accum / args.batch_size


def projector_cost(model, projector, args) -> float:
    """Forward and backward of a projector's linear layers, on every token of the share."""
    tokens = (model.input_size // model.patch) ** 2
    weights = sum(m.in_features * m.out_features for m in linear_layers(projector))
    return share(args) * 3 * 2 * tokens * weights / (3 * model.forward_flops())


def linear_layers(projector) -> list[nn.Linear]:
    return [module for module in projector.modules() if isinstance(module, nn.Linear)]


def vanilla_steps(flops, model, args) -> float:
    """A one-off cost in FLOPs, such as an encoder's training, in vanilla steps."""
    return flops / (3 * model.forward_flops() * args.batch_size)
