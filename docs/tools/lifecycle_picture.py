"""The guide's picture of a lifecycle: the same prompts, a row for each stage that is finished.

python docs/tools/lifecycle_picture.py outputs/lifecycle docs/images/lifecycle.png
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zimage_lit.graph import fingerprints, read_graph
from zimage_lit.graph_report import Row, rows_of, shown_pictures
from zimage_lit.graph_run import State

LEFT, TOP, CELL, GAP = 190, 44, 88, 6  # pixels: of the stages' names, the prompts, a picture, between two
LEFT_OUT = ("evaluate",)  # on other noise


def main(folder: Path, target: Path) -> None:
    graph = read_graph("lifecycle", [f"run.output_dir={folder}"])
    known = rows_of(graph, State.of(folder).stages, fingerprints(graph))
    rows = [row for row in known if row.result and row.stage.name not in LEFT_OUT]
    shown = [shown_pictures(row, rows[0]) for row in rows]
    prompts = list(shown[0])
    picture = Image.new("RGB", (LEFT + len(prompts) * (CELL + GAP), TOP + len(rows) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for column, prompt in enumerate(prompts):
        text = prompt.removeprefix("a photo of ").replace(" and ", "\nand ").replace(" right", "\nright")
        draw.multiline_text((LEFT + column * (CELL + GAP), 4), text, fill="black", font=ImageFont.load_default(11))
    for line, (row, found) in enumerate(zip(rows, shown, strict=True)):
        y = TOP + line * (CELL + GAP)
        draw.multiline_text((8, y + 18), label(row), fill="black", font=font, spacing=5)
        for column, prompt in enumerate(prompts):
            if prompt in found:
                small = found[prompt].resize((CELL, CELL), Image.Resampling.NEAREST)
                picture.paste(small, (LEFT + column * (CELL + GAP), y))
    picture.save(target)


def label(row: Row) -> str:
    score = row.scores()["overall"][0]
    cost = f"\n{row.cost.evaluations:.0f} evaluations a picture" if row.cost else ""
    return f"{row.stage.name}\noverall {score:.2f}{cost}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
