"""SiT: a diffusion transformer with adaLN-Zero blocks that predicts a velocity. Start here.

After DiT (Peebles & Xie 2023, arXiv 2212.09748) and SiT (Ma et al. 2024, arXiv 2401.08740). The
modules have REPA's names (Yu et al. 2025, arXiv 2410.06940), so that its checkpoints load.
"""

import math
from collections import OrderedDict, namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, load_file, reading, warn

FORMAT = 2  # of checkpoints and of teacher.pt

# Depth, width D, heads: DiT's table 1. Then blocks, counted from 1: d1, which stage 1 aligns;
# dt, which teaches; ds, which learns in stage 2. The authors give d1 of B and XL; others are ours.
Size = namedtuple("Size", "depth width heads align_depth teacher_depth student_depth")
SIZES = {  # depth, width, heads, d1, dt, ds
    "P": Size(4, 48, 2, 1, 3, 2),  # P, N: small teachers
    "N": Size(6, 64, 2, 1, 4, 3),
    "Ti": Size(8, 128, 4, 2, 5, 4),  # Ti, W: students for CPUs
    "W": Size(12, 256, 8, 2, 8, 6),
    "S": Size(12, 384, 6, 2, 8, 6),
    "B": Size(12, 768, 12, 2, 8, 6),
    "L": Size(24, 1024, 16, 8, 16, 12),
    "XL": Size(28, 1152, 16, 8, 19, 14),
}

# t = t_of(q) of a uniform q, and q = q_of(t); for another distribution assign two others here
t_of = q_of = nn.Identity()


def parse_name(name: str) -> tuple[Size, int]:
    """The Size and the patch side that a name such as "SiT-B/2" stands for."""
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if size not in SIZES or patch not in ("1", "2", "4", "8"):
        raise UserError(f"--model {name}: must be like SiT-XL/2, of {[*SIZES]} and 1, 2, 4, 8")
    return SIZES[size], int(patch)


def modulate(x, shift, scale):
    """adaLN: scale and shift tokens x (N, T, D) by one vector (N, D) per image."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """t (N,) in [0, 1] -> (N, D): 256 sinusoids of t itself, cosines first, then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype)
        with torch.autocast(t.device.type, enabled=False):  # bfloat16 would blur close t's
            return self.mlp(sinusoids)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D); qk_norm: LayerNorm on each q and k."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.heads, -1)  # q, k and v of each head
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast: in float32
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(D / heads)) v
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


class SiTBlock(nn.Module):
    """adaLN-Zero: attention and MLP, shifted, scaled and gated by the condition c (N, D)."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU("tanh"), fc2=fc2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens (N, T, D) -> patches (N, T, p*p*C)."""

    def __init__(self, width, patch, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(patches, patch, channels):
    """Patches (N, T, p*p*C) -> (N, C, H, W), for a square grid of T patches, row by row."""
    side = math.isqrt(patches.shape[1])
    x = patches.view(-1, side, side, patch, patch, channels)  # (N, row, column, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def sincos_2d(width, side):
    """Fixed position table (1, side*side, D): half of D for the column, half for the row."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, D / 4)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns, rows = table.expand(side, side, -1), table[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()


def xavier_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """Velocity network v_theta(x_t, t, y), where y = num_classes is the null label."""

    def __init__(self, size: Size, patch, input_size, in_channels, num_classes, qk_norm):
        super().__init__()
        depth, width, heads = size[:3]
        self.depth, self.width, self.patch, self.in_channels = depth, width, patch, in_channels
        self.input_size, self.num_classes = input_size, num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, patch, patch)})
        self.t_embedder = TimestepEmbedder(width)
        labels = nn.Embedding(num_classes + 1, width)  # the last row is the null label's
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.register_buffer("pos_embed", sincos_2d(width, input_size // patch))
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        # As DiT. Linear layers: Xavier-uniform; the patch embedding, too, as a linear map
        self.apply(xavier_linear)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.flatten(1))
        nn.init.zeros_(self.x_embedder["proj"].bias)
        # Label and time embeddings: N(0, 0.02)
        mlp = self.t_embedder.mlp
        for layer in (self.y_embedder["embedding_table"], mlp[0], mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the whole network as zero
        modulations = [block.adaLN_modulation[1] for block in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, taps=()):
        """Velocity (N, C, H, W), or None if it was `cut`, and {d: tokens (N, T, D) after block
        d} for d in `taps`. x (N, C, H, W), t (N,) in [0, 1], 0 = data, y (N,) int64."""
        N, C, S = len(x), self.in_channels, self.input_size
        for name, given, shape in ("x", x, (N, C, S, S)), ("t", t, (N,)), ("y", y, (N,)):
            if given.shape != shape:
                raise UserError(f"{name} has shape {tuple(given.shape)}; it must have {shape}")
        if not {*taps} <= {*range(1, self.depth + 1)}:
            raise UserError(f"taps are {[*taps]}; they must be of blocks 1 to {self.depth}")
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)  # (N, D)
        tapped = {}
        for depth, block in enumerate(self.blocks, 1):
            h = block(h, c)
            if depth in taps:
                tapped[depth] = h
        if self.final_layer is None:
            return None, tapped
        return unpatchify(self.final_layer(h, c), self.patch, self.in_channels), tapped

    def cut(self, depth: int):
        """Keep blocks 1 to `depth` alone, without the final layer: all that a teacher runs."""
        self.blocks, self.final_layer, self.depth = self.blocks[:depth], None, depth
        return self

    def forward_flops(self) -> int:
        """FLOPs of one image's forward pass: two per multiply-add, matrix products only."""
        T, D = (self.input_size // self.patch) ** 2, self.width
        block = 24 * T * D * D + 4 * T * T * D + 12 * D * D  # qkv, proj, MLP; attention; adaLN
        patches = 4 * T * D * self.patch**2 * self.in_channels  # the first layer and the last
        return self.depth * block + patches + 512 * D + 6 * D * D  # time embedding, last adaLN


def build_for(args: dict, meta: dict) -> SiT:
    """A new network for args["model"], such as "SiT-B/2", on latents with this meta.json."""
    size, patch = parse_name(args["model"])
    side, channels, classes = meta["height"], meta["channels"], len(meta["classes"])
    if side % patch:
        raise UserError(f"--model {args['model']}: its patches must tile {side} x {side}")
    return SiT(size, patch, side, channels, classes, args["qk_norm"])


def checkpoints(folder) -> list[Path]:
    """The run's own ckpt-<step>.pt, newest first; files of any other name are the user's."""
    own = [path for path in Path(folder).glob("ckpt-???????*.pt") if path.stem[5:].isdecimal()]
    return sorted(own, key=lambda path: int(path.stem[5:]), reverse=True)


def read_checkpoint(path) -> dict:
    """What a checkpoint file holds; UserError for a file that is not one of this project's."""
    convert = f"python -m experiments.checkpoints.convert_sit {path} OUT --vae FILE"
    with reading(path, f"is no checkpoint of this project; convert another's by {convert}"):
        saved = load_file(path, FORMAT)
        saved["args"], saved["meta"]["identity"], saved["step"]  # a KeyError if one is missing
    return saved


def check_classes(subject, theirs: list[str], ours: list[str]):
    """UserError if a label means another class: another number of them, or in another order."""
    seen = f"{len(theirs)} classes, {theirs[:3]} first; here are {len(ours)}, {ours[:3]} first"
    if len(theirs) != len(ours) or (theirs != ours and sorted(theirs) == sorted(ours)):
        raise UserError(f"{subject}: has {seen}; use the same classes in the same order")
    if theirs != ours:
        warn(f"{subject}: has {seen}; labels are taken to mean the same")


def load_checkpoint(path, weights="ema", null_label_for="") -> tuple[SiT, dict]:
    """(The SiT in eval mode on the CPU, the checkpoint), of a file or of a run's newest one.
    weights: "ema", "model", "raw" (ema if it is alone), "best" (model if ema is untrained)."""
    if Path(path).is_dir():
        path = next(iter(checkpoints(path)), Path(path) / "ckpt-*.pt")
    saved = read_checkpoint(path)
    args, alone = saved["args"], "model" if "model" in saved else "ema"
    with reading(path, f"holds no {weights} network; try --weights model or ema"):
        model = build_for(args, saved["meta"])
        initial = 0.0 if args["ema_ramp"] else args["ema"] ** saved["step"]
        if weights in ("raw", "best"):
            weights = "ema" if weights == "best" and "ema" in saved and initial < 0.1 else alone
        model.load_state_dict(saved[weights])
    if weights == "ema" and initial >= 0.1:  # the share of the initial weights in the average
        remedy = "use --weights model" if alone == "model" else "take a later checkpoint"
        raise UserError(f"{path}: its average is {initial:.0%} untrained; {remedy}")
    if null_label_for and args["label_drop"] == 0:
        raise UserError(f"{path}: {null_label_for} needs a null label; --label-drop 0 trained none")
    return model.eval(), saved
