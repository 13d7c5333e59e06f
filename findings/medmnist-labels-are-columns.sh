#!/usr/bin/env bash
# medmnist: labels are a column, so that comparing them with predictions measures something else.
#
# medmnist 3.0.2. A data set of one label a picture has labels of shape (N, 1), and a batch of them
# is (B, 1), where torchvision's data sets have (B,). predictions == labels then compares each
# prediction with each label: perfect predictions of two equally frequent classes score 50 %, and so
# do random ones. And save(), which writes pictures, makes no folder for each class: the label is the
# last part of the name, and a .csv lies beside, whose first line is a row already.
# We guessed: labels of shape (N,), accuracy 100 %, folders by class.
# Seen, of 546 pictures in BreastMNIST's format (noise; its 546, 78 and 156 pictures of 28 x 28):
#   labels (546, 1), a batch (64, 1)
#   perfect predictions: accuracy 50.0 %
#   Saving train set to saved/breastmnist, csv_path=saved/breastmnist.csv...
#   saved: breastmnist/train0_0.png breastmnist/train100_0.png; first line TRAIN,train0_0.png,0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 medmnist==3.0.2 numpy==2.4.6
cd "$folder"

venv/bin/python - 2>/dev/null <<'EOF'
import pathlib
import sys

import medmnist
import numpy as np
import torch

rng = np.random.default_rng(0)
content = {}
for split, count in medmnist.INFO["breastmnist"]["n_samples"].items():
    content[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    content[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
np.savez("breastmnist.npz", **content)
data = medmnist.BreastMNIST("train", root=".", transform=lambda picture: np.array(picture))
_, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=64)))
print(f"labels {data.labels.shape}, a batch {tuple(labels.shape)}")

predictions = torch.arange(64) % 2  # those of the first 64 pictures, all right
accuracy = (predictions == labels).float().mean().item()
print(f"perfect predictions: accuracy {100 * accuracy:.1f} %")

data.save("saved")
saved = sorted(pathlib.Path("saved").rglob("*.png"))
table = next(pathlib.Path("saved").rglob("*.csv")).read_text().splitlines()
names = [str(path.relative_to("saved")) for path in saved[:2]]
print("saved:", *names, end="; ")
print("first line", table[0])
folders = {path.parent for path in saved}
sys.exit(0 if accuracy == 0.5 and len(folders) == 1 and len(table) == 546 else "this has changed")
EOF
