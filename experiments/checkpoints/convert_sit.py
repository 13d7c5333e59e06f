"""A checkpoint of this project from another's, or from an older one of its own.

    python -m experiments.checkpoints.convert_sit repa/0400000.pt out/repa.pt --vae data/sd-vae.pt

For sampling and teaching; such a run is not continued. SOURCE is a checkpoint of REPA or of a work
built on it, or weights alone. What it does not say itself has to be said: the VAE of its latents,
--classes, --path, --prediction. Supported are a linear path and the velocity alone. (SiT's own say
"Linear" and "velocity": their time runs the other way.) OUT is written when it is known to be good.
"""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import models
from common import UserError, say, setting
from vae_latents import load_vae

WRAPPERS = ("module.", "_orig_mod.", "ema_model.", "shadow.")  # of DDP, torch.compile, averages
TABLE = "y_embedder.embedding_table.weight"
NORM = "blocks.0.attn.q_norm.weight"


def unwrapped(state: dict) -> dict:
    """The SiT's own tensors in float32, without wrappers' prefixes and the losses' projectors."""
    for wrapper in 2 * WRAPPERS:  # in any order
        inside = {k.removeprefix(wrapper): v for k, v in state.items() if k.startswith(wrapper)}
        state = inside or state
    return {key: value.float() for key, value in state.items() if not key.startswith("projectors")}


def find_weights(saved: dict) -> dict[str, dict]:
    """{"model" and "ema", as far as they are there: state dict}; weights alone are an average."""
    found = {key: unwrapped(saved[key]) for key in ("model", "ema") if saved.get(key)}
    return found or {"ema": unwrapped(saved.get("state_dict", saved))}


def find_name(state: dict, says: dict) -> str:
    """The name in models.SIZES of a network with these tensors; UserError for none."""
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    width, _, patch, _ = state["x_embedder.proj.weight"].shape
    names = [name for name, size in models.SIZES.items() if size[:2] == (depth, width)]
    if not names:
        raise UserError(f"its {depth} blocks of width {width} are no size in models.SIZES; add one")
    heads = models.SIZES[names[0]].heads
    if NORM in state and len(state[NORM]) != width // heads:
        raise UserError(f"has {width // len(state[NORM])} heads, SiT-{names[0]} has {heads}")
    name = f"SiT-{names[0]}/{patch}"
    if says.get("model", name) != name:
        raise UserError(f"says that it is {says['model']}, but its tensors are those of {name}")
    return name


def said(says: dict, key: str, flag: str, given):
    """What the checkpoint says, else the flag; UserError for neither, or for a contradiction."""
    if says.get(key, given) is None:
        raise UserError(f"does not say its {key}; give {flag}, if you know it")
    if given is not None and says.get(key, given) != given:
        raise UserError(f"{flag} {given}: says itself that its {key} is {says[key]}")
    return says.get(key, given)


def check_objective(state: dict, says: dict, args):
    """UserError unless the network predicts the velocity of a linear path, and that is known."""
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    if len(state["final_layer.linear.bias"]) == 2 * channels * patch**2:
        raise UserError("predicts a variance, too (learn_sigma), which is not supported")
    path = said(says, "path_type", "--path", args.path)
    prediction = said(says, "prediction", "--prediction", args.prediction)
    if (path, prediction) != ("linear", "v"):
        raise UserError(f"its path is {path}, its prediction {prediction}; supported: linear, v")


def add_null_row(state: dict, classes: int, label_drop: float) -> float:
    """The share of dropped labels. A table without a row for the null label gets one of zeros,
    which a share of 0 keeps from being used."""
    rows, width = state[TABLE].shape
    if rows not in (classes, classes + 1):
        raise UserError(f"its label table has {rows} rows, which {classes} classes cannot have")
    if rows > classes:
        return label_drop
    state[TABLE] = torch.cat([state[TABLE], torch.zeros(1, width)])
    return 0.0


def converted(saved: dict, args) -> dict:
    """The content of another project's checkpoint, as one of this project."""
    says, weights, vae = saved.get("args", {}), find_weights(saved), load_vae(args.vae)
    says = says if isinstance(says, dict) else vars(says)
    state = next(iter(weights.values()))
    name, channels = find_name(state, says), state["x_embedder.proj.weight"].shape[1]
    check_objective(state, says, args)
    if channels != vae.latent_channels:
        raise UserError(f"has {channels} channels, --vae {args.vae} has {vae.latent_channels}")
    classes = said(says, "num_classes", "--classes", args.classes)
    drops = [add_null_row(s, classes, says.get("cfg_prob", 0.1)) for s in weights.values()]
    side = models.parse_name(name)[1] * math.isqrt(state["pos_embed"].shape[1])
    meta = {"classes": [str(label) for label in range(classes)], "channels": channels}
    meta.update(height=side, width=side, scale=vae.scale, identity=None)
    meta["vae"] = {"path": os.path.abspath(args.vae), "identity": vae.identity()}
    step = saved.get("steps", saved.get("step"))
    run = {"stage": "converted", "model": name, "label_drop": min(drops), "qk_norm": NORM in state}
    run["ema"], run["ema_ramp"] = 0.9999, step is None  # REPA's decay; of others it is not known
    return {"step": step or 0, "args": run, "meta": meta, **weights}


@dataclass
class Settings:
    source: str = setting("", positional=True)  # checkpoint to convert
    out: str = setting("", positional=True)  # file to write
    vae: str | None = None  # VAE file of its latents, from convert_vae.py or small_vae.py
    classes: int | None = setting(None, at_least=1)  # how many it knows, if it does not say
    path: str | None = setting(None, choices=["linear"])  # its path, if it does not say
    prediction: str | None = setting(None, choices=["v"])  # what it predicts, if it does not say


def convert(saved: dict, args) -> dict:
    if {"config", "source", "scale"} <= saved.keys():
        before = f"convert its checkpoint, {saved['source'].get('ckpt')}"
        raise UserError(f"is an old teacher; {before}, and run build_teacher.py on that")
    if saved.get("format") == models.FORMAT:
        raise UserError("is of today's format already")
    if {"format", "meta"} <= saved.keys():  # format 1, which knew no identity of its latents
        kept = {key: saved[key] for key in ("step", "args", "model", "ema")}
        return {**kept, "meta": {**saved["meta"], "identity": None}}
    if not args.vae:
        raise UserError("does not say what its latents are; give --vae FILE")
    return converted(saved, args)


def main():
    args = common.parse_settings(Settings, __doc__)
    if Path(args.out).exists():
        raise UserError(f"{args.out}: is there already; choose another name")
    try:
        with common.reading(args.source, "is no checkpoint of a SiT with REPA's names"):
            with torch.serialization.safe_globals([argparse.Namespace]):  # REPA's arguments
                saved = common.load_file(args.source)
            content = convert(saved, args)
            kinds = sorted({"model", "ema"} & content.keys())
            for kind in kinds:
                models.build_for(content["args"], content["meta"]).load_state_dict(content[kind])
    except UserError as error:
        raise UserError(f"{args.source}: {str(error).removeprefix(f'{args.source}: ')}") from error
    content.update(
        format=models.FORMAT, identity=None, projector=None, opt=None, projector_opt=None
    )
    with common.atomic_write(args.out) as file:
        torch.save({**content, "sums": [0.0] * 4}, file)
    run = content["args"]
    say(f"{args.out}: {run['model']}, step {content['step']}, --weights {' or '.join(kinds)}")
    if run["label_drop"] == 0:
        say("its null label was never trained: it samples, but neither guides nor teaches")


if __name__ == "__main__":
    common.run(main)
