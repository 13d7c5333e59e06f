"""A small CNN classifier of a latent folder's source images: the judge of the demo and of the experiment, not part of the method.

    python tests/classifier.py train data/shapes --out data/shapes/classifier.pt
    python tests/classifier.py judge data/shapes/classifier.pt out/samples/samples.npz [more.npz ...]

`judge` prints, for each file of samples: FD-CNN, the Frechet distance to the folder's images in this CNN's 128 features (its
scale is its own: never compare it with FID), and agreement, the share of samples that the CNN gives the class they were asked for.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fid import Statistics, frechet_distance
from models import UserError, atomic_write, load_file, run
from vae_latents import LatentFolder, find_vae, to_uint8


class CNN(nn.Module):
    """uint8 images (N, S, S, 3) -> (features (N, 128), logits (N, classes)); for images of about 32 px."""

    def __init__(self, classes, width=32):
        super().__init__()
        layers, before = [], 3
        for channels in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
            before = channels
        self.trunk = nn.Sequential(*layers, nn.Conv2d(before, 128, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        features = self.trunk(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))
        return features, self.head(features)


def train(args):
    """Train on all but every tenth image; say the accuracy on the tenth. --augment: flips and shifts, for photographs.
    --round-trips: half of the batch went through the VAE, so that its blur, which all samples share, is not what the CNN sees.
    """
    folder = LatentFolder(args.data)
    images, labels = torch.from_numpy(folder.images(slice(None)).copy()), folder.labels
    held = torch.arange(len(images)) % 10 == (torch.arange(len(images)) // 10) % 10  # every tenth, of every class
    torch.manual_seed(0)
    cnn = CNN(len(folder.meta["classes"]), args.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps)
    seen, rows, start = images, torch.nonzero(~held)[:, 0], time.time()
    if args.round_trips:
        vae = find_vae(None, folder.meta, args.data)
        with torch.no_grad():
            decoded = np.concatenate([to_uint8(vae.decode(torch.from_numpy(np.array(m)).float().chunk(2, dim=1)[0]))
                                      for m in np.array_split(folder.moments, -(-len(images) // 250))])
        seen = torch.cat([images, torch.from_numpy(decoded)])
        rows = torch.cat([rows, rows + len(images)])
    for step in range(1, args.steps + 1):
        pick = rows[torch.randint(len(rows), (128,))]
        x = seen[pick]
        if args.augment:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(2), x)
            x = torch.roll(x, torch.randint(-3, 4, (2,)).tolist(), dims=(1, 2))
        loss = F.cross_entropy(cnn(x)[1], labels[pick % len(images)], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier {step}/{args.steps}  loss {loss:.3f}  {(time.time() - start) / step * (args.steps - step):.0f} s left", flush=True)
    cnn.eval()
    with torch.no_grad():
        correct = torch.cat([cnn(x)[1].argmax(1) for x in images[held].split(500)]) == labels[held]
        statistics = Statistics()
        for x in images.split(500):
            statistics.update(cnn(x)[0])
    accuracy = correct.double().mean().item()
    mu, sigma = statistics.finish()
    with atomic_write(args.out) as file:
        torch.save({"model": cnn.state_dict(), "classes": len(folder.meta["classes"]), "width": args.width, "accuracy": accuracy,
                    "mu": torch.from_numpy(mu), "sigma": torch.from_numpy(sigma)}, file)
    print(f"{args.out}: accuracy on {int(held.sum())} held-out real images {100 * accuracy:.1f} %")
    if args.round_trips:  # what a perfect diffusion model of these latents would get
        fd, agreement = judge(cnn, (mu, sigma), seen[len(images):][held].numpy(), labels[held].numpy())
        print(f"their VAE round trips: FD-CNN {fd:.2f}, agreement {100 * agreement:.1f} %")


@torch.no_grad()
def judge(cnn, reference, samples, labels):
    """(FD-CNN, agreement) of uint8 samples (N, S, S, 3) against reference statistics (mu, sigma) of the same CNN."""
    outputs = [cnn(x) for x in torch.from_numpy(samples).split(500)]
    statistics = Statistics()
    for features, _ in outputs:
        statistics.update(features)
    agreement = (torch.cat([logits.argmax(1) for _, logits in outputs]).numpy() == labels).mean()
    return frechet_distance(*statistics.finish(), *reference), float(agreement)


def load(path):
    file = load_file(path)
    cnn = CNN(file["classes"], file["width"]).to(memory_format=torch.channels_last)
    cnn.load_state_dict(file["model"])
    return cnn.eval(), (file["mu"].numpy(), file["sigma"].numpy()), file["accuracy"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train")
    t.add_argument("data")
    t.add_argument("--out", required=True)
    t.add_argument("--steps", type=int, default=400)
    t.add_argument("--width", type=int, default=32)
    t.add_argument("--augment", action="store_true")
    t.add_argument("--round-trips", action="store_true")
    j = commands.add_parser("judge")
    j.add_argument("classifier")
    j.add_argument("samples", nargs="+")
    args = p.parse_args()
    if args.command == "train":
        return train(args)
    cnn, reference, accuracy = load(args.classifier)
    for path in args.samples:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        with np.load(path) as file:
            fd, agreement = judge(cnn, reference, file["arr_0"], file["labels"])
        print(json.dumps({"samples": path, "FD-CNN": round(fd, 3), "agreement": round(agreement, 4)}))


if __name__ == "__main__":
    run(main)
