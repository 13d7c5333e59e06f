"""Draw an image folder: eight classes of figures, OUT/<class>/<index>.png.

    python -m experiments.demo.shapes data/shapes-images --num 10000 --size 32

Image i is a function of i alone. The class is the figure's outline; its place, size, tilt and style
and the three colours are free, and most of what a network must learn.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

import common
from common import say, setting


def polygon(n, r=1.0, turn=0.0):
    """Corners of a regular polygon in [-1, 1]^2, y downwards, one corner on top."""
    a = 2 * np.pi * np.arange(n) / n - np.pi / 2 + turn
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=1)


def rectangle(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def heart():
    a = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return np.stack([np.sin(a) ** 3, -y / 16], axis=1)


HEAD = [(1, 0), (0.1, -0.8), (0.1, -0.3)]
ARROW = np.array([*HEAD, (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.8)])
CORNER, TURN = np.array([(0.3, -1), (0.3, -0.3), (1, -0.3)]), np.array([(0, 1), (-1, 0)])

FIGURES = {
    "circle": polygon(60),
    "square": rectangle(-0.8, -0.8, 0.8, 0.8),
    "diamond": polygon(4),
    "triangle": polygon(3),
    "star": np.stack([polygon(5), polygon(5, 0.42, np.pi / 5)], axis=1).reshape(10, 2),
    "cross": np.concatenate([CORNER @ np.linalg.matrix_power(TURN, i) for i in range(4)]),
    "heart": heart(),
    "arrow": ARROW,
}
STYLES = ["plain", "hollow", "cored", "halved"]  # one ink; a hole; a core or a half of another ink
INKS = np.array(  # red, orange, green, blue, violet, black
    [(215, 40, 40), (235, 130, 20), (40, 150, 60), (30, 110, 210), (120, 60, 170), (40, 40, 50)]
)


def draw_shape(index, size) -> tuple[str, Image.Image]:
    """The class and the picture (size x size, RGB) of drawing `index`."""
    rng = np.random.default_rng((20260107, index))
    name = list(FIGURES)[index % len(FIGURES)]
    style = STYLES[rng.integers(len(STYLES))]
    canvas = 4 * size  # drawn four times too large, then averaged: smooth edges
    colours = INKS[rng.permutation(len(INKS))[:3]] + rng.integers(-20, 21, (3, 3))
    colours[2] = 255 - (255 - colours[2]) * rng.uniform(0.1, 0.35)  # pale
    ink, other, paper = (tuple(map(int, colour)) for colour in colours.clip(0, 255))
    radius = canvas * rng.uniform(0.32, 0.42)
    centre = canvas / 2 + rng.uniform(-1, 1, 2) * (canvas * 0.45 - radius)
    tilt = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    image = Image.new("RGB", (canvas, canvas), paper)

    def area(points):
        mask = Image.new("L", image.size)
        corners = centre + radius * points @ turn.T
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], fill=255)
        return mask

    points = FIGURES[name]
    whole, half = area(points), area(rectangle(0, -2, 2, 2))
    image.paste(ink, mask=whole)
    if style == "halved":
        image.paste(other, mask=ImageChops.darker(whole, half))
    elif style != "plain":
        image.paste(other if style == "cored" else paper, mask=area(0.5 * points))
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
    args = common.parse_settings(Settings, __doc__)
    write(args.out, args.num, args.size)
    say(f"{args.out}: {args.num} drawings of {len(FIGURES)} shapes, {args.size} px")


if __name__ == "__main__":
    common.run(main)
