"""FID, sFID, Inception score, precision and recall, as ADM's TensorFlow evaluator computes them. Useful by itself.

    python fid.py SAMPLES REFERENCE

Each side is a folder of images, an .npz with arr_0 (N, S, S, 3) uint8, an .npz of statistics (mu, sigma and perhaps
mu_s, sigma_s, as ADM publishes them and --save-stats writes them), or a latent folder (its source images).
Prints a table, then the same as one line of JSON. This file imports none of the others.

Sources: FID (Heusel et al. 2017), sFID (Nash et al. 2021), IS (Salimans et al. 2016), precision and recall
(Kynkaanniemi et al. 2019); the conventions are those of ADM's evaluator (Dhariwal & Nichol 2021).
"""
import argparse
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models import inception

WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SUFFIXES = torchvision.datasets.folder.IMG_EXTENSIONS
PR_NUM = 10000  # at most so many reference images enter precision and recall: the size of ADM's reference batches

class InputError(Exception):
    """A user's mistake: printed as one line, exit status 2."""

# ---- The network: torchvision's Inception v3, with the three pools in which the FID graph of 2015 differs from it
def fid_pool(block, pool):
    """A torchvision Inception block whose pooling branch, the last of its branches, pools by `pool` instead."""
    class Block(block):
        def _forward(self, x):  # its own pooling branch is computed in vain: 4 % of the network saves 40 lines
            return super()._forward(x)[:-1] + [self.branch_pool(pool(x))]

    return Block

def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # the padding does not count

def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)

def resize_tf1(images, size=299):
    """Bilinear resize of (N, C, H, W) floats as TensorFlow 1 did it: no half-pixel offset, no antialiasing.
    Output pixel i lies at i * in / out; beyond the last input pixel the last one repeats.
    """
    def taps(length):
        at = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = at.long()
        return low, (low + 1).clamp(max=length - 1), (at - low).to(images.dtype)

    top, bottom, v = taps(images.shape[2])
    left, right, u = taps(images.shape[3])
    rows_top, rows_bottom = images[:, :, top], images[:, :, bottom]
    upper = rows_top[..., left] + (rows_top[..., right] - rows_top[..., left]) * u
    lower = rows_bottom[..., left] + (rows_bottom[..., right] - rows_bottom[..., left]) * u
    return upper + (lower - upper) * v[:, None]

class InceptionV3(inception.Inception3):
    """The FID Inception network; its state dict is that of pt_inception-2015-12-05.
    forward: images (N, 3, H, W) in 0..255 (uint8 or float) -> (features (N, 2048), the 7 x 17 x 17 maps of sFID
    (N, 2023), class probabilities (N, 1008) from logits without bias, as IS takes them).
    """
    def __init__(self):
        a, c, e = inception.InceptionA, inception.InceptionC, inception.InceptionE
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, fid_pool(a, average), inception.InceptionB, fid_pool(c, average),
            inception.InceptionD, fid_pool(e, average), inception.InceptionAux])
        self.Mixed_7c = fid_pool(e, maximum)(2048)  # the FID graph's last pool is a max
        self.eval()

    def forward(self, images):
        x = (resize_tf1(images.float()) - 128) / 128
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                     "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"):
            x = getattr(self, name)(x)
        spatial = x[:, :7].flatten(1)  # TensorFlow's mixed_6/conv: the first branch of Mixed_6d
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean(dim=(2, 3))
        return features, spatial, (features @ self.fc.weight.T).softmax(dim=1)

def load_inception(weights):
    """InceptionV3 with the public weights (downloaded once, hash checked), a file's, or "random" ones of seed 0."""
    network = InceptionV3()
    if weights == "random":
        generator = torch.Generator().manual_seed(0)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        return network
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(WEIGHTS, map_location="cpu", check_hash=True, weights_only=True)
        network.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise InputError(f"--weights {weights}: not the FID Inception weights ({reason})" if weights else
                         f"the Inception weights could not be downloaded ({reason}); fetch {WEIGHTS} and pass "
                         "--weights FILE, or pass --weights random for distances that are not FID")
    return network

# ---- The metrics
class Statistics:
    """Mean and covariance of rows seen in batches, in float64. Shifted by the first batch's mean: nothing cancels."""

    def __init__(self):
        self.count = 0

    def update(self, x):
        x = x.double()
        if self.count == 0:
            self.shift = x.mean(dim=0)
            self.total, self.outer = torch.zeros_like(self.shift), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self.shift
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def finish(self):
        """(mu (D,), sigma (D, D)) as float64 arrays; sigma with N - 1, as np.cov."""
        if self.count < 2:
            raise InputError(f"{self.count} image: statistics need at least two")
        mean = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (mean + self.shift).cpu().numpy(), sigma.cpu().numpy()

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Heusel et al. 2017, eq. 6; in float64.
    The trace of the root is the sum of the roots of the eigenvalues of S sigma2 S with S = sigma1^(1/2): symmetric
    eigenproblems, so it is real and defined for singular covariances (fewer samples than features), too.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise InputError(f"statistics of {len(mu1)} and {len(mu2)} features cannot be compared")
    values, vectors = torch.linalg.eigh(sigma1)
    half = vectors * values.clamp(min=0).sqrt()  # sigma1 = half half^T; half^T sigma2 half has S sigma2 S's eigenvalues
    root = torch.linalg.eigvalsh(half.T @ sigma2 @ half).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root)

def inception_score(probs, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))), Salimans et al. 2016, averaged over splits of 5000 images in order.
    That is ADM's choice, hence the tables': 10 splits for 50,000 images and 1 for up to 5000. probs (N, classes).
    """
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        kl = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))
        scores.append(kl.sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())

def squared_distances(a, b):
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)

def precision_recall(real, fake, k=3):
    """Kynkaanniemi et al. 2019: (share of fakes inside the real manifold, share of reals inside the fake manifold).
    A set's manifold is the union of the balls around its points (N, D) that reach to the k-th neighbour, the point
    itself not counted. Distances are made 1024 rows at a time: no N x N matrix is ever held.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if min(len(real), len(fake)) <= k:
        return float("nan"), float("nan")
    centre = real.mean(dim=0)  # distances do not change, their rounding errors shrink
    real, fake = real - centre, fake - centre
    radii = [torch.cat([squared_distances(rows, points).kthvalue(k + 1, dim=1)[0] for rows in points.split(1024)])
             for points in (real, fake)]
    recalled, precise = [], torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for rows, radius in zip(real.split(1024), radii[0].split(1024)):
        distance = squared_distances(rows, fake)
        recalled.append((distance <= radii[1]).any(dim=1))
        precise |= (distance <= radius[:, None]).any(dim=0)
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()

# ---- Inputs: each becomes batches of uint8 (n, S, S, 3), and published statistics are taken as they stand
def load_image(path, size):
    """One image file as RGB; with `size`, ADM's centre crop as in vae_latents.py: boxes, bicubic, cut the middle."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})")
    if size:
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)

def file_batches(files, size, batch):
    """Batches from image files, decoded by threads; an error names the first file that is unreadable or of odd size."""
    shape = None
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, len(files), batch):
            images = list(pool.map(load_image, files[first:first + batch], [size] * batch))
            shape = shape or images[0].shape
            for file, image in zip(files[first:], images):
                if image.shape != shape:
                    raise InputError(f"{file}: {image.shape[1]} x {image.shape[0]} pixels, the first is {shape[1]} x "
                                     f"{shape[0]}; --image-size N crops all to N x N")
            yield np.stack(images)

def npz_batches(path, batch):
    """Batches of arr_0 read from the archive as they are wanted: 50,000 images of 256 px need no 10 GB of memory."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
            raise InputError(f"{path}: arr_0 is {dtype} {shape}, wanted uint8 (N, height, width, 3)")
        for first in range(0, shape[0], batch):
            rows = min(batch, shape[0] - first)
            yield np.frombuffer(file.read(rows * int(np.prod(shape[1:]))), np.uint8).reshape(rows, *shape[1:])

def open_input(path, size, batch):
    """(statistics dict or None, iterator of image batches or None) for one side of the comparison."""
    path = Path(path)
    if path.is_dir() and (path / "meta.json").is_file():  # a latent folder
        meta = json.loads((path / "meta.json").read_text())
        if (path / "images.npy").is_file():
            images = np.load(path / "images.npy", mmap_mode="r")
            return None, (np.array(images[i:i + batch]) for i in range(0, len(images), batch))
        path, size = Path(meta["source"]), size or meta["image_size"]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(f"{path}: a folder without images")
        return None, file_batches(files, size, batch)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    try:
        with np.load(path) as archive:
            saved = {key: archive[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in archive}
            images = npz_batches(path, batch) if "arr_0" in archive else None
    except Exception as error:
        raise InputError(f"{path}: not an .npz archive ({type(error).__name__}: {error})")
    if images is None and not {"mu", "sigma"} <= saved.keys():
        raise InputError(f"{path}: holds neither arr_0 nor mu and sigma")
    return saved if "mu" in saved else None, images

@torch.no_grad()
def describe(path, network, args, limit=None):
    """Everything the metrics need of one side: statistics, and features and probabilities where there are images.
    `limit` caps the features kept (evenly spaced images); statistics are over all. Published ones stand as they are.
    """
    saved, batches = open_input(path, args.image_size, args.batch_size)
    device, side = next(network.parameters()).device, {"count": None, "size": None}
    if batches is not None:
        statistics, spatial, features, probs = Statistics(), Statistics(), [], []
        for images in batches:
            images = images[:args.num - statistics.count if args.num else None]
            if len(images) == 0:
                break
            side["size"] = images.shape[1:3]
            f, s, p = network(torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2))
            statistics.update(f)
            if saved is None:
                spatial.update(s)
            features.append(f)
            probs.append(p)
        side.update(count=statistics.count, features=torch.cat(features), probs=torch.cat(probs))
        if limit and side["count"] > limit:
            side["features"] = side["features"][torch.linspace(0, side["count"] - 1, limit, device=device).long()]
    if saved is None:
        saved = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*statistics.finish(), *spatial.finish())))
    return {**side, **saved}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: (_ for _ in ()).throw(InputError(f"{message} (--help lists the flags)"))
    p.add_argument("samples", help="what to judge: folder of images, .npz, latent folder or statistics")
    p.add_argument("reference", nargs="?", help="what to judge by, likewise; without it, only the Inception score")
    p.add_argument("--weights", help='a file, or "random" (default: the public Inception weights, downloaded once)')
    p.add_argument("--image-size", type=int, help="centre-crop images in folders to this side (default: as they are)")
    p.add_argument("--num", type=int, help="look at the first so many images of each side only (default: all)")
    p.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    p.add_argument("--save-stats", metavar="FILE", help="save the samples' statistics as .npz, a reference for later")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there")
    args = p.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # it would shift the features
    network = load_inception(args.weights).to(args.device)
    samples, results = describe(args.samples, network, args), {}
    if args.reference:
        reference = describe(args.reference, network, args, limit=PR_NUM)
        if samples["size"] and reference["size"] and samples["size"] != reference["size"]:
            sizes = [f"{side['size'][1]} x {side['size'][0]}" for side in (samples, reference)]
            raise InputError(f"{args.samples} has images of {sizes[0]}, {args.reference} of {sizes[1]} pixels")
        for name, side in ((args.samples, samples), (args.reference, reference)):
            if side["count"] and side["count"] < len(side["mu"]):
                print(f"warning: {name} has {side['count']} images, fewer than the {len(side['mu'])} features: the "
                      "distance is biased upwards; compare it only with distances of as many images", file=sys.stderr)
        results["FID"] = frechet_distance(samples["mu"], samples["sigma"], reference["mu"], reference["sigma"])
        if "mu_s" in samples and "mu_s" in reference:
            results["sFID"] = frechet_distance(*(s[key] for s in (samples, reference) for key in ("mu_s", "sigma_s")))
    if "probs" in samples:
        results["IS"] = inception_score(samples["probs"])
    if args.reference and "features" in samples and "features" in reference:
        results["precision"], results["recall"] = precision_recall(reference["features"], samples["features"])
    if args.weights == "random":  # never to be mistaken for the real thing
        results = {key.replace("FID", "FD") + "-random": value for key, value in results.items()}
    if args.save_stats:
        with open(args.save_stats + ".tmp", "wb") as file:
            np.savez(file, **{key: samples[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in samples})
        os.replace(args.save_stats + ".tmp", args.save_stats)
    for key, value in results.items():
        print(f"{key:18} {value:10.4f}")
    print(json.dumps({**results, "samples": args.samples, "reference": args.reference, "num": samples["count"]}))

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"fid.py: error: {error}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(2)
