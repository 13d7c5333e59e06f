"""Makes a VAE file of this project from an AutoencoderKL as published (SD, SDXL, SD3, FLUX.1).

    python -m experiments.latents.convert_vae sd-vae-ft-ema data/sd-vae.pt --scale 0.18215

SOURCE is a folder of diffusers, or a file: .safetensors, .bin, .pt or .ckpt, with the names of
diffusers or of CompVis, or a whole checkpoint, whose VAE is taken out. Scale and shift stand in
the config.json beside the weights, or are --scale and --shift; no scale is assumed. A plain scale
goes into OUT as it is. A shift, or a mean and a std for each channel, is folded into the two 1 x 1
convolutions: OUT's latents are normalised already, and its scale is 1. Where the weights have no
such convolutions (SD3, FLUX.1), identities take their place. OUT is written when it is known to be
good. Any other autoencoder goes through diffusers itself: experiments/latents/diffusers_vae.py.
"""

import fnmatch
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from common import UserError, say, setting, warn
from vae_latents import AutoencoderKL

KNOWN = """Stable Diffusion 1 and 2 have --scale 0.18215, SDXL --scale 0.13025, SD3 --scale 1.5305
--shift 0.0609, FLUX.1 --scale 0.3611 --shift 0.1159""".replace("\n", " ")
PREFIXES = ("first_stage_model.", "vae.")  # of the VAE inside a whole checkpoint

RENAMED = {  # pattern: name in this project, which is that of diffusers
    r"\.mid\.block_1": ".mid_block.resnets.0",
    r"\.mid\.block_2": ".mid_block.resnets.1",
    r"\.mid\.attn_1": ".mid_block.attentions.0",
    r"\.down\.(\d)\.block": r".down_blocks.\1.resnets",
    r"\.down\.(\d)\.downsample": r".down_blocks.\1.downsamplers.0",
    r"\.nin_shortcut": ".conv_shortcut",
    r"^(\w+)\.norm_out": r"\1.conv_norm_out",
    r"(attentions\.0\.)norm\.": r"\1group_norm.",
    r"(attentions\.0\.)(q|query)\.": r"\1to_q.",  # the second is what diffusers said until 2023
    r"(attentions\.0\.)(k|key)\.": r"\1to_k.",
    r"(attentions\.0\.)(v|value)\.": r"\1to_v.",
    r"(attentions\.0\.)(proj_out|proj_attn)\.": r"\1to_out.0.",
}


class Inert:
    """Stands for every class of another library in a pickle: nothing of theirs is imported."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __init__


def through_diffusers(folder) -> str:
    """The command that encodes with an autoencoder which only diffusers can run."""
    module, rest = "experiments.latents.diffusers_vae", "--images DIR --image-size N --out LATENTS"
    return f"python -m {module} encode --vae {folder} {rest}"


def existing(source) -> Path:
    """The path `source`; UserError if nothing is there, as with a name on the Hugging Face hub."""
    path = Path(source)
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.suffix[1:].isalpha():
        download = f"hf download {source} --local-dir {path.name}"
        whole = "with --include 'vae/*' if it holds more than a VAE"
        there = f"if it is a name on the Hugging Face hub, run `{download}` ({whole})"
        there = f"{there} and give {path.name}"
        raise UserError(f"{source}: is no path on this machine; {there}")
    raise UserError(f"{source}: is no path on this machine; check how it is spelt")


def weights_file(source: Path) -> Path:
    """The file of weights in a folder of diffusers, a VAE's or a whole pipeline's."""
    if not source.is_dir():
        return source
    name = "diffusion_pytorch_model"  # and not a variant of it, such as .fp16
    for file in (f"{name}.safetensors", f"{name}.bin"):
        for path in (source / file, source / "vae" / file):
            if path.is_file():
                return path
    raise UserError(f"{source}: holds no {name}.safetensors or .bin; name the file itself")


def read_tensors(path: Path) -> dict:
    """{name: tensor} of a file of weights, read as plain data."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            install = "run `pip install safetensors`"
            raise UserError(f"{path}: needs the package safetensors; {install}") from error
        with common.reading(path, "is no whole .safetensors file; fetch it again"):
            return load_file(path)
    with common.reading(path, "cannot be read as a file of weights; fetch it again"):
        strangers = []
        if zipfile.is_zipfile(path):
            strangers = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if strangers:
            say(f"{path}: of its {', '.join(strangers)} nothing is read or run")
        with torch.serialization.safe_globals([(Inert, name) for name in strangers]):
            saved = common.load_file(path)
    for key in ("state_dict", "model"):
        saved = saved[key] if isinstance(saved.get(key), dict) else saved
    return saved


def read_config(path: Path) -> dict:
    """The config.json beside the weights, or {}; UserError if it is not of an AutoencoderKL."""
    config = path.parent / "config.json"
    if not config.is_file():
        return {}
    with common.reading(config, "is no config.json of diffusers"):
        says = {**json.loads(config.read_text())}
    kind = says.get("_class_name", "AutoencoderKL")
    if "Autoencoder" not in kind and "VAE" not in kind and "VQ" not in kind:
        what = f"is of {kind}, which is no autoencoder"
        raise UserError(f"{config}: {what}; give the VAE's own folder")
    if kind != "AutoencoderKL":
        what = f"is of {kind}, which a VAE file of this project cannot hold"
        use = f"use it through diffusers: {through_diffusers(path.parent)}"
        raise UserError(f"{config}: {what}; {use}")
    return says


def agreed(name: str, given: float | None, says: dict, path: Path) -> float | None:
    """The number that the flag `given` and the config's entry `name` agree on, or None."""
    found = says.get(name)
    if found is not None and given not in (None, found):
        flag = {"scaling_factor": "--scale", "shift_factor": "--shift"}[name]
        config = path.parent / "config.json"
        raise UserError(f"{flag} {given}: contradicts {config}, which says {found}; leave it out")
    return given if found is None else found


def find_statistics(path: Path, args, says: dict, channels: int):
    """(scale, shift, std): latents are normalised as (z - shift) * scale / std. Shift and std are
    numbers or one number for each channel. UserError where nothing says the scale."""
    scale = agreed("scaling_factor", args.scale, says, path)
    shift = agreed("shift_factor", args.shift, says, path) or 0.0
    mean, std = says.get("latents_mean"), says.get("latents_std")
    config = path.parent / "config.json"
    if scale is None:
        where = f"nothing says its scale: there is no {config} with a scaling_factor"
        raise UserError(f"{path}: {where}; give --scale ({KNOWN})")
    if mean is None and std is None:
        return scale, shift, 1.0
    if shift or mean is None or std is None or len(mean) != channels or len(std) != channels:
        found = f"latents_mean {mean}, latents_std {std}, shift {shift:g}"
        need = f"correct it: both need {channels} numbers, one for each channel, without a shift"
        raise UserError(f"{config}: says {found}; {need}")
    return scale, mean, std


def fold(state: dict, scale: float, shift, std) -> None:
    """Make the encoder answer (z - shift) * scale / std, and the decoder take that."""
    channels = len(state["post_quant_conv.bias"])
    shift, std = (torch.tensor(x, dtype=torch.float64).expand(channels) for x in (shift, std))
    factor = scale / std
    if not (factor > 0).all() or not (factor.isfinite() & shift.isfinite()).all():
        raise ValueError(
            f"shift {shift.tolist()} and std {std.tolist()} must be finite, std above 0"
        )
    rows = torch.cat([factor, torch.ones_like(factor)])
    move = torch.cat([-shift * factor, 2 * factor.log()])  # of the mean; of the log-variance
    weight, bias = (state[f"quant_conv.{name}"].double() for name in ("weight", "bias"))
    state["quant_conv.weight"] = (weight * rows[:, None, None, None]).float()
    state["quant_conv.bias"] = (bias * rows + move).float()
    weight, bias = (state[f"post_quant_conv.{name}"].double() for name in ("weight", "bias"))
    state["post_quant_conv.weight"] = (weight / factor[None, :, None, None]).float()
    state["post_quant_conv.bias"] = (bias + weight[:, :, 0, 0] @ shift).float()


def add_identities(state: dict, says: dict) -> None:
    """Put a 1 x 1 convolution that changes nothing where the weights have none."""
    for name, layer in (("quant_conv", "encoder.conv_out"), ("post_quant_conv", "decoder.conv_in")):
        absent = not any(key.startswith(f"{name}.") for key in state)
        if absent and f"{layer}.weight" in state and says.get(f"use_{name}") is not True:
            channels = state[f"{layer}.weight"].shape[0 if name == "quant_conv" else 1]
            state[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(channels)


def differences(state: dict, says: dict) -> str:
    """What keeps these tensors from being this project's AutoencoderKL; "" for nothing."""
    convs = fnmatch.filter(state, "encoder.down_blocks.*.conv1.weight")
    firsts = sorted(key for key in convs if ".resnets.0." in key)
    if not firsts or "encoder.conv_out.weight" not in state:
        return "it has no encoder with the names of diffusers or CompVis"
    channels = [len(state[key]) for key in firsts]
    latent_channels = len(state["encoder.conv_out.weight"]) // 2
    with torch.device("meta"):
        vae = AutoencoderKL(channels, latent_channels, max(1, len(convs) // len(firsts)))
    shapes = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    missing = [key for key in shapes if key not in state]
    unknown = [key for key in state if key not in shapes]
    found = []
    lower = {
        ".".join(key.split(".")[:3]) for key in unknown if re.search(r"\.attn|attentions", key)
    }
    if lower:
        found.append(f"attention in {', '.join(sorted(lower))}, where this project has none")
    if any("mid_block.attentions" in key for key in missing):
        found.append("no attention in its middle")
    for title, keys in (("Missing key(s)", missing), ("Unexpected key(s)", unknown)):
        some = ", ".join(f'"{key}"' for key in keys[:4])
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        found += [f"{title} in state_dict: {some}{more}."] if keys else []
    if not missing and not unknown:
        wrong = [key for key, shape in shapes.items() if tuple(state[key].shape) != shape]
        of = [f"{key} of shape {tuple(state[key].shape)} for {shapes[key]}" for key in wrong[:4]]
        found += [f"{len(wrong)} tensors of another shape: {', '.join(of)}"] if wrong else []
    groups = vae.encoder.conv_norm_out.num_groups
    for key, ours in (("norm_num_groups", groups), ("act_fn", "silu")):
        if says.get(key, ours) != ours:
            found.append(f"a {key} of {says[key]}, where this project has {ours}")
    return f"it has {'; '.join(found)}" if found else ""


def converted(state: dict) -> dict:
    """The VAE's tensors in float32, with this project's names and shapes."""
    for prefix in PREFIXES:
        if any(key.startswith(f"{prefix}encoder.") for key in state):  # a whole checkpoint
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    ups = {int(key.split(".")[2]) for key in state if key.startswith("decoder.up.")}
    names = dict(RENAMED)
    for i in ups:  # CompVis counts the decoder's stages from the finest
        names[rf"\.up\.{i}\.block"] = f".up_blocks.{max(ups) - i}.resnets"
        names[rf"\.up\.{i}\.upsample"] = f".up_blocks.{max(ups) - i}.upsamplers.0"
    renamed = {}
    for key, value in state.items():
        for pattern, new in names.items():
            key = re.sub(pattern, new, key)
        if "attentions" in key and value.dim() == 4:  # a 1 x 1 convolution is a linear layer
            value = value[:, :, 0, 0]
        renamed[key] = value.float().contiguous()
        if not value.isfinite().all():
            raise ValueError(f"{key} is not finite")
    return renamed


@dataclass
class Settings:
    source: str = setting("", positional=True)  # folder of diffusers, or a file of weights
    out: str = setting("", positional=True)  # file to write
    scale: float | None = setting(None, above=0)  # scaling factor (default: config.json's)
    shift: float | None = None  # shift factor (default: config.json's, or none)


def main():
    args = common.parse_settings(Settings, __doc__)
    if Path(args.out).exists():
        raise UserError(f"{args.out}: is there already; choose another name")
    source = existing(args.source)
    path = weights_file(source)
    says = read_config(path)
    state = read_tensors(path)
    with common.reading(path, "is no VAE with the names of diffusers or CompVis"):
        state = converted(state)
    bare = "quant_conv.weight" not in state
    add_identities(state, says)
    if problem := differences(state, says):
        make = "" if says else "make a folder of diffusers of it (save_pretrained) and "
        command = through_diffusers(path.parent if says else "FOLDER")
        use = f"{make}use it through diffusers: {command}"
        raise UserError(f"{path}: is no VAE that a file of this project holds: {problem}; {use}")
    channels = len(state["post_quant_conv.bias"])
    scale, shift, std = find_statistics(path, args, says, channels)
    if bare and not says and args.shift is None:
        what = "it has no quant_conv, as SD3's and FLUX.1's, whose latents have a shift"
        warn(f"{path}: {what}; if it is one of them, give --shift ({KNOWN})")
    if shift or std != 1.0:
        with common.reading(path, "has statistics that cannot be folded in; correct config.json"):
            fold(state, scale, shift, std)
        scale = 1.0
    with common.atomic_write(args.out) as file:
        torch.save({"model": state, "scale": scale}, file)
    say(f"{args.out}: latents of {channels} channels, scale {scale}")


if __name__ == "__main__":
    common.run(main)
