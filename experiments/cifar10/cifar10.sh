#!/usr/bin/env bash
# What really helps? Every row of the experiment on CIFAR-10, then its tables and figures.
#
#   bash experiments/cifar10/cifar10.sh                                       # all of it; again: it goes on
#   IMAGES=DIR JOBS=4 COMPILE=1 bash experiments/cifar10/cifar10.sh           # DIR/<class>/*.png at hand
#   ONLY='^(N|relN|vanilla)-seed' bash experiments/cifar10/cifar10.sh         # the rows of these names
#   JUDGE=2 bash experiments/cifar10/cifar10.sh                               # judged by a second judge
#
# JOBS trainings run at a time, one core each; JOBS=1 OMP_NUM_THREADS=16, or a GPU, runs them one
# after the other. STEPS (a multiple of 4) and SAMPLES make it shorter. All is in out/cifar10:
# NAME-seedS holds a run, its samples and the judge's figures, NAME-seedS.log what it printed. A
# killed run continues where it was cut: call the script again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. experiments/machine/processes.sh
watch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
JOBS=${JOBS:-2} JUDGE=${JUDGE:-} STEPS=${STEPS:-6000} SAMPLES=${SAMPLES:-5000}
COMPILE=${COMPILE:+--compile} E=out/cifar10 DATA=data/cifar10-latents
quarter=$((STEPS / 4)) half=$((STEPS / 2)) double=$((STEPS * 2))
mkdir -p $E

# What all trainings share, except where a row says otherwise
COMMON="--data $DATA --model SiT-Ti/2 --batch-size 32 --lr 2e-3 --warmup 100 --ema 0.998 --ema-ramp
    --projector-dim 256 --log-every 100 --save-every $quarter --keep 99 $COMPILE"
LARGER="--model SiT-W/2 --lr 1e-3"

# ---- What a row does. NAME is the row's name, its run is out/cifar10/NAME

checkpoint() { printf '%s/%s/ckpt-%07d.pt' $E "$NAME" "$1"; }

train() { # train SCRIPT STEPS FLAGS...: the seed is the last figure of the name
    [ -e "$(checkpoint "$2")" ] ||
        python $1 $COMMON --seed "${NAME##*-seed}" --steps "$2" "${@:3}" --out $E/$NAME
}

student() { # student STEPS RUN/TEACHER FLAGS...: stage 2, guided to the end
    train train_stage2.py "$1" --teacher "$E/$2/teacher.pt" --guide-scale 10 \
        --guide-steps 1000000 "${@:3}"
}

teachers() { # teachers STEP...: of this run after so many steps, in out/cifar10/NAME/teacher-STEP
    local step
    for step in "$@"; do
        [ -e $E/$NAME/teacher-$step/teacher.pt ] ||
            python build_teacher.py --ckpt "$(checkpoint $step)" --student SiT-Ti/2 \
                --out $E/$NAME/teacher-$step || return 1
    done
}

measure() { # measure STEP...: samples of the EMA, from the same noise for all rows, and the judge
    local step out
    for step in "$@"; do
        out=$E/$NAME/samples-$step
        [ -e $out/samples.npz ] ||
            python sample.py --ckpt "$(checkpoint $step)" --num-images "$SAMPLES" --mode euler \
                --steps 16 --cfg 1 $COMPILE --out $out || return 1
        [ ! -e $out/judged$JUDGE.json ] || continue
        python -m experiments.cifar10.judge judge $E/classifier$JUDGE.pt $out/samples.npz \
            > $out/judged.tmp && mv $out/judged.tmp $out/judged$JUDGE.json || return 1
    done
}

rm -f $E/failed
row() { # row "NAME: COMMANDS", with a log of its own
    watch
    NAME=${1%%:*}
    echo "$(date +%T) $1"
    eval "${1#*: }" >> "$E/$NAME.log" 2>&1 || echo "failed: see $E/$NAME.log" | tee -a $E/failed
}

together() { # the rows on stdin, JOBS at a time; one that fails does not stop the others
    local line
    while read -r line; do
        [[ $line =~ ${ONLY:-.} ]] || continue
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
        row "$line" &
    done
    wait
}

# ---- The images, their latents, the judge

if [ ! -e $DATA/meta.json ]; then
    [ -n "${IMAGES:-}" ] || python -m experiments.cifar10.download_cifar10 "${IMAGES:=data/cifar10-images}"
    python -m experiments.latents.small_vae "$IMAGES" --size 32 --steps 3000 --out data/cifar10-vae.pt
    python vae_latents.py --images "$IMAGES" --image-size 32 --vae data/cifar10-vae.pt --out $DATA
fi
[ -e $E/classifier$JUDGE.pt ] ||
    OMP_NUM_THREADS=$((JOBS * OMP_NUM_THREADS)) python -m experiments.cifar10.judge train $DATA \
        --augment --round-trips --width 48 --steps 2500 --seed "${JUDGE:-0}" \
        --out $E/classifier$JUDGE.pt

# ---- The rows. A student's teacher is of another seed: never one with its own initialisation

described="--t-min 0.4 --t-max 0.7 --guide-weight 0.5" # the paper's words
released="--t-min 0 --t-max 1 --guide-weight 0.15"     # the arithmetic of the authors' code
measured="measure $quarter $half $STEPS"
seeds=$'1 2\n2 3\n3 1' # a student's, its teacher's

stage_1() { # of small networks, P and N, and of the student's own size, Ti; and REPA's encoder
    local seed
    for seed in 2 3 1; do
        echo "N-seed$seed: train train_stage1.py $STEPS --model SiT-N/2 && teachers $half $STEPS"
        echo "Ti-seed$seed: train train_stage1.py $STEPS && teachers $STEPS && measure $half $STEPS"
    done
    echo "P-seed3: train train_stage1.py $STEPS --model SiT-P/2 && teachers $STEPS"
    echo "repa-features: [ -e $DATA/cnn.json ] ||" \
        "python -m experiments.methods.repa_features --data $DATA --model SiT-Ti/2"
}

students() { # the rows that the README leans on; W is six times the cost, at half of the steps
    local seed other size teacher
    while read -r seed other; do
        echo "vanilla-seed$seed: train train_stage1.py $double --align-weight 0" \
            "&& measure $half $STEPS $((5 * quarter)) $((6 * quarter)) $double"
        for size in N Ti; do
            teacher=$size-seed$other/teacher-$STEPS
            echo "desc$size-seed$seed: student $STEPS $teacher $described && $measured"
            echo "rel$size-seed$seed: student $STEPS $teacher $released && $measured"
        done
        echo "W-vanilla-seed$seed: train train_stage1.py $STEPS $LARGER --align-weight 0" \
            "&& measure $half $((3 * quarter)) $STEPS"
        echo "W-descN-seed$seed: student $half N-seed$other/teacher-$STEPS $described $LARGER" \
            "&& measure $quarter $half"
    done <<< "$seeds"
}

one_seed() { # what these depend on
    local n=N-seed2/teacher-$STEPS short=N-seed2/teacher-$half
    echo "W-relN-seed2: student $half N-seed3/teacher-$STEPS $released $LARGER && measure $half"
    echo "W-descP-seed2: student $half P-seed3/teacher-$STEPS $described $LARGER && measure $half"
    echo "descN-short-seed1: student $STEPS $short $described && $measured"
    echo "descN-s3-seed1: student $STEPS $n $described --guide-scale 3 && $measured"
    echo "descN-s30-seed1: student $STEPS $n $described --guide-scale 30 && $measured"
    echo "descN-ends-half-seed1: student $STEPS $n $described --guide-steps $half && $measured"
}

baselines() { # other methods on the same loop
    local seed
    for seed in 1 2 3; do
        echo "sra-seed$seed: train '-m experiments.methods.sra' $STEPS && $measured"
        echo "repa-seed$seed: train '-m experiments.methods.repa' $STEPS --features $DATA/cnn.npy && $measured"
        echo "internal_guidance-seed$seed: train '-m experiments.methods.internal_guidance' $STEPS && $measured"
    done
}

together < <(stage_1)
together < <(students; one_seed; baselines)

[ -z "$JUDGE" ] && flags="" || flags="--judge $JUDGE --figure $E/compute$JUDGE.png"
python -m experiments.cifar10.report $flags
[ ! -e $E/failed ]
