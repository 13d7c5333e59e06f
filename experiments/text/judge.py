"""A judge of drawn captions: colour and shape of each figure, and which one is on the left.

    python -m experiments.text.judge --vae data/text-vae.pt --out data/text-judge.pt

A CNN with five answers, trained on fresh drawings of all captions and on their round trips through
the VAE. It prints what it answers right of other drawings of the captions that are held out, and of
their round trips, which is the best that samples can be. compare.py calls it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UserError, progress, say, setting
from experiments.latents.small_vae import from_uint8
from experiments.text.captions import COLOURS, SHAPES, draw_caption, grammar, groups
from vae_latents import load_vae, to_images

ANSWERS = {"second": 2, "colour 1": 6, "shape 1": 6, "colour 2": 6, "shape 2": 6}  # left to right


class Judge(nn.Module):
    """Images (n, 32, 32, 3) uint8 -> logits of each of ANSWERS, in a list."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for channels in (32, 64, 128):
            layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
            before = channels
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * before, 26))

    def forward(self, images):
        return self.layers(from_uint8(images)).split([*ANSWERS.values()], dim=1)


def truth(shown) -> list[int]:
    """The right ANSWERS; -1 for the second figure's, if there is one figure."""
    kinds = [kind.split() for kind in shown]
    places = [(list(COLOURS).index(colour), SHAPES.index(shape)) for colour, shape in kinds]
    places += [(-1, -1)] * (2 - len(places))
    return [len(shown) - 1, *places[0], *places[1]]


def drawings(captions, num, seed) -> tuple[torch.Tensor, torch.Tensor]:
    """(Images (num, 32, 32, 3) uint8, truths (num, 5)) of some of `captions`, drawn anew."""
    images, truths, shows = [], [], grammar()
    for index in range(num):
        rng = np.random.default_rng((seed, index))
        shown = shows[captions[rng.integers(len(captions))]]
        images.append(np.asarray(draw_caption(shown, rng)))
        truths.append(truth(shown))
    return torch.from_numpy(np.stack(images)), torch.tensor(truths)


@torch.no_grad()
def round_trips(vae, images) -> torch.Tensor:
    """Images as the VAE gives them back, (n, 32, 32, 3) uint8."""
    parts = []
    for part in images.split(500):
        mean, _ = vae.encode(from_uint8(part))
        parts.append(torch.from_numpy(to_images(vae, vae.scale * mean)))
    return torch.cat(parts)


@torch.no_grad()
def answers(judge, images) -> torch.Tensor:
    """(n, 5) int64."""
    found = [[logits.argmax(dim=1) for logits in judge(part)] for part in images.split(500)]
    return torch.cat([torch.stack(part, dim=1) for part in found])


def right(found, truths) -> torch.Tensor:
    """(n,) bool: all that the caption says is there, and no second figure if it has one."""
    return ((found == truths) | (truths < 0)).all(dim=1)


def figures(found, truths) -> dict[str, float]:
    """Shares: colour and shape, of the places in images of two figures; both figures, in any order,
    of these images; their order, of those that have both; all, of all images, is `right`."""
    both = truths[:, 0] == 1
    found_two, truths_two = found[both], truths[both]
    same = (found_two == truths_two).double()
    ordered = right(found_two, truths_two)
    swapped = right(found_two, truths_two[:, [0, 3, 4, 1, 2]])
    present = (ordered | swapped).sum().item()
    shares = {
        "colour": same[:, [1, 3]].mean().item(),
        "shape": same[:, [2, 4]].mean().item(),
        "both figures": present / max(1, len(same)),
        "order": ordered.sum().item() / max(1, present),
        "all": right(found, truths).double().mean().item(),
    }
    return {name: round(share, 4) for name, share in shares.items()}


def fit(images, truths, steps, seed) -> Judge:
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in progress("judge: step", range(steps)):
        pick = torch.randint(len(images), (128,))
        asked = zip(judge(images[pick]), truths[pick].unbind(dim=1), strict=True)
        loss = sum(F.cross_entropy(logits, y, ignore_index=-1) for logits, y in asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def load(path) -> Judge:
    judge = Judge()
    with common.reading(path, "is no judge of captions; make one with judge.py"):
        judge.load_state_dict(common.load_file(path)["judge"])
    return judge.eval()


@dataclass
class Settings:
    vae: str | None = None  # the VAE of the latents
    out: str = "data/text-judge.pt"  # file to write
    num: int = setting(12_000, at_least=1)  # drawings to learn from
    steps: int = setting(800, at_least=1)  # steps of 128 images
    seed: int = setting(0, at_least=0)  # of the weights


def main():
    args = common.parse_settings(Settings, __doc__)
    if not args.vae:
        raise UserError("--vae FILE: is needed; give the VAE of the latents")
    vae, group = load_vae(args.vae), groups()
    images, truths = drawings([*group], args.num, 20260109)
    seen = torch.cat([images, round_trips(vae, images)])
    judge = fit(seen, torch.cat([truths, truths]), args.steps, args.seed)
    for name in ("seen", "new pair", "new figure"):
        captions = [caption for caption in group if group[caption] == name]
        images, truths = drawings(captions, 2000, 20260110)
        for what, pictures in ("drawings", images), ("round trips", round_trips(vae, images)):
            say(f"{name}, {what}: {figures(answers(judge, pictures), truths)}")
    with common.atomic_write(args.out) as file:
        torch.save({"judge": judge.state_dict()}, file)


if __name__ == "__main__":
    common.run(main)
