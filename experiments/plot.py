"""Draw the losses of runs from their log.jsonl, all in one picture.

    python experiments/plot.py out/stage1 out/stage2 --out out/curves.png

The left panel has L_diff of each run, the right one its auxiliary loss.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from models import UserError, say


def read_log(run) -> list[dict]:
    """The records of RUN/log.jsonl that hold losses: not a change of settings, not half a line."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folders of runs, such as out/stage1")
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "loss_diff"} <= record.keys():
                records.append(record)
    if not records:
        raise UserError(f"{path}: holds no losses yet; the first come after --log-every steps")
    return records


def auxiliary(records) -> str | None:
    """The key of the auxiliary loss, if the run had one."""
    keys = [key for key in records[0] if key.startswith("loss_") and key != "loss_diff"]
    return next((key for key in keys if any(record.get(key) for record in records)), None)


def new_figure(width, height):
    """An empty matplotlib figure, in inches, that needs no screen."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        need = "pip install -r requirements-dev.txt"
        raise UserError(f"matplotlib is needed for pictures: {need}") from error
    rcParams["svg.hashsalt"] = "fixed"  # a drawing that is made again is the same file
    return Figure(figsize=(width, height), layout="constrained")


def draw(logs: dict[str, list[dict]]):
    """A figure of {run: its records}."""
    figure = new_figure(10, 4)
    axes = figure.subplots(1, 2)
    for number, (run, records) in enumerate(logs.items()):
        keys = {axes[0]: "loss_diff", axes[1]: auxiliary(records)}
        for axis, key in keys.items():
            part = [record for record in records if record.get(key)]  # 0 after guidance has ended
            label = run if key == "loss_diff" else f"{run}: {key}"
            if part:
                steps, values = [r["step"] for r in part], [r[key] for r in part]
                axis.plot(steps, values, label=label, color=f"C{number}", linewidth=1)
    for axis, title in zip(axes, ("L_diff", "auxiliary loss"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="out/curves.png", help="default: out/curves.png")
    args = parser.parse_args()
    figure = draw({run: read_log(run) for run in args.runs})
    with models.atomic_write(args.out) as file:
        figure.savefig(file, format="png", dpi=100)
    say(f"{args.out}: the losses of {', '.join(args.runs)}")


if __name__ == "__main__":
    models.run(main)
