"""Write CIFAR-10 as an image folder, OUT/<class>/<index>.png, downloaded by torchvision.

python experiments/cifar10.py data/cifar10-images           # the 50,000 training images
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from models import say, setting


@dataclass
class Settings:
    out: str = setting("", positional=True)  # folder to write, one folder a class


def main():
    out = Path(models.parse_settings(Settings, __doc__).out)
    with models.reading("CIFAR-10", "cannot be downloaded; IMAGES=DIR takes images at hand"):
        data = CIFAR10("data", train=True, download=True)
    for index, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        folder = out / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    say(f"{out}: {len(data.targets)} images of {len(data.classes)} classes")


if __name__ == "__main__":
    models.run(main)
