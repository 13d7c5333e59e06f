#!/usr/bin/env bash
# The whole method on drawn shapes, from images to metrics, on a CPU. Every command is printed as it is
# run, so that it can be run alone; run again, each does only what is missing. Start it with `make demo`.
set -eu
cd "$(dirname "$0")/.."
start=$(date +%s)
run() { printf '\n$ %s\n' "$*"; "$@"; }
unless() { # unless FILE COMMAND...: a command whose result is kept
    local file=$1
    shift
    if [ -e "$file" ]; then printf '\n# %s is there already: %s\n' "$file" "$*"; else run "$@"; fi
}

# The paper's settings but for what a small network and few steps ask for: rate, warm-up, a faster
# average; and s = 5, not 30: with ten classes f_c - f_u is large already (docs/results.md)
settings="--data data/shapes --model SiT-Ti/2 --batch-size 32 --lr 3e-3 --warmup 100 --ema 0.995 --ema-ramp --projector-dim 256"
steps="--steps 2000 --log-every 200 --save-every 1000"
sampling="--num 500 --mode euler --steps 25"

unless data/shapes-images/star python experiments/shapes.py data/shapes-images
run python experiments/small_vae.py data/shapes-images --size 32 --out data/shapes-vae.pt
run python vae_latents.py --images data/shapes-images --vae data/shapes-vae.pt --image-size 32 --out data/shapes
run python train_stage1.py $settings $steps --out out/demo/stage1
unless out/demo/probe/features.png python experiments/probe.py out/demo/stage1 --scales 3,5,10,30 --out out/demo/probe
unless out/demo/teacher/teacher.pt python build_teacher.py --ckpt out/demo/stage1 --guide-scale 5 --out out/demo/teacher
run python train_stage2.py $settings $steps --teacher out/demo/teacher/teacher.pt --guide-steps 2000 --out out/demo/stage2
run python train_stage1.py $settings $steps --align-weight 0 --seed 1 --out out/demo/vanilla
for net in stage2 vanilla; do
    for cfg in 1 4; do
        run python sample.py --ckpt out/demo/$net $sampling --cfg $cfg --out out/demo/samples-$net-cfg$cfg
    done
done
unless data/shapes/classifier.pt python experiments/classifier.py train data/shapes --out data/shapes/classifier.pt
printf '\n$ python experiments/classifier.py judge ...\n'
python experiments/classifier.py judge data/shapes/classifier.pt out/demo/samples-{stage2,vanilla}-cfg{1,4}/samples.npz >out/demo/judged.jsonl
run python experiments/demo_sheet.py
printf '\nThis took %d minutes %d seconds.\n' $((($(date +%s) - start) / 60)) $((($(date +%s) - start) % 60))
