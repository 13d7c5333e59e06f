"""Modular Diffusion Policy Training (arXiv 2506.03154): the guide is swapped at sampling.

    python -m experiments.methods.policy_swap own=out/N-2 seed1=out/N-1 --student out/stage2

The paper trains a guide first, freezes it, trains the diffusion with it, and may then swap it for a
guide that was never trained with it; its spread of scores falls (IQR - 86 %) if both saw the same
data. Ours, and guessed: the guide is stage 1's whole network, from which the student's teacher was
cut, and guides as guide_by.py's `small` does: v + (w - 1) (v'(label) - v'(null label)). Not the
paper's: no robots, no returns. Each NAME=PATH is a guide. One of another VAE's latents is told in
its line (`same_latents`): it answers in other coordinates, so it must fail. `range` and `sd` are
over the guides of the same latents.
"""

import statistics
from dataclasses import dataclass

import common
import models
from common import UserError, say
from experiments.cifar10 import frontier
from experiments.cifar10.guide_by import ClassDirection
from experiments.methods.sampled import Bench, SampleSettings


class Guided(ClassDirection):
    """The student and a guide at scale w, as a network that make_samples can use."""

    def __init__(self, student, guide, w):
        super().__init__(student, guide)
        self.w, self.num_classes = w, student.num_classes
        self.in_channels, self.input_size = student.in_channels, student.input_size


@dataclass
class Settings(SampleSettings):
    student: str = "out/stage2"  # run, or a checkpoint
    scales: str = "2"  # w, with commas
    out: str = "out/policy_swap.jsonl"  # file of the figures


def load_guides(paths, student, meta) -> dict:
    """{name: (the guide, whether its latents are the student's)}; UserError if it cannot fit."""
    guides = {}
    for name, path in paths.items():
        guide, saved = models.load_checkpoint(path, null_label_for=name)
        shapes = [(m.in_channels, m.input_size, m.num_classes) for m in (student, guide)]
        if shapes[0] != shapes[1]:
            problem = f"has channels, side, classes {shapes[1]}, the student {shapes[0]}"
            raise UserError(f"{name}={path}: {problem}; give a guide of latents of this shape")
        guides[name] = guide, saved["meta"]["vae"]["identity"] == meta["vae"]["identity"]
    return guides


def spread(lines) -> str:
    """Mean, range and standard deviation of what each judge says, over guides."""
    words = []
    for judge in (key for key, value in lines[0].items() if isinstance(value, dict)):
        for key in ("distance", "class"):
            values = [line[judge][key] for line in lines]
            far = max(values) - min(values)
            sd = statistics.stdev(values)
            words.append(
                f"{judge} {key} {statistics.mean(values):.4g}, range {far:.3g}, sd {sd:.2g}"
            )
    return "; ".join(words)


def main():
    paths = frontier.named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    if not paths:
        raise UserError("policy_swap.py: has no guide; give NAME=PATH ...")
    bench = Bench(args.student, args)
    guides = load_guides(paths, bench.network, bench.saved["meta"])
    for w in bench.scales:
        fair = []
        for name, (guide, same) in guides.items():
            network = Guided(bench.network, guide, w).to(bench.device)
            others = guide.state_dict().values()
            how = {"student": args.student, "guide": name, "same_latents": same}
            line = bench.measure(network, w, others, cfg=1, **how)
            fair += [line] if same else []
        if len(fair) > 1:
            say(f"w = {w:g}, {len(fair)} guides of the same latents: {spread(fair)}")


if __name__ == "__main__":
    common.run(main)
