"""Results in MLflow: scores as metrics, a row a prompt with its pictures, the page."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from result_folders import SIZE, result_folder

from evaluation.report.results import read_result
from evaluation.report.tracking import SHEET, example_grid, log_to_mlflow, metrics, sheet
from zimage_lit.tracking import ResilientMLFlowLogger


def test_a_result_arrives_in_mlflow(tmp_path: Path) -> None:
    logger = ResilientMLFlowLogger("evaluation", str(tmp_path / "run"), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    folder = result_folder(tmp_path, "longtext-en", number=3, lost=[1])
    log_to_mlflow(folder, logger)
    logger.finalize("success")
    client, run_id = logger.experiment, str(logger.run_id)
    run, scores = client.get_run(run_id), json.loads((folder / "result.json").read_text())["scores"]
    logged = run.data.metrics
    assert logged["longtext-en/overall"] == scores["official"]["overall"]
    assert logged["longtext-en/overall_low"] == scores["official"]["ci_low"] < logged["longtext-en/overall_high"]
    assert logged["longtext-en/categories/sign"] == scores["official"]["categories"]["sign"]["score"]
    assert logged["longtext-en/overall_fixed"] == scores["fixed"]["overall"] and logged["longtext-en/lost_images"] == 1
    assert run.data.tags["longtext-en/comparable"].startswith("no: 3 of 160 prompts")
    assert run.data.tags["setting/longtext-en/source"] == read_result(folder).result["pictures"]["source"]
    where = Path(client.download_artifacts(run_id, "evaluation", str(tmp_path / "down")))
    assert (where / "longtext-en/report.html").read_text() == (folder / "report.html").read_text()
    assert (where / "longtext-en/result.json").read_text() == (folder / "result.json").read_text()
    table = json.loads((where / "longtext-en.json").read_text())
    assert (
        table["columns"] == ["prompt", "score", "pictures", "judged", "group", "prompt_id"] and len(table["data"]) == 3
    )
    (grid,) = Path(client.download_artifacts(run_id, "images", str(tmp_path / "down"))).glob("samples~longtext-en*.png")
    result = read_result(folder)
    groups = {line["group"] for line in result.prompts}
    shown = example_grid(result)
    assert shown is not None and len(result.examples()) == len(groups) and np.array_equal(Image.open(grid), shown)
    lines = read_result(folder).prompts
    assert [row[:2] for row in table["data"]] == [[line["prompt"], line["score"]] for line in lines]
    assert "Picture 4: lost: missing." in table["data"][1][3] and table["data"][0][2]["type"] == "image"


def test_a_prompts_pictures_stand_in_a_square(tmp_path: Path) -> None:
    result = read_result(result_folder(tmp_path, "geneval", number=1, lost=[0]))
    (line,) = result.prompts
    found = np.asarray(sheet(result, line))
    half = SHEET // 2
    assert found.shape == (SHEET, SHEET, 3)
    for place, image in enumerate(line["images"][:3]):
        picture = Image.open(result.folder / image["file"]).resize((half, half), Image.Resampling.LANCZOS)
        row, column = divmod(place, 2)
        assert np.array_equal(found[row * half :, column * half :][:half, :half], np.asarray(picture))
    assert (found[half + 40 :, half:] == 0xDD).all() and not (found[half:, half:] == 0xDD).all()  # a word on grey
    alone = sheet(result, {**line, "images": line["images"][:1]})
    assert alone.size == (SHEET, SHEET) and SIZE < SHEET


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_scores_that_do_not_exist_are_no_metrics(tmp_path: Path, mode: str) -> None:
    folder = result_folder(tmp_path, "oneig-en", number=5, draw=False)
    result = json.loads((folder / "result.json").read_text())
    result["scores"][mode] |= dict.fromkeys(("overall", "ci_low", "ci_high"))
    (folder / "result.json").write_text(json.dumps(result))
    found = metrics(read_result(folder))
    assert ("oneig-en/overall" in found) == (mode == "fixed") == ("oneig-en/overall_low" in found)
    assert ("oneig-en/overall_fixed" in found) == (mode == "official")
    assert found["oneig-en/alignment"] == result["scores"]["official"]["scores"]["alignment"]["score"]
