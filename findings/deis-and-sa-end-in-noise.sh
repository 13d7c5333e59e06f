#!/usr/bin/env bash
# diffusers' DEIS and SA schedulers stop before the end of a flow.
#
# diffusers 0.42.1, torch 2.13.0. With prediction_type="flow_prediction" and use_flow_sigmas=True,
# DEISMultistepScheduler and SASolverScheduler repeat their last noise level instead of going to 0.
# What stays is 0.999 / N of the noise: a tenth with 10 steps. UniPCMultistepScheduler, which is
# made with the same arguments, ends at the data. Below, the velocity is exact and all data is 3.
# We guessed: all three end at 3 with a deviation below 0.001, from 10 steps on.
# Seen, with 10, 30 and 50 steps:
#   DEISMultistepScheduler  mean 2.70 2.90 2.94  noise left 0.099 0.033 0.020
#   SASolverScheduler       mean 2.70 2.90 2.94  noise left 0.101 0.033 0.020
#   UniPCMultistepScheduler mean 3.00 3.00 3.00  noise left 0.000 0.000 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 diffusers==0.42.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import sys

import diffusers
import torch

noise_left = {}
for name in ("DEISMultistepScheduler", "SASolverScheduler", "UniPCMultistepScheduler"):
    means, deviations = [], []
    for steps in (10, 30, 50):
        torch.manual_seed(0)
        kind = getattr(diffusers, name)
        scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 1, 64, 64)
        for i, t in enumerate(scheduler.timesteps):
            velocity = (x - 3) / scheduler.sigmas[i]  # x = (1 - sigma) 3 + sigma noise
            x = scheduler.step(velocity, t, x).prev_sample
        means.append(x.mean().item())
        deviations.append(x.std().item())
    noise_left[name] = deviations
    numbers = " ".join(f"{mean:.2f}" for mean in means)
    print(f"{name:23} mean {numbers}  noise left", *(f"{d:.3f}" for d in deviations))

stops = [abs(left - 0.999 / steps) < 0.1 / steps
         for name in ("DEISMultistepScheduler", "SASolverScheduler")
         for steps, left in zip((10, 30, 50), noise_left[name])]
ends = [left < 1e-3 for left in noise_left["UniPCMultistepScheduler"]]
sys.exit(0 if all(stops) and all(ends) else "this has changed")
EOF
