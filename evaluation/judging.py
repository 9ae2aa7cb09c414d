"""Judges built from settings, pictures looked at, and questions asked: nothing is looked at or asked twice."""

import json
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

from PIL import Image

from evaluation.benchmark_pass import BenchmarkPass, Prompt, Seen, judgement_entry
from evaluation.benchmarks.protocol import Judged
from evaluation.judges.contract import ROLES, Asked, Judge, JudgeRecord
from evaluation.ledger import Ledger
from evaluation.pictures import picture_hash
from evaluation.shards import Shard
from evaluation.suite import BenchmarkModule
from zimage_lit.config import did_you_mean, one_line
from zimage_lit.errors import UserError, root_of
from zimage_lit.progress import progress_over

DEFAULT_JUDGES = {
    "detector": "evaluation.judges.detector.Mask2FormerDetector",
    "ocr": "evaluation.judges.ocr.RapidOCRReader",
    "vlm": "evaluation.judges.vlm.QwenVLJudge",
    "clip": "evaluation.judges.clip.CLIPJudge",
    "vqa": "evaluation.judges.vqa.MPLUGJudge",
    "llm2clip": "evaluation.judges.llm2clip.LLM2CLIPJudge",
    "style": "evaluation.judges.style.StyleJudge",
    "distance": "evaluation.judges.dreamsim.DreamSimJudge",
    "verifier": "evaluation.judges.tinyworld.TinyWorldVerifier",
}
WITHOUT_WEIGHTS = ("ocr", "verifier")  # whose default judges need nothing that a person must fetch
FIELDS = {  # that a judgement of the role must have for the scoring, as ROLES says
    "detector": ("detections",),
    "ocr": ("lines",),
    "vlm": ("answer",),
    "clip": ("similarity",),
    "vqa": ("answer",),
    "llm2clip": ("similarity",),
    "style": ("csd", "se"),
    "distance": ("distance",),
    "verifier": (),
}
QUESTIONS_AT_ONCE = 32  # handed to a judge, with their pictures in memory
DECODERS = 4  # threads


# ---------------------------------------------------------------------------------------------------- from settings


def build_judges(components: Mapping[str, Any], roles: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Judge]:
    """The judge of each role in order: the class of `DEFAULT_JUDGES` where `components` names no other.

    components: role -> {"class_path", "init_args"}, or None to do without.   optional: roles that are left out where
    nothing is said of them. UserError for an unknown role, one that nobody needs, a judge that cannot be built, and
    a role that has no judge.
    """
    for role in components:
        if role not in ROLES:
            raise UserError(f"judges.{role} is no role of a judge{did_you_mean(role, ROLES, listing='there are')}.")
        if role not in roles:
            raise UserError(f"judges.{role} has no effect, for no benchmark that was named asks one: leave it out.")
    found = {}
    for role in roles:
        component = components.get(role, {} if role in WITHOUT_WEIGHTS else None)
        if component is not None:
            found[role] = _built(role, component)
        elif role not in optional:
            raise UserError(
                f"judges.{role} is needed: give what {DEFAULT_JUDGES[role]} takes as judges.{role}.init_args.…=…, or "
                f"another class as judges.{role}.class_path=…."
            )
    return found


def _built(role: str, component: Any) -> Judge:
    from jsonargparse import ArgumentError, ArgumentParser

    from zimage_lit.validate import check_names, check_value

    place = f"judges.{role}"
    if not isinstance(component, dict):
        raise UserError(f"{place} must name a judge: give {place}.class_path=… or {place}.init_args.…=….")
    check_names(place, component, ("class_path", "init_args"))
    component = {"class_path": DEFAULT_JUDGES[role], **component}
    check_value(place, component, Judge)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Judge, "judge")
    try:
        built: Judge = parser.instantiate(parser.parse_object({"judge": component})).judge
    except (ArgumentError, ValueError) as error:
        root = root_of(error)
        raise UserError(f"{place}: {root if isinstance(root, UserError) else one_line(root)}") from error
    return built


def record_of(role: str, judge: Judge) -> JudgeRecord:
    """What a judge says of itself; UserError, with the setting, for one whose weights are not there."""
    try:
        return judge.record()
    except UserError as error:
        raise UserError(f"judges.{role}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- looking


def look(work: BenchmarkPass, shard: Shard) -> None:
    """Decode a shard's pictures and note what they are, those that are missing or broken among them."""
    sightings = work.sightings(shard)
    prompts = work.share(shard)
    todo = [prompt for prompt in prompts if work.seen(work.places(prompt), sightings) is None]
    total, left = len(prompts) * work.number, len(todo) * work.number
    with ThreadPool(DECODERS) as pool, progress_over(f"{work.part.title}: looking", total, total - left) as done:
        for entry in pool.imap(lambda prompt: _sighted(work, prompt), todo):
            sightings.add([entry])
            done(work.number)
    sightings.close()


def _sighted(work: BenchmarkPass, prompt: Prompt) -> dict[str, Any]:
    """What is seen of a prompt's pictures, as an entry of the sightings."""
    places = work.places(prompt)
    entry = work.sighting(places)
    return {**entry, "seen": [_seen(picture) for picture in work.load(places)]}


def _seen(picture: Image.Image | str) -> Seen:
    if isinstance(picture, str):
        return {"lost": picture}
    return {"sha256": picture_hash(picture), "size": list(picture.size)}


# ----------------------------------------------------------------------------------------------------------- asking


def ask(work: BenchmarkPass, role: str, judge: Judge, record: JudgeRecord, shard: Shard) -> None:
    """Ask a judge what it has not been asked yet of a shard's pictures, and keep what it says.

    Raises UserError for a judgement that is no plain data; whatever the judge raises ends the evaluation.
    """
    sightings, judgements = work.sightings(shard), work.judgements(role, record, shard)
    prompts = work.share(shard)
    number = {
        asked: sum(len(list(_entries(work, role, prompt, sightings, ledger))) for prompt in prompts)
        for asked, ledger in (("all", None), ("open", judgements))
    }
    with progress_over(f"{work.part.title}: {role}", number["all"], number["all"] - number["open"]) as done:
        for batch in _batches(work, role, prompts, sightings, judgements):
            answers = judge.judge([asked for _, asked in batch])
            judgements.add(_checked(role, judge, [entry for entry, _ in batch], answers))
            done(len(batch))
    for ledger in (sightings, judgements):
        ledger.close()


def ask_at_once(
    module: BenchmarkModule,
    prompts: Sequence[Prompt],
    pictures: Sequence[Sequence[Image.Image]],
    judges: Mapping[str, Judge],
) -> list[list[dict[str, Any]]]:
    """Each prompt's records, as its benchmark counts them, of pictures in memory; nothing is kept.

    pictures: of each prompt.   judges: by role; the benchmark's other questions are not asked.
    """
    asked = [
        (place, question)
        for place, prompt in enumerate(prompts)
        for question in module.questions(prompt, len(pictures[place]))
        if question.role in judges
    ]
    judgements: dict[int, Mapping[str, Any]] = {}
    for role, judge in judges.items():
        own = [number for number, (_, question) in enumerate(asked) if question.role == role]
        shown = [(asked[number][1], pictures[asked[number][0]]) for number in own]
        questions = [Asked(tuple(own[i] for i in one.pictures), one.question) for one, own in shown]
        answers = _checked(role, judge, [{} for _ in own], judge.judge(questions))
        judgements |= {number: answer["judgement"] for number, answer in zip(own, answers, strict=True)}
    said: list[list[Judged]] = [[] for _ in prompts]
    for number, (place, question) in enumerate(asked):
        said[place].append(Judged(question, judgements[number]))
    return [module.records(prompt, own, {}) for prompt, own in zip(prompts, said, strict=True)]


def _entries(
    work: BenchmarkPass, role: str, prompt: Prompt, sightings: Ledger, known: Ledger | None
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """(pictures, what the judgement is kept by) of a prompt's questions that are not `known` yet, each once."""
    seen = work.seen(work.places(prompt), sightings)
    if seen is None:
        raise RuntimeError("a picture is judged that nobody has looked at")
    found = set()
    for question in work.questions(prompt):
        entry = judgement_entry(question, seen) if question.role == role else None
        if entry is None or (known is not None and entry in known):
            continue
        if (key := json.dumps(entry, sort_keys=True)) not in found:
            found.add(key)
            yield question.pictures, entry


def _batches(
    work: BenchmarkPass, role: str, prompts: Sequence[Prompt], sightings: Ledger, judgements: Ledger
) -> Iterator[list[tuple[dict[str, Any], Asked]]]:
    """Questions that nobody has answered yet, with their pictures; what two prompts have in common is asked once."""
    batch: dict[str, tuple[dict[str, Any], Asked]] = {}
    for prompt in prompts:
        entries = list(_entries(work, role, prompt, sightings, judgements))
        pictures = work.load(work.places(prompt)) if entries else []
        hashes = [_seen(picture).get("sha256") for picture in pictures]
        for places, entry in entries:
            if [hashes[place] for place in places] != entry["pictures"]:
                raise UserError(
                    f"a picture of prompt {work.plan(prompt)[0].prompt_id} in {work.pictures.folder} changed while it "
                    "was judged: leave the pictures alone, and start the same command again."
                )
            if entry in judgements:  # by now: another prompt had the same picture and question
                continue
            shown: Any = tuple(pictures[place] for place in places)
            batch[json.dumps(entry, sort_keys=True)] = entry, Asked(shown, entry["question"])
            if len(batch) == QUESTIONS_AT_ONCE:
                yield list(batch.values())
                batch = {}
    if batch:
        yield list(batch.values())


def _checked(
    role: str, judge: Judge, entries: Sequence[dict[str, Any]], answers: Sequence[Any]
) -> list[dict[str, Any]]:
    """The entries with what the judge said; UserError for what would be kept and could not be scored."""
    fields = set(FIELDS[role])
    if len(answers) != len(entries) or not all(isinstance(one, dict) and fields <= one.keys() for one in answers):
        raise UserError(
            f"judges.{role}: {type(judge).__name__} must give a mapping for each of {len(entries)} questions, as its "
            f"role has it: {ROLES[role]}."
        )
    complete = [{**entry, "judgement": answer} for entry, answer in zip(entries, answers, strict=True)]
    try:
        json.dumps(complete, allow_nan=False, ensure_ascii=False).encode()  # letters that UTF-8 lacks are errors, too
    except (TypeError, ValueError) as error:
        raise UserError(
            f"judges.{role}: {type(judge).__name__} gives what JSON does not have ({error}): mend it to give plain "
            "data."
        ) from error
    return complete
