"""Images -> VAE latents: the KL autoencoder, its weights, and the folder that training reads.

    python vae_latents.py --images DIR --vae data/sd-vae.pt --out data/imagenet256

The same command continues a killed run, and torchrun shares the work. The folder holds
moments.npy, whose row i (2C, H, W) is the mean, then the std of image i's posterior; labels.npy
(N,); files.json, the names; and meta.json, which is written last.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset

import common
from common import UserError, chunks_to_do, fingerprint, progress, say, setting, shared_array, warn

FORMAT = 1  # of the latent folder
DONE, UNREADABLE = 1, 2  # what has become of an image; 0 is to do
ENDINGS = tuple(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)
TABLES = (".json", ".jsonl", ".cls", ".csv", ".tsv", ".parquet")  # may hold labels
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # or Pillow refuses PNGs with a large colour profile


# ---- The KL autoencoder (Rombach et al. 2022, arXiv 2112.10752); diffusers' names of tensors
class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of x (N, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # diffusers adds a dropout

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (N, 1 head, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).reshape(x.shape)


class Coder(nn.Module):
    """The encoder ("down") or decoder ("up"); `channels` of its stages, in the order they run.
    A reader may skip it: it follows diffusers' modules, and the tests find it equal to them."""

    def __init__(self, in_channels, out_channels, channels, layers, groups, direction):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        stages = nn.ModuleList()
        for i, width in enumerate(channels):
            inputs = [channels[max(0, i - 1)]] + (layers - 1) * [width]  # the blocks' channels
            resnets = nn.ModuleList(ResnetBlock(n, width, groups) for n in inputs)
            stage = nn.ModuleDict({"resnets": resnets})
            if i < len(channels) - 1:
                resize, stride = nn.Upsample(scale_factor=2), {"padding": 1}
                if direction == "down":  # padded right and below alone, as in published weights
                    resize, stride = nn.ZeroPad2d((0, 1, 0, 1)), {"stride": 2}
                sampler = nn.Sequential(resize)
                sampler.add_module("conv", nn.Conv2d(width, width, 3, **stride))
                stage[f"{direction}samplers"] = nn.ModuleList([sampler])
            stages.append(stage)
        self.add_module(f"{direction}_blocks", stages)
        inner = channels[-1] if direction == "down" else channels[0]
        resnets = nn.ModuleList(ResnetBlock(inner, inner, groups) for _ in range(2))
        attentions = nn.ModuleList([AttentionBlock(inner, groups)])
        self.mid_block = nn.ModuleDict({"resnets": resnets, "attentions": attentions})
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        middle = [resnets[0], attentions[0], resnets[1]]
        outer = [layer for stage in stages for layers in stage.values() for layer in layers]
        self.order = [*outer, *middle] if direction == "down" else [*middle, *outer]

    def forward(self, x):
        x = self.conv_in(x)
        for layer in self.order:
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images (N, 3, S, S) in [-1, 1] <-> latents (N, C, S/f, S/f), f = 2 ** (stages - 1)."""

    def __init__(self, channels=(128, 256, 512, 512), latent_channels=4, layers=2, scale=1.0):
        super().__init__()
        groups = min(32, channels[0] // 4)
        self.latent_channels, self.scale = latent_channels, scale  # x0 = scale * latent
        self.factor = 2 ** (len(channels) - 1)  # of an image's side to its latent's
        self.encoder = Coder(3, 2 * latent_channels, channels, layers, groups, "down")
        self.decoder = Coder(latent_channels, 3, channels[::-1], layers + 1, groups, "up")
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images):
        """Images in [-1, 1] -> (mean, std) of the posterior, (N, C, S/f, S/f), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, latents):
        """Unscaled latents (x0 / scale) -> images (N, 3, S, S), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def identity(self) -> str:
        return fingerprint(self.scale, *self.state_dict().values())


@torch.no_grad()
def to_images(vae, x0) -> np.ndarray:
    """Scaled latents x0 (N, C, H, W) -> images (N, S, S, 3) uint8, eight at a time."""
    device, images = next(vae.parameters()).device, []
    for piece in (x0 / vae.scale).float().split(8):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            images.append(vae.decode(piece.to(device)).float().cpu())
    images = torch.cat(images).permute(0, 2, 3, 1)
    if not images.isfinite().all():
        raise UserError("the latents or the decoded images are not finite")
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def load_vae(path) -> AutoencoderKL:
    """An AutoencoderKL in eval mode from a file of {"model": tensors, "scale": number}."""
    convert = f"convert another project's: python -m experiments.latents.convert_vae {path} OUT"
    with common.reading(path, f"is no VAE file for --vae; {convert}"):
        saved = common.load_file(path)
        scale, state = float(saved["scale"]), saved["model"]  # a scale is never assumed
        convs = sorted(key for key in state if re.match(r"encoder\.down.*\.conv1\.weight", key))
        channels = [len(state[key]) for key in convs if ".resnets.0." in key]  # one a stage
        latent_channels = len(state["quant_conv.bias"]) // 2
        vae = AutoencoderKL(channels, latent_channels, len(convs) // len(channels), scale)
        vae.load_state_dict(state)
        if not 0 < scale < np.inf:
            raise ValueError(f"its scale is {scale}")
    return vae.eval()


def find_vae(given, meta) -> AutoencoderKL:
    """The VAE to decode with: `given`, or else the one that encoded the latents of `meta`."""
    path = given or meta["vae"]["path"] or "(no path in meta.json)"
    if meta["vae"].get("decoder") == "diffusers":
        fix = f"python -m experiments.latents.diffusers_vae decode OUT/latents.npz --vae {path}"
        raise UserError(f"{path}: needs diffusers; run sample.py with --latents, then {fix}")
    vae = load_vae(path)
    fits = (vae.latent_channels, vae.scale) == (meta["channels"], meta["scale"])
    same = meta["vae"].get("identity") in (None, vae.identity())
    problem = f"{path}: is not the VAE that made the latents"
    if not fits or not (same or given):
        raise UserError(f"{problem}; give that one as --vae")
    if not same:  # the user insists on it
        warn(problem)
    return vae


def open_image(path, size=None, white=65535) -> np.ndarray:
    """Any image file as RGB (H, W, 3) uint8, upright; with `size`, its centre (size, size, 3),
    cut as ADM does it (Dhariwal & Nichol 2021). `white` is that of numbers of 16 bits."""
    with Image.open(path) as image:
        has_16_bits = ";16" in f"{image.mode} {image.tile}"
        image.load()
        with contextlib.suppress(Exception):  # damaged metadata do not cost the picture
            ImageOps.exif_transpose(image, in_place=True)  # it turns before it writes metadata
        if image.mode in ("I", "F"):  # which of their numbers is white?
            raise ValueError("its pixels have 32 bits; save it with 8 or 16")
        if has_16_bits:  # Pillow keeps all bits of grey, of colours the upper eight
            unit = white / 255 if image.mode.startswith("I;16") else white / 65535
            image = Image.fromarray(np.uint8((np.asarray(image) / unit + 0.5).clip(max=255)))
        if "A" in image.mode or "transparency" in image.info:  # laid on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if size is None:
        return np.asarray(image)
    while min(image.size) >= 2 * size:  # halved by boxes, then bicubic to the short side
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    image = image.resize(shape, Image.BICUBIC)
    return np.asarray(image)[top : top + size, left : left + size]


def image_files(folder, seen: set, left_out: list) -> list[tuple[str, int]]:
    """(Path, bytes) of each image file, by folder and name; `left_out` gets all other paths."""
    files = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_image = entry.is_file() and entry.name.lower().endswith(ENDINGS)
        stat = entry.stat() if is_image or entry.is_dir() else None
        inode = stat and (stat.st_dev, stat.st_ino)
        if stat is None or inode in seen or entry.name.startswith("."):
            left_out.append(entry.path)
            continue
        seen.add(inode)  # each file counts once, whatever links to it
        files += [(entry.path, stat.st_size)] if is_image else image_files(entry, seen, left_out)
    return sorted(files, key=lambda found: os.path.split(found[0]))


class Images(Dataset):
    """The images of DIR/<class>/**, or those that EDM's DIR/dataset.json lists (Karras et al.
    2022). Item i: (pixels (size, size, 3) uint8, ""), or (None, what is wrong)."""

    def __init__(self, root, size, white=65535):
        self.size, self.white, left_out, seen = size, white, [], set()
        say(f"--images {root}: listing")
        inside = sorted(os.scandir(root), key=lambda entry: entry.name)
        folders = [entry for entry in inside if entry.is_dir() and not entry.name.startswith(".")]
        beside = [entry.path for entry in inside if entry not in folders]
        if (edm := os.path.join(root, "dataset.json")) in beside:
            with common.reading(edm, "is no list of [name, label]; write it with EDM's tool"):
                pairs = sorted(json.loads(Path(edm).read_text())["labels"])
                found = [(path := f"{root}/{name}", os.stat(path).st_size) for name, _ in pairs]
                self.labels = [range(10**6)[label] for _, label in pairs]  # whole numbers
                self.classes = [*map(str, range(1 + max(self.labels)))]
        else:
            below = [image_files(path, seen, left_out) for path in progress("listed", folders)]
            found = [each for files in below for each in files]
            self.labels = [label for label, files in enumerate(below) for _ in files]
            self.classes = [entry.name for entry in folders]
            near = [path for path in left_out if path.endswith((".txt", *TABLES))]
            tables = [path for path in beside if path.endswith(TABLES)]
            shards = all(re.fullmatch(r"([a-z]+[-_]?)?\d{3,6}|\d+", name) for name in self.classes)
            if (tables and shards) or 2 * len(near) > len(self.labels) > 0:
                what = f"has folders like shards and {[*tables, *near][0]} like labels"
                raise UserError(f"{root}: {what}; write EDM's dataset.json, or move that away")
            empty = [name for name, files in zip(self.classes, below, strict=True) if not files]
            if empty or not below:
                raise UserError(f"{root}: needs a folder for each class; empty: {empty}")
            splits = "train training val valid validation test testing images __macosx".split()
            if len(below) == 1 or {name.lower() for name in self.classes} & {*splits}:
                warn(f"{root}: each folder becomes a class: {', '.join(self.classes[:10])}")
        self.files, sizes = map(list, zip(*found, strict=True))  # no times: a copy has others
        self.names = [os.path.relpath(path, root) for path in self.files]
        some = range(0, len(found), 1 + len(found) // 64)  # at most 64, of the whole list
        readable = [Path(self.files[i]) for i in some if os.access(self.files[i], os.R_OK)]
        self.identity = fingerprint(self.names, sizes, [path.read_bytes() for path in readable])
        tried = [self[i][0] for i in some]
        most = max((int(pixels.max()) for pixels in tried if pixels is not None), default=255)
        if most <= 64:  # a quarter of white
            warn(f"{root}: no pixel is above {most * white // 255} of {white}; give --white NUMBER")
        names = f"{len(self.classes)} classes ({', '.join(self.classes[:10])})"
        others = f"{len(beside)} beside the classes, {len(left_out)} in them {left_out[:1]}"
        say(f"{len(found)} images of {names}; hidden, linked twice or no images: {others}")

    def __getitem__(self, i):
        try:
            return open_image(self.files[i], self.size, self.white), ""
        except Exception as error:  # Pillow's have many types
            return None, f"{self.files[i]} ({type(error).__name__}: {error})"


class LatentFolder:
    """.meta (dict), .labels (N,) int64, .moments (N, 2C, H, W) float16 map. meta.json holds format,
    num_images, channels, height, width, scale, classes; if no vae (path, identity), give --vae."""

    def __init__(self, path):
        self.path = path = Path(path)
        if not (path / "meta.json").is_file():
            raise UserError(f"{path}: is no complete latent folder; run vae_latents.py for it")
        with common.reading(path, "is damaged, or not of vae_latents.py; make it anew"):
            self.meta = meta = json.loads((path / "meta.json").read_text())
            labels = np.load(path / "labels.npy").astype(np.int64, casting="safe")
            self.labels, N = torch.from_numpy(labels), meta["num_images"]
            self.moments = np.load(path / "moments.npy", mmap_mode="c")[:N]  # a private map
            C, H, W = self.shape = meta["channels"], meta["height"], meta["width"]
            found = self.moments.dtype, self.moments.shape, labels.shape
            if found != (np.float16, (N, 2 * C, H, W), (N,)) or H != W:
                raise ValueError(f"moments.npy and labels.npy are {found}, of {H} x {W}")
            classes, scale, kind = meta["classes"], meta["scale"], meta["format"]
            inside = 0 <= labels.min() and labels.max() < len(classes)
            if kind != FORMAT or not inside or not 0 < scale < np.inf:
                raise ValueError(f"labels {labels.min()} to {labels.max()}, {scale}, format {kind}")
            some = self.moments[np.linspace(0, N - 1, min(N, 64)).astype(int)]
            meta["identity"] = fingerprint(self.labels, classes, scale, some)
            meta.setdefault("vae", {"path": None, "identity": None})
            meta["counts"] = np.bincount(labels, minlength=len(classes)).tolist()

    def __len__(self):
        return len(self.labels)

    def read(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """(Moments (n, 2C, H, W) float16, labels (n,) int64) of images, ready for a GPU."""
        moments = torch.from_numpy(self.moments[indices.numpy()])
        moments = moments.pin_memory() if torch.cuda.is_initialized() else moments
        return moments, self.labels[indices]


@dataclass
class Settings:
    images: str | None = None  # DIR, with DIR/<class>/**/*.jpg, or with EDM's DIR/dataset.json
    vae: str | None = None  # from experiments.latents.convert_vae, or small_vae for small images
    out: str = "data/imagenet256"  # folder to make
    image_size: int = setting(256, at_least=2)  # side in pixels after the crop
    white: int = setting(65535, at_most=65535)  # the number of white in images of 16 bits
    batch_size: int = 64  # images encoded at once
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


@torch.no_grad()
def encode(images, vae, device, moments, done, batch_size, rank, world):
    """Fill `moments` and `done` chunk by chunk; the VAE runs in float32 (TF32 on a card)."""
    todo = chunks_to_do(done, batch_size, rank, world)
    workers = min(8, os.cpu_count() // world) if device.type == "cuda" else 0
    loader = DataLoader(images, batch_sampler=todo, num_workers=workers, collate_fn=list)
    for rows, items in zip(progress("encoded: batch", todo, world), loader, strict=True):
        readable = np.array([pixels is not None for pixels, _ in items])
        if readable.any():
            pixels = np.stack([pixels for pixels, _ in items if pixels is not None])
            pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1
            latents = torch.cat(vae.encode(pixels), dim=1).half().cpu()
            if not latents.isfinite().all():
                raise UserError(f"--vae: latents near {images.files[rows[0]]} are not finite")
            moments[rows[readable]] = latents
            moments.flush()
        done[rows] = np.where(readable, DONE, UNREADABLE)  # when the rows are on disk


def finish(images, vae, moments, done, meta, out):
    """Make it a latent folder: list and leave out unreadable images; meta.json comes last."""
    kept, unreadable = np.flatnonzero(done == DONE), np.flatnonzero(done == UNREADABLE)
    if len(unreadable):
        reasons = [images[i][1] for i in unreadable]
        with common.atomic_write(out / "unreadable.txt") as file:
            file.write("\n".join(reasons).encode(errors="surrogateescape"))
        what = f"{len(reasons)} images cannot be read, see {out}/unreadable.txt: {reasons[:5]}"
        for label in set(images.labels) - {images.labels[i] for i in kept}:
            raise UserError(f"nothing is left of class {images.classes[label]}: {what}")
        warn(f"left out: {what}")
        # The last rows fill the holes, and stay where they are, too: a killed run may repeat it
        holes, last = unreadable[unreadable < len(kept)], kept[kept >= len(kept)]
        moments[holes] = moments[last]
        moments.flush()
        kept = np.arange(len(kept))
        kept[holes] = last  # row i is image kept[i]
    some = moments[: len(kept) : 1 + len(kept) // 4096].astype(float)  # at most 4096 rows
    mean, std = np.split(some, 2, axis=1)
    meta["std"] = float(vae.scale * np.sqrt(mean.var() + (std**2).mean()))  # of x0
    meta |= {"format": FORMAT, "num_images": len(kept), "classes": images.classes}
    meta["scale"] = vae.scale
    meta["channels"], meta["height"], meta["width"] = mean.shape[1:]
    with common.atomic_write(out / "labels.npy") as file:
        np.save(file, np.array(images.labels, dtype=np.int64)[kept])
    for name, content in (("files", [images.names[i] for i in kept]), ("meta", meta)):
        with common.atomic_write(out / f"{name}.json") as file:
            file.write(json.dumps(content).encode())
    say(f"{out}: {len(kept)} images; the std of the scaled latents is {meta['std']:.3f}")
    if not 0.7 <= meta["std"] <= 1.4:
        warn(f"that std should be about 1; is {vae.scale} the scale of this VAE?")


def main():
    args = common.parse_settings(Settings, __doc__)
    if not args.vae or not args.images:
        raise UserError("--images DIR and --vae FILE: are both needed; give them")
    device, rank, world = common.setup(args.device)
    vae = load_vae(args.vae)
    side, rest = divmod(args.image_size, vae.factor)  # of the latents
    if rest or side < 2:
        raise UserError(f"--image-size {args.image_size}: must be {vae.factor} times 2, 3, ...")
    images = common.gather(rank or Images(args.images, args.image_size, args.white))[0]
    out = Path(args.out)
    tag = fingerprint(images.identity, args.image_size, args.white, vae.identity())[:12]
    _lock = common.lock(out)  # until main returns
    part = out / f"done-{tag}.part.npy"
    if (out / "meta.json").is_file():
        if LatentFolder(out).meta.get("tag") != tag:
            raise UserError(f"{out}: holds other images' or VAE's latents; choose another --out")
        return say(f"{out}: is complete already")
    if not part.exists() and (out / "moments.npy").exists():
        raise UserError(f"{out}: holds a part of other latents; remove it, or choose another --out")
    common.gather()  # all have looked before the first one writes
    done = shared_array(part, (len(images.files),), np.uint8, rank)
    shape = (len(images.files), 2 * vae.latent_channels, side, side)
    moments = shared_array(out / "moments.npy", shape, np.float16, rank)
    vae = vae.to(device, memory_format=torch.channels_last)
    encode(images, vae, device, moments, done, args.batch_size, rank, world)
    common.gather()  # wait for the others
    if rank == 0:
        meta = {"tag": tag, "image_size": args.image_size, "source": os.path.abspath(args.images)}
        meta["vae"] = {"path": os.path.abspath(args.vae), "identity": vae.identity()}
        finish(images, vae, moments, done, meta, out)
        part.unlink()


if __name__ == "__main__":
    common.run(main)
