"""A table of how far fid.py's figures and those of other packages agree, on the same pictures.

    pip install clean-fid torchmetrics prdc    # torch-fidelity, pytorch-fid: requirements-dev.txt
    python -m experiments.machine.metrics --sizes 32,64,256,299

For each size it draws two sets of pictures, gives them to fid.py, pytorch-fid, torch-fidelity,
torchmetrics, clean-fid and prdc with the same random Inception weights, and prints in Markdown the
relative difference of each figure from fid.py's, or from a formula here where fid.py has none
(KID). A package that is not installed is left out. Not part of the method; docs/metrics.md has the
table and says why some figures differ.
"""

import contextlib
import io
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

import common
import fid
from common import say, setting

METRICS = ("FID", "IS", "KID", "precision", "recall")
URL_NAME = fid.WEIGHTS.rpartition("/")[2]


@dataclass
class Settings:
    sizes: str = "32,64,256,299"  # sides of the pictures in pixels, with commas
    num: int = setting(100, at_least=8)  # pictures in each set


# ---- What is measured, and with what


def random_weights() -> dict:
    """The state of an Inception with random weights under which features differ by picture."""
    network, generator = fid.InceptionV3(), torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.8, 1.2, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
    nn.init.normal_(network.fc.weight, std=0.05 * math.sqrt(2 / 2048), generator=generator)
    return network.state_dict()


def draw(number, size, seed) -> np.ndarray:
    """Pictures (N, S, S, 3) uint8 whose spectrum falls like a photograph's, as 1/f."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) + 1 / size
    noise = np.fft.fft2(rng.normal(size=(number, 3, size, size)))
    pictures = np.fft.ifft2(noise / frequency ** (1 + 0.2 * seed)).real
    pictures /= pictures.std(axis=(2, 3), keepdims=True)
    pictures = 128 + 50 * pictures + rng.normal(0, 30, (number, 3, 1, 1))
    return pictures.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def write_folder(folder, pictures) -> str:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:05d}.png")
    return str(folder)


def kernel_distance(x, y) -> float:
    """KID of features (N, D), without subsets: the unbiased MMD^2 of (x . y / D + 1)^3."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


# ---- The packages: each function gives some of METRICS


def by_fid_py(folders, files, weights):
    """fid.py's own figures, KID by the formula above, and the features of both sets."""
    args, network = fid.Settings(batch_size=25), fid.load_inception(weights)
    network.to(memory_format=torch.channels_last)
    fakes, reals = (fid.describe(path, network, args) for path in folders)
    a, b = fakes["statistics"], reals["statistics"]
    precision, recall = fid.precision_recall(reals["features"], fakes["features"])
    figures = {
        "FID": fid.frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]),
        "IS": fid.inception_score(fakes["probs"]),
        "KID": kernel_distance(fakes["features"], reals["features"]),
        "precision": precision,
        "recall": recall,
    }
    return figures, fakes["features"], reals["features"]


def by_pytorch_fid(folders, weights):
    from pytorch_fid import fid_score, inception

    state = torch.load(weights, weights_only=True)
    inception.load_state_dict_from_url = lambda *_, **__: state  # instead of a download
    given = {"batch_size": 25, "device": "cpu", "dims": 2048, "num_workers": 0}
    return {"FID": fid_score.calculate_fid_given_paths(list(folders), **given)}


def by_torch_fidelity(folders, weights):
    from torch_fidelity import calculate_metrics

    number = len(os.listdir(folders[0]))
    figures = calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=25,
        feature_extractor="inception-v3-compat",  # precision's default is VGG
        feature_layer_prc="2048",
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=number,
        prc_neighborhood=3,
    )
    names = "frechet_inception_distance inception_score_mean kernel_inception_distance_mean"
    names = [*names.split(), "precision", "recall"]
    return {metric: figures[name] for metric, name in zip(METRICS, names, strict=True)}


def by_torchmetrics(pictures, weights):
    """Its metrics run torch-fidelity's network, which is here given our weights."""
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    wanted = ["2048", "logits_unbiased"]
    both = [NoTrainInceptionV3("x", [name], str(weights)) for name in wanted]
    number = len(pictures[0])
    distance = FrechetInceptionDistance(both[0]).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(both[0], subsets=1, subset_size=number)
    score = InceptionScore(both[1], splits=1)
    for images, real in zip(pictures, (False, True), strict=True):
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(25):
            distance.update(part, real=real)
            kernel.update(part, real=real)
            if not real:
                score.update(part)
    found = distance.compute(), score.compute()[0], kernel.compute()[0]
    return dict(zip(METRICS, map(float, found), strict=False))


def by_clean_fid(folders, weights, mode):
    """Its resize to 299 px, then our network. Its own network is a file of its own."""
    from cleanfid import fid as clean

    network = fid.load_inception(weights)
    given = {"mode": mode, "num_workers": 0, "batch_size": 25, "verbose": False}
    given |= {"custom_feat_extractor": lambda x: network(x)[0], "device": torch.device("cpu")}
    with torch.no_grad():
        return {"FID": clean.compute_fid(*folders, use_dataparallel=False, **given)}


def by_prdc(fakes, reals):
    from prdc import compute_prdc

    found = compute_prdc(reals.numpy(), fakes.numpy(), nearest_k=3)
    return {metric: float(found[metric]) for metric in ("precision", "recall")}


# ---- The table


def difference(value, ours) -> str:
    """The relative difference to one figure, 0 for less than float64's rounding."""
    if value is None:
        return ""
    apart = abs(value - ours) / max(abs(ours), 1e-12)
    return "0" if apart < 1e-14 else f"{apart:.1g}"


def compare(size, num, weights) -> list[str]:
    """The table's lines of one size."""
    pictures = draw(num, size, 0), draw(num, size, 1)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        sets = zip(("fakes", "reals"), pictures, strict=True)
        folders = [write_folder(Path(scratch, name), images) for name, images in sets]
        ours, fakes, reals = by_fid_py(folders, pictures, weights)
        runs = {
            "pytorch-fid": lambda: by_pytorch_fid(folders, weights),
            "torch-fidelity": lambda: by_torch_fidelity(folders, weights),
            "torchmetrics": lambda: by_torchmetrics(pictures, weights),
            "clean-fid, legacy_tensorflow": lambda: by_clean_fid(
                folders, weights, "legacy_tensorflow"
            ),
            "clean-fid, legacy_pytorch": lambda: by_clean_fid(folders, weights, "legacy_pytorch"),
            "clean-fid, clean": lambda: by_clean_fid(folders, weights, "clean"),
            "prdc": lambda: by_prdc(fakes, reals),
        }
        lines = [row(size, "fid.py", [f"{ours[metric]:.6g}" for metric in METRICS])]
        for name, run in runs.items():
            with contextlib.suppress(ImportError):
                found = run()
                cells = [difference(found.get(metric), ours[metric]) for metric in METRICS]
                lines.append(row(size, name, cells))
    return lines


def row(*cells) -> str:
    *first, values = cells
    return "| " + " | ".join(map(str, [*first, *values])) + " |"


def main():
    args = common.parse_settings(Settings, __doc__)
    warnings.filterwarnings("ignore")
    packages = "torch pytorch-fid torch-fidelity torchmetrics clean-fid prdc scipy".split()
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            say(f"{name} {version(name)}")
    say(row("px", "package", METRICS))
    say(row("--:", "---", ["--:"] * len(METRICS)))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        weights = Path(scratch, URL_NAME)
        torch.save(random_weights(), weights)
        for size in args.sizes.split(","):
            for line in compare(int(size), args.num, weights):
                say(line)


if __name__ == "__main__":
    common.run(main)
