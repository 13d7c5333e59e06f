#!/usr/bin/env bash
# A JPEG of quality 75 that is saved again: quality 51 hurts more than quality 20.
#
# Pillow 13.0.0, scikit-image 0.26.0 (for its picture of 512 x 512). The steps of quality 50 are
# twice those of quality 75 (the standard tables times 1 and times 1/2), so about every second
# coefficient of the first JPEG lies exactly between two steps of the second, or next to such a
# place, and is rounded by half a step. Quality 20 has steps five times as wide as the first,
# and rarely meets that. Nor is more always better above 75: 90 is worse than 80. Data sets of
# small pictures are often JPEGs that were saved twice.
# We guessed: the error falls steadily as the second quality rises.
# Seen, in dB against the original (higher is better):
#   second quality 20: 30.23
#   second quality 45: 31.88
#   second quality 50: 29.77
#   second quality 51: 29.53
#   second quality 75: 35.07
#   second quality 80: 35.40
#   second quality 90: 34.66
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile pillow==13.0.0 scikit-image==0.26.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import io
import sys

import numpy as np
import skimage.data
from PIL import Image


def saved(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


picture = skimage.data.camera()
first = saved(picture, 75)
decibels = {}
for quality in (20, 45, 50, 51, 75, 80, 90):
    error = saved(first, quality).astype(float) - picture
    decibels[quality] = 10 * np.log10(255**2 / (error**2).mean())
    print(f"second quality {quality}: {decibels[quality]:.2f}")
surprise = decibels[51] < decibels[20] - 0.3 and decibels[50] < decibels[20] - 0.3
sys.exit(0 if surprise and decibels[90] < decibels[80] - 0.3 else "this has changed")
EOF
