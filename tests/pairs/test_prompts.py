"""What pairs are drawn for."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_modules.preparation import prepare_task
from data_modules.tinyworld.combinations import is_heldout, statements
from zimage_lit.errors import UserError
from zimage_lit.pairs.prompts import Prompt, read_prompts


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_tinyworld_gives_its_training_statements_and_no_held_out_one() -> None:
    prompts, repeated = read_prompts("tinyworld", None, None, seed=0, width=64)
    assert repeated == 0 and not any(is_heldout(prompt.metadata) for prompt in prompts)
    wanted = [*statements("counting", "train"), *statements("word", "train")]
    told = [{key: value for key, value in prompt.metadata.items() if key != "prompt"} for prompt in prompts]
    assert len(told) == len(wanted) and all(statement in told for statement in wanted)
    assert all(prompt.metadata["prompt"] == prompt.text and prompt.kind == "short" for prompt in prompts)
    again, _ = read_prompts("tinyworld", ["word", "counting", "word"], None, seed=1, width=64)
    assert {p.text for p in again} == {p.text for p in prompts} and again != prompts  # another order
    few, _ = read_prompts("tinyworld", None, 5, seed=0, width=64)
    assert few == prompts[:5]
    narrow, _ = read_prompts("tinyworld", ["word"], None, seed=0, width=48)
    assert {len(prompt.metadata["text"]) for prompt in narrow} == {1, 2, 3}


def test_a_few_prompts_hold_all_of_a_small_task() -> None:
    tasks = ["position", "counting", "two_object", "color_attr"]
    numbers = {task: len(list(statements(task, "train"))) for task in tasks}
    assert numbers["counting"] == min(numbers.values())
    found, _ = read_prompts("tinyworld", tasks, 4 * numbers["counting"], seed=0, width=64)
    assert [prompt.metadata["tag"] for prompt in found] == tasks * numbers["counting"]
    everything, _ = read_prompts("tinyworld", tasks, None, seed=0, width=64)
    assert Counter(prompt.metadata["tag"] for prompt in everything) == numbers


def test_a_file_gives_a_prompt_a_line_and_each_text_once(tmp_path: Path) -> None:
    known = {"tag": "x", "pair": {"margin": 0.5}}
    lines = [
        r'{"prompt": " a boat \ud83d\udea4 "}',
        {"prompt": " a boat\u2028 "},
        "",
        {"prompt": "一只船", "metadata": known},
        {"prompt": "a boat"},
    ]
    prompts, repeated = read_prompts(write(tmp_path / "p.jsonl", *lines), None, None, 0, 64)
    assert prompts == [Prompt("a boat 🚤", {}), Prompt("a boat", {}), Prompt("一只船", {"tag": "x"})] and repeated == 1
    assert len({prompt.id for prompt in prompts}) == 3


def test_a_prepared_set_gives_its_captions_and_metadata(tmp_path: Path) -> None:
    rows = [{"id": str(n), "caption": f"prompt {n % 3}", "number": n % 3} for n in range(5)]
    source = write(tmp_path / "source.jsonl", *rows)
    prepare_task({"source": source, "output": str(tmp_path / "set"), "num_workers": 1})
    prompts, repeated = read_prompts(str(tmp_path / "set"), None, None, 0, 64)
    assert [prompt.text for prompt in prompts] == ["prompt 0", "prompt 1", "prompt 2"] and repeated == 2
    assert [prompt.metadata["number"] for prompt in prompts] == [0, 1, 2] and prompts[0].language == "en"


def test_seeds_depend_on_seed_prompt_and_number_alone() -> None:
    one, other = Prompt("a boat", {}), Prompt("a ship", {"x": 1})
    seeds = [prompt.seed(seed, number) for prompt in (one, other) for seed in (0, 1) for number in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**53 for seed in seeds)
    assert one.seed(0, 3) == Prompt("a boat", {"y": 2}, "zh", "long").seed(0, 3) == seeds[3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('["a"]', "line 2 has no prompt"),
        ('{"prompt": " "}', "line 2 has no prompt"),
        ('{"prompt": "a", "metdata": {}}', "line 2 has the unknown key metdata"),
        (r'{"prompt": "a \ud83d"}', "line 2 holds half a character"),
        (r'{"prompt": "a", "metadata": {"b": ["\udc00"]}}', "line 2 holds half a character"),
        (r'{"prompt": "a", "\ud83d": 1}', "line 2 holds half a character"),
        ('{"prompt": "a", "metadata": []}', "line 2 has metadata that are no object"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "fine"}, line), None, None, 0, 64)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl")
    for source, tasks, most, message in (
        ("tinyworld", ["wodr"], None, "tasks: TinyWorld has no task wodr .did you mean 'word'"),
        (empty, ["word"], None, "tasks are those of prompts=tinyworld"),
        (empty, None, None, "holds no prompts"),
        ("tinyworld", None, 0, "num_prompts must be at least 1"),
        (str(tmp_path / "absent.jsonl"), None, None, "absent.jsonl cannot be read"),
        ("tinywrld", None, None, "prompts=tinywrld is neither tinyworld, a .jsonl file nor the folder"),
        (str(tmp_path), None, None, "has no manifest.json"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(source, tasks, most, 0, 64)
