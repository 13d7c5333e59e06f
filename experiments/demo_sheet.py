"""The demo's last page: what this run measured, and one picture, out/demo/demo.png.

Stage 2 and vanilla SiT side by side after equal steps, from the same noise; what they learned from:
the loss curves; and the probe's table as bars.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEMO = Path("out/demo")
NETS = {"stage2": "Self-Transcendence", "vanilla": "vanilla SiT"}
CLASSES = "arrow bars circle crescent cross heart ring square star triangle".split()


def log(net):
    lines = (DEMO / net / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss_diff" in record]


def judged():
    """{folder of samples: what the classifier said}."""
    rows = map(json.loads, (DEMO / "judged.jsonl").read_text().splitlines())
    return {Path(row["samples"]).parent.name: row for row in rows}


def samples(axis, net, rows=5):
    """The first samples at guidance 4, a class in each column, with the classes' names."""
    with np.load(DEMO / f"samples-{net}-cfg4/samples.npz") as file:
        images = file["arr_0"][: 10 * rows]
    side = images.shape[1]
    sheet = images.reshape(rows, 10, side, side, 3).swapaxes(1, 2).reshape(rows * side, -1, 3)
    axis.imshow(sheet)
    axis.set_title(f"{NETS[net]}, cfg 4", fontsize=10)
    axis.set_xticks(np.arange(10) * side + side / 2, CLASSES, fontsize=7)
    axis.set_yticks([])


def curves(axis):
    for net, colour in zip(NETS, ("tab:red", "tab:gray"), strict=True):
        records = log(net)
        steps = [record["step"] for record in records]
        axis.plot(steps, [r["loss_diff"] for r in records], color=colour, label=NETS[net])
    axis.set(xlabel="steps", title="L_diff")
    axis.legend(fontsize=8)


def bars(axis):
    table = json.loads((DEMO / "probe/probe.json").read_text())["blocks"]["5"]
    axis.bar(range(len(table)), list(table.values()), color="tab:blue")
    axis.set_xticks(range(len(table)), list(table), fontsize=8)
    axis.set(title="k-NN accuracy of the teacher's features, block 5", ylim=(0, 1))


def main():
    found, steps = judged(), log("stage2")[-1]["step"]
    figure, axes = plt.subplots(2, 2, figsize=(12, 7))
    samples(axes[0, 0], "stage2")
    samples(axes[0, 1], "vanilla")
    curves(axes[1, 0])
    bars(axes[1, 1])
    figure.tight_layout()
    figure.savefig(DEMO / "demo.png", dpi=80)
    print(f"\nAfter {steps} steps each{'':24} {'stage 2':>10} {'vanilla':>10}")
    for cfg in (1, 4):
        pair = [found[f"samples-{net}-cfg{cfg}"] for net in NETS]
        shares = "".join(f"{100 * row['agreement']:9.1f} %" for row in pair)
        distances = "".join(f"{row['FD-CNN']:11.2f}" for row in pair)
        print(f"class asked for, cfg {cfg} (a CNN's word)    {shares}")
        print(f"FD-CNN, cfg {cfg} (lower is better)         {distances}")
    print("Stage 2 also had a teacher, trained for as many steps. FD-CNN is not FID.")
    print(f"Look at {DEMO}/demo.png and {DEMO}/probe/features.png")


if __name__ == "__main__":
    main()
