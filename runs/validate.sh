#!/usr/bin/env bash
# Check the instruments before you train: two numbers that others have published, and no training.
#
#   runs/validate.sh adm          # fid.py on ADM's own samples
#   runs/validate.sh authors      # the authors' released SiT-XL/2, converted and sampled
#
# Neither has been run here: we have not got the files. The commands are tested as far as files go (the
# converter on checkpoints in the authors' format, fid.py against torch-fidelity and pytorch-fid).
#
# adm: openai/guided-diffusion publishes both files (its "evaluations" folder) and prints what its own
# evaluator says of them: IS 215.837, FID 3.94256, sFID 6.14043, precision 0.8265, recall 0.5309. Expect
# FID within 0.01 of that; more means other pictures, other weights, or an error of ours.
#
# authors: their release (csslc/Self-Transcendence) names the file of the 2,000,000-step SiT-XL/2. Expect
# FID 1.25 (the paper). 1.3 would be no surprise: we round where they truncate, and run in bf16. About 5 hours
# on one H100 (estimated: 50,000 samples, 250 steps, guided up to t = 0.65), an eighth of that on eight.
set -euo pipefail
RUN="torchrun --nproc_per_node=${GPUS:-1}"
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}
case ${1:-} in
adm)
    python fid.py "${SAMPLES:-admnet_guided_upsampled_imagenet256.npz}" "$REFERENCE"
    ;;
authors)
    [ -e out/authors.pt ] || python -m experiments.checkpoints.convert_sit "${THEIRS:-2000000.pt}" out/authors.pt --vae data/sd-vae.pt
    $RUN sample.py --ckpt out/authors.pt --num-images 50000 --labels random \
        --cfg 1.9 --guidance-high 0.65 --out out/authors-samples
    python fid.py out/authors-samples "$REFERENCE"
    ;;
*)
    sed -n '2,6p' "$0"
    exit 2
    ;;
esac
