#!/usr/bin/env bash
# torchdiffeq's adaptive solvers evaluate the velocity outside the interval that they are given.
#
# torchdiffeq 0.2.5, torch 2.13.0. From t = 1 to t = 0, dopri5 (SiT's default sampler) asks for
# t = -0.05 and dopri8 for t = -0.57: they step over the end and interpolate back. A network that
# was trained on 0 <= t <= 1 answers for such a t without a word. SciPy's RK45, the same method as
# dopri5, shortens its last step and stays inside.
# We guessed: both stay inside; the last step is shortened, as the textbooks have it.
# Seen, of dx/dt = cos(3 t) x:
#   torchdiffeq dopri5: asked for t from -0.0540 to 1.0000
#   torchdiffeq dopri8: asked for t from -0.5716 to 1.0000
#   torchdiffeq bosh3: asked for t from -0.0067 to 1.0000
#   torchdiffeq euler: asked for t from 1.0000 to 1.0000
#   scipy RK45: asked for t from 0.0000 to 1.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchdiffeq==0.2.5 \
    scipy==1.17.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import math
import sys

import scipy.integrate
import torch
import torchdiffeq

lowest = {}


def report(name, asked):
    lowest[name] = min(asked)
    print(f"{name}: asked for t from {min(asked):.4f} to {max(asked):.4f}")


for method in ("dopri5", "dopri8", "bosh3", "euler"):
    asked = []

    def velocity(t, x):
        asked.append(t.item())
        return torch.cos(3 * t) * x

    torchdiffeq.odeint(velocity, torch.ones(1), torch.tensor([1.0, 0.0]), method=method)
    report(f"torchdiffeq {method}", asked)

asked = []


def velocity(t, x):
    asked.append(t)
    return math.cos(3 * t) * x


scipy.integrate.solve_ivp(velocity, (1, 0), [1.0], method="RK45")
report("scipy RK45", asked)

outside = [lowest[f"torchdiffeq {method}"] < -1e-3 for method in ("dopri5", "dopri8", "bosh3")]
inside = [lowest["torchdiffeq euler"] >= 0, lowest["scipy RK45"] >= 0]
sys.exit(0 if all(outside) and all(inside) else "this has changed")
EOF
