#!/usr/bin/env bash
# What really helps? Every row of the experiment on CIFAR-10, then its tables and pictures.
#
#   bash experiments/cifar10.sh                                       # all of it; again: it goes on
#   IMAGES=DIR JOBS=4 COMPILE=1 bash experiments/cifar10.sh           # DIR/<class>/*.png at hand
#   ONLY='^(N|relN|vanilla)-seed' bash experiments/cifar10.sh         # the rows of these names
#   JUDGE=2 bash experiments/cifar10.sh                               # judged by a second judge
#
# JOBS trainings run at a time, one core each; JOBS=1 OMP_NUM_THREADS=16, or a GPU, runs them one
# after the other. STEPS (a multiple of 4) and SAMPLES make it shorter. All is in out/cifar10:
# NAME-seedS holds a run, its samples and the judge's figures, NAME-seedS.log what it printed.
# WIDE_LR is the rate of the larger student's runs with a teacher. A killed run continues where it
# was cut: call the script again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} JOBS=${JOBS:-2} JUDGE=${JUDGE:-}
export STEPS=${STEPS:-6000} SAMPLES=${SAMPLES:-5000} COMPILE=${COMPILE:+--compile}
export E=out/cifar10 DATA=data/cifar10-latents PYTHON="python experiments/sizes.py"
quarter=$((STEPS / 4)) half=$((STEPS / 2)) double=$((STEPS * 2))
mkdir -p $E

# What all trainings share, except where a row says otherwise
export COMMON="--data $DATA --model SiT-Ti/2 --batch-size 32 --lr 2e-3 --warmup 100
    --ema 0.998 --ema-ramp --projector-dim 256
    --log-every 100 --save-every $quarter --keep 99 $COMPILE"

# ---- What a row does. NAME is the row's name, its run is out/cifar10/NAME

checkpoint() { printf '%s/%s/ckpt-%07d.pt' $E "$1" "$2"; }

train() { # train SCRIPT STEPS FLAGS...: the seed is the last figure of the name
    [ -e "$(checkpoint "$NAME" "$2")" ] ||
        $PYTHON "$1" $COMMON --seed "${NAME##*-seed}" --steps "$2" "${@:3}" --out "$E/$NAME"
}

student() { # student RUN/TEACHER FLAGS...: stage 2, guided to the end
    train train_stage2.py "${LENGTH:-$STEPS}" --teacher "$E/$1/teacher.pt" --guide-scale 10 \
        --guide-steps 1000000 "${@:2}"
}

teacher() { # teacher STEP OUT FLAGS...: of this run after STEP steps, in out/cifar10/NAME/OUT
    [ -e "$E/$NAME/$2/teacher.pt" ] ||
        $PYTHON build_teacher.py --ckpt "$(checkpoint "$NAME" "$1")" --student SiT-Ti/2 \
            --out "$E/$NAME/$2" "${@:3}"
}

probe() { # probe STEP: the k-NN table of its features, in out/cifar10/NAME/probe
    [ -e "$E/$NAME/probe/probe.json" ] ||
        $PYTHON experiments/probe.py "$(checkpoint "$NAME" "$1")" --out "$E/$NAME/probe"
}

measure() { # measure STEP...: samples of the EMA, from the same noise for all rows, and the judge
    local step out judged
    for step in "$@"; do
        out=$E/$NAME/samples-$step judged=$E/$NAME/samples-$step/judged$JUDGE
        [ -e "$out/samples.npz" ] ||
            $PYTHON sample.py --ckpt "$(checkpoint "$NAME" "$step")" --num "$SAMPLES" \
                --mode euler --steps 16 --cfg 1 $COMPILE --out "$out" || return 1
        [ -e "$judged.json" ] || {
            python experiments/classifier.py judge "$E/classifier$JUDGE.pt" "$out/samples.npz" \
                > "$judged.tmp" && mv "$judged.tmp" "$judged.json"
        } || return 1
    done
}

row() { # row "NAME: COMMANDS", with a log of its own
    export NAME=${1%%:*}
    echo "$(date +%T) $1"
    (eval "${1#*: }") >> "$E/$NAME.log" 2>&1 || { echo "failed: see $E/$NAME.log"; return 1; }
}
export -f checkpoint train student teacher probe measure row

failed=0
together() { # the rows on stdin, JOBS at a time; one that fails does not stop the others
    { grep -E "${ONLY:-.}" || true; } | xargs -r -P "$JOBS" -d '\n' -n 1 bash -c 'row "$0"' ||
        failed=1
}

# ---- The images, their latents, the judge

if [ ! -e $DATA/meta.json ]; then
    [ -n "${IMAGES:-}" ] || python experiments/cifar10.py "${IMAGES:=data/cifar10-images}"
    python experiments/small_vae.py "$IMAGES" --size 32 --steps 3000 --out data/cifar10-vae.pt
    python vae_latents.py --images "$IMAGES" --image-size 32 --vae data/cifar10-vae.pt --out $DATA
fi
[ -e "$E/classifier$JUDGE.pt" ] ||
    OMP_NUM_THREADS=$((JOBS * OMP_NUM_THREADS)) python experiments/classifier.py train $DATA \
        --augment --round-trips --width 48 --steps 2500 --seed "${JUDGE:-0}" \
        --out "$E/classifier$JUDGE.pt"

# ---- The teachers: stage 1 of small networks, P, N and M, and of the student's own size, Ti

full=teacher-$STEPS
teachers() {
    local seed
    for seed in 2 3 1; do
        echo "N-seed$seed: train train_stage1.py $STEPS --model SiT-N/2 && teacher $STEPS $full"
    done
    for seed in 2 3 1; do
        echo "Ti-seed$seed: train train_stage1.py $STEPS && teacher $STEPS $full" \
            "&& measure $half $STEPS"
    done
}

more_teachers() { # how small, how long; and REPA's encoder
    local size
    for size in P N M; do
        echo "$size-seed2: train train_stage1.py $double --model SiT-$size/2" \
            "&& teacher $half teacher-$half && teacher $STEPS $full" \
            "&& teacher $double teacher-$double && probe $STEPS"
    done
    echo "N-seed2: teacher $STEPS $full-ema --weights ema"
    echo "repa-features: [ -e $DATA/cnn.json ] || python experiments/baselines/repa_features.py" \
        "--data $DATA --model SiT-Ti/2 --encoder cnn" # a CNN of its own, which saw the labels
}

# ---- The students. Each has a teacher of another seed: never one with its own initialisation

described="--t-min 0.4 --t-max 0.7 --guide-weight 0.5" # the paper's words
released="--t-min 0 --t-max 1 --guide-weight 0.15"     # the arithmetic of the authors' code
measured="measure $quarter $half $STEPS"

students() { # the rows that the README leans on
    local seed other size
    while read -r seed other; do
        echo "vanilla-seed$seed: train train_stage1.py $double --align-weight 0" \
            "&& measure $half $STEPS $((5 * quarter)) $((6 * quarter)) $double"
        for size in N Ti; do
            echo "desc$size-seed$seed: student $size-seed$other/$full $described && $measured"
            echo "rel$size-seed$seed: student $size-seed$other/$full $released && $measured"
        done
    done <<< $'1 2\n2 3\n3 1'
}

one_seed() { # what the row as described, with the N teacher, depends on
    local n=N-seed2/teacher size steps
    echo "descN-s3-seed1: student $n-$STEPS $described --guide-scale 3 && $measured"
    echo "descN-s30-seed1: student $n-$STEPS $described --guide-scale 30 && $measured"
    echo "descN-ema-seed1: student $n-$STEPS-ema $described && $measured"
    echo "descN-ends-half-seed1: student $n-$STEPS $described --guide-steps $half && $measured"
    for size in P N M; do
        for steps in $half $STEPS $double; do
            [ "$size-$steps" = "N-$STEPS" ] || # that is descN itself
                echo "desc$size-of-$steps-seed1: student $size-seed2/teacher-$steps $described" \
                    "&& $measured"
        done
    done
}

larger() { # a student of six times the cost, at half of the steps; first, which rate it wants
    local rate size
    for rate in 5e-4 1e-3 2e-3; do
        echo "W-vanilla-lr$rate-seed1: train train_stage1.py $half --model SiT-W/2 --lr $rate" \
            "--align-weight 0 && measure $quarter $half"
    done
    for size in N Ti; do
        echo "W-desc$size-seed1: LENGTH=$half student $size-seed2/$full $described" \
            "--model SiT-W/2 --lr ${WIDE_LR:-1e-3} && measure $quarter $half"
    done
}

baselines() { # other methods on the same loop; three seeds where the distance came within a tenth
    local b=experiments/baselines seed
    for seed in 1 2 3; do
        echo "sra-seed$seed: train $b/sra.py $STEPS && $measured"
        echo "repa-seed$seed: train $b/repa.py $STEPS --features $DATA/cnn.npy && $measured"
    done
    echo "vae_repa-seed1: train $b/vae_repa.py $STEPS && $measured"
    echo "dispersive-seed1: train $b/dispersive.py $STEPS && $measured"
}

together < <(teachers)
together < <(students)
together < <(more_teachers)
together < <(one_seed; baselines; larger)

# ---- The tables, the figure, the pictures

if [ -n "$JUDGE" ]; then
    python experiments/report.py --judge "$JUDGE" --figure "$E/compute$JUDGE.png"
    exit $failed
fi
python experiments/report.py
for name in vanilla-seed1 descN-seed1; do # with guidance, to see what they are
    [ ! -e "$(checkpoint $name "$STEPS")" ] || [ -e $E/$name/picture/samples.npz ] ||
        python sample.py --ckpt "$(checkpoint $name "$STEPS")" --num 60 --mode heun --steps 20 \
            --cfg 3 --out $E/$name/picture
done
python experiments/pictures.py --step "$STEPS" --teacher "N-seed2/$full" || failed=1
exit $failed
