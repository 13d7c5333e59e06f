"""Figures of samples made in another way, as lines of JSON: what the sampling methods share.

pladis.py, policy_swap.py and information_pathways.py measure as experiments.cifar10.frontier does:
same noise, same labels, same judges. What is in --out already is not made again.
"""

from dataclasses import dataclass

import torch

import common
import models
from common import fingerprint, setting
from experiments.cifar10 import frontier
from vae_latents import find_vae


@dataclass
class SampleSettings:
    scales: str = "1"  # guidance scales w, with commas
    mode: str = setting("heun", choices=["euler", "heun"])  # the sampler
    steps: int = 8  # its steps; Heun evaluates twice in each but the last
    num: int = setting(2000, at_least=2)  # samples, of all classes in turn
    seed: int = setting(0, at_least=0)  # of the noise
    judge: str = "out/cifar10/classifier.pt"  # files of judge.py, with commas
    outside: str = "out/outside.pt"  # files of outside.py, with commas
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


class Bench:
    """A checkpoint, its VAE and the judges; `measure` appends the figures of one way to sample."""

    def __init__(self, ckpt, args):
        self.args, (self.device, _, _) = args, common.setup(args.device)
        with common.reading("--scales", "needs numbers with commas, such as 1,1.5,2"):
            self.scales = [float(w) for w in args.scales.split(",")]
        self.judges = frontier.load_judges(args.judge, args.outside, self.device)
        guided = "--scales" if max(self.scales) > 1 else ""
        self.network, self.saved = models.load_checkpoint(ckpt, null_label_for=guided)
        self.vae = find_vae(None, self.saved["meta"])
        size = self.network.input_size * self.vae.factor
        frontier.check_judges(self.judges, ckpt, size, self.network.num_classes)
        self.network = self.network.to(self.device)
        self.vae = self.vae.to(self.device, memory_format=torch.channels_last)

    def measure(self, network, w, others=(), cfg=None, **line) -> dict:
        """The line of `network` at w. cfg: the scale that sample() guides with, if w is not it;
        others: what the samples depend on besides the checkpoint, such as a guide's weights."""
        args = self.args
        known = [judge.identity for judge in self.judges.values()]
        weights = [*self.network.state_dict().values(), *others]
        tag = fingerprint(self.vae.identity(), *known, *weights)[:12]
        line = {**line, "step": self.saved["step"], "w": w, "mode": args.mode, "steps": args.steps}
        line.update(num=args.num, seed=args.seed, tag=tag)
        for old in frontier.read_figures(args.out):
            if line.items() <= old.items():
                return old
        y = torch.arange(args.num) % self.network.num_classes
        cfg = w if cfg is None else cfg
        images = frontier.make_samples(network, self.vae, y, cfg, args, self.device)
        line.update({name: judge.measure(images, y) for name, judge in self.judges.items()})
        line.update(spectrum=frontier.spectrum(images))
        frontier.append(args.out, line)
        return line
