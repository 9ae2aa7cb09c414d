"""CVTG-2K against its golden vectors, its official files, and sums by hand."""

import difflib
import shutil

import pytest
from benchmark_files import agrees, golden, official

from evaluation.benchmarks.cvtg2k import likeness, plan, prompts, read_words, score, wanted_words
from zimage_lit.errors import UserError

CLEAN = [1.0, 1.0]


def record(lines=("Open", "Now"), words=("open", "now"), index=0, area=2, subset="CVTG", **more):
    place = {"set": subset, "area": area, "index": index, "gt_words": list(words)}
    return {**place, **({"ocr_lines": list(lines)} if "lost" not in more else {}), **more}


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_words_and_ned_equal_the_published_ones(mode):
    cases = golden("cvtg2k/ocr_vectors.json")["cases"]
    result = score(cases, mode)
    assert len(cases) > 40
    for case, verdict in zip(cases, result["records"], strict=True):
        assert agrees(verdict, case) and verdict.keys() <= case.keys(), case
        assert wanted_words(case["prompt"]) == case["gt_words"]
    words = sum(case["total_words"] for case in cases)
    assert result["overall"] == sum(case["correct_words"] for case in cases) / words
    assert result["scores"]["ned"]["score"] == pytest.approx(sum(sum(case["ned"]) for case in cases) / words, abs=1e-14)
    for area in (2, 3, 4, 5):
        pooled = [case for case in cases if case["area"] == area]
        expected = sum(case["correct_words"] for case in pooled) / sum(case["total_words"] for case in pooled)
        assert result["areas"][str(area)]["score"] == expected


def test_golden_records_score_without_their_words_and_without_their_place():
    cases = golden("cvtg2k/ocr_vectors.json")["cases"]
    bare = [{"prompt": case["prompt"], "ocr_lines": case["ocr_lines"]} for case in cases]
    assert score(bare)["overall"] == score(cases)["overall"]


def test_the_official_files_hold_2000_prompts_with_16206_words():
    found = prompts(official("cvtg2k"))
    assert len(found) == 2000 and sum(len(prompt["gt_words"]) for prompt in found) == 16206
    by_area = {area: sum(len(p["gt_words"]) for p in found if p["area"] == area) for area in (2, 3, 4, 5)}
    assert by_area == {2: 1969, 3: 4249, 4: 5417, 5: 4571}
    perfect = [{**prompt, "ocr_lines": [" ".join(prompt["gt_words"]).upper()]} for prompt in found[::20]]
    result = score(perfect)
    assert result["overall"] == result["scores"]["ned"]["score"] == 1.0 and result["ci_high"] == 1.0


def test_the_published_averages_are_the_word_weighted_ones_of_the_columns():
    """FLUX.1-dev's row of the paper: .6089, .5531, .4661, .4316 make .4965 over these numbers of words."""
    columns, words = (0.6089, 0.5531, 0.4661, 0.4316), (1969, 4249, 5417, 4571)
    records = []
    for area, share, number in zip((2, 3, 4, 5), columns, words, strict=True):
        right = round(share * number)
        records.append(record(["yes"], ["yes"] * right + ["no"] * (number - right), area=area))
    result = score(records)
    assert result["overall"] == pytest.approx(0.4965, abs=1e-4)
    assert result["areas"]["3"]["score"] == pytest.approx(0.5531, abs=1e-3)


def test_one_picture_a_prompt_from_seed_0_at_1024_pixels():
    planned = plan([record(index=7, area=3, subset="CVTG-Style", prompt="a sign")])
    assert len(planned) == 1
    (picture,) = planned
    assert (picture.official_file, picture.file) == ("CVTG-Style/3/7.png", "CVTG-Style/3/7/0.png")
    assert (picture.seed, picture.draw, picture.width, picture.height) == (0, 0, 1024, 1024)
    assert picture.prompt == "a sign" and picture.cell is None


def test_an_altered_prompt_and_an_absent_file_are_named(tmp_path):
    shutil.copytree(official("cvtg2k"), tmp_path / "data")
    path = tmp_path / "data" / "CVTG" / "4.json"
    path.chmod(0o600)
    path.write_text(path.read_text(encoding="utf-8").replace("Sale", "Salt", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"CVTG/4\.json is not the official file of CVTG-2K.*huggingface"):
        prompts(tmp_path / "data")
    with pytest.raises(UserError, match=r"CVTG/2\.json.*cannot be read.*huggingface"):
        prompts(tmp_path)


def test_a_word_read_once_answers_all_its_occurrences_and_other_text_costs_nothing():
    verdict = score([record(["the sale, and more"], ["the", "the", "sale"])])["records"][0]
    assert (verdict["correct_words"], verdict["total_words"]) == (2, 3)
    assert verdict["ned"][:2] == CLEAN and verdict["ned"][2] == 1 - 1 / (5 + 1e-5)


def test_lines_are_split_at_white_space_in_small_letters_and_none_is_one_empty_word():
    assert read_words(["Grand OPENING!", "now"]) == ["grand", "opening!", "now"]
    assert read_words([]) == read_words(["  "]) == [""]


def test_ned_compares_with_the_word_that_difflib_ranks_first_not_the_nearest():
    """difflib sees "abcd" as more alike to "bcda" (three in a row) than "axyd" is; ties go to the later word."""
    read = ["bcda", "axcd"]
    ratios = {word: difflib.SequenceMatcher(None, word, "abcd").ratio() for word in read}
    best = max(read, key=lambda word: (ratios[word], word))
    assert best == "bcda" and ratios["bcda"] == ratios["axcd"]
    assert likeness("abcd", read) == 1 - 2 / (4 + 1e-5)  # one edit would make "axcd"


def test_a_lost_picture_gets_no_word_right_and_is_counted_and_named():
    read = [record(index=i, clip_score=0.8) for i in range(3)]
    result = score([*read, record(words=["far", "away"], index=3, lost="no such file")])
    assert result["overall"] == 6 / 8
    assert result["scores"]["ned"]["score"] == 0.75 and result["scores"]["clip_score"]["score"] == pytest.approx(0.6)
    assert result["lost"]["images"] == 1 and result["lost"]["prompts"] == {"CVTG/2/3": 1}
    assert result["lost"]["scores_if_skipped"]["word_accuracy"] == 1.0
    assert result["images"] == result["prompts"] == 4


def test_clip_scores_are_averaged_over_pictures_and_come_for_all_or_none():
    result = score([record(index=0, clip_score=0.5), record(index=1, clip_score=1.0)])
    assert result["scores"]["clip_score"]["score"] == pytest.approx(0.75)
    assert "clip_score" not in score([record()])["scores"]
    with pytest.raises(ValueError, match="1 of 2"):
        score([record(index=0, clip_score=0.5), record(index=1)])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "nothing to score"),
        ([{"prompt": "'a'"}], "record 0 has no 'ocr_lines'"),
        ([{"ocr_lines": []}], "'prompt'"),
        ([record(), {"prompt": "a", "ocr_lines": []}], "record 1 asks for no words"),
    ],
)
def test_records_that_cannot_be_scored_are_named(records, message):
    with pytest.raises(ValueError, match=message):
        score(records)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="official or fixed"):
        score([record()], "strict")
