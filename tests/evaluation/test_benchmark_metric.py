"""The metric gives what `score` gives, to the last digit, in whatever parts, order and on however many ranks."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from benchmark_files import ROOT

from evaluation.benchmarks import cvtg2k, dpg, geneval, longtext, oneig
from evaluation.benchmarks.metric import BenchmarkMetric

MODULES = {"geneval": geneval, "cvtg2k": cvtg2k, "longtext": longtext, "oneig": oneig, "dpg": dpg}
WORDS = ("the", "sale", "open", "now", "café", "today")


def geneval_records(generator):
    for i in range(120):
        prompt = i % 30
        metadata = {"tag": geneval.TASKS[prompt % 6], "include": [{"class": "dog", "count": 1}], "prompt": str(prompt)}
        found = [{"cls": "dog", "box": [0, 0, 5, 5, 0.95], "color": None}] * generator.randint(0, 1)
        judged = {"lost": "missing"} if generator.random() < 0.1 else {"detections": found}
        yield {"index": prompt, "metadata": metadata, **judged}


def cvtg2k_records(generator):
    for i in range(60):
        words = generator.choices(WORDS, k=generator.randint(1, 5))
        place = {"set": cvtg2k.SETS[i % 2], "area": 2 + i % 4, "index": i, "gt_words": words}
        read = {"ocr_lines": generator.choices(WORDS, k=4), "clip_score": generator.random()}
        yield {**place, **({"lost": "broken"} if generator.random() < 0.1 else read)}


def longtext_records(generator):
    for i in range(80):
        prompt = {
            "mode": "en",
            "prompt_id": i // 4,
            "category": f"c{i // 40}",
            "ocr_gt": [" ".join(WORDS) * (i // 4 + 1)],
        }
        read = {"answer": " ".join(generator.choices(WORDS, k=9))}
        yield {**prompt, **({"lost": "broken"} if generator.random() < 0.1 else read)}


def oneig_records(generator):
    def some(value):
        return None if generator.random() < 0.1 else value

    for i in range(20):
        number = f"{i:03d}"
        answers = [some({"1": generator.choice(["Yes", "no"]), "2": "Yes"}) for _ in range(4)]
        yield {"set": "anime", "id": number, "dependency": {"1": [0], "2": [1]}, "answers": answers}
        yield {"set": "anime", "id": number, "distances": [some(generator.random()) for _ in range(6)]}
        yield {"id": number, "similarities": [some(generator.uniform(-1, 1)) for _ in range(4)]}
        cosines = [[[generator.uniform(-1, 1) for _ in range(3)] for _ in range(4)] for _ in range(2)]
        yield {"id": number, "style": f"s{i % 3}", "csd": cosines[0], "se": cosines[1]}
        for _ in range(4):
            read = some(" ".join(generator.choices(WORDS, k=3)))
            text = {"id": number, "gt_raw": str([" ".join(WORDS[: 1 + i % 5])]), "language": "zh"}
            yield {**text, **({"lost": "missing"} if read is None else {"ocr": read})}


def dpg_records(generator):
    for i in range(40):
        names = [str(j + 1) for j in range(generator.randint(1, 6))]
        answers = [{name: generator.choice(["yes", "yes", "no"]) for name in names} for _ in range(4)]
        yield {
            "item_id": "partiprompts97" if i == 0 else f"vrd{i}",
            "tuples": {name: generator.choice(["entity - whole (a)", "other - count (a, ==2)"]) for name in names},
            "dependency": {name: [int(name) - 1] for name in names},
            "answers": [None if generator.random() < 0.1 else given for given in answers],
        }


MAKERS = {
    "geneval": geneval_records,
    "cvtg2k": cvtg2k_records,
    "longtext": longtext_records,
    "oneig": oneig_records,
    "dpg": dpg_records,
}


def records_of(name):
    return list(MAKERS[name](random.Random(0)))


def prompts_of(name, records):
    """As `prompts` gives them: what the records have, whatever it is that is judged."""
    if name != "oneig":
        return records
    merged: dict[tuple[str, str], dict] = {}
    for record in records:
        dimension_set = "text" if "gt_raw" in record else "reasoning" if "similarities" in record else "anime"
        prompt = merged.setdefault((dimension_set, record["id"]), {"set": dimension_set, "id": record["id"]})
        prompt |= {field: record[field] for field in ("dependency", "gt_raw", "style", "language") if field in record}
        if "similarities" in record:
            prompt["gt_answer"] = "an answer"
    return list(merged.values())


def without_records(result):
    return {key: value for key, value in result.items() if key != "records"}


@pytest.mark.parametrize("mode", ["official", "fixed"])
@pytest.mark.parametrize("name", MODULES)
def test_parts_and_their_order_do_not_change_a_digit(name, mode):
    records = records_of(name)
    expected = without_records(MODULES[name].score(records, mode))
    assert expected["lost"]["images"] > 0
    for seed in range(3):
        generator = random.Random(seed)
        shuffled = generator.sample(records, len(records))
        parts = [BenchmarkMetric(MODULES[name], prompts_of(name, records), mode) for _ in range(1 + 2 * seed)]
        for record in shuffled:
            generator.choice(parts).update([record])
        generator.shuffle(parts)
        for other in parts[1:]:
            parts[0].merge_state(other)
        assert parts[0].compute() == expected
        assert without_records(MODULES[name].score(shuffled, mode)) == expected


def result_on_a_rank(name):
    rank = int(os.environ["LOCAL_RANK"])
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    records = records_of(name)
    third = len(records) // 3
    metric = BenchmarkMetric(MODULES[name], prompts_of(name, records))
    metric.update(records[:third] if rank == 0 else records[third:])
    return metric.compute()


def test_ranks_do_not_change_a_digit(pair):
    for name, module in MODULES.items():
        expected = without_records(module.score(records_of(name)))
        assert pair(result_on_a_rank, name) == [expected, expected], name


def test_the_state_is_whole_numbers_and_does_not_grow_with_the_pictures():
    records = records_of("geneval")
    metric = BenchmarkMetric(geneval, records)
    for _ in range(3):
        metric.update(records)
        assert metric.judged.shape == metric.lost.shape == (30, 2) and metric.judged.dtype == torch.int64


def test_prompts_that_the_metric_does_not_have_and_unknown_modes_are_refused():
    records = records_of("cvtg2k")
    with pytest.raises(ValueError, match="has no prompt"):
        BenchmarkMetric(cvtg2k, records[1:]).update(records[:1])
    with pytest.raises(ValueError, match="official or fixed"):
        BenchmarkMetric(cvtg2k, records, "strict")


def test_a_pass_of_2212_pictures_scores_in_seconds():
    metadata = {"tag": "position", "prompt": "a photo of a dog right of a cat"}
    metadata["include"] = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    found = [{"cls": name, "box": [i, 0, i + 9, 9, 0.9], "color": None} for name in ("cat", "dog") for i in range(50)]
    records = [{"index": i // 4, "metadata": metadata, "detections": found} for i in range(2212)]
    start = time.process_time()
    assert geneval.score(records)["images"] == 2212
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", MODULES)
def test_scoring_needs_no_model_and_nothing_else_of_the_package(name):
    script = (
        f"import evaluation.benchmarks.{name}, sys; loaded = set(sys.modules); "
        "assert not {'torch', 'numpy', 'data_modules'} & loaded; "
        "assert {n for n in loaded if n.startswith('zimage_lit.')} <= {'zimage_lit.errors'}"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)
