"""The judge of compare.sh and cifar10.sh: a small CNN, trained on a latent folder's images.

    python experiments/judge.py train data/shapes --out data/shapes/classifier.pt
    python experiments/judge.py judge data/shapes/classifier.pt out/samples/samples.npz ...

`judge` prints a line of JSON for each file of samples. FD-CNN is the Frechet distance to the
folder's images in this CNN's 128 features; precision and recall are those of fid.py in the same
features, against 5,000 of the images. Agreement is the share of samples that the CNN gives the
class they were asked for. Their scale is this CNN's own: never compare them with FID, or with
another judge's. Not part of the method.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import models
from common import UserError, progress, say, setting
from fid import frechet_distance, precision_recall, statistics
from vae_latents import LatentFolder, find_vae, open_image, to_images

BATCH = 128  # of the training


class CNN(nn.Module):
    """Images (N, S, S, 3) uint8, S about 32 -> (features (N, 128), logits (N, classes))."""

    def __init__(self, classes, width=32):
        super().__init__()
        layers, before = [], 3
        for channels in (width, 2 * width, 4 * width):
            layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
            before = channels
        self.trunk = nn.Sequential(*layers, nn.Conv2d(before, 128, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        features = self.trunk(x).mean(dim=(2, 3))
        return features, self.head(features)


# ---- Training


def source_images(folder) -> torch.Tensor:
    """The cropped images (N, S, S, 3) uint8 of a latent folder, from where they were encoded."""
    if len(folder) < 20:
        raise UserError(f"{folder.path}: its {len(folder)} images are too few to learn from (20)")
    images = []
    with common.reading(folder.path, "does not say which images it is of"):
        names = json.loads((folder.path / "files.json").read_text())
        size, source = folder.meta["image_size"], Path(folder.meta["source"])
    for file in (source / name for name in names):
        with common.reading(file, "is not the image any more that was encoded"):
            images.append(open_image(file, size))
    return torch.from_numpy(np.stack(images))


def round_trips(folder) -> torch.Tensor:
    """Every image as the VAE gives it back, (N, S, S, 3) uint8: the best that samples can be."""
    vae = find_vae(None, folder.meta)
    decoded = []
    for first in progress("round trips: thousand", range(0, len(folder), 1000)):
        mean = torch.tensor(folder.moments[first : first + 1000]).float().chunk(2, dim=1)[0]
        decoded.append(torch.from_numpy(to_images(vae, vae.scale * mean)))
    return torch.cat(decoded)


def held_out(num) -> torch.Tensor:
    """A mask of every tenth image, at a place that moves, so that all classes have some."""
    index = torch.arange(num)
    return index % 10 == (index // 10) % 10


def augmented(images):
    """Half of the images mirrored, and the batch rolled by up to three pixels."""
    mirror = torch.rand(len(images), 1, 1, 1) < 0.5
    shift = torch.randint(-3, 4, (2,)).tolist()
    return torch.roll(torch.where(mirror, images.flip(2), images), shift, dims=(1, 2))


def fit(cnn, images, labels, rows, steps, augment=False):
    """AdamW and one cycle, batches of `rows`; labels repeat if there are more images."""
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in progress("classifier: step", range(steps)):
        pick = rows[torch.randint(len(rows), (BATCH,))]
        x = augmented(images[pick]) if augment else images[pick]
        loss = F.cross_entropy(cnn(x)[1], labels[pick % len(labels)], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass
class Settings:
    data: str = setting("", positional=True)  # latent folder whose images are there (up to 64 px)
    out: str = "out/classifier.pt"  # file to write
    steps: int = setting(400, at_least=1)  # steps of 128 images
    width: int = setting(32, at_least=1)  # channels of the first layer
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)  # another seed is a second judge
    augment: bool = False  # mirror and shift: for photographs
    round_trips: bool = False  # half of each batch went through the VAE, whose blur samples share


def train(args):
    folder = LatentFolder(args.data)
    images, labels, held = source_images(folder), folder.labels, held_out(len(folder))
    rows, seen = torch.nonzero(~held)[:, 0], images
    if args.round_trips:
        decoded = round_trips(folder)
        seen, rows = torch.cat([images, decoded]), torch.cat([rows, rows + len(images)])
    torch.manual_seed(args.seed)
    classes = len(folder.meta["classes"])
    cnn = CNN(classes, args.width).to(memory_format=torch.channels_last)
    fit(cnn, seen, labels, rows, args.steps, args.augment)
    cnn.eval()

    features, _ = describe(cnn, images)
    some = torch.linspace(0, len(images) - 1, min(5000, len(images))).long()  # evenly spaced
    saved = {"model": cnn.state_dict(), "classes": classes, "width": args.width, "seed": args.seed}
    saved.update(size=images.shape[1], reference=features[some].clone())
    saved["names"] = folder.meta["classes"]
    saved["mu"], saved["sigma"] = map(torch.from_numpy, statistics(features))
    saved["accuracy"] = measure(cnn, saved, images[held], labels[held])["agreement"]
    say(f"{args.out}: accuracy on {held.sum()} held-out images {100 * saved['accuracy']:.1f} %")
    if args.round_trips:
        best = measure(cnn, saved, decoded[held], labels[held])
        saved["round_trips"] = [best["FD-CNN"], best["agreement"]]
        say(f"their VAE round trips: {json.dumps(best)}")
    with common.atomic_write(args.out) as file:
        torch.save(saved, file)


# ---- Judging


@torch.no_grad()
def describe(cnn, images):
    """(Features (N, 128), predicted labels (N,)) of images (N, S, S, 3) uint8."""
    features, logits = (torch.cat(x) for x in zip(*map(cnn, images.split(500)), strict=True))
    return features, logits.argmax(dim=1)


def measure(cnn, saved, images, labels) -> dict:
    """The judge's figures of images (N, S, S, 3) uint8 and the labels they were asked for."""
    features, predicted = describe(cnn, images)
    mu, sigma = saved["mu"].numpy(), saved["sigma"].numpy()
    distance = frechet_distance(*statistics(features), mu, sigma)
    agreement = (predicted == labels).double().mean().item()
    precision, recall = precision_recall(saved["reference"], features)
    found = {"FD-CNN": round(distance, 3), "agreement": round(agreement, 4)}
    return {**found, "precision": round(precision, 4), "recall": round(recall, 4)}


def load(path) -> tuple[CNN, dict]:
    """(The CNN in eval mode, the file)."""
    with common.reading(path, "is no judge; make one with judge.py train"):
        saved = common.load_file(path)
        cnn = CNN(saved["classes"], saved["width"]).to(memory_format=torch.channels_last)
        cnn.load_state_dict(saved["model"])
        saved["mu"], saved["sigma"], saved["reference"]
    return cnn.eval(), saved


def read_samples(path, saved) -> tuple[torch.Tensor, torch.Tensor]:
    """(Images (N, S, S, 3) uint8, labels (N,)) of a samples.npz that this judge can judge."""
    with common.reading(path, "is no samples.npz for this judge"), np.load(path) as samples:
        images, labels = samples["arr_0"], samples["labels"]
        side, classes = saved.get("size", images.shape[1]), saved["classes"]
        if images.dtype != np.uint8 or images.shape != (len(labels), side, side, 3):
            raise ValueError(f"{images.dtype} {images.shape}, the judge knows {side} px, uint8")
        if len(images) < 2 or not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{len(images)} images, labels to {labels.max()} of {classes} classes")
        settings = json.loads(samples["settings"].item()) if "settings" in samples else {}
    if "names" in settings and "names" in saved:  # older files do not say them
        models.check_classes(path, settings["names"], saved["names"])
    return torch.from_numpy(images), torch.from_numpy(labels)


def main():
    command, *files = sys.argv[1:] or [""]
    if command == "judge" and len(files) > 1:
        cnn, saved = load(files[0])
        for path in files[1:]:
            figures = measure(cnn, saved, *read_samples(path, saved))
            say(json.dumps({"samples": path, **figures}))
        return
    if command == "train":
        del sys.argv[1]
    elif "--help" not in sys.argv:
        raise UserError("give `train DATA --out FILE`, or `judge FILE SAMPLES...` (--help)")
    train(common.parse_settings(Settings, __doc__))


if __name__ == "__main__":
    common.run(main)
