"""SiT: a diffusion transformer with adaLN-Zero blocks that predicts a velocity. Start here.

Sources: DiT (Peebles & Xie 2023, arXiv 2212.09748), SiT (Ma et al. 2024, arXiv 2401.08740), REPA
(Yu et al. 2025, arXiv 2410.06940). The tensors have their names, so their checkpoints load here.
The second half holds what every script shares: settings, errors, files, processes.
"""

import signal
import sys

# Ctrl-C leaves without a traceback, in the imports, too; in torch's it waits: C++ would abort
sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)
unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import math
import os
import re
import time
import traceback
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import field, fields
from operator import ge, gt, le, lt
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

# Depth in blocks, width D, heads (DiT, table 1). Then three blocks, counted from 1: d1, which
# stage 1 aligns; dt, whose tokens teach; ds, which learns them in stage 2. B's three and XL's d1
# are the authors', the others ours, by analogy. A size of your own is one more line.
Size = namedtuple("Size", "depth width heads align_depth teacher_depth student_depth")
SIZES = {
    "N": Size(6, 64, 2, 1, 4, 3),  # a small teacher
    "Ti": Size(8, 128, 4, 2, 5, 4),  # a student for CPUs
    "S": Size(12, 384, 6, 2, 8, 6),
    "B": Size(12, 768, 12, 2, 8, 6),
    "L": Size(24, 1024, 16, 8, 16, 12),
    "XL": Size(28, 1152, 16, 8, 19, 14),
}


def parse_name(name: str) -> tuple[Size, int]:
    """The Size and the patch side that a name such as "SiT-B/2" stands for."""
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if size not in SIZES or patch not in ("1", "2", "4", "8"):
        known = ", ".join(f"SiT-{size}/2" for size in SIZES)
        raise UserError(f"--model {name}: no such size; there are {known}; patches of 1, 2, 4, 8")
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
        with torch.autocast(t.device.type, enabled=False):  # bfloat16 would blur neighbouring t's
            return self.mlp(sinusoids)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D); qk_norm: LayerNorm on queries and keys."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast: norms in float32
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, D))


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
    x = patches.view(-1, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def sincos_2d(width, side):
    """Fixed position table (1, side*side, D): half of the channels for the column, half the row."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns, rows = table.expand(side, side, -1), table[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()


def xavier_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """Velocity network v_theta(x_t, t, y). `build` makes one by name; nothing in it is random."""

    def __init__(self, depth, width, heads, patch, input_size, in_channels, num_classes, qk_norm):
        super().__init__()
        self.depth, self.width, self.heads, self.patch = depth, width, heads, patch
        self.input_size, self.in_channels = input_size, in_channels
        self.num_classes, self.qk_norm = num_classes, qk_norm
        patches = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = TimestepEmbedder(width)
        labels = nn.Embedding(num_classes + 1, width)  # the last one is the null label
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.register_buffer("pos_embed", sincos_2d(width, input_size // patch))
        self.blocks = nn.ModuleList(SiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, in_channels)
        self.grad_checkpoint = False  # recompute each block in the backward pass: saves memory
        self.initialize_weights()

    def initialize_weights(self):
        # As DiT. Linear layers: Xavier-uniform; the patch embedding, too, as the linear map it is
        self.apply(xavier_linear)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.flatten(1))
        nn.init.zeros_(self.x_embedder["proj"].bias)
        # Label and time embeddings: N(0, 0.02)
        mlp = self.t_embedder.mlp
        for embedding in (self.y_embedder["embedding_table"], mlp[0], mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the whole network as zero
        modulations = [block.adaLN_modulation[1] for block in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, taps=()):
        """Velocity (N, C, H, W) and {d: tokens (N, T, D) after block d} for the blocks in `taps`.
        x (N, C, H, W), t (N,) in [0, 1] with 0 = data, y (N,) int64 with `num_classes` as the null
        label. A network that was `cut` has no velocity: None."""
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)  # (N, D)
        tapped = {}
        for depth, block in enumerate(self.blocks, 1):
            recompute = self.grad_checkpoint and self.training
            h = checkpoint(block, h, c, use_reentrant=False) if recompute else block(h, c)
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
        outside = 4 * T * D * self.patch**2 * self.in_channels + 2 * (256 * D + D * D) + 4 * D * D
        return self.depth * block + outside


class Projector(nn.Module):
    """An auxiliary loss's MLP, D -> hidden -> hidden -> out with SiLU, on tokens (N, T, D).
    With `to_latent` = (patch, channels) it answers in latent space, (N, C, H, W): stage 1's P1."""

    def __init__(self, width, out=None, hidden=2048, to_latent=None):
        super().__init__()
        inner = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        self.mlp, self.to_latent = nn.Sequential(*inner, nn.Linear(hidden, out or width)), to_latent
        if to_latent:
            self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.linear = nn.Linear(width, to_latent[0] ** 2 * to_latent[1])
        self.apply(xavier_linear)

    def forward(self, tokens):
        out = self.mlp(tokens)
        return unpatchify(self.linear(self.norm(out)), *self.to_latent) if self.to_latent else out


def build(name, input_size=32, in_channels=4, num_classes=1000, qk_norm=True) -> SiT:
    """A freshly initialised SiT, such as "SiT-B/2", for latents (C, input_size, input_size)."""
    size, patch = parse_name(name)
    if input_size % patch:
        fits = " or ".join(f"/{p}" for p in (1, 2, 4, 8) if input_size % p == 0)
        raise UserError(f"--model {name}: does not tile a side of {input_size}; end it in {fits}")
    return SiT(*size[:3], patch, input_size, in_channels, num_classes, qk_norm)


def checkpoints(folder) -> list[Path]:
    """The run's own ckpt-<step>.pt, newest first; files of any other name are the user's."""
    old = Path(folder) / "ckpt.pt"
    if old.is_file():  # where version 1 kept the newest state
        new = old.with_name(f"ckpt-{load_file(old)['step']:07d}.pt")
        raise UserError(f"{old}: is of an older version; to go on with it: mv {old} {new}")
    files = [f for f in Path(folder).glob("ckpt-*.pt") if re.fullmatch(r"ckpt-\d{7,}\.pt", f.name)]
    return sorted(files, key=lambda file: int(file.stem[5:]), reverse=True)


def load_checkpoint(path, weights="ema") -> tuple[SiT, dict]:
    """(SiT in eval mode on the CPU, with its .name; the file) from our checkpoint, REPA's, theirs.
    `path`: a file, or a run's folder, whose newest it is. Sizes are read off the tensors."""
    path = next(iter(checkpoints(path)), Path(path, "ckpt-*.pt") if Path(path).is_dir() else path)
    file = load_file(path)
    with reading(f"{path}, as a checkpoint of a SiT,"):
        state = file.get(weights, file.get("state_dict", file))
        wrappers = r"^(module\.|_orig_mod\.)*"  # of DistributedDataParallel and torch.compile
        state = {re.sub(wrappers, "", key): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if not key.startswith("projectors")}
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        side = patch * math.isqrt(state["pos_embed"].shape[1])
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        sizes = [key for key, size in SIZES.items() if size[:2] == (depth, width)]
        name = f"SiT-{sizes[0] if sizes else f'{depth}-blocks-of-{width}'}/{patch}"
        name = file["args"]["model"] if "meta" in file else name  # ours says it itself
        model = build(name, side, channels, classes, "blocks.0.attn.q_norm.weight" in state)
        model.load_state_dict(state)
    model.name = name
    return model.eval(), file


# ---- Settings: one dataclass a script, one line a setting, turned into flags here
RULES = {"at_least": ge, "above": gt, "below": lt, "at_most": le}  # of a number


def setting(default, help, **rules):
    """A field of a settings dataclass; `rules`: RULES, choices, positional, or alias."""
    return field(default=default, metadata={"help": help, **rules})


def refuse(message):
    raise UserError(f"{message} (--help lists the flags)")


def parse_settings(Settings: type, doc: str):
    """The command line as an object of the dataclass `Settings`; UserError for a bad value."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse
    for f in fields(Settings):
        kind = getattr(f.type, "__args__", (f.type,))[0]  # `int | None`: an int that may be absent
        shown = "" if f.default in (None, "") else f" (default: {f.default})"
        options = {"default": f.default, "help": f.metadata["help"].replace("%", "%%") + shown}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, choices=f.metadata.get("choices"))
        names = [f"--{n.replace('_', '-')}" for n in (f.name, f.metadata.get("alias", f.name))]
        if "positional" in f.metadata:
            names, options["nargs"] = [f.name], "?" if f.default is None else None
        parser.add_argument(*dict.fromkeys(names), **options)
    settings = Settings(**vars(parser.parse_args()))
    for f in fields(Settings):
        value, flag = getattr(settings, f.name), f"--{f.name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
        for rule in RULES.keys() & f.metadata.keys():
            if value is not None and not RULES[rule](value, f.metadata[rule]):
                limit = f.metadata[rule]
                raise UserError(f"{flag} {value}: must be {rule.replace('_', ' ')} {limit}")
    return settings


# ---- Errors, files and processes


class UserError(Exception):
    """A user's mistake. `run` prints it as one line on stderr and exits with status 2."""


def say(text, file=None):
    """Print a line; on stdout only rank 0's. A closed pipe or a full disk is no reason to stop."""
    try:
        if file or os.environ.get("RANK", "0") == "0":
            print(text, file=file or sys.stdout, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Progress:
    """Say how far long work has come: with its first piece, every 5 seconds, and at its end."""

    def __init__(self, what, total, world=1):
        self.what, self.total, self.world = what, total, world
        self.start, self.shown = time.time(), 0.0

    def __call__(self, done, more=""):
        now = time.time()
        if now > self.shown + 5 or done == self.total:
            self.shown, rate = now, done / (now - self.start + 1e-9)
            far = f"{self.what} {done * self.world}/{self.total * self.world}  {more}"
            say(f"{far}  {rate * self.world:.1f}/s  {(self.total - done) / rate:.0f} s left")


def run(main):
    """Call main(). A UserError or OSError is one line and status 2, Ctrl-C status 130.
    A process that fails alone leaves at once: its peers may wait for it in a collective."""
    status, together = 0, True  # all leave here: a normal return, or an exit they agreed on
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        status, together = 130, False
    except (UserError, OSError) as error:
        status, together = 2, False
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # rank 0 speaks for all: torchrun ends this process before it repeats it
        say(f"{Path(sys.argv[0]).name}: error: {error}".replace("\n", "\\n"), sys.stderr)
    except Exception:
        status, together = 1, False
        traceback.print_exc()
    if dist.is_initialized():
        if not together:
            os._exit(status)
        dist.destroy_process_group()
        time.sleep(0.5)  # in which gloo's threads end; Python's own end would abort them
    sys.exit(status)


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong while a user's file is read becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{path}: cannot be read ({reason})") from error


def load_file(path) -> dict:
    """torch.load of plain tensors and plain Python, checksums verified; never code."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else f"no such file (in {Path.cwd()})"
        raise UserError(f"{path}: {what}")
    with reading(path):
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and (bad := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"damaged: the checksum of {bad} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA keeps its arguments so
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))


@contextlib.contextmanager
def atomic_write(path):
    """A binary file, flushed to disk and renamed to `path` at the end: whole, old or absent."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error}); what was there stays") from error


def lock(folder):
    """Keep other runs out of `folder` while the returned file lives. A dead run holds none."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another run is at work there; choose another --out") from error
    return file


def fingerprint(*items) -> str:
    """sha256 of tensors and plain values: the same content has the same hash."""
    digest = hashlib.sha256()
    for item in items:
        if torch.is_tensor(item):
            item = item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(item if hasattr(item, "nbytes") else repr(item).encode())
    return digest.hexdigest()


def setup(device="auto") -> tuple[torch.device, int, int]:
    """(device, rank, world size), after joining torchrun's processes if there are any."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and torch.version.cuda and Path("/dev/nvidia0").exists():
            raise UserError("--device: torch cannot use the card (old driver?); try --device cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: supported are cpu, cuda and cuda:N")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device != "cpu":
        if int(device[5:]) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA cards")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if torchrun and not dist.is_initialized():  # gloo carries CPU tensors, NCCL CUDA's
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return torch.device(device), *ranks


def gather(item) -> list:
    """The `item` of every process, in a list by rank; also a barrier."""
    items = [item] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def agree(**items):
    """UserError unless every process holds the same `items`: they must train one network."""
    different = {name for other in gather(items) for name in items if other[name] != items[name]}
    if different:
        raise UserError(f"the processes were started with different {', '.join(sorted(different))}")
