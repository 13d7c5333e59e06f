"""Captions for labels: a SiT that reads a caption's words by cross-attention, on this loop.

    python -m experiments.methods.text table data/text --captions captions.json
    python -m experiments.methods.text stage1 --data data/text --out out/text-stage1
    python -m experiments.methods.text teacher --ckpt out/text-stage1 --out out/text-teacher
    python -m experiments.methods.text stage2 --data data/text --teacher out/text-teacher/teacher.pt
    python -m experiments.methods.text sample --ckpt out/stage2 --classes "a red star"

`table` makes a latent folder's labels rows of a table: all captions that may ever be sampled, also
those of no image. The null label is the row behind them, the empty caption, so that loop, teacher
and samplers stay as they are. The other verbs take their scripts' flags. A row holds words, or
features of a text encoder. The blocks are PixArt-alpha's (Chen et al. 2023, arXiv 2310.00426):
cross-attention, zero at first, between attention and MLP; adaLN is told t alone. Ours are the two
layers that read the rows.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import build_teacher
import common
import models
import sample
import train_stage1
import train_stage2
from common import UserError, fingerprint, say, setting
from models import Attention, SiT, SiTBlock, modulate, unpatchify
from vae_latents import LatentFolder


class CrossAttention(Attention):
    """Image tokens x (N, T, D) look at a caption's tokens (N, L, D), where mask (N, L) is True."""

    # (q, k, v, attn_mask=) -> values; sampling may replace it, such as by pladis.attention
    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, width, heads, qk_norm):
        super().__init__(width, heads, qk_norm)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        del self.qkv

    def forward(self, x, caption, mask):
        N, T, D = x.shape
        q = self.q(x).view(N, T, self.heads, D // self.heads).transpose(1, 2)
        kv = self.kv(caption).view(N, -1, 2, self.heads, D // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (N, heads, L, D / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = self.attend(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(out.transpose(1, 2).reshape(N, T, D))


class TextBlock(SiTBlock):
    def __init__(self, width, heads, qk_norm):
        super().__init__(width, heads, qk_norm)
        self.norm_cross = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.cross = CrossAttention(width, heads, qk_norm)

    def forward(self, x, c, caption, mask):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross(self.norm_cross(x), caption, mask)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TextSiT(SiT):
    """v_theta(x_t, t, caption). table: (captions + 1, L) int64 word numbers, 0 is no word, or
    (captions + 1, L, D_text) features, a vector of zeros is no word; the last row is the null."""

    def __init__(self, size, patch, input_size, in_channels, num_classes, qk_norm, table):
        super().__init__(size, patch, input_size, in_channels, num_classes, qk_norm)
        width, heads, length = size.width, size.heads, table.shape[1]
        self.register_buffer("table", table, persistent=False)  # no part of a checkpoint
        words = nn.Embedding(int(table.max()) + 1, width) if table.dim() == 2 else None
        embed = words or nn.Linear(table.shape[2], width)
        self.y_embedder = nn.ModuleDict({"embedding_table": embed})  # in the label table's place
        self.word_positions = nn.Parameter(0.02 * torch.randn(length, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        norm = nn.LayerNorm(width)
        self.reader = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.blocks = nn.ModuleList(TextBlock(width, heads, qk_norm) for _ in range(size.depth))
        self.initialize_weights()
        for block in self.blocks:
            nn.init.zeros_(block.cross.proj.weight)

    def read(self, y):
        """Labels (N,) -> (tokens (N, L, D), mask (N, L), True where there is a word)."""
        rows = self.table[y]
        embed, mask = self.y_embedder["embedding_table"], rows != 0
        if rows.dim() == 3:
            rows, mask = rows.to(embed.weight.dtype), mask.any(dim=2)
        tokens = embed(rows) + self.word_positions
        return self.reader(tokens, src_key_padding_mask=~mask), mask

    def forward(self, x, t, y, taps=()):
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c, (caption, mask) = self.t_embedder(t), self.read(y)
        tapped = {}
        for depth, block in enumerate(self.blocks, 1):
            h = block(h, c, caption, mask)
            if depth in taps:
                tapped[depth] = h
        if self.final_layer is None:
            return None, tapped
        return unpatchify(self.final_layer(h, c), self.patch, self.in_channels), tapped

    def forward_flops(self):
        """Of the SiT; for each block q, proj, k, v and attention; the reader's two layers."""
        T, D, L = (self.input_size // self.patch) ** 2, self.width, self.table.shape[1]
        cross = 4 * T * D * D + 4 * L * D * D + 4 * T * L * D
        reader = 2 * (24 * L * D * D + 4 * L * L * D)
        embed = 2 * L * self.table.shape[2] * D if self.table.dim() == 3 else 0
        return super().forward_flops() + self.depth * cross + reader + embed


def word_table(captions) -> torch.Tensor:
    """(captions, L) int64: 1, which begins a caption, then its words from 2 on, then zeros."""
    vocabulary = sorted({word for caption in captions for word in caption.split()})
    number = {word: i for i, word in enumerate(vocabulary, 2)}
    rows = [torch.tensor([1, *(number[word] for word in text.split())]) for text in captions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def read_features(path, captions) -> tuple[torch.Tensor, str]:
    """(Features (captions + 1, L, D), their hash) of a .npy file of real numbers."""
    with common.reading(path, "is no table of features (captions + 1, L, D); make it anew"):
        features = np.load(path, mmap_mode="c")  # "c": a private map
        if features.ndim != 3 or len(features) != captions + 1 or features.dtype.kind != "f":
            raise ValueError(f"{features.dtype} {features.shape}, of {captions} captions")
        some = features[np.linspace(0, captions, min(captions + 1, 64)).astype(int)]
    return torch.from_numpy(features), fingerprint(features.shape, some)


def build_for(args, meta) -> TextSiT:
    """What models.build_for is for the loop, the teacher and the samplers here."""
    size, patch = models.parse_name(args["model"])
    side, channels, captions = meta["height"], meta["channels"], meta["classes"]
    if "text" not in meta:
        raise UserError("--data: has no table of captions; run text.py table for it")
    if side % patch:
        raise UserError(f"--model {args['model']}: patches of {patch} do not tile {side} x {side}")
    if path := meta["text"]["features"]:
        table, identity = read_features(path, len(captions))
        if identity != meta["text"]["identity"]:
            raise UserError(f"{path}: holds other features than at first; bring those back")
    else:
        table = word_table([*captions, ""])
    return TextSiT(size, patch, side, channels, len(captions), args["qk_norm"], table)


@dataclass
class Settings:
    data: str = setting("", positional=True)  # latent folder whose labels are rows of --captions
    captions: str = "captions.json"  # list of all captions; that of an image is row <label>
    features: str | None = None  # .npy file (captions + 1, L, D), last the empty one's; else words


def add_table():
    args = common.parse_settings(Settings, __doc__)
    classes, path = LatentFolder(args.data).meta["classes"], Path(args.data) / "meta.json"
    meta = json.loads(path.read_text())
    if "text" in meta:
        raise UserError(f"{args.data}: has a table already; encode the images anew for another")
    with common.reading(args.captions, "is no JSON list of captions that fits the labels"):
        captions = [" ".join(text.split()) for text in json.loads(Path(args.captions).read_text())]
        for row, name in enumerate(classes):  # a folder's name; a number from EDM's dataset.json
            if name not in (str(row), captions[row]):
                raise ValueError(f"row {row} is {captions[row]}, the class is {name}")
    meta["classes"], meta["text"] = captions, {"features": None}
    if args.features:
        features, identity = read_features(args.features, len(captions))
        if not features.flatten(1).any(dim=1).all():
            raise UserError(f"{args.features}: has a row of zeros; the null needs a token, too")
        meta["text"] = {"features": str(Path(args.features).absolute()), "identity": identity}
    with common.atomic_write(path) as file:
        file.write(json.dumps(meta).encode())
    say(f"{args.data}: {len(captions)} captions, and the empty one, of {args.features or 'words'}")


VERBS = {"table": add_table, "stage1": train_stage1.main, "teacher": build_teacher.main}
VERBS |= {"stage2": train_stage2.main, "sample": sample.main}


def main():
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if verb not in VERBS:
        raise UserError(f"give one of {', '.join(VERBS)}, then its flags (--help lists them)")
    models.build_for = build_for
    VERBS[verb]()


if __name__ == "__main__":
    common.run(main)
