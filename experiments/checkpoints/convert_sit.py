"""A checkpoint of this project from another's, or from an older one of its own.

    python -m experiments.checkpoints.convert_sit repa/0400000.pt out/repa.pt --vae data/sd-vae.pt

For sampling and teaching; such a run is not continued. SOURCE is a checkpoint of REPA, of a work
built on it, or of SiT (willisma/SiT), or weights alone: .pt or .safetensors, export.py's, too. What
it does not say itself has to be said: the VAE of its latents, --classes, --path, --prediction, and
--from sit. Supported are a linear path and the velocity alone. OUT is written when it is known to
be good.

SiT's own checkpoints convert exactly, although their time runs from noise to data: see `from_sit`.
Weights alone with twice the output channels may be DiT's, too, which nothing in them tells; those
predict noise, and become nothing but noise here.
"""

import argparse
import json
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
TIME = "t_embedder.mlp.0.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
# What each project's checkpoints call its path and its prediction, and what REPA calls them
WORDS = {
    "repa": {"linear": "linear", "cosine": "cosine", "v": "v"},
    "sit": {"Linear": "linear", "velocity": "v"},
}
WORDS["sit"].update((word, word) for word in ("GVP", "VP", "score", "noise"))  # not supported


def read(path) -> dict:
    """What a checkpoint file holds. Weights alone in .safetensors say what their metadata says."""
    if Path(path).suffix != ".safetensors":
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA's arguments
            return common.load_file(path)
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{path}: safetensors is missing; pip install safetensors") from error
    with safe_open(path, "pt") as file:
        says = json.loads((file.metadata() or {}).get("args", "{}"))
        return {"args": says, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}


def unwrapped(state: dict) -> dict:
    """The SiT's own tensors in float32, without wrappers' prefixes and the losses' projectors. (A
    matrix of times that was turned is in float64 and stays so: see `turned`.)"""
    for wrapper in 2 * WRAPPERS:  # in any order
        inside = {k.removeprefix(wrapper): v for k, v in state.items() if k.startswith(wrapper)}
        state = inside or state
    own = {key: value for key, value in state.items() if not key.startswith("projectors")}
    kept = {TIME} if own.get(TIME, torch.zeros(0)).dtype == torch.float64 else set()
    return {key: value if key in kept else value.float() for key, value in own.items()}


def find_weights(saved: dict, says: dict) -> dict[str, dict]:
    """{"model" and "ema", as far as they are there: state dict}; weights alone are an average,
    unless they say that they are not."""
    found = {key: unwrapped(saved[key]) for key in ("model", "ema") if saved.get(key)}
    found = found or {"ema": unwrapped(saved.get("state_dict", saved))}
    return {"model": found["ema"]} if says.get("weights") == "model" else found


# ---- SiT's own: t = 1 is data there, the velocity is data - noise, and there is a variance, too


def turned(weight: torch.Tensor) -> torch.Tensor:
    """A time MLP's first matrix (D, 256), for times that run the other way. With w one of the 128
    frequencies, cos w(1 - t) = cos w cos wt + sin w sin wt, and sin w(1 - t) = sin w cos wt -
    cos w sin wt: so the sinusoids of 1 - t are a fixed reflection of those of t, which the matrix
    takes in. It is its own inverse. The result is in float64, so that turning it again gives
    back what it was made of, and that in float32 if it was."""
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double()
    cos, sin = frequency.cos(), frequency.sin()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    result = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    rounding = (result.float() - result).abs().max()  # the first time 6e-8, the second 2e-16
    return result.float() if rounding < 1e-12 * result.abs().max() else result


def from_sit(state: dict) -> dict:
    """The same network with REPA's time and sign, without SiT's variance: v(x, t) = -SiT(x, 1 - t).
    The last layer answers with p * p cells of 2C channels; a cell's first C are the velocity."""
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    state = {**state, TIME: turned(state[TIME])}
    for key in OUTPUT:
        cells = state[key].unflatten(0, (patch**2, 2 * channels))
        state[key] = -cells[:, :channels].flatten(0, 1)
    return state


def to_sit(state: dict) -> dict:
    """The inverse of `from_sit`; SiT drops the variance half, which is zeros."""
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    state = {**state, TIME: turned(state[TIME])}
    for key in OUTPUT:
        cells = -state[key].unflatten(0, (patch**2, channels))
        state[key] = torch.cat([cells, torch.zeros_like(cells)], dim=1).flatten(0, 1)
    return state


def find_kind(state: dict, says: dict, given: str | None) -> str:
    """ "sit" or "repa": whose time, sign and output channels the network has."""
    words = [says[key] for key in ("path_type", "prediction") if key in says]
    spoken = {kind for kind in WORDS for word in words if word in WORDS[kind]}
    if len(spoken) > 1 or given and spoken - {given}:
        other = f"--from {given}" if given else "one project alone"
        raise UserError(f"says {' and '.join(words)}, which is not of {other}; leave out --from")
    kind = given or next(iter(spoken), "repa")
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    twice = len(state[OUTPUT[1]]) == 2 * channels * patch**2
    if kind == "repa" and twice:
        ways = "if it is SiT's own, give --from sit; DiT's predict noise and are not supported"
        raise UserError(f"predicts a variance, too (learn_sigma); {ways}")
    if kind == "sit" and (NORM in state or not twice):
        why = "normalises q and k" if NORM in state else "predicts no variance (learn_sigma)"
        words = f"says {' and '.join(words)}, but " if spoken else ""
        raise UserError(f"{words}{why}, as no checkpoint of SiT's does; leave out --from sit")
    return kind


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


def check_objective(says: dict, kind: str, args):
    """UserError unless the network predicts the velocity of a linear path, and that is known."""
    says = {key: WORDS[kind].get(str(value), value) for key, value in says.items()}
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
    says, vae = saved.get("args", {}), load_vae(args.vae)
    says = says if isinstance(says, dict) else vars(says)
    weights = find_weights(saved, says)
    state = next(iter(weights.values()))
    name, channels = find_name(state, says), state["x_embedder.proj.weight"].shape[1]
    kind = find_kind(state, says, args.from_)
    check_objective(says, kind, args)
    if kind == "sit":
        weights = {key: from_sit(value) for key, value in weights.items()}
    if channels != vae.latent_channels:
        raise UserError(f"has {channels} channels, --vae {args.vae} has {vae.latent_channels}")
    if says.get("scale", vae.scale) != vae.scale:
        raise UserError(f"has latents of scale {says['scale']}, --vae {args.vae} has {vae.scale}")
    classes = said(says, "num_classes", "--classes", args.classes)
    drops = [add_null_row(s, classes, says.get("cfg_prob", 0.1)) for s in weights.values()]
    side = models.parse_name(name)[1] * math.isqrt(state["pos_embed"].shape[1])
    names = says.get("classes", [str(label) for label in range(classes)])  # export.py keeps names
    if len(names) != classes:
        raise UserError(f"names {len(names)} classes and says that it has {classes}")
    meta = {"classes": list(names), "channels": channels}
    meta.update(height=side, width=side, scale=vae.scale, identity=None)
    meta["vae"] = {"path": os.path.abspath(args.vae), "identity": vae.identity()}
    step = saved.get("steps", saved.get("step", says.get("steps")))
    run = {"stage": "converted", "model": name, "label_drop": min(drops), "qk_norm": NORM in state}
    run["ema"] = 0.9999  # REPA's; where the step is not known, the average counts as trained
    run["ema_ramp"] = says.get("ema_ramp", step is None)
    return {"step": step or 0, "args": run, "meta": meta, **weights}


@dataclass
class Settings:
    source: str = setting("", positional=True)  # checkpoint to convert
    out: str = setting("", positional=True)  # file to write
    vae: str | None = None  # VAE file of its latents, from convert_vae.py or small_vae.py
    from_: str | None = setting(None, choices=["repa", "sit"])  # whose it is, if it does not say
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
            saved = read(args.source)
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
