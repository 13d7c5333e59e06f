#!/usr/bin/env bash
# datasets: an image folder with a class called "train" loses its other classes.
#
# datasets 5.2.0. "imagefolder" looks for folders whose names are those of splits before it looks
# for classes, and takes what is in them for all there is. Trains are a class of Pascal VOC, COCO
# and CIFAR-100. Of the folders bus, car and train below, the pictures of trains alone are loaded,
# without labels, as a split called train; nothing is said of the others.
# We guessed: three classes in one split, as with any other three names.
# Seen:
#   bus, car, train: split train, 4 pictures, classes: no labels
#   bus, car, tram: split train, 12 pictures, classes: bus car tram
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$folder"

HF_HUB_OFFLINE=1 HF_HOME="$folder" venv/bin/python - <<'EOF'
import pathlib
import sys

import datasets
from PIL import Image

datasets.disable_progress_bars()
counts = []
for root, names in (("one", ("bus", "car", "train")), ("two", ("bus", "car", "tram"))):
    for name in names:
        pathlib.Path(root, name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(f"{root}/{name}/{i}.png")
    loaded = datasets.load_dataset("imagefolder", data_dir=root)
    for split, dataset in loaded.items():
        has_labels = "label" in dataset.features
        classes = dataset.features["label"].names if has_labels else ["no labels"]
        print(f"{', '.join(names)}: split {split}, {len(dataset)} pictures, classes:", *classes)
        counts.append((len(dataset), has_labels))
sys.exit(0 if counts == [(4, False), (12, True)] else "this has changed")
EOF
