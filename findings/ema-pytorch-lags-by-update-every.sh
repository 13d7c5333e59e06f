#!/usr/bin/env bash
# ema-pytorch: with update_every=10, beta 0.99 is an average over a thousand steps, not a hundred.
#
# ema-pytorch 0.8.3, torch 2.13.0. update() is called once a step and works in every tenth call
# (the package's own value of update_every), with beta as it stands: not with beta to the tenth
# power, by which skipping would be free. So beta is not a decay a step, and its usual numbers
# (0.9999 for an average of the last 10,000 steps) reach ten times as far back. In a run of
# 100,000 steps that is an average of the whole run.
# We guessed: an average that lags about as far as without skipping, 99 steps.
# Seen, of a weight that grows by 1 a step, after 3,000 steps:
#   update_every=1: the average is 99 steps behind
#   update_every=10: the average is 938 steps behind
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 ema-pytorch==0.8.3 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import sys

import torch
from ema_pytorch import EMA

behind = []
for every in (1, 10):
    network = torch.nn.Linear(1, 1, bias=False)
    average = EMA(network, beta=0.99, update_after_step=0, update_every=every)
    for step in range(1, 3001):
        network.weight.data.fill_(float(step))
        average.update()
    behind.append(3000 - average.ema_model.weight.item())
    print(f"update_every={every}: the average is {behind[-1]:.0f} steps behind")
sys.exit(0 if behind[0] < 120 and behind[1] > 800 else "this has changed")
EOF
