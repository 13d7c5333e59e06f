#!/usr/bin/env bash
# SiT-B/2 on pictures of your own, 128 px, with a small teacher; then a vanilla baseline.
#
#   PHOTOS=photos HELD=held-out runs/own_images.sh
#
# Needs: PHOTOS/<class>/*.jpg, here taken to be 30,000; HELD, a few thousand more that nothing trains
# on; data/sd-vae.pt (README, "Your own images"); one GPU with 24 GB.
# Takes (estimated for an H100): latents 2 minutes, teacher 13 minutes, each student 2.5 hours.
# Disk: latents 0.5 GB, 2.2 GB a checkpoint of B, of which the newest three are kept.
# Expect: L_diff falls from 2 to below 1 in the first thousand steps. There is no published number for
# your pictures. FID against HELD is the one to watch: when it rises while that against PHOTOS falls,
# the network memorises (60,000 steps are 512 epochs of 30,000 pictures).
set -euo pipefail
PHOTOS=${PHOTOS:-photos} HELD=${HELD:-held-out}
SHORT="--ema 0.999 --ema-ramp"  # the paper's average of 10,000 steps is too slow for a short run

# The latents, once. For 256 px say 256 here and in fid.py.
python vae_latents.py --images "$PHOTOS" --vae data/sd-vae.pt --image-size 128 --out data/photos

# Stage 1: a small teacher. It costs about a tenth of the student's training.
python train_stage1.py --data data/photos --model SiT-S/2 --steps 20000 $SHORT --out out/photos-teacher
# Look at its features before they teach: take the smallest s where the accuracy stops rising.
python -m experiments.checkpoints.probe out/photos-teacher --scales 3,5,10,30 --out out/photos-probe
[ -e out/photos-f_g/teacher.pt ] ||
    python build_teacher.py --ckpt out/photos-teacher --guide-scale "${S:-10}" --student SiT-B/2 --out out/photos-f_g

# Stage 2 and vanilla, with the same seed: the same order of pictures and the same noise.
python train_stage2.py --data data/photos --model SiT-B/2 --teacher out/photos-f_g/teacher.pt \
    --steps 60000 --guide-steps 1000000 $SHORT --out out/photos-stage2
python train_stage1.py --data data/photos --model SiT-B/2 --align-weight 0 --seed 1 \
    --steps 60000 $SHORT --out out/photos-vanilla

for run in stage2 vanilla; do
    python sample.py --ckpt out/photos-$run --num-images 3000 --labels data --cfg 2 --guidance-high 0.65 --out out/photos-$run/samples
    python fid.py out/photos-$run/samples "$HELD" --image-size 128
done
