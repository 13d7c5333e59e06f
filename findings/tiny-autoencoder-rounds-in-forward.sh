#!/usr/bin/env bash
# diffusers' AutoencoderTiny: calling the model is not decoding what it encodes.
#
# diffusers 0.42.1, torch 2.13.0. `vae(x)` rounds the latents to 8 bits over their range of -3 to 3
# on the way; `vae.decode(vae.encode(x).latents)` does not. So a test of reconstruction by `vae(x)`
# measures another autoencoder than the one that a diffusion model is trained with. With the
# random weights here, whose latents are small, 1,024 different numbers become 9.
# We guessed: the two are equal to the bit, as they are for AutoencoderKL with its posterior's mode.
# Seen:
#   latents: 1024 different numbers, std 0.043; a step of 8 bits is 0.024
#   AutoencoderTiny: the two differ by up to 0.0053 (std of the picture 0.14)
#   AutoencoderKL: the two differ by up to 0.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 diffusers==0.42.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import sys

import diffusers
import torch

torch.manual_seed(0)
tiny = diffusers.AutoencoderTiny(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
).eval()
kl = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval()
x = torch.rand(1, 3, 32, 32) * 2 - 1
with torch.no_grad():
    latents = tiny.encode(x).latents
    by_hand, by_call = tiny.decode(latents).sample, tiny(x).sample
    kl_by_hand, kl_by_call = kl.decode(kl.encode(x).latent_dist.mode()).sample, kl(x).sample
apart = (by_hand - by_call).abs().max().item()
kl_apart = (kl_by_hand - kl_by_call).abs().max().item()
different = latents.unique().numel()
print(f"latents: {different} different numbers, std {latents.std():.3f};", end=" ")
print(f"a step of 8 bits is {6 / 255:.3f}")
print(f"AutoencoderTiny: the two differ by up to {apart:.4f}", end=" ")
print(f"(std of the picture {by_hand.std():.2f})")
print(f"AutoencoderKL: the two differ by up to {kl_apart:.4f}")
sys.exit(0 if apart > 1e-3 and kl_apart < 1e-5 else "this has changed")
EOF
