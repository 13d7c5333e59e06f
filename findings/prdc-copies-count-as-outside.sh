#!/usr/bin/env bash
# prdc: if the real set has pictures four times, exact copies of them have precision 0.
#
# prdc 0.2, scikit-learn 1.9.1. A point is inside if it is nearer than the k-th neighbour, and with
# four copies of each real picture the third neighbour is at distance 0: nothing is nearer. The
# balls of Kynkaanniemi et al. (2019) are closed, so that a copy is inside. Real sets with copies are
# usual (oversampled classes, folders merged twice, augmentation by repetition). Of the set against
# itself the answer is neither 0 nor 1, because distances of 0 are rounded.
# We guessed: precision and coverage 1 whatever is repeated, for nothing can be closer than a copy.
# Seen, of 100 points of 64 dimensions against those points n times:
#   n = 1: precision 1.00, coverage 1.00
#   n = 3: precision 1.00, coverage 1.00
#   n = 4: precision 0.00, coverage 0.00
#   n = 4, all against all: precision 0.57, coverage 0.57
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile prdc==0.2 scikit-learn==1.9.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import contextlib
import io
import sys

import numpy as np
from prdc import compute_prdc

rng = np.random.default_rng(0)
points = (rng.normal(size=(100, 4)) @ rng.normal(size=(4, 64))).astype(np.float32)


def report(name, real, fake):
    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(real, fake, nearest_k=3)
    print(f"{name}: precision {found['precision']:.2f}, coverage {found['coverage']:.2f}")
    return found["precision"]


precisions = [report(f"n = {n}", np.repeat(points, n, axis=0), points) for n in (1, 3, 4)]
four = np.repeat(points, 4, axis=0)
itself = report("n = 4, all against all", four, four)
sys.exit(0 if precisions == [1, 1, 0] and 0 < itself < 1 else "this has changed")
EOF
