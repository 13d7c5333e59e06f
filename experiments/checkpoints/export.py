"""A run's weights as a file for other people's code, in REPA's names or, with --for sit, in SiT's.

    python -m experiments.checkpoints.export out/stage2 out/sit.safetensors

The average, in float32, for REPA's `SiT` (its projectors are missing: load with strict=False) or
SiT's. REPA's time is this project's: 0 is data, 1 is noise, the velocity is noise - data. SiT's
runs the other way; for it the network is turned exactly, and its variance is zeros. OUT.pt instead
of OUT.safetensors holds {"ema": weights}, as both projects' scripts read it. Latents are scaled by
what the last line says. convert_sit.py makes the same checkpoint of OUT again. What happens to the
weights elsewhere, in samplers, too, is in docs/elsewhere.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import models
from common import UserError, say, setting
from experiments.checkpoints.convert_sit import to_sit


@dataclass
class Settings:
    ckpt: str = setting("", positional=True)  # a run's folder, or a checkpoint
    out: str = setting("", positional=True)  # file to write: .safetensors or .pt
    for_: str = setting("repa", choices=["repa", "sit"])  # whose names, time and sign
    weights: str = setting("ema", choices=["ema", "model"])  # which of the checkpoint's


def exported(saved: dict, weights: str, kind: str) -> tuple[dict, dict]:
    """(State dict, what it says of itself, as `kind`'s own checkpoints do) of a checkpoint."""
    args, meta = saved["args"], saved["meta"]
    state = {key: value.detach().clone().contiguous() for key, value in saved[weights].items()}
    says = {"model": args["model"], "path_type": "linear", "prediction": "v"}
    if kind == "sit":
        if args["qk_norm"]:
            why = "normalises q and k, which SiT's network does not"
            raise UserError(f"{why}; export it without --for sit")
        state = to_sit(state)
        says.update(path_type="Linear", prediction="velocity")
    says.update(num_classes=len(meta["classes"]), cfg_prob=args["label_drop"], scale=meta["scale"])
    says.update(classes=meta["classes"], steps=saved["step"], weights=weights)
    says.update(qk_norm=args["qk_norm"], ema_ramp=True)  # a trained average, whatever its step
    return state, says


def main():
    args = common.parse_settings(Settings, __doc__)
    out = Path(args.out)
    if out.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{out}: has another ending; give it .safetensors or .pt")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name")
    if out.suffix == ".safetensors":
        try:
            import safetensors.torch
        except ImportError as error:
            missing = f"{out}: safetensors is missing; pip install safetensors, or name OUT .pt"
            raise UserError(missing) from error
    _, saved = models.load_checkpoint(args.ckpt, args.weights)
    try:
        state, says = exported(saved, args.weights, args.for_)
    except UserError as error:
        raise UserError(f"{args.ckpt}: {error}") from error
    with common.atomic_write(out) as file:
        if out.suffix == ".pt":
            torch.save({"ema": state, "args": says}, file)
        else:
            metadata = {"format": "pt", "args": json.dumps(says)}
            file.write(safetensors.torch.save(state, metadata))
    what = f"{says['model']}, step {says['steps']}, of {args.weights}, for {args.for_}"
    time = "t = 1 is data" if args.for_ == "sit" else "t = 0 is data"
    table = f"{says['num_classes']} classes and the null label"
    say(f"{out}: {what}: {time}; latents times {says['scale']:g}; {table}")
    if says["cfg_prob"] == 0:
        say("its null label was never trained: no guidance with it")


if __name__ == "__main__":
    common.run(main)
