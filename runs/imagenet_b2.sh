#!/usr/bin/env bash
# SiT-B/2 on ImageNet 256, three arms of 400,000 steps, and their curves in one picture:
#   vanilla; stage 2 as the paper has it (a teacher of B/2, s = 30, guidance for 100,000 steps);
#   stage 2 as our small experiments favour it (a teacher of S/2, s = 10, guidance to the end).
#
#   IMAGENET=/data/imagenet/train runs/imagenet_b2.sh
#
# Needs: eight GPUs; data/sd-vae.pt; openai/guided-diffusion's VIRTUAL_imagenet256_labeled.npz.
# Takes (estimated, eight H100): latents 20 minutes; stage 1 0.9 hours for B, 0.3 for S; each arm 1.8
# hours, 16 % more while a teacher of B guides, 5 % while one of S does; each point of a curve 4 minutes.
# Disk: latents 21 GB; 0.53 GB a snapshot, 8 of them an arm; 2.2 GB a checkpoint, three of them an arm.
# Expect (the paper's figure, FID of 10,000 samples, no guidance; steps of the arm itself):
#   steps     50k    100k   200k   300k   400k
#   vanilla   96.4   67.0   49.7   42.9   38.6
#   stage 1   90.8   58.8   40.9   36.0   32.2
#   stage 2   74.2   51.7   31.4   26.0   22.9
# The third arm has no published number. Say beside it what differs (docs/differences.md).
set -euo pipefail
RUN="torchrun --nproc_per_node=${GPUS:-8}"
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}
B="--model SiT-B/2 --snapshots 50000"

$RUN vae_latents.py --images "${IMAGENET:-/data/imagenet/train}" --vae data/sd-vae.pt --out data/imagenet256

# Stage 1: the paper's teacher, and a small one, trained longer.
$RUN train_stage1.py $B --out out/b2-stage1
$RUN train_stage1.py --model SiT-S/2 --steps 400000 --out out/s2-stage1
[ -e out/b2-teacher/teacher.pt ] || python build_teacher.py --ckpt out/b2-stage1 --out out/b2-teacher
[ -e out/s2-teacher/teacher.pt ] ||
    python build_teacher.py --ckpt out/s2-stage1 --guide-scale 10 --student SiT-B/2 --out out/s2-teacher

# The three arms. Stage 2's seed is 1, so vanilla has it, too.
$RUN train_stage2.py $B --teacher out/b2-teacher/teacher.pt --steps 400000 --out out/b2-paper
$RUN train_stage2.py $B --teacher out/s2-teacher/teacher.pt --steps 400000 --guide-steps 1000000 --out out/b2-small
$RUN train_stage1.py $B --align-weight 0 --seed 1 --steps 400000 --out out/b2-vanilla

# The curves: random labels, as the authors evaluate, and the SDE sampler with 250 steps.
for arm in paper small vanilla; do
    python -m experiments.checkpoints.curve out/b2-$arm "$REFERENCE" --processes "${GPUS:-8}" \
        --labels random --beside out/b2-paper,out/b2-small,out/b2-vanilla --out out/b2-curves.png
done
