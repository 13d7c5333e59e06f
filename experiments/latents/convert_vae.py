"""A VAE file of this project from Stable Diffusion's weights, in the forms in which they come.

    python -m experiments.latents.convert_vae sd-vae-ft-ema data/sd-vae.pt --scale 0.18215

SOURCE is a folder of diffusers, or a file: .safetensors, .bin, .pt or .ckpt, with the names of
diffusers or of CompVis, or a whole Stable Diffusion checkpoint, whose VAE is taken out. The scale
is the scaling factor in the config.json beside the weights, or --scale; none is assumed. (Stable
Diffusion 1 and 2 have 0.18215, SDXL has 0.13025.) OUT is written when it is known to be good.
"""

import json
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from common import UserError, say, setting
from vae_latents import load_vae

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
    with common.reading(path, "cannot be read (.safetensors needs `pip install safetensors`)"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
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


def find_scale(path: Path, given: float | None) -> float:
    """The scale in the config.json beside the weights, or the given one; UserError for neither."""
    config, says = path.parent / "config.json", {}
    if config.is_file():
        with common.reading(config, "is no config.json of diffusers"):
            says = {**json.loads(config.read_text())}
    if says.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(f"{config}: is of {says['_class_name']}; supported is AutoencoderKL")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if says.get(name):
            raise UserError(f"{config}: has a {name} of {says[name]}; supported is a scale alone")
    found = says.get("scaling_factor") or given
    if found is None:
        known = "0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL"
        raise UserError(f"{path}: no {config} with a scaling_factor; give --scale ({known})")
    if given not in (None, found):
        raise UserError(f"--scale {given}: {config} says {found}")
    return found


def converted(state: dict) -> dict:
    """The VAE's tensors in float32, with this project's names and shapes."""
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in state):  # a whole Stable Diffusion checkpoint
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


def main():
    args = common.parse_settings(Settings, __doc__)
    if Path(args.out).exists():
        raise UserError(f"{args.out}: is there already; choose another name")
    path = weights_file(Path(args.source))
    state = read_tensors(path)
    with common.reading(path, "is no VAE with the names of diffusers or CompVis"):
        content = {"model": converted(state), "scale": find_scale(path, args.scale)}
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "vae.pt"
        torch.save(content, trial)
        try:
            vae = load_vae(trial)
        except UserError as error:
            raise UserError(str(error).replace(str(trial), str(path))) from error
    with common.atomic_write(args.out) as file:
        torch.save(content, file)
    say(f"{args.out}: latents of {vae.latent_channels} channels, scale {vae.scale}")


if __name__ == "__main__":
    common.run(main)
