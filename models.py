"""SiT: a diffusion transformer with DiT's adaLN-Zero blocks that predicts a velocity in VAE latent space. Start here.

Sources: DiT (Peebles & Xie 2023, arXiv 2212.09748), SiT (Ma et al. 2024, arXiv 2401.08740), REPA (Yu et al. 2025,
arXiv 2410.06940). Names in the state dict are theirs, so their checkpoints load here. Last: what every script shares.
"""
import argparse
import contextlib
import math
import os
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# name -> depth, width D, attention heads, patch side in latent pixels (DiT, table 1; Ti is ours, for CPUs)
SIZES = {f"SiT-{size}/{patch}": (*dims, patch)
         for size, dims in {"Ti": (8, 128, 4), "S": (12, 384, 6), "B": (12, 768, 12),
                            "L": (24, 1024, 16), "XL": (28, 1152, 16)}.items() for patch in (2, 4, 8)}
# Blocks from 1: stage 1 aligns d1, the teacher gives dt, the student's ds regresses it (the authors': B, d1 of XL).
DEPTHS = {f"SiT-{size}/{patch}": depths for patch in (2, 4, 8) for size, depths in {
    "Ti": (2, 5, 4), "S": (2, 8, 6), "B": (2, 8, 6), "L": (8, 16, 12), "XL": (8, 19, 14)}.items()}

def modulate(x, shift, scale):
    """adaLN: x (N, T, D) scaled and shifted by one vector (N, D) per image."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

class PatchEmbed(nn.Module):
    """Latent (N, C, H, W) -> tokens (N, T, D): one linear map of each p x p patch, T = H/p * W/p, row by row."""

    def __init__(self, patch, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)

class TimestepEmbedder(nn.Module):
    """t (N,) in [0, 1] -> (N, D): 256 sinusoids of t itself (not of 1000 t), cosines first, then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        args = t[:, None].float() * freqs
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=1).to(self.mlp[0].weight.dtype))

class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D); with `qk_norm`, LayerNorm on each head's queries and keys."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (N, heads, T, d)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast leaves a LayerNorm's output in float32
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, D))

class SiTBlock(nn.Module):
    """adaLN-Zero: attention and MLP, shifted, scaled and gated by c, the embedding of (t, y); at first the identity."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width)))
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
    """(N, T, p*p*C) -> (N, C, H, W) for a square grid of T tokens; the inverse of cutting an image into patches."""
    side = math.isqrt(patches.shape[1])
    x = patches.view(-1, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)

def sincos_2d(width, side):
    """Fixed positional embedding (1, side*side, width): the first half encodes the column, the second the row."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = table.expand(side, side, -1), table[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()

class SiT(nn.Module):
    """Velocity network v_theta(x_t, t, y). `build` makes one by name; nothing in `forward` is random."""

    def __init__(self, depth, width, heads, patch, input_size, in_channels, num_classes, qk_norm):
        super().__init__()
        self.depth, self.width, self.patch = depth, width, patch
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.x_embedder = PatchEmbed(patch, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})  # + null label
        self.register_buffer("pos_embed", sincos_2d(width, input_size // patch))
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, in_channels)
        self.grad_checkpoint = False  # recompute each block in the backward pass: less memory, a third more time
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's: Xavier-uniform linears, N(0, 0.02) embedders, zeros wherever a residual branch or the output ends."""
        self.apply(xavier_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (self.y_embedder["embedding_table"], self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        for layer in (*(b.adaLN_modulation[1] for b in (*self.blocks, self.final_layer)), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def embed(self, x, t, y):
        """Tokens (N, T, D) before block 1, and the condition c (N, D) that modulates every block."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder["embedding_table"](y)

    def forward(self, x, t, y, tap=None):
        """x (N, C, H, W), t (N,) in [0, 1] with 0 = data, y (N,) int64 with `num_classes` as the null label.
        Returns the velocity (N, C, H, W) and the tokens (N, T, D) after block `tap`, counted from 1 (None without tap).
        """
        h, c = self.embed(x, t, y)
        tapped = None
        for depth, block in enumerate(self.blocks, 1):
            h = checkpoint(block, h, c, use_reentrant=False) if self.grad_checkpoint and self.training else block(h, c)
            tapped = h if depth == tap else tapped
        return unpatchify(self.final_layer(h, c), self.patch, self.in_channels), tapped

    def forward_flops(self):
        """Floating-point operations of one image's forward pass: two per multiply-add, matrix products only."""
        tokens, D = (self.input_size // self.patch) ** 2, self.width
        io = 2 * tokens * 2 * self.patch ** 2 * self.in_channels * D  # patches in and out
        block = 24 * tokens * D * D + 4 * tokens * tokens * D + 12 * D * D  # qkv, proj, MLP; attention; adaLN
        return io + self.depth * block + 2 * (256 * D + D * D) + 4 * D * D

class Projector(nn.Module):
    """The MLP head of an auxiliary loss, D -> 2048 -> 2048 -> D with SiLU (REPA's), on tokens (N, T, D).
    `to_latent=(patch, channels)` makes it stage 1's P1, which answers in VAE latent space (N, C, H, W) through a
    LayerNorm without affine and a linear layer; without it, it is stage 2's P2, which answers in feature space.
    """
    def __init__(self, width, hidden=2048, to_latent=None):
        super().__init__()
        self.to_latent = to_latent
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                 nn.Linear(hidden, width))
        if to_latent:
            self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.linear = nn.Linear(width, to_latent[0] ** 2 * to_latent[1])
        self.apply(xavier_linear)

    def forward(self, tokens):
        out = self.mlp(tokens)
        return unpatchify(self.linear(self.norm(out)), *self.to_latent) if self.to_latent else out

def xavier_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

# ---- Building and loading a model
def build(name, input_size=32, in_channels=4, num_classes=1000, qk_norm=True):
    """A freshly initialised SiT by its name in SIZES, for latents (in_channels, input_size, input_size)."""
    if name not in SIZES:
        raise UserError(f"--model {name}: no such size; there are {', '.join(SIZES)}")
    depth, width, heads, patch = SIZES[name]
    if input_size % patch:
        raise UserError(f"--model {name}: patches of {patch} do not tile a latent of side {input_size}; "
                        f"take a smaller patch, such as {name.split('/')[0]}/2")
    return SiT(depth, width, heads, patch, input_size, in_channels, num_classes, qk_norm)

def load_checkpoint(path, name=None, weights="ema"):
    """Read a checkpoint of this project, REPA or the authors: (SiT with its .name, on the CPU in eval mode; the file).
    Sizes, classes and q/k norm are read off the tensors' shapes; `name` (--model) is only checked against them.
    `weights` is "ema" or "model". Projectors are ignored; any other missing or unknown tensor is a UserError.
    """
    file = load_file(path)
    state = file.get(weights, file.get("state_dict", file))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no '{weights}' weights; it is not a checkpoint of a SiT")
    for prefix in ("module.", "_orig_mod."):  # left by DistributedDataParallel and by torch.compile
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        side = patch * math.isqrt(state["pos_embed"].shape[1])
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of a SiT ({error} is missing)")
    size = next((key for key, (d, w, _, p) in SIZES.items() if (d, w, p) == (depth, width, patch)), None)
    if size is None or name not in (None, size):
        raise UserError(f"{path}: holds {size or f'an unknown size of width {width}'}, not --model {name}")
    model = build(size, side, channels, classes, qk_norm="blocks.0.attn.q_norm.weight" in state)
    model.name = size
    load_state(model, state, path)
    return model.eval(), file

def load_state(model, state, path):
    """load_state_dict, strict, with an error that names the file and the first few tensors that are wrong."""
    own = model.state_dict()
    wrong = {"missing": own.keys() - state.keys(), "unknown": state.keys() - own.keys(),
             "of another shape": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}}
    if any(wrong.values()):
        lists = [f"{len(keys)} {what}: {', '.join(sorted(keys)[:3])}" for what, keys in wrong.items() if keys]
        raise UserError(f"{path}: tensors do not fit the model; " + "; ".join(lists))
    model.load_state_dict(state)

# ---- What every script shares: files that are whole or absent, errors in one line, processes and devices
class UserError(Exception):
    """A user's mistake. `run` prints it as one line on stderr and exits with status 2."""

class Parser(argparse.ArgumentParser):
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

def run(main):
    """Call main(); a UserError or OSError becomes one line and status 2. Under torchrun rank 0 speaks for all."""
    try:
        main()
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # where rank 0 failed, too, torchrun ends this process before it repeats the line
        print(f"{Path(sys.argv[0]).name}: error: {error}".replace("\n", "\\n"), file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.5)  # gloo's threads let go of their last tensors; one that did so at Python's end would abort

def load_file(path):
    """torch.load of plain tensors, plain Python and argparse.Namespace (REPA keeps its arguments so); never code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import torch as safetensors
            return safetensors.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # no zip, half a zip, unsafe pickle, no safetensors package: each raises another type
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read: damaged, or more than plain tensors, never run ({reason[:80]})")
    if not isinstance(file, dict):
        raise UserError(f"{path}: holds a {type(file).__name__}, not a dictionary of tensors")
    return file

@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, flushed to disk and renamed to `path` at the end: `path` is whole, old or absent."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error}); whatever stood there before is unchanged")

def setup(device="auto"):
    """Join torchrun's processes if there are any: (device, rank, world size). gloo carries CPU tensors, NCCL CUDA's."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA device that torch can use")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: no such device; give cpu, cuda or cuda:N")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what autocast leaves
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, *((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1))

def gather(item):
    """The `item` of every process, in a list by rank."""
    items = [item] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items
