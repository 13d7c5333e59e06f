"""Distance and class by how one guides: `none`, `cfg`, `small`, or Internal Guidance, `internal`.

    python -m experiments.cifar10.guide_by out/stage2 --by small --small out/stage1 --judge FILES

`small` is v + (w - 1) (v'(label) - v'(null label)): v' of stage 1's whole network, averaged as the
student is. The noise is always the same. Each figure is a line of JSON in --out, never made twice.
`evaluations`: of the student, an image. `share`: what the small network adds to the cost of one.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import common
import models
from common import UserError, fingerprint, say, setting
from experiments.cifar10 import judge
from experiments.methods.internal_guidance import InternalGuidance
from sample import initial_noise, sample
from vae_latents import find_vae, to_images


@dataclass
class Settings:
    ckpt: str = setting("out/stage2", positional=True)  # the student: a run, or a checkpoint
    by: str = setting("small", choices=["none", "cfg", "small", "internal"])  # how to guide
    small: str = "out/stage1"  # the small network: a run, or a checkpoint
    mode: str = setting("euler", choices=["euler", "heun"])  # the sampler
    steps: str = "4,8,16,32,64"  # its steps, with commas
    scales: str = "1.5,2,2.5,3"  # w, with commas
    num: int = setting(5000, at_least=2)  # samples, of all classes in turn
    judge: str = "out/cifar10/classifier.pt"  # files of judge.py, with commas
    out: str = "out/guide_by.jsonl"  # file of the figures
    compile: bool = False  # torch.compile the student


class ClassDirection(nn.Module):
    def __init__(self, student, small):
        super().__init__()
        self.student, self.small = student, small

    def forward(self, x, t, y):
        null = torch.full_like(y, self.small.num_classes)
        direction = self.small(x, t, y)[0] - self.small(x, t, null)[0]
        return (self.student(x, t, y)[0] + (self.w - 1) * direction,)


def main():
    args = common.parse_settings(Settings, __doc__)
    device, _, _ = common.setup()
    with common.reading("--steps, --scales", "need numbers with commas"):
        lengths = [int(steps) for steps in args.steps.split(",")]
        scales = [float(w) for w in args.scales.split(",")] if args.by != "none" else [1.0]
    student, saved = models.load_checkpoint(args.ckpt, null_label_for="--by cfg")
    network = InternalGuidance(student, saved) if args.by == "internal" else student
    share, meta = 0.0, saved["meta"]
    if args.by == "small":
        small, other = models.load_checkpoint(args.small, null_label_for="--by small")
        both = [(m["vae"]["identity"], m["height"], m["classes"]) for m in (meta, other["meta"])]
        if both[0] != both[1]:
            raise UserError(f"--small {args.small}: is of other latents than {args.ckpt}")
        network = ClassDirection(student, small)
        share = round(2 * small.forward_flops() / student.forward_flops(), 4)
    vae, out = find_vae(None, meta), Path(args.out)
    judges = {path: judge.load(path) for path in args.judge.split(",")}
    weights = [*network.state_dict().values(), *(known["mu"] for _, known in judges.values())]
    tag = fingerprint(vae.identity(), *weights)[:12]
    with common.reading(out, "is no file of figures; choose another --out"):
        out.touch()
        known = [json.loads(line) for line in out.read_text().splitlines()]
    network, vae = network.to(device), vae.to(device, memory_format=torch.channels_last)
    student.compile(dynamic=False, disable=not args.compile)
    shape, null = (student.in_channels, student.input_size, student.input_size), student.num_classes
    y = torch.arange(args.num) % null
    for steps, w in itertools.product(lengths, scales):
        cfg, branches = (w, 2) if args.by == "cfg" else (1.0, 1)
        calls = steps if args.mode == "euler" else 2 * steps - 1  # Heun's last step has one
        figure = {"ckpt": args.ckpt, "by": args.by, "mode": args.mode, "w": w, "steps": steps}
        figure.update(evaluations=calls * branches, share=share, num=args.num, tag=tag)
        if any(figure.items() <= line.items() for line in known):
            continue
        network.w, images = w, []
        for rows in torch.arange(args.num).split(125):
            noise, labels = initial_noise(0, rows.tolist(), shape)[0], y[rows].to(device)
            x0 = sample(network, noise.to(device), labels, null, steps, args.mode, cfg)
            images.append(torch.from_numpy(to_images(vae, x0)))
        for path, (cnn, facts) in judges.items():
            figure[path] = judge.measure(cnn, facts, torch.cat(images), y)
        with open(out, "a") as file:
            file.write(json.dumps(figure) + "\n")
        say(json.dumps(figure))


if __name__ == "__main__":
    common.run(main)
