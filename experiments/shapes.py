"""Draw an image folder: ten classes of shapes, OUT/<class>/<index>.png.

    python experiments/shapes.py data/shapes-images --num 10000 --size 32

Image i is a function of i alone: a figure of random place, size, tilt and colour on white paper.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from models import say, setting


def polygon(n, r=1.0, turn=0.0, dx=0.0, dy=0.0):
    """Corners of a regular polygon in [-1, 1]^2, y downwards, one corner on top."""
    a = 2 * np.pi * np.arange(n) / n - np.pi / 2 + turn
    return np.stack([r * np.cos(a) + dx, r * np.sin(a) + dy], axis=1)


def rectangle(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def heart():
    a = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return np.stack([np.sin(a) ** 3, -y / 16], axis=1)


STAR = np.stack([polygon(5), polygon(5, 0.42, np.pi / 5)], axis=1).reshape(10, 2)
HEAD = [(1, 0), (0.1, -0.8), (0.1, -0.3)]
ARROW = np.array([*HEAD, (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.8)])

# name -> polygons; those of CUT_OUT lose their second polygon
SHAPES = {
    "circle": [polygon(60)],
    "square": [rectangle(-0.8, -0.8, 0.8, 0.8)],
    "triangle": [polygon(3)],
    "star": [STAR],
    "cross": [rectangle(-0.3, -1, 0.3, 1), rectangle(-1, -0.3, 1, 0.3)],
    "ring": [polygon(60), polygon(60, 0.55)],
    "crescent": [polygon(60), polygon(60, 0.8, 0, 0.5, -0.1)],
    "heart": [heart()],
    "bars": [rectangle(x - 0.2, -0.95, x + 0.2, 0.95) for x in (-0.75, 0, 0.75)],
    "arrow": [ARROW],
}
CUT_OUT = {"ring", "crescent"}
INKS = np.array(  # red, orange, green, blue, violet, black
    [(215, 40, 40), (235, 130, 20), (40, 150, 60), (30, 110, 210), (120, 60, 170), (40, 40, 50)]
)


def draw_shape(index, size) -> tuple[str, Image.Image]:
    """The class and the picture (size x size, RGB) of drawing `index`."""
    rng = np.random.default_rng((20260107, index))
    name = list(SHAPES)[index % len(SHAPES)]
    canvas = 4 * size  # drawn four times too large, then averaged: smooth edges
    colour = INKS[rng.integers(len(INKS))] + rng.integers(-20, 21, 3)
    ink, paper = tuple(map(int, colour.clip(0, 255))), (255, 255, 255)
    radius = canvas * rng.uniform(0.32, 0.42)
    centre = canvas / 2 + rng.uniform(-1, 1, 2) * (canvas * 0.45 - radius)
    tilt = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    image = Image.new("RGB", (canvas, canvas), paper)
    for number, points in enumerate(SHAPES[name]):
        fill = paper if number and name in CUT_OUT else ink
        corners = centre + radius * points @ turn.T
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=fill)
    return name, image.resize((size, size), Image.BOX)


def write(out, num, size):
    for index in range(num):
        name, image = draw_shape(index, size)
        (Path(out) / name).mkdir(parents=True, exist_ok=True)
        image.save(Path(out) / name / f"{index:05d}.png")


@dataclass
class Settings:
    out: str = setting("", positional=True)  # folder to write, one folder a class
    num: int = setting(10_000, at_least=1)  # drawings in all
    size: int = setting(32, at_least=8, at_most=4096)  # side in pixels


def main():
    args = models.parse_settings(Settings, __doc__)
    write(args.out, args.num, args.size)
    say(f"{args.out}: {args.num} drawings of {len(SHAPES)} shapes, {args.size} px")


if __name__ == "__main__":
    models.run(main)
