"""Draw an image folder whose labels are captions: OUT/*.png, OUT/dataset.json, OUT/captions.json.

    python -m experiments.text.captions data/captions-images --num 20000

A caption names one figure, "a red star", or two, "a red star left of a blue circle", which "a blue
circle right of a red star" means, too. captions.json lists all of them; a label is a place in it.
No image shows six of the 36 figures, one of each shape, or a tenth of the pairs of the others: the
captions that say those are held out. Image i is a function of i alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import common
from common import say, setting
from experiments.demo.shapes import FIGURES, INKS

SHAPES = ["circle", "square", "triangle", "star", "cross", "heart"]
COLOURS = dict(zip(["red", "orange", "green", "blue", "violet", "black"], INKS, strict=True))
KINDS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
NEW_KINDS = {KINDS[7 * i] for i in range(6)}  # red circle, orange square, ..., black heart


def grammar() -> dict[str, tuple[str, ...]]:
    """{caption: what it shows, from left to right}, of every caption there is."""
    named = {kind: f"an {kind}" if kind.startswith("orange") else f"a {kind}" for kind in KINDS}
    shown = {name: (kind,) for kind, name in named.items()}
    for first in KINDS:
        for second in KINDS:
            if first != second:
                shown[f"{named[first]} left of {named[second]}"] = first, second
                shown[f"{named[first]} right of {named[second]}"] = second, first
    return shown


def groups() -> dict[str, str]:
    """{caption: "seen", "new pair" or "new figure"}; captions of one picture are in one group."""
    found = {}
    known = [kind for kind in KINDS if kind not in NEW_KINDS]
    pairs = [(left, right) for left in known for right in known if left != right]
    order = np.random.default_rng(20260107).permutation(len(pairs))
    new_pairs = {pairs[i] for i in order[: len(pairs) // 10]}
    for caption, shown in grammar().items():
        found[caption] = "new pair" if shown in new_pairs else "seen"
        if NEW_KINDS & {*shown}:
            found[caption] = "new figure"
    return found


def draw_caption(shown, rng, size=32) -> Image.Image:
    """The picture (size x size, RGB) of `shown`: one kind of figure, or the left and the right."""
    canvas = 4 * size  # drawn four times too large, then averaged: smooth edges
    paper = 255 - rng.uniform(0, 50, 3)  # pale
    image = Image.new("RGB", (canvas, canvas), tuple(map(int, paper)))
    for place, kind in enumerate(shown):
        colour, shape = kind.split()
        ink = (COLOURS[colour] + rng.integers(-15, 16, 3)).clip(0, 255)
        radius = canvas * rng.uniform(0.19, 0.23)
        free = canvas / len(shown) - 2 * radius  # of its column; all of the height is free
        centre = radius + rng.uniform(0.05, 0.95, 2) * (free, canvas - 2 * radius)
        centre[0] += place * canvas / 2
        tilt = rng.uniform(-0.2, 0.2)
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        corners = centre + radius * FIGURES[shape] @ turn.T
        points = [tuple(corner) for corner in corners]
        ImageDraw.Draw(image).polygon(points, fill=tuple(map(int, ink)))
    return image.resize((size, size), Image.BOX)


def write(out, num, size):
    captions, group = grammar(), groups()
    label = {caption: row for row, caption in enumerate(captions)}
    seen = [caption for caption in captions if group[caption] == "seen"]
    single = [caption for caption in seen if len(captions[caption]) == 1]
    pairs = [caption for caption in seen if len(captions[caption]) == 2]
    Path(out).mkdir(parents=True, exist_ok=True)
    labels = []
    for index in range(num):
        rng = np.random.default_rng((20260108, index))
        choices = single if index % 4 == 0 else pairs
        caption = choices[rng.integers(len(choices))]
        labels.append([f"{index:06d}.png", label[caption]])
        draw_caption(captions[caption], rng, size).save(Path(out) / labels[-1][0])
    for name, content in ("captions", [*captions]), ("dataset", {"labels": labels}):
        with common.atomic_write(Path(out) / f"{name}.json") as file:
            file.write(json.dumps(content).encode())
    held = len(captions) - len(seen)
    say(f"{out}: {num} drawings of {len(seen)} captions, {size} px; {held} others are held out")


@dataclass
class Settings:
    out: str = setting("", positional=True)  # folder to write
    num: int = setting(20_000, at_least=1)  # drawings in all; each fourth has one figure
    size: int = setting(32, at_least=8, at_most=4096)  # side in pixels


def main():
    args = common.parse_settings(Settings, __doc__)
    write(args.out, args.num, args.size)


if __name__ == "__main__":
    common.run(main)
