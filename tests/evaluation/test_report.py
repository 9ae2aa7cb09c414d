"""Reports of made-up models: what is in them, that it is right, and that nothing in a prompt can harm the page."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from result_folders import MODULES, result_folder

from evaluation.report.anchors import PUBLISHED
from evaluation.report.chart import LABELS, WIDTH, Series, score_chart
from evaluation.report.contents import contents, score_rows, worst
from evaluation.report.results import read_result, read_results
from evaluation.report.words import judges_words
from evaluation.report.write import write_report
from zimage_lit.errors import UserError

NASTY = "</h4><script>alert(1)</script><img src=x onerror='alert(2)'> & \"quoted\" | `x`"


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models on every benchmark, seven prompts each."""
    root = tmp_path_factory.mktemp("results")
    return [
        result_folder(root / model, key, model, skill, number=7, lost=[2] if model == "ours" else [])
        for model, skill in (("ours", 0.8), ("theirs", 0.5))
        for key in MODULES
    ]


@pytest.fixture(scope="module")
def report(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(folders, tmp_path_factory.mktemp("report"))


def change(folder: Path, to: Path, name: str = "result.json", **changes: Any) -> Path:
    """A copy of a result folder without pictures, with some keys of result.json, or of the first prompt, changed."""
    to.mkdir()
    for file in ("result.json", "prompts.jsonl"):
        shutil.copy(folder / file, to / file)
    lines = (to / name).read_text().split("\n", 1) if name == "prompts.jsonl" else [(to / name).read_text(), ""]
    (to / name).write_text("\n".join([json.dumps({**json.loads(lines[0]), **changes}), lines[1]]))
    return to


def test_the_page_has_all_benchmarks_and_models_and_needs_nothing_beside_it(report: Path) -> None:
    page = Page(report)
    assert [h["id"] for h in page.all("h2")] == list(MODULES)
    assert not page.all("script") and not page.all("link")
    sources = [image["src"] for image in page.all("img")]
    assert len(sources) > 200 and all(source.startswith("data:image/") for source in sources)
    assert report.stat().st_size < 12_000 * len(sources)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_the_files_are_the_same_every_time(folders: list[Path], tmp_path: Path) -> None:
    some = [folder for folder in folders if folder.name == "cvtg2k"]
    once, again = (write_report(some, tmp_path / name) for name in ("once", "again"))
    for ending in (".html", ".md", ".json"):
        assert again.with_suffix(ending).read_bytes() == once.with_suffix(ending).read_bytes()


def test_the_three_files_say_the_same(folders: list[Path], report: Path) -> None:
    expected = json.dumps(contents(read_results(folders)))
    assert json.dumps(json.loads(report.with_suffix(".json").read_text())) == expected
    told = json.loads(report.with_suffix(".json").read_text())
    page, text = Page(report).text, report.with_suffix(".md").read_text().replace("\\", "")
    for benchmark in told["benchmarks"]:
        times, digits = benchmark["times"], benchmark["digits"]
        for result in benchmark["results"]:
            score = result["scores"][0]["official"]
            numbers = [f"{score[part] * times:.{digits}f}" for part in ("score", "ci_low", "ci_high")]
            shown = "{} [{}, {}]".format(*numbers)
            assert shown in page and shown in text
            for sentence in (*result["remarks"], result["modes"], *result["comparable"]["reasons"]):
                assert sentence in page and sentence in text
            for lost in result["lost"]:
                named = f"{lost['prompt_id']}, picture {lost['image'] + 1}: {lost['reason']}"
                assert named in page and named in text
        for difference in benchmark["differences"]:
            assert f"theirs less ours: {'+' if difference['difference'] > 0 else ''}" in page
            for sentence in (difference["what"], *difference["remarks"]):
                assert sentence in page and sentence in text


def test_published_numbers_stand_beside_scores_of_the_same_name(report: Path) -> None:
    page = Page(report).text.split("\n")
    for benchmark in json.loads(report.with_suffix(".json").read_text())["benchmarks"]:
        if benchmark["key"] not in PUBLISHED:
            assert benchmark["key"] == "tinyworld-en" and benchmark["published"]["anchors"] == []
            continue
        names = {row["name"] for row in benchmark["results"][0]["scores"]}
        for anchor in PUBLISHED[benchmark["key"]].anchors:
            missing = {"categories/other"} if benchmark["key"] == "dpg" else set()  # asked by none of these prompts
            assert anchor.scores.keys() - names <= missing
            digits = PUBLISHED[benchmark["key"]].digits
            assert anchor.overall is None or f"{anchor.overall:.{digits}f}" in page
    assert sum(line.startswith("Z-Image: Z-Image report (arXiv 2511.22699)") for line in page) == 7
    assert any("0.743 and 0.752" in line for line in page)
    assert "No number is known of FLUX.1-dev, SD3.5-Large." in page  # OneIG in Chinese


def test_modes_that_differ_are_told_with_the_reason(report: Path, tmp_path: Path) -> None:
    told = {
        one["key"]: one["results"][0]["modes"]
        for one in json.loads(report.with_suffix(".json").read_text())["benchmarks"]
    }
    assert told["geneval"] == told["cvtg2k"] == "The modes official and fixed give the same numbers."
    assert told["dpg"].startswith("The modes differ in overall") and "first row of its table" in told["dpg"]
    page = Page(report).text
    dpg = json.loads(report.with_suffix(".json").read_text())["benchmarks"][list(MODULES).index("dpg")]
    fixed = dpg["results"][0]["scores"][0]["fixed"]
    assert f"fixed: {100 * fixed['score']:.2f} [{100 * fixed['ci_low']:.2f}, " in page


def test_every_score_of_a_result_is_in_the_report_once() -> None:
    one = {"score": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 4}
    summary = {
        "overall": 0.5, "ci_low": 0.4, "ci_high": 0.6, "images": 4, "text": {"edit_distance": 3.0},
        "scores": {"dpg": one}, "categories": {"entity": one}, "subcategories": {"entity - whole": one},
    }  # fmt: skip
    rows = score_rows("dpg", {"official": {**summary, "overall": None}, "fixed": {**summary, "subcategories": {}}})
    found = {row["name"]: (row["official"], row["fixed"], row["differs"], row["detail"]) for row in rows}
    assert found == {
        "overall": (None, {key: one[key] for key in ("score", "ci_low", "ci_high")}, True, False),
        "categories/entity": (one, one, False, False),
        "subcategories/entity - whole": (one, None, True, True),
    }


def test_the_worst_prompts_are_those_of_lowest_score_that_have_pictures(folders: list[Path]) -> None:
    lines = [
        {"prompt_id": str(place), "score": score, "group": "x", "images": [{"lost": "missing"} if place == 4 else {}]}
        for place, score in enumerate([0.5, 0.0, 1.0, 0.25, 0.0, 0.0])
    ]
    assert sorted(line["prompt_id"] for line in worst("geneval", lines, 2)) == ["1", "5"]
    assert [line["score"] for line in worst("geneval", lines, 9)] == [0, 0, 0.25, 0.5]
    sets = [{**line, "group": "ab"[place % 2]} for place, line in enumerate(lines)]
    assert [line["group"] for line in worst("oneig", sets, 4)] == ["a", "b", "b", "b"]


def test_models_stand_side_by_side_where_they_differ_most(report: Path) -> None:
    for benchmark in json.loads(report.with_suffix(".json").read_text())["benchmarks"]:
        (difference,) = benchmark["differences"]
        apart = [abs(one["models"]["ours"]["score"] - one["models"]["theirs"]["score"]) for one in difference["most"]]
        assert apart == sorted(apart, reverse=True) and apart[-1] > 0
        assert difference["better"] + difference["worse"] + difference["alike"] == difference["prompts"] == 7


def test_a_slice_is_compared_on_the_prompts_that_both_have(folders: list[Path], tmp_path: Path) -> None:
    smaller = change(folders[0], tmp_path / "smaller", model="smaller", slice={"prompts": 3, "of": 553})
    lines = (smaller / "prompts.jsonl").read_text().splitlines()
    (smaller / "prompts.jsonl").write_text("\n".join(lines[:3]) + "\n")
    told = contents(read_results([folders[0], smaller]))["benchmarks"][0]["differences"][0]
    assert told["prompts"] == told["alike"] == 3 and told["difference"] == 0
    assert told["what"] == "Difference of the overall score (mode fixed) on the prompts that both have."
    other = change(folders[0], tmp_path / "other", "prompts.jsonl", prompt="another text")
    (other / "prompts.jsonl").write_text((other / "prompts.jsonl").read_text().split("\n")[0])
    change(other, tmp_path / "named", model="other")
    path = write_report([folders[0], tmp_path / "named"], tmp_path / "report")
    assert "other and ours have no prompt in common." in Page(path).text


def test_prompts_models_and_answers_are_text(folders: list[Path], tmp_path: Path) -> None:
    folder = change(folders[0], tmp_path / "a", "prompts.jsonl", prompt=NASTY, prompt_id=NASTY, group=NASTY, score=-1)
    folder = change(folder, tmp_path / "b", model=NASTY, title=NASTY, comparable={"verdict": False, "reasons": [NASTY]})
    path = write_report([folder, folders[0]], tmp_path / "report")
    page = Page(path)
    assert not page.all("script") and page.text.count(NASTY) > 8
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>" not in path.with_suffix(".md").read_text().replace("\\<", "")


def test_pictures_that_are_gone_leave_an_empty_place(folders: list[Path], tmp_path: Path) -> None:
    path = write_report([change(folders[0], tmp_path / "a", language=None)], tmp_path / "report")
    assert not Page(path).all("img") and "not found" in Page(path).text and "lost" in Page(path).text


def test_the_chart_puts_a_score_where_it_belongs() -> None:
    ours = Series("a & b", {"overall": (0.5, 0.25, 1.2), "other": (0.1, None, None)})
    page = score_chart(["overall", "other"], [ours], [Series("published", {"overall": (0.75, None, None)})], 100)
    middle, quarter, right = (LABELS + WIDTH * share for share in (0.5, 0.25, 1.0))
    assert f"<circle cx='{middle}'" in page and f"<line x1='{quarter}' x2='{right}'" in page
    assert page.count("<circle") == 2 and "a &amp; b: 50</title>" in page and "published: 75</title>" in page


def test_verdicts_are_shown(folders: list[Path], tmp_path: Path) -> None:
    good = change(folders[0], tmp_path / "a", comparable={"verdict": True, "reasons": []}, slice=None)
    page = Page(write_report([good], tmp_path / "report"))
    assert {"class": "yes"} in page.all("span") and {"class": "no"} not in page.all("span")
    assert "Judges, prompts and counting are the benchmark's own." in page.text
    pictures = {"source": "images", "prompt_rewriter": "a rewriter", "sizes": {"64x64": 1, "96x64": 1200}}
    given = Page(write_report([change(good, tmp_path / "b", pictures=pictures)], tmp_path / "r")).text
    assert "The pictures were there already" in given and "Prompts were rewritten by a rewriter." in given
    assert "Pictures have 96x64 (1,200 of them), 64x64 (1 of them) pixels." in given
    assert "Prompts were not rewritten. Pictures have 192x192 pixels." in page.text


def test_a_picture_is_cut_out_of_its_grid(folders: list[Path], tmp_path: Path) -> None:
    grid = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(grid).save(tmp_path / "grid.png")
    result = read_result(folders[0])
    found = result.picture({"file": str(tmp_path / "grid.png"), "cell": [1, 2, 2, 3]})
    assert found is not None and np.array_equal(np.asarray(found), grid[20:, 40:])
    assert result.picture({"file": None, "lost": "missing"}) is None
    (tmp_path / "broken.png").write_bytes((tmp_path / "grid.png").read_bytes()[:400])
    assert result.picture({"file": str(tmp_path / "broken.png")}) is None


@pytest.mark.parametrize(
    ("role", "question", "judgement", "verdict", "told"),
    [
        (
            "detector", {}, {"detections": [{"cls": "dog", "box": [0, 0, 1, 1, 0.9], "color": "red"}] * 2
            + [{"cls": "cat", "box": [0, 0, 1, 1, 0.2], "color": None}]}, {"correct": False, "reason": "a\nb"},
            "a, b; seen: 2 × red dog",
        ),
        ("detector", {}, {"detections": []}, {"correct": True, "reason": ""}, "right; seen: nothing"),
        ("verifier", {}, {"read": "OX", "correct": False}, {"correct": False, "reason": "read OX"}, "read OX"),
        ("ocr", {}, {"lines": [{"text": "NO", "confidence": 1}, {"text": "WAY", "confidence": 1}]},
         {"correct_words": 1, "total_words": 2}, "1 of 2 words right; read: “NO / WAY”"),
        ("ocr", {}, {"lines": []}, {"correct_words": 0, "total_words": 2}, "0 of 2 words right; read: nothing"),
        ("vlm", {"prompt": "Read it."}, {"answer": "x" * 300}, {"match": 1, "gt_count": 2},
         f"1 of 2 words or characters right; read: “{'x' * 240}…”"),
        ("vlm", {"prompt": "Is it red. Please answer 'Yes' or 'No' only."}, {"answer": "Yes."}, {"per_image": [1]},
         "not Yes to 1 of 1 questions: “Is it red” (Yes.)"),
        ("vqa", {"question": "is it red?"}, {"answer": "yes"}, {"per_image": [1]}, "yes to all 1 questions"),
        ("clip", {"text": "a"}, {"similarity": 0.25}, {"per_image": [1]}, "likeness to the text 0.250"),
        ("style", {"style": "clay"}, {"csd": [0.1, 0.3], "se": [0.2, 0.0]}, {"per_image": [1]},
         "likeness to the style 0.30 (CSD), 0.20 (SE)"),
    ],
)  # fmt: skip
def test_what_judges_said_is_told_in_words(
    role: str, question: dict[str, Any], judgement: dict[str, Any], verdict: dict[str, Any], told: str
) -> None:
    said = {"role": role, "pictures": [0], "question": question, "judgement": judgement}
    line = {"images": [{"file": "0.png"}], "verdicts": [verdict], "judgements": [said]}
    assert judges_words(line) == [f"Picture 1: {told}."]


def test_lost_pictures_and_pairs_are_told_too() -> None:
    distances = [{"role": "distance", "pictures": [0, 1], "question": {}, "judgement": {"distance": 0.5}}]
    distances.append({"role": "distance", "pictures": [0, 2], "question": {}, "judgement": None})
    images = [{"file": "0.png"}, {"file": "1.png"}, {"file": "2.png", "lost": "missing"}]
    line = {"images": images, "verdicts": [{"per_image": [0.5]}], "judgements": distances}
    assert judges_words(line) == ["Picture 3: lost: missing.", "Distances between pictures: 0.50."]


def test_folders_without_a_result_are_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/result\.json is missing: name the folder of a finished evaluation"):
        read_result(tmp_path / "nothing")
    with pytest.raises(UserError, match="at least one result folder"):
        read_results([])
    with pytest.raises(UserError, match=r"are both geneval of a model called 'ours'.*another name=…"):
        read_results([folders[0], folders[0]])
    folder = change(folders[0], tmp_path / "a")
    (folder / "prompts.jsonl").write_text('{"prompt_id": "0"}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 1, has no 'prompt'"):
        read_result(folder)
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match=r"prompts\.jsonl cannot be read"):
        read_result(folder)
    (folder / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result\.json has no 'benchmark'"):
        read_result(folder)
