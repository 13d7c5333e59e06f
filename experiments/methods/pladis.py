"""PLADIS (Kim & Kim 2025, arXiv 2503.07677): sparse attention, extrapolated, at sampling.

    python -m experiments.methods.pladis vanilla-1=out/vanilla --lambdas 0,1,2 --judge FILES

A = softmax(S) + lambda (sparse(S) - softmax(S)), S = q k^T / sqrt(D); no evaluation more. From the
paper: lambda 2, entmax-1.5 (default) or sparsemax (arXiv 1905.05702, 1602.02068), in
CROSS-attention. A SiT of class labels has none, so this script does it in SELF-attention, which is
another method, and says so in each line. `install` makes any module PLADIS's that calls
scaled_dot_product_attention, a text condition's cross-attention, too, and `attention` has that
function's signature. Lambda 0 is the fused attention itself, bit for bit, as in their code. Not
done: their combination with other guidance of attention (PAG, SEG).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import common
from common import UserError, setting
from experiments.cifar10 import frontier
from experiments.methods.sampled import Bench, SampleSettings

dense = F.scaled_dot_product_attention


def entmax15(scores):
    """Rows (..., S) of real numbers -> distributions, many of whose entries are 0:
    max(0, X - tau)^2, where X = scores / 2 and tau makes the sum 1."""
    x = (scores - scores.amax(dim=-1, keepdim=True)) / 2  # the highest is 0: nothing overflows
    ranked = x.sort(dim=-1, descending=True).values
    rho = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean, square = ranked.cumsum(dim=-1) / rho, ranked.square().cumsum(dim=-1) / rho
    tau = mean - ((1 - rho * (square - mean.square())) / rho).clamp(min=0).sqrt()
    support = (tau <= ranked).sum(dim=-1, keepdim=True)
    return (x - tau.gather(-1, support - 1)).clamp(min=0).square()


def sparsemax(scores):
    """Rows (..., S) -> the nearest distributions: max(0, scores - tau), tau makes the sum 1."""
    x = scores - scores.amax(dim=-1, keepdim=True)
    ranked = x.sort(dim=-1, descending=True).values
    rho = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    tau = (ranked.cumsum(dim=-1) - 1) / rho
    support = (tau < ranked).sum(dim=-1, keepdim=True)
    return (x - tau.gather(-1, support - 1)).clamp(min=0)


SPARSE = {"entmax15": entmax15, "sparsemax": sparsemax}


def attention(q, k, v, attn_mask=None, *, scale=None, lam=2.0, sparse="entmax15"):
    """PLADIS in the place of scaled_dot_product_attention: q (..., T, D), k and v (..., S, D), a
    mask (..., T, S) of truth values, or of numbers to add. A's rows sum to 1; some entries may be
    negative. The scores are in float32 at least."""
    if lam == 0:
        return dense(q, k, v, attn_mask=attn_mask, scale=scale)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -1e4)  # not -inf: its square is not finite
    elif attn_mask is not None:
        scores = scores + attn_mask.clamp(min=-1e4)
    softmax = scores.softmax(dim=-1)
    return (softmax + lam * (SPARSE[sparse](scores) - softmax)).to(v.dtype) @ v


class Pladis(TorchFunctionMode):
    """Inside `with`, every scaled_dot_product_attention is `attention`."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is dense:  # torch has switched the mode off in here: no endless recursion
            function = partial(attention, **self.options)
        return function(*args, **(kwargs or {}))


def install(module, **options):
    """Let `module` attend by `attention` with these options (lam, sparse) from now on."""
    forward = type(module).forward  # not module.forward, which an earlier call has replaced

    def sparse_forward(*args, **kwargs):
        with Pladis(**options):
            return forward(module, *args, **kwargs)

    module.forward = sparse_forward


@dataclass
class Settings(SampleSettings):
    lambdas: str = "0,1,2"  # weights of the sparse attention, with commas
    sparse: str = setting("entmax15", choices=[*SPARSE])  # which one
    out: str = "out/pladis.jsonl"  # file of the figures


def main():
    names = frontier.named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    if not names:
        raise UserError("pladis.py: has no checkpoint; give NAME=PATH ...")
    with common.reading("--lambdas", "needs numbers with commas, such as 0,1,2"):
        lambdas = [float(lam) for lam in args.lambdas.split(",")]
    for name, path in names.items():
        bench = Bench(path, args)
        how = {"method": "sparse self-attention, which is not PLADIS", "sparse": args.sparse}
        for w in bench.scales:
            for lam in lambdas:
                for block in bench.network.blocks:
                    install(block.attn, lam=lam, sparse=args.sparse)
                bench.measure(bench.network, w, name=name, lam=lam, **how)


if __name__ == "__main__":
    common.run(main)
