"""What each benchmark asks its judges, to the letter, and how their answers come back to its scoring."""

import copy

import pytest
from benchmark_files import official

from evaluation.benchmarks import cvtg2k, dpg, geneval, longtext, oneig, tinyworld
from evaluation.benchmarks.metric import BenchmarkMetric
from evaluation.benchmarks.protocol import Judged, Question
from evaluation.judges.contract import ROLES

MODULES = (geneval, cvtg2k, longtext, oneig, dpg, tinyworld)
READING = (
    "Recognize the text in the image, only reply with the text content, but avoid repeating previously mentioned "
    "content. If no text is recognized, please reply with 'No text recognized'."
)
DPG_PROMPT = {
    "item_id": "partiprompts97",
    "prompt": "a cat on a mat",
    "questions": {"1": "Is there a cat?", "2": "Is there a mat?", "3": "Is there a cat?"},
    "dependency": {"1": [0], "2": [0], "3": [1, 2]},
    "tuples": {"1": "entity - whole (cat)", "2": "entity - whole (mat)", "3": "relation - spatial (cat, on, mat)"},
}
ANSWERS = {
    "detector": {"detections": [{"cls": "bench", "box": [0, 0, 9, 9, 0.95], "color": None}]},
    "ocr": {"lines": [{"text": "Read THIS", "confidence": 0.9}, {"text": "morning", "confidence": 0.2}]},
    "vlm": {"answer": "Yes"},
    "clip": {"similarity": 0.3},
    "vqa": {"answer": "yes"},
    "llm2clip": {"similarity": 0.2},
    "style": {"csd": [0.1, 0.5, -0.2], "se": [0.3, 0.2, 0.1]},
    "distance": {"distance": 0.25},
    "verifier": {"detections": []},
}


def judged(module, prompt, number, lost=(), without=()):
    return [
        Judged(question, None if set(question.pictures) & set(lost) else copy.deepcopy(ANSWERS[question.role]))
        for question in module.questions(prompt, number)
        if question.role not in without
    ]


@pytest.mark.parametrize("module", MODULES)
def test_roles_are_known_and_what_can_be_done_without_comes_last(module):
    assert set(module.ROLES_USED) <= ROLES.keys()
    optional = module.OPTIONAL_ROLES
    assert tuple(module.ROLES_USED[len(module.ROLES_USED) - len(optional) :]) == tuple(optional)
    assert len(optional) < len(module.ROLES_USED)


def test_geneval_asks_for_all_classes_and_for_colours_where_they_are_wanted():
    found = {prompt["prompt"]: prompt for prompt in geneval.prompts(official("geneval"))}
    asked = {
        "a photo of a bench": {"classes": ["bench"], "colors": []},
        "a photo of four handbags": {"classes": ["handbag"], "colors": []},
        "a photo of a blue fire hydrant": {"classes": ["fire hydrant"], "colors": ["fire hydrant"]},
        "a photo of a yellow parking meter and a pink refrigerator": {
            "classes": ["parking meter", "refrigerator"],
            "colors": ["parking meter", "refrigerator"],
        },
    }
    for text, question in asked.items():
        assert geneval.questions(found[text], 4) == [Question("detector", (i,), question) for i in range(4)]


def test_cvtg2k_asks_for_the_lines_and_for_the_likeness_to_the_prompt():
    prompt = cvtg2k.prompts(official("cvtg2k"))[0]
    text = {"text": "A photo depicts " + prompt["prompt"]}
    assert cvtg2k.questions(prompt, 1) == [Question("ocr", (0,), {}), Question("clip", (0,), text)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_longtext_asks_for_the_text_in_the_published_words(language):
    for prompt in longtext.prompts(official("longtext"), language)[:3]:
        question = {"prompt": READING, "max_new_tokens": 1024}
        assert longtext.questions(prompt, 4) == [Question("vlm", (i,), question) for i in range(4)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_oneig_asks_each_set_what_its_dimensions_need(language):
    found = oneig.prompts(official("oneig"), language)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    numbers = {"alignment": 0, "text": 0}
    for prompt in found:
        asked = oneig.questions(prompt, 4)
        by_role = {role: [one for one in asked if one.role == role] for role in oneig.ROLES_USED}
        assert sum(map(len, by_role.values())) == len(asked)
        assert by_role["distance"] == [Question("distance", pair, {}) for pair in pairs]
        if prompt["set"] == "text":
            tokens = 256 if len(prompt["gt_raw"].split(" ")) > 60 else 128
            reading = {"prompt": READING, "max_new_tokens": tokens}
            assert by_role["vlm"] == [Question("vlm", (i,), reading) for i in range(4)]
            numbers["text"] += 1
        elif prompt["set"] == "reasoning":
            answer = {"text": prompt["gt_answer"]}
            assert by_role["llm2clip"] == [Question("llm2clip", (i,), answer) for i in range(4)]
        else:
            texts = [f"{text}. Please answer 'Yes' or 'No' only." for text in prompt["questions"].values()]
            expected = [(i, {"prompt": text, "max_new_tokens": 128}) for i in range(4) for text in texts]
            assert by_role["vlm"] == [Question("vlm", (i,), question) for i, question in expected]
            numbers["alignment"] += len(expected)
        assert (prompt["set"] == "reasoning") == bool(by_role["llm2clip"])
        assert by_role["style"] == [
            Question("style", (i,), {"style": prompt["style"]}) for i in range(4) if "style" in prompt
        ]
    assert numbers["alignment"] == {"en": 44_924, "zh": 55_288}[language]
    assert numbers["text"] == 200
    assert sum("style" in prompt for prompt in found) == 114


def test_dpg_asks_every_question_about_every_picture_even_one_that_is_there_twice():
    texts = [question.question for question in dpg.questions(DPG_PROMPT, 2)]
    assert texts == [{"question": text} for text in DPG_PROMPT["questions"].values()] * 2
    assert [question.pictures for question in dpg.questions(DPG_PROMPT, 2)] == [(0,)] * 3 + [(1,)] * 3


def test_records_are_what_the_scoring_takes():
    bench = geneval.prompts(official("geneval"))[0]
    assert geneval.records(bench, judged(geneval, bench, 2, lost=[1]), {1: "missing"}) == [
        {"index": 0, "metadata": bench["metadata"], "detections": ANSWERS["detector"]["detections"]},
        {"index": 0, "metadata": bench["metadata"], "lost": "missing"},
    ]
    sign = cvtg2k.prompts(official("cvtg2k"))[0]
    (read,) = cvtg2k.records(sign, judged(cvtg2k, sign, 1), {})
    assert read["ocr_lines"] == ["Read THIS", "morning"] and read["clip_score"] == pytest.approx(0.75)
    assert "clip_score" not in cvtg2k.records(sign, judged(cvtg2k, sign, 1, without=["clip"]), {})[0]
    (dense,) = dpg.records(DPG_PROMPT, judged(dpg, DPG_PROMPT, 3, lost=[1]), {1: "broken"})
    assert dense["answers"] == [dict.fromkeys("123", "yes"), None, dict.fromkeys("123", "yes")]
    page = longtext.prompts(official("longtext"))[0]
    lines = longtext.records(page, judged(longtext, page, 2, lost=[0]), {0: "missing"})
    assert [{"lost", "answer"} & line.keys() for line in lines] == [{"lost"}, {"answer"}]


def test_oneigs_records_have_a_dimension_for_every_judge_and_none_for_the_others():
    found = oneig.prompts(official("oneig"))
    styled = next(prompt for prompt in found if "style" in prompt)
    alignment, style, diversity = oneig.records(styled, judged(oneig, styled, 3, lost=[2]), {2: "missing"})
    assert [answers and set(answers.values()) for answers in alignment["answers"]] == [{"Yes"}, {"Yes"}, None]
    assert style["csd"] == [[0.1, 0.5, -0.2]] * 2 + [None] and style["se"] == [[0.3, 0.2, 0.1]] * 2 + [None]
    assert diversity["distances"] == [0.25, None, None]
    lost = {0: "missing", 1: "missing"}
    some = judged(oneig, styled, 2, lost=lost, without=["style", "distance"])
    (only,) = oneig.records(styled, some, lost)  # of a prompt that is lost as a whole, too
    assert only["answers"] == [None, None]
    written = next(prompt for prompt in found if prompt["set"] == "text")
    *texts, _ = oneig.records(written, judged(oneig, written, 2, lost=[1]), {1: "broken"})
    assert [{"lost", "answer"} & text.keys() for text in texts] == [{"answer"}, {"lost"}]
    puzzle = next(prompt for prompt in found if prompt["set"] == "reasoning")
    assert oneig.records(puzzle, judged(oneig, puzzle, 2), {})[0]["similarities"] == [0.2, 0.2]


@pytest.mark.parametrize("module", MODULES)
def test_the_metric_takes_all_records_of_all_prompts(module):
    """With pictures lost, too: every row that records add to is one that the prompts have."""
    arguments = {geneval: ["geneval"], cvtg2k: ["cvtg2k"], longtext: ["longtext", "zh"], oneig: ["oneig", "zh"]}
    if module is tinyworld:
        prompts = tinyworld.prompts(per_task=2)
        prompts = [prompt for prompt in prompts if prompt["metadata"]["tag"] != "word"]
    elif module is dpg:
        prompts = [DPG_PROMPT]
    else:
        name, *language = arguments[module]
        prompts = module.prompts(official(name), *language)[::7]
    metric = BenchmarkMetric(module, prompts, "fixed")  # official leaves out the one of DPG
    for place, prompt in enumerate(prompts):
        number = module.IMAGES_PER_PROMPT
        lost = {0: "missing"} if place % 5 == 0 else {}
        records = module.records(prompt, judged(module, prompt, number, lost), lost)
        metric.update(records)
        verdicts = [module.count(record, "fixed").verdict for record in records]
        assert 0 <= module.prompt_score(verdicts) <= 1
    result = metric.compute()
    assert result["prompts"] == len({module.rows(prompt)[0] for prompt in prompts})
    assert result["lost"]["images"] == len(prompts[::5])


@pytest.mark.parametrize("module", MODULES)
def test_groups_are_few_and_of_the_protocol(module):
    expected = {
        geneval: set(geneval.TASKS),
        cvtg2k: {f"{name}/{area}" for name in cvtg2k.SETS for area in cvtg2k.AREAS},
        longtext: {"sign", "label", "print", "webpage", "slide", "poster", "caption", "dialogue"},
        oneig: {"anime", "human", "object", "text", "reasoning"},
        dpg: {"partiprompts", ""},
        tinyworld: set(tinyworld.TASKS),
    }
    if module is tinyworld:
        prompts = tinyworld.prompts(per_task=1)
    elif module is dpg:
        prompts = [DPG_PROMPT, {**DPG_PROMPT, "item_id": "12"}]
    else:
        prompts = module.prompts(official(module.__name__.rpartition(".")[2]))
    assert {module.group(prompt) for prompt in prompts} == expected[module]


def test_tinyworlds_words_are_scored_apart():
    seen = [{"cls": "circle", "box": [0, 0, 9, 9, 0.95], "color": "red"}]
    right = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}
    wrong = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "blue"}], "prompt": "a blue circle"}
    word = {"tag": "word", "text": "DOG", "prompt": "the word DOG"}
    records = [
        {"metadata": right, "detections": seen},
        {"metadata": wrong, "detections": seen},
        {"metadata": word, "read": "DOG", "correct": True},
        {"metadata": word, "read": "DO", "correct": False},
        {"metadata": word, "lost": "missing"},
    ]
    result = tinyworld.score(records)
    assert result["overall"] == 0.5
    assert {task: score["score"] for task, score in result["scores"].items()} == {
        "single_object": 1,
        "colors": 0,
        "word": pytest.approx(1 / 3),
    }
    assert [verdict["correct"] for verdict in result["records"]] == [True, False, True, False, False]
    assert [verdict["reason"] for verdict in result["records"]][3:] == ["read DO", "lost: missing"]
    assert result["lost"]["prompts"] == {"the word DOG": 1}
    assert tinyworld.score(records[2:])["overall"] is None
