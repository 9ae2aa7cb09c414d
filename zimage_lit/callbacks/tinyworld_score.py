"""TinyWorld's own GenEval: pictures of held-out combinations, judged by its verifier, scored by GenEval's rules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from data_modules.tinyworld.captions import LANGUAGES
from data_modules.tinyworld.combinations import Metadata
from data_modules.tinyworld.prepare import checked_canvases
from data_modules.tinyworld.verifier import judge
from data_modules.tinyworld.world import Size, heldout_prompts
from evaluation.benchmarks import tinyworld
from zimage_lit.callbacks.sampling import SamplingSettings, draw_pictures, joins_in_drawing
from zimage_lit.callbacks.schedule import Scheduled
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import write_atomically


class TinyWorldScore(Scheduled):
    """Scores the averaged weights before the first step and after the last one (and in between if asked).

    prompts_per_task: pictures of each of the seven tasks, one a prompt, at each canvas.
    seed: of the prompts' choice and the noise.   every_n_steps: also score at these steps; None for start and end
    alone.   language: of the prompts, en or zh.
    canvases: [width, height] of the pictures in pixels; None: the size of `sampling` alone.
    at_start: whether untrained weights are scored too, or those that the run begins from.

    Writes `scores/step-….json` and logs `tinyworld/overall`, `tinyworld/<task>`, `tinyworld/word` and a table with one
    row a prompt; with several canvases also `tinyworld/overall_<width>x<height>`. The overall score is GenEval's: the
    unweighted mean of its six tasks; words are apart.
    """

    def __init__(
        self,
        prompts_per_task: int = 50,
        seed: int = 1000,
        every_n_steps: int | None = None,
        language: str = "en",
        sampling: SamplingSettings | None = None,
        canvases: list[tuple[int, int]] | None = None,
        at_start: bool = True,
    ) -> None:
        super().__init__(every_n_steps, at_start)
        if language not in LANGUAGES:
            raise UserError(f"TinyWorldScore: language must be {' or '.join(LANGUAGES)}, not {language}.")
        at_least_one("TinyWorldScore: prompts_per_task", prompts_per_task)
        self.sampling = sampling or SamplingSettings()
        self.canvases = checked_canvases(
            "TinyWorldScore: canvases",
            [(self.sampling.width, self.sampling.height)] if canvases is None else canvases,
        )
        self.prompts: list[Metadata] = []
        self.sizes: list[Size] = []  # of each prompt's picture
        for size in self.canvases:
            at_this_size = heldout_prompts(prompts_per_task, seed, language, size[0])
            self.prompts += at_this_size
            self.sizes += [size] * len(at_this_size)
        self.seed = seed
        self.history: list[dict[str, Any]] = []  # one summary a scoring: step, overall, tasks, word

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if any(summary["step"] == step for summary in self.history) or not joins_in_drawing(trainer):
            return
        texts = [metadata["prompt"] for metadata in self.prompts]
        seeds = [self.seed + place for place in range(len(texts))]
        pictures = draw_pictures(trainer, pl_module, self.sampling, texts, seeds, self.sizes)
        records = [
            judge(np.asarray(picture), metadata) for picture, metadata in zip(pictures, self.prompts, strict=True)
        ]
        summary, verdicts = summarise(records, step)
        if len(self.canvases) > 1:
            summary["canvases"] = {named(size): self.summary_at(size, records, step) for size in self.canvases}
        self.history.append(summary)
        if trainer.is_global_zero:
            self.write(trainer, summary, records, verdicts)
            self.log_summary(trainer, summary, verdicts, pictures)

    def summary_at(self, size: Size, records: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """The overall score and the tasks of the pictures of one size."""
        chosen = [record for record, own in zip(records, self.sizes, strict=True) if own == size]
        summary, _ = summarise(chosen, step)
        return {"overall": summary["overall"], "tasks": summary["tasks"]}

    def write(
        self,
        trainer: Trainer,
        summary: dict[str, Any],
        records: list[dict[str, Any]],
        verdicts: list[dict[str, Any]],
    ) -> None:
        judged = {
            **summary,
            "records": [
                {**record, **verdict, "canvas": named(size)}
                for record, verdict, size in zip(records, verdicts, self.sizes, strict=True)
            ],
        }
        path = Path(trainer.default_root_dir) / "scores" / f"step-{summary['step']:08d}.json"
        write_atomically(path, json.dumps(judged, indent=1) + "\n")

    def log_summary(
        self, trainer: Trainer, summary: dict[str, Any], verdicts: list[dict[str, Any]], pictures: list[Image.Image]
    ) -> None:
        step = summary["step"]
        metrics = {"tinyworld/overall": summary["overall"]["accuracy"]}
        metrics |= {f"tinyworld/{task}": score["accuracy"] for task, score in summary["tasks"].items()}
        metrics |= {
            f"tinyworld/overall_{canvas}": score["overall"]["accuracy"]
            for canvas, score in summary.get("canvases", {}).items()
        }
        table = {
            "prompt": [metadata["prompt"] for metadata in self.prompts],
            "correct": [int(verdict["correct"]) for verdict in verdicts],
            "image": pictures,
            "reason": [verdict["reason"] for verdict in verdicts],
            "task": [metadata["tag"] for metadata in self.prompts],
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
            if hasattr(logger, "log_table"):
                logger.log_table(table, f"scores/step-{step:08d}.json")
        shown = ", ".join(f"{task} {score['accuracy']:.2f}" for task, score in summary["tasks"].items())
        rank_zero_info(f"step {step}: TinyWorld overall {summary['overall']['accuracy']:.3f} ({shown})")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])


def named(size: Size) -> str:
    """96x64 for a picture of 96 by 64 pixels."""
    return f"{size[0]}x{size[1]}"


def is_right(record: Mapping[str, Any]) -> bool:
    """Whether a judged picture shows what its statement says."""
    return bool(tinyworld.verdict_on(record)["correct"])


def summarise(records: list[dict[str, Any]], step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(overall and tasks as {accuracy, n, ci_low, ci_high}; a verdict {correct, reason} for every record, in order)."""
    scored = tinyworld.score(records, mode="fixed")
    summary = {
        "step": step,
        "overall": {"accuracy": scored["overall"], "ci_low": scored["ci_low"], "ci_high": scored["ci_high"]},
        "tasks": scored["tasks"],
        "interval": scored["interval"],
    }
    return summary, scored["records"]
