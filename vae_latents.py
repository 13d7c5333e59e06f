"""Images -> VAE latents: the KL autoencoder, its weights, three sources of images, and the folder that training reads.

    python vae_latents.py --dataset shapes --out data/shapes                      # drawn, a small VAE trained here
    python vae_latents.py --dataset folder --images DIR --image-size 256 --vae sd-vae-ft-ema.bin --out data/imagenet256

Runs on any number of processes (torchrun); the same command again continues where it was cut off. Training never sees
an image, only this folder: moments.npy (N, 2C, H, W) float16, the posterior's mean then its std; labels.npy (N,) int64;
meta.json; vae.pt if the VAE was trained here; images.npy (N, S, S, 3) uint8 up to 64 px, for fid.py and pictures.
"""
import hashlib
import json
import os
import re
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from models import Parser, UserError, atomic_write, gather, load_file, load_state, run, setup

FORMAT = 1  # of the latent folder

# ---- The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), its tensors named as in diffusers
class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)

class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of (N, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = self.to_out[0](F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.transpose(1, 2).reshape(x.shape)

class Downsample(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as the published weights expect

class Upsample(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))

class Stage(nn.Module):
    """The residual blocks of one resolution, then, but for the last, half or twice the resolution (`scaler`)."""

    def __init__(self, in_channels, out_channels, layers, groups, scaler):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        if scaler:
            conv = (Downsample if scaler == "down" else Upsample)(out_channels)
            self.add_module(f"{scaler}samplers", nn.ModuleList([nn.Sequential(OrderedDict(conv=conv))]))

    def forward(self, x):
        for layer in (layer for layers in self.children() for layer in layers):
            x = layer(x)
        return x

class Coder(nn.Module):
    """The encoder (direction "down") or the decoder ("up"); `channels` of its stages in the order in which they run."""

    def __init__(self, in_channels, out_channels, channels, layers, groups, direction):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        scalers = [direction] * (len(channels) - 1) + [None]
        stages = nn.ModuleList(Stage(a, b, layers, groups, scaler)
                               for a, b, scaler in zip(channels[:1] + channels, channels, scalers))
        self.add_module(f"{direction}_blocks", stages)
        inner = channels[-1] if direction == "down" else channels[0]
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList(ResnetBlock(inner, inner, groups) for _ in range(2)),
                                        "attentions": nn.ModuleList([AttentionBlock(inner, groups)])})
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x):
        (before, after), attention = self.mid_block["resnets"], self.mid_block["attentions"][0]
        middle = before, attention, after
        x = self.conv_in(x)
        for block in (*middle, *self.up_blocks) if hasattr(self, "up_blocks") else (*self.down_blocks, *middle):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

class AutoencoderKL(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] <-> latents (N, C, S/f, S/f), f = 2 ** (len(channels) - 1). Defaults: SD's.
    `scale` brings latents to unit variance: the diffusion's x0 = scale * (mean + std * eps).
    """
    def __init__(self, channels=(128, 256, 512, 512), latent_channels=4, layers=2, scale=0.18215):
        super().__init__()
        groups = min(32, channels[0] // 4)
        self.channels, self.latent_channels, self.layers, self.scale = tuple(channels), latent_channels, layers, scale
        self.encoder = Coder(3, 2 * latent_channels, self.channels, layers, groups, "down")
        self.decoder = Coder(latent_channels, 3, self.channels[::-1], layers + 1, groups, "up")
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images):
        """Images (N, 3, S, S) in [-1, 1] -> (mean, std) of the posterior, each (N, C, S/f, S/f), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, latents):
        """Latents (N, C, h, w), unscaled (x0 / scale) -> images (N, 3, S, S), in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(latents))

def to_uint8(images):
    """Images (N, 3, S, S) in [-1, 1] -> (N, S, S, 3) uint8 on the CPU."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

# CompVis' names, and diffusers' old names of the attention layers, as diffusers writes them today
RENAMED = [(r"\.mid\.block_1", ".mid_block.resnets.0"), (r"\.mid\.block_2", ".mid_block.resnets.1"),
           (r"\.mid\.attn_1", ".mid_block.attentions.0"), (r"\.down\.(\d)\.block", r".down_blocks.\1.resnets"),
           (r"\.down\.(\d)\.downsample", r".down_blocks.\1.downsamplers.0"), (r"\.nin_shortcut", ".conv_shortcut"),
           (r"^(\w+)\.norm_out", r"\1.conv_norm_out"), (r"(attentions\.0\.)norm\.", r"\1group_norm."),
           (r"(attentions\.0\.)(?:query|q)\.", r"\1to_q."), (r"(attentions\.0\.)(?:key|k)\.", r"\1to_k."),
           (r"(attentions\.0\.)(?:value|v)\.", r"\1to_v."), (r"(attentions\.0\.)proj_(?:attn|out)\.", r"\1to_out.0.")]

def load_vae(path):
    """An AutoencoderKL in eval mode from a .bin .ckpt .pt or .safetensors file with diffusers' or CompVis' names.
    The architecture is read off the shapes. A wrapper ("state_dict", "model") and the prefix `first_stage_model.` come
    off, losses and discriminators are ignored; missing or unknown tensors are a UserError that names the first few.
    """
    file = load_file(path)
    state, prefix = file.get("state_dict", file.get("model", file)), "first_stage_model."
    if any(key.startswith(prefix) for key in state):  # a whole Stable Diffusion checkpoint
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))}
    top = max((int(key.split(".")[2]) for key in state if key.startswith("decoder.up.")), default=0)
    flip = lambda m: f".up_blocks.{top - int(m[1])}." + ("resnets" if m[2] == "block" else "upsamplers.0")
    renamed = {}
    for key, value in state.items():
        for pattern, new in [*RENAMED, (r"\.up\.(\d)\.(block|upsample)", flip)]:
            key = re.sub(pattern, new, key)
        renamed[key] = value[:, :, 0, 0] if "attentions" in key and value.dim() == 4 else value  # 1 x 1 convolutions
    try:
        stages = 1 + max(int(key.split(".")[2]) for key in renamed if key.startswith("encoder.down_blocks."))
        channels = [renamed[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(stages)]
        layers = 1 + max(int(key.split(".")[4]) for key in renamed if key.startswith("encoder.down_blocks.0.resnets."))
        latent_channels = renamed["quant_conv.weight"].shape[0] // 2
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a KL autoencoder as Stable Diffusion's ({error} is missing)")
    vae = AutoencoderKL(channels, latent_channels, layers, file.get("scale", 0.18215))
    load_state(vae, renamed, path)
    return vae.eval()

def find_vae(path, meta, data):
    """The VAE to decode with: --vae if given, else the latent folder's own vae.pt, else the file that encoded it."""
    own = Path(data) / "vae.pt"
    path = Path(path or (own if own.is_file() else meta["vae"]["path"]))
    if not path.is_file():
        raise UserError(f"{path}: the VAE of these latents is not there; bring it back (sample.py: or give --vae)")
    return load_vae(path)

def train_small_vae(images, factor, steps, seed, device):
    """Train a small KL autoencoder (downsampling `factor`, 4 channels) on uint8 images (N, S, S, 3) in a minute or two.
    Loss: mean squared error + 1e-4 * KL(posterior || N(0, I)) per latent number. Its scale: 1 / std of the latents.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL({2: (16, 32), 4: (16, 32, 64)}[factor], layers=1).to(device, memory_format=torch.channels_last)
    for module in vae.modules():  # every residual branch starts at zero: nearly linear at first, the net learns fast
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
    vae.quant_conv.bias.data[vae.latent_channels:] = -5.0  # a narrow posterior, not one that drowns the code
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(1, steps + 1):
        batch = torch.from_numpy(images[torch.randint(len(images), (16,)).numpy()]).to(device)
        batch = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, std = vae.encode(batch)
        error = F.mse_loss(vae.decode(mean + std * torch.randn_like(std)), batch)
        kl = 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean()
        optimizer.zero_grad()
        (error + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            left = (time.time() - start) / step * (steps - step)
            print(f"vae {step}/{steps}  mse {error:.4f}  kl {kl:.2f}  {left:.0f} s left", flush=True)
    with torch.no_grad():
        batch = torch.from_numpy(images[:1024]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, std = vae.encode(batch)
        vae.scale = 1 / (mean.var() + (std ** 2).mean()).sqrt().item()
    return vae.eval()

# ---- Sources of images: each has .names (of the classes), .labels (N,) int64 and load(i) -> uint8 (S, S, 3)
def polygon(n, r=1.0, turn=0.0, dx=0.0, dy=0.0):
    a = 2 * np.pi * np.arange(n) / n - np.pi / 2 + turn
    return np.stack([r * np.cos(a) + dx, r * np.sin(a) + dy], axis=1)

def heart():
    a = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return np.stack([np.sin(a) ** 3, -y / 16], axis=1)

# name -> polygons in [-1, 1]^2, y downwards; the second of ring and crescent is cut out of the first
SHAPES = {"circle": [polygon(60)], "square": [[(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]], "triangle": [polygon(3)],
          "star": [np.stack([polygon(5), polygon(5, 0.42, np.pi / 5)], axis=1).reshape(10, 2)],
          "cross": [[(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                     (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]],
          "ring": [polygon(60), polygon(60, 0.55)], "crescent": [polygon(60), polygon(60, 0.8, 0, 0.5, -0.1)],
          "heart": [heart()],
          "bars": [[(x - .2, -.95), (x + .2, -.95), (x + .2, .95), (x - .2, .95)] for x in (-.75, 0, .75)],
          "arrow": [[(1, 0), (.1, -.8), (.1, -.3), (-1, -.3), (-1, .3), (.1, .3), (.1, .8)]]}

class Shapes:
    """Drawings, each a function of its index alone: a figure of random place, size and tilt, in two random colours."""

    def __init__(self, num, size):
        self.size, self.names = size, list(SHAPES)
        self.labels = np.arange(num) % len(SHAPES)

    def load(self, index):
        rng = np.random.default_rng((20260107, index))
        kind, canvas = self.names[index % len(SHAPES)], 4 * self.size  # 4 times too large, then averaged: smooth edges
        dark, bright = rng.integers(0, 90, 3), rng.integers(0, 256, 3)
        bright[rng.integers(3)] = rng.integers(200, 256)  # at least one channel bright, so the figure always stands out
        ink, paper = (bright, dark) if rng.random() < 0.5 else (dark, bright)
        radius = canvas * rng.uniform(0.26, 0.4)
        centre = canvas / 2 + rng.uniform(-1, 1, 2) * (canvas * 0.45 - radius)
        tilt = rng.uniform(-0.3, 0.3)
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        image = Image.new("RGB", (canvas, canvas), tuple(map(int, paper)))
        for number, points in enumerate(SHAPES[kind]):
            colour = paper if number and kind in ("ring", "crescent") else ink
            corners = centre + radius * np.asarray(points, float) @ turn.T
            ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=tuple(map(int, colour)))
        return np.asarray(image.resize((self.size, self.size), Image.BOX))

class Folder:
    """DIR/<class>/**/image, classes in the order of their names (torchvision's ImageFolder), centre-cropped."""

    def __init__(self, root, size):
        from torchvision.datasets.folder import IMG_EXTENSIONS
        if not root or not Path(root).is_dir():
            raise UserError(f"--images {root}: no such folder; it must hold one folder of images for each class")
        self.size, self.files, labels, seen = size, [], [], {}
        self.names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not self.names:
            raise UserError(f"--images {root}: holds no folders; it must hold one folder of images for each class")
        for label, name in enumerate(self.names):
            count = len(self.files)
            for where, folders, files in os.walk(os.path.join(root, name), followlinks=True):
                real = os.path.realpath(where)
                if real in seen:
                    raise UserError(f"{where}: a link back to {seen[real]}; its images would count twice")
                seen[real] = where
                folders.sort()
                self.files += [os.path.join(where, f) for f in sorted(files) if f.lower().endswith(IMG_EXTENSIONS)]
            if len(self.files) == count:
                raise UserError(f"{os.path.join(root, name)}: holds no images, so class {label} would be empty")
            labels += [label] * (len(self.files) - count)
        self.labels = np.array(labels)

    def load(self, index):
        with Image.open(self.files[index]) as image:
            return center_crop(to_rgb(image), self.size)

class CIFAR10:
    """CIFAR-10's training images, downloaded by torchvision into data/."""

    def __init__(self, size):
        from torchvision.datasets import CIFAR10 as Download
        try:
            data = Download("data", train=True, download=True)
        except Exception as error:
            raise UserError(f"--dataset cifar10: no download ({error}); with images at hand take --dataset folder")
        self.size, self.data, self.names, self.labels = size, data.data, data.classes, np.array(data.targets)

    def load(self, index):
        return center_crop(Image.fromarray(self.data[index]), self.size)

def to_rgb(image):
    """Any PIL image as RGB: 16-bit grey scaled, not clipped; palettes resolved; transparency laid on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def center_crop(image, size):
    """The ADM/Dhariwal crop: halve by boxes while twice too large, bicubic to the short side, cut the middle."""
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels has no centre square to speak of")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]

class Decoding(torch.utils.data.Dataset):
    """What DataLoader's workers do: index -> (index, image or None, what was wrong)."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, index):
        try:
            return index, self.source.load(index), None
        except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, DecompressionBombError ...
            return index, None, f"{type(error).__name__}: {error}"

# ---- The latent folder
class LatentFolder:
    """A complete folder of latents: .meta (dict), .labels (N,) int64 tensor, .moments (N, 2C, H, W) float16 memory map.
    Raises UserError where the folder is absent, unfinished, of another version or damaged.
    """
    def __init__(self, path):
        self.path = path = Path(path)
        if not (path / "meta.json").is_file():
            if (path / "plan.json").is_file():
                raise UserError(f"{path}: its encoding was cut off; run the same vae_latents.py command again")
            raise UserError(f"{path}: no latents there; make them: python vae_latents.py --dataset shapes --out {path}")
        try:
            self.meta = json.loads((path / "meta.json").read_text())
            if self.meta["format"] != FORMAT:
                raise UserError(f"{path}/meta.json: format {self.meta['format']}, not {FORMAT}; encode it again")
            self.labels = torch.from_numpy(np.load(path / "labels.npy"))
            self.moments = np.load(path / "moments.npy", mmap_mode="r")
            N, shape = self.meta["num_images"], (2 * self.meta["channels"], self.meta["height"], self.meta["width"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); encode it again")
        if self.labels.shape != (N,):
            raise UserError(f"{path}/labels.npy: {len(self.labels)} labels for {N} images; encode it again")
        if self.moments.shape != (N, *shape) or self.moments.dtype != np.float16:
            raise UserError(f"{path}/moments.npy: {self.moments.dtype} {self.moments.shape}, not float16 {(N, *shape)}")
        low, high, classes = self.labels.min(), self.labels.max(), len(self.meta["classes"])
        if low < 0 or high >= classes:
            raise UserError(f"{path}/labels.npy: labels from {low} to {high}, but there are {classes} classes")
        for row in range(0, N, max(1, N // 4096)):  # every row of a small folder, 4096 of a large one
            if not np.isfinite(self.moments[row]).all():
                raise UserError(f"{path}/moments.npy: image {row} holds NaN or infinity; encode it again")

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        """Source images (n, S, S, 3) uint8, where the folder keeps them (up to 64 px); else None."""
        file = self.path / "images.npy"
        return np.load(file, mmap_mode="r")[indices] if file.is_file() else None

def encode_folder(source, vae, plan, args, device, rank, world):
    """Encode every image of `source` into args.out, the chunks of --batch-size shared by all processes.
    status.part.npy holds a byte an image (0 to do, 1 done, 2 unreadable), set when its moments are on disk: a killed
    run continues. Chunks are the same whoever encodes them, so the result is, too. meta.json, last, makes it a folder.
    """
    out, N, batch = Path(args.out), len(source.labels), args.batch_size
    side = args.image_size // 2 ** (len(vae.channels) - 1)
    shape = (2 * vae.latent_channels, side, side)
    create = lambda file, *args: np.lib.format.open_memmap(out / file, "w+", *args)
    if rank == 0 and (out / "moments.npy").exists():  # killed while the last lines below were at work
        os.replace(out / "moments.npy", out / "moments.part.npy")
    if rank == 0 and not (out / "status.part.npy").exists():  # status last: where it stands, moments do
        create("moments.part.npy", np.float16, (N, *shape)).flush()
        create("status.tmp.npy", np.uint8, (N,)).flush()
        os.replace(out / "status.tmp.npy", out / "status.part.npy")
    if world > 1:
        dist.barrier()
    moments, status = (np.load(out / f"{name}.part.npy", mmap_mode="r+") for name in ("moments", "status"))
    todo = [chunk for number, chunk in enumerate(np.split(np.arange(N), range(batch, N, batch)))
            if number % world == rank and (status[chunk] != 1).any()]
    workers = args.workers if args.workers is not None else min(8, os.cpu_count() // world) * (device.type == "cuda")
    loader = torch.utils.data.DataLoader(Decoding(source), batch_sampler=todo, num_workers=workers, collate_fn=list)
    bad, done, total, start, shown = [], 0, sum(map(len, todo)), time.time(), 0.0
    vae = vae.to(device, memory_format=torch.channels_last)
    blank = np.zeros((args.image_size, args.image_size, 3), np.uint8)
    for items in loader:
        rows = np.array([index for index, _, _ in items])
        images = torch.from_numpy(np.stack([blank if image is None else image for _, image, _ in items])).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = torch.cat(vae.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1), dim=1).half().cpu()
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()
        wrong = [(i, why or "its latent is not finite") for (i, _, why), fine in zip(items, finite) if why or not fine]
        bad += wrong
        moments[rows] = latents.numpy()
        moments.flush()
        status[rows] = 1 + np.isin(rows, [index for index, _ in wrong])
        done += len(items)
        if rank == 0 and (time.time() - shown > 5 or done == total):
            shown, rate = time.time(), done / (time.time() - start)
            left = (total - done) / rate
            print(f"encoded {done * world}/{total * world}  {rate * world:.0f} images/s  {left:.0f} s left", flush=True)
    status.flush()
    bad = sorted(sum(gather(bad), []))
    files = getattr(source, "files", range(N))
    what = f"{len(bad)} of {N} images cannot be read: " + "; ".join(f"{files[i]} ({why})" for i, why in bad[:5])
    if bad and not args.skip_bad:
        raise UserError(f"{what}. Mend or remove them, or add --skip-bad, and run the same command again")
    if rank == 0:
        keep = np.flatnonzero(status == 1)
        if bad:  # close the gaps
            print(f"left out {what}", flush=True)
            whole = create("moments.tmp.npy", np.float16, (len(keep), *shape))
            for rows in np.array_split(np.arange(len(keep)), 1 + len(keep) // 4096):
                whole[rows] = moments[keep[rows]]
            whole.flush()
        if args.image_size <= 64:
            with atomic_write(out / "images.npy") as file:
                np.save(file, np.stack([source.load(i) for i in keep]))
        with atomic_write(out / "labels.npy") as file:
            np.save(file, source.labels[keep].astype(np.int64))
        os.replace(out / f"moments.{'tmp' if bad else 'part'}.npy", out / "moments.npy")
        with atomic_write(out / "meta.json") as file:
            size = {"num_images": len(keep), "channels": vae.latent_channels, "height": side, "width": side}
            file.write(json.dumps({**plan, **size, "scale": vae.scale}, indent=1).encode())
        for leftover in [*out.glob("*.part.npy"), out / "plan.json"]:
            leftover.unlink(missing_ok=True)
        print(f"{out}: {len(keep)} images, {len(source.names)} classes, latents of side {side}")

def main():
    p = Parser(__doc__)
    p.add_argument("--dataset", choices=["shapes", "folder", "cifar10"], default="folder", help="default: folder")
    p.add_argument("--images", metavar="DIR", help="with --dataset folder: DIR/<class>/*.jpg")
    p.add_argument("--out", default="data/imagenet256", metavar="DIR", help="folder to make (default: %(default)s)")
    p.add_argument("--image-size", type=int, help="side in pixels after the crop (default: 256 for folder, else 32)")
    p.add_argument("--num", "--num-images", type=int, default=10000, help="how many shapes (default: %(default)s)")
    p.add_argument("--vae", metavar="FILE", help="Stable Diffusion's VAE; without it a small one is trained here")
    p.add_argument("--vae-factor", type=int, choices=[2, 4], default=4, help="small VAE's downsampling (default: 4)")
    p.add_argument("--vae-steps", type=int, default=1000, help="small VAE's steps of 16 images (default: 1000)")
    p.add_argument("--batch-size", type=int, default=64, help="images encoded at once (default: %(default)s)")
    p.add_argument("--workers", type=int, help="decoding processes per process (default: 8 or fewer on CUDA, else 0)")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable images out instead of stopping")
    p.add_argument("--seed", type=int, default=0, help="of the small VAE's training (default: 0)")
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = p.parse_args()
    args.image_size = args.image_size or (256 if args.dataset == "folder" else 32)
    if args.image_size % 8 or args.image_size <= 0 or args.batch_size < 1 or args.num < 1 or args.vae_steps < 1:
        raise UserError("--image-size must be a multiple of 8, and --batch-size, --num, --vae-steps at least 1")
    device, rank, world = setup(args.device)
    source = (Shapes(args.num, args.image_size) if args.dataset == "shapes" else CIFAR10(args.image_size)
              if args.dataset == "cifar10" else Folder(args.images, args.image_size))
    listing = hashlib.sha256("\0".join(map(os.fsdecode, getattr(source, "files", []))).encode(errors="replace"))
    plan = {"format": FORMAT, "dataset": args.dataset, "source": os.path.abspath(args.images) if args.images else None,
            "listing": listing.hexdigest(), "found": len(source.labels), "image_size": args.image_size,
            "classes": source.names, "chunk": args.batch_size}
    out, given = Path(args.out), args.vae and Path(args.vae)
    vae = load_vae(given) if given else None
    plan["vae"] = {"path": "vae.pt", "factor": args.vae_factor, "steps": args.vae_steps, "seed": args.seed}
    if given:
        plan["vae"] = {"path": os.path.abspath(given), "sha256": hashlib.sha256(given.read_bytes()).hexdigest()}
    for name in ("meta.json", "plan.json"):  # finished, or cut off: either way it must be the same work
        if (out / name).is_file():
            old = json.loads((out / name).read_text())
            changed = [key for key in plan if key != "vae" and old.get(key) != plan[key]]
            changed += ["vae"] * any(old["vae"].get(key) != value for key, value in plan["vae"].items())
            if changed:
                raise UserError(f"{out}: holds latents made with another {', '.join(changed)}; choose another --out")
            if name == "meta.json":
                return print(f"{out}: is complete already, nothing to do") if rank == 0 else None
    if rank == 0:
        with atomic_write(out / "plan.json") as file:
            file.write(json.dumps(plan).encode())
        if not given and not (out / "vae.pt").is_file():
            some = np.random.default_rng(args.seed).permutation(len(source.labels))[:10000]
            images = np.stack([item[1] for item in map(Decoding(source).__getitem__, some) if item[1] is not None])
            vae = train_small_vae(images, args.vae_factor, args.vae_steps, args.seed, device)
            with atomic_write(out / "vae.pt") as file:
                torch.save({"model": {k: v.cpu() for k, v in vae.state_dict().items()}, "scale": vae.scale}, file)
    if world > 1:
        dist.barrier()
    if not given:
        vae = load_vae(out / "vae.pt")
        plan["vae"]["sha256"] = hashlib.sha256((out / "vae.pt").read_bytes()).hexdigest()
    encode_folder(source, vae, plan, args, device, rank, world)

if __name__ == "__main__":
    run(main)
