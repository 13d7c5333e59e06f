#!/usr/bin/env bash
# The whole chain on random latents, to see that a machine runs it: three minutes at most on a card.
#     experiments/machine/smoke.sh [--device cuda|cpu]
# A line for each step; what fails is said, and the rest goes on. No figure means anything.
set -u
cd "$(dirname "$0")/../.." || exit
device=cuda
case "$*" in
    "") ;;
    "--device cuda" | "--device cpu") device=$2 ;;
    *) echo "usage: experiments/machine/smoke.sh [--device cuda|cpu]" >&2; exit 2 ;;
esac
D=$(mktemp -d "${TMPDIR:-/tmp}/smoke.XXXXXX") || exit
export TMPDIR=$D # nothing stays anywhere else
job='' steps=0 failed=0

end() { # a training hears SIGTERM, saves and leaves; torchrun passes it on
    [ -z "$job" ] || { kill -TERM "$job"; wait "$job"; } 2> /dev/null
    [ $failed != 0 ] || rm -rf "$D"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# step NAME STATUS COMMAND...: it must end with STATUS; at a line that is $stop_at it gets SIGTERM
step() {
    local name=$1 wanted=$2 start=$SECONDS status=0 sent='' result=ok
    shift 2
    "$@" > "$D/$name.log" 2>&1 &
    job=$!
    while kill -0 "$job" 2> /dev/null; do
        if [ -z "$sent" ] && [ -n "${stop_at:-}" ] && grep -qs "^$stop_at" "$D/$name.log"; then
            kill -TERM "$job" && sent=yes
        fi
        [ $((SECONDS - start)) -lt 300 ] || kill -TERM "$job" # it hangs
        sleep 0.1
    done
    wait "$job" || status=$?
    job='' steps=$((steps + 1))
    [ "$status" = "$wanted" ] || result="FAILED, exit status $status"
    printf '%-10s %3d s  %s\n' "$name" $((SECONDS - start)) "$result"
    [ "$result" = ok ] && return
    failed=$((failed + 1))
    tail -n 3 "$D/$name.log" | sed 's/^/    /'
}

random='import json, sys, numpy, torch, fid, vae_latents
out = sys.argv[1]
vae = vae_latents.AutoencoderKL((32, 64), latent_channels=4, layers=1)
torch.save({"model": vae.state_dict(), "scale": 1.0}, f"{out}/vae.pt")
torch.save(fid.InceptionV3().state_dict(), f"{out}/inception.pt")
numpy.save(f"{out}/moments.npy", numpy.random.rand(256, 8, 16, 16).astype("float16"))
numpy.save(f"{out}/labels.npy", numpy.arange(256) % 10)
meta = {"format": 1, "image_size": 32, "num_images": 256, "classes": list("abcdefghij")}
meta.update(channels=4, height=16, width=16, scale=1.0, std=1.0, tag="random", source=out)
meta["vae"] = {"path": f"{out}/vae.pt", "identity": vae.identity()}
json.dump(meta, open(f"{out}/meta.json", "w"))'

logs='import json, sys
one, two, torchrun = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
steps = [line["step"] for line in one]
assert steps == list(range(5, steps[-1] + 1, 5)), f"not each line of stage 1 once: {steps}"
assert two[0]["loss_guide"] > 0 == two[-1]["loss_guide"], f"guidance did not end: {two[-1]}"
losses = [(a["loss_diff"], b["loss_diff"]) for a, b in zip(two, torchrun, strict=True)]
assert all(abs(a / b - 1) < 0.05 for a, b in losses), f"others with --accum: {losses}"'

compile=--compile
[ $device = cuda ] || compile=--no-compile
train=(--data "$D" --model SiT-P/4 --batch-size 16 --ema 0.9 --log-every 5 --device $device)
guide=(--teacher "$D/teacher/teacher.pt" --guide-steps 20 --steps 40)
sample=(--num-images 16 --steps 10 --device $device $compile)

step random 0 python -c "$random" "$D"
stop_at='step 5/' step stopped 143 \
    python train_stage1.py "${train[@]}" --steps 1000000 --out "$D/stage1"
last=$(sed -n 's/^stopped by a signal after step \([0-9]*\),.*/\1/p' "$D/stopped.log")
step continued 0 python train_stage1.py "${train[@]}" --steps $((last + 20)) --out "$D/stage1"
step teacher 0 python build_teacher.py --ckpt "$D/stage1" --out "$D/teacher"
step stage2 0 python train_stage2.py "${train[@]}" "${guide[@]}" --no-compile --out "$D/stage2"
step torchrun 0 python -m torch.distributed.run --standalone --nproc_per_node=1 train_stage2.py \
    "${train[@]}" "${guide[@]}" $compile --accum 4 --out "$D/torchrun"
step logs 0 python -c "$logs" "$D"/{stage1,stage2,torchrun}/log.jsonl
step probe 0 python -m experiments.checkpoints.probe "$D/stage1" --device $device --out "$D/probe"
step samples 0 python sample.py --ckpt "$D/stage2" "${sample[@]}" --out "$D/samples"
step guided 0 python sample.py --ckpt "$D/torchrun" "${sample[@]}" --cfg 2 --out "$D/guided"
step fid 0 python fid.py "$D/samples" "$D/guided" --weights "$D/inception.pt" --device $device

[ $failed = 0 ] || echo "the logs are in $D"
echo "$steps steps, $failed failed, $SECONDS s"
[ $failed = 0 ]
