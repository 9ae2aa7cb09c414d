"""`lightning run merge`: theta = sum of alpha_i theta_i over variants of one model, with a sweep that scores each mix.

Variants that were fine-tuned from the same weights lie close enough for their average to be a model again, which often
has the strengths of all. Source: Z-Image technical report, section on supervised fine-tuning (model merging).

An average keeps a share of what each has learnt. With the weights that all began from, theta = theta_0 + sum of alpha_i
(theta_i - theta_0) adds it up whole. Source: task arithmetic (Ilharco et al., arXiv 2212.04089).
"""

import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import fill
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.export import Source, check_output, open_source, progress_bar
from zimage_lit.files import read_json, write_atomically
from zimage_lit.lora import DTYPES
from zimage_lit.pipeline import ZImagePipeline, usable_device

SCORERS = {"tinyworld": "zimage_lit.merge:tinyworld"}
Score = Callable[..., Mapping[str, float]]
Mix = tuple[float, ...]  # one weight for each variant, and one for the base where there is one; they add up to 1


@dataclass(frozen=True)
class MergeSettings:
    """Settings of `lightning run merge`."""

    variants: list[str]  # two or more: run:ID, runs' folders, checkpoints or pipelines' folders
    base: str | None = None  # what all variants began from; mixes then add up how far each has gone from it
    weights: list[float] | None = None  # of each variant; without a base 1 in total; null: found by the sweep
    sweep: int | None = None  # steps from none of a variant to all of it; every mix of such steps is scored
    score: str | None = None  # of a mix: tinyworld, or module:function that makes numbers of a pipeline
    score_arguments: dict[str, Any] = field(default_factory=dict)  # further ones for that function, by name
    metric: str | None = None  # the number that the best mix has most of; null: the first that the function gives
    output: str = "outputs/merge"  # folder: pipeline/ is the best mix, merge.json the table
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the written weights
    pictures: list[str] = field(default_factory=list)  # prompts that every mix draws, for MLflow
    device: str | None = None  # where mixes are scored: cpu, cuda, …; a GPU where there is one
    overwrite: bool = False  # replace an earlier merge there
    experiment_name: str | None = "zimage-lit"  # in MLflow, where every mix is a step; null: no tracking
    tracking_uri: str | None = None  # MLflow store; MLFLOW_TRACKING_URI, else outputs/mlflow.db


def merge_task(settings: dict[str, Any]) -> None:
    """Write the given mix, or score all mixes of a sweep and write the best one, as a pipeline's folder.

    merge.json is written after every mix, and a sweep that was broken off goes on behind the last one in it.
    Raises UserError for wrong settings, variants that do not belong together, and an output that is not free.
    """
    asked = settings_from(MergeSettings, settings)
    mixes, score = mixes_of(asked), scorer(asked.score)
    output = Path(asked.output)
    earlier = earlier_table(output, asked)
    if earlier and earlier["best"] is not None and (output / "pipeline/model_index.json").is_file():
        print(f"{output / 'pipeline'} is made already: give overwrite=true to make it again")
        return
    rows = earlier["rows"] if earlier else []
    if earlier is None:
        check_output(output, "pipeline", asked.overwrite)
    sources = [open_source(name, asked.tracking_uri) for name in mixed_models(asked)]
    pipeline = check_alike(sources)
    write_table(output, asked, rows)  # from here on the folder is known as this merge's
    if score is not None:
        rows = score_all(asked, mixes, score, sources, rows)
    best = best_mix(rows, asked.metric) if asked.sweep else mixes[0]
    dtype = DTYPES[asked.dtype]
    with progress_bar("merge", sources[0].config, dtype) as on_bytes:
        mixed = MixedWeights([source.weights for source in sources], best)
        pipeline.save_pretrained(output / "pipeline", mixed, dtype, on_bytes)
    write_table(output, asked, rows, best)
    shown = ", ".join(f"{weight:g} x {name}" for weight, name in zip(best, mixed_models(asked), strict=True))
    print(f"{shown}: {output / 'pipeline'}")


# ------------------------------------------------------------------------------------------------------------- mixes


class MixedWeights(Mapping[str, Tensor]):
    """sum of alpha_i theta_i, tensor by tensor in float32; a variant of weight 0 is not read."""

    def __init__(self, variants: Sequence[Mapping[str, Tensor]], mix: Mix) -> None:
        self.parts = [(weight, variant) for weight, variant in zip(mix, variants, strict=True) if weight]

    def __getitem__(self, name: str) -> Tensor:
        weight, variant = self.parts[0]
        total = variant[name].float() * weight
        for weight, variant in self.parts[1:]:
            total.add_(variant[name].float(), alpha=weight)
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0][1])

    def __len__(self) -> int:
        return len(self.parts[0][1])


def mixed_models(asked: MergeSettings) -> list[str]:
    """All models of which a mix has a share, in the order of its weights."""
    return [*asked.variants, *([asked.base] if asked.base is not None else [])]


def mixes_of(asked: MergeSettings) -> list[Mix]:
    """The mixes that are asked for, the given one or all of a sweep; UserError where neither or both are."""
    count, has_base = len(asked.variants), asked.base is not None
    if count < 2 - has_base:
        raise UserError("variants must name at least two models, or one beside a base.")
    if (asked.weights is None) == (asked.sweep is None):
        raise UserError("give either weights=[…], one for each variant, or sweep=5 (or another number of steps).")
    if asked.score is None and (asked.pictures or asked.metric or asked.score_arguments):
        raise UserError("pictures, metric and score_arguments belong to a score: give score=…, or leave them out.")
    if asked.sweep is not None:
        if asked.score is None:
            raise UserError("sweep needs a score to choose by: score=tinyworld, or score=module:function.")
        steps = at_least_one("sweep", asked.sweep)
        return grid(count, steps) if has_base else simplex(count, steps)
    weights = asked.weights or []
    complete = len(weights) == count and all(map(math.isfinite, weights))
    if not complete or not (has_base or math.isclose(sum(weights), 1, abs_tol=1e-6)):
        total = "" if has_base else ", that add up to 1"
        raise UserError(f"weights must be {count} numbers, one for each variant{total}, not {weights}.")
    return [with_base(weights) if has_base else tuple(weights)]


def simplex(count: int, steps: int) -> list[Mix]:
    """Every way to give `count` variants multiples of 1 / steps that add up to 1, pure variants included."""

    def shares(left: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (left,)
            return
        for first in range(left, -1, -1):
            for rest in shares(left - first, parts - 1):
                yield (first, *rest)

    return [tuple(share / steps for share in division) for division in shares(steps, count)]


def grid(count: int, steps: int) -> list[Mix]:
    """Every choice of multiples of 1 / steps up to 1 for each of `count` variants but none of all, with the base's."""
    shares = [step / steps for step in range(steps, -1, -1)]
    return [with_base(mix) for mix in itertools.product(shares, repeat=count) if any(mix)]


def with_base(weights: Sequence[float]) -> Mix:
    """theta_0 + sum of alpha_i (theta_i - theta_0), as one weight for each model."""
    return (*weights, 1 - sum(weights))


def check_alike(sources: Sequence[Source]) -> ZImagePipeline:
    """The parts around the weights, from the first variant; UserError where another one's sizes or parts differ."""
    first, *others = sources
    pipeline = first.pipeline()
    for other in others:
        different = [key for key, value in vars(first.config).items() if getattr(other.config, key) != value]
        if different:
            raise UserError(
                f"{first.name} and {other.name} cannot be mixed: {', '.join(different)} of their backbones differ."
            )
        beside = other.pipeline()
        for part in ("text_encoder", "codec"):
            if getattr(pipeline, part).fingerprint() != getattr(beside, part).fingerprint():
                raise UserError(f"{first.name} and {other.name} cannot be mixed: each has a {part} of its own.")
    return pipeline


# ----------------------------------------------------------------------------------------------------------- scoring


def scorer(name: str | None) -> Score | None:
    """The function behind `score=`."""
    if name is None:
        return None
    module_name, _, function_name = SCORERS.get(name, name).partition(":")
    if not function_name:
        raise UserError(f"score must be {' or '.join(SCORERS)}, or module:function, not {name}.")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise UserError(f"score={name}: cannot import {module_name} ({error}).") from error
    if not callable(function):
        raise UserError(f"score={name}: {module_name} has no function {function_name}.")
    return function


def tinyworld(pipeline: ZImagePipeline, prompts_per_task: int = 50, seed: int = 1000) -> dict[str, float]:
    """TinyWorld's held-out combinations as in training: `overall` and `word`, their `mean`, and every task."""
    from data_modules.tinyworld.verifier import judge
    from evaluation.benchmarks import tinyworld

    prompts = tinyworld.prompts(per_task=at_least_one("prompts_per_task", prompts_per_task), seed=seed)
    planned = tinyworld.plan(prompts, seed=seed)
    pictures = pipeline([one.prompt for one in planned], seed=[one.seed for one in planned], batch_size=64)
    pairs = zip(pictures, prompts, strict=True)
    scored = tinyworld.score([judge(np.asarray(picture), prompt["metadata"]) for picture, prompt in pairs])
    tasks = {task: score["accuracy"] for task, score in scored["tasks"].items()}
    return {"mean": (scored["overall"] + tasks["word"]) / 2, "overall": scored["overall"], **tasks}


def score_all(
    asked: MergeSettings, mixes: list[Mix], score: Score, sources: Sequence[Source], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row {weights, metrics} for every mix in order, those of `rows` taken as they are."""
    device = usable_device(asked.device)
    pipeline = sources[0].pipeline()
    pipeline.backbone = S3DiT(sources[0].config).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    pipeline.to(device)
    logger = tracker(asked, resume=bool(rows))
    with Progress() as progress:
        bar = progress.add_task("mixes", total=len(mixes), completed=len(rows))
        for step, mix in list(enumerate(mixes))[len(rows) :]:
            fill(pipeline.backbone, MixedWeights([source.weights for source in sources], mix))
            with torch.no_grad():
                metrics = check_metrics(score(pipeline, **asked.score_arguments), asked)
                pictures = pipeline(asked.pictures) if asked.pictures else []
            rows = [*rows, {"weights": list(mix), "metrics": metrics}]
            write_table(Path(asked.output), asked, rows)
            if logger:
                weights = {f"merge/weight_{place}": weight for place, weight in enumerate(mix)}
                logger.log_metrics(weights | {f"merge/{name}": value for name, value in metrics.items()}, step)
                for place, picture in enumerate(pictures):
                    logger.log_image(f"samples/prompt_{place:02d}", picture, step)
            progress.advance(bar)
    if logger:
        logger.log_table(columns_of(rows), "merge.json")
        logger.finalize("success")
    return rows


def check_metrics(metrics: Any, asked: MergeSettings) -> dict[str, float]:
    """What a scorer gave as plain numbers; UserError where it gave none, or not the one to choose by."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise UserError(f"score={asked.score} must give a mapping from names to numbers, not {metrics!r}.")
    if asked.metric is not None and asked.metric not in metrics:
        raise UserError(f"metric={asked.metric}: score={asked.score} gives {', '.join(metrics)}.")
    return {str(name): float(value) for name, value in metrics.items()}


def best_mix(rows: list[dict[str, Any]], metric: str | None) -> Mix:
    """The weights of the row with the most of `metric` (None: the first one); the earliest of equals, NaN never."""
    metric = metric or next(iter(rows[0]["metrics"]))
    judged = [row for row in rows if not math.isnan(row["metrics"][metric])]
    if not judged:
        raise UserError(f"no mix has a number for {metric}: look at the scorer.")
    return tuple(max(judged, key=lambda row: row["metrics"][metric])["weights"])


# ------------------------------------------------------------------------------------------------------------- table


def earlier_table(output: Path, asked: MergeSettings) -> dict[str, Any] | None:
    """merge.json of the same merge, finished or broken off, in this folder."""
    path = output / "merge.json"
    if asked.overwrite or not path.is_file():
        return None
    table: dict[str, Any] = read_json(path, "give overwrite=true to begin again")
    return table if table.get("settings") == compared(asked) and table.get("metric") == asked.metric else None


def compared(asked: MergeSettings) -> dict[str, Any]:
    """What a sweep must have in common with its beginning."""
    names = ("variants", "base", "weights", "sweep", "score", "score_arguments")
    return {name: value for name, value in asdict(asked).items() if name in names}


def write_table(output: Path, asked: MergeSettings, rows: list[dict[str, Any]], best: Mix | None = None) -> None:
    table = {"settings": compared(asked), "metric": asked.metric, "best": best, "rows": rows}
    write_atomically(output / "merge.json", json.dumps(table, indent=1) + "\n")


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"mix": [" ".join(f"{weight:g}" for weight in row["weights"]) for row in rows]}
    return columns | {name: [row["metrics"][name] for row in rows] for name in rows[0]["metrics"]}


def tracker(asked: MergeSettings, resume: bool) -> Any:
    if asked.experiment_name is None:
        return None
    from zimage_lit.tracking import ResilientMLFlowLogger

    logger = ResilientMLFlowLogger(
        asked.experiment_name, asked.output, Path(asked.output).name, asked.tracking_uri, resume=resume
    )
    tags = {f"variant_{place}": variant for place, variant in enumerate(asked.variants)}
    logger.log_tags(tags | ({"base": asked.base} if asked.base is not None else {}))
    return logger
