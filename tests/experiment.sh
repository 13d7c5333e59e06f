#!/usr/bin/env bash
# Does it help? The README's experiment on CIFAR-10: four hours on 2 CPU cores, JOBS trainings at a time, one core each.
# Start it with `make experiment`; IMAGES=DIR (DIR/<class>/*.png, the training images) spares the download. Run again, it goes on.
# JOBS=1 OMP_NUM_THREADS=16, or a GPU, runs them one after the other.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} E=out/cifar10 DATA=data/cifar10-latents STEPS=${STEPS:-6000}
export EVERY=$((STEPS / 4)) SAMPLES=${SAMPLES:-5000}
mkdir -p $E

# All trainings share everything but what the name says. Raw numbers: README, "Does it help?"
common="--data $DATA --model SiT-Ti/2 --batch-size 32 --lr 2e-3 --warmup 100 --ema 0.998 --ema-ramp --projector-dim 256
        --log-every 100 --save-every $EVERY --keep 99 --sample-every 0"
export common

stage1() { # stage1 NAME SEED STEPS FLAGS...
    local out=$E/$1 seed=$2 steps=$3; shift 3
    python train_stage1.py $common --seed "$seed" --steps "$steps" "$@" --out "$out"
}
teacher() { # teacher NAME STEP OUT: stage 1's network after STEP steps -> out/cifar10/OUT/teacher.pt, with the probe's table
    [ -e "$E/$3/teacher.pt" ] || python build_teacher.py --ckpt "$E/$1/ckpt-$(printf %07d "$2").pt" --probe-scales 3,5,10,30 --out "$E/$3"
}
stage2() { # stage2 NAME SEED TEACHER SCALE GUIDE-STEPS FLAGS...
    python train_stage2.py $common --seed "$2" --steps "$STEPS" --teacher "$E/$3/teacher.pt" --guide-scale "$4" --guide-steps "$5" "${@:6}" --out "$E/$1"
}
measure() { # measure NAME QUARTER...: samples of the EMA without guidance, from the same noise for all, judged by the classifier
    local name=$1 quarter step out; shift
    for quarter in "$@"; do
        step=$((quarter * EVERY)) out=$E/$name/samples-$((quarter * EVERY))
        if [ ! -e "$out/judged.json" ]; then
            python sample.py --ckpt "$E/$name/ckpt-$(printf %07d "$step").pt" --num "$SAMPLES" --mode euler --steps 16 --out "$out" &&
            python tests/classifier.py judge $E/classifier.pt "$out/samples.npz" > "$out/judged.tmp" &&
            mv "$out/judged.tmp" "$out/judged.json" || return 1
        fi
    done
}
export -f stage1 teacher stage2 measure
together() { # the lines of stdin as jobs, JOBS at a time, each with a log; the whole fails if one does
    xargs -P "${JOBS:-2}" -d '\n' -n 1 bash -c 'set -eu; log=$E/$(set -- $0; echo $2).log; echo "$0"; (eval "$0") >> "$log" 2>&1 || { echo "failed, see $log: $0"; exit 1; }'
}

if [ -n "${IMAGES:-}" ]; then source="--dataset folder --images $IMAGES --image-size 32"; else source="--dataset cifar10"; fi
[ -e $DATA/labels.npy ] || python vae_latents.py $source --vae-steps 3000 --out $DATA
[ -e $E/classifier.pt ] || python tests/classifier.py train $DATA --augment --round-trips --width 48 --steps 2500 --out $E/classifier.pt

# The student of one seed has the teacher of the other: it never starts from its teacher's own initialisation
together <<END
stage1 stage1-seed1 1 $STEPS && teacher stage1-seed1 $STEPS stage1-seed1 && measure stage1-seed1 4
stage1 stage1-seed2 2 $STEPS && teacher stage1-seed2 $STEPS stage1-seed2 && measure stage1-seed2 4
END
together <<END
stage1 vanilla-seed1 1 $((2 * STEPS)) --align-weight 0 && measure vanilla-seed1 1 2 3 4 6 8
stage1 vanilla-seed2 2 $STEPS --align-weight 0 && measure vanilla-seed2 1 2 3 4
stage2 s10-seed1 1 stage1-seed2 10 $STEPS && measure s10-seed1 1 2 3 4
stage2 s3-seed1 1 stage1-seed2 3 $STEPS && measure s3-seed1 1 2 3 4
stage2 s30-seed1 1 stage1-seed2 30 $STEPS && measure s30-seed1 2 4
stage2 s10-seed2 2 stage1-seed1 10 $STEPS && measure s10-seed2 1 2 3 4
stage2 half-seed1 1 stage1-seed2 10 $((STEPS / 2)) && measure half-seed1 3 4
stage2 s1-seed1 1 stage1-seed2 1 $STEPS && measure s1-seed1 2 4
teacher stage1-seed2 $EVERY stage1-short-seed2 && stage2 short-seed1 1 stage1-short-seed2 10 $STEPS && measure short-seed1 1 2 4
stage1 stage1-latent-seed2 2 $STEPS --align-target latent && teacher stage1-latent-seed2 $STEPS stage1-latent-seed2 && stage2 latent-seed1 1 stage1-latent-seed2 10 $STEPS && measure latent-seed1 2 4
stage1 stage1-drop-seed2 2 $STEPS --label-drop 0.3 && teacher stage1-drop-seed2 $STEPS stage1-drop-seed2 && stage2 drop-seed1 1 stage1-drop-seed2 10 $STEPS && measure drop-seed1 2 4
stage2 light-seed1 1 stage1-seed2 30 $STEPS --guide-weight 0.05 && measure light-seed1 2 4
stage1 vanilla-seed3 3 $STEPS --align-weight 0 && measure vanilla-seed3 1 2 3 4
stage2 s10-seed3 3 stage1-seed1 10 $STEPS && measure s10-seed3 1 2 3 4
END
for name in vanilla stage1 s10; do # the picture's: with guidance, so that one sees what they are
    python sample.py --ckpt "$E/$name-seed1/ckpt-$(printf %07d "$STEPS").pt" --num 60 --mode heun --steps 20 --cfg 3 --out $E/$name-seed1/picture
done
python tests/experiment_report.py
