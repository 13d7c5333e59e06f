"""SiT: a diffusion transformer with adaLN-Zero blocks that predicts a velocity. Start here.

After DiT (Peebles & Xie 2023, arXiv 2212.09748) and SiT (Ma et al. 2024, arXiv 2401.08740);
names of tensors as in REPA (Yu et al. 2025, arXiv 2410.06940). At first read to "What every
script shares".
"""

import argparse
import contextlib
import fcntl
import inspect
import math
import os
import re
import sys
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

FORMAT = 2  # of checkpoints and of teacher.pt

# Depth in blocks, width D, heads (DiT, table 1). Then three blocks, counted from 1: d1, which
# stage 1 aligns; dt, whose tokens teach; ds, which learns them in stage 2. B's three and XL's
# d1 are the authors', the others ours, by analogy. A size of your own is one more line.
Size = namedtuple("Size", "depth width heads align_depth teacher_depth student_depth")
SIZES = {
    "P": Size(4, 48, 2, 1, 3, 2),  # P, N: small teachers
    "N": Size(6, 64, 2, 1, 4, 3),
    "Ti": Size(8, 128, 4, 2, 5, 4),  # Ti, W: students for CPUs
    "W": Size(12, 256, 8, 2, 8, 6),
    "S": Size(12, 384, 6, 2, 8, 6),
    "B": Size(12, 768, 12, 2, 8, 6),
    "L": Size(24, 1024, 16, 8, 16, 12),
    "XL": Size(28, 1152, 16, 8, 19, 14),
}


def parse_name(name: str) -> tuple[Size, int]:
    """The Size and the patch side that a name such as "SiT-B/2" stands for."""
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if size not in SIZES or patch not in ("1", "2", "4", "8"):
        raise UserError(f"--model {name}: unlike SiT-XL/2: {[*SIZES]}, then 1, 2, 4, 8")
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
        qkv = self.qkv(x).view(N, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # norms are in float32
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
    x = patches.view(-1, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def sincos_2d(width, side):
    """Fixed position table (1, side*side, D): half of D for the column, half for the row."""
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
    """Velocity network v_theta(x_t, t, y). `build_for` makes one by name."""

    def __init__(self, depth, width, heads, patch, input_size, in_channels, num_classes, qk_norm):
        super().__init__()
        self.depth, self.width, self.patch = depth, width, patch
        self.input_size, self.in_channels = input_size, in_channels
        self.num_classes = num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, patch, patch)})
        self.t_embedder = TimestepEmbedder(width)
        labels = nn.Embedding(num_classes + 1, width)  # the last one is the null label
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
        for embedding in (self.y_embedder["embedding_table"], mlp[0], mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the whole network as zero
        modulations = [block.adaLN_modulation[1] for block in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, taps=()):
        """Velocity (N, C, H, W), or None if it was `cut`, and {d: tokens (N, T, D) after block
        d} for d in `taps`. x (N, C, H, W), t (N,) in [0, 1], 0 = data, y (N,) int64."""
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
        return self.depth * block + patches + 2 * (256 * D + D * D) + 4 * D * D


class Projector(nn.Module):
    """An auxiliary loss's MLP, D -> hidden -> hidden -> out, on tokens (N, T, D). With
    `to_latent` = (patch, channels) it answers in latent space, (N, C, H, W): stage 1's P1."""

    def __init__(self, width, out=None, hidden=2048, to_latent=None):
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        layers.append(nn.Linear(hidden, out or width))
        if to_latent:
            patch, channels = to_latent
            layers.append(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6))
            layers.append(nn.Linear(width, patch**2 * channels))
        self.mlp, self.to_latent = nn.Sequential(*layers), to_latent
        self.apply(xavier_linear)

    def forward(self, tokens):
        out = self.mlp(tokens)
        return unpatchify(out, *self.to_latent) if self.to_latent else out


def build_for(args: dict, meta: dict) -> SiT:
    """The network that a run with these settings trains on latents with this meta.json, freshly
    initialised. args: "model", such as "SiT-B/2", and "qk_norm"."""
    size, patch = parse_name(args["model"])
    side, channels, classes = meta["height"], meta["channels"], len(meta["classes"])
    if side % patch:
        raise UserError(f"--model {args['model']}: its patch must divide the latents' {side}")
    return SiT(*size[:3], patch, side, channels, classes, args["qk_norm"])


def checkpoints(folder) -> list[Path]:
    """The run's own ckpt-<step>.pt, newest first; files of any other name are the user's."""
    files = Path(folder).glob("ckpt-???????*.pt")  # seven digits or more
    own = [file for file in files if file.stem[5:].isdecimal()]
    return sorted(own, key=lambda file: int(file.stem[5:]), reverse=True)


def load_checkpoint(path, weights="ema", null_label_for="") -> tuple[SiT, dict]:
    """(The SiT in eval mode on the CPU, the checkpoint) of a file, or of a run's newest one.
    UserError if the average, or the null label `null_label_for` some flag, is not trained."""
    if Path(path).is_dir():
        path = next(iter(checkpoints(path)), Path(path) / "ckpt-*.pt")
    with reading(path, CONVERT.format(path)):
        saved = load_file(path, FORMAT)
    with reading(path, f"holds no {weights} network; try --weights model or ema"):
        model, args = build_for(saved["args"], saved["meta"]), saved["args"]
        model.load_state_dict(saved[weights])
        untrained = 0.0 if args["ema_ramp"] else args["ema"] ** saved["step"]
    if weights == "ema" and untrained > 0.1:
        raise UserError(f"{path}: its average is {untrained:.0%} untrained: --weights model")
    if null_label_for and args["label_drop"] == 0:
        raise UserError(f"{path}: --label-drop 0: {null_label_for} needs a trained null label")
    return model.eval(), saved


# ---- What every script shares. Settings: a dataclass, a field a flag, the comment its help

RULES = {"at_least": ge, "above": gt, "below": lt, "at_most": le}  # for a number


def setting(default, help=None, **rules):
    """A setting with `rules`: those above, choices, positional."""
    return field(default=default, metadata={"help": help, **rules})


def parse_settings(Settings: type, doc: str):
    """The command line as an object of the dataclass `Settings`; UserError for a bad value."""
    source = "".join(map(inspect.getsource, reversed(Settings.__mro__[:-1])))
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.MULTILINE))
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False)
    parser.error = refuse
    for f in fields(Settings):
        help = f.metadata.get("help") or comments.get(f.name, "")
        help += "" if f.default in (None, "") else f" (default: {f.default})"
        kind = getattr(f.type, "__args__", (f.type,))[0]  # `int | None` is an int
        options = {"type": kind, "choices": f.metadata.get("choices")}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        name = flag(f.name)
        if "positional" in f.metadata:
            name, options["nargs"] = f.name, "?" if f.default is None else None
        parser.add_argument(name, default=f.default, help=help.replace("%", "%%"), **options)
    settings = Settings(**vars(parser.parse_args()))
    for f in fields(Settings):
        value = getattr(settings, f.name)
        rules = {"at_least": 1, **f.metadata} if type(value) is int else f.metadata  # counts
        if value == "" != f.default:
            refuse(f"{flag(f.name)}: must not be empty")
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"{flag(f.name)} {value}: must be a finite number")
        for rule, limit in rules.items():
            if rule in RULES and value is not None and not RULES[rule](value, limit):
                refuse(f"{flag(f.name)} {value}: must be {rule.replace('_', ' ')} {limit}")
    return settings


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse(message):
    raise UserError(f"{message} (--help lists the flags)")


# ---- Errors and files


class UserError(Exception):
    """A user's mistake. `run` prints it as one line on stderr and exits with status 2."""


def run(main):
    """Call main(). A UserError or OSError is one line and status 2, Ctrl-C status 130."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # closed, as daemons do it
        stream.reconfigure(errors="backslashreplace")  # what the terminal cannot show
        setattr(sys, name, stream)
    status = 0
    try:
        main()
    except SystemExit as stop:  # of --help, or an end that all processes agreed on
        status = stop.code
    except KeyboardInterrupt:
        status = 130
    except (UserError, OSError) as error:
        status = 2
        if not IS_FIRST:
            time.sleep(3)  # the first speaks for all, and torchrun then ends this one
        say(f"{Path(sys.argv[0]).name}: error: {error}", sys.stderr, rank_0_alone=False)
    except Exception:
        status = 1
        traceback.print_exc()
    if dist.is_initialized():
        if status in (1, 2, 130):
            os._exit(status)  # at once: its peers may wait for it in a collective
        dist.destroy_process_group()
        time.sleep(0.5)  # in which gloo's threads end; Python's own end would abort them
    sys.exit(status)


def say(text, stream=None, rank_0_alone=True):
    """Print one line, in which nothing of a file's name steers the terminal."""
    if rank_0_alone and not IS_FIRST:
        return
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:  # a closed pipe or a full disk is no reason to stop: the stream is given up
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text):
    say(f"warning: {text}", sys.stderr)


@contextlib.contextmanager
def reading(path, problem):
    """Whatever goes wrong while a user's file is read becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "Weights only" in reason or "allow_pickle" in reason:  # it advises to load unsafely
            reason = " ".join(["no plain data", *re.findall(r"GLOBAL ([^ ]+)", str(error))])
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            reason += f"; begins with {open(path, 'rb').read(30)!r}"
        if "b'version https://git-lfs" in reason:
            problem = "a Git LFS pointer, the file itself was not fetched"
        raise UserError(f"{path}: {problem} ({reason})") from error


CONVERT = "no train_stage*.py checkpoint; else python experiments/convert_sit.py {} OUT --vae FILE"


def load_file(path, format=None) -> dict:
    """torch.load of plain tensors and plain Python, checksums verified; never code.
    The tensors stay mapped to the file: copy what shall outlive it.
    Called in a `reading`: a file that is not whole, or not of this `format`, has many errors."""
    zipped = zipfile.is_zipfile(path)
    if zipped and (bad := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"the checksum of {bad} is wrong")
    saved = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))
    if format and saved.get("format") != format:
        raise ValueError(f"its format is {saved.get('format')}, not {format}")
    return saved


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
        raise UserError(f"{path}: could not be written; the old one stays ({error})") from error


def lock(folder):
    """Keep other runs out of `folder` while the returned file lives. A dead run holds none;
    of several processes the first holds it."""
    if not IS_FIRST:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{folder}: another run is at work there; another --out?") from error
    except OSError as error:
        warn(f"{folder}: cannot be locked ({error}); start no second run")
    return file


# ---- Processes

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
IS_FIRST = os.environ.get("RANK") == "0" or not all(name in os.environ for name in TORCHRUN)


def setup(device="auto") -> tuple[torch.device, int, int]:
    """(device, rank, world size), after joining torchrun's processes if there are any."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    usable = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in usable:
        raise UserError(f"--device {device}: usable are {usable}")
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do by default
    found = [f"{name}={os.environ[name]}" for name in TORCHRUN if name in os.environ]
    if len(found) < len(TORCHRUN):
        if found:
            warn(f"{' '.join(found)} without the rest of {TORCHRUN}: one process alone")
        return torch.device(device), 0, 1
    with reading(" ".join(found), "cannot join; unset these, unless torchrun set them"):
        if not dist.is_initialized():  # gloo carries CPU tensors, NCCL CUDA's
            dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def gather(item) -> list:
    """The `item` of every process, in a list by rank; also a barrier."""
    items = [item] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def agree(**items):
    """UserError unless every process holds the same `items`: they must train one network."""
    for other in gather(items):
        different = [name for name in items if other[name] != items[name]]
        if different:
            raise UserError(f"the processes have different {', '.join(different)}")
