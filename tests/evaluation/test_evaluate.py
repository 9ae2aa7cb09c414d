"""`lightning run evaluate`: the same result after any kill and for any shards, with all that was lost counted and
named."""

import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_judges
import pytest
from benchmark_files import ROOT, official
from lightning.pytorch.utilities import rank_zero_only
from lock_holder import held_by_another
from PIL import Image
from result_folders import result_folder
from variants import write_pipeline

from evaluation import judging, scoring, side_tasks
from evaluation.benchmarks import cvtg2k, geneval, longtext, oneig
from evaluation.fidelity.image_quality import FidelitySettings
from evaluation.judges.contract import ROLES
from evaluation.pictures import PictureFolder, picture_hash
from evaluation.shards import Shard, shard_of
from evaluation.suite import Part
from evaluation.task import EvaluateSettings, evaluate_task, model_name
from zimage_lit import cli
from zimage_lit.errors import UserError
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.validate import import_class

JUDGE = "fake_judges.FakeJudge"


def judges(*roles: str, **arguments: str) -> dict[str, Any]:
    return {role: {"class_path": JUDGE, "init_args": {"role": role, **arguments}} for role in roles}


def noise(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A picture that no other number has, and that no compression keeps."""
    return Image.frombytes("RGB", size, random.Random(number).randbytes(3 * size[0] * size[1]))


def draw_all(folder: Path, part: Part, prompts: list[dict[str, Any]], size: tuple[int, int] = (16, 16)) -> list[Path]:
    """All of the prompts' pictures in our own layout, each another; their files."""
    files = []
    for prompt in prompts:
        for planned in part.plan(prompt):
            files.append(folder / planned.file)
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            noise(len(files), size).save(files[-1])
    return files


@pytest.fixture(scope="module")
def data() -> Path:
    return official("geneval").parent


@pytest.fixture
def pictures(tmp_path: Path, data: Path) -> Path:
    """Of GenEval, the first four prompts of every task: 96 pictures."""
    part = Part("geneval")
    draw_all(tmp_path / "pictures", part, part.first_of_each_group(part.prompts(data), 4))
    return tmp_path / "pictures"


def settings_for(pictures: Path, data: Path, output: Path, **others: Any) -> dict[str, Any]:
    settings = {"benchmark": "geneval", "images": str(pictures), "data": str(data), "output": str(output), "prompts": 4}
    return {**settings, "judges": judges("detector"), "experiment_name": None, **others}


def result_files(output: Path, part: str = "geneval") -> tuple[bytes, bytes]:
    return tuple((output / part / name).read_bytes() for name in ("result.json", "prompts.jsonl"))  # type: ignore


def lines_of(output: Path, part: str = "geneval") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / part / "prompts.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- the result


def test_the_result_is_what_the_scoring_makes_of_the_judgements(pictures: Path, data: Path, tmp_path: Path) -> None:
    settings = settings_for(pictures, data, tmp_path / "out", name="A model")
    evaluate_task(settings)
    result, lines = json.loads(result_files(tmp_path / "out")[0]), lines_of(tmp_path / "out")
    judged = []
    for prompt in Part("geneval").first_of_each_group(geneval.prompts(data / "geneval"), 4):
        for planned in Part("geneval").plan(prompt):
            with Image.open(pictures / planned.file) as picture:
                (question,) = {json.dumps(q.question) for q in geneval.questions(prompt, 4)}
                asked = SimpleNamespace(pictures=(picture.copy(),), question=json.loads(question))
                judged.append({**prompt, **fake_judges.FakeJudge("detector").answer(asked)})  # type: ignore[arg-type]
    for mode in ("official", "fixed"):
        expected = geneval.score(judged, mode)
        assert result["scores"][mode] == json.loads(json.dumps({k: v for k, v in expected.items() if k != "records"}))
        assert 0.05 < expected["overall"] < 0.95  # else nothing would show
    assert [verdict for line in lines for verdict in line["verdicts"]] == geneval.score(judged)["records"]
    assert result["model"] == "A model" and result["language"] is None and result["title"] == "GenEval"
    assert result["slice"] == {"prompts": 24, "of": 553}
    assert result["comparable"] == {"verdict": False, "reasons": ["24 of 553 prompts were evaluated."]}
    assert result["pictures"]["sizes"] == {"16x16": 96} and result["pictures"]["source"] == "images"
    assert result["judges"]["detector"]["revision"] == "1"


def test_every_prompt_has_a_line_with_all_that_its_score_rests_on(pictures: Path, data: Path, tmp_path: Path) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    lines = lines_of(tmp_path / "out")
    assert [line["prompt_id"] for line in lines[:5]] == ["00000", "00001", "00002", "00003", "00080"]
    for line in lines:
        assert line["score"] == sum(verdict["correct"] for verdict in line["verdicts"]) / 4
        assert [one["pictures"] for one in line["judgements"]] == [[0], [1], [2], [3]]
        assert {one["role"] for one in line["judgements"]} == {"detector"}
        for image in line["images"]:
            with Image.open(image["file"]) as picture:
                assert picture_hash(picture) == image["sha256"]
    assert {line["group"] for line in lines} == set(geneval.TASKS)


def test_nothing_is_judged_twice(pictures: Path, data: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.png"))
    shutil.copy(files[0], files[1])  # the same picture and question
    fake_judges.CALLS.clear()
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    assert len(fake_judges.CALLS) == len(set(fake_judges.CALLS)) == 95
    before = result_files(tmp_path / "out")
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    assert len(fake_judges.CALLS) == 95 and result_files(tmp_path / "out") == before
    noise(1000).save(files[2])  # another picture alone is judged anew
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    assert len(fake_judges.CALLS) == 96
    evaluate_task(settings_for(pictures, data, tmp_path / "out", judges=judges("detector", revision="2")))
    assert len(fake_judges.CALLS) == 96 + 95  # other weights have said nothing yet
    assert json.loads(result_files(tmp_path / "out")[0])["judges"]["detector"]["revision"] == "2"


def test_a_larger_slice_judges_what_is_new(pictures: Path, data: Path, tmp_path: Path) -> None:
    fake_judges.CALLS.clear()
    evaluate_task(settings_for(pictures, data, tmp_path / "out", prompts=2))
    assert len(fake_judges.CALLS) == 48
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    assert len(fake_judges.CALLS) == 96
    evaluate_task(settings_for(pictures, data, tmp_path / "alone"))
    assert result_files(tmp_path / "out") == result_files(tmp_path / "alone")


def test_a_result_of_other_pictures_is_not_replaced(pictures: Path, data: Path, tmp_path: Path) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "out", prompts=1))
    shutil.copytree(pictures, tmp_path / "others")
    with pytest.raises(UserError, match=r"is the result of .*pictures, not of .*others: name another output=…"):
        evaluate_task(settings_for(tmp_path / "others", data, tmp_path / "out", prompts=1))


def test_fewer_pictures_of_each_prompt_are_scored_as_such(pictures: Path, data: Path, tmp_path: Path) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "out", prompts=1, images_per_prompt=2))
    result = json.loads(result_files(tmp_path / "out")[0])
    assert result["scores"]["official"]["images"] == 12 and result["scores"]["official"]["lost"]["images"] == 0
    assert "2 of 4 pictures of each prompt were evaluated." in result["comparable"]["reasons"]


def test_what_does_not_compare_says_why(tmp_path: Path, data: Path) -> None:
    part = Part("cvtg2k")
    draw_all(tmp_path / "pictures", part, part.first_of_each_group(part.prompts(data), 1))
    differs = judges("ocr", differs="It reads in its own way.")
    settings = {"benchmark": "cvtg2k", "judges": differs, "prompts": 1, "prompt_rewriter": "a language model"}
    evaluate_task({**settings_for(tmp_path / "pictures", data, tmp_path / "out"), **settings})
    result = json.loads(result_files(tmp_path / "out", "cvtg2k")[0])
    assert result["comparable"]["reasons"] == [
        "Judge ocr: It reads in its own way.",
        "There is no judge clip: what it decides is not scored.",
        "8 of 2000 prompts were evaluated.",
        "The prompts were rewritten: a language model.",
        "The pictures have 16x16 pixels, not 1024x1024.",
    ]
    assert "clip_score" not in result["scores"]["official"]["scores"]
    both = {**differs, **judges("clip")}
    evaluate_task({**settings_for(tmp_path / "pictures", data, tmp_path / "out"), **settings, "judges": both})
    assert "clip_score" in json.loads(result_files(tmp_path / "out", "cvtg2k")[0])["scores"]["official"]["scores"]


def test_several_benchmarks_and_languages_each_have_a_folder(tmp_path: Path, data: Path) -> None:
    for part in (Part("longtext", "en"), Part("longtext", "zh"), Part("oneig", "en")):
        draw_all(tmp_path / "pictures" / part.name, part, part.first_of_each_group(part.prompts(data), 1))
    roles = judges("vlm", "llm2clip", "style", "distance")
    settings = {"benchmark": "longtext,oneig", "judges": roles, "prompts": 1}
    with pytest.raises(UserError, match=r"no folder .*oneig-zh"):
        evaluate_task({**settings_for(tmp_path / "pictures", data, tmp_path / "out"), **settings})
    part = Part("oneig", "zh")
    draw_all(tmp_path / "pictures" / part.name, part, part.first_of_each_group(part.prompts(data), 1))
    evaluate_task({**settings_for(tmp_path / "pictures", data, tmp_path / "out"), **settings})
    for name, language in (("longtext-en", "en"), ("longtext-zh", "zh"), ("oneig-en", "en"), ("oneig-zh", "zh")):
        result = json.loads(result_files(tmp_path / "out", name)[0])
        assert result["language"] == language
        assert (result["scores"]["fixed"]["overall"] is None) == name.startswith("oneig")  # for want of a styled prompt
    dimensions = json.loads(result_files(tmp_path / "out", "oneig-zh")[0])["scores"]["official"]["scores"]
    assert dimensions.keys() == {"alignment", "text", "reasoning", "diversity"}  # no styled prompt is among the first


def test_prompts_that_no_judge_is_asked_about_are_left_out_and_counted(tmp_path: Path, data: Path) -> None:
    part = Part("oneig", "en")
    draw_all(tmp_path / "pictures", part, part.first_of_each_group(part.prompts(data), 1))
    settings = {"benchmark": "oneig", "language": "en", "judges": judges("vlm"), "prompts": 1}
    evaluate_task({**settings_for(tmp_path / "pictures", data, tmp_path / "out"), **settings})
    result = json.loads(result_files(tmp_path / "out", "oneig-en")[0])
    assert result["scores"]["official"]["scores"].keys() == {"alignment", "text"}
    assert result["slice"] == {"prompts": 4, "of": 1120}
    groups = [line["group"] for line in lines_of(tmp_path / "out", "oneig-en")]
    assert sorted(groups) == ["anime", "human", "object", "text"]  # reasoning is LLM2CLIP's


# ------------------------------------------------------------------------------------------------------ kills, shards


class Server:
    """Evaluates in processes that are killed."""

    def __init__(self, folder: Path) -> None:
        self.errors = folder / "stderr.txt"
        tests = ROOT / "tests"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(tests / "evaluation_server.py")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(ROOT)]), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("ab"),
            text=True,
        )

    def run(self, settings: dict[str, Any], kill_after: int) -> bool:
        """Whether the process that evaluates was killed at the nth thing that it did, or had come to its end before."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([settings, kill_after]) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        assert code in (0, -signal.SIGKILL), self.errors.read_text()[-2000:]
        return code != 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.kill()
    server.process.wait()


def killed_again_and_again(server: Server, settings: dict[str, Any], steps: random.Random, most: int) -> int:
    """How many kills it took to come to the end."""
    kills = 0
    while server.run(settings, steps.randint(1, most)):
        kills += 1
    return kills


def test_kills_at_any_moment_leave_the_same_result(pictures: Path, data: Path, tmp_path: Path, server: Server) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "whole"))
    settings = settings_for(pictures, data, tmp_path / "killed")
    assert killed_again_and_again(server, settings, random.Random(0), most=30) >= 3
    assert result_files(tmp_path / "killed") == result_files(tmp_path / "whole")


def test_kills_in_each_step_leave_the_same_result(pictures: Path, data: Path, tmp_path: Path, server: Server) -> None:
    """24 prompts: looked at (1 to 24), asked and kept in three batches (25 to 30), scored (31 to 54), written (55)."""
    evaluate_task(settings_for(pictures, data, tmp_path / "whole"))
    for kill in (1, 24, 27, 30, 40, 55):
        settings = settings_for(pictures, data, tmp_path / f"killed-{kill}")
        assert server.run(settings, kill)
        assert not (tmp_path / f"killed-{kill}/geneval/result.json").exists()
        evaluate_task(settings)
        assert result_files(tmp_path / f"killed-{kill}") == result_files(tmp_path / "whole")
    assert not server.run(settings_for(pictures, data, tmp_path / "end"), 56)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_give_the_same_result_whoever_comes_last(
    pictures: Path, data: Path, tmp_path: Path, shards: int
) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "whole"))
    order = random.Random(shards).sample(range(shards), shards)
    for place, number in enumerate(order):
        assert not (tmp_path / "parts/geneval/result.json").exists()
        fake_judges.CALLS.clear()
        evaluate_task(settings_for(pictures, data, tmp_path / "parts", shard=f"{number + 1}/{shards}"))
        assert len(fake_judges.CALLS) == 96 // shards
        assert (tmp_path / "parts/geneval/result.json").exists() == (place == shards - 1)
    assert result_files(tmp_path / "parts") == result_files(tmp_path / "whole")


def test_what_shards_left_is_done_by_one_process(pictures: Path, data: Path, tmp_path: Path, server: Server) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "whole"))
    settings = settings_for(pictures, data, tmp_path / "parts")
    assert server.run({**settings, "shard": "2/2"}, 14)
    evaluate_task({**settings, "shard": "1/3"})
    evaluate_task(settings)
    assert result_files(tmp_path / "parts") == result_files(tmp_path / "whole")


def test_torchruns_ranks_are_shards() -> None:
    assert shard_of(None, {"RANK": "1", "WORLD_SIZE": "3"}) == shard_of("2/3", {}) == Shard(1, 3)
    assert shard_of(None, {}) == Shard(0, 1) and shard_of("1/2", {"RANK": "1", "WORLD_SIZE": "3"}) == Shard(0, 2)
    assert [Shard(number, 3).share(range(10), block=2) for number in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]


def test_two_processes_do_not_do_the_same(pictures: Path, data: Path, tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another evaluation is at work")
    with held_by_another(tmp_path / "out/geneval/.lock"), refused:
        evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))


# -------------------------------------------------------------------------------------------------------------- lost


def test_missing_and_broken_pictures_are_counted_and_named(pictures: Path, data: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.png"))
    chosen = random.Random(0).sample(files, 6)  # of 96
    for file in chosen[:3]:
        file.unlink()
    for file in chosen[3:]:
        file.write_bytes(file.read_bytes()[:-60])  # of which the header says nothing
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    result = json.loads(result_files(tmp_path / "out")[0])
    named: dict[str, int] = {}
    for file in chosen:
        named[file.parent.name] = named.get(file.parent.name, 0) + 1
    for scores in result["scores"].values():
        assert scores["images"] == 96 and scores["lost"]["images"] == 6
        assert scores["lost"]["prompts"] == dict(sorted(named.items()))
        assert scores["overall"] < sum(scores["lost"]["scores_if_skipped"].values()) / 6
    assert "6 of 96 pictures are missing or broken, and count as 0." in result["comparable"]["reasons"]
    lost = {
        Path(line["prompt_id"], str(place)): image["lost"]
        for line in lines_of(tmp_path / "out")
        for place, image in enumerate(line["images"])
        if "lost" in image
    }
    assert lost.keys() == {file.relative_to(pictures).with_suffix("") for file in chosen}
    assert [lost[file.relative_to(pictures).with_suffix("")] for file in chosen[:3]] == ["missing"] * 3
    assert all("truncated" in lost[file.relative_to(pictures).with_suffix("")] for file in chosen[3:])


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_cut_short_anywhere_is_broken_or_whole(tmp_path: Path, ending: str) -> None:
    folder, planned = tmp_path / "00000", Part("geneval").plan({"index": 0, "prompt": "a dog", "metadata": {}})
    folder.mkdir()
    noise(0, (48, 48)).save(folder / f"0.{ending}")
    whole = (folder / f"0.{ending}").read_bytes()
    (expected,) = PictureFolder(tmp_path).load(PictureFolder(tmp_path).find(planned)[:1])
    assert isinstance(expected, Image.Image)
    broken = 0
    for length in (0, 1, 20, *random.Random(0).sample(range(len(whole)), 40), len(whole) - 1):
        (folder / f"0.{ending}").write_bytes(whole[:length])
        (found,) = PictureFolder(tmp_path).load(PictureFolder(tmp_path).find(planned)[:1])
        if isinstance(found, Image.Image):
            assert found.tobytes() == expected.tobytes()
        else:
            assert found.startswith("broken: ") and str(tmp_path) not in found
            broken += 1
    assert broken >= 42


def test_damaged_exif_data_are_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(picture: Image.Image) -> Image.Image:
        raise AttributeError("'IFDRational' object has no attribute 'encode'")  # as of a JPEG with a changed byte

    monkeypatch.setattr("evaluation.pictures.ImageOps.exif_transpose", damaged)
    (tmp_path / "00000").mkdir()
    noise(0).save(tmp_path / "00000/0.png")
    planned = Part("geneval").plan({"index": 0, "prompt": "a dog", "metadata": {}})[:1]
    (found,) = PictureFolder(tmp_path).load(PictureFolder(tmp_path).find(planned))
    assert isinstance(found, str) and found.startswith("broken: ")


def test_a_folder_without_any_picture_is_a_wrong_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no picture of GenEval: the first one would be 00000/0.png or, .* 00000/sa"):
        evaluate_task(settings_for(tmp_path / "empty", data, tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------------- layouts


def hashes(folder: Path, part: Part, prompt: dict[str, Any], **settings: Any) -> list[str]:
    source = PictureFolder(folder, **settings)
    found = source.load(source.find(part.plan(prompt)))
    return [one if isinstance(one, str) else picture_hash(one) for one in found]


def moved(source: Path, target: Path, **options: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        picture.save(target, **options)


@pytest.mark.parametrize("digits", [4, 5])
def test_genevals_own_folders_are_read(tmp_path: Path, data: Path, digits: int) -> None:
    part, prompt = Part("geneval"), geneval.prompts(data / "geneval")[7]
    for number, file in enumerate(draw_all(tmp_path / "own", part, [prompt])):
        moved(file, tmp_path / f"official/00007/samples/{number:0{digits}d}.png")
    (tmp_path / "official/00007/grid.png").write_bytes(b"")
    assert hashes(tmp_path / "own", part, prompt) == hashes(tmp_path / "official", part, prompt)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_cvtg2ks_own_folders_are_read(tmp_path: Path, data: Path, ending: str) -> None:
    part, prompt = Part("cvtg2k"), cvtg2k.prompts(data / "cvtg2k")[3]
    (tmp_path / "CVTG/2").mkdir(parents=True)
    place = tmp_path / f"CVTG/2/{prompt['index']}.{ending}"
    noise(1).save(place)
    noise(2).save(tmp_path / f"CVTG/2/{prompt['index']}0.{ending}")
    with Image.open(place) as picture:
        assert hashes(tmp_path, part, prompt) == [picture_hash(picture)]


@pytest.mark.parametrize("first", [0, 1])
def test_longtexts_own_files_are_read(tmp_path: Path, data: Path, first: int) -> None:
    part, prompt = Part("longtext", "en"), longtext.prompts(data / "longtext")[2]
    for number, file in enumerate(draw_all(tmp_path / "own", part, [prompt])):
        moved(file, tmp_path / f"official/{prompt['prompt_id']:04d}_{first + number}.png")
    assert hashes(tmp_path / "own", part, prompt) == hashes(tmp_path / "official", part, prompt)


DPG_PROMPT = {"item_id": "vrd12", "prompt": "a cat", "questions": {"1": "A cat?"}, "dependency": {"1": [0]}}


def grid_of(files: list[Path]) -> Image.Image:
    pictures = [Image.open(file) for file in files]
    width, height = pictures[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * width, number // 2 * height))
    return grid


@pytest.mark.parametrize("benchmark", ["dpg", "oneig"])
def test_cells_of_a_lossless_grid_are_exact(tmp_path: Path, data: Path, benchmark: str) -> None:
    part = Part("dpg") if benchmark == "dpg" else Part("oneig", "en")
    prompt = DPG_PROMPT if benchmark == "dpg" else oneig.prompts(data / "oneig")[0]
    name = "vrd12.png" if benchmark == "dpg" else "images/anime/some-model/000.png"
    files = draw_all(tmp_path / "own", part, [prompt], (24, 16))
    (tmp_path / "grids" / name).parent.mkdir(parents=True)
    grid_of(files).save(tmp_path / "grids" / name)
    exact = hashes(tmp_path / "own", part, prompt)
    assert len(set(exact)) == 4
    assert hashes(tmp_path / "grids", part, prompt) == exact
    if benchmark == "oneig":
        assert hashes(tmp_path / "grids/images", part, prompt) == exact
        (tmp_path / "grids/images/anime/other").mkdir()
        grid_of(files).save(tmp_path / "grids/images/anime/other/000.png")
        with pytest.raises(UserError, match="pictures of several models"):
            hashes(tmp_path / "grids", part, prompt)
    else:
        grid_of(files).crop((0, 0, 47, 32)).save(tmp_path / "grids" / name)
        assert (
            hashes(tmp_path / "grids", part, prompt) == ["broken: 47x32 pixels are no grid of 2 rows and 2 columns"] * 4
        )


def test_oneigs_compression_is_webp_of_the_grid_then_jpeg_of_each_cell(tmp_path: Path, data: Path) -> None:
    def through(picture: Image.Image, kind: str) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return Image.open(buffer).convert("RGB")

    part, prompt = Part("oneig", "en"), oneig.prompts(data / "oneig")[0]
    files = draw_all(tmp_path / "own", part, [prompt], (32, 32))
    grid = through(grid_of(files), "WEBP")
    corners = [(0, 0), (32, 0), (0, 32), (32, 32)]
    cells = [through(grid.crop((x, y, x + 32, y + 32)), "JPEG") for x, y in corners]
    expected = [picture_hash(cell) for cell in cells]
    assert hashes(tmp_path / "own", part, prompt, compressed=True) == expected
    target = tmp_path / "official/images/anime/model/000.webp"
    target.parent.mkdir(parents=True)
    grid_of(files).save(target)  # as the benchmark's tools write it, and no second time here
    assert hashes(tmp_path / "official", part, prompt, compressed=True) == expected


def test_a_black_cell_of_oneigs_grid_is_a_missing_picture(tmp_path: Path, data: Path) -> None:
    part, prompt = Part("oneig", "en"), oneig.prompts(data / "oneig")[0]
    grid = grid_of(draw_all(tmp_path / "own", part, [prompt]))
    grid.paste((0, 0, 0), (16, 0, 32, 16))
    (tmp_path / "images/anime/model").mkdir(parents=True)
    grid.save(tmp_path / "images/anime/model/000.png")
    found = hashes(tmp_path, part, prompt, gallery=True)
    assert found[1].startswith("missing: ") and [len(found[i]) for i in (0, 2, 3)] == [64] * 3
    assert len(hashes(tmp_path, part, prompt)[1]) == 64


# ----------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"), "pipeline", seed=0)


def drawing_for(model: Path, output: Path, **others: Any) -> dict[str, Any]:
    settings = {"benchmark": "tinyworld", "language": "en", "model": str(model), "output": str(output), "prompts": 1}
    return {**settings, "device": "cpu", "experiment_name": None, **others}


def drawn_files(output: Path, part: str = "tinyworld-en") -> dict[str, bytes]:
    folder = output / part / "images"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_kills_while_drawing_leave_the_same_pictures_and_result(model: Path, tmp_path: Path, server: Server) -> None:
    evaluate_task(drawing_for(model, tmp_path / "whole", batch_size=2))
    assert len(drawn_files(tmp_path / "whole")) == 7
    settings = drawing_for(model, tmp_path / "killed", batch_size=2)
    assert killed_again_and_again(server, settings, random.Random(3), most=12) >= 3
    assert drawn_files(tmp_path / "killed") == drawn_files(tmp_path / "whole")
    assert result_files(tmp_path / "killed", "tinyworld-en") == result_files(tmp_path / "whole", "tinyworld-en")


def test_shards_draw_the_same_pictures(model: Path, tmp_path: Path) -> None:
    evaluate_task(drawing_for(model, tmp_path / "whole", batch_size=3))
    for number in (2, 1):
        evaluate_task(drawing_for(model, tmp_path / "parts", batch_size=3, shard=f"{number}/2"))
        assert len(drawn_files(tmp_path / "parts")) == {2: 3, 1: 7}[number]
    assert drawn_files(tmp_path / "parts") == drawn_files(tmp_path / "whole")
    assert result_files(tmp_path / "parts", "tinyworld-en") == result_files(tmp_path / "whole", "tinyworld-en")


def test_pictures_come_from_the_plans_seeds_and_draws(model: Path, data: Path, tmp_path: Path) -> None:
    settings = drawing_for(model, tmp_path / "out", benchmark="geneval", data=str(data), judges=judges("detector"))
    evaluate_task({**{k: v for k, v in settings.items() if k != "language"}, "batch_size": 4})
    pipeline = ZImagePipeline.from_pretrained(model, "cpu")
    prompt = geneval.prompts(data / "geneval")[0]["prompt"]
    expected = pipeline([prompt] * 4, seed=42, draw=[0, 1, 2, 3], batch_size=4)
    for number, picture in enumerate(expected):
        with Image.open(tmp_path / f"out/geneval/images/00000/{number}.png") as drawn:
            assert drawn.tobytes() == picture.tobytes()
            assert drawn.text["seed"] == "42" and json.loads(drawn.text["parameters"])["draw"] == number
    result = json.loads(result_files(tmp_path / "out")[0])
    assert result["pictures"]["seed"] == 42 and result["pictures"]["num_inference_steps"] == 2
    assert result["model"] == model.parent.name and result["pictures"]["sizes"] == {"32x32": 24}


def test_what_pictures_cost_is_noted(model: Path, tmp_path: Path) -> None:
    settings = drawing_for(model, tmp_path / "out", batch_size=4, num_inference_steps=3, guidance_scale=2.0)
    evaluate_task(settings)
    times = tmp_path / "out/tinyworld-en/images/times.jsonl"
    lines = [json.loads(line) for line in times.read_text().splitlines()]
    assert [line["pictures"] for line in lines] == [4, 3] and all(line["seconds"] > 0 for line in lines)
    assert {line["evaluations"] for line in lines} == {6.0}  # with the prompt and without, at each step
    evaluate_task(settings)  # nothing is drawn
    assert len(times.read_text().splitlines()) == 2
    evaluate_task({**settings, "output": str(tmp_path / "plain"), "guidance_scale": 1.0})
    plain = (tmp_path / "plain/tinyworld-en/images/times.jsonl").read_text().splitlines()
    assert {json.loads(line)["evaluations"] for line in plain} == {3.0}


def test_other_settings_do_not_mix_with_pictures_that_are_there(model: Path, tmp_path: Path) -> None:
    evaluate_task(drawing_for(model, tmp_path / "out"))
    with pytest.raises(UserError, match=r"pictures drawn with num_inference_steps=2 \(now num_inference_steps=3\)"):
        evaluate_task(drawing_for(model, tmp_path / "out", num_inference_steps=3))
    with pytest.raises(UserError, match=r"drawn with seed=1000 \(now seed=5\)"):
        evaluate_task(drawing_for(model, tmp_path / "out", seed=5))
    (tmp_path / "out/tinyworld-en/images/manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds pictures and no manifest.json"):
        evaluate_task(drawing_for(model, tmp_path / "out"))


def test_a_manifest_that_a_kill_tore_is_written_anew(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "out/tinyworld-en/images"
    images.mkdir(parents=True)
    (images / "manifest.json.tmp").write_text("{")
    evaluate_task(drawing_for(model, tmp_path / "out"))
    assert len(drawn_files(tmp_path / "out")) == 7 and (images / "manifest.json").is_file()


def test_a_picture_that_was_deleted_is_drawn_again(model: Path, tmp_path: Path) -> None:
    evaluate_task(drawing_for(model, tmp_path / "out", batch_size=4))
    before, result = drawn_files(tmp_path / "out"), result_files(tmp_path / "out", "tinyworld-en")
    for name in list(before)[::3]:
        (tmp_path / "out/tinyworld-en/images" / name).unlink()
    evaluate_task(drawing_for(model, tmp_path / "out", batch_size=4))
    assert drawn_files(tmp_path / "out") == before
    assert result_files(tmp_path / "out", "tinyworld-en") == result


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "give either model=….* or images=…"),
        ({"model": "a"}, "give either model=….* or images=…"),
        ({"benchmark": "genevel"}, "benchmark=genevel: there is none .did you mean 'geneval'"),
        ({"language": "fr"}, "language must be en, zh or null"),
        ({"language": "zh"}, "GenEval is in English only"),
        ({"data": None}, "reads its official files from data=FOLDER/geneval, which is not given: get .* https://"),
        ({"data": "/nowhere"}, "evaluation_metadata.jsonl, a file of GenEval, cannot be read .* get it from https://"),
        ({"judges": {}}, "judges.detector is needed: give what .*Mask2FormerDetector takes as judges.detector.init"),
        ({"judges": {"detector": None}}, "judges.detector is needed"),
        ({"judges": {"detektor": {}}}, "judges.detektor is no role of a judge .did you mean 'detector'"),
        ({"judges": judges("detector", "ocr")}, "judges.ocr has no effect"),
        ({"judges": {"detector": {"class": JUDGE}}}, "judges.detector.class is not a setting"),
        ({"judges": {"detector": {"class_path": JUDGE}}}, "judges.detector.init_args.role has no value"),
        ({"judges": {"detector": {"class_path": "fake_judges.said"}}}, "judges.detector.*must be|said"),
        ({"judges": judges("detector", weights="a")}, "judges.detector.init_args.weights is not a setting"),
        ({"judges": {"detector": JUDGE}}, r"judges.detector must name a judge: give judges.detector.class_path="),
        (
            {"judges": {"detector": {"init_args": {"folder": "no", "clip": "no"}}}},
            "judges.detector: there is no folder no",
        ),
        ({"benchmark": "preference,geneval"}, "benchmark=preference has settings of its own: run it by itself"),
        ({"num_inference_steps": 4}, "num_inference_steps has no effect on images"),
        ({"batch_size": 4}, "batch_size has no effect on images"),
        ({"compression": "lossless"}, "compression has an effect on oneig alone"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"images_per_prompt": 5}, "images_per_prompt=5 has no effect: the protocol has 4 at most"),
        ({"shard": "1"}, "shard must be such as 1/3"),
        ({"shard": "4/3"}, "there are the shards 1/3 to 3/3"),
        ({"nonsense": 1}, "nonsense is not a setting"),
        ({"images": "/nowhere"}, "no folder /nowhere with the pictures of GenEval"),
    ],
)
def test_wrong_settings_are_one_sentence(
    pictures: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {**settings_for(pictures, data, tmp_path / "out"), **changes}
    with pytest.raises(UserError, match=message):
        evaluate_task({key: value for key, value in settings.items() if value is not None})
    assert not (tmp_path / "out").exists()


def test_official_files_mean_nothing_to_tinyworld(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data has no effect"):
        evaluate_task(drawing_for(model, tmp_path / "out", data=str(data)))


def test_a_rewriter_of_prompts_is_none_of_a_model_that_draws(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt_rewriter says how images=… came about"):
        evaluate_task(drawing_for(model, tmp_path / "out", prompt_rewriter="a language model"))


@pytest.mark.parametrize("revision", ["nan", "other"])
def test_what_a_judge_must_not_say_is_never_kept(pictures: Path, data: Path, tmp_path: Path, revision: str) -> None:
    broken = {"class_path": "fake_judges.BrokenJudge", "init_args": {"role": "detector", "revision": revision}}
    with pytest.raises(UserError, match=r"judges.detector: BrokenJudge must give a mapping .*detections"):
        evaluate_task(settings_for(pictures, data, tmp_path / "out", judges={"detector": broken}))
    assert not list((tmp_path / "out/geneval/judgements").glob("*.jsonl"))


def test_a_damaged_line_is_named(pictures: Path, data: Path, tmp_path: Path) -> None:
    evaluate_task(settings_for(pictures, data, tmp_path / "out"))
    (file,) = (tmp_path / "out/geneval/judgements").glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"line 2, is damaged: delete that line"):
        evaluate_task(settings_for(pictures, data, tmp_path / "out"))


def test_the_command_line_evaluates(pictures: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"images={pictures}", f"data={data}", f"output={tmp_path / 'out'}", "prompts=4", "benchmark=geneval"]
    words += [f"judges.detector.class_path={JUDGE}", "judges.detector.init_args.role=detector", "experiment_name=null"]
    assert cli.main(["run", "evaluate", *words]) == 0
    shown = capsys.readouterr().out
    assert "GenEval: 0." in shown and "not comparable" in shown and str(tmp_path / "out/geneval/result.json") in shown


# ------------------------------------------------------------------------------------ reports, and what else there is


def test_results_have_reports_and_are_a_run_in_mlflow(
    pictures: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(rank_zero_only, "rank", 1)  # of torchrun's processes, any may be the last to be done
    part = Part("longtext", "en")
    draw_all(tmp_path / "both/longtext-en", part, part.first_of_each_group(part.prompts(data), 1))
    pictures.rename(tmp_path / "both/geneval")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = settings_for(tmp_path / "both", data, tmp_path / "out", name="Model/1", tracking_uri=store, prompts=1)
    settings |= {"benchmark": "geneval,longtext", "language": "en", "experiment_name": "compared"}
    evaluate_task({**settings, "judges": judges("detector", "vlm")})
    for folder in ("", "geneval", "longtext-en"):
        page = (tmp_path / "out" / folder / "report.html").read_text()
        assert "Model/1" in page and ("GenEval" in page) == (folder != "longtext-en")
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("compared").experiment_id])
    result = json.loads(result_files(tmp_path / "out")[0])
    assert run.info.run_name == "Model/1" and run.info.status == "FINISHED"
    assert run.data.metrics["geneval/overall"] == result["scores"]["official"]["overall"]
    assert "longtext-en/overall" in run.data.metrics


def test_a_model_is_called_like_its_run(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    for model in (run, run / "pipeline"):
        assert model_name(EvaluateSettings(["tinyworld"], model=str(model))) == "quickstart"
    assert model_name(EvaluateSettings(["tinyworld"], model=str(run / "pipeline"), name="ours")) == "ours"
    assert model_name(EvaluateSettings(["cvtg2k"], images=str(run / "pipeline"))) == "pipeline"


def test_every_roles_own_judge_is_there_and_has_the_role() -> None:
    for role, path in judging.DEFAULT_JUDGES.items():
        judge = import_class(f"judges.{role}", path)
        assert callable(judge.record) and callable(judge.judge), role
    assert judging.DEFAULT_JUDGES.keys() == judging.FIELDS.keys() == ROLES.keys()


def test_votes_are_rated_by_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    vote = {"model_a": "a", "model_b": "b", "seed": 0, "annotator": "x"}
    votes = [
        {**vote, "winner": winner, "prompt_id": str(number), "timestamp": f"2026-01-0{number + 1}T00:00:00"}
        for number, winner in enumerate(["model_a", "model_a", "model_b"])
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    words = ["benchmark=preference", f"votes={tmp_path / 'votes.jsonl'}", f"output={tmp_path / 'out'}"]
    assert cli.main(["run", "evaluate", *words, "resamples=10"]) == 0
    best, other = json.loads((tmp_path / "out/preference/preference.json").read_text())["ratings"]
    assert (best["model"], other["model"]) == ("a", "b")
    assert f"a {best['rating']:.0f}, b {other['rating']:.0f}" in capsys.readouterr().out
    assert cli.main(["run", "evaluate", *words, "model=a"]) == 2
    assert "model is not a setting of PreferenceTaskSettings" in capsys.readouterr().err


def test_distances_are_measured_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any, **named: Any) -> dict[str, Any]:
        asked.append((arguments, named))
        return {"metrics": {"fid": {"value": 1.5}}, "notes": ["A note."], "comparable": {"reasons": []}}

    monkeypatch.setattr(side_tasks, "fidelity", measured)
    words = ["benchmark=fidelity", "images=a", "reference=b", "inception=c.pth", "resize=64", "device=cpu"]
    assert cli.main(["run", "evaluate", *words, f"output={tmp_path}"]) == 0
    assert asked == [((Path("a"), Path("b"), Path("c.pth"), FidelitySettings(resize=64)), {"device": "cpu"})]
    assert json.loads((tmp_path / "fidelity/fidelity.json").read_text())["metrics"]["fid"]["value"] == 1.5
    assert "fid 1.5000" in capsys.readouterr().out


def test_results_of_several_models_are_put_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [result_folder(tmp_path / name, "tinyworld-en", name) for name in ("one", "other")]
    words = ["benchmark=compare", f"results=[{folders[0]}, {folders[1]}]", f"output={tmp_path}/both"]
    assert cli.main(["run", "evaluate", *words]) == 0
    page = (tmp_path / "both/report.html").read_text()
    assert "one" in page and "other" in page and "report.html" in capsys.readouterr().out
    assert cli.main(["run", "evaluate", "benchmark=compare", f"results=[{tmp_path}]"]) == 2


def test_the_self_test_belongs_to_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("evaluation.self_test.self_test", lambda golden: asked.append(golden) or 1)
    assert cli.main(["run", "evaluate", "--self-test"]) == 1
    assert cli.main(["run", "evaluate", "--self-test", f"golden={tmp_path}"]) == 1
    assert asked == [None, tmp_path]
    assert cli.main(["run", "evaluate", "--self-test", "images=a"]) == 2
    assert cli.main(["run", "generate", "--self-test"]) == 2
    assert "--self-test belongs to evaluate, not to generate" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ memory, time


def scoring_peak(data: Path, folder: Path, prompts: int) -> int:
    """Bytes that Python holds at most while so many prompts of each task are scored, their judgements large."""
    part = Part("geneval")
    draw_all(folder / "pictures", part, part.first_of_each_group(part.prompts(data), prompts), (2, 2))
    settings = settings_for(folder / "pictures", data, folder / "out", prompts=prompts)
    evaluate_task(settings)
    (file,) = (folder / "out/geneval/judgements").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["judgement"]["detections"] = [{"cls": "dog", "box": [0, 0, 9, 9, 0.95], "color": None}] * 150
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    peak = 0
    original = scoring.score

    def measured(*arguments: Any, **named: Any) -> bool:
        nonlocal peak
        tracemalloc.start()
        try:
            return original(*arguments, **named)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.task.score", measured)
        evaluate_task(settings)
    return peak


def test_memory_does_not_grow_with_the_pictures(data: Path, tmp_path: Path) -> None:
    few, many = (scoring_peak(data, tmp_path / str(prompts), prompts) for prompts in (1, 8))
    written = (tmp_path / "8/out/geneval/prompts.jsonl").stat().st_size
    assert written > 1_500_000  # what would be held, were it held
    assert many - few < written / 10


def test_a_pass_of_2212_pictures_scores_in_seconds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("scoring_benchmark", ROOT / "benchmarks/scoring.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "scoring_benchmark", module)
    specification.loader.exec_module(module)
    seconds = module.timed_pass(data, tmp_path, detections=30)
    assert json.loads(result_files(tmp_path / "out")[0])["scores"]["official"]["images"] == 2212
    assert seconds["finish"] < 10
