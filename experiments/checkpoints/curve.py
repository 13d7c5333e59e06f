"""The curve of a run: FID and the rest of fid.py against steps, and a picture of several runs.

    python -m experiments.checkpoints.curve out/stage2 VIRTUAL_imagenet256_labeled.npz \\
        --num-images 10000 --beside out/stage1,out/vanilla --out out/curve.png

For each snapshot-<step>.pt and ckpt-<step>.pt in RUN: samples by sample.py, with the average;
fid.py's figures as one line of RUN/curve.jsonl; then the samples are deleted. The same command goes
on where it was, also with snapshots that have come since. Lines of other settings stay in the file
and out of the picture. --beside names runs whose curves are drawn, too, if they were measured with
the same settings; this command measures RUN alone.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import models
from common import UserError, fingerprint, say, setting, warn
from experiments.checkpoints.plot import new_figure

ROOT = Path(__file__).resolve().parents[2]
PICTURES = (".png", ".pdf", ".svg")
# What sample.py is told. Lines that differ in one of these are not of one curve
SAMPLING = "num_images classes labels mode steps cfg guidance_low guidance_high seed vae".split()


@dataclass
class Settings:
    run: str = setting("", positional=True)  # folder of a run
    reference: str = setting("", positional=True)  # folder of images, or .npz, as fid.py takes it
    beside: str | None = None  # folders of other runs for the picture, with commas
    out: str | None = None  # the picture (default: curve.png in the run's folder)
    metric: str = setting("FID", choices=["FID", "sFID", "IS", "precision", "recall"])  # drawn
    num_images: int = 10_000  # samples for each snapshot, as sample.py, like all that follows
    classes: str | None = None  # names or labels, with commas (default: all)
    labels: str = "balanced"  # classes in turn, or drawn: random
    mode: str = setting("sde", choices=["euler", "heun", "sde"])  # the sampler
    steps: int = 250  # steps of the sampler
    cfg: float = setting(1.0, at_least=1)  # guidance scale; 1: none
    guidance_low: float = setting(0.0, at_least=0, at_most=1)  # guide where t >= this
    guidance_high: float = setting(1.0, at_least=0, at_most=1)  # and t <= this
    seed: int = setting(0, at_least=0)  # seed of all noise
    vae: str | None = None  # VAE to decode with (default: the training latents')
    batch_size: int = 128  # images at once
    inception: str | None = None  # file of Inception weights (default: downloaded)
    processes: int = 1  # sample with torchrun and as many processes
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def script(name: str, *flags, processes=1) -> str:
    """The last line that a script of the root prints; its messages go where this one's go."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name)]
    command += [str(flag) for flag in flags]
    line = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stdout:
            if not line.startswith("{"):  # fid.py's figures
                say(line.rstrip("\n"))
    if process.returncode:
        raise UserError(f"{name}: failed, see above; run the same command again to go on")
    return line


def snapshots(run: Path) -> dict[int, Path]:
    """{step: file} of a run, in order; of a step that has both, the snapshot."""
    found = {}
    for path in sorted(run.glob("*.pt")):  # ckpt- comes before snapshot-
        if match := re.fullmatch(r"(?:ckpt|snapshot)-(\d{7,})\.pt", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def identity(path: Path) -> str:
    """Of the average in a checkpoint: a hash of its last layer, without reading all of it."""
    with common.reading(path, "is no checkpoint with an average"):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return fingerprint(saved["ema"]["final_layer.linear.weight"])[:12]


def read_lines(run: Path) -> list[dict]:
    """The lines of RUN/curve.jsonl."""
    path = run / "curve.jsonl"
    if not path.is_file():
        return []
    with common.reading(path, "is no file of this script; move it away"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        [(line["step"], line["weights"], line["recipe"]) for line in lines]
    return lines


def recipe_of(args) -> dict:
    """What two lines of one curve have in common."""
    recipe = {name: getattr(args, name) for name in SAMPLING}
    recipe["inception"] = args.inception and Path(args.inception).name
    reference = Path(args.reference)  # another path is not another reference
    size = reference.stat().st_size if reference.is_file() else None
    return {**recipe, "reference": reference.name, "reference_bytes": size}


def measure(path: Path, step: int, weights: str, args) -> dict:
    """The line of one snapshot. Its samples lie in RUN/curve while it is measured."""
    tag = fingerprint(recipe_of(args), weights)[:8]  # a killed measurement goes on with its own
    folder = Path(args.run) / "curve" / f"{step:07d}-{tag}"
    flags = ["--ckpt", path, "--out", folder, "--batch-size", args.batch_size]
    for name in SAMPLING:
        if getattr(args, name) is not None:
            flags += [common.flag(name), getattr(args, name)]
    script("sample.py", *flags, "--device", args.device, processes=args.processes)
    flags = [folder, args.reference, "--device", args.device]
    flags += ["--weights", args.inception] if args.inception else []
    figures = json.loads(script("fid.py", *flags))
    shutil.rmtree(folder)
    line = {"step": step, "file": path.name, "weights": weights, "recipe": recipe_of(args)}
    return {**line, **figures}


def measure_all(args) -> list[dict]:
    """The lines of all snapshots of the run, in order; those that are missing are measured."""
    run, recipe, left_out = Path(args.run), recipe_of(args), set()
    while True:
        lines = read_lines(run)
        own = {line["step"]: line for line in lines if line["recipe"] == recipe}
        todo = [step for step in snapshots(run) if step not in own and step not in left_out]
        if not todo:
            return [own[step] for step in sorted(own)]
        path = snapshots(run)[todo[0]]
        try:
            models.load_checkpoint(path)
        except UserError as error:  # hardly trained yet, or removed by a newer one meanwhile
            warn(f"left out: {error}")
            left_out.add(todo[0])
            continue
        say(f"{path}: {len(todo)} left")
        line = measure(path, todo[0], identity(path), args)
        with common.atomic_write(run / "curve.jsonl") as file:
            file.write("".join(json.dumps(each) + "\n" for each in [*lines, line]).encode())


def check_weights(run: Path, recipe: dict):
    """UserError for a line of a run that another one has replaced in the same folder."""
    files = snapshots(run)
    for line in read_lines(run):
        path = files.get(line["step"])
        if path and line["recipe"] == recipe and identity(path) != line["weights"]:
            what = f"its line of step {line['step']} is of other weights than {path}"
            raise UserError(f"{run}/curve.jsonl: {what}; move that file away")


def draw(curves: dict[str, list[dict]], metric: str):
    """A figure of {run: its lines}: a metric against steps."""
    figure = new_figure(6, 4)
    axis = figure.subplots()
    for run, lines in curves.items():
        axis.plot(
            [line["step"] for line in lines], [line[metric] for line in lines], "o-", label=run
        )
    axis.set(xlabel="step", ylabel=metric)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def main():
    args = common.parse_settings(Settings, __doc__)
    run, recipe = Path(args.run), recipe_of(args)
    if not run.is_dir():
        raise UserError(f"{run}: is no folder; give the folder of a run, such as out/stage2")
    if not Path(args.reference).exists():
        raise UserError(f"{args.reference}: is not there; give what fid.py compares with")
    out = Path(args.out or run / "curve.png")
    if out.suffix not in PICTURES:
        raise UserError(f"--out {out}: must end in one of {', '.join(PICTURES)}")
    new_figure(1, 1)  # matplotlib is missing now, or not at the end
    _lock = common.lock(run / "curve")  # until main returns
    check_weights(run, recipe)
    curves = {args.run: measure_all(args)}
    if not curves[args.run]:
        raise UserError(
            f"{run}: has no snapshot that can be measured; give train_stage1.py --snapshots"
        )
    for other in (args.beside or "").split(",") if args.beside else []:
        same = [line for line in read_lines(Path(other)) if line["recipe"] == recipe]
        if not same:
            raise UserError(
                f"{other}: has no curve of these settings; measure it with the same flags"
            )
        curves[other] = sorted(same, key=lambda line: line["step"])
    for name, lines in curves.items():
        if lacking := [line["step"] for line in lines if args.metric not in line]:
            raise UserError(
                f"{name}: has no {args.metric} of steps {lacking}; choose another --metric"
            )
        say(f"{name}: " + ", ".join(f"{line['step']}: {line[args.metric]:g}" for line in lines))
    with common.atomic_write(out) as file:
        draw(curves, args.metric).savefig(file, format=out.suffix[1:], dpi=100)
    say(f"{out}: {args.metric} of {', '.join(curves)}")


if __name__ == "__main__":
    common.run(main)
