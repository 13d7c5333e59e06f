"""Information Pathways (Hussain et al. 2023, arXiv 2306.01705): in training, few keys a query.

    python -m experiments.methods.information_pathways train --data data/latents --out out/pathways
    python -m experiments.methods.information_pathways measure pathways-1=out/pathways --judge FILES
    python -m experiments.methods.information_pathways bench

In training each block attends to a random 1 / --share of an image's keys, without rescaling; at
test to all, or the velocities of several subsampled passes are averaged (`--passes`). The paper:
1/4 to 1/8, 4 to 8 times less attention, better than dense training; its code was not released.
Guessed: the keys are the same for all queries and heads of an image and a block, as in its author's
later, dense code (there a Bernoulli mask of 0.3), and exactly T / share of them, so that they are
gathered, not masked. Left out: the locally biased variant. `bench` checks the claim: attention
alone, subsampled / dense. Any script reads the checkpoint, as a dense one.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import models
import train_stage1
from common import UserError, say, setting
from experiments.cifar10 import frontier
from experiments.methods.sampled import Bench, SampleSettings
from models import Attention, SiT


def random_keys(t, block, tokens, share, salt=0) -> torch.Tensor:
    """(N, tokens // share) int64: which keys an image's queries see in a block. A function of the
    bits of t (N,), which the loop has drawn for this image and step: so it is the same in a
    continued run and on any number of processes. `salt`: another choice for the same t."""
    bits = t.float().view(torch.int32).long()[:, None]
    key = torch.arange(tokens, device=t.device)
    x = (bits * 0x9E3779B1 + (block * 1009 + salt) * 0x85EBCA6B + key * 0xC2B2AE35) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):  # mix the bits: neighbours differ in all of them
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 15)).argsort(dim=1)[:, : max(1, tokens // share)]


def take(x, keys):
    """Of x (N, heads, T, D / heads) the tokens `keys` (N, n)."""
    return x.gather(2, keys[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class SubsampledAttention(Attention):
    keys = None  # (N, n), set by the network before each pass; None: all

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.keys is not None:
            k, v = take(k, self.keys), take(v, self.keys)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


class SubsampledSiT(SiT):
    """A SiT that sees few keys in training. At test: all, or few if a `salt` is given."""

    share = 1

    def forward(self, x, t, y, taps=(), salt=None):
        few = self.share > 1 and (self.training or salt is not None)
        tokens = self.pos_embed.shape[1]
        for depth, block in enumerate(self.blocks, 1):
            keys = random_keys(t, depth, tokens, self.share, salt or 0) if few else None
            block.attn.keys = keys
        return super().forward(x, t, y, taps)


def build_for(args, meta, of_models=models.build_for):
    if "share" not in args:
        raise UserError("NAME=CHECKPOINT: is none of information_pathways.py; make one by `train`")
    model = of_models(args, meta)
    model.share = args["share"]
    return model


class Ensemble(nn.Module):
    """The mean velocity of `passes` subsampled passes: as many evaluations."""

    def __init__(self, model, passes):
        super().__init__()
        self.model, self.passes, self.num_classes = model, passes, model.num_classes
        self.in_channels, self.input_size = model.in_channels, model.input_size

    def forward(self, x, t, y):
        passes = [self.model(x, t, y, salt=salt)[0] for salt in range(self.passes)]
        return (torch.stack(passes).mean(dim=0),)


# ---- train, measure, bench


@dataclass
class TrainSettings(train_stage1.Settings):
    out: str = setting("out/pathways", change="free")  # folder of the run
    share: int = setting(4, change="printed")  # a query sees one of so many keys; 1: all


@dataclass
class MeasureSettings(SampleSettings):
    passes: str = "0,4"  # of an ensemble, with commas; 0: one dense pass
    out: str = "out/pathways.jsonl"  # file of the figures


def measure():
    names = frontier.named_checkpoints()
    args = common.parse_settings(MeasureSettings, __doc__)
    for name, path in names.items():
        bench = Bench(path, args)
        for w in bench.scales:
            for passes in map(int, args.passes.split(",")):
                network = Ensemble(bench.network, passes) if passes else bench.network
                bench.measure(network, w, name=name, passes=passes)


def written_out(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def cost(attend, qkv, keys) -> tuple[float, int]:
    """(CPU seconds of attention forward and backward, bytes kept in between)."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        q, k, v = qkv.unbind()
        out = attend(q, k, v) if keys is None else attend(q, take(k, keys), take(v, keys))
    total = sum(kept.values())
    out.sum().backward()
    return time.process_time() - start, total


def bench(share=4, rounds=5):
    """Attention alone, four heads of 64, in turns: subsampled / dense, the median of the rounds."""
    for tokens in (256, 1024, 4096):
        qkv = torch.randn(3, 1, 4, tokens, 64, requires_grad=True)
        keys = random_keys(torch.rand(1), 1, tokens, share)
        for name, attend in ("fused", F.scaled_dot_product_attention), ("written out", written_out):
            pairs = [(cost(attend, qkv, keys), cost(attend, qkv, None)) for _ in range(rounds + 1)]
            times = [few[0] / dense[0] for few, dense in pairs[1:]]  # the first warms up
            line = {"tokens": tokens, "attention": name, "keys": 1 / share}
            line["time"] = round(statistics.median(times), 3)
            line["memory"] = round(pairs[0][0][1] / pairs[0][1][1], 3)
            say(json.dumps(line))


def main():
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    verbs = {"train": train_stage1.main, "measure": measure, "bench": bench}
    if verb not in verbs:
        raise UserError(f"give one of {', '.join(verbs)}, then its flags (--help lists them)")
    models.Attention, models.SiT, models.build_for = SubsampledAttention, SubsampledSiT, build_for
    train_stage1.Settings = TrainSettings
    verbs[verb]()


if __name__ == "__main__":
    common.run(main)
