#!/usr/bin/env bash
# Compares this working tree with another revision: the log and the samples must be the same bytes.
#     make trajectory BASE=REVISION
# Both stages for 50 steps: stage 1 killed and continued after 20, stage 2 across the end of guidance,
# stage 2 again on two processes that do two shares each. Then ten guided samples by Heun's method.
set -eu
base=${1:?usage: trajectory.sh REVISION}
cd "$(dirname "$0")/../.."
D=$(mktemp -d "${TMPDIR:-/tmp}/trajectory.XXXXXX")
trap 'rm -rf "$D"' EXIT
export OMP_NUM_THREADS=1
mkdir "$D/base" "$D/latents"
git archive "$base" | tar x -C "$D/base"
python - "$D" <<'PYTHON'
import json, sys
import numpy, torch, vae_latents
out = sys.argv[1]
torch.manual_seed(0)
vae = vae_latents.AutoencoderKL((32, 64), latent_channels=4, layers=1)
torch.save({"model": vae.state_dict(), "scale": 1.0}, f"{out}/vae.pt")
random = numpy.random.default_rng(0)
numpy.save(f"{out}/latents/moments.npy", random.random((96, 8, 16, 16)).astype("float16"))
numpy.save(f"{out}/latents/labels.npy", numpy.arange(96) % 10)
meta = {"format": 1, "image_size": 32, "num_images": 96, "classes": list("abcdefghij")}
meta.update(channels=4, height=16, width=16, scale=1.0, std=1.0, tag="random", source=out)
meta["vae"] = {"path": f"{out}/vae.pt", "identity": vae.identity()}
json.dump(meta, open(f"{out}/latents/meta.json", "w"))
PYTHON

run() { # run FOLDER: all of it with the code in FOLDER, into D/out
    cd "$1"
    rm -rf "$D/out"
    local flags="--data $D/latents --model SiT-N/4 --batch-size 8 --lr 1e-3 --warmup 10 --ema 0.9
        --projector-dim 32 --log-every 5 --save-every 10 --device cpu"
    local guide="--teacher $D/out/teacher/teacher.pt --guide-steps 30 --steps 50"
    python train_stage1.py $flags --steps 20 --out "$D/out/stage1"
    python train_stage1.py $flags --steps 50 --out "$D/out/stage1"
    python build_teacher.py --ckpt "$D/out/stage1" --out "$D/out/teacher"
    python train_stage2.py $flags $guide --out "$D/out/stage2"
    python -m torch.distributed.run --standalone --nproc_per_node=2 train_stage2.py $flags $guide \
        --accum 2 --out "$D/out/two"
    python sample.py --ckpt "$D/out/stage2" --num-images 10 --mode heun --steps 4 --cfg 2 \
        --device cpu --out "$D/out/samples"
    cd - > /dev/null
}

for code in "$D/base" "$PWD"; do
    run "$code" > "$D/log" 2>&1 || { tail -n 20 "$D/log"; exit 1; }
    for run in stage1 stage2 two; do sha256sum < "$D/out/$run/log.jsonl"; done > "$D/hashes.new"
    python -c 'import hashlib, sys, numpy
print(hashlib.sha256(numpy.load(sys.argv[1])["arr_0"].tobytes()).hexdigest())' \
        "$D/out/samples/samples.npz" >> "$D/hashes.new"
    [ -e "$D/hashes" ] || mv "$D/hashes.new" "$D/hashes"
done
cmp "$D/hashes" "$D/hashes.new" || { paste "$D/hashes" "$D/hashes.new"; exit 1; }
echo "the logs of stage 1, stage 2 and stage 2 on two processes, and ten samples: the same bytes as $base"
