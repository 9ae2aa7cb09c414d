"""Result folders as `lightning run evaluate` leaves them, of models that are made up: the benchmarks' own questions,
records and scores, answered by dice.

`skill` in [0, 1] is how often a made-up model draws what it is asked for. The same model, benchmark and number of
prompts always give the same files.
"""

import json
import random
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from evaluation.benchmarks import cvtg2k, dpg, geneval, longtext, oneig, tinyworld
from evaluation.benchmarks.protocol import Judged, Question
from evaluation.judges.contract import JudgeRecord

CLASSES = ("dog", "bicycle", "pizza", "bench", "vase", "clock", "kite", "umbrella")
TEXTS = ("OPEN DAILY", "Fresh Bread", "NO PARKING", "Platform Nine", "Sale ends today", "Mind the gap", "Café Nord")
OBJECTS = ("woman", "red scarf", "wooden boat", "mountain", "two lanterns", "cat")
SIZE = 192  # pixels of a picture, each side
MODULES: Mapping[str, ModuleType] = {
    "geneval": geneval,
    "cvtg2k": cvtg2k,
    "longtext-en": longtext,
    "longtext-zh": longtext,
    "oneig-en": oneig,
    "oneig-zh": oneig,
    "dpg": dpg,
    "tinyworld-en": tinyworld,
}
TITLES = {
    "geneval": "GenEval",
    "cvtg2k": "CVTG-2K",
    "longtext": "LongText-Bench",
    "oneig": "OneIG-Bench",
    "dpg": "DPG-Bench",
    "tinyworld": "TinyWorld",
}
WHOLE = {"geneval": 553, "cvtg2k": 2000, "longtext": 160, "oneig": 1120, "dpg": 1065, "tinyworld": 350}  # prompts


def result_folder(
    root: Path,
    key: str,
    model: str = "ours",
    skill: float = 0.7,
    number: int = 12,
    lost: Sequence[int] = (),
    draw: bool = True,
    **more: Any,
) -> Path:
    """A folder `root`/`key` of `number` prompts; `lost`: those (by place) of which the last picture is missing.

    draw: whether there are files of the pictures; without them it is quicker. `more` goes into result.json.
    """
    benchmark, _, language = key.partition("-")
    module = MODULES[key]
    folder = root / key
    lines: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for place, prompt in enumerate(PROMPTS[benchmark](number, language)):
        line, own = judged_prompt(module, prompt, model, skill, place in lost)
        lines.append(line)
        records += own
        for image in line["images"] if draw else ():
            if "lost" not in image:
                draw_picture(folder / image["file"], f"{model} {image['file']}")
    result = {
        "benchmark": benchmark,
        "language": language or None,
        "title": TITLES[benchmark] + (f" ({language.upper()})" if language else ""),
        "model": model,
        "pictures": {
            "source": "model",
            "model": f"outputs/{model}",
            "width": SIZE,
            "height": SIZE,
            "sizes": {f"{SIZE}x{SIZE}": sum("lost" not in image for line in lines for image in line["images"])},
            "num_inference_steps": 28,
            "guidance_scale": 4.0,
            "prompt_rewriter": None,
        },
        "slice": {"prompts": number, "of": WHOLE[benchmark]},
        "scores": {mode: without_records(module.score(records, mode)) for mode in ("official", "fixed")},
        "judges": {role: judge_record(role) for role in module.ROLES_USED},
        "comparable": {
            "verdict": False,
            "reasons": [f"{number} of {WHOLE[benchmark]} prompts were evaluated."],
        },
        "versions": {"zimage-lit": "0.1", "torch": "2.11"},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return folder


def judged_prompt(
    module: ModuleType, prompt: Mapping[str, Any], model: str, skill: float, lose: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the prompt's line in prompts.jsonl, its records)."""
    plan = module.plan([prompt])
    lost = {len(plan) - 1: "missing"} if lose else {}
    judgements: list[Judged] = []
    for question in module.questions(prompt, len(plan)):
        dice = random.Random(f"{model} {plan[0].prompt_id} {question.role} {question.pictures} {question.question}")
        said = None if lost.keys() & {*question.pictures} else answer(question, prompt, dice, skill)
        judgements.append(Judged(question, said))
    records = module.records(prompt, judgements, lost)
    verdicts = module.score(records, "fixed")["records"]
    images = []
    for planned in plan:
        sha256_hex = sha256(f"{model} {planned.file}".encode()).hexdigest()
        found = {"file": f"images/{planned.file}", "sha256": sha256_hex}
        gone = {"file": None, "sha256": None, "lost": lost.get(planned.image)}
        images.append(gone if planned.image in lost else found)
    line = {
        "prompt_id": plan[0].prompt_id,
        "prompt": prompt["prompt"],
        "group": module.group(prompt),
        "score": module.prompt_score(verdicts),
        "images": images,
        "verdicts": verdicts,
        "judgements": [
            {"role": q.role, "pictures": list(q.pictures), "question": q.question, "judgement": judgement}
            for q, judgement in judgements
        ],
    }
    return line, records


def draw_picture(path: Path, label: str) -> None:
    """A picture of colours of its own, with the label on it."""
    dice = random.Random(label)
    picture = Image.new("RGB", (SIZE, SIZE), tuple(dice.randrange(90, 256) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, r = dice.randrange(SIZE), dice.randrange(SIZE), dice.randrange(12, 50)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(dice.randrange(256) for _ in range(3)))
    draw.text((6, SIZE - 22), label[-24:], "black", font=ImageFont.load_default(14))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def answer(question: Question, prompt: Mapping[str, Any], dice: random.Random, skill: float) -> dict[str, Any]:
    """What a judge says of a picture that is right with the chance `skill`."""
    if question.role == "detector":
        return {"detections": detections(prompt["metadata"], dice, skill)}
    if question.role == "verifier" and prompt["metadata"]["tag"] == "word":
        correct = dice.random() < skill
        return {"read": prompt["metadata"]["text"] if correct else "OX", "correct": correct}
    if question.role == "verifier":
        return {"detections": detections(prompt["metadata"], dice, skill)}
    if question.role == "ocr":
        words = [word for word in prompt["gt_words"] if dice.random() < skill]
        return {"lines": [{"text": word.upper(), "confidence": 0.9} for word in words]}
    if question.role in ("clip", "llm2clip"):
        return {"similarity": dice.uniform(0.2, 0.25) + 0.1 * skill}
    if question.role == "vqa":
        return {"answer": "yes" if dice.random() < skill else "no"}
    if question.role == "style":
        return {encoder: [dice.uniform(0, skill) for _ in range(3)] for encoder in ("csd", "se")}
    if question.role == "distance":
        return {"distance": dice.uniform(0.1, 0.4)}
    assert question.role == "vlm"
    if question.question["prompt"].endswith(oneig.QUESTION_ENDING):
        return {"answer": "Yes" if dice.random() < skill else "No"}
    text = prompt["ocr_gt"] if "ocr_gt" in prompt else [prompt["gt_raw"]]
    words = [word for part in text for word in part.split() if dice.random() < skill]
    return {"answer": " ".join(words) or "No text recognized"}


def detections(metadata: Mapping[str, Any], dice: random.Random, skill: float) -> list[dict[str, Any]]:
    """Objects from left to right as they are asked for; something is missing or wrong where the dice say so."""
    found: list[dict[str, Any]] = []
    for clause in metadata["include"]:
        number = clause["count"] if dice.random() < skill else clause["count"] - 1
        for _ in range(number):
            left = 40 * len(found)
            color = clause["color"] if "color" in clause and dice.random() < skill else "pink"
            found.append(
                {
                    "cls": clause["class"],
                    "box": [left, 50, left + 30, 90, 0.95],
                    "color": color if "color" in clause else None,
                }
            )
    return found


def geneval_prompts(number: int, language: str) -> list[dict[str, Any]]:
    found = []
    for index in range(number):
        tag, (a, b) = geneval.TASKS[index % 6], (CLASSES[index % 8], CLASSES[(index + 3) % 8])
        one, other = {"class": a, "count": 1}, {"class": b, "count": 1}
        include, text = {
            "single_object": ([one], f"a photo of a {a}"),
            "two_object": ([one, other], f"a photo of a {a} and a {b}"),
            "counting": ([{**one, "count": 3}], f"a photo of three {a}s"),
            "colors": ([{**one, "color": "green"}], f"a photo of a green {a}"),
            "position": ([one, {**other, "position": ["right of", 0]}], f"a photo of a {b} right of a {a}"),
            "color_attr": (
                [{**one, "color": "red"}, {**other, "color": "blue"}],
                f"a photo of a red {a} and a blue {b}",
            ),
        }[tag]
        metadata = {"tag": tag, "include": include, "prompt": text}
        if tag == "counting":
            metadata["exclude"] = [{"class": a, "count": 4}]
        found.append({"index": index, "prompt": text, "metadata": metadata})
    return found


def cvtg2k_prompts(number: int, language: str) -> list[dict[str, Any]]:
    found = []
    for index in range(number):
        area = 2 + index % 4
        texts = [TEXTS[(index + place) % len(TEXTS)] for place in range(area)]
        prompt = "A street with " + ", ".join(f"a sign that reads '{text}'" for text in texts)
        place = {"set": cvtg2k.SETS[index // 4 % 2], "area": area, "index": index}
        found.append({**place, "prompt": prompt, "gt_words": cvtg2k.wanted_words(prompt)})
    return found


def longtext_prompts(number: int, language: str) -> list[dict[str, Any]]:
    found = []
    for index in range(number):
        texts = [TEXTS[(index + place) % len(TEXTS)] for place in range(3)]
        if language == "zh":
            texts = ["今日 营业", "新鲜 面包", f"第{'一二三四五六七八九'[index % 9]} 站台"]
        found.append(
            {
                "mode": language,
                "prompt_id": 3 * index,
                "category": ("sign", "poster", "slide")[index % 3],
                "length": ("short", "long")[index % 2],
                "prompt": f"A poster with the lines {'; '.join(texts)}",
                "ocr_gt": texts,
            }
        )
    return found


def oneig_prompts(number: int, language: str) -> list[dict[str, Any]]:
    found = []
    for index in range(number):
        name = ("anime", "human", "object", "text", "reasoning")[index % 5]
        prompt: dict[str, Any] = {"language": language, "set": name, "id": f"{index:03d}", "class": ""}
        thing = OBJECTS[index % len(OBJECTS)]
        prompt["prompt"] = f"A {thing} by the sea, number {index}"
        if name in oneig.ALIGNED_SETS:
            asked = [f"Is there a {thing}", "Is the sea visible", "Is it evening"]
            prompt |= {"questions": dict(zip("123", asked, strict=True)), "dependency": {"1": [0], "2": [0], "3": [2]}}
        if name == "anime":
            prompt |= {"class": "Clay", "style": "clay"}
        if name == "text":
            prompt["gt_raw"] = str(["今日 营业"] if language == "zh" else [TEXTS[index % len(TEXTS)]])
        if name == "reasoning":
            prompt["gt_answer"] = "Water expands as it freezes."
        found.append(prompt)
    return found


def dpg_prompts(number: int, language: str) -> list[dict[str, Any]]:
    found = []
    for index in range(number):
        thing = OBJECTS[index % len(OBJECTS)]
        questions = {
            "1": f"Is there a {thing}?",
            "2": "Is it a photo?",
            "3": f"Is the {thing} next to a lake?",
            "4": f"Is the {thing} old?",
        }
        tuples = {
            "1": f"entity - whole ({thing})",
            "2": "global - (photo)",
            "3": f"relation - spatial ({thing}, lake, next to)",
            "4": f"attribute - state ({thing}, old)",
        }
        dependency = {"1": [0], "2": [0], "3": [1], "4": [1]}
        name = f"partiprompts{97 + index}" if index % 2 == 0 else f"COCOval{index}"
        text = f"A photo of an old {thing} next to a lake, seen from {index} steps away"
        found.append(
            {"item_id": name, "prompt": text, "questions": questions, "dependency": dependency, "tuples": tuples}
        )
    return found


def tinyworld_prompts(number: int, language: str) -> list[dict[str, Any]]:
    found = tinyworld.prompts(language, per_task=-(-number // len(tinyworld.TASKS)))
    by_turns = sorted(found, key=lambda prompt: prompt["index"] % (len(found) // len(tinyworld.TASKS)))
    return by_turns[:number]


PROMPTS = {
    "tinyworld": tinyworld_prompts,
    "geneval": geneval_prompts,
    "cvtg2k": cvtg2k_prompts,
    "longtext": longtext_prompts,
    "oneig": oneig_prompts,
    "dpg": dpg_prompts,
}


def judge_record(role: str) -> dict[str, Any]:
    record = JudgeRecord(
        judge=f"evaluation.judges.made_up.{role.capitalize()}Judge",
        model=f"{role} of dice",
        revision="0123456789abcdef",
        differs=f"Dice stand for the {role}.",
        settings={"batch_size": 8},
        versions={"python": "3.11"},
    )
    return {**vars(record)}


def without_records(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "records"}
