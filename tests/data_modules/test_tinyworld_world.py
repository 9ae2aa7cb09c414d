"""TinyWorld: pictures, captions and ground truth agree, held-out combinations stay out, samples are pure functions."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_modules.tinyworld.captions import KINDS, LANGUAGES, prompt
from data_modules.tinyworld.combinations import (
    CLASSES,
    COLORS,
    GENEVAL_TASKS,
    HELDOUT_COLORS,
    HELDOUT_COUNTS,
    HELDOUT_PAIRS,
    HELDOUT_WORDS,
    TASKS,
    TRAIN_WORDS,
    is_heldout,
    statements,
)
from data_modules.tinyworld.glyphs import GLYPHS
from data_modules.tinyworld.world import (
    BACKGROUND,
    CELL,
    IMAGE_SIZE,
    OBJECT_SIZE,
    TASK_WEIGHTS,
    draw,
    draw_statement,
    heldout_prompts,
    shape_mask,
)
from evaluation.benchmarks import geneval
from evaluation.benchmarks.geneval import relative_position

ROOT = Path(__file__).parents[2]
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "一": 1, "两": 2, "三": 3, "四": 4}
CHINESE_NOUNS = ("圆形", "正方形", "菱形", "十字", "圆环", "月牙", "图形")
CHINESE_CLASSES = dict(zip(CHINESE_NOUNS, (*CLASSES, "shape"), strict=True))
CHINESE_COLORS = dict(zip(("红色", "黄色", "绿色", "蓝色", "紫色", "粉色", "白色"), COLORS, strict=True))
CHINESE_RELATIONS = {"左边": "left of", "右边": "right of", "上面": "above", "下面": "below"}


@pytest.fixture(scope="module")
def train_samples():
    return [draw(index, seed=3) for index in range(3000)]


def english_noun_phrases(text):
    """Every "number colour? class" of a caption, read without the code under test; a bare class counts as one."""
    pattern = rf"(?:\b(a|one|two|three|four) )?(?:({'|'.join(COLORS)}) )?\b({'|'.join(CLASSES)}|shape)(?:s|es)?\b"
    return [(NUMBERS[number or "a"], color or None, name) for number, color, name in re.findall(pattern, text)]


def chinese_noun_phrases(text):
    pattern = rf"(?:([一两三四])个)?({'|'.join(CHINESE_COLORS)})?({'|'.join(CHINESE_CLASSES)})"
    found = re.findall(pattern, text)
    return [(NUMBERS[number or "a"], CHINESE_COLORS.get(color), CHINESE_CLASSES[name]) for number, color, name in found]


def stated_position(language, text):
    """(subject, relation, reference) that a caption states, or None."""
    if language == "en":
        noun = rf"(?:a )?(?:(?:{'|'.join(COLORS)}) )?({'|'.join(CLASSES)})"
        match = re.search(rf"\b{noun} (left of|right of|above|below) {noun}", text)
        return match.groups() if match else None
    noun = rf"(?:一个)?(?:{'|'.join(CHINESE_COLORS)})?({'|'.join(CHINESE_CLASSES)})"
    match = re.search(rf"{noun}在{noun}({'|'.join(CHINESE_RELATIONS)})", text)
    if not match:
        return None
    subject, reference, relation = match.groups()
    return CHINESE_CLASSES[subject], CHINESE_RELATIONS[relation], CHINESE_CLASSES[reference]


def positions_in(sample):
    """Every (subject, relation, reference) that holds between the drawn cells, by GenEval's rule."""
    return {
        (a.name, relation, b.name)
        for a in sample.objects
        for b in sample.objects
        if a is not b
        for relation in relative_position(a.box, b.box)
    }


def digest(samples):
    state = hashlib.sha256()
    for sample in samples:
        state.update(sample.image.tobytes())
        state.update(repr((sample.captions, sample.metadata, sample.objects)).encode())
    return state.hexdigest()


def test_a_sample_depends_on_nothing_but_its_arguments():
    ours = [digest([draw(index, seed=7, split=split)]) for index in range(40) for split in ("train", "heldout")]
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_tinyworld_world import digest, draw\n"
        "for index in reversed(range(40)):\n"
        "    for split in ('heldout', 'train'):\n"
        "        print(digest([draw(index, seed=7, split=split)]))"
    )
    other = subprocess.run(  # another process, another hash seed, another order
        [sys.executable, "-c", script, str(ROOT), str(Path(__file__).parent)],
        env={"PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == ours[::-1]
    assert (
        len({digest([draw(1)]), digest([draw(2)]), digest([draw(2, seed=1)]), digest([draw(2, split="heldout")])}) == 4
    )


def test_metadata_is_true_of_what_was_drawn(train_samples):
    samples = train_samples + [draw(index, split="heldout") for index in range(800)]
    for sample in samples:
        metadata = sample.metadata
        assert metadata["prompt"] == sample.captions["en"]["short"] == prompt(metadata)
        if metadata["tag"] == "word":
            continue
        drawn = Counter(item.name for item in sample.objects)
        assert drawn == {clause["class"]: clause["count"] for clause in metadata["include"]}
        for clause in metadata["include"]:
            colors = {item.color for item in sample.objects if item.name == clause["class"]}
            assert colors == {clause.get("color", *colors)}
        for clause in metadata.get("exclude", []):
            assert drawn[clause["class"]] == clause["count"] - 1
        if metadata["tag"] == "position":
            reference, subject = metadata["include"]
            relation = subject["position"][0]
            found = relative_position(sample.objects[1].box, sample.objects[0].box)
            assert (sample.objects[0].name, sample.objects[1].name) == (reference["class"], subject["class"])
            assert found == [relation], "the relation holds, and no other one does"


def test_captions_say_only_what_the_picture_shows(train_samples):
    for sample in train_samples:
        drawn = Counter((item.color, item.name) for item in sample.objects)
        for language in LANGUAGES:
            for kind in KINDS:
                text = sample.captions[language][kind]
                if sample.metadata["tag"] == "word":
                    assert re.search(rf"[\"“]{sample.metadata['text']}[\"”]", text), text
                    continue
                phrases = (english_noun_phrases if language == "en" else chinese_noun_phrases)(text)
                if sample.metadata["tag"] == "counting" and kind == "tags":  # numbers apart from what is counted
                    assert phrases == [(len(sample.objects), None, "shape")], text
                    continue
                assert phrases and {name for _, _, name in phrases} == {name for _, name in drawn}, text
                for number, color, name in phrases:
                    count = sum(drawn[c, n] for c, n in drawn if n == name and color in (None, c))
                    assert count == number, text
                stated = stated_position(language, text)
                assert (stated is not None) == (sample.metadata["tag"] == "position"), text
                assert stated is None or stated in positions_in(sample), text


@pytest.mark.parametrize(
    ("include", "english", "chinese"),
    [
        ([{"class": "circle", "count": 3}], "a photo of three circles", "一张三个圆形的照片"),
        ([{"class": "cross", "count": 2}], "a photo of two crosses", "一张两个十字的照片"),
        ([{"class": "circle", "count": 1, "color": "red"}], "a photo of a red circle", "一张一个红色圆形的照片"),
        (
            [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
            "a photo of a circle left of a square",
            "一张一个圆形在一个正方形左边的照片",
        ),
        (
            [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
            "a photo of a red circle and a blue square",
            "一张一个红色圆形和一个蓝色正方形的照片",
        ),
    ],
)
def test_prompts_have_the_phrasing_of_geneval(include, english, chinese):
    metadata = {"tag": "counting" if include[0]["count"] > 1 else "position", "include": include}
    assert prompt(metadata) == english
    assert prompt(metadata, "zh") == chinese


def test_train_neither_draws_nor_says_a_held_out_combination(train_samples):
    for sample in train_samples:
        assert not is_heldout(sample.metadata)
        if sample.metadata["tag"] == "word":
            assert sample.metadata["text"] not in HELDOUT_WORDS
            continue
        drawn = Counter((item.name, item.color) for item in sample.objects)
        assert not drawn.keys() & HELDOUT_COLORS
        assert not {(name, count) for (name, _), count in drawn.items()} & HELDOUT_COUNTS
        for a, b in combinations(drawn, 2):
            assert frozenset({a[0], b[0]}) not in HELDOUT_PAIRS
            attribution = [{"class": name, "count": 1, "color": color} for name, color in (a, b)]
            assert not is_heldout({"tag": "color_attr", "include": attribution})
        for language in LANGUAGES:
            for kind in KINDS:
                stated = stated_position(language, sample.captions[language][kind])
                if stated:
                    subject, relation, reference = stated
                    placed = {"class": subject, "count": 1, "position": [relation, 0]}
                    statement = {"tag": "position", "include": [{"class": reference, "count": 1}, placed]}
                    assert not is_heldout(statement)


def test_held_out_combinations_are_what_the_heldout_split_says():
    seen = {task: set() for task in TASKS}
    for task in TASKS:
        for index in range(300):
            metadata = draw(index, split="heldout", task=task).metadata
            assert metadata["tag"] == task
            assert is_heldout(metadata) == (task != "single_object")
            seen[task].add(metadata["prompt"])
    assert [len(seen[task]) for task in TASKS[:5]] == [6, 6, 3, 7, 24]
    assert seen["word"] == {f'a photo of the word "{word}"' for word in HELDOUT_WORDS}


def test_every_part_of_a_held_out_combination_occurs_in_train():
    """Otherwise the held-out score would measure unseen words and not new combinations."""
    parts = {"class": set(), "color": set(), "count": set(), "relation": set(), "letter": set()}
    for task in TASKS:
        for metadata in statements(task, "train"):
            parts["letter"] |= set(metadata.get("text", ""))
            for clause in metadata.get("include", []):
                parts["class"].add((task, clause["class"]))
                parts["color"].add((task, clause.get("color")))
                parts["count"].add(clause["count"])
                if "position" in clause:
                    parts["relation"].add((clause["class"], clause["position"][0]))
    for task in GENEVAL_TASKS:
        assert {(task, name) for name in CLASSES} <= parts["class"]
    for task in ("colors", "color_attr"):
        assert {(task, color) for color in COLORS} <= parts["color"]
    assert parts["count"] == {1, 2, 3, 4}
    assert parts["relation"] == {(n, r) for n in CLASSES for r in ("left of", "right of", "above", "below")}
    assert set("".join(HELDOUT_WORDS)) <= parts["letter"] <= set(GLYPHS)


def test_the_two_splits_share_no_statement():
    for task in TASKS[1:]:
        assert not [metadata for metadata in statements(task, "train") if metadata in statements(task, "heldout")]
    assert not set(TRAIN_WORDS) & set(HELDOUT_WORDS)
    for reference, subject in (("square", "circle"), ("circle", "square")):  # a statement and its mirror image
        relation = "left of" if subject == "circle" else "right of"
        placed = {"class": subject, "count": 1, "position": [relation, 0]}
        assert is_heldout({"tag": "position", "include": [{"class": reference, "count": 1}, placed]})


def test_every_object_stands_in_the_middle_of_a_cell_in_a_quarter_of_its_own_apart_from_others(train_samples):
    for sample in train_samples:
        cells = [(x1 // CELL, y1 // CELL) for x1, y1, _, _ in (item.box for item in sample.objects)]
        assert len({(2 * CELL * x // IMAGE_SIZE, 2 * CELL * y // IMAGE_SIZE) for x, y in cells}) == len(cells)
        assert all(0 <= place < IMAGE_SIZE // CELL for cell in cells for place in cell)
        assert all(max(abs(a - c), abs(b - d)) > 1 for (a, b), (c, d) in combinations(cells, 2))
        for item, cell in zip(sample.objects, cells, strict=True):
            assert [item.box[axis] + item.box[axis + 2] for axis in (0, 1)] == [2 * CELL * c + CELL for c in cell]
            assert item.box[2] - item.box[0] == item.box[3] - item.box[1] == OBJECT_SIZE


def test_pixels_outside_the_cells_are_background_and_shapes_fill_their_cells(train_samples):
    for sample in train_samples[:300]:
        if sample.metadata["tag"] == "word":
            continue
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for x1, y1, x2, y2 in (item.box for item in sample.objects):
            outside[y1:y2, x1:x2] = False
        background = np.unique(sample.image[outside], axis=0)
        assert len(background) == 1 and abs(background.astype(int) - BACKGROUND).max() <= 8
        for x1, y1, x2, y2 in (item.box for item in sample.objects):
            assert (sample.image[y1:y2, x1:x2] != background[0]).any(axis=-1).mean() > 0.3
    for name in CLASSES:
        mask = shape_mask(name, OBJECT_SIZE)
        assert mask.shape == (OBJECT_SIZE, OBJECT_SIZE) and 0 <= mask.min() <= 0.25 and mask.max() == 1


def test_tasks_come_in_the_stated_shares(train_samples):
    assert sum(TASK_WEIGHTS.values()) == pytest.approx(1) and set(TASK_WEIGHTS) == set(TASKS)
    counts = Counter(sample.metadata["tag"] for sample in train_samples)
    for task, weight in TASK_WEIGHTS.items():
        expected = weight * len(train_samples)
        assert abs(counts[task] - expected) < 5 * expected**0.5


@pytest.mark.parametrize("language", LANGUAGES)
def test_heldout_prompts_cover_every_task_with_held_out_combinations(language):
    prompts = heldout_prompts(10, seed=1, language=language)
    assert Counter(metadata["tag"] for metadata in prompts) == dict.fromkeys(TASKS, 10)
    for metadata in prompts:
        assert is_heldout(metadata) == (metadata["tag"] != "single_object")
        assert metadata["prompt"] == prompt(metadata, language)
        assert bool(re.search("[一-鿿]", metadata["prompt"])) == (language == "zh")
    counting = [metadata["prompt"] for metadata in prompts if metadata["tag"] == "counting"]
    assert len(set(counting)) == 3, "there are three, and each comes before any comes again"
    assert prompts == heldout_prompts(10, seed=1, language=language) != heldout_prompts(10, seed=2, language=language)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "no sample -1"),
        ({"index": 0, "split": "test"}, "choose train or heldout"),
        ({"index": 0, "task": "colour"}, "choose one of single_object"),
    ],
)
def test_what_does_not_exist_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
    with pytest.raises(ValueError, match="speaks en and zh"):
        heldout_prompts(1, language="fr")


def test_the_package_imports_without_torch():
    script = (
        "import data_modules, data_modules.tinyworld.world, sys; assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)


SIZES = [(48, 48), (96, 64), (64, 96), (96, 96), (80, 48), (256, 48)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_any_size_follow_the_same_rules(size):
    """Four objects have their places, relations hold and no others do, words fit, nothing held out is drawn."""
    width, height = size
    counts, relations, lengths = set(), set(), set()
    for task in TASKS:
        for index in range(120):
            sample = draw(index, 3, "train", task, size)
            assert sample.image.shape == (height, width, 3) and not is_heldout(sample.metadata)
            cells = [(x1 // CELL, y1 // CELL) for x1, y1, _, _ in (item.box for item in sample.objects)]
            assert all(0 <= x < width // CELL and 0 <= y < height // CELL for x, y in cells)
            assert len({(2 * CELL * x // width, 2 * CELL * y // height) for x, y in cells}) == len(cells)
            assert all(max(abs(a - c), abs(b - d)) > 1 for (a, b), (c, d) in combinations(cells, 2))
            if task == "position":
                relation = sample.metadata["include"][1]["position"][0]
                assert relative_position(sample.objects[1].box, sample.objects[0].box) == [relation]
                relations.add(relation)
            elif task == "counting":
                counts.add(len(cells))
            elif task == "word":
                text = sample.metadata["text"]
                lengths.add(len(text))
                columns = np.flatnonzero((sample.image.max(axis=2) > 120).any(axis=0))
                assert columns[-1] + 1 - columns[0] == 16 * len(text) - 4  # none of it is cut off
    assert counts == {1, 2, 3, 4} and len(relations) == 4
    assert lengths == {1, 2, 3, 4} if width >= 60 else {1, 2, 3}


def test_the_same_picture_is_drawn_where_nothing_is_said_and_where_the_default_is():
    for index in range(20):
        same = draw(index, size=(IMAGE_SIZE, IMAGE_SIZE), task_weights=dict(TASK_WEIGHTS))
        assert digest([draw(index)]) == digest([same])


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("task", TASKS)
def test_a_statement_is_drawn_again_and_again_and_never_the_same(task, split):
    """Every picture shows the statement, and what it leaves open differs as in the stream of samples."""
    metadata = draw(5, split=split, task=task).metadata
    pictures = [draw_statement(metadata, index, seed=2) for index in range(24)]
    assert all(picture.metadata == metadata for picture in pictures)
    assert len({picture.image.tobytes() for picture in pictures}) == 24
    if task == "word":
        assert len({int(np.argmax(picture.image.max(axis=(1, 2)) > 120)) for picture in pictures}) == 3  # heights
        return
    for picture in pictures:
        records = [{"metadata": metadata, "detections": detections_of(picture)}]
        assert geneval.score(records)["overall"] == 1
    assert len({picture.objects[0].box for picture in pictures}) > 3
    stated = {clause.get("color") for clause in metadata["include"]}
    colors = {picture.objects[0].color for picture in pictures}
    assert colors <= stated if None not in stated else len(colors) > 2


def detections_of(sample):
    return [{"cls": item.name, "box": [*item.box, 1.0], "color": item.color} for item in sample.objects]


def test_a_picture_of_a_statement_depends_on_nothing_but_its_arguments():
    metadata = draw(0, task="counting").metadata
    bare = {key: value for key, value in metadata.items() if key != "prompt"}
    drawn = draw_statement(metadata, 3, seed=1, size=(96, 64))
    assert drawn.image.shape == (64, 96, 3)
    assert digest([drawn]) == digest([draw_statement(bare, 3, seed=1, size=(96, 64))])
    assert digest([drawn]) != digest([draw_statement(metadata, 3, seed=2, size=(96, 64))])


def test_a_picture_of_a_statement_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="no picture -1"):
        draw_statement({"tag": "word", "text": "A"}, -1)
    with pytest.raises(ValueError, match="BIRD is wider than a picture of 48 pixels"):
        draw_statement({"tag": "word", "text": "BIRD"}, 0, size=(48, 48))
    with pytest.raises(ValueError, match="draws no picture of 40x40"):
        draw_statement({"tag": "word", "text": "A"}, 0, size=(40, 40))


def test_narrow_prompts_ask_for_words_that_fit():
    words = {width: [m["text"] for m in heldout_prompts(14, width=width) if m["tag"] == "word"] for width in (48, 64)}
    assert max(map(len, words[48])) == 3 and max(map(len, words[64])) == 4
    others = [[m for m in heldout_prompts(5, width=width) if m["tag"] != "word"] for width in (48, 64)]
    assert others[0] == others[1]


def test_tasks_come_in_other_shares_where_asked():
    tasks = Counter(draw(i, task_weights={"word": 6.0, "colors": 2.0}).metadata["tag"] for i in range(800))
    assert set(tasks) == {"word", "colors"} and abs(tasks["word"] - 600) < 5 * 600**0.5


@pytest.mark.parametrize("size", [(64, 40), (32, 64), (64, 1040)])
def test_sizes_that_cannot_be_drawn_are_refused_in_a_sentence(size):
    with pytest.raises(ValueError, match=f"draws no picture of {size[0]}x{size[1]}: its sides are multiples of 16"):
        draw(0, size=size)
