"""L_diff in ten ranges of t, of checkpoints' averages, on latents that they have not seen.

    python -m experiments.cifar10.loss_by_t vanilla=out/vanilla guided=out/stage2 --data HELD

Prints a line of JSON for each NAME=CHECKPOINT. `label` has the mean of |v_theta - v|^2 in each
tenth of [0, 1], `null` the same for the null label. `minus_first` has the differences to the first
checkpoint's `label`, `error` their standard errors. Images, noise and t are the same for all, so
that a difference is much surer than the losses themselves. vae_latents.py makes HELD.
"""

import json
from dataclasses import dataclass

import torch

import common
import models
from common import UserError, progress, say, setting
from experiments.cifar10.frontier import named_checkpoints
from vae_latents import LatentFolder

BINS = 10
BATCH = 200  # images at once


@dataclass
class Settings:
    data: str = "data/cifar10-held"  # latent folder of images that no checkpoint was trained on
    num: int = setting(1000, at_least=2)  # images, each of which has one t in each range
    seed: int = setting(0, at_least=0)  # of images, noise and t
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


@torch.no_grad()
def losses(network, folder, num, seed, device) -> dict:
    """{"label": (num, BINS), "null": (num, BINS)}: each image's loss in each range of t."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(folder), generator=generator)[:num].sort()[0]
    found = {"label": [], "null": []}
    for batch in progress("losses: batch", rows.split(BATCH)):
        moments, y = folder.read(batch)
        mean, std = moments.float().cpu().chunk(2, dim=1)
        x0 = folder.meta["scale"] * (mean + std * torch.randn(mean.shape, generator=generator))
        columns = {"label": [], "null": []}
        for number in range(BINS):
            eps = torch.randn(x0.shape, generator=generator)
            t = (number + torch.rand(len(x0), generator=generator)) / BINS
            level = t.view(-1, 1, 1, 1)
            x_t, velocity = ((1 - level) * x0 + level * eps).to(device), (eps - x0).to(device)
            for kind, labels in (("label", y), ("null", torch.full_like(y, network.num_classes))):
                answer = network(x_t, t.to(device), labels.to(device))[0]
                columns[kind].append((answer - velocity).square().flatten(1).mean(dim=1).cpu())
        for kind, parts in columns.items():
            found[kind].append(torch.stack(parts, dim=1))
    return {kind: torch.cat(parts).double() for kind, parts in found.items()}


def main():
    names = named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    if not names:
        raise UserError("loss_by_t.py: has no checkpoint; give NAME=PATH ...")
    device, _, _ = common.setup(args.device)
    folder, first = LatentFolder(args.data), None
    if args.num > len(folder):
        raise UserError(f"--num {args.num}: {args.data} has {len(folder)} images; give fewer")
    for name, path in names.items():
        network, saved = models.load_checkpoint(path, null_label_for="the loss of the null label")
        same = [(meta["vae"]["identity"], meta["classes"]) for meta in (saved["meta"], folder.meta)]
        if same[0] != same[1]:
            raise UserError(f"{path}: is of another VAE or other classes; give another --data")
        found = losses(network.to(device), folder, args.num, args.seed, device)
        first = found if first is None else first
        difference = found["label"] - first["label"]
        columns = {"label": found["label"].mean(dim=0), "null": found["null"].mean(dim=0)}
        columns["minus_first"] = difference.mean(dim=0)
        columns["error"] = difference.std(dim=0) / args.num**0.5
        line = {"name": name, "step": saved["step"], "num": args.num, "seed": args.seed}
        line["t"] = [(number + 0.5) / BINS for number in range(BINS)]
        line.update({key: [round(v, 5) for v in value.tolist()] for key, value in columns.items()})
        say(json.dumps(line))


if __name__ == "__main__":
    common.run(main)
