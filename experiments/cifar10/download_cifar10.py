"""Write CIFAR-10 as an image folder, OUT/<class>/<index>.png, downloaded by torchvision.

python -m experiments.cifar10.download_cifar10 data/cifar10-images   # the 50,000 of training
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10

import common
from common import say, setting


@dataclass
class Settings:
    out: str = setting("", positional=True)  # folder to write, one folder a class


def main():
    out = Path(common.parse_settings(Settings, __doc__).out)
    with common.reading("CIFAR-10", "cannot be downloaded; IMAGES=DIR takes images at hand"):
        data = CIFAR10("data", train=True, download=True)
    for index, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        folder = out / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    say(f"{out}: {len(data.targets)} images of {len(data.classes)} classes")


if __name__ == "__main__":
    common.run(main)
