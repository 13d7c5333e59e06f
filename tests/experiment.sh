#!/usr/bin/env bash
# Does it help? The README's experiment on CIFAR-10: about three hours on 2 CPU cores, JOBS trainings at a time, one core each.
# Start it with `make experiment`; IMAGES=DIR (DIR/<class>/*.png, the training images) spares the download. Run again, it goes on.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 E=out/cifar10 DATA=data/cifar10-latents STEPS=${STEPS:-6000}
export EVERY=$((STEPS / 4)) S=${S:-5} SAMPLES=${SAMPLES:-5000}
mkdir -p $E

# All trainings share everything but what the name says. Raw numbers: README, "Does it help?"
common="--data $DATA --model SiT-Ti/2 --batch-size 32 --lr 2e-3 --warmup 100 --ema 0.998 --ema-ramp --projector-dim 256
        --log-every 100 --save-every $EVERY --keep 99 --sample-every 0"
export common

stage1() { # stage1 NAME SEED STEPS FLAGS...
    local out=$E/$1 seed=$2 steps=$3; shift 3
    python train_stage1.py $common --seed "$seed" --steps "$steps" "$@" --out "$out"
}
teacher() { # teacher NAME: out/cifar10/NAME/ckpt.pt, after STEPS steps -> out/cifar10/NAME/teacher.pt, with the probe's table
    [ -e "$E/$1/teacher.pt" ] || python build_teacher.py --ckpt "$E/$1/ckpt.pt" --guide-scale "$S" --probe-scales 3,5,10,30 --out "$E/$1"
}
stage2() { # stage2 NAME SEED TEACHER SCALE GUIDE-STEPS
    python train_stage2.py $common --seed "$2" --steps "$STEPS" --teacher "$E/$3/teacher.pt" --guide-scale "$4" --guide-steps "$5" --out "$E/$1"
}
measure() { # measure NAME STEP...: samples of the EMA without guidance, from the same noise for all, judged by the classifier
    local name=$1 step out; shift
    for step in "$@"; do
        out=$E/$name/samples-$step
        if [ ! -e "$out/judged.json" ]; then
            python sample.py --ckpt "$E/$name/ckpt-$(printf %07d "$step").pt" --num "$SAMPLES" --mode euler --steps 16 --out "$out"
            python tests/classifier.py judge $E/classifier.pt "$out/samples.npz" > "$out/judged.tmp"
            mv "$out/judged.tmp" "$out/judged.json"
        fi
    done
}
export -f stage1 teacher stage2 measure
together() { # the lines of stdin as jobs, JOBS at a time, each with a log; the whole fails if one does
    xargs -P "${JOBS:-2}" -d '\n' -n 1 bash -c 'set -eu; log=$E/$(set -- $0; echo $2).log; echo "$0"; (eval "$0") >> "$log" 2>&1 || { echo "failed, see $log: $0"; exit 1; }'
}

if [ -n "${IMAGES:-}" ]; then source="--dataset folder --images $IMAGES --image-size 32"; else source="--dataset cifar10"; fi
[ -e $DATA/labels.npy ] || python vae_latents.py $source --vae-steps 3000 --out $DATA
[ -e $E/classifier.pt ] || python tests/classifier.py train $DATA --augment --width 48 --steps 1500 --out $E/classifier.pt

# Each seed's student has the other seed's teacher, so that no student starts from its teacher's own initialisation
at="$((EVERY)) $((2 * EVERY)) $((3 * EVERY)) $((4 * EVERY))"
together <<END
stage1 stage1-seed1 1 $STEPS && teacher stage1-seed1
stage1 stage1-seed2 2 $STEPS && teacher stage1-seed2
END
together <<END
stage1 vanilla-seed1 1 $((2 * STEPS)) --align-weight 0 && measure vanilla-seed1 $at $((6 * EVERY)) $((8 * EVERY))
stage2 ours-seed1 1 stage1-seed2 $S $STEPS && measure ours-seed1 $at
stage1 vanilla-seed2 2 $STEPS --align-weight 0 && measure vanilla-seed2 $at
stage2 ours-seed2 2 stage1-seed1 $S $STEPS && measure ours-seed2 $at
END
