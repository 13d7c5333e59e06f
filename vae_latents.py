"""Images -> VAE latents: the KL autoencoder, its weights, and the folder that training reads.

    python vae_latents.py --images DIR --vae sd-vae-ft-ema.bin --out data/imagenet256

DIR/<class>/**/*.jpg. The processes of one machine (torchrun) share the work; the same command again
continues. (Small images: experiments/small_vae.py.) The folder: moments.npy (N, 2C, H, W) float16,
the posterior's mean, then its std; labels.npy (N,) int64; files.json, the images; meta.json.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import models
from models import UserError, say, setting

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

FORMAT = 1  # of the latent folder

# ---- The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752). Names of the
# tensors are those of diffusers.


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of x (N, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (N, 1 head, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).reshape(x.shape)


class Resample(nn.ModuleDict):
    """Half the resolution ("down") or twice ("up")."""

    def __init__(self, channels, direction):
        self.down = direction == "down"
        stride, padding = (2, 0) if self.down else (1, 1)
        super().__init__({"conv": nn.Conv2d(channels, channels, 3, stride, padding)})

    def forward(self, x):
        if self.down:  # padded right and below alone, as the published weights expect
            return self["conv"](F.pad(x, (0, 1, 0, 1)))
        return self["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Coder(nn.Module):
    """The encoder ("down") or decoder ("up"); `channels` of its stages in the order they run."""

    def __init__(self, in_channels, out_channels, channels, layers, groups, direction):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        stages = nn.ModuleList()
        for i, (before, width) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            widths = [before] + [width] * layers
            pairs = zip(widths, widths[1:], strict=False)
            stage = {"resnets": nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairs)}
            if i < len(channels) - 1:
                stage[f"{direction}samplers"] = nn.ModuleList([Resample(width, direction)])
            stages.append(nn.ModuleDict(stage))
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
    """Images (N, 3, S, S) in [-1, 1] <-> latents (N, C, S/f, S/f), f = 2 ** (stages - 1).
    `scale` brings latents to unit variance: the diffusion's x0 = scale * (mean + std * eps)."""

    def __init__(self, channels=(128, 256, 512, 512), latent_channels=4, layers=2, scale=0.18215):
        super().__init__()
        groups = min(32, channels[0] // 4)
        self.channels, self.latent_channels, self.scale = tuple(channels), latent_channels, scale
        self.encoder = Coder(3, 2 * latent_channels, self.channels, layers, groups, "down")
        self.decoder = Coder(latent_channels, 3, self.channels[::-1], layers + 1, groups, "up")
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images):
        """Images in [-1, 1] -> (mean, std) of the posterior, each (N, C, S/f, S/f), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, latents):
        """Unscaled latents (x0 / scale) -> images (N, 3, S, S), in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(latents))

    def identity(self) -> str:
        return models.fingerprint(self.scale, *self.state_dict().values())


@torch.no_grad()
def decode(vae, x0) -> np.ndarray:
    """Scaled latents x0 (N, C, H, W) -> images (N, S, S, 3) uint8, eight at a time."""
    device, images = next(vae.parameters()).device, []
    for piece in (x0 / vae.scale).float().split(8):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            images.append(vae.decode(piece.to(device)).float().cpu())
    images = torch.cat(images).permute(0, 2, 3, 1)
    if not images.isfinite().all():
        raise UserError("the latents or the decoded images are not finite numbers")
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def from_uint8(images) -> torch.Tensor:
    """Images (N, S, S, 3) uint8 -> (N, 3, S, S) float in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_vae(path) -> AutoencoderKL:
    """An AutoencoderKL in eval mode from a file with diffusers' names; the shapes tell its size."""
    file = models.load_file(path)
    state = file.get("state_dict", file.get("model", file))
    # diffusers' old names of the attention; those of CompVis: experiments/convert_vae.py
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    with models.reading(f"{path}, as a KL autoencoder like Stable Diffusion's,"):
        for before, now in old.items():
            state = {key.replace(before, now): value for key, value in state.items()}
        down = [key.split(".") for key in state if key.startswith("encoder.down_blocks.")]
        layers = 1 + max(int(key[4]) for key in down if key[3] == "resnets")
        names = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(len(down))]
        channels = [state[name].shape[0] for name in names if name in state]
        latent_channels = state["quant_conv.weight"].shape[0] // 2
        vae = AutoencoderKL(channels, latent_channels, layers, file.get("scale", 0.18215))
        vae.load_state_dict(state)
    return vae.eval()


def find_vae(given, meta, data) -> AutoencoderKL:
    """The VAE to decode with: `given` if any, else the one that encoded the latent folder."""
    path = given or Path(data) / meta["vae"]["path"]
    vae = load_vae(path)
    if not given and vae.identity() != meta["vae"].get("identity", vae.identity()):
        raise UserError(f"{path}: is not the VAE that made {data}; bring it back or give --vae")
    return vae


def open_image(path, size=None) -> np.ndarray:
    """Any image file as RGB (H, W, 3) uint8, upright; with `size`, its centre (size, size, 3).
    16-bit grey is scaled, transparency laid on white. The crop is ADM's (Dhariwal & Nichol 2021):
    halve by boxes while twice too large, bicubic to the short side, cut the middle."""
    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError("not a regular file")
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.float64) / 257
            image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if size is None:
        return np.asarray(image)
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels have no centre to speak of")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return np.asarray(image.resize(shape, Image.BICUBIC))[top : top + size, left : left + size]


def try_open(path, size):
    """The image, or in words what was wrong with it: Pillow's errors have many types."""
    try:
        return open_image(path, size)
    except Exception as error:
        return f"{path} ({type(error).__name__}: {error})"


def list_images(root, size) -> ImageFolder:
    """torchvision's ImageFolder of DIR/<class>/**, giving (image or what was wrong, label)."""
    try:
        images = ImageFolder(root, loader=functools.partial(try_open, size=size))
    except OSError as error:  # no such folder, none in it, or one without images
        raise UserError(f"--images {root}: {error}; it must hold one folder a class") from error
    folders = {os.path.dirname(path) for path, _ in images.samples}
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise UserError(f"--images {root}: a link back makes some of its images count twice")
    others = sum(len(files) for _, _, files in os.walk(root, followlinks=True)) - len(images)
    names = f"{len(images.classes)} classes ({', '.join(images.classes[:10])})"
    say(f"{len(images)} images of {names}; {others} other files, not {' '.join(IMG_EXTENSIONS)}")
    if {"train", "val", "test", "__MACOSX"} & set(images.classes):
        say("warning: a class is named like a part of a data set; is --images the right folder?")
    return images


class LatentFolder:
    """A complete folder: .meta (dict), .labels (N,) int64, .moments (N, 2C, H, W) float16 map."""

    def __init__(self, path):
        self.path = path = Path(path)
        if not (path / "meta.json").is_file():
            if list(path.glob("*.part.npy")):
                raise UserError(f"{path}: its encoding was cut off; run vae_latents.py again")
            raise UserError(f"{path}: no latents there; make them with vae_latents.py --out {path}")
        with models.reading(f"{path}, as a latent folder (if it is damaged, encode it again),"):
            self.meta = meta = json.loads((path / "meta.json").read_text())
            if meta["format"] != FORMAT:
                raise UserError(f"{path}: format {meta['format']}, not {FORMAT}; encode it again")
            self.labels = torch.from_numpy(np.load(path / "labels.npy"))
            file = path / "moments.npy"
            self.moments = np.load(file, mmap_mode="r")  # "r+" would fill up a file that was cut
            if os.access(file, os.W_OK):  # else torch warns; "c" would count against the memory
                self.moments = np.load(file, mmap_mode="r+")
            N, classes = meta["num_images"], len(meta["classes"])
            self.shape = meta["channels"], meta["height"], meta["width"]  # of one latent
            found, wanted = self.moments.shape, (N, 2 * self.shape[0], *self.shape[1:])
            if found != wanted or self.moments.dtype != np.float16:
                raise ValueError(f"moments.npy is {self.moments.dtype} {found}, not {wanted}")
            low, high = self.labels.min(), self.labels.max()
            if self.labels.shape != (N,) or low < 0 or high >= classes or not meta["scale"] > 0:
                raise ValueError(f"{len(self.labels)} labels from {low} to {high}, {N} images")
            for row in range(0, N, max(1, N // 4096)):  # every row of a small folder
                if not np.isfinite(self.moments[row]).all():
                    raise ValueError(f"moments.npy: image {row} holds NaN or infinity")

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def files(self) -> np.ndarray:
        names = json.loads((self.path / "files.json").read_text())
        return np.array([os.path.join(self.meta["source"], name) for name in names])

    def images(self, rows) -> np.ndarray:
        """The cropped source images (n, S, S, 3) uint8, read from where they were encoded."""
        with models.reading(f"{self.path}: its images"):
            return np.stack([open_image(f, self.meta["image_size"]) for f in self.files[rows]])


def shared_array(path, shape, dtype, rank) -> np.ndarray:
    """An array on disk, zeros at first, that processes fill and a killed run goes on with."""
    if rank == 0 and not path.exists():
        temporary = path.with_suffix(".tmp")
        array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(temporary, "r+b") as file:  # a full disk is an error here, no crash later
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        os.replace(temporary, path)
    models.gather(None)  # the others wait
    with models.reading(f"{path}: remove it and run the same again; it"):
        return np.load(path, mmap_mode="r+")


def chunks_to_do(done, size, rank, world) -> list[np.ndarray]:
    """This process's chunks of `size` rows; the chunks are the same whoever works on them."""
    chunks = np.split(np.arange(len(done)), range(size, len(done), size))
    return [rows for rows in chunks[rank::world] if not done[rows].all()]


@dataclass
class Settings:
    images: str | None = setting(None, "DIR/<class>/**/*.jpg")
    vae: str | None = setting(None, "Stable Diffusion's VAE, or experiments/small_vae.py's")
    out: str = setting("data/imagenet256", "folder to make")
    image_size: int = setting(256, "side in pixels after the crop, a multiple of 8", at_least=8)
    batch_size: int = setting(64, "images encoded at once", at_least=1)
    workers: int | None = setting(None, "decoding processes (default: by cores)", at_least=0)
    device: str = setting("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")


def encode(args, images, vae, todo, device, world):
    """Yield (rows, moments (n, 2C, H, W), what was wrong with the images: []) of chunks of rows."""
    workers = min(8, os.cpu_count() // world) if device.type == "cuda" else 0
    workers = workers if args.workers is None else args.workers
    options = {"num_workers": workers, "collate_fn": list}
    loader = torch.utils.data.DataLoader(images, batch_sampler=todo, **options)
    progress, done = models.Progress("encoded", sum(map(len, todo)), world), 0
    for rows, items in zip(todo, loader, strict=True):
        bad, moments = [image for image, _ in items if isinstance(image, str)], None
        if not bad:
            pixels = from_uint8(np.stack([image for image, _ in items])).to(device)
            with torch.no_grad():  # in float32 (TF32 on CUDA): it is done once
                moments = torch.cat(vae.encode(pixels), dim=1).half().cpu()
            if not moments.isfinite().all():
                raise UserError(f"--vae: latents near {images.samples[rows[0]][0]} are not finite")
        yield rows, moments, bad
        done += len(rows)
        progress(done)


def main():
    args = models.parse_settings(Settings, __doc__)
    if args.image_size % 8 or not args.vae or not args.images:
        raise UserError("needed: --images DIR, --vae FILE, and an --image-size that 8 divides")
    device, rank, world = models.setup(args.device)
    vae, images = load_vae(args.vae), list_images(args.images, args.image_size)
    listing = [os.path.relpath(path, args.images) for path, _ in images.samples]
    N, side = len(listing), args.image_size // 2 ** (len(vae.channels) - 1)
    tag = models.fingerprint(listing, args.image_size, vae.identity())[:12]
    models.agree(settings=vars(args), images_and_vae=tag)
    out = Path(args.out)
    held = models.lock(out) if rank == 0 else None  # noqa: F841 (until main returns)
    if (out / "meta.json").is_file():
        if LatentFolder(out).meta.get("tag") != tag:
            raise UserError(f"{out}: holds latents of other images or VAE; choose another --out")
        return say(f"{out}: is complete already, nothing to do")
    part, finished = out / f"moments-{tag}.part.npy", out / f"done-{tag}.part.npy"
    done, every_bad = shared_array(finished, (N,), np.uint8, rank), []
    if not done.all():  # else a run was killed between here and its end: go on there
        array = shared_array(part, (N, 2 * vae.latent_channels, side, side), np.float16, rank)
    todo = chunks_to_do(done, args.batch_size, rank, world)
    vae = vae.to(device, memory_format=torch.channels_last)
    for rows, moments, bad in encode(args, images, vae, todo, device, world):
        every_bad += bad
        if not bad:
            array[rows] = moments
            array.flush()
            done[rows] = 1  # when the rows are on disk
    bad = sum(models.gather(every_bad), [])
    if bad:
        with models.atomic_write(out / "unreadable.txt") as file:
            file.write("\n".join(bad).encode(errors="surrogateescape"))
        few = f"{len(bad)} of {N} images cannot be read: {'; '.join(bad[:5])}"
        raise UserError(f"{few}; fix or replace them, listed in {out}/unreadable.txt; run again")
    if rank == 0:
        meta = {"format": FORMAT, "tag": tag, "image_size": args.image_size, "num_images": N}
        meta.update(classes=images.classes, channels=vae.latent_channels, height=side, width=side)
        meta.update(source=os.path.abspath(args.images), scale=vae.scale)
        meta["vae"] = {"path": os.path.abspath(args.vae), "identity": vae.identity()}
        if part.exists():
            os.replace(part, out / "moments.npy")
        with models.atomic_write(out / "labels.npy") as file:
            np.save(file, np.array(images.targets, dtype=np.int64))
        for name, content in (("files", listing), ("meta", meta)):  # meta.json makes it a folder
            with models.atomic_write(out / f"{name}.json") as file:
                file.write(json.dumps(content).encode())
        finished.unlink()
        say(f"{out}: {N} images, {len(images.classes)} classes, latents of side {side}")


if __name__ == "__main__":
    models.run(main)
