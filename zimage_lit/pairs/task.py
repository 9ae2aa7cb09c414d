"""`lightning run pairs`: a preference set of pictures that a model draws and objective rewards judge.

The prompts are cut into parts. Of each part all pictures are drawn and judged, the pairs chosen, and a folder written
in one step below `.pairs`, so a run that was killed goes on with the part that is missing and ends with the same files.
In the end the set is put together from the parts. They stay: a review, another val_share or another review_pairs puts
it together anew, without drawing.

output/train, output/val    the preference set; the pairs of one prompt are all in one split
output/pairs.jsonl          every pair: prompt, seeds, scores, margin, difficulty, and what a review said of it
output/samples.jsonl        every picture that was drawn: seed, scores, and what became of it
output/summary.json         the counts of both
output/review.html          the page for a person's eye, see review_page.py
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from data_modules.folder_lock import begin_or_go_on, is_prepared
from zimage_lit.config import did_you_mean, one_line, settings_from
from zimage_lit.errors import UserError, at_least_one, root_of
from zimage_lit.files import write_atomically
from zimage_lit.grids import encoded
from zimage_lit.lora import base_fingerprint
from zimage_lit.pairs.preference_set import (
    DECIDE_THE_SET,
    FOLDER_KEY,
    PART,
    ROLES,
    UNFINISHED,
    WORK,
    apply_review,
    assemble,
    is_assembled,
    noted_verdicts,
    picture_name,
    writing,
)
from zimage_lit.pairs.prompts import Prompt, read_prompts
from zimage_lit.pairs.selection import DECIMALS, PairRules, Sample, Scores, Selection, select_pairs
from zimage_lit.pipeline import ZImagePipeline, check_lengths, load_pipeline, sampling_arguments
from zimage_lit.progress import progress_over
from zimage_lit.rewards import RewardCallback, RewardSet
from zimage_lit.rewards.contract import check_names
from zimage_lit.rewards.pictures import as_pil, picture_hash


@dataclass(frozen=True)
class PairsSettings:
    """Settings of `lightning run pairs`; of those of sampling null stands for what the model was saved with."""

    model: str  # what draws: a pipeline's folder, a run's folder, or a run's checkpoint (.ckpt)
    prompts: str  # a prepared data set, a .jsonl file with {"prompt", "metadata"} a line, or tinyworld
    rewards: dict[str, dict]  # the judges, as trainer.callbacks are named: rewards.NAME.class_path, …init_args
    objective: str  # the reward (by its own name) that decides: its difference between two pictures is their margin
    output: str = "outputs/pairs"  # folder for the preference set and what tells how it came about
    review: str | None = None  # review.json of an earlier set's page: with output=… alone, drops what it says
    tasks: list[str] | None = None  # of prompts=tinyworld: whose training statements; null: counting and word
    num_prompts: int | None = None  # the first so many different prompts; null: all
    samples_per_prompt: int = 16  # pictures drawn of each prompt
    winner_at_least: float = 1.0  # least objective score of a winner; what reaches it passes
    agree: dict[str, float] = field(default_factory=dict)  # further judges: reward -> least score of a winner
    margin: tuple[float, float] = (0.1, 1.0)  # least and largest margin of a pair
    margin_scale: float = 1.0  # objective scores per 1 of margin: 4 where the score is how far a count is off
    matched: dict[str, float] = field(default_factory=dict)  # reward -> largest difference between winner and loser
    pass_rate: tuple[float, float] = (0.1, 0.9)  # least and largest share of a prompt's pictures that pass
    pairs_per_prompt: int = 4  # at most; no picture is in two pairs
    val_share: float = 0.1  # share of the prompts whose pairs are the validation split; may change without drawing
    seed: int = 0  # of the pictures, of TinyWorld's order and of the choice among equal pairs
    part_size: int = 8  # prompts that are drawn and judged together: what a kill can cost
    review_pairs: int = 500  # pairs on the review page, drawn by lot where there are more
    negative_prompt: str = ""  # what guidance leads away from
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_inference_steps: int | None = None  # steps of the solver
    guidance_scale: float | None = None  # the standard convention, 1 = none
    cfg_start: float | None = None  # no guidance before this t (0 = noise, 1 = clean)
    cfg_truncation: float = 1.0  # no guidance beyond this t
    cfg_normalization: float = 0.0  # longest guided velocity, relative to the conditional one; 0 = unlimited
    solver: Literal["euler", "heun", "cps", "renoise"] | None = None  # as of generate
    eta: float | None = None  # share of the noise that cps draws anew, 0 to 1
    batch_size: int = 16  # pictures drawn at once
    device: str | None = None  # cpu, cuda, cuda:1, …; a GPU where there is one

    @property
    def rules(self) -> PairRules:
        return PairRules(**{rule.name: getattr(self, rule.name) for rule in fields(PairRules)})


@dataclass(frozen=True)
class ReviewSettings:
    """Settings of `lightning run pairs output=… review=…`."""

    output: str
    review: str


@dataclass(frozen=True)
class Work:
    """What one run has in hand."""

    asked: PairsSettings
    pipeline: ZImagePipeline
    call: dict[str, Any]  # every argument of the pipeline but prompt and seed
    rewards: RewardSet
    parts: list[tuple[Path, list[Prompt]]]  # the folder of each part, and its prompts

    @property
    def missing(self) -> list[tuple[Path, list[Prompt]]]:
        return [(folder, prompts) for folder, prompts in self.parts if not (folder / PART).is_file()]


def pairs_task(settings: dict[str, Any]) -> None:
    """Make a preference set, or drop pairs of one that is there.

    Raises UserError for wrong settings, a model, prompts or rewards that cannot be used (all before anything is drawn),
    an output that holds other things, a reward that fails, and where no pair is found.
    """
    if settings.get("review") is not None:
        others = sorted(settings.keys() - {"output", "review"})
        if others:
            raise UserError(
                f"review=… drops pairs of a set that is there, and {others[0]} has no effect on it: give output=… and "
                "review=… alone."
            )
        review = settings_from(ReviewSettings, {"output": PairsSettings.output, **settings})
        apply_review(Path(review.output), Path(review.review))
    else:
        make_pairs(settings_from(PairsSettings, settings))


def make_pairs(asked: PairsSettings) -> None:
    """Draw, judge, pair and write; returns at once where the same was made before."""
    check_settings(asked)
    rules = asked.rules
    rewards = build_rewards(asked.rewards)
    check_rewards(rewards, rules)
    pipeline = load_pipeline(asked.model, asked.device, "model")
    call = sampling_arguments(asked, pipeline)
    prompts, repeated = read_prompts(asked.prompts, asked.tasks, asked.num_prompts, asked.seed, call["width"])
    useful = judged_prompts(prompts, rewards, rules)
    for reward in rewards:
        reward.prepare(pipeline.device)
    output = Path(asked.output)
    settings, assembly = drawing_settings(asked, pipeline, call, rewards, useful), assembly_settings(asked)
    settings["prompts_left_out"] = {"repeated": repeated, "objective does not apply": len(prompts) - len(useful)}
    pieces = [useful[start : start + asked.part_size] for start in range(0, len(useful), asked.part_size)]
    parts = [(output / WORK / f"{number:06d}", piece) for number, piece in enumerate(pieces)]
    work = Work(asked, pipeline, call, RewardSet(rewards), parts)
    if is_prepared(output, settings, FOLDER_KEY) and is_assembled(output, assembly):
        Console().print(f"{output} is made already", highlight=False, soft_wrap=True)
        return
    texts = [prompt.text for _, prompts in work.missing for prompt in prompts]
    check_lengths(work.pipeline, work.call, texts)
    with writing(output):
        # the one that was waited for may have done it
        if not (is_prepared(output, settings, FOLDER_KEY) and is_assembled(output, assembly)):
            begin_or_go_on(output / WORK, settings, FOLDER_KEY)
            draw_parts(work)
            assemble(output, assembly, noted_verdicts(output))


# ------------------------------------------------------------------------------------------------------- settings


def check_settings(asked: PairsSettings) -> None:
    """UserError for the first number out of its range."""
    at_least_one("part_size", asked.part_size)
    at_least_one("review_pairs", asked.review_pairs)
    if asked.samples_per_prompt < 2:
        raise UserError(f"samples_per_prompt must be at least 2 to make a pair, not {asked.samples_per_prompt}.")
    if not 0 <= asked.val_share < 1:
        raise UserError(f"val_share must be from 0 to below 1, not {asked.val_share}.")


def build_rewards(components: Mapping[str, Any]) -> list[RewardCallback]:
    """The rewards of a mapping from any names to class_path and init_args, in its order."""
    from jsonargparse import ArgumentError

    from zimage_lit.validate import check_value, instantiate

    if not components:
        raise UserError("rewards names no judge: give one as rewards.NAME.class_path=….")
    built = []
    for key, component in components.items():
        place = f"rewards.{key}"
        if not isinstance(component, dict) or "class_path" not in component:
            raise UserError(f"{place} names no class: give {place}.class_path=….")
        check_value(place, component, RewardCallback)
        if "weight" in (component.get("init_args") or {}):
            raise UserError(f"{place}.init_args.weight has no effect on pairs, which weigh nothing: leave it out.")
        try:
            built.append(instantiate("reward", RewardCallback, component))
        except (ArgumentError, ValueError) as error:
            root = root_of(error)
            raise root if isinstance(root, UserError) else UserError(f"{place}: {one_line(root)}") from error
    check_names(built)
    return built


def check_rewards(rewards: Sequence[RewardCallback], rules: PairRules) -> None:
    """UserError where what decides about pairs is not there or must not decide."""
    known = {reward.name: reward for reward in rewards}
    roles = [
        ("objective", rules.objective),
        *(("agree", n) for n in rules.agree),
        *(("matched", n) for n in rules.matched),
    ]
    for role, name in roles:
        if name not in known:
            hint = did_you_mean(name, known, listing="there are")
            raise UserError(f"{role} names the reward {name}, which is not among rewards{hint}.")
        if known[name].held_out:
            raise UserError(f"the reward {name} is held out and must not decide: take it out of {role}.")
        if known[name].weight < 0 and role != "matched":
            raise UserError(
                f"less of the reward {name} is better (its weight is below 0), and {role} wants more of it."
            )


def judged_prompts(prompts: Sequence[Prompt], rewards: Sequence[RewardCallback], rules: PairRules) -> list[Prompt]:
    """The prompts to which the objective applies; UserError where it, or another that decides, applies to none."""
    known = {reward.name: reward for reward in rewards}
    useful = list(prompts)
    for name in rules.needed:
        applies = [prompt for prompt in useful if known[name].applies_to(prompt.text, prompt.metadata)]
        if not applies:
            raise UserError(
                f"the reward {name} has nothing to say about any of the {len(useful)} prompts and cannot decide about "
                "pairs: name another one, or other prompts."
            )
        if name == rules.objective:
            useful = applies
    return useful


def drawing_settings(
    asked: PairsSettings,
    pipeline: ZImagePipeline,
    call: Mapping[str, Any],
    rewards: Sequence[RewardCallback],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """All that decides the parts, which must not change on the way; model, prompts and judges by what they are, so
    that they may lie elsewhere by then."""
    left_out = ("output", "review", "device", "rewards", *assembly_settings(asked))
    settings = {name: value for name, value in {**asdict(asked), **call}.items() if name not in left_out}
    listing = json.dumps([[prompt.text, prompt.metadata] for prompt in prompts], sort_keys=True)
    settings |= {
        "shift": pipeline.defaults.shift,
        "weights": base_fingerprint(pipeline.backbone.state_dict())[:16],
        "text_encoder": pipeline.text_encoder.fingerprint()[:16],
        "codec": pipeline.codec.fingerprint()[:16],
        "prompts_listing": sha256(listing.encode()).hexdigest()[:16],
        "judges": {reward.name: reward.version for reward in rewards},
        "num_parts": math.ceil(len(prompts) / asked.part_size),
        "roles": ROLES,
    }
    stored: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read again: lists for tuples
    return stored


def assembly_settings(asked: PairsSettings) -> dict[str, Any]:
    """What may change with the parts kept: how the set is put together from them (DECIDE_THE_SET), and what is only
    noted of how they came about."""
    noted = ("model", "prompts", "batch_size")
    settings = {name: getattr(asked, name) for name in (*DECIDE_THE_SET, *noted)}
    return settings | {"name": Path(asked.output).resolve().name}


# ------------------------------------------------------------------------------------------------- drawing, judging


def draw_parts(work: Work) -> None:
    """Draw and judge what is missing, under a bar over all pictures."""
    for leftover in (Path(work.asked.output) / WORK).glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    each = work.asked.samples_per_prompt
    total = each * sum(len(prompts) for _, prompts in work.parts)
    missing = each * sum(len(prompts) for _, prompts in work.missing)
    with progress_over("Drawing pairs", total, total - missing) as drawn:
        for folder, prompts in work.missing:
            pictures = draw(work, prompts, drawn)
            write_part(folder, work, prompts, pictures, judge(work.rewards, prompts, pictures))


def draw(work: Work, prompts: Sequence[Prompt], drawn: Callable[[int], None]) -> list[Tensor]:
    """uint8 (3, H, W) pictures, all of the first prompt, then all of the second and so on, in packed batches."""
    each = range(work.asked.samples_per_prompt)
    jobs = [(prompt.text, prompt.seed(work.asked.seed, number)) for prompt in prompts for number in each]
    pictures: list[Tensor] = []
    for start in range(0, len(jobs), work.asked.batch_size):
        batch = jobs[start : start + work.asked.batch_size]
        made = work.pipeline([text for text, _ in batch], seed=[seed for _, seed in batch], **work.call)
        pictures += [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in made]
        drawn(len(batch))
    return [picture.to(work.pipeline.device) for picture in pictures]


def judge(rewards: RewardSet, prompts: Sequence[Prompt], pictures: Sequence[Tensor]) -> list[dict[str, float | None]]:
    """The scores of each picture by the rewards that apply to its prompt; None: could not judge."""
    each = len(pictures) // len(prompts)
    places = [place for place in range(len(prompts)) for _ in range(each)]
    asked = [prompts[place] for place in places]
    scores = rewards.score(pictures, [one.text for one in asked], [one.metadata for one in asked], places)
    judged: list[dict[str, float | None]] = [{} for _ in pictures]
    for reward in rewards.rewards:
        applies = [reward.applies_to(prompt.text, prompt.metadata) for prompt in prompts]
        for number, score in enumerate(scores[reward.name].tolist()):
            if applies[places[number]]:
                judged[number][reward.name] = None if math.isnan(score) else round(score, DECIMALS)
    return judged


def write_part(
    folder: Path, work: Work, prompts: Sequence[Prompt], pictures: Sequence[Tensor], scores: Sequence[Scores]
) -> None:
    """Choose the pairs of each prompt and write them with their pictures; the folder appears in one step."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    each = work.asked.samples_per_prompt
    entries = []
    for place, prompt in enumerate(prompts):
        own = slice(place * each, (place + 1) * each)
        samples = [
            Sample(score, picture_hash(picture)) for score, picture in zip(scores[own], pictures[own], strict=True)
        ]
        selection = select_pairs(samples, work.asked.rules, lot=f"{work.asked.seed}/{prompt.text}")
        seeds = [prompt.seed(work.asked.seed, number) for number in range(each)]
        entries.append(described(prompt, samples, seeds, selection))
        for pair in selection.pairs:
            for number in (pair.winner, pair.loser):
                content = encoded(as_pil(pictures[own][number]), "PNG")
                write_atomically(unfinished / picture_name(prompt.id, number), content)
    write_atomically(unfinished / PART, json.dumps({"prompts": entries}, ensure_ascii=False))
    unfinished.rename(folder)


def described(prompt: Prompt, samples: Sequence[Sample], seeds: Sequence[int], selection: Selection) -> dict[str, Any]:
    """A prompt's entry in part.json."""
    rows = [
        {"seed": seed, "picture": sample.picture, "scores": sample.scores, "outcome": outcome}
        for seed, sample, outcome in zip(seeds, samples, selection.outcomes, strict=True)
    ]
    return {
        "group": prompt.id,
        **asdict(prompt),
        "difficulty": selection.difficulty,
        "samples": rows,
        "pairs": [asdict(pair) for pair in selection.pairs],
    }
