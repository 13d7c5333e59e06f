#!/usr/bin/env bash
# The whole method on drawn shapes, on two CPU cores: `make demo`, from images to out/demo/demo.png.
# Every command is printed and can be run alone. Another seed: rm -r out/demo, then SEED=2 make demo.
set -eu
cd "$(dirname "$0")/../.."
. experiments/machine/processes.sh
watch
start=$(date +%s)
D=out/demo
mkdir -p $D

part() { printf '\n== %s\n' "$*"; }
unless() { # unless FILE COMMAND...: a command whose result is kept
    local file=$1
    shift
    if [ -e "$file" ]; then
        echo "# $file is there already"
    else
        printf '$ %s\n' "$*"
        "$@"
    fi
}

# The paper's settings but for what a small network and few steps ask for: rate, warm-up, a faster
# average; and s = 10, not 30 (docs/results.md)
training="--data data/shapes --device cpu --batch-size 32 --lr 3e-3 --warmup 100 --ema 0.995
    --ema-ramp --projector-dim 256 --log-every 100 --save-every 700 --keep 9"
teacher_steps=1400 steps=1400 vanilla_steps=1780 # so that both cost the same in all
seed=${SEED:-0}                                  # of stage 1; the students' is the next one

samples() { # samples CHECKPOINT NAME: without guidance, for the figures, and with, to look at
    local cfg
    for cfg in 1 3; do
        unless $D/samples-$2-cfg$cfg/samples.npz python sample.py --ckpt "$1" --num-images 400 \
            --mode euler --steps 20 --cfg $cfg --device cpu --out $D/samples-$2-cfg$cfg
    done
}

self_transcendence() {
    part "Stage 1 of a small network, SiT-N: 40 seconds"
    unless $D/stage1/ckpt-000$teacher_steps.pt python train_stage1.py $training --model SiT-N/4 \
        --seed $seed --steps $teacher_steps --out $D/stage1
    part "The teacher: that network, frozen and cut. A look at its features: 15 seconds"
    unless $D/teacher/teacher.pt python build_teacher.py --ckpt $D/stage1 --guide-scale 10 \
        --student SiT-Ti/4 --out $D/teacher
    unless $D/probe/features.png python -m experiments.checkpoints.probe $D/stage1 --scales 3,5,10 \
        --device cpu --out $D/probe
    part "Stage 2, the student, SiT-Ti: about 3 minutes; then its samples, half a minute"
    unless $D/stage2/ckpt-000$steps.pt python train_stage2.py $training --model SiT-Ti/4 \
        --seed $((seed + 1)) --teacher $D/teacher/teacher.pt --guide-steps $steps --steps $steps \
        --out $D/stage2
    samples $D/stage2 stage2
}

baseline() {
    watch
    unless data/shapes/classifier.pt python -m experiments.cifar10.judge train data/shapes \
        --steps 300 --out data/shapes/classifier.pt
    unless $D/vanilla/ckpt-000$vanilla_steps.pt python train_stage1.py $training --model SiT-Ti/4 \
        --align-weight 0 --seed $((seed + 1)) --steps $vanilla_steps --out $D/vanilla
    samples $D/vanilla vanilla
}

echo "The demo takes four to nine minutes on two free cores."
part "Draw 10,000 pictures of eight figures: 10 seconds"
unless data/shapes-images/arrow/09999.png python -m experiments.demo.shapes data/shapes-images
part "Train a small VAE and encode the pictures: a minute"
unless data/shapes-vae.pt python -m experiments.latents.small_vae data/shapes-images --size 32 \
    --device cpu --factor 2 --batch-size 8 --lr 3e-3 --steps 600 --out data/shapes-vae.pt
unless data/shapes/meta.json python vae_latents.py --images data/shapes-images \
    --vae data/shapes-vae.pt --image-size 32 --device cpu --out data/shapes

export OMP_NUM_THREADS=1 # two trainings side by side, one core each
part "On the second core: a vanilla SiT, for the same compute in all (out/demo/vanilla.log)"
baseline > $D/vanilla.log 2>&1 &
other=$!
self_transcendence
part "Wait for the second core: a minute at most"
wait $other || { tail -n 20 $D/vanilla.log; exit 1; }
part "A small CNN judges the samples, and the sheet is drawn: 10 seconds"
python -m experiments.demo.sheet
printf '\nThis took %d minutes %d seconds.\n' $((($(date +%s) - start) / 60)) \
    $((($(date +%s) - start) % 60))
