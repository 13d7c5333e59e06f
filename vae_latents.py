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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from models import Parser, UserError, atomic_write, load_file, load_state, run, setup

FORMAT = 1  # of the latent folder
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "bars", "arrow")


# ---------------------------------------------------------------------------------------------------------------------
# The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), with diffusers' names in the state dict

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


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as the published weights expect


class Upsample(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The residual blocks of one resolution, then, but for the last, half or twice the resolution (`scaler`)."""

    def __init__(self, in_channels, out_channels, layers, groups, scaler):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        if scaler == "down":
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": Downsample(out_channels, out_channels, 3, stride=2)})])
        if scaler == "up":
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": Upsample(out_channels, out_channels, 3, padding=1)})])

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for scaler in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = scaler["conv"](x)
        return x


class Encoder(nn.Module):
    def __init__(self, channels, latent_channels, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        scalers = ["down"] * (len(channels) - 1) + [None]
        self.down_blocks = nn.ModuleList(Stage(a, b, layers, groups, scaler)
                                         for a, b, scaler in zip(channels[:1] + channels, channels, scalers))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, latent_channels, layers, groups):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        scalers = ["up"] * (len(channels) - 1) + [None]
        self.up_blocks = nn.ModuleList(Stage(a, b, layers + 1, groups, scaler)
                                       for a, b, scaler in zip(channels[:1] + channels, channels, scalers))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] <-> latents (N, C, S/f, S/f), f = 2 ** (len(channels) - 1). Defaults: Stable Diffusion.

    `scale` brings latents to unit variance: the diffusion's x0 = scale * (mean + std * eps).
    """

    def __init__(self, channels=(128, 256, 512, 512), latent_channels=4, layers=2, scale=0.18215):
        super().__init__()
        groups = min(32, channels[0] // 4)
        self.channels, self.latent_channels, self.layers, self.scale = tuple(channels), latent_channels, layers, scale
        self.encoder = Encoder(self.channels, latent_channels, layers, groups)
        self.decoder = Decoder(self.channels, latent_channels, layers, groups)
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
COMPVIS = [(r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"), (r"\.mid\.attn_1", ".mid_block.attentions.0"),
           (r"\.down\.(\d)\.block", r".down_blocks.\1.resnets"), (r"\.down\.(\d)\.downsample", r".down_blocks.\1.downsamplers.0"),
           (r"\.nin_shortcut", ".conv_shortcut"), (r"^(\w+)\.norm_out", r"\1.conv_norm_out")]
ATTENTION = [(r"(attentions\.0\.)norm\.", r"\1group_norm."), (r"(attentions\.0\.)(?:query|q)\.", r"\1to_q."),
             (r"(attentions\.0\.)(?:key|k)\.", r"\1to_k."), (r"(attentions\.0\.)(?:value|v)\.", r"\1to_v."),
             (r"(attentions\.0\.)(?:proj_attn|proj_out)\.", r"\1to_out.0.")]


def load_vae(path):
    """An AutoencoderKL in eval mode from a file with diffusers' (new or old) or CompVis' names, .bin .ckpt .pt .safetensors.

    The architecture is read off the tensors' shapes. A wrapper ("state_dict", "model") and the prefix `first_stage_model.`
    are taken off, losses and discriminators ignored; missing or unknown tensors are a UserError that names the first few.
    """
    file = load_file(path)
    state = file.get("state_dict", file.get("model", file))
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in state):  # a whole Stable Diffusion checkpoint
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))}
    ups = {int(key.split(".")[2]) for key in state if key.startswith("decoder.up.")}
    flip = lambda m: f".up_blocks.{max(ups) - int(m[1])}." + ("resnets" if m[2] == "block" else "upsamplers.0")
    renamed = {}
    for key, value in state.items():
        for pattern, new in COMPVIS + [(r"\.up\.(\d)\.(block|upsample)", flip)] + ATTENTION:
            key = re.sub(pattern, new, key)
        if "attentions" in key and value.dim() == 4:
            value = value[:, :, 0, 0]  # CompVis' 1 x 1 convolutions are linear layers
        renamed[key] = value
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
    """The VAE to decode with: --vae if given, else the latent folder's own vae.pt, else the file that encoded the folder."""
    own = Path(data) / "vae.pt"
    path = Path(path or (own if own.is_file() else meta["vae"]["path"]))
    if not path.is_file():
        raise UserError(f"{path}: the VAE that made these latents is not there; name its file with --vae")
    return load_vae(path)


def train_small_vae(images, factor, steps, seed, device):
    """Train a small KL autoencoder (downsampling `factor`, 4 channels) on uint8 images (N, S, S, 3), in a minute or two.

    Loss: mean squared error + 1e-4 * KL(posterior || N(0, I)) per latent number. Sets `scale` to 1 / std of the latents.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL({2: (16, 32), 4: (16, 32, 64)}[factor], layers=1).to(device, memory_format=torch.channels_last)
    for module in vae.modules():  # every residual branch starts at zero: at first the net is nearly linear, and learns fast
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
    vae.quant_conv.bias.data[vae.latent_channels:] = -5.0  # a narrow posterior, not one that drowns the code
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(1, steps + 1):
        batch = torch.from_numpy(images[torch.randint(len(images), (16,)).numpy()]).to(device)
        batch = batch.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        mean, std = vae.encode(batch)
        error = F.mse_loss(vae.decode(mean + std * torch.randn_like(std)), batch)
        kl = 0.5 * (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean()
        optimizer.zero_grad()
        (error + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"vae {step}/{steps}  mse {error:.4f}  kl {kl:.2f}  {(time.time() - start) / step * (steps - step):.0f} s left",
                  flush=True)
    with torch.no_grad():
        batch = torch.from_numpy(images[:1024]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, std = vae.encode(batch)
        vae.scale = 1 / (mean.var() + (std ** 2).mean()).sqrt().item()
    return vae.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Sources of images: each has .names (of the classes), .labels (N,) int64 and load(i) -> uint8 (S, S, 3)

class Shapes:
    """Class-conditional drawings, a function of the index alone: a figure of random place, size, tilt and two colours."""

    def __init__(self, num, size):
        self.size, self.names = size, list(SHAPES)
        self.labels = np.arange(num) % len(SHAPES)

    def load(self, index):
        rng = np.random.default_rng((20260107, index))
        kind, canvas = SHAPES[index % len(SHAPES)], 4 * self.size  # drawn 4 times too large, then averaged: smooth edges
        dark, bright = rng.integers(0, 90, 3), rng.integers(0, 256, 3)
        bright[rng.integers(3)] = rng.integers(200, 256)  # at least one channel bright, so the figure always stands out
        ink, paper = (bright, dark) if rng.random() < 0.5 else (dark, bright)
        radius = canvas * rng.uniform(0.26, 0.4)
        centre = canvas / 2 + rng.uniform(-1, 1, 2) * (canvas * 0.45 - radius)
        tilt = rng.uniform(-0.3, 0.3)
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        place = lambda points: [tuple(centre + radius * turn @ np.asarray(p, float)) for p in points]
        ring = lambda n, r=1.0, a=-np.pi / 2: [(r * np.cos(a + 2 * np.pi * k / n), r * np.sin(a + 2 * np.pi * k / n)) for k in range(n)]
        image = Image.new("RGB", (canvas, canvas), tuple(map(int, paper)))
        fill = lambda points, colour=ink: ImageDraw.Draw(image).polygon(place(points), fill=tuple(map(int, colour)))
        if kind in ("circle", "ring", "crescent"):
            fill(ring(60))
            if kind == "ring":
                fill(ring(60, 0.55), paper)
            if kind == "crescent":
                fill([(x + 0.5, y - 0.1) for x, y in ring(60, 0.8)], paper)
        elif kind == "star":
            fill([p for pair in zip(ring(5), ring(5, 0.42, -np.pi / 2 + np.pi / 5)) for p in pair])
        elif kind == "heart":
            a = np.linspace(0, 2 * np.pi, 60)
            fill(zip(np.sin(a) ** 3, -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16))
        elif kind == "bars":
            for x in (-0.75, 0, 0.75):
                fill([(x - 0.2, -0.95), (x + 0.2, -0.95), (x + 0.2, 0.95), (x - 0.2, 0.95)])
        else:
            fill({"square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], "triangle": ring(3),
                  "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                            (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
                  "arrow": [(1, 0), (0.1, -0.8), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.8)]}[kind])
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
            raise UserError(f"--dataset cifar10: no download ({error}); with images at hand: --dataset folder --images DIR --image-size 32")
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
    """The ADM/Dhariwal crop: halve with a box filter while twice too large, bicubic to the short side, cut the middle."""
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
        except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, DecompressionBombError, zlib.error ...
            return index, None, f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------------------------------
# The latent folder

class LatentFolder:
    """A complete folder of latents: .meta (dict), .labels (N,) int64 tensor, .moments (N, 2C, H, W) float16 memory map.

    Raises UserError where the folder is absent, unfinished, of another version or damaged.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        if not (path / "meta.json").is_file():
            if (path / "plan.json").is_file():
                raise UserError(f"{path}: its encoding was cut off; run the same vae_latents.py command again to finish it")
            raise UserError(f"{path}: no latents there; make them: python vae_latents.py --dataset shapes --out {path} (or --images DIR)")
        try:
            self.meta = json.loads((path / "meta.json").read_text())
            if self.meta["format"] != FORMAT:
                raise UserError(f"{path}/meta.json: format {self.meta['format']}, this program reads {FORMAT}; encode it again")
            self.labels = torch.from_numpy(np.load(path / "labels.npy"))
            self.moments = np.load(path / "moments.npy", mmap_mode="r")
            N, shape = self.meta["num_images"], (2 * self.meta["channels"], self.meta["height"], self.meta["width"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); encode it again")
        if self.labels.shape != (N,):
            raise UserError(f"{path}/labels.npy: {len(self.labels)} labels for {N} images; encode it again")
        if self.moments.shape != (N, *shape) or self.moments.dtype != np.float16:
            raise UserError(f"{path}/moments.npy: is {self.moments.dtype} {self.moments.shape}, not float16 {(N, *shape)}; encode it again")
        low, high, classes = self.labels.min(), self.labels.max(), len(self.meta["classes"])
        if low < 0 or high >= classes:
            raise UserError(f"{path}/labels.npy: labels from {low} to {high}, but there are {classes} classes; encode it again")
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

    status.npy holds one byte an image (0 to do, 1 done, 2 unreadable), set after its moments are on disk: a killed run
    continues. Chunks are the same whoever encodes them, so the result is, too. meta.json appears last, and only when
    all is there.
    """
    out, N, size, batch = Path(args.out), len(source.labels), args.image_size, args.batch_size
    side = size // 2 ** (len(vae.channels) - 1)
    arrays = {"moments": ((N, 2 * vae.latent_channels, side, side), np.float16),
              **({"images": ((N, size, size, 3), np.uint8)} if size <= 64 else {}), "status": ((N,), np.uint8)}
    create = lambda name, shape: np.lib.format.open_memmap(out / f"{name}.tmp.npy", mode="w+", dtype=arrays[name][1], shape=shape)
    for name in arrays if rank == 0 else ():  # status last: where it exists, the others do
        if (out / f"{name}.npy").exists() and not (out / f"{name}.part.npy").exists():
            os.replace(out / f"{name}.npy", out / f"{name}.part.npy")  # killed while the last lines below were at work
        if not (out / f"{name}.part.npy").exists():
            create(name, arrays[name][0]).flush()
            os.replace(out / f"{name}.tmp.npy", out / f"{name}.part.npy")
    if world > 1:
        dist.barrier()
    maps = {name: np.load(out / f"{name}.part.npy", mmap_mode="r+") for name in arrays}
    todo = [chunk for number, chunk in enumerate(np.split(np.arange(N), range(batch, N, batch)))
            if number % world == rank and (maps["status"][chunk] != 1).any()]
    workers = args.workers if args.workers is not None else (min(8, os.cpu_count() // world) if device.type == "cuda" else 0)
    loader = torch.utils.data.DataLoader(Decoding(source), batch_sampler=todo, num_workers=workers, collate_fn=list)
    bad, done, total, start, shown = [], 0, sum(map(len, todo)), time.time(), 0.0
    vae = vae.to(device, memory_format=torch.channels_last)
    for items in loader:
        rows = np.array([index for index, _, _ in items])
        images = np.stack([np.zeros((size, size, 3), np.uint8) if image is None else image for _, image, _ in items])
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            moments = torch.cat(vae.encode(pixels.contiguous(memory_format=torch.channels_last)), dim=1)
        moments = moments.half().cpu()
        finite = moments.isfinite().flatten(1).all(dim=1).tolist()
        wrong = [(index, why or "its latent is not finite") for (index, _, why), fine in zip(items, finite) if why or not fine]
        bad += wrong
        maps["moments"][rows] = moments.numpy()
        if "images" in maps:
            maps["images"][rows] = images
        for array in maps.values():
            array.flush()
        maps["status"][rows] = 1 + np.isin(rows, [index for index, _ in wrong])
        done += len(items)
        if rank == 0 and (time.time() - shown > 5 or done == total):
            shown, rate = time.time(), done / (time.time() - start)
            print(f"encoded {done * world}/{total * world}  {rate * world:.0f} images/s  {(total - done) / rate:.0f} s left", flush=True)
    maps["status"].flush()
    everyone = [bad]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, bad)
    bad = sorted(item for items in everyone for item in items)
    listed = "; ".join(f"{getattr(source, 'files', range(N))[index]} ({why})" for index, why in bad[:5]) + (" ..." if len(bad) > 5 else "")
    if bad and not args.skip_bad:
        raise UserError(f"{len(bad)} of {N} images cannot be read: {listed}. Mend or remove them, or leave them out with "
                        "--skip-bad, and run the same command again")
    if rank == 0:
        if bad:
            print(f"left out {len(bad)} of {N} unreadable images: {listed}", flush=True)
        keep = np.flatnonzero(maps["status"] == 1)
        for name in [name for name in arrays if name != "status"]:
            if len(keep) < N:  # close the gaps
                whole = create(name, (len(keep), *arrays[name][0][1:]))
                for rows in np.array_split(np.arange(len(keep)), 1 + len(keep) // 4096):
                    whole[rows] = maps[name][keep[rows]]
                whole.flush()
            os.replace(out / f"{name}.{'tmp' if len(keep) < N else 'part'}.npy", out / f"{name}.npy")
        with atomic_write(out / "labels.npy") as file:
            np.save(file, source.labels[keep].astype(np.int64))
        with atomic_write(out / "meta.json") as file:
            file.write(json.dumps({**plan, "num_images": len(keep), "channels": vae.latent_channels, "height": side,
                                   "width": side, "scale": vae.scale}, indent=1).encode())
        for leftover in [*out.glob("*.part.npy"), out / "plan.json"]:
            leftover.unlink(missing_ok=True)
        print(f"{out}: {len(keep)} images of {len(source.names)} classes, latents {vae.latent_channels} x {side} x {side}")


def main():
    p = Parser(__doc__)
    p.add_argument("--dataset", choices=["shapes", "folder", "cifar10"], default="folder", help="where the images come from")
    p.add_argument("--images", metavar="DIR", help="with --dataset folder: DIR/<class>/*.jpg")
    p.add_argument("--out", default="data/imagenet256", metavar="DIR", help="the latent folder to make (default: %(default)s)")
    p.add_argument("--image-size", type=int, help="side in pixels after the centre crop (default: 256 for folder, else 32)")
    p.add_argument("--num", "--num-images", type=int, default=10000, help="with --dataset shapes: how many to draw (default: %(default)s)")
    p.add_argument("--vae", metavar="FILE", help="weights of Stable Diffusion's VAE; without it a small VAE is trained here")
    p.add_argument("--vae-factor", type=int, choices=[2, 4], default=4, help="the small VAE's downsampling (default: 4)")
    p.add_argument("--vae-steps", type=int, default=1000, help="the small VAE's steps of 16 images (default: %(default)s)")
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
    source = {"shapes": lambda: Shapes(args.num, args.image_size), "folder": lambda: Folder(args.images, args.image_size),
              "cifar10": lambda: CIFAR10(args.image_size)}[args.dataset]()
    listing = hashlib.sha256("\0".join(map(os.fsdecode, getattr(source, "files", []))).encode(errors="replace"))
    plan = {"format": FORMAT, "dataset": args.dataset, "source": os.path.abspath(args.images) if args.images else None,
            "listing": listing.hexdigest(), "found": len(source.labels), "image_size": args.image_size,
            "classes": source.names, "chunk": args.batch_size}
    given = args.vae and Path(args.vae)
    vae = load_vae(given) if given else None
    if given:
        plan["vae"] = {"path": os.path.abspath(given), "sha256": hashlib.sha256(given.read_bytes()).hexdigest()}
    else:
        plan["vae"] = {"path": "vae.pt", "factor": args.vae_factor, "steps": args.vae_steps, "seed": args.seed}
    out = Path(args.out)
    for name in ("meta.json", "plan.json"):  # finished, or cut off: either way it must be the same work
        if (out / name).is_file():
            old = json.loads((out / name).read_text())
            changed = [key for key in plan if key in old and {**old, "vae": {**old["vae"], "sha256": None}}[key] !=
                       {**plan, "vae": {**plan["vae"], "sha256": None}}[key]]
            if changed:
                raise UserError(f"{out}: holds latents made with another {', '.join(changed)}; choose another --out or remove it")
            if name == "meta.json":
                if rank == 0:
                    print(f"{out}: is complete already, nothing to do")
                return
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
