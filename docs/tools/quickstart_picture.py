"""The README's picture from a finished quickstart: a few of its sample grids, one below the other.

python docs/tools/quickstart_picture.py outputs/quickstart docs/images/quickstart.png
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LEFT = 90  # pixels for the step beside each grid


def main(run: Path, target: Path) -> None:
    paths = sorted((run / "samples").glob("step-*.png"))
    steps = [int(path.stem.split("-")[1]) for path in paths]
    wanted = [0, 300, 900, steps[-1]]
    grids = [Image.open(paths[steps.index(step)]) for step in wanted]
    picture = Image.new("RGB", (LEFT + grids[0].width, sum(grid.height for grid in grids)), "white")
    draw, y = ImageDraw.Draw(picture), 0
    for step, grid in zip(wanted, grids, strict=True):
        picture.paste(grid, (LEFT, y))
        draw.multiline_text((8, y + 80), f"step\n{step:,}", fill="black", font=ImageFont.load_default(16))
        y += grid.height
    picture.save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
