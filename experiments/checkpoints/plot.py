"""Draw the losses of runs from their log.jsonl: L_diff to the left, auxiliary losses to the right.

python -m experiments.checkpoints.plot out/stage1 out/stage2 --out out/curves.png
"""

import argparse
import json
from pathlib import Path

import common
from common import UserError, say


def new_figure(width, height):
    """An empty matplotlib figure, in inches, that needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        need = "pip install -r requirements-dev.txt"
        raise UserError(f"matplotlib is needed for pictures: {need}") from error
    return Figure(figsize=(width, height), layout="constrained")


def read_log(run) -> dict[str, list[float]]:
    """{"step" and each loss: its values, one for a line} of RUN/log.jsonl."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folders of runs, such as out/stage1")
    with common.reading(path, "is no log of a training; its first line comes after --log-every"):
        lines = path.read_text(errors="replace").split("\n")
        records = [json.loads(line) for line in lines[:-1]]  # what a kill has cut has no newline
        names = {"step", "loss_diff", *(name for name in records[0] if name.startswith("loss_"))}
        return {name: [float(record[name]) for record in records] for name in sorted(names)}


def draw(logs: dict[str, dict]):
    """A figure of {run: its log}."""
    figure = new_figure(10, 4)
    axes = figure.subplots(1, 2)
    for number, (run, log) in enumerate(logs.items()):
        for name, losses in log.items():
            axis = axes[0] if name == "loss_diff" else axes[1]
            drawn = [loss or None for loss in losses]  # no auxiliary loss, or none any more, is 0
            if name != "step" and any(drawn):
                axis.plot(log["step"], drawn, label=f"{run}: {name}", color=f"C{number}")
    for axis in axes:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.error = common.refuse
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="out/curves.png", help="default: out/curves.png")
    args = parser.parse_args()
    figure = draw({run: read_log(run) for run in args.runs})
    with common.atomic_write(args.out) as file:
        figure.savefig(file, format="png", dpi=100)
    say(f"{args.out}: the losses of {', '.join(args.runs)}")


if __name__ == "__main__":
    common.run(main)
