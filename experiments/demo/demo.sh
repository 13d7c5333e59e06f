#!/usr/bin/env bash
# The whole method on drawn figures, once: `make demo`, from images to one page, out/demo/demo.png.
# Every command is printed and can be run alone. Another seed: rm -r out/demo, then SEED=2 make demo.
set -eu
cd "$(dirname "$0")/../.."
. experiments/machine/processes.sh
. experiments/demo/data.sh
watch
start=$(date +%s)
D=out/demo
mkdir -p $D
seed=${SEED:-0} # of stage 1; the student's is the next one
training="$training --log-every 20 --save-every 150 --keep 9"

echo "The demo takes about five minutes on two free cores. It needs no GPU."
figures
part "Stage 1 of a very small network, SiT-P, on 64 tokens an image: 40 seconds"
unless $D/stage1/ckpt-0000600.pt python train_stage1.py $training --model SiT-P/2 \
    --seed $seed --steps 600 --out $D/stage1
part "The teacher: that network, frozen and cut"
unless $D/teacher/teacher.pt python build_teacher.py --ckpt $D/stage1 --guide-scale 10 \
    --student SiT-N/2 --out $D/teacher
part "Stage 2, the student, SiT-N: two to three minutes"
unless $D/stage2/ckpt-0001200.pt python train_stage2.py $training --model SiT-N/2 \
    --seed $((seed + 1)) --teacher $D/teacher/teacher.pt --guide-steps 1200 --steps 1200 \
    --out $D/stage2
part "Samples of four moments of stage 2, from the same noise: half a minute"
for step in 0150 0300 0600 1200; do
    unless $D/samples-$step/samples.npz python sample.py --ckpt $D/stage2/ckpt-000$step.pt \
        --num-images 8 --mode euler --steps 30 --cfg 3 --device cpu --out $D/samples-$step
done
part "The page"
python -m experiments.demo.page
printf '\nThis took %d minutes %d seconds.\n' $((($(date +%s) - start) / 60)) \
    $((($(date +%s) - start) % 60))
