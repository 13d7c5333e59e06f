#!/usr/bin/env bash
# diffusers' DiT class does not embed times as the DiT that it is named after.
#
# diffusers 0.42.1, torch 2.13.0. The 128 frequencies of DiT's code, as of SiT's and of most that
# came after it, are 10000^(-i / 128). Those of DiTTransformer2DModel are 10000^(-i / 127): the
# second is 0.9300 instead of 0.9306. The class has no argument for it, although the layer inside
# has one (downscale_freq_shift). Weights that another code trained, and whose tensors were renamed
# for this class, get times that they were not trained with.
# We guessed: the same frequencies, to float32's rounding.
# Seen:
#   DiTTransformer2DModel: 1.000000 0.930045 0.864984
#   10000^(-i / 128):      1.000000 0.930572 0.865964
#   10000^(-i / 127):      1.000000 0.930045 0.864984
#   at t = 999 the two embeddings differ by up to 1.94
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 diffusers==0.42.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import sys

import diffusers
import torch

dit = diffusers.DiTTransformer2DModel(2, 32, sample_size=8, num_layers=1, norm_num_groups=2)
embed = dit.transformer_blocks[0].norm1.emb.time_proj  # cosines, then sines, of t times frequency
ours = 10000 ** (-torch.arange(128) / 128)
shifted = 10000 ** (-torch.arange(128) / 127)
found = embed(torch.ones(1))[0, :128].acos()
for name, numbers in (
    ("DiTTransformer2DModel: ", found),
    ("10000^(-i / 128):      ", ours),
    ("10000^(-i / 127):      ", shifted),
):
    print(name + " ".join(f"{number:.6f}" for number in numbers[:3]))
angles = 999 * ours.double()
wanted = torch.cat([angles.cos(), angles.sin()])
apart = (embed(torch.tensor([999.0]))[0] - wanted).abs().max().item()
print(f"at t = 999 the two embeddings differ by up to {apart:.2f}")
same = (found[:50] - shifted[:50]).abs().max() < 1e-4
sys.exit(0 if same and apart > 0.5 else "this has changed")
EOF
