"""CFGRL (Frans et al. 2025, arXiv 2505.23458): guidance improves a policy, on the drawn figures.

    python -m experiments.methods.cfgrl label data/shapes --out data/shapes-cfgrl
    python -m experiments.methods.cfgrl train --data data/shapes-cfgrl --out out/cfgrl
    python -m experiments.methods.cfgrl measure out/cfgrl --judge data/shapes/classifier.pt

The paper: L = 1[A > 0] |v - v_theta(o = 1)|^2 + 0.1 |v - v_theta(null)|^2, and v_null + w (v_1 -
v_null) samples a policy that is the better, the larger w is. In its code A comes from a learned
value, and both terms see the same action and noise. Ours, and guessed: state = class, action =
picture, reward = a number of the picture, A = reward - the class's mean. Of K classes, label k is
class k without o, label K + k the same with o = 1. The weights are shares of the rows here: of
--label-drop any picture without o, of the others a better picture of the same class with o = 1.
1 to 0.1, with half of the pictures better, is a share of 1/6, the default.
"""

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import common
import models
import train_stage1
from common import UserError, say, setting
from experiments.checkpoints.plot import new_figure
from experiments.cifar10 import frontier, judge
from sample import grid
from train_stage1 import TrainSettings
from vae_latents import LatentFolder, find_vae

PAPER = 48  # in grey levels: what differs from the paper by more, in any channel, is ink


def rewards(images, kind) -> np.ndarray:
    """(N,) of pictures (N, S, S, 3) uint8. The paper is the median of the frame. "size": the share
    of ink; "saturation": the mean of 1 - min / max of the channels of the ink, 0 without ink."""
    images = np.asarray(images, np.float64)
    frame = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    paper = np.median(np.concatenate(frame, axis=1), axis=1)[:, None, None]
    ink = np.abs(images - paper).max(axis=3) > PAPER
    if kind == "size":
        return ink.mean(axis=(1, 2))
    saturation = 1 - images.min(axis=3) / np.maximum(images.max(axis=3), 1)
    return (saturation * ink).sum(axis=(1, 2)) / np.maximum(ink.sum(axis=(1, 2)), 1)


@dataclass
class LabelSettings:
    data: str = setting("", positional=True)  # latent folder of the drawn figures
    out: str = "data/shapes-cfgrl"  # latent folder to write
    reward: str = setting("size", choices=["size", "saturation"])  # of a picture


def label():
    """A copy of the folder with labels (class, o); rewards.json says what its pictures earn."""
    args = common.parse_settings(LabelSettings, __doc__)
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it, or choose another --out")
    folder = LatentFolder(args.data)
    y, names = folder.labels.numpy(), folder.meta["classes"]
    earned = rewards(judge.source_images(folder), args.reward)
    ranks = [np.sort(earned[y == k]) for k in range(len(names))]
    better = earned > np.array([rank.mean() for rank in ranks])[y]  # A > 0
    tenths = [rank[-len(rank) // 10 :] for rank in ranks]  # the best of each class
    known = {"reward": args.reward, "mean": np.mean([rank.mean() for rank in ranks])}
    known.update(best_tenth=np.mean([tenth.mean() for tenth in tenths]), better=better.mean())
    shutil.copytree(args.data, out, ignore=shutil.ignore_patterns(".lock", "*.pt", "meta.json"))
    np.save(out / "labels.npy", y + len(names) * better)
    (out / "rewards.json").write_text(json.dumps(known))
    meta = json.loads((Path(args.data) / "meta.json").read_text())
    meta["classes"] = [*names, *(f"{name}, better" for name in names)]
    with common.atomic_write(out / "meta.json") as file:  # last: now the folder is complete
        file.write(json.dumps(meta).encode())
    say(f"{out}: {json.dumps(known)}")


# ---- Training: the loop's own, on another choice of rows


def make_batch(folder, draws, of_loop=train_stage1.make_batch):
    """Rows with drop: any picture, o is not told. The others: a better one of its class, o = 1."""
    K, labels = len(folder.meta["classes"]) // 2, folder.labels
    indices = draws.indices.clone()
    for row in torch.nonzero(~draws.drop.cpu())[:, 0].tolist():
        better = torch.nonzero(labels == K + labels[indices[row]] % K)[:, 0]
        indices[row] = better[int(draws.u[row] * len(better))]  # u is in [0, 1)
    batch = of_loop(folder, replace(draws, indices=indices))
    return replace(batch, y_input=torch.where(draws.drop, batch.y % K, batch.y))


@dataclass
class Settings(TrainSettings):
    data: str = "data/shapes-cfgrl"  # latent folder, from `label`
    out: str = setting("out/cfgrl", change="free")  # folder of the run: checkpoints and log.jsonl
    label_drop: float = setting(1 / 6, above=0, below=1)  # share of rows without o


def train():
    args = common.parse_settings(Settings, __doc__)
    train_stage1.make_batch = make_batch
    train_stage1.train(args)


# ---- What w does


class Policy(nn.Module):
    """v_null + w (v_1 - v_null) for classes y; w = 0 is the data's policy, 1 that of o = 1."""

    def __init__(self, model, w):
        super().__init__()
        self.model, self.w, self.num_classes = model, w, model.num_classes // 2
        self.in_channels, self.input_size = model.in_channels, model.input_size

    def forward(self, x, t, y):
        v_null = self.model(x, t, y)[0]
        return (v_null + self.w * (self.model(x, t, self.num_classes + y)[0] - v_null),)


@dataclass
class MeasureSettings:
    ckpt: str = setting("out/cfgrl", positional=True)  # run, or a checkpoint
    data: str = "data/shapes-cfgrl"  # latent folder, from `label`
    judge: str = "data/shapes/classifier.pt"  # file of judge.py
    scales: str = "0,1,1.5,2,3,4,6"  # w, with commas
    mode: str = setting("heun", choices=["euler", "heun"])  # the sampler
    steps: int = 8  # its steps
    num: int = setting(800, at_least=2)  # samples, of all classes in turn
    seed: int = setting(0, at_least=0)  # of the noise
    out: str = "out/cfgrl.jsonl"  # file to append the figures to, a line for each w
    figure: str | None = None  # picture of them to draw


def measure():
    args = common.parse_settings(MeasureSettings, __doc__)
    device, _, _ = common.setup()
    model, saved = models.load_checkpoint(args.ckpt)
    with common.reading(args.data, "is no folder of cfgrl.py label; make one"):
        known = json.loads((Path(args.data) / "rewards.json").read_text())
    vae = find_vae(None, saved["meta"]).to(device)
    cnn, facts = judge.load(args.judge)
    lines, rows = [], []
    for w in map(float, args.scales.split(",")):
        policy = Policy(model.to(device), w)
        y = torch.arange(args.num) % policy.num_classes
        images = frontier.make_samples(policy, vae, y, 1, args, device)  # w is in the policy
        earned = rewards(images, known["reward"])
        line = {"w": w, "reward": earned.mean(), "error": earned.std() / len(earned) ** 0.5}
        lines.append({**line, **judge.measure(cnn, facts, images, y)})
        rows.append(images[: policy.num_classes])
        frontier.append(args.out, lines[-1])
    if args.figure:
        sheet = grid(torch.cat(rows).numpy(), policy.num_classes)
        with common.atomic_write(args.figure) as file:
            draw(lines, known, sheet).savefig(file, format="png")


def draw(lines, known, sheet):
    """Reward against w, beside the data's; class and distance; samples, a row for each w."""
    figure, w = new_figure(11, 3.2), [line["w"] for line in lines]
    left, middle, right = figure.subplots(1, 3)
    left.errorbar(w, [line["reward"] for line in lines], [line["error"] for line in lines])
    for name in ("mean", "best_tenth"):
        left.axhline(known[name], ls=":", color="grey")
        where = {"xy": (w[-1], known[name]), "ha": "right", "va": "bottom"}
        left.annotate(f"the data's {name.replace('_', ' ')}", **where)
    left.set(xlabel="w", ylabel=f"reward: {known['reward']} of the ink")
    middle.plot(w, [100 * line["agreement"] for line in lines], label="class asked for, %")
    middle.plot(w, [line["FD-CNN"] for line in lines], label="distance to all the data")
    middle.set(xlabel="w", ylim=(0, None))
    middle.legend(fontsize=8)
    right.imshow(sheet)
    right.set(xticks=[], yticks=(np.arange(len(w)) + 0.5) * sheet.height / len(w), ylabel="w")
    right.set_yticklabels([f"{scale:g}" for scale in w])
    return figure


VERBS = {"label": label, "train": train, "measure": measure}


def main():
    verb = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if verb not in VERBS:
        raise UserError(f"give one of {', '.join(VERBS)}, then its flags (--help lists them)")
    VERBS[verb]()


if __name__ == "__main__":
    common.run(main)
