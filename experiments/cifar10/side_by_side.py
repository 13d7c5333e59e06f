"""A picture in which grids of frontier.py alternate, row by row: of one noise, one below the other.

python -m experiments.cifar10.side_by_side vanilla=A.png "stage 2=B.png" --out page.jpg
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

import common
from common import UserError, say, setting
from experiments.cifar10.frontier import named_checkpoints

MARGIN = 90  # pixels on the left, for the names


@dataclass
class Settings:
    out: str = "out/side_by_side.jpg"  # the picture
    rows: int = setting(3, at_least=1)  # rows of each grid
    tile: int = 128  # pixels of a picture in the grids: 4 times CIFAR's


def page(grids: dict[str, np.ndarray], rows: int, tile: int) -> Image.Image:
    """Rows 1 of all grids (H, W, 3) uint8, then rows 2, ...; a thin line after each group."""
    height, width, _ = next(iter(grids.values())).shape
    if any(pixels.shape != (height, width, 3) for pixels in grids.values()):
        raise UserError("the grids have different sizes; make them with the same flags")
    if rows * tile > height:
        raise UserError(f"--rows {rows}: the grids have {height // tile}; give fewer")
    step = len(grids) * tile + 6
    sheet = Image.new("RGB", (MARGIN + width, rows * step - 6), "white")
    write = ImageDraw.Draw(sheet)
    for row in range(rows):
        for place, (name, pixels) in enumerate(grids.items()):
            top = row * step + place * tile
            sheet.paste(Image.fromarray(pixels[row * tile : (row + 1) * tile]), (MARGIN, top))
            write.text((6, top + tile // 2), name, fill="black")
    return sheet


def main():
    names = named_checkpoints()
    args = common.parse_settings(Settings, __doc__)
    if len(names) < 2:
        raise UserError("side_by_side.py: needs two grids or more; give NAME=PATH NAME=PATH")
    grids = {}
    for name, path in names.items():
        with common.reading(path, "is no picture; make it with frontier.py --grids"):
            grids[name] = np.asarray(Image.open(path).convert("RGB"))
    with common.atomic_write(args.out) as file:
        page(grids, args.rows, args.tile).save(file, format="JPEG", quality=85)
    say(f"{args.out}: {args.rows} rows of each of {', '.join(grids)}")


if __name__ == "__main__":
    common.run(main)
