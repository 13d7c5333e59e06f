"""Rewrite a VAE file with CompVis' names (Stable Diffusion's .ckpt) with those of diffusers.

    python experiments/convert_vae.py vae-ft-ema-560000-ema-pruned.ckpt data/vae.pt

A whole Stable Diffusion checkpoint serves as well: its VAE is taken out.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from models import say, setting

import torch

from vae_latents import load_vae

RENAMED = {
    r"\.mid\.block_1": ".mid_block.resnets.0",
    r"\.mid\.block_2": ".mid_block.resnets.1",
    r"\.mid\.attn_1": ".mid_block.attentions.0",
    r"\.down\.(\d)\.block": r".down_blocks.\1.resnets",
    r"\.down\.(\d)\.downsample": r".down_blocks.\1.downsamplers.0",
    r"\.nin_shortcut": ".conv_shortcut",
    r"^(\w+)\.norm_out": r"\1.conv_norm_out",
    r"(attentions\.0\.)norm\.": r"\1group_norm.",
    r"(attentions\.0\.)q\.": r"\1to_q.",
    r"(attentions\.0\.)k\.": r"\1to_k.",
    r"(attentions\.0\.)v\.": r"\1to_v.",
    r"(attentions\.0\.)proj_out\.": r"\1to_out.0.",
}


def converted(state: dict) -> dict:
    """The VAE's tensors in a CompVis state dict, with diffusers' names and shapes."""
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
        renamed[key] = value
    return renamed


@dataclass
class Settings:
    source: str = setting("", "the .ckpt or .pt file with CompVis' names", positional=True)
    out: str = setting("", "file to write", positional=True)


def main():
    args = models.parse_settings(Settings, __doc__)
    file = models.load_file(args.source)
    with models.reading(f"{args.source}, as a VAE with CompVis' names,"):
        state = converted(file.get("state_dict", file))
    with models.atomic_write(args.out) as out:
        torch.save({"model": state, "scale": 0.18215}, out)
    load_vae(args.out)  # or the error says what is missing
    say(f"{args.out}: {len(state)} tensors, ready for vae_latents.py --vae")


if __name__ == "__main__":
    models.run(main)
