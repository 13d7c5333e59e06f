"""The judge of the demo and of the experiment: a small CNN, trained on a latent folder's images.

    python experiments/classifier.py train data/shapes --out data/shapes/classifier.pt
    python experiments/classifier.py judge data/shapes/classifier.pt out/samples/samples.npz ...

`judge` prints a line of JSON for each file of samples. FD-CNN is the Frechet distance to the
folder's images in this CNN's 128 features; precision and recall are those of fid.py in the same
features, against 5,000 of the images. Agreement is the share of samples that the CNN gives the
class they were asked for. Their scale is this CNN's own: never compare them with FID, or with
another judge's. Not part of the method.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import UserError, say

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fid import frechet_distance, precision_recall, statistics
from vae_latents import LatentFolder, decode, find_vae

REFERENCE_NUM = 5000  # images in precision and recall


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


def round_trips(folder) -> torch.Tensor:
    """Every image as the VAE gives it back, (N, S, S, 3) uint8: the best that samples can be."""
    vae = find_vae(None, folder.meta, folder.path)
    progress, decoded = models.Progress("round trips", len(folder)), []
    for first in range(0, len(folder), 1000):
        mean = torch.from_numpy(folder.moments[first : first + 1000]).float().chunk(2, dim=1)[0]
        decoded.append(torch.from_numpy(decode(vae, vae.scale * mean)))
        progress(first + len(mean))
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


def fit(cnn, images, labels, rows, steps, augment):
    """AdamW and one cycle, batches of 128 of `rows`; labels repeat if there are more images."""
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = models.Progress("classifier: step", steps)
    for step in range(1, steps + 1):
        pick = rows[torch.randint(len(rows), (128,))]
        x = augmented(images[pick]) if augment else images[pick]
        loss = F.cross_entropy(cnn(x)[1], labels[pick % len(labels)], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, f"loss {loss:.3f}")


def train(args):
    folder = LatentFolder(args.data)
    images, labels = folder.images(slice(None)), folder.labels
    images, held = torch.from_numpy(images.copy()), held_out(len(labels))
    rows, seen = torch.nonzero(~held)[:, 0], images
    if args.round_trips:
        decoded = round_trips(folder)
        seen, rows = torch.cat([images, decoded]), torch.cat([rows, rows + len(images)])
    torch.manual_seed(args.seed)
    classes = len(folder.meta["classes"])
    cnn = CNN(classes, args.width).to(memory_format=torch.channels_last)
    fit(cnn, seen, labels, rows, args.steps, args.augment)
    cnn.eval()

    file = {"model": cnn.state_dict(), "classes": classes, "width": args.width, "seed": args.seed}
    file.update(reference(cnn, images))
    real = measure(cnn, file, images[held], labels[held])
    file["accuracy"] = real["agreement"]
    say(f"{args.out}: accuracy on {held.sum()} held-out images {100 * file['accuracy']:.1f} %")
    if args.round_trips:
        best = measure(cnn, file, decoded[held], labels[held])
        file["round_trips"] = [best["FD-CNN"], best["agreement"]]
        say(f"their VAE round trips: {json.dumps(best)}")
    with models.atomic_write(args.out) as f:
        torch.save(file, f)


# ---- Judging


@torch.no_grad()
def describe(cnn, images):
    """(Features (N, 128), predicted labels (N,)) of images (N, S, S, 3) uint8."""
    features, logits = (torch.cat(x) for x in zip(*map(cnn, images.split(500)), strict=True))
    return features, logits.argmax(dim=1)


def reference(cnn, images) -> dict:
    """What samples are compared with: statistics of all images, features of some, evenly spaced."""
    features, _ = describe(cnn, images)
    mu, sigma = map(torch.from_numpy, statistics(features))
    some = torch.linspace(0, len(images) - 1, min(REFERENCE_NUM, len(images))).long()
    return {"mu": mu, "sigma": sigma, "reference": features[some].clone()}


def measure(cnn, file, images, labels) -> dict:
    """The judge's figures; precision and recall only if the classifier file has features."""
    features, predicted = describe(cnn, images)
    distance = frechet_distance(*statistics(features), file["mu"].numpy(), file["sigma"].numpy())
    agreement = (predicted == labels).double().mean().item()
    found = {"FD-CNN": round(distance, 3), "agreement": round(agreement, 4)}
    if "reference" in file:
        precision, recall = precision_recall(file["reference"], features)
        found.update(precision=round(precision, 4), recall=round(recall, 4))
    return found


def load(path) -> tuple[CNN, dict]:
    """(The CNN in eval mode, the file)."""
    file = models.load_file(path)
    with models.reading(f"{path}, as a classifier,"):
        cnn = CNN(file["classes"], file["width"]).to(memory_format=torch.channels_last)
        cnn.load_state_dict(file["model"])
    return cnn.eval(), file


def judge(args):
    cnn, file = load(args.classifier)
    for path in args.samples:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; sample.py writes samples.npz")
        with models.reading(path), np.load(path) as samples:
            images, labels = (torch.from_numpy(samples[key]) for key in ("arr_0", "labels"))
        say(json.dumps({"samples": path, **measure(cnn, file, images, labels)}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train the judge")
    one.add_argument("data", help="latent folder that keeps its images (up to 64 px)")
    one.add_argument("--out", required=True, help="file to write")
    one.add_argument("--steps", type=int, default=400, help="steps of 128 images (default: 400)")
    one.add_argument("--width", type=int, default=32, help="channels of the first layer")
    one.add_argument("--seed", type=int, default=0, help="another seed is a second judge")
    one.add_argument("--augment", action="store_true", help="mirror and shift: for photographs")
    one.add_argument(
        "--round-trips",
        action="store_true",
        help="half of each batch went through the VAE, whose blur all samples share",
    )
    two = commands.add_parser("judge", help="a line of JSON for each file of samples")
    two.add_argument("classifier", help="what train wrote")
    two.add_argument("samples", nargs="+", help="samples.npz, from sample.py")
    return parser.parse_args()


def main():
    args = parse()
    if args.command == "train":
        train(args)
    else:
        judge(args)


if __name__ == "__main__":
    models.run(main)
