"""The demo's last page: one picture, out/demo/demo.png, and a table, of what this run measured.

Stage 2 and vanilla SiT side by side, from the same noise, after the same steps and after the same
total compute (the teacher's training and forward passes counted); beside them the probe's picture
of the teacher's features.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from experiments.report import compute, read_run
from models import say

DEMO = Path("out/demo")
CFG = 3  # the guidance of the samples that are shown
SIDE, GAP, TITLE = 480, 16, 24  # in pixels


def judged() -> dict:
    """{folder of samples: what the classifier said}."""
    with models.reading(DEMO / "judged.jsonl", "is not whole; run experiments/demo.sh"):
        rows = map(json.loads, (DEMO / "judged.jsonl").read_text().splitlines())
        return {Path(row["samples"]).parent.name: row for row in rows}


def draw(pictures: list[tuple]) -> Image.Image:
    """(Title, file) of each, side by side."""
    sheet = Image.new("RGB", (len(pictures) * (SIDE + GAP), TITLE + SIDE), "white")
    for number, (title, path) in enumerate(pictures):
        left = number * (SIDE + GAP)
        ImageDraw.Draw(sheet).text((left, 4), title, fill="black", font_size=14)
        with models.reading(path, "is no picture; remove it and run experiments/demo.sh"):
            picture = Image.open(path)
            picture.thumbnail((SIDE, SIDE), Image.LANCZOS)
        sheet.paste(picture, (left, TITLE))
    return sheet


def main():
    found, last = judged(), {run: read_run(DEMO / run)[2] for run in ("stage2", "vanilla")}
    same, more = last["stage2"], last["vanilla"]
    columns = {"stage2": ("stage2", same), "vanilla-steps": ("vanilla", same)}
    columns["vanilla"] = "vanilla", more
    pictures = []
    for name, (run, steps) in columns.items():
        share = 100 * found[f"samples-{name}-cfg{CFG}"]["agreement"]
        title = f"{run}, {steps:,} steps: a CNN recognises {share:.0f} %"
        pictures.append((title, DEMO / f"samples-{name}-cfg{CFG}/grid.png"))
    pictures.append(("the teacher's features as colours", DEMO / "probe/features.png"))
    with models.atomic_write(DEMO / "demo.png") as file:
        draw(pictures).save(file, format="PNG")

    costs = [compute(DEMO / run, steps, "SiT-Ti/4") for run, steps in columns.values()]
    lines = {"": [run for run, _ in columns.values()]}
    lines["steps"] = [f"{steps:,}" for _, steps in columns.values()]
    lines["total compute, in vanilla steps"] = [f"{cost:,.0f}" for cost in costs]
    for cfg in (1, CFG):
        rows = [found[f"samples-{name}-cfg{cfg}"] for name in columns]
        lines[f"class asked for, cfg {cfg}"] = [f"{100 * row['agreement']:.1f} %" for row in rows]
        distances = [f"{row['FD-CNN']:.2f}" for row in rows]
        lines[f"FD-CNN, cfg {cfg} (lower is better)"] = distances
    for name, cells in lines.items():
        say(f"{name:38}" + "".join(f"{cell:>12}" for cell in cells))
    say("A CNN judges 300 samples; FD-CNN is a distance in its features, not FID. One seed.")
    say(f"Look at {DEMO}/demo.png")


if __name__ == "__main__":
    models.run(main)
