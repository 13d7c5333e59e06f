#!/usr/bin/env bash
# Stage 2 and vanilla SiT on drawn figures, four seeds of each: `make compare`, to out/compare/.
# It takes about ten minutes on two free cores. Every command can be run alone; `make compare`
# again skips what is finished.
set -eu
cd "$(dirname "$0")/../.."
. experiments/machine/processes.sh
. experiments/demo/data.sh
watch
D=out/compare
mkdir -p $D
training="$training --log-every 100"
teacher_steps=2000 steps=900 vanilla_steps=1120 # so that both cost the same in all

samples() { # samples SEED NAME CHECKPOINT: without guidance, and with
    local cfg
    for cfg in 1 3; do
        unless $D/seed$1/$2-cfg$cfg/samples.npz python sample.py --ckpt $D/seed$1/$3 \
            --num-images 400 --mode euler --steps 20 --cfg $cfg --device cpu \
            --out $D/seed$1/$2-cfg$cfg
    done
}

one_seed() { # a teacher, its student and a vanilla SiT with the student's seed
    local run=$D/seed$1
    part "Seed $1"
    unless $run/stage1/ckpt-000$teacher_steps.pt python train_stage1.py $training \
        --model SiT-P/4 --seed $1 --steps $teacher_steps --out $run/stage1
    unless $run/teacher/teacher.pt python build_teacher.py --ckpt $run/stage1 --guide-scale 10 \
        --student SiT-Ti/4 --out $run/teacher
    unless $run/stage2/ckpt-0000$steps.pt python train_stage2.py $training --model SiT-Ti/4 \
        --seed $(($1 + 1)) --teacher $run/teacher/teacher.pt --guide-steps $steps --steps $steps \
        --out $run/stage2
    unless $run/vanilla/ckpt-000$vanilla_steps.pt python train_stage1.py $training \
        --model SiT-Ti/4 --align-weight 0 --seed $(($1 + 1)) --steps $vanilla_steps \
        --save-every $steps --out $run/vanilla
    samples $1 stage2 stage2/ckpt-0000$steps.pt
    samples $1 vanilla-steps vanilla/ckpt-0000$steps.pt
    samples $1 vanilla-compute vanilla/ckpt-000$vanilla_steps.pt
}

seeds() {
    watch
    local seed
    for seed in "$@"; do one_seed $seed; done
}

figures
export OMP_NUM_THREADS=1 # two seeds side by side, one core each
unless data/shapes/classifier.pt python -m experiments.cifar10.judge train data/shapes \
    --steps 300 --out data/shapes/classifier.pt
part "On the second core: seeds 2 and 6 (out/compare/second.log)"
seeds 2 6 > $D/second.log 2>&1 &
other=$!
seeds 0 4
part "Wait for the second core"
wait $other || { tail -n 20 $D/second.log; exit 1; }
python -m experiments.demo.compare
