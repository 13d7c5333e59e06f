#!/usr/bin/env bash
# torch.utils.flop_counter on a CPU: attention costs nothing.
#
# torch 2.13.0 (2.14.1 does the same). On a CPU scaled_dot_product_attention runs a kernel of its
# own, for which FlopCounterMode has no formula, and it counts what it has no formula for as zero,
# silently. MultiheadAttention in eval mode takes another fused kernel, and then its four linear
# layers are missing, too. So the same transformer costs less if it is counted on a laptop.
# We guessed: 4 N^2 D multiply-adds and additions for N tokens of width D, as the formula says.
# Seen, of 2 sequences of 64 tokens, 4 heads of 32:
#   scaled_dot_product_attention: 0 FLOPs
#   the same by the two products: 4194304 FLOPs
#   MultiheadAttention, training: 16777216 FLOPs
#   MultiheadAttention, eval:     0 FLOPs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
q = torch.randn(2, 4, 64, 32)
tokens = torch.randn(2, 64, 128)
layer = torch.nn.MultiheadAttention(128, 4, batch_first=True)
counts = []


def report(name, compute):
    with FlopCounterMode(display=False) as counter:
        compute()
    counts.append(counter.get_total_flops())
    print(f"{name} {counts[-1]} FLOPs")


report("scaled_dot_product_attention:", lambda: scaled_dot_product_attention(q, q, q))
report("the same by the two products:", lambda: (q @ q.mT).softmax(dim=-1) @ q)
report("MultiheadAttention, training:", lambda: layer(tokens, tokens, tokens, need_weights=False))
layer.eval()
with torch.no_grad():
    report("MultiheadAttention, eval:    ", lambda: layer(tokens, tokens, tokens))
by_formula = 2 * 4 * 64 * 64 * 128  # sequences, 4, N^2, D
same = counts[0] == 0 and counts[1] == by_formula and counts[2] > 0 and counts[3] == 0
sys.exit(0 if same else "this has changed")
EOF
