"""docs/evaluation.md as its reader would follow it: what needs no weights is run, made small; the rest is checked."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_files import BENCHMARKS, official
from docs_pages import DOCS, Walk, blocks_of, lightning_run, run_words, write_pipeline
from PIL import Image

from evaluation.benchmarks import cvtg2k, longtext
from evaluation.judging import DEFAULT_JUDGES
from evaluation.suite import TITLES
from zimage_lit.config import compose
from zimage_lit.validate import check_config, import_class

PAGE = "evaluation.md"
SMALL = {"evaluate": ["experiment_name=null", "prompts=1"]}


class Reader(Walk):
    """Runs what asks for no weights; of the rest, the settings are checked."""

    def run(self, command: str) -> None:
        words = run_words(command)
        if "--self-test" in words or {"benchmark=preference", "benchmark=compare"} & set(words):
            write_other_model(Path("outputs/evaluation/cvtg2k"), Path("outputs/other-model/cvtg2k"))
            code, printed = lightning_run(words)
            assert code == 0, printed
            self.ran[command] = printed
        elif "benchmark=fidelity" in words:
            code, printed = lightning_run(words)
            assert code == 2 and "weights-inception-2015-12-05-6726825d.pth" in printed
            self.checked.append(command)
        elif "models/" in command:
            code, printed = lightning_run([*words, "--print-config"])
            assert code == 0, printed
            self.checked.append(command)
        else:
            super().run(command)


def write_other_model(folder: Path, other: Path) -> None:
    """The result of a model, as if another one had it too."""
    if folder.is_dir() and not other.is_dir():
        shutil.copytree(folder, other)
        result = json.loads((folder / "result.json").read_text())
        (other / "result.json").write_text(json.dumps({**result, "model": "other"}))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """The page followed from its first block to its last, with what it takes for given: a model, pictures, votes."""
    pytest.importorskip("rapidocr")
    planned = cvtg2k.plan(cvtg2k.prompts(official("cvtg2k")))[:3]
    planned += longtext.plan(longtext.prompts(official("longtext")))[:1]
    walk = Reader(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs-evaluation"))
        write_pipeline(Path("outputs/quickstart/pipeline"))
        Path("data").mkdir()
        Path("data/benchmarks").symlink_to(BENCHMARKS / "data")
        for one in planned:  # the first pictures alone: the others are lost
            path = Path("pictures/my-model") / one.official_file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "grey").save(path)
        shutil.copytree("pictures/my-model", "pictures/real")
        votes = [("a", "b", "model_a"), ("a", "b", "model_b"), ("a", "b", "tie"), ("b", "a", "both_bad")]
        keys = ("model_a", "model_b", "winner")
        rest = {"seed": 0, "annotator": "one", "timestamp": "2026-11-22T12:00:00Z"}
        lines = [{**dict(zip(keys, vote, strict=True)), "prompt_id": str(n), **rest} for n, vote in enumerate(votes)]
        Path("votes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        for language, content in blocks_of(PAGE):
            walk.follow(language, content)
        yield walk


def test_every_command_is_run_or_checked(walk):
    commands = re.findall(r"(?m)^(?:lightning run|torchrun) .*", (DOCS / PAGE).read_text(encoding="utf-8"))
    assert walk.count() == len(commands)
    ran = " ".join(walk.ran)
    for word in ("--self-test", "benchmark=tinyworld", "benchmark=cvtg2k", "benchmark=longtext", "votes=votes.jsonl"):
        assert word in ran


def test_the_files_that_the_page_names_are_there(walk):
    folder = Path("outputs/evaluation/tinyworld-en")
    for name in re.findall(r"`((?:result|prompts|report)\.\w+)`", (DOCS / PAGE).read_text(encoding="utf-8")):
        assert (folder / name).is_file(), name
    result = json.loads((folder / "result.json").read_text())
    assert set(result["scores"]) == {"official", "fixed"} and "verdict" in result["comparable"]


def test_pictures_that_are_not_there_are_counted(walk):
    result = json.loads(Path("outputs/evaluation/cvtg2k/result.json").read_text())
    assert result["scores"]["official"]["lost"]["images"] > 0
    assert "scores_if_skipped" in result["scores"]["official"]["lost"]
    assert not result["comparable"]["verdict"] and any(
        "RapidOCR" in reason for reason in result["comparable"]["reasons"]
    )


def test_the_table_of_judges_names_the_classes_that_there_are():
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:Judge|Reader|Detector|Verifier))(?:\(.*?\))?`", text))
    for path in [*DEFAULT_JUDGES.values(), "evaluation.judges.ocr.PaddleReader"]:
        assert import_class("judge", path)
        assert path.rpartition(".")[2] in named | {"RapidOCRReader"}, path
    for benchmark in TITLES.values():
        assert benchmark in text


def test_the_experiment_of_the_page_is_one(walk):
    config = compose("my_run.yaml")
    check_config(config)
    assert config["trainer"]["callbacks"]["benchmark"]["init_args"]["benchmark"] == "tinyworld"
