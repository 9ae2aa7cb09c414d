"""`lightning run evaluate`: draw what the benchmarks ask for, let judges look, score.

    draw (model=…)  ->  look  ->  judge, role by role  ->  score  ->  report

Every step keeps what is done as soon as it is done and leaves it alone when it comes again: a command that was killed
at any moment goes on when it is given again, and ends with the same files.

output/<benchmark>/images/                what the model drew; manifest.json: how, times.jsonl: in what time
output/<benchmark>/pictures.jsonl         what was seen of each prompt's pictures: hashes, and what is lost
output/<benchmark>/judgements/*.jsonl     what each judge said, by pictures and question
output/<benchmark>/prompts.jsonl, result.json    see scoring.py
output/<benchmark>/report.html, .md, .json       the same for people; output/report.html of several benchmarks
"""

import gc
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from evaluation.benchmark_pass import BenchmarkPass
from evaluation.drawing import draw, drawing_settings, note_settings
from evaluation.judges.contract import Judge, JudgeRecord
from evaluation.judging import ask, build_judges, look, record_of
from evaluation.pictures import PictureFolder
from evaluation.scoring import RESULT, Described, score
from evaluation.shards import ANOTHER_OUTPUT, Shard, shard_of
from evaluation.suite import WITHOUT_FILES, Part, parts_of
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import locked, read_json
from zimage_lit.pipeline import ZImagePipeline, check_lengths, load_pipeline, sampling_arguments


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of `lightning run evaluate`; of those of sampling null stands for what the model was saved with."""

    # geneval, cvtg2k, longtext, oneig, dpg, tinyworld, several with commas between, or all; by themselves, with
    # settings of their own: compare (results), fidelity (images, reference, inception) and preference (votes)
    benchmark: list[str]
    model: str | None = None  # what draws: a pipeline's folder, a run's folder, or a run's checkpoint (.ckpt)
    images: str | None = None  # or pictures that are there: a folder; for several benchmarks a folder each below it
    data: str | None = None  # folder with the official files, a folder a benchmark: geneval/, cvtg2k/ and so on
    language: str | None = None  # en or zh; null: both where a benchmark has both
    name: str | None = None  # of the model, in tables; null: that of its folder, for a run's pipeline/ that of the run
    output: str = "outputs/evaluation"  # folder of the results, a folder a benchmark
    # judges.ROLE.class_path, …init_args; null: without (a text is none, and is named as that)
    judges: dict[str, dict | str | None] = field(default_factory=dict)
    prompts: int | None = None  # a quick look: so many prompts of each of a benchmark's groups; null: all
    images_per_prompt: int | None = None  # fewer pictures than the protocol has; null: as it has
    # what judges of OneIG-Bench see: pictures as its own tools compress them, or as they are; null: official
    compression: Literal["official", "lossless"] | None = None
    prompt_rewriter: str | None = None  # what rewrote the prompts of images=…; null: they were drawn as they are
    shard: str | None = None  # 1/3: this process draws and judges the first of three shares; the last one scores
    size: int | None = None  # pixels a side of drawn pictures
    seed: int | None = None  # that a prompt's noise begins from; null: the protocol's
    negative_prompt: str = ""  # what guidance leads away from
    num_inference_steps: int | None = None  # steps of the solver
    guidance_scale: float | None = None  # the standard convention, 1 = none
    cfg_start: float | None = None  # no guidance before this t (0 = noise, 1 = clean)
    cfg_truncation: float = 1.0  # no guidance beyond this t
    cfg_normalization: float = 0.0  # longest guided velocity, relative to the conditional one; 0 = unlimited
    solver: Literal["euler", "heun", "cps", "renoise"] | None = None  # as of generate
    eta: float | None = None  # share of the noise that cps draws anew, 0 to 1
    batch_size: int = 1  # pictures drawn at once; more is faster for small pictures and equal up to rounding
    device: str | None = None  # where the model draws: cpu, cuda, cuda:1, …; a GPU where there is one
    experiment_name: str | None = "zimage-lit"  # in MLflow, where every model is a run; null: no tracking
    tracking_uri: str | None = None  # MLflow store; MLFLOW_TRACKING_URI, else outputs/mlflow.db

    @property
    def height(self) -> int | None:
        return self.size

    @property
    def width(self) -> int | None:
        return self.size


OF_DRAWING = (
    "size", "seed", "negative_prompt", "num_inference_steps", "guidance_scale", "cfg_start", "cfg_truncation",
    "cfg_normalization", "solver", "eta", "batch_size", "device",
)  # fmt: skip


SIDE_TASKS = {"compare": "compare_task", "fidelity": "fidelity_task", "preference": "preference_task"}


def evaluate_task(settings: dict[str, Any]) -> None:
    """Evaluate a model, or pictures that are there, on benchmarks.

    Raises UserError for wrong settings, official files, judges and a model that cannot be used, and pictures that were
    drawn with other settings: all before anything is drawn.
    """
    asked_for = [name.strip() for name in str(settings.get("benchmark")).split(",")]
    if alone := [name for name in asked_for if name in SIDE_TASKS and len(asked_for) > 1]:
        raise UserError(f"benchmark={alone[0]} has settings of its own: run it by itself.")
    side_task = SIDE_TASKS.get(asked_for[0])
    if side_task:
        from evaluation import side_tasks  # with torch-fidelity, which benchmarks do not need

        getattr(side_tasks, side_task)(settings)
        return
    asked = settings_from(EvaluateSettings, settings)
    check_settings(asked, settings)
    if finished := evaluate(asked):
        report(asked, finished)


def check_settings(asked: EvaluateSettings, given: Mapping[str, Any]) -> None:
    """UserError for settings that contradict each other, or that would have no effect."""
    if (asked.model is None) == (asked.images is None):
        raise UserError("give either model=…, which draws, or images=…, pictures that are there.")
    without_effect = [name for name in OF_DRAWING if name in given] if asked.images else []
    if without_effect:
        raise UserError(f"{without_effect[0]} has no effect on images=…, which are there already: leave it out.")
    if asked.model and asked.prompt_rewriter is not None:
        raise UserError("prompt_rewriter says how images=… came about; model=… draws the prompts as they are.")
    for name in ("prompts", "images_per_prompt", "size"):
        if (value := getattr(asked, name)) is not None:
            at_least_one(name, value)
    at_least_one("batch_size", asked.batch_size)
    if asked.tracking_uri and asked.experiment_name is None:
        raise UserError("tracking_uri has no effect with experiment_name=null, which tracks nothing: leave one out.")


def check_effects(asked: EvaluateSettings, parts: Sequence[Part]) -> None:
    """UserError for settings that mean nothing to any of these benchmarks."""
    most = max(part.module.IMAGES_PER_PROMPT for part in parts)
    if asked.images_per_prompt and asked.images_per_prompt > most:
        raise UserError(f"images_per_prompt={asked.images_per_prompt} has no effect: the protocol has {most} at most.")
    if asked.compression and "oneig" not in [part.benchmark for part in parts]:
        raise UserError("compression has an effect on oneig alone, which is not among the benchmarks: leave it out.")
    if asked.data and all(part.benchmark in WITHOUT_FILES for part in parts):
        raise UserError("data has no effect, for no benchmark that was named has official files: leave it out.")


def evaluate(asked: EvaluateSettings) -> list[Path]:
    """Draw, look, judge and score; the folders of the results that are finished."""
    shard = own_shard(asked)
    parts = parts_of(asked.benchmark, asked.language)
    check_effects(asked, parts)
    used = dict.fromkeys(role for part in parts for role in part.module.ROLES_USED)
    needed = {role for part in parts for role in part.module.ROLES_USED if role not in part.module.OPTIONAL_ROLES}
    prompts = {part: part.prompts(Path(asked.data) if asked.data else None) for part in parts}
    judges = build_judges(asked.judges, list(used), [role for role in used if role not in needed])
    records = {role: record_of(role, judge) for role, judge in judges.items()}
    works = [benchmark_pass(asked, part, prompts[part], list(judges), len(parts) > 1) for part in parts]
    for work in works:
        check_output(asked, work)
    with ExitStack() as locks:
        for work in works:
            busy = (
                f"another evaluation is at work in {work.folder}: wait for it, give each a share of its own with "
                f"shard=1/2 and so on, or {ANOTHER_OUTPUT}."
            )
            locks.enter_context(locked(work.folder / f".lock{shard.suffix}", ANOTHER_OUTPUT, busy))
        made = {work.part: images_described(asked, work) for work in works}
        if asked.model:
            works, made = draw_all(asked, works, shard)
        for work in works:
            check_found(work)
            look(work, shard)
        judge_all(works, judges, records, shard)
        return [work.folder for work in works if finish(asked, work, made[work.part], records)]


def own_shard(asked: EvaluateSettings) -> Shard:
    """This process's share; under torchrun, it draws and judges on a GPU of its own."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return shard_of(asked.shard)


def benchmark_pass(
    asked: EvaluateSettings, part: Part, prompts: Sequence[dict[str, Any]], judged: Sequence[str], several: bool
) -> BenchmarkPass:
    """What there is to do for one benchmark, before anything is known of the model."""
    folder = Path(asked.output) / part.name
    images = folder / "images"
    if asked.images:
        images = Path(asked.images) / part.name if several else Path(asked.images)
        if not images.is_dir():
            raise UserError(f"there is no folder {images} with the pictures of {part.title}: check images=….")
    oneig = part.benchmark == "oneig"
    module = part.module
    number = min(asked.images_per_prompt or module.IMAGES_PER_PROMPT, module.IMAGES_PER_PROMPT)
    roles = tuple(role for role in module.ROLES_USED if role in judged)
    return BenchmarkPass(
        part=part,
        prompts=part.judged(part.first_of_each_group(prompts, asked.prompts), number, roles),
        of=len(prompts),
        number=number,
        roles=roles,
        pictures=PictureFolder(images, gallery=oneig, compressed=oneig and asked.compression != "lossless"),
        folder=folder,
        seed=asked.seed,
        drawn_together=asked.batch_size,
    )


def check_output(asked: EvaluateSettings, work: BenchmarkPass) -> None:
    """UserError where the result there is of other pictures, which it would replace; drawn ones have their manifest."""
    path = work.folder / RESULT
    of_pictures = read_json(path)["pictures"].get("images") if path.is_file() else None
    now = str(work.pictures.folder) if asked.images else None
    if path.is_file() and of_pictures != now:
        raise UserError(
            f"{path} is the result of {of_pictures or 'a model that drew'}, not of {now or asked.model}: name another "
            "output=…, or delete its folder."
        )


# ---------------------------------------------------------------------------------------------------------- drawing


def draw_all(
    asked: EvaluateSettings, works: Sequence[BenchmarkPass], shard: Shard
) -> tuple[list[BenchmarkPass], dict[Part, dict[str, Any]]]:
    """Draw what is missing of every benchmark; the works with their pictures' sizes, and how the pictures are made."""
    pipeline = load_pipeline(str(asked.model), asked.device, "model")
    sized = [replace(work, size=size_of(asked, work.part, pipeline)) for work in works]
    calls = {work.part: sampling_arguments(replace(asked, size=work.size), pipeline) for work in sized}
    made = {}
    for work in sized:  # what cannot be done shows before an hour of drawing
        check_lengths(pipeline, calls[work.part], [prompt["prompt"] for prompt in work.prompts])
        seed = work.part.module.SEED if work.seed is None else work.seed
        settings = drawing_settings(pipeline, calls[work.part], seed)
        note_settings(work.pictures.folder, settings)
        made[work.part] = {"source": "model", "model": asked.model, **settings}
    for work in sized:
        draw(pipeline, work, calls[work.part], str(asked.model), shard)
    del pipeline
    free_memory()
    return sized, made


def size_of(asked: EvaluateSettings, part: Part, pipeline: ZImagePipeline) -> int:
    """Pixels a side: as asked, else the protocol's, else the model's own."""
    if asked.size is not None:
        return asked.size
    of_protocol: int | None = getattr(part.module, "SIZE", None)
    if of_protocol is not None:
        return of_protocol
    if pipeline.defaults.height != pipeline.defaults.width:
        raise UserError(
            f"{asked.model} draws {pipeline.defaults.width}x{pipeline.defaults.height} pixels unless it is told, and "
            "the benchmarks take square pictures: give size=…."
        )
    return pipeline.defaults.height


def images_described(asked: EvaluateSettings, work: BenchmarkPass) -> dict[str, Any]:
    """What is known of pictures that were there."""
    return {"source": "images", "images": str(work.pictures.folder), "prompt_rewriter": asked.prompt_rewriter}


# ---------------------------------------------------------------------------------------------------------- judging


def check_found(work: BenchmarkPass) -> None:
    """UserError where there is no picture at all: a wrong folder is no bad model."""
    if not any(place for prompt in work.prompts for place in work.places(prompt)):
        first = work.plan(work.prompts[0])[0]
        raise UserError(
            f"{work.pictures.folder} has no picture of {work.part.title}: the first one would be {first.file} or, as "
            f"the benchmark's own tools write it, {first.official_file}."
        )


def judge_all(
    works: Sequence[BenchmarkPass], judges: dict[str, Judge], records: Mapping[str, JudgeRecord], shard: Shard
) -> None:
    """Ask role by role, each judge for all benchmarks, so that no two have to be in memory together."""
    while judges:
        role = next(iter(judges))
        judge = judges.pop(role)
        for work in works:
            if role in work.roles:
                ask(work, role, judge, records[role], shard)
        del judge
        if judges:
            free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- scoring


def finish(
    asked: EvaluateSettings, work: BenchmarkPass, made: Mapping[str, Any], records: Mapping[str, JudgeRecord]
) -> bool:
    """Score, and say how it went; False where other shards have still to do their share."""
    own = {role: records[role] for role in work.roles}
    pictures = {**made, "images_per_prompt": work.number, "compressed": work.pictures.compressed}
    described = Described(model_name(asked), pictures, own, tuple(reasons(asked, work, own)))
    finished = score(work, described, drawn=asked.model is not None)
    Console().print(said(work) if finished else waiting(work), highlight=False, soft_wrap=True, markup=False)
    return finished


def model_name(asked: EvaluateSettings) -> str:
    if asked.name:
        return asked.name
    folder = Path(asked.model or asked.images or "").resolve()
    return folder.parent.name if asked.model and folder.name == "pipeline" else folder.name


def reasons(asked: EvaluateSettings, work: BenchmarkPass, judges: Mapping[str, JudgeRecord]) -> list[str]:
    """Why the scores do not compare with published ones, as far as the settings tell."""
    module = work.part.module
    found = [f"Judge {role}: {judge.differs}" for role, judge in judges.items() if judge.differs]
    found += [
        f"There is no judge {role}: what it decides is not scored." for role in module.ROLES_USED if role not in judges
    ]
    if len(work.prompts) < work.of:
        found.append(f"{len(work.prompts)} of {work.of} prompts were evaluated.")
    if work.number < module.IMAGES_PER_PROMPT:
        found.append(f"{work.number} of {module.IMAGES_PER_PROMPT} pictures of each prompt were evaluated.")
    if asked.prompt_rewriter is not None:
        found.append(f"The prompts were rewritten: {asked.prompt_rewriter}.")
    if work.pictures.gallery and not work.pictures.compressed:
        found.append("Judges saw the pictures without the compression of the benchmark's own tools.")
    return found


def report(asked: EvaluateSettings, results: Sequence[Path]) -> None:
    """Pages about finished results, each and all together, and what MLflow gets of them."""
    from lightning.pytorch.utilities import rank_zero_only

    from evaluation.report.tracking import log_to_mlflow
    from evaluation.report.write import write_report
    from zimage_lit.tracking import ResilientMLFlowLogger

    # shards that end together would write the same at once
    with locked(Path(asked.output) / ".report.lock", ANOTHER_OUTPUT):
        for folder in results:
            write_report([folder], folder)
        if len(results) > 1:
            write_report(results, Path(asked.output))
        if asked.experiment_name is None:
            return
        # loggers are silent on torchrun's other ranks, and any may be the last to be done
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        name = model_name(asked)
        own = Path(asked.output) / "mlflow" / re.sub(r"[^\w.-]", "_", name)
        logger = ResilientMLFlowLogger(asked.experiment_name, str(own), name, asked.tracking_uri)
        for folder in results:
            log_to_mlflow(folder, logger)
        logger.finalize("success")


def said(work: BenchmarkPass) -> str:
    """One line about a result."""
    result = read_json(work.folder / RESULT)
    scores = result["scores"]["official"]
    if scores["overall"] is not None:
        shown = f"{scores['overall']:.4f} [{scores['ci_low']:.4f}, {scores['ci_high']:.4f}]"
    else:
        shown = ", ".join(f"{name} {one['score']:.4f}" for name, one in scores["scores"].items())
    lost = f", {scores['lost']['images']} pictures lost" if scores["lost"]["images"] else ""
    verdict = "comparable" if result["comparable"]["verdict"] else "not comparable"
    return f"{work.part.title}: {shown}{lost}, {verdict}: {work.folder / RESULT}"


def waiting(work: BenchmarkPass) -> str:
    return (
        f"{work.part.title}: this share is done. The last share to be done scores; so does the same command without "
        "shard=…, which does what is left."
    )
