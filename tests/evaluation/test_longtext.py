"""LongText-Bench against its golden vectors, its official files, and sums by hand."""

import pytest
from benchmark_files import agrees, golden, official

from evaluation.benchmarks.longtext import clean, normalize, plan, prompts, score
from zimage_lit.errors import UserError


def record(read="fresh brews", texts=("Fresh Brews,", "every day"), number=0, language="en", **more):
    given = {"mode": language, "prompt_id": number, "ocr_gt": list(texts)}
    return {**given, **({"ocr_results": read} if not {"answer", "lost"} & more.keys() else {}), **more}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_normal_forms_and_matches_equal_the_published_ones(language, mode):
    cases = golden("longtext/scoring_vectors.json")[language]
    result = score(cases, mode)
    assert len(cases) > 20
    for case, verdict in zip(cases, result["records"], strict=True):
        assert agrees(verdict, case) and verdict.keys() <= case.keys(), case
    matched, units = (sum(case[field] for case in cases) for field in ("match", "gt_count"))
    assert result["overall"] == matched / units and result["language"] == language


def test_official_cleaning_equals_the_published_one():
    for answer, cleaned in golden("longtext/scoring_vectors.json")["clean"]:
        assert clean(answer, "official") == cleaned


def test_fixed_takes_out_the_phrases_that_official_leaves():
    """The published list's other phrase, and the reply that the judge is told to give, which has no full stop."""
    for answer in ("No text recognized", "addCriterion", "addCriterion\nNo text recognized."):
        assert clean(answer, "fixed").strip() == "" != clean(answer, "official").strip()
    records = [record(answer="No text recognized", texts=["No text here"])]
    assert score(records, "official")["overall"] == 2 / 3
    assert score(records, "fixed")["overall"] == 0
    assert score([record("No text recognized", ["No text here"])], "fixed")["overall"] == 0


def test_modes_agree_where_the_judge_read_something():
    records = [record("FRESH brews, every dai", number=i) for i in range(3)]
    results = [score(records, mode) for mode in ("official", "fixed")]
    assert results[0]["overall"] == results[1]["overall"] == 3 / 4


@pytest.mark.parametrize(("language", "texts"), [("en", 740), ("zh", 732)])
def test_the_official_files_hold_160_prompts(language, texts):
    found = prompts(official("longtext"), language.upper())
    assert len(found) == 160 == len({prompt["prompt_id"] for prompt in found})
    assert sum(len(prompt["ocr_gt"]) for prompt in found) == texts
    assert sum(prompt["length"] == "long" for prompt in found) == 80
    perfect = score([{**prompt, "ocr_results": " ".join(reversed(prompt["ocr_gt"]))} for prompt in found])
    assert (
        perfect["overall"] == 1.0 and len(perfect["categories"]) == 8 and set(perfect["lengths"]) == {"short", "long"}
    )


def test_an_absent_file_and_an_unknown_language_are_named(tmp_path):
    with pytest.raises(UserError, match=r"text_prompts_zh\.jsonl.*cannot be read.*X-Omni"):
        prompts(tmp_path, "zh")
    (tmp_path / "text_prompts.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"text_prompts\.jsonl is not the official file"):
        prompts(tmp_path)
    with pytest.raises(UserError, match="en and zh, not 'fr'"):
        prompts(tmp_path, "fr")


def test_four_pictures_a_prompt_named_by_the_prompts_own_number():
    planned = plan([{"mode": "zh", "prompt_id": 192, "prompt": "海报"}], size=1152)
    assert [picture.official_file for picture in planned] == [f"0192_{i}.png" for i in (1, 2, 3, 4)]
    assert [picture.file for picture in planned] == [f"0192/{i}.png" for i in range(4)]
    assert len({picture.seed for picture in planned}) == 4 and {picture.width for picture in planned} == {1152}


def test_long_texts_weigh_more_and_order_and_other_text_are_free():
    records = [record("day every brews fresh and more"), record("", ["one"] * 12, number=1)]
    assert score(records)["overall"] == 4 / 16


def test_english_is_compared_by_words_in_small_letters_chinese_by_characters_as_they_are():
    assert normalize("Don't  STOP: Café", "en") == "dont stop café"
    assert normalize("雪 落·ABC 〇２", "zh") == "雪落ABC"
    assert score([record("a雪落 b", ["雪 A落"], language="zh")])["overall"] == 2 / 3


def test_a_lost_picture_has_none_of_its_text_and_is_counted_and_named():
    result = score([record("fresh brews every day"), record(lost="truncated"), record("every", number=3)])
    assert result["overall"] == 5 / 12
    assert result["lost"]["images"] == 1 and result["lost"]["prompts"] == {"0000": 1}
    assert result["lost"]["scores_if_skipped"]["text_score"] == 5 / 8
    assert result["images"] == 3 and result["prompts"] == 2


def test_a_blank_page_scores_nothing():
    assert score([record("")])["overall"] == 0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "nothing to score"),
        ([{"mode": "en", "ocr_gt": ["a"]}], "record 0 has no 'ocr_results'"),
        ([record(), record("", ["．"], number=1)], "record 1 asks for no text"),
        ([record(), record(language="zh")], "one language at a time"),
    ],
)
def test_records_that_cannot_be_scored_are_named(records, message):
    with pytest.raises(ValueError, match=message):
        score(records)
