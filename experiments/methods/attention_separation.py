"""Attention Separation (Jiang et al. 2026, arXiv 2607.02508; code: vvvvvjdy/SRA, SiT-SRA_DTS_AS).

    python -m experiments.methods.attention_separation --data data/latents --out out/separated
    ... --teacher out/teacher/teacher.pt                # with stage 2's loss added

A quarter of an image's tokens, at random, is at a second time s, the others at t; the noise is the
same, so that the velocity is, too. Each token is modulated by its own time, and attends to the
tokens of its own time alone, in every block: one image becomes two partial ones, an augmentation.
L_diff is the mean over all tokens. In sampling, and in the average, the network is a plain SiT.

From the code: the share 0.25, uniform times that do not depend on each other, the label and its
drop for the whole image. Not done: their alignment of the network with its own average (SRA, whose
teacher is separated, too). s and the tokens come from the later digits of the noise, because a
step has no draws for them; so a run continues bit for bit, and on any number of processes alike.

With a teacher it is stage 2, too, which is by us: the teacher sees the whole image at t, and
L_guide is the mean over the tokens that are at t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

import common
import models
import train_stage1
import train_stage2
from common import setting
from models import unpatchify
from train_stage1 import LossNetwork


def second_time(velocity, patch, share):
    """(Which tokens have it (n, T) bool, the second time (n,)), of velocity (n, C, H, W)."""
    digits = (velocity * 1000) % 1  # uniform, and no longer a matter of how large it is
    order = digits[:, 0, ::patch, ::patch].flatten(1).argsort(dim=1)
    ranks = order.argsort(dim=1)
    return ranks < max(1, round(share * ranks.shape[1])), models.t_of(digits[:, -1, -1, -1])


def attend(attention, x, allowed):
    """models.Attention on tokens x (N, T, D), where `allowed` (N, 1, T, T)."""
    N, T, D = x.shape
    qkv = attention.qkv(x).view(N, T, 3, attention.heads, D // attention.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return attention.proj(out.transpose(1, 2).reshape(N, T, D))


def separated(model, x_t, t, y, velocity, second, s, taps=()):
    """What models.SiT.forward returns, of tokens at t, and at s where `second` (N, T)."""
    side = model.input_size // model.patch
    place = F.interpolate(second.view(-1, 1, side, side).float(), scale_factor=model.patch)
    x = x_t + place * (s - t).view(-1, 1, 1, 1) * velocity  # (1 - s) x0 + s eps
    h = model.x_embedder["proj"](x).flatten(2).transpose(1, 2) + model.pos_embed
    label = model.y_embedder["embedding_table"](y)
    c = model.t_embedder(torch.cat([t, s])) + torch.cat([label, label])

    def modulation(layer, parts):
        at_t, at_s = layer(c).chunk(2)
        return torch.where(second[:, :, None], at_s[:, None], at_t[:, None]).chunk(parts, dim=2)

    allowed, tapped = second[:, None, :, None] == second[:, None, None, :], {}
    for depth, block in enumerate(model.blocks, 1):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.adaLN_modulation, 6)
        h = h + gate1 * attend(block.attn, block.norm1(h) * (1 + scale1) + shift1, allowed)
        h = h + gate2 * block.mlp(block.norm2(h) * (1 + scale2) + shift2)
        if depth in taps:
            tapped[depth] = h
    final = model.final_layer
    shift, scale = modulation(final.adaLN_modulation, 2)
    patches = final.linear(final.norm_final(h) * (1 + scale) + shift)
    return unpatchify(patches, model.patch, model.in_channels), tapped


@dataclass
class Losses:
    """What LossNetwork.forward needs of its object: here with another forward of the network."""

    model: Callable
    losses: tuple


class SeparatedNetwork(LossNetwork):
    """LossNetwork, but the network sees two times."""

    def __init__(self, model, losses, share):
        super().__init__(model, losses)
        self.share = share

    def forward(self, x_t, t, y_input, velocity, targets):
        second, s = second_time(velocity, self.model.patch, self.share)
        network = partial(separated, self.model, velocity=velocity, second=second, s=s)
        ours = Losses(network, self.losses)
        return LossNetwork.forward(ours, x_t, t, y_input, velocity, targets)


class SeparatedGuidance(train_stage2.Guidance):
    """Stage 2's loss on the tokens that are at t."""

    def target(self, batch):
        patch = models.parse_name(self.args.model)[1]
        self.second, _ = second_time(batch.velocity, patch, self.args.share)
        return super().target(batch)

    def distance(self, prediction, target):
        error = (prediction - target).square().mean(dim=2)
        return (error * ~self.second).sum(dim=1) / (~self.second).sum(dim=1)


def extra_cost(model):
    """The modulation by a second time, as a share of a training step."""
    D = model.width
    weights = model.depth * 6 * D * D + 2 * D * D + 256 * D + D * D
    return 2 * weights / model.forward_flops()


@dataclass
class Settings(train_stage2.Settings):
    out: str = setting("out/separated", change="free")  # folder of the run
    teacher: str | None = setting(None, change="free")  # stage 2, too, by this teacher.pt
    share: float = setting(0.25, above=0, below=1)  # of the tokens that are at the second time


def main():
    args, losses = common.parse_settings(Settings, __doc__), []
    if args.teacher:
        args.guide_depth = args.guide_depth or models.parse_name(args.model)[0].student_depth
        losses.append(
            SeparatedGuidance(args, args.guide_depth, args.guide_weight, args.guide_steps)
        )
    ours = partial(SeparatedNetwork, share=args.share)
    with mock.patch.object(train_stage1, "LossNetwork", ours):
        train_stage1.train(args, *losses)


if __name__ == "__main__":
    common.run(main)
