"""DPG-Bench against its golden vectors, its official files as far as they are there, and sums by hand."""

import csv
import random
import shutil

import pytest
from benchmark_files import golden, official

from evaluation.benchmarks import dpg
from evaluation.benchmarks.dpg import category_of, holding, plan, prompts, score
from zimage_lit.errors import UserError

COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)


def record(*answers, item="whoops0", dependency=None, tuples=None):
    dependency = dependency or {"1": [0], "2": [1]}
    tuples = tuples or dict.fromkeys(dependency, "entity - whole (chair)")
    given = [None if answer is None else dict(zip(dependency, answer, strict=True)) for answer in answers]
    return {"item_id": item, "tuples": tuples, "dependency": dependency, "answers": given}


def test_scores_equal_the_published_ones_and_so_do_those_of_categories():
    cases = golden("dpg/dependency_vectors.json")["cases"]
    result = score(cases, "official")
    assert len(cases) >= 30
    for case, verdict in zip(cases, result["records"], strict=True):
        for field in ("per_image", "score", "category_scores_used"):
            assert verdict[field] == case[field], case
    assert result["overall"] == pytest.approx(sum(case["score"] for case in cases) / len(cases), abs=1e-14)
    pooled = [
        (category_of(case["tuples"][question]), value)
        for case in cases
        for question, value in case["category_scores_used"].items()
    ]
    for name, part in result["subcategories"].items():
        values = [value for category, value in pooled if category == name]
        assert part["score"] == sum(values) / len(values) and part["n"] == len(values)
    for name, part in result["categories"].items():
        values = [value for category, value in pooled if category.split("-")[0].strip() == name]
        assert part["score"] == sum(values) / len(values)


def test_modes_give_the_same_scores_of_pictures_and_prompts():
    cases = golden("dpg/dependency_vectors.json")["cases"]
    published, fixed = (score(cases, mode) for mode in ("official", "fixed"))
    assert [v["per_image"] for v in fixed["records"]] == [v["per_image"] for v in published["records"]]
    assert fixed["overall"] == published["overall"]


def test_official_leaves_out_the_first_row_of_the_table_and_fixed_keeps_it():
    first = record(["no", "yes"], item="partiprompts97", dependency={"1": [0], "2": [0]})
    assert score([first], "official")["records"][0]["score"] == 1.0
    assert score([first], "fixed")["records"][0]["score"] == 0.5
    other = record(["no", "yes"], item="partiprompts301", dependency={"1": [0], "2": [0]})
    assert score([other], "official")["records"][0]["score"] == 0.5


def test_official_drops_the_first_prompt_where_a_question_depends_on_the_lost_row():
    records = [record(["yes", "yes"], item="partiprompts97"), record(["yes", "no"])]
    published, fixed = (score(records, mode) for mode in ("official", "fixed"))
    assert published["dropped"] == ["partiprompts97"] and published["records"][0]["score"] is None
    assert published["prompts"] == 1 and published["overall"] == 0.5
    assert fixed["dropped"] == [] and fixed["prompts"] == 2 and fixed["overall"] == 0.75


def test_the_lost_row_is_only_missed_where_no_earlier_parent_has_failed():
    """As the original looks parents up one after the other, and stops at the first that fails."""
    dependency = {"1": [0], "2": [0], "3": [2, 1]}
    failing = record(["yes", "no", "yes"], item="partiprompts97", dependency=dependency)
    asking = record(["yes", "yes", "yes"], item="partiprompts97", dependency=dependency)
    assert score([failing], "official")["records"][0]["score"] == 0.0
    result = score([asking], "official")
    assert result["overall"] is None and result["dropped"] == ["partiprompts97"]


def test_what_would_be_scored_without_the_lost_pictures_may_be_nothing_but_a_dropped_prompt():
    result = score([record(["yes", "yes"], item="partiprompts97"), record(None, None)], "official")
    assert result["overall"] == 0 and result["lost"]["scores_if_skipped"] == {}


def test_official_categories_are_of_the_last_picture_and_unfiltered_and_fixed_of_all_and_filtered():
    pictures = record(["no", "yes"], ["yes", "yes"], ["yes", "no"], ["no", "yes"])
    published, fixed = (score([pictures], mode) for mode in ("official", "fixed"))
    assert published["categories"]["entity"]["score"] == 0.5  # no, yes
    assert fixed["categories"]["entity"]["score"] == 3 / 8  # (0, 0), (1, 1), (1, 0), (0, 0)
    assert published["overall"] == fixed["overall"] == 3 / 8


def test_what_fails_makes_what_depends_on_it_fail_along_the_order_of_the_table():
    """A twin that goes over the questions as the table has them, each time with all that has fallen by then."""
    generator = random.Random(0)
    for _ in range(300):
        number = generator.randint(1, 9)
        names = [str(i) for i in generator.sample(range(1, number + 1), number)]
        parents = {name: generator.sample(range(number + 1), generator.randint(1, 2)) for name in names}
        scores = {name: float(generator.random() < 0.7) for name in names}
        fallen = {int(name) for name in names if scores[name] == 0}
        for name in names:
            if fallen & (set(parents[name]) - {0}):
                fallen.add(int(name))
        assert holding(parents, scores) == {name: float(int(name) not in fallen) for name in names}
    chain = {"1": [0], "2": [1], "3": [2]}
    assert holding(chain, {"1": 0.0, "2": 1.0, "3": 1.0})["3"] == 0
    assert holding(dict(reversed(chain.items())), {"1": 0.0, "2": 1.0, "3": 1.0})["3"] == 1


def test_only_yes_to_the_letter_counts():
    answers = [["yes"], ["Yes"], ["yes."], ["1"]]
    assert score([record(*answers, dependency={"1": [0]})])["overall"] == 0.25


def test_a_lost_picture_answers_nothing_and_is_counted_and_named():
    result = score([record(["yes", "yes"], None, ["yes", "yes"], None), record(["yes", "yes"], item="whoops1")])
    assert result["overall"] == 0.75
    assert result["records"][0]["per_image"] == [1.0, 0.0, 1.0, 0.0]
    assert result["lost"]["images"] == 2 and result["lost"]["prompts"] == {"whoops0": 2}
    assert result["lost"]["scores_if_skipped"]["dpg"] == 1.0 and result["images"] == 5


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The official texts with a table of our own, whose checksum stands for the official one's."""
    shutil.copytree(official("dpg") / "prompts", tmp_path / "prompts")
    names = sorted(path.stem for path in (tmp_path / "prompts").iterdir())
    with (tmp_path / "dpg_bench.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name in reversed(names):
            table.writerow([name, "", "", 1, "0", "entity", "whole", "entity - whole (chair)", "Is there a chair?"])
            table.writerow([name, "", "", 2, "0,1", "attribute", "", 'other - text (chair, "a, b")', "A chair?\nRed?"])
    data = (tmp_path / "dpg_bench.csv").read_bytes()
    monkeypatch.setattr(dpg, "TABLE_BLOB", dpg.blob_id(data))
    return tmp_path


def test_prompts_come_with_their_questions_in_the_tables_order(folder):
    found = prompts(folder)
    assert len(found) == 1065 and found[0]["item_id"] == "whoops9"
    assert found[0]["dependency"] == {"1": [0], "2": [0, 1]} and found[0]["questions"]["2"] == "A chair?\nRed?"
    assert category_of(found[0]["tuples"]["2"]) == "other - text"
    assert found[0]["prompt"] == (folder / "prompts" / "whoops9.txt").read_text(encoding="utf-8")


def test_the_official_texts_are_known_and_the_table_is_asked_for(tmp_path):
    """The texts pass, so that it is the table that is missed."""
    shutil.copytree(official("dpg") / "prompts", tmp_path / "prompts")
    with pytest.raises(UserError, match=r"dpg_bench\.csv.*cannot be read.*TencentQQGYLab/ELLA"):
        prompts(tmp_path)


def test_an_altered_table_text_and_folder_are_named(folder):
    table = (folder / "dpg_bench.csv").read_bytes()
    (folder / "dpg_bench.csv").write_bytes(table.replace(b"chair?", b"table?", 1))
    with pytest.raises(UserError, match=r"dpg_bench\.csv is not the official file.*git blob id"):
        prompts(folder)
    text = folder / "prompts" / "whoops0.txt"
    text.chmod(0o600)
    text.write_text("a chair")
    with pytest.raises(UserError, match=r"prompts is not the official.*SHA-256 of all texts"):
        prompts(folder)
    text.unlink()
    with pytest.raises(UserError, match="holds 1064 prompts of DPG-Bench, which has 1065"):
        prompts(folder)


def test_the_blob_id_is_what_git_calls_the_file():
    """`git hash-object` of a file with the line "hello"; the published table's is the one in the module."""
    assert dpg.blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert dpg.TABLE_BLOB == "98457fc9901943f51ff9a30367250fc292533bed"


def test_four_pictures_a_prompt_in_a_grid_of_two_rows_of_two():
    planned = plan([{"item_id": "whoops0", "prompt": "a chair"}], size=512)
    assert {(picture.official_file, picture.width) for picture in planned} == {("whoops0.png", 512)}
    assert [picture.cell for picture in planned] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({picture.seed for picture in planned}) == 4


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "nothing to score"),
        ([{"tuples": {}, "dependency": {}}], "record 0 has no 'answers'"),
        ([record()], "no pictures"),
        ([record(["yes", "yes"]) | {"answers": [{"1": "yes"}]}], "answers to other questions"),
        ([record(["yes", "yes"], tuples={"1": "global - (photo)"})], "tuples for other questions"),
    ],
)
def test_records_that_cannot_be_scored_are_named(records, message):
    with pytest.raises(ValueError, match=message):
        score(records)


def test_a_question_that_depends_on_one_that_is_not_there_is_refused_where_nothing_official_explains_it():
    with pytest.raises(ValueError, match="depends on question '7'"):
        score([record(["yes", "yes"], dependency={"1": [0], "2": [7]})], "fixed")
