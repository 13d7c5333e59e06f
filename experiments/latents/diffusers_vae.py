"""Makes latents with any image autoencoder of diffusers, and pictures of samples of such latents.

    python -m experiments.latents.diffusers_vae encode --vae FOLDER --images DIR --out LATENTS
    python sample.py --ckpt out/stage2 --latents --out out/samples
    python -m experiments.latents.diffusers_vae decode out/samples/latents.npz --vae FOLDER

FOLDER is an autoencoder as diffusers saves it: config.json and the weights (or a pipeline with
vae/ inside). Nothing is downloaded. LATENTS is a latent folder like vae_latents.py's, which trains,
teaches and probes as any other. Its latents are normalised already, by what FOLDER says: shift and
scale, a mean and a std for each channel, or FLUX.2's batch norm; or, with --normalise data, by the
mean and std of each channel over the first 4,096 pictures. meta.json says which. The same command
continues a killed run, and torchrun shares the work of encode.

decode reads "latents" (N, C, H, W) float32 and "labels" (N,) and writes samples.npz and grid.png
beside them. docs/autoencoders.md lists the classes.
"""

import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import common
import models
import sample
from common import UserError, chunks_to_do, fingerprint, progress, say, setting, shared_array, warn
from experiments.latents.convert_vae import existing
from vae_latents import Images, LatentFolder, encode, finish, to_images

STATISTICS_FROM = 4096  # pictures of --normalise data


def library():
    """The package diffusers, which only this script needs."""
    try:
        import diffusers
        import safetensors  # noqa: F401 (what diffusers reads weights with)
    except ImportError as error:
        install = "run `pip install diffusers safetensors`"
        raise UserError(f"diffusers: cannot be imported ({error}); {install}") from error
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def pack(z, patch) -> torch.Tensor:
    """(N, C, p h, q w) -> (N, C p q, h, w): the channels of FLUX.2's batch norm."""
    n, channels, height, width = z.shape
    p, q = patch
    if height % p or width % q:
        raise ValueError(f"a latent of {height} x {width} is not made of patches of {p} x {q}")
    z = z.reshape(n, channels, height // p, p, width // q, q)
    return z.permute(0, 1, 3, 5, 2, 4).reshape(n, channels * p * q, height // p, width // q)


def unpack(z, patch) -> torch.Tensor:
    """The inverse of `pack`."""
    n, channels, height, width = z.shape
    p, q = patch
    z = z.reshape(n, channels // (p * q), p, q, height, width)
    return z.permute(0, 1, 4, 2, 5, 3).reshape(n, channels // (p * q), height * p, width * q)


class DiffusersVAE(nn.Module):
    """An autoencoder of diffusers with the interface of vae_latents.AutoencoderKL. Its latents are
    normalised, (z - mean) / std for each channel, in float64, so that the way back is exact."""

    scale = 1.0

    def __init__(self, net, given=()):
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.kind, self.config = type(net).__name__, net.config
        self.given = given  # the settings that its config.json names; the rest are defaults
        for module in net.modules():  # tiles have seams, and slices are other batches
            for name in ("use_tiling", "use_slicing"):
                if getattr(module, name, False):
                    setattr(module, name, False)
        self.frames = None  # does it take (N, C, 1 frame, H, W)? The first call finds out
        # diffusers 0.42.1 masks this one's attention for a batch of one alone
        self.one_by_one = self.kind == "AutoencoderKLHunyuanVideo15"
        self.patch = None
        if isinstance(getattr(net, "bn", None), nn.BatchNorm2d):
            self.patch = tuple(self.config.patch_size)
        self.normalises_itself = self.kind == "AutoencoderRAE"  # and takes pixels in [0, 1]
        self.mean = self.std = None  # (C,) float64: what normalises
        self.says = ""  # where they come from

    # ---- diffusers' own latents and pixels

    def either(self, verb, function, x):
        """`function` of x with one frame or of x itself, whichever works. `verb` is for errors."""
        problems = []
        for frames in (True, False) if self.frames is None else (self.frames,):
            try:
                answer = function(x.unsqueeze(2) if frames else x)
                self.frames = frames
                return answer
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # each class has its own, for what it does not take
                problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
        channels = self.config.get("in_channels", 3)
        more = f" (its in_channels is {channels})" if channels != 3 else ""
        tried = {None: ", with a frame and without", True: " with a frame", False: ""}[self.frames]
        what = f"does not {verb} {tuple(x.shape)}{tried}{more}"
        why = "; ".join(dict.fromkeys(problems))
        raise UserError(f"{self.kind}: {what}: {why}; choose another autoencoder")

    def raw_encode(self, images) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, S, S) in [-1, 1] -> mean and std (N, C, h, w) as diffusers makes them; the
        std is 0 where the latent is no distribution."""
        if self.one_by_one and len(images) > 1:
            parts = [self.raw_encode(image) for image in images.split(1)]
            return tuple(map(torch.cat, zip(*parts, strict=True)))
        images = images * 0.5 + 0.5 if self.normalises_itself else images

        def latent(x):
            if self.kind == "AutoencoderVidTok" and self.net.is_causal:  # as its forward() does
                before = self.net.temporal_compression_ratio - 1
                x = torch.cat([x[:, :, :1].expand(-1, -1, before, -1, -1), x], dim=2)
            return self.net.encode(x)

        answer = self.either("encode", latent, images)
        found = getattr(answer, "latent_dist", None)
        if found is not None:
            mean = getattr(found, "mean", None)
            std = getattr(found, "std", None)
            mean = found.mode() if mean is None else mean
        else:
            names = [name for name in ("latent", "latents") if hasattr(answer, name)]
            mean, std = getattr(answer, names[0]) if names else answer[0], None
        std = torch.zeros_like(mean) if std is None else std
        if self.frames and mean.dim() == 5 and mean.shape[2] == 1:
            mean, std = mean[:, :, 0], std[:, :, 0]
        if mean.dim() != 4 or mean.shape[2] != mean.shape[3] or std.shape != mean.shape:
            shape = f"makes latents {tuple(mean.shape)} of pictures {tuple(images.shape)}"
            raise UserError(f"{self.kind}: {shape}; choose one that makes a square map of each")
        if self.patch:
            mean, std = (pack(moment, self.patch) for moment in (mean, std))
        return mean, std

    def raw_decode(self, latents) -> torch.Tensor:
        """diffusers' pixels (N, 3, S, S) in [-1, 1] of its own latents (N, C, h, w)."""
        if self.one_by_one and len(latents) > 1:
            return torch.cat([self.raw_decode(latent) for latent in latents.split(1)])
        latents = unpack(latents, self.patch) if self.patch else latents
        takes = inspect.signature(self.net.decode).parameters
        more = {"num_frames": 1} if "num_frames" in takes else {}
        if "temb" in takes and self.config.timestep_conditioning:
            more["temb"] = torch.zeros(len(latents), device=latents.device)  # as without noise
        with torch.random.fork_rng([latents.device] if latents.is_cuda else []):
            torch.manual_seed(0)  # for the decoders that draw noise
            answer = self.either("decode", lambda z: self.net.decode(z, **more), latents)
        pixels = getattr(answer, "sample", answer)
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels
        pixels = pixels[:, :, 0] if pixels.dim() == 5 else pixels
        return pixels * 2 - 1 if self.normalises_itself else pixels

    # ---- The interface of vae_latents.AutoencoderKL

    def encode(self, images):
        """Images in [-1, 1] -> normalised (mean, std) of the posterior, (N, C, h, w) float64."""
        mean, std = (moment.double() for moment in self.raw_encode(images))
        shift, factor = self.statistics(mean)
        return (mean - shift) / factor, std / factor

    def decode(self, latents):
        """Normalised latents -> images (N, 3, S, S), about in [-1, 1]."""
        shift, factor = self.statistics(latents)
        return self.raw_decode((latents.double() * factor + shift).float())

    def statistics(self, like):
        """Mean and std of the channels, (C, 1, 1) float64, where `like` is."""
        return (x.to(like.device)[:, None, None] for x in (self.mean, self.std))

    def normalise_by(self, mean, std, says) -> None:
        """Normalise by numbers (C,); UserError if they cannot."""
        self.mean, self.std = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mean, std))
        if not self.mean.isfinite().all() or not ((self.std > 0) & self.std.isfinite()).all():
            other = "config" if says.startswith("the first") else "data"
            what = "has a mean or a std that cannot normalise"
            raise UserError(f"{says}: {what}; use --normalise {other}")
        self.says = says

    def identity(self) -> str:
        """A hash of class, settings and weights."""
        settings = {key: value for key, value in self.config.items() if key[0] != "_"}
        settings = json.dumps(settings, sort_keys=True, default=str)
        return fingerprint(self.kind, settings, *self.net.state_dict().values())


def said_statistics(vae, channels):
    """(mean, std, where they are) that the class normalises with, or None where it says nothing.
    Numbers that diffusers fills in by itself are told apart from those of config.json."""
    config, net, given = vae.config, vae.net, vae.given
    if vae.normalises_itself:
        return torch.zeros(channels), torch.ones(channels), "its own encode and decode"
    if vae.patch:  # FLUX.2
        std = (net.bn.running_var.double() + config.batch_norm_eps).sqrt()
        return net.bn.running_mean.double(), std, "bn.running_mean and bn.running_var"
    scale = config.get("scaling_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    names = ["latents_mean", "latents_std"]
    where = "config" if all(name in given for name in names) else "diffusers' default"
    buffers = dict(net.named_buffers(recurse=False))
    if mean is None and "latents_mean" in buffers:  # LTX
        mean, std, where = buffers["latents_mean"], buffers["latents_std"], "state"
    if mean is None and std is None:
        if scale is None:
            return None
        shift = torch.full((channels,), float(config.get("shift_factor") or 0), dtype=torch.float64)
        where = "config" if "scaling_factor" in given else "diffusers' default"
        names = ["scaling_factor"] + ["shift_factor"] * bool(config.get("shift_factor"))
        factor = torch.full((channels,), 1 / float(scale), dtype=torch.float64)
        return shift, factor, f"{' and '.join(names)} ({where})"
    if mean is None or std is None or config.get("shift_factor"):
        what = "has latents_mean without latents_std, or a shift_factor beside them"
        raise UserError(f"{vae.kind}: {what}; use --normalise data")
    mean, std = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (mean, std))
    if len(mean) % channels or len(std) != len(mean):
        what = f"has {len(mean)} latents_mean and {len(std)} latents_std for {channels} channels"
        raise UserError(f"{vae.kind}: {what}; use --normalise data")
    # Cosmos has a row of numbers for each channel, one a frame; a picture is the first frame
    mean, std = (numbers.view(channels, -1)[:, 0] for numbers in (mean, std))
    if scale not in (None, 1):
        std, names = std / scale, [*names, "scaling_factor"]
    return mean, std, f"{', '.join(names)} ({where})"


def find_folder(given) -> Path:
    """The folder with config.json: `given`, or vae/ in it."""
    path = existing(given)
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    made = "give a folder that diffusers' save_pretrained has made"
    raise UserError(f"{given}: holds no config.json of an autoencoder; {made}")


def load(given) -> DiffusersVAE:
    """The autoencoder in a folder of diffusers, in float32; UserError for what is none."""
    diffusers = library()
    folder = find_folder(given)
    with common.reading(folder / "config.json", "is no config.json of diffusers"):
        config = {**json.loads((folder / "config.json").read_text())}
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        version = f"diffusers {diffusers.__version__} has no class {name}"
        raise UserError(f"{folder}/config.json: cannot be used: {version}; update diffusers")
    if not hasattr(kind, "encode") or not hasattr(kind, "decode"):
        raise UserError(f"{folder}: is a {name}, which does not encode; give an autoencoder")
    if name == "AutoencoderRAE" and not diffusers.utils.is_transformers_available():
        raise UserError(f"{folder}: needs the package transformers; run `pip install transformers`")
    weights = [path.name for path in folder.glob("diffusion_pytorch_model*")]
    if not weights:
        raise UserError(f"{folder}: holds no diffusion_pytorch_model.*; fetch the weights, too")
    halves = all(".fp16." in weight for weight in weights)  # where nothing else was published
    options = {"torch_dtype": torch.float32, "variant": "fp16" if halves else None}
    options.update(local_files_only=True, output_loading_info=True)
    with common.reading(folder, f"does not load as {name}; fetch it again"):
        net, found = kind.from_pretrained(str(folder), **options)
        if missing := [*found["missing_keys"], *found.get("mismatched_keys", [])]:
            what = "tensors are missing or of another shape"
            raise ValueError(f"{len(missing)} {what}: {missing[:3]}")
        if unknown := found["unexpected_keys"]:
            warn(f"{folder}: {len(unknown)} of its tensors are not used: {unknown[:3]}")
    return DiffusersVAE(net.float(), config)


@torch.no_grad()
def prepare(vae, side) -> tuple[int, int]:
    """Try a picture of this side: (channels, side) of its latent; UserError if it cannot be."""
    grey = torch.zeros(1, 3, side, side, device=next(vae.parameters()).device)
    mean, _ = vae.raw_encode(grey)
    channels, latent = mean.shape[1:3]
    pixels = vae.raw_decode(mean.float())
    if pixels.shape[1] != 3:
        raise UserError(f"{vae.kind}: decodes to {pixels.shape[1]} channels; choose one for RGB")
    if vae.normalises_itself and pixels.shape[-1] != side:
        warn(f"--image-size {side}: {vae.kind} decodes to {pixels.shape[-1]} px whatever it is")
    elif pixels.shape[-1] != side or latent < 2:
        what = f"becomes a latent of {latent} x {latent} and then {pixels.shape[-1]} px again"
        use = "choose a multiple of the VAE's factor, with at least two latents a side"
        raise UserError(f"--image-size {side}: {what}; {use}")
    return channels, latent


@torch.no_grad()
def measure(vae, images, batch_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std (C,) of the latents' samples over the first pictures that can be read."""
    device, count = next(vae.parameters()).device, 0
    total = square = 0
    rows = np.arange(min(len(images.files), STATISTICS_FROM))
    parts = np.split(rows, range(batch_size, len(rows), batch_size))
    for part in progress("statistics: batch", parts):
        pixels = [pixels for pixels, _ in map(images.__getitem__, part) if pixels is not None]
        if pixels:
            pixels = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2)
            moments = vae.raw_encode(pixels / 127.5 - 1)
            mean, std = (moment.double().cpu() for moment in moments)
            total = total + mean.sum(dim=(0, 2, 3))
            square = square + (mean**2 + std**2).sum(dim=(0, 2, 3))
            count += mean[:, 0].numel()
    if not count:
        raise UserError("--normalise data: none of the first pictures can be read; replace them")
    mean = total / count
    return mean, (square / count - mean**2).clamp(min=0).sqrt()


# ---- encode


@dataclass
class Encode:
    verb: str = setting("", positional=True, choices=["encode", "decode"])  # what to do
    vae: str = setting("", help="folder of an autoencoder, as diffusers saves it")
    images: str | None = None  # DIR, with DIR/<class>/**/*.jpg
    out: str = "data/latents"  # latent folder to make
    image_size: int = setting(256, at_least=8)  # side in pixels after the crop
    white: int = setting(65535, at_most=65535)  # the number of white in images of 16 bits
    normalise: str = setting("config", choices=["config", "data"])  # config: by what FOLDER says
    batch_size: int = 64  # images encoded at once
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def encode_folder(args):
    if not args.vae or not args.images:
        raise UserError("give --vae FOLDER and --images DIR")
    device, rank, world = common.setup(args.device)
    vae = load(args.vae).to(device)
    channels, side = prepare(vae, args.image_size)
    said = None
    if args.normalise == "config":
        said = said_statistics(vae, channels)
        if said is None:
            nothing = f"{vae.kind} says neither a scale nor statistics of its latents"
            raise UserError(f"{args.vae}: {nothing}; add --normalise data")
    listed = Images(args.images, args.image_size, args.white) if rank == 0 else None
    images = common.gather(listed)[0]  # one process lists for all
    out = Path(args.out)
    recipe = args.image_size, args.white, args.normalise, vae.identity()
    tag = fingerprint(images.identity, *recipe)[:12]
    _lock = common.lock(out)  # until encode_folder returns
    part, kept = out / f"done-{tag}.part.npy", out / f"statistics-{tag}.part.npy"
    if (out / "meta.json").is_file():
        if LatentFolder(out).meta.get("tag") != tag:
            raise UserError(f"{out}: holds other images' or VAE's latents; choose another --out")
        return say(f"{out}: is complete already")
    strange = [str(path) for path in out.glob("*.part.npy") if path not in (part, kept)]
    if strange or ((out / "moments.npy").exists() and not part.exists()):
        what = "holds unfinished latents of other images or another VAE"
        raise UserError(f"{out}: {what} {strange}; choose another --out, or remove the folder")
    if args.normalise == "data":
        if rank == 0 and not kept.exists():
            with common.atomic_write(kept) as file:
                np.save(file, np.stack(measure(vae, images, args.batch_size)))
        common.gather()  # the others wait for the statistics
        with common.reading(kept, "is damaged; remove it and run the same command again"):
            said = (*np.load(kept), f"the first {min(len(images.files), STATISTICS_FROM)} pictures")
    mean, std, by = said
    vae.normalise_by(mean, std, by)
    common.gather()  # all have looked before the first one writes
    say(f"{vae.kind}: latents {channels} x {side} x {side}, normalised by {vae.says}")
    if "default" in vae.says:
        warn(f"{args.vae}: says no statistics of its own; latents are normalised by {vae.says}")
    shape = (len(images.files), 2 * channels, side, side)
    done = shared_array(part, (len(images.files),), np.uint8, rank)
    moments = shared_array(out / "moments.npy", shape, np.float16, rank)
    encode(images, vae, device, moments, done, args.batch_size, rank, world)
    common.gather()  # wait for the others
    if not done.all():
        raise UserError(f"{out}: some images are not encoded yet; run the same command again")
    if rank == 0:
        meta = {"tag": tag, "image_size": args.image_size, "source": os.path.abspath(args.images)}
        meta["vae"] = {"path": os.path.abspath(args.vae), "identity": vae.identity()}
        meta["vae"].update(decoder="diffusers", kind=vae.kind)
        meta["normalise"] = {"by": vae.says, "mean": vae.mean.tolist(), "std": vae.std.tolist()}
        finish(images, vae, moments, done, meta, out)
        if not 0.7 <= meta["std"] <= 1.4 and args.normalise == "config":
            warn(f"{out}: to have a std of 1, encode with --normalise data into another --out")
        for path in (part, kept):
            path.unlink(missing_ok=True)


# ---- decode


def find_vae(given, meta) -> DiffusersVAE:
    """As vae_latents.find_vae, for latents whose meta.json says that diffusers decodes them."""
    path = given or meta["vae"]["path"]
    vae = load(path)
    if meta["vae"].get("identity") != vae.identity():
        raise UserError(f"{path}: is not the VAE that made the latents; give that one as --vae")
    with common.reading(path, "has no statistics in the latents' meta.json; encode them again"):
        said = meta["normalise"]
        vae.normalise_by(said["mean"], said["std"], said["by"])
    return vae


@dataclass
class Decode:
    verb: str = setting("", positional=True, choices=["encode", "decode"])  # what to do
    samples: str = setting("", positional=True)  # latents.npz of sample.py --latents, or its folder
    vae: str = setting("", help="folder of the autoencoder that made the training latents")
    data: str | None = None  # latent folder of the training (default: what the checkpoint says)
    batch_size: int = 64  # images decoded between two savings
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def training_meta(args, settings: dict) -> dict | None:
    """meta.json of the latents that the network was trained on: --data's, or the checkpoint's that
    the samples name; None where that is not here any more."""
    if args.data:
        return LatentFolder(args.data).meta
    path = Path(str(settings.get("ckpt")))
    if path.is_dir():
        path = next(iter(models.checkpoints(path)), path)
    return models.read_checkpoint(path)["meta"] if path.is_file() else None


def decode_samples(args):
    if not args.vae:
        raise UserError("give --vae FOLDER")
    path = Path(args.samples)
    path = path / "latents.npz" if path.is_dir() else path
    with common.reading(path, "is no file of latents; make one with sample.py --latents"):
        content = {**np.load(path)}
        latents, labels = content["latents"], content["labels"].astype(np.int64, casting="safe")
        settings = json.loads(content["settings"].item()) if "settings" in content else {}
        if latents.dtype != np.float32 or latents.ndim != 4 or labels.shape != latents.shape[:1]:
            raise ValueError(f"latents {latents.dtype} {latents.shape}, labels {labels.shape}")
    meta = training_meta(args, settings)
    if meta is None:
        vae = load(args.vae)
        said = said_statistics(vae, latents.shape[1])
        nothing = f"{path}: its checkpoint is not here, so nothing says how latents were normalised"
        if said is None:
            raise UserError(f"{nothing}; give --data, the latent folder of the training")
        mean, std, by = said
        vae.normalise_by(mean, std, by)
        warn(f"{nothing}; it uses {vae.says}; if they were by --normalise data, give --data")
    elif meta["vae"].get("decoder") != "diffusers":
        raise UserError(f"{path}: is of latents of a VAE file; run sample.py without --latents")
    else:
        vae = find_vae(args.vae, meta)
    if latents.shape[1] != len(vae.mean):
        what = f"has {latents.shape[1]} channels, the VAE's latents {len(vae.mean)}"
        raise UserError(f"{path}: {what}; give the VAE of the training latents")
    source = content["tag"].item() if "tag" in content else fingerprint(latents, labels)
    tag = fingerprint(source, vae.identity(), vae.mean, vae.std)[:12]
    device, rank, world = common.setup(args.device)
    out, samples = path.parent, path.parent / "samples.npz"
    parts = [out / f"{name}-{tag}.part.npy" for name in ("images", "done")]
    _lock = common.lock(out)  # until decode_samples returns
    if samples.exists():
        with common.reading(samples, f"holds other samples; move {path} to a folder of its own"):
            if np.load(samples)["tag"].item() != tag:
                raise ValueError("they are of other settings or weights")
        return say(f"{samples}: is complete already")
    vae = vae.to(device)
    side = to_images(vae, torch.from_numpy(latents[:1])).shape[1]
    images = shared_array(parts[0], (len(latents), side, side, 3), np.uint8, rank)
    done = shared_array(parts[1], (len(latents),), np.uint8, rank)
    todo = chunks_to_do(done, args.batch_size, rank, world)
    for rows in progress("decoded: batch", todo, world):
        images[rows] = to_images(vae, torch.from_numpy(latents[rows]))
        images.flush()
        done[rows] = 1  # when the rows are on disk
    common.gather()  # wait for the others
    if rank == 0:
        classes = len(np.unique(labels))
        columns = min(classes if classes <= 40 else 10, len(images))
        with common.atomic_write(out / "grid.png") as file:
            sample.grid(images[: 10 * columns], columns).save(file, format="PNG")
        settings = json.dumps({**settings, "vae": str(args.vae)})
        with common.atomic_write(samples) as file:
            np.savez(file, arr_0=images, labels=labels, tag=tag, settings=settings)
        for part in parts:
            part.unlink()
        say(f"{samples}: {len(images)} images of {side} px; see {out}/grid.png")


def main():
    deciding = "decode" in sys.argv[1:2]
    args = common.parse_settings(Decode if deciding else Encode, __doc__)
    if args.verb == "decode":
        decode_samples(args)
    else:
        encode_folder(args)


if __name__ == "__main__":
    common.run(main)
