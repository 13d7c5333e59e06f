"""Write CIFAR-10 as an image folder, OUT/<class>/<index>.png, downloaded by torchvision.

python experiments/cifar10.py data/cifar10-images           # the 50,000 training images
"""

import argparse
import sys
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="folder to write, one folder a class")
    args = parser.parse_args()
    try:
        data = CIFAR10("data", train=True, download=True)
    except Exception as error:  # no network, a mirror that answers nonsense
        sys.exit(f"CIFAR-10 could not be downloaded ({error}); IMAGES=DIR takes images at hand")
    for index, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
        folder = Path(args.out) / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    print(f"{args.out}: {len(data.targets)} images of {len(data.classes)} classes")


if __name__ == "__main__":
    main()
