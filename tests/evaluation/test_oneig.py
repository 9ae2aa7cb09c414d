"""OneIG-Bench against its golden vectors, its official files, and sums by hand."""

import random
from itertools import combinations

import pytest
from benchmark_files import agrees, golden, official

from evaluation.benchmarks.oneig import aligned, clean, max_new_tokens, normalize, plan, prompts, rows, score
from zimage_lit.errors import UserError


def alignment(*answers, name="anime", number="000", dependency=None):
    dependency = dependency or {"1": [0], "2": [1]}
    given = [None if answer is None else dict(zip(dependency, answer, strict=True)) for answer in answers]
    return {"set": name, "id": number, "dependency": dependency, "answers": given}


def text(read="Hello", wanted="['Hello World']", number="000", **more):
    return {"id": number, "gt_raw": wanted, **({} if {"lost", "answer"} & more.keys() else {"ocr": read}), **more}


def of_all_dimensions():
    return [
        alignment(["Yes", "Yes"], ["Yes", "no"]),
        text(),
        {"id": "004", "similarities": [0.2, 0.3, 0.3, 0.2]},
        {"id": "005", "style": "clay", "csd": [[0.5, 0.1, -0.2]] * 2, "se": [[0.3, 0.2, 0.1]] * 2},
        {"set": "anime", "id": "000", "distances": [0.1, 0.2, 0.3, 0.1, 0.2, 0.3]},
    ]


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_alignment_equals_the_published_one(mode):
    cases = golden("oneig/alignment_vectors.json")["cases"]
    result = score(cases, mode)
    assert len(cases) > 20
    for case, verdict in zip(cases, result["records"], strict=True):
        assert verdict["score"] == case["score"], case
    mean = sum(case["score"] for case in cases) / len(cases)
    assert result["scores"]["alignment"]["score"] == pytest.approx(mean, abs=1e-14)


@pytest.mark.parametrize("language", ["EN", "ZH"])
@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_texts_equal_the_published_ones(language, mode):
    cases = golden("oneig/text_vectors.json")[language]["cases"]
    result = score(cases, mode)
    assert len(cases) >= 20
    for case, verdict in zip(cases, result["records"], strict=True):
        assert agrees(verdict, case) and verdict.keys() <= case.keys(), case
    edits = sum(case["ED"] for case in cases) / len(cases)
    complete = sum(case["CR"] for case in cases) / len(cases)
    right = sum(case["match"] for case in cases) / sum(case["gt_count"] for case in cases)
    limit = {"EN": 100, "ZH": 50}[language]
    expected = 1 - min(limit, edits) * (1 - complete) * (1 - right) / limit
    assert result["scores"]["text"]["score"] == pytest.approx(expected, abs=1e-14)
    assert result["text"] == pytest.approx(
        {"edit_distance": edits, "completion_rate": complete, "word_accuracy": right}, abs=1e-14
    )


@pytest.mark.parametrize(("language", "number", "questions"), [("en", 1120, 11231), ("zh", 1320, 13822)])
def test_the_official_files_hold_what_the_judges_need(language, number, questions):
    found = prompts(official("oneig"), language)
    assert len(found) == number == len({(prompt["set"], prompt["id"]) for prompt in found})
    assert sum(len(prompt.get("questions", ())) for prompt in found) == questions
    assert [sum(field in prompt for prompt in found) for field in ("gt_raw", "gt_answer", "style")] == [200, 225, 114]
    assert len({prompt["style"] for prompt in found if "style" in prompt}) == 29
    assert all(prompt["questions"].keys() == prompt["dependency"].keys() for prompt in found if "questions" in prompt)
    first = next(prompt for prompt in found if prompt["set"] == "text")
    assert rows(first) == [("diversity", "text", "000", "text"), ("text", "text", "000", language)]


def test_an_absent_or_altered_file_and_an_unknown_language_are_named(tmp_path):
    with pytest.raises(UserError, match=r"anime_zh\.json.*cannot be read.*OneIG-Benchmark"):
        prompts(tmp_path, "zh")
    folder = tmp_path / "scripts" / "alignment" / "Q_D"
    folder.mkdir(parents=True)
    (folder / "anime.json").write_text("{}")
    with pytest.raises(UserError, match=r"anime\.json is not the official file"):
        prompts(tmp_path)
    with pytest.raises(UserError, match="en and zh"):
        prompts(tmp_path, "de")


def test_four_pictures_a_prompt_in_a_grid_of_two_rows_of_two():
    prompt = {"language": "en", "set": "human", "id": "012", "prompt": "a portrait"}
    planned = plan([prompt], model="mine")
    assert {picture.official_file for picture in planned} == {"images/human/mine/012.webp"}
    assert [picture.cell for picture in planned] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [picture.file for picture in planned] == [f"human/012/{i}.png" for i in range(4)]
    assert len({picture.seed for picture in planned}) == 4


def test_only_yes_to_the_letter_counts():
    record = alignment(["Yes"], ["yes"], ["Yes."], ["No"], dependency={"1": [0]})
    assert score([record])["records"][0] == {"score": 0.25, "per_image": [1.0, 0.0, 0.0, 0.0]}


def test_a_question_falls_with_what_it_depends_on_directly_but_not_with_what_that_depends_on():
    chain = {"1": [0], "2": [1], "3": [2]}
    assert aligned(chain, {"1": "no", "2": "Yes", "3": "Yes"}) == 1


def test_dependencies_do_not_depend_on_the_order_of_the_questions():
    generator = random.Random(0)
    for _ in range(200):
        number = generator.randint(1, 8)
        names = [str(i + 1) for i in range(number)]
        dependency = {name: generator.sample(range(number + 1), generator.randint(1, 2)) for name in names}
        answers = {name: generator.choice(["Yes", "Yes", "no"]) for name in names}
        held = 0
        for name in names:
            falls = [parent for parent in dependency[name] if parent and answers[str(parent)] != "Yes"]
            held += answers[name] == "Yes" and not falls
        assert aligned(dependency, answers) == held
        shuffled = dict(generator.sample(list(dependency.items()), number))
        assert aligned(shuffled, answers) == held


def test_texts_are_compared_with_their_case_and_by_characters_if_one_is_chinese():
    assert normalize("['It\\'s 5G, Now']") == "Its 5G Now"
    assert normalize("5G 技术 Now!") == "5G技术Now"
    verdict = score([text("hello world")])["records"][0]
    assert (verdict["match"], verdict["ED"], verdict["CR"]) == (0, 2, 0)


def test_fixed_takes_out_the_reply_for_no_text_that_official_takes_for_text():
    assert clean("addCriterion No text recognized.", "official").strip() == ""
    assert clean("No text recognized", "official") != "" == clean("No text recognized", "fixed")
    record = text(wanted="['No text']", answer="No text recognized")
    assert [score([record], mode)["records"][0]["match"] for mode in ("official", "fixed")] == [2, 0]


def test_the_text_score_is_bounded_by_the_edit_distance_of_its_language():
    long = "['" + "word " * 60 + "']"
    assert score([text("", long)])["scores"]["text"]["score"] == 0
    assert score([text("", "['" + "字" * 25 + "']")])["scores"]["text"]["score"] == 0.5
    assert score([text("", "['abcde']", language="zh")])["scores"]["text"]["score"] == 1 - 5 / 50
    assert (max_new_tokens(long), max_new_tokens("word " * 60)) == (256, 128)


def test_style_is_the_mean_of_both_encoders_best_cosines_not_below_nothing():
    record = {"id": "1", "style": "clay", "csd": [[0.4, 0.6], [-0.2, -0.1]], "se": [[0.2, 0.1], [0.3, 0.5]]}
    result = score([record])
    assert result["records"][0]["per_image"] == pytest.approx([0.4, 0.25])
    assert result["sets"]["style/clay"]["score"] == pytest.approx(0.325)


def test_reasoning_and_diversity_are_means_over_prompts_not_over_pictures():
    records = [{"id": "1", "similarities": [0.4, 0.2, 0.2, 0.4]}, {"id": "2", "similarities": [0.1]}]
    assert score(records)["scores"]["reasoning"]["score"] == pytest.approx(0.2)
    records = [{"set": "text", "id": "1", "distances": [0.3, 0.1, 0.2]}, {"set": "text", "id": "2", "distances": [0.6]}]
    assert score(records)["scores"]["diversity"]["score"] == pytest.approx(0.4)


def test_overall_is_the_mean_of_the_five_and_none_without_one_of_them():
    result = score(of_all_dimensions())
    parts = {"alignment": 0.75, "text": 1 - 6 * 0.5 / 100, "reasoning": 0.25, "style": 0.4, "diversity": 0.2}
    assert {name: part["score"] for name, part in result["scores"].items()} == pytest.approx(parts)
    assert result["overall"] == pytest.approx(sum(parts.values()) / 5)
    assert result["ci_low"] < result["overall"] < result["ci_high"]
    assert score(of_all_dimensions()[:4])["overall"] is None


def test_a_lost_picture_scores_nothing_in_any_dimension_and_is_counted_once():
    records = of_all_dimensions()
    records[0]["answers"][1] = None
    records[1] = text(lost="missing")
    records[2]["similarities"][0] = None
    records[3]["csd"][0] = records[3]["se"][0] = None
    records[4]["distances"] = [
        None if 3 in pair else value
        for pair, value in zip(combinations(range(4), 2), records[4]["distances"], strict=True)
    ]
    result = score(records)
    expected = {"alignment": 0.5, "text": 0.0, "reasoning": 0.2, "style": 0.2, "diversity": 0.4 / 6}
    assert {name: part["score"] for name, part in result["scores"].items()} == pytest.approx(expected)
    assert result["lost"]["prompts"] == {"anime/000": 1, "anime/005": 1, "reasoning/004": 1, "text/000": 1}
    assert result["lost"]["images"] == 4
    skipped = result["lost"]["scores_if_skipped"]
    assert skipped == pytest.approx({"alignment": 1.0, "reasoning": 0.8 / 3, "style": 0.4, "diversity": 0.4 / 3})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "nothing to score"),
        ([{"set": "anime", "id": "000"}], "record 0 has nothing judged"),
        ([alignment(["Yes", "Yes"]) | {"answers": [{"1": "Yes"}]}], "other questions"),
        ([{"id": "1", "similarities": []}], "no pictures"),
        ([{"set": "anime", "id": "0", "dependency": {1: [0]}, "answers": [{1: "Yes"}]}], "question 1 .*string"),
        ([{"set": "text", "id": "1", "distances": [0.1, 0.2]}], "2 distances"),
        ([{"id": "1", "similarities": [float("nan")]}], "record 0 .*nan is no score"),
    ],
)
def test_records_that_cannot_be_scored_are_named(records, message):
    with pytest.raises(ValueError, match=message):
        score(records)
