#!/usr/bin/env bash
# SiT-XL/2 on ImageNet 256, as the paper's headline needs it: 2,000,000 steps (400 epochs) of stage 2.
#
#   IMAGENET=/data/imagenet/train runs/imagenet_xl2.sh
#
# Needs: eight GPUs of 80 GB (XL takes 12.6 GiB and a third of a GiB an image, of 32 a GPU);
# data/sd-vae.pt; openai/guided-diffusion's VIRTUAL_imagenet256_labeled.npz.
# Takes (estimated, eight H100): stage 1 4.7 hours, stage 2 two days, 16 % more while the teacher guides;
# 50,000 samples with guidance 40 minutes.
# Disk: latents 21 GB, 11 GB a checkpoint of which three are kept, 2.7 GB a snapshot.
# Expect (the paper): FID 1.25 with cfg 1.9 up to t = 0.65, 250 steps of the SDE, 50,000 random labels.
# Neighbours, from their papers: SiT-XL/2 2.06 after 1,400 epochs, REPA 1.42 after 800, SRA 1.58 after 800.
# dt = 19 and ds = 14 are ours, by analogy with the authors' B/2 (two thirds, one half of the depth).
set -euo pipefail
RUN="torchrun --nproc_per_node=${GPUS:-8}"

$RUN vae_latents.py --images "${IMAGENET:-/data/imagenet/train}" --vae data/sd-vae.pt --out data/imagenet256
$RUN train_stage1.py --out out/xl2-stage1
[ -e out/xl2-teacher/teacher.pt ] || python build_teacher.py --ckpt out/xl2-stage1 --out out/xl2-teacher
# A small teacher instead (not the paper's; better on our small networks, not tried at this size):
#   $RUN train_stage1.py --model SiT-S/2 --steps 400000 --out out/s2-stage1
#   python build_teacher.py --ckpt out/s2-stage1 --guide-scale 10 --student SiT-XL/2 --out out/xl2-teacher
$RUN train_stage2.py --teacher out/xl2-teacher/teacher.pt --steps 2000000 --snapshots 100000 --out out/xl2-stage2

$RUN sample.py --ckpt out/xl2-stage2 --num-images 50000 --labels random --cfg 1.9 --guidance-high 0.65 --out out/xl2-samples
python fid.py out/xl2-samples "${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}"
