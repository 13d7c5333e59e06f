# For demo.sh and compare.sh, from the project's folder: drawn figures as latents, in data/shapes.

part() { printf '\n== %s\n' "$*"; }

unless() { # unless FILE COMMAND...: a command whose result is kept
    local file=$1
    shift
    if [ -e "$file" ]; then
        echo "# $file is there already"
    else
        printf '$ %s\n' "$*"
        "$@"
    fi
}

figures() {
    part "Draw 5,000 pictures of eight figures, train a small VAE, encode the pictures: a minute"
    unless data/shapes-images/arrow/04999.png python -m experiments.demo.shapes \
        data/shapes-images --num 5000
    unless data/shapes-vae.pt python -m experiments.latents.small_vae data/shapes-images --size 32 \
        --device cpu --factor 2 --batch-size 8 --lr 3e-3 --steps 400 --out data/shapes-vae.pt
    unless data/shapes/meta.json python vae_latents.py --images data/shapes-images \
        --vae data/shapes-vae.pt --image-size 32 --device cpu --out data/shapes
}

# The paper's settings but for what a small network and few steps ask for: rate, warm-up, a faster
# average; and s = 10, not 30 (docs/results.md)
training="--data data/shapes --device cpu --batch-size 32 --lr 3e-3 --warmup 100 --ema 0.995
    --ema-ramp --projector-dim 256"
