"""A result in MLflow, so that its UI compares runs score by score and prompt by prompt."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from evaluation.report.contents import named_scores
from evaluation.report.results import Prompt, Result, read_result
from evaluation.report.words import judges_words
from evaluation.report.write import write_report
from zimage_lit.config import setting_tags
from zimage_lit.grids import labelled_grid
from zimage_lit.tracking import ResilientMLFlowLogger

SHEET = 256  # pixels, each side of what a row of the table shows of a prompt's pictures: no larger in the UI
EXAMPLE = 128  # pixels of a picture in the grid of examples
LONGEST_TAG = 500  # letters


def log_to_mlflow(result_folder: Path, logger: ResilientMLFlowLogger) -> None:
    """Logs one result folder; its report is written there first.

    Metrics `<benchmark>/overall`, `<benchmark>/<sub-score>` (mode official), `<benchmark>/overall_low`, `_high` and
    `_fixed`, `<benchmark>/lost_images`, where benchmark is geneval or, with its language, longtext-en, say. A table
    with a row a prompt, `evaluation/<benchmark>.json`, whose first column is the prompt: in the UI's evaluation view,
    rows of several runs with the same prompt stand together. The image `samples/<benchmark>`, a picture of the first
    prompt of each group: runs that are compared show theirs side by side. `evaluation/<benchmark>/report.html` and
    `result.json`.
    The tag `<benchmark>/comparable`: yes, or the reasons why not. Tags `setting/<benchmark>/…`: how the pictures were
    made; parameters would be written over every picture.
    """
    result = read_result(Path(result_folder))
    key, comparable = result.key, result.result["comparable"]
    logger.log_metrics(metrics(result))
    reasons = "yes" if comparable["verdict"] else f"no: {' '.join(comparable['reasons'])}"
    tags = {f"{key}/comparable": reasons} | setting_tags({key: result.result["pictures"]})
    logger.log_tags({name: value[:LONGEST_TAG] for name, value in tags.items()})
    logger.log_table(
        {
            "prompt": [line["prompt"] for line in result.prompts],
            "score": [line["score"] for line in result.prompts],
            "pictures": [sheet(result, line) for line in result.prompts],
            "judged": ["\n".join(judges_words(line)) for line in result.prompts],
            "group": [line["group"] for line in result.prompts],
            "prompt_id": [line["prompt_id"] for line in result.prompts],
        },
        f"evaluation/{key}.json",
    )
    if grid := example_grid(result):
        logger.log_image(f"samples/{key}", grid, 0)
    page = write_report([result.folder], result.folder)
    for file in (page, result.folder / "result.json"):
        logger.log_text(file.read_text(encoding="utf-8"), f"evaluation/{key}/{file.name}")


def metrics(result: Result) -> dict[str, float]:
    """The scores by their names in MLflow, without those that do not exist, as OneIG's mean of four dimensions."""
    key, benchmark, scores = result.key, result.result["benchmark"], result.result["scores"]
    found = {f"{key}/lost_images": float(scores["official"]["lost"]["images"])}
    for name, score in named_scores(benchmark, scores["official"]).items():
        if score is not None:
            found[f"{key}/{name}"] = score["score"]
            if name == "overall":
                found |= {f"{key}/overall_low": score["ci_low"], f"{key}/overall_high": score["ci_high"]}
    if scores["fixed"]["overall"] is not None:
        found[f"{key}/overall_fixed"] = scores["fixed"]["overall"]
    return found


def example_grid(result: Result) -> Image.Image | None:
    """One picture of each group's first prompt, with the prompts; None where there is no picture."""
    found = result.first_pictures(result.examples())
    return labelled_grid(list(found.values()), list(found), columns=4, cell=EXAMPLE) if found else None


def sheet(result: Result, line: Prompt) -> Image.Image:
    """A prompt's pictures on one square, in rows; a grey cell with a word stands for one that is lost."""
    pictures = [result.picture(image) for image in line["images"]]
    columns = math.ceil(math.sqrt(len(pictures)))
    side = SHEET // columns
    canvas = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "#dddddd")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        if picture is None:
            ImageDraw.Draw(canvas).text((column * side + 8, row * side + 8), "lost", "#666666")
        else:
            canvas.paste(fitted(picture, side), (column * side, row * side))
    return canvas


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side `side` pixels long; small ones keep their pixels."""
    factor = side / max(picture.size)
    size: Sequence[int] = [max(1, round(length * factor)) for length in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
