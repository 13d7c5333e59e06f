"""FID, sFID, Inception score, precision and recall, as ADM's TensorFlow evaluator computes them.

    python fid.py SAMPLES REFERENCE

Each side: a folder of images, an .npz with arr_0 (N, S, S, 3) uint8, an .npz of statistics (mu,
sigma, mu_s, sigma_s, as ADM's), or a latent folder. Heusel et al. 2017 (FID), Nash et al. 2021
(sFID), Salimans et al. 2016 (IS), Kynkaanniemi et al. 2019; Dhariwal & Nichol 2021 (ADM).
"""

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import models
from models import UserError, say, setting

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torchvision.models import inception

from vae_latents import IMG_EXTENSIONS, LatentFolder, open_image

WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS += "pt_inception-2015-12-05-6726825d.pth"
PR_NUM = 10000  # reference images in precision and recall: the size of ADM's reference batches
KEYS = ("mu", "sigma", "mu_s", "sigma_s")  # statistics of the features and of sFID's maps

# ---- The network: torchvision's Inception v3, but for three pools of the FID graph of 2015

maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def fid_pool(block, pool):
    """A torchvision Inception block whose last branch pools by `pool` instead."""

    class Block(block):
        def _forward(self, x):  # its own pooling branch is computed in vain: 4 % of the network
            return super()._forward(x)[:-1] + [self.branch_pool(pool(x))]

    return Block


def resize_tf1(images, size=299):
    """Bilinear resize of (N, C, H, W) floats as TensorFlow 1 did it: pixel i lies at i * in / out.
    No half-pixel offset, no antialiasing; beyond the last input pixel that one repeats."""

    def blend(x, dim):
        length = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
        low = at.long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        weight = (at - low).to(x.dtype).view([-1 if d == dim else 1 for d in range(4)])
        return a + (b - a) * weight

    return blend(blend(images, 3), 2)


class InceptionV3(inception.Inception3):
    """The FID Inception network; its state dict is that of pt_inception-2015-12-05.
    forward: images (N, 3, H, W) in 0..255 -> (features (N, 2048), the 7 x 17 x 17 maps of sFID
    (N, 2023), class probabilities (N, 1008) from logits without bias, as IS takes them)."""

    def __init__(self):
        a, c, e = inception.InceptionA, inception.InceptionC, inception.InceptionE
        a, c, e_average = (fid_pool(block, average) for block in (a, c, e))
        blocks = [inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD]
        blocks += [e_average, inception.InceptionAux]
        off = {"aux_logits": False, "init_weights": False}
        super().__init__(num_classes=1008, inception_blocks=blocks, **off)
        self.Mixed_7c = fid_pool(e, maximum)(2048)  # the graph's last pool is a maximum
        self.eval()

    def forward(self, images):
        x = (resize_tf1(images.float()) - 128) / 128
        names = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3"
        names += " maxpool2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d"
        for name in names.split():
            x = getattr(self, name)(x)
        spatial = x[:, :7].flatten(1)  # TensorFlow's mixed_6/conv: Mixed_6d's first branch
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean(dim=(2, 3))
        return features, spatial, (features @ self.fc.weight.T).softmax(dim=1)


def load_inception(weights) -> InceptionV3:
    """InceptionV3 with the public weights (downloaded once), or a file's."""
    network = InceptionV3()
    with models.reading(f"--weights {weights or f'FILE: the one at {WEIGHTS}'}"):
        if weights:
            state = models.load_file(weights)
        else:
            options = {"map_location": "cpu", "check_hash": True, "weights_only": True}
            state = torch.hub.load_state_dict_from_url(WEIGHTS, **options)
        network.load_state_dict(state)
    return network


def statistics(features) -> tuple[np.ndarray, np.ndarray]:
    """(mu (D,), sigma (D, D)) of features (N, D), in float64, with N - 1."""
    features = np.asarray(torch.as_tensor(features).cpu(), np.float64)
    if len(features) < 2:
        raise UserError(f"{len(features)} image(s): statistics need at least two")
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, eq. 6).
    The trace of the root is the sum of the roots of the eigenvalues of S sigma2 S, S =
    sigma1^(1/2): symmetric problems, so it is real, for singular covariances, too."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise UserError(f"statistics of {len(mu1)} and {len(mu2)} features cannot be compared")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold numbers that are not finite")
    values, vectors = scipy.linalg.eigh(sigma1)
    half = vectors * np.sqrt(values.clip(min=0))  # half^T sigma2 half has S sigma2 S's eigenvalues
    roots = np.sqrt(scipy.linalg.eigvalsh(half.T @ sigma2 @ half).clip(min=0))
    return float(((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum())


def inception_score(probs, split_size=5000) -> float:
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016), mean over splits of 5000, as ADM's."""
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        kl = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))
        scores.append(kl.sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3) -> tuple[float, float]:
    """(Share of fakes within the real manifold, of reals within the fake one); (N, D) features.
    A manifold is the union of balls around a set's points that reach to the k-th neighbour
    (Kynkaanniemi et al. 2019). Distances are made 1024 rows at a time."""
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        return float("nan"), float("nan")
    centre = real.mean(dim=0)  # distances stay, their rounding errors shrink
    real, fake, radii = real - centre, fake - centre, []
    for points in (real, fake):
        rows = (torch.cdist(part, points) for part in points.split(1024))
        radii.append(torch.cat([row.kthvalue(k + 1, dim=1)[0] for row in rows]))  # itself is one
    recalled, precise = [], torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for rows, radius in zip(real.split(1024), radii[0].split(1024), strict=True):
        distance = torch.cdist(rows, fake)
        recalled.append((distance <= radii[1]).any(dim=1))
        precise |= (distance <= radius[:, None]).any(dim=0)
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def file_batches(files, size, batch):
    """Batches from image files; UserError for an unreadable one, or one of another size."""

    def load(path):
        with models.reading(path):
            return open_image(path, size)

    first = load(files[0]).shape
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(files), batch):
            images = list(pool.map(load, files[start : start + batch]))
            for file, image in zip(files[start:], images, strict=False):
                if image.shape != first:
                    size = "{1} x {0} pixels, the first {4} x {3}".format(*image.shape, *first)
                    raise UserError(f"{file}: {size}; --image-size N crops all to N x N")
            yield np.stack(images)


def open_input(path, size, batch):
    """(statistics, iterator of image batches), either may be empty, of one side."""
    path, saved = Path(path), {}
    if (path / "samples.npz").is_file():
        path = path / "samples.npz"
    if (path / "meta.json").is_file():
        folder = LatentFolder(path)
        return saved, (folder.images(slice(i, i + batch)) for i in range(0, len(folder), batch))
    if path.is_dir():
        walk = os.walk(path, followlinks=True)
        files = sorted(Path(where) / name for where, _, names in walk for name in names)
        files = [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]
        if not files:
            raise UserError(f"{path}: a folder without images")
        return saved, file_batches(files, size, batch)
    with models.reading(path), np.load(path) as archive:
        saved = {key: archive[key] for key in KEYS if key in archive}
        pixels = archive["arr_0"] if "arr_0" in archive else np.zeros((0, 1, 1, 3), np.uint8)
    if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,):
        raise UserError(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}, not uint8 (N, S, S, 3)")
    return saved, (pixels[i : i + batch] for i in range(0, len(pixels), batch))


@torch.no_grad()
def describe(path, network, args, limit=None) -> dict:
    """What the metrics need of one side: statistics; of images also features, probabilities.
    `limit` caps the features kept. Published statistics are believed, not computed again."""
    saved, batches = open_input(path, args.image_size, args.batch_size)
    device, side, outputs = next(network.parameters()).device, {"count": None, "size": None}, []
    for images in batches:
        side["size"] = f"{images.shape[2]} x {images.shape[1]}"
        outputs.append(network(torch.tensor(images, device=device).permute(0, 3, 1, 2)))
    if outputs:
        features, spatial, probs = map(torch.cat, zip(*outputs, strict=True))
        side.update(count=len(features), features=features, probs=probs)
        if not saved:
            saved = dict(zip(KEYS, (*statistics(features), *statistics(spatial)), strict=True))
        if limit and len(features) > limit:
            side["features"] = features[torch.linspace(0, len(features) - 1, limit).long()]
    if not saved:
        raise UserError(f"{path}: holds no images")
    return {**side, **saved}


@dataclass
class Settings:
    samples: str = setting("", "what to judge: folder, .npz, latent folder", positional=True)
    reference: str | None = setting(None, "what to judge by; without it: IS alone", positional=True)
    weights: str | None = setting(None, "file of Inception weights (default: downloaded)")
    image_size: int | None = setting(None, "centre-crop images in folders to this", at_least=1)
    batch_size: int = setting(64, "images at once", at_least=1)
    save_stats: str | None = setting(None, "file for the statistics of the samples, a reference")
    device: str = setting("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")


def main():
    args = models.parse_settings(Settings, __doc__)
    for path in map(Path, filter(None, (args.samples, args.reference))):  # before weights come
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise UserError(f"{path}: no such file or folder")
    device, _, _ = models.setup(args.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    network = load_inception(args.weights).to(device)
    samples, results = describe(args.samples, network, args), {}
    if "probs" in samples:
        results["IS"] = inception_score(samples["probs"])
    if args.reference:
        reference = describe(args.reference, network, args, limit=PR_NUM)
        pair = ((args.samples, samples), (args.reference, reference))
        if len({side["size"] for _, side in pair} - {None}) > 1:
            raise UserError(f"images of {samples['size']} and {reference['size']} pixels")
        for name, side in pair:
            if side["count"] and side["count"] < len(side["mu"]):
                few = f"{name} has {side['count']} images and {len(side['mu'])} features"
                say(f"warning: {few}: the distance is biased upwards", sys.stderr)
        for metric, keys in (("FID", KEYS[:2]), ("sFID", KEYS[2:])):
            if all(key in side for key in keys for side in (samples, reference)):
                pairs = [side[key] for side in (samples, reference) for key in keys]
                results[metric] = frechet_distance(*pairs)
        if "features" in samples and "features" in reference:
            both = precision_recall(reference["features"], samples["features"])
            results["precision"], results["recall"] = both
    if args.save_stats:
        with models.atomic_write(args.save_stats) as file:
            np.savez(file, **{key: samples[key] for key in KEYS if key in samples})
    results = {key: round(v, 6) + 0.0 if math.isfinite(v) else None for key, v in results.items()}
    for key, value in results.items():
        say(f"{key:18} {value}")
    about = {"samples": args.samples, "reference": args.reference, "num": samples["count"]}
    say(json.dumps({**results, **about}))


if __name__ == "__main__":
    models.run(main)
