"""FID, sFID, Inception score, precision and recall, equal to ADM's TensorFlow evaluator.

    python fid.py SAMPLES REFERENCE

Each side: a folder of images, or an .npz with arr_0 (N, S, S, 3) uint8, or with statistics (mu,
sigma, mu_s, sigma_s, as ADM's; Dhariwal & Nichol 2021). sFID: Nash et al. 2021.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torchvision.models import inception

import models
from models import UserError, say, setting, warn
from vae_latents import image_files, open_image

WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS += "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_HASH = "6726825d"  # of sha256, as the name says
PR_NUM = 10000  # reference images in precision and recall: the size of ADM's reference batches
# Names of the statistics that each distance compares: of the features, of sFID's maps
STATISTICS = {"FID": ("mu", "sigma"), "sFID": ("mu_s", "sigma_s")}

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
    """Bilinear resize of (N, C, H, W) floats as TensorFlow 1 did it, without antialiasing."""

    def blend(x, dim):
        length = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
        low = at.long()  # pixel i lies at i * in / out; beyond the last one that one repeats
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
        for name, layer in self.named_children():  # in the order they run
            if name == "avgpool":
                break
            x = layer(x)
            if name == "Mixed_6d":  # whose first branch is TensorFlow's mixed_6/conv
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # in TensorFlow's order
        features = x.mean(dim=(2, 3))
        return features, spatial, (features @ self.fc.weight.T).softmax(dim=1)


def load_inception(weights) -> InceptionV3:
    """InceptionV3 with the public weights (downloaded once), or a file's."""
    file = Path(weights or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS.rpartition("/")[2]))
    if not weights:
        with models.reading(WEIGHTS, "cannot be had; bring it here and give --weights FILE"):
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                torch.hub.download_url_to_file(WEIGHTS, file, hash_prefix=WEIGHTS_HASH)
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(WEIGHTS_HASH):
            raise UserError(f"{file}: is cut, or another file; delete it, and it comes again")
    network = InceptionV3()
    with models.reading(file, "no weights of the FID Inception network"):
        network.load_state_dict(models.load_file(file))
    return network


def statistics(features) -> tuple[np.ndarray, np.ndarray]:
    """(mu (D,), sigma (D, D)) of features (N, D), in float64, with N - 1."""
    features = np.asarray(torch.as_tensor(features).cpu(), np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017).
    tr(...^(1/2)) sums the roots of the eigenvalues of S sigma2 S, S = sigma1^(1/2)."""
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise UserError(f"statistics of {len(mu1)} and of {len(mu2)} features")
    values, vectors = scipy.linalg.eigh(sigma1)  # symmetric: real, for singular ones, too
    half = vectors * np.sqrt(values.clip(min=0))  # half^T sigma2 half: S sigma2 S, turned
    roots = np.sqrt(scipy.linalg.eigvalsh(half.T @ sigma2 @ half).clip(min=0))
    return float(((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum())


def inception_score(probs, split_size=5000) -> float:
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016), mean over splits of 5000."""
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        kl = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))
        scores.append(kl.sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3) -> tuple[float, float]:
    """(Share of fakes within the real manifold, of reals within the fake one); (N, D) features.
    A manifold is the union of balls around a set's points that reach to the k-th neighbour
    (Kynkaanniemi et al. 2019), or to the last of fewer."""
    centre = real.mean(dim=0)  # distances stay, their rounding errors shrink
    real, fake = real - centre, fake - centre

    def share_within(points, manifold):
        nth = min(k + 1, len(manifold))  # each point is its own first neighbour
        near = [torch.cdist(m, manifold).kthvalue(nth)[0] for m in manifold.split(1024)]
        radii = torch.cat(near)
        within = [(torch.cdist(p, manifold) <= radii).any(dim=1) for p in points.split(1024)]
        return torch.cat(within).double().mean().item()

    return share_within(fake, real), share_within(real, fake)


def file_batches(folder, size, batch):
    """Batches of a folder's images; UserError for an unreadable one, or one of another size."""
    files = image_files(folder, {os.path.realpath(folder)}, left_out := [])
    if len(files) < 2:
        raise UserError(f"{folder}: fewer than two images")
    if left_out:
        say(f"{folder}: left out: {len(left_out)} hidden, linked twice or no images")
    sizes = set()

    def load(path):
        with models.reading(path, "cannot be read as an image"):
            return open_image(path, size)

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(files), batch):
            images = list(pool.map(load, files[start : start + batch]))
            sizes |= {image.shape for image in images}
            if len(sizes) > 1:
                raise UserError(f"{folder}: sizes {sizes}; --image-size N crops all")
            yield np.stack(images)


def open_archive(path, batch):
    """(Statistics, iterator of image batches, sample.py's settings or None) of an .npz."""
    with models.reading(path, "needed: .npz with arr_0 (N, S, S, 3) uint8, or mu and sigma"):
        with np.load(path) as archive:
            content = dict(archive)
        pixels = content.get("arr_0", np.zeros((0, 1, 1, 3), np.uint8))
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,):
            raise ValueError(f"arr_0 is {pixels.dtype} {pixels.shape}")
        saved = {}
        for mu, sigma in STATISTICS.values():
            if mu in content or sigma in content:  # a KeyError, if the other one is missing
                saved[mu] = np.asarray_chkfinite(content[mu], float)
                saved[sigma] = np.asarray_chkfinite(content[sigma], float)
                if saved[sigma].shape != 2 * saved[mu].shape:
                    raise ValueError(f"{mu} and {sigma} have shapes that do not fit")
        if len(pixels) < 2 and "mu" not in saved:
            raise ValueError("fewer than two images, no mu")
        how = json.loads(content["settings"].item()) if "tag" in content else None
    return saved, (pixels[i : i + batch] for i in range(0, len(pixels), batch)), how


@torch.no_grad()
def describe(path, network, args) -> dict:
    """What the metrics need of one side: statistics; of images also features, probabilities."""
    archive = Path(path, "samples.npz")
    archive = archive if archive.is_file() else Path(path)
    if archive.is_file():
        found, batches, how = open_archive(archive, args.batch_size)
    else:
        found, batches, how = {}, file_batches(path, args.image_size, args.batch_size), None
    side = {"statistics": found, "count": None, "size": None, "how": how}
    device, outputs = next(network.parameters()).device, []
    for images in batches:
        side["size"] = f"{images.shape[2]} x {images.shape[1]}"
        outputs.append(network(torch.tensor(images, device=device).permute(0, 3, 1, 2)))
    if outputs:
        features, spatial, probs = map(torch.cat, zip(*outputs, strict=True))
        side.update(count=len(features), features=features, probs=probs)
        for kind, (mu, sigma) in zip((features, spatial), STATISTICS.values(), strict=True):
            if mu not in found:  # published statistics are believed, not computed again
                found[mu], found[sigma] = statistics(kind)
        if len(features) < features.shape[1]:
            warn(f"{path}: fewer images than features: a biased FID")
    return side


@dataclass
class Settings:
    samples: str = setting("", positional=True)  # what to judge: folder, .npz
    reference: str | None = setting(None, positional=True)  # by what; without it: IS alone
    weights: str | None = None  # file of Inception weights (default: downloaded)
    image_size: int | None = None  # centre-crop images in folders to this
    batch_size: int = 64  # images at once
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one


def main():
    args = models.parse_settings(Settings, __doc__)
    for path in (args.samples, args.reference or args.samples):  # before the weights come
        os.stat(path)  # or an error that names it
    device, _, _ = models.setup(args.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    network = load_inception(args.weights).to(device)
    samples, results = describe(args.samples, network, args), {}
    reference = describe(args.reference, network, args) if args.reference else {"statistics": {}}
    if len({samples["size"], reference.get("size")} - {None}) > 1:
        raise UserError(f"images of {samples['size']} and of {reference['size']} pixels")
    if "probs" in samples:
        results["IS"] = inception_score(samples["probs"])
    a, b = samples["statistics"], reference["statistics"]
    for metric, (mu, sigma) in STATISTICS.items():
        if mu in a and mu in b:
            results[metric] = frechet_distance(a[mu], a[sigma], b[mu], b[sigma])
    real, count = reference.get("features"), reference.get("count")
    if "features" in samples and real is not None:
        some = real[torch.linspace(0, count - 1, min(count, PR_NUM)).long()]
        results["precision"], results["recall"] = precision_recall(some, samples["features"])
    for key, value in results.items():
        results[key] = round(value, 6) + 0.0  # no -0.0
    results.update(samples=args.samples, num=samples["count"], sampled=samples["how"])
    results.update(reference=args.reference, reference_num=count)
    say(json.dumps(results))


if __name__ == "__main__":
    models.run(main)
