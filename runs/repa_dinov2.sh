#!/usr/bin/env bash
# REPA (arXiv 2410.06940) as a baseline on the same loop: SiT-B/2, ImageNet 256, 400,000 steps, with
# DINOv2-B's features computed in each step from the pictures' files.
#
#   runs/repa_dinov2.sh           # after imagenet_b2.sh has made data/imagenet256
#
# Needs: eight GPUs; the pictures where they were when the latents were made (or --images); access to
# torch.hub for the encoder, once; processors that decode 256 JPEGs a step (eight threads a GPU).
# Takes (estimated): 1.8 hours of vanilla B/2 and a third more for the encoder, if the decoding keeps up.
# Disk: nothing beside checkpoints; as files the features would take 504 GB.
# Expect: about 22.4, the FID-50K without guidance after 400,000 steps that a table by others has for
# SiT-B/2 with REPA (RARE, 2026; one seed; 35.2 for SiT alone). REPA has no q/k norm, hence --no-qk-norm.
set -euo pipefail
RUN="torchrun --nproc_per_node=${GPUS:-8}"
$RUN -m experiments.methods.repa_dino --data data/imagenet256 --model SiT-B/2 --no-qk-norm \
    --steps 400000 --snapshots 50000 --out out/b2-repa
$RUN sample.py --ckpt out/b2-repa --num-images 50000 --labels random --out out/b2-repa-samples
python fid.py out/b2-repa-samples "${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}"
