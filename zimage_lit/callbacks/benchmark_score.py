"""A benchmark while the model is trained: a small slice of it, drawn, judged and scored by its own rules."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from evaluation.judging import ask_at_once, build_judges
from evaluation.suite import parts_of
from zimage_lit.callbacks.sampling import SamplingSettings, draw_pictures, joins_in_drawing
from zimage_lit.callbacks.schedule import Scheduled
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import write_atomically


class BenchmarkScore(Scheduled):
    """Scores the averaged weights on a slice of a benchmark, before the first step and after the last one, and between.

    benchmark: geneval, cvtg2k, longtext, oneig, dpg or tinyworld.   data: folder of the official files, with a folder a
        benchmark; tinyworld needs none.   language: en or zh; None: English.
    prompts: of each of the benchmark's groups, the first ones.   images_per_prompt: the first ones of its plan.
    judges: role -> class_path and init_args, as for `lightning run evaluate`; weights stay in memory once they are
        read.   every_n_steps: also score at these steps; None for start and end alone.   at_start: whether the weights
        are scored that training begins from.   sampling: how pictures are drawn.

    Writes `scores/<benchmark>-step-….json` and logs `<benchmark>/overall`, `<benchmark>/<sub-score>` and a table with
    one row a prompt. Raises UserError for settings, files and judges that cannot be used, before anything is trained.
    """

    def __init__(
        self,
        benchmark: str,
        data: str | None = None,
        language: str | None = None,
        prompts: int = 1,
        images_per_prompt: int = 1,
        judges: dict[str, dict[str, Any] | None] | None = None,
        every_n_steps: int | None = None,
        sampling: SamplingSettings | None = None,
        at_start: bool = True,
    ) -> None:
        super().__init__(every_n_steps, at_start)
        at_least_one("BenchmarkScore: prompts", prompts)
        at_least_one("BenchmarkScore: images_per_prompt", images_per_prompt)
        parts = parts_of([benchmark], language)
        if len({part.benchmark for part in parts}) > 1:
            raise UserError("BenchmarkScore: benchmark names one; give a callback for each.")
        self.part = parts[0]
        self.sampling = sampling or SamplingSettings()
        module = self.part.module
        if images_per_prompt > module.IMAGES_PER_PROMPT:
            raise UserError(
                f"BenchmarkScore: images_per_prompt={images_per_prompt} has no effect: the protocol has "
                f"{module.IMAGES_PER_PROMPT} at most."
            )
        every = self.part.prompts(Path(data) if data else None)
        self.judges = build_judges(judges or {}, module.ROLES_USED, module.OPTIONAL_ROLES)
        first = self.part.first_of_each_group(every, prompts)
        self.prompts = self.part.judged(first, images_per_prompt, self.judges)
        self.plans = [self.part.plan(prompt)[:images_per_prompt] for prompt in self.prompts]
        self.history: list[dict[str, Any]] = []  # the scores of each time, with the step

    @cached_property
    def records(self) -> dict[str, Any]:
        """Who judges, by role."""
        return {role: judge.record().identity for role, judge in self.judges.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            _ = self.records  # weights that are not there show now

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if any(scores["step"] == step for scores in self.history) or not joins_in_drawing(trainer):
            return
        pictures = self.draw(trainer, pl_module)
        if not trainer.is_global_zero:
            self.history.append({"step": step})
            return
        module = self.part.module
        records = ask_at_once(module, self.prompts, pictures, self.judges)
        scores: dict[str, Any] = module.score([record for own in records for record in own])
        verdicts = scores.pop("records")
        told = {"step": step, **scores}
        self.history.append(told)
        path = Path(trainer.default_root_dir) / "scores" / f"{self.part.name}-step-{step:08d}.json"
        whole = {**told, "verdicts": verdicts, "judges": self.records}
        write_atomically(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        self.log_scores(trainer, told, records, pictures)

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> list[list[Image.Image]]:
        """The pictures of each prompt, at the size of `sampling`."""
        planned = [image for plan in self.plans for image in plan]
        drawn = iter(
            draw_pictures(
                trainer,
                pl_module,
                self.sampling,
                [image.prompt for image in planned],
                [image.seed for image in planned],
                draws=[image.draw for image in planned],
            )
        )
        return [[next(drawn) for _ in plan] for plan in self.plans]

    def log_scores(
        self,
        trainer: Trainer,
        scores: dict[str, Any],
        records: list[list[dict[str, Any]]],
        pictures: list[list[Image.Image]],
    ) -> None:
        module, step, name = self.part.module, scores["step"], self.part.name
        metrics = {f"{name}/{key}": float(one["score"]) for key, one in scores["scores"].items()}
        if scores["overall"] is not None:  # OneIG-Bench has none without all judges
            metrics[f"{name}/overall"] = float(scores["overall"])
        verdicts = [[module.count(record, "official").verdict for record in own] for own in records]
        table = {
            "prompt": [prompt["prompt"] for prompt in self.prompts],
            "score": [module.prompt_score(own) for own in verdicts],
            "image": [own[0] for own in pictures],
            "group": [module.group(prompt) for prompt in self.prompts],
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
            if hasattr(logger, "log_table"):
                logger.log_table(table, f"scores/{name}-step-{step:08d}.json")
        shown = ", ".join(f"{key.partition('/')[2]} {value:.3f}" for key, value in metrics.items())
        rank_zero_info(f"step {step}: {self.part.title} {shown}")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
