"""How close the pictures that a network draws are to real ones of the same prompts, while it learns.

The losses of distillation do not show whether the student gets better; these distances do.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from data_modules.manifest import CLASSIFIER
from data_modules.remote import is_remote
from data_modules.tinyworld.combinations import Metadata, Split
from data_modules.tinyworld.prepare import checked_canvases
from data_modules.tinyworld.world import draw, draw_statement
from evaluation.fidelity.comparison import ComparisonSettings, Estimate, FidelityMetric, PictureSet, compare, share
from evaluation.fidelity.tinyworld_classifier import TinyWorldClassifier, as_input, judge, obtain
from zimage_lit.callbacks.sampling import SamplingSettings, draw_pictures, joins_in_drawing
from zimage_lit.callbacks.schedule import Scheduled
from zimage_lit.callbacks.tinyworld_score import is_right
from zimage_lit.components import LatentCodec
from zimage_lit.errors import UserError
from zimage_lit.files import write_atomically

BATCH = 256  # pictures that the classifier reads at once


class DistributionScore(Scheduled):
    """Compares pictures drawn with the averaged weights with TinyWorld's own, before the first step and after the last.

    num_prompts: of TinyWorld's, in the shares of its tasks.   pictures_per_prompt: drawn for each, and real ones.
    split: train, or heldout for combinations that training never sees.
    every_n_steps: also score at these steps; None for start and end alone.   at_start: whether the weights are scored
    that the run begins from.
    step_counts: numbers of inference steps at which pictures are scored besides that of `sampling`.
    real: what real pictures are. "reconstructed": after the stage's codec and back, as good as a network in its latents
    can draw; "rendered": as the world draws them, so that the codec's loss counts too.
    classifier: folder of the network whose features are compared, trained there if missing; None: beside the data set.
    comparison: of the sets; None for its defaults.   seed: of prompts, real pictures and noise.

    Logs `fidelity/kid`, `fidelity/fd`, `fidelity/sliced_wasserstein`, `fidelity/precision`, `fidelity/recall` and
    `fidelity/diversity` (see `evaluation.fidelity.comparison.compare`), and `fidelity/accuracy`, the share of pictures
    in which the classifier finds what was asked for; for other step counts with `_<count>_steps` behind; and as
    `fidelity/<metric>_floor` what two sets of real pictures have. Writes all with 95 % intervals to
    `fidelity/step-….json`.
    """

    def __init__(
        self,
        num_prompts: int = 128,
        pictures_per_prompt: int = 4,
        split: Split = "train",
        seed: int = 2000,
        every_n_steps: int | None = None,
        at_start: bool = True,
        sampling: SamplingSettings | None = None,
        step_counts: list[int] | None = None,
        real: Literal["reconstructed", "rendered"] = "reconstructed",
        classifier: str | None = None,
        comparison: ComparisonSettings | None = None,
    ) -> None:
        super().__init__(every_n_steps, at_start)
        self.sampling = sampling or SamplingSettings()
        self.samplings = {
            count: replace(self.sampling, num_inference_steps=count)
            for count in sorted({self.sampling.num_inference_steps, *(step_counts or ())})
        }
        size = self.sampling.width, self.sampling.height
        self.size = checked_canvases("DistributionScore: sampling's [width, height]", [size])[0]
        if min(num_prompts, pictures_per_prompt) < 2:
            raise UserError(
                "DistributionScore needs two prompts with two pictures each at least: set num_prompts, which is "
                f"{num_prompts}, and pictures_per_prompt, which is {pictures_per_prompt}, to 2 or more."
            )
        self.statements: list[Metadata] = [
            draw(index, seed, split, size=self.size).metadata for index in range(num_prompts)
        ]
        self.pictures_per_prompt = pictures_per_prompt
        self.split = split
        self.seed = seed
        self.real = real
        self.classifier_folder = classifier
        self.comparison = comparison or ComparisonSettings()
        self.classifier: TinyWorldClassifier | None = None
        self.real_pictures: PictureSet | None = None
        self.floor: dict[str, Estimate] = {}  # two sets of real pictures, compared
        self.history: list[dict[str, Any]] = []  # one entry a scoring: step, scores by step count, without intervals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The classifier is there, or trained, before the run begins."""
        if stage == "fit" and trainer.is_global_zero and self.classifier is None:
            self.classifier = obtain(self.folder(trainer))

    def folder(self, trainer: Trainer) -> Path:
        if self.classifier_folder is not None:
            return Path(self.classifier_folder)
        data_dir = getattr(getattr(trainer, "datamodule", None), "data_dir", None)
        if data_dir is None or is_remote(data_dir):
            raise UserError(
                f"DistributionScore has no folder for its classifier (the data are in {data_dir}): name one as "
                "classifier, in the callback's init_args."
            )
        return Path(data_dir) / CLASSIFIER

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if any(entry["step"] == step for entry in self.history) or not joins_in_drawing(trainer):
            return
        prompts = [self.statements[number]["prompt"] for number in self.numbers()]
        seeds = [self.seed + place for place in range(len(prompts))]
        scores: dict[int, dict[str, Estimate]] = {}
        for count, sampling in self.samplings.items():
            pictures = draw_pictures(trainer, pl_module, sampling, prompts, seeds)
            if trainer.is_global_zero:
                scores[count] = self.compared(as_input(pictures), pl_module)
        self.history.append({"step": step, "scores": {str(count): values_of(found) for count, found in scores.items()}})
        if trainer.is_global_zero:
            self.write(trainer, step, scores)
            self.log_scores(trainer, step, scores)

    def numbers(self) -> list[int]:
        """The prompt's number for every picture, in order."""
        return [number for number in range(len(self.statements)) for _ in range(self.pictures_per_prompt)]

    def compared(self, images: Tensor, pl_module: Any) -> dict[str, Estimate]:
        """Drawn pictures, float (N, 3, H, W), against real ones, which are made at the first call."""
        if self.real_pictures is None:
            self.real_pictures = self.collected(self.real_images(0, pl_module))
            others = self.collected(self.real_images(self.pictures_per_prompt, pl_module))
            self.floor = compare(others, self.real_pictures, self.comparison)
        found = compare(self.collected(images), self.real_pictures, self.comparison)
        return found | {"accuracy": share(self.right(images), np.array(self.numbers()), self.comparison)}

    def right(self, images: Tensor) -> np.ndarray:
        """Whether the classifier finds in each picture what its prompt asks for, by GenEval's rules: (N,) bool."""
        assert self.classifier is not None  # setup makes it
        records: list[dict[str, Any]] = []
        asked = [self.statements[number] for number in self.numbers()]
        for start in range(0, len(images), BATCH):
            places = slice(start, start + BATCH)
            records += judge(self.classifier(images[places]), asked[places])
        return np.array([is_right(record) for record in records])

    def collected(self, images: Tensor) -> PictureSet:
        assert self.classifier is not None  # setup makes it
        return picture_set(images, self.numbers(), self.classifier, self.comparison)

    def real_images(self, first: int, pl_module: Any) -> Tensor:
        """As many real pictures of each prompt as are drawn, from the world's number `first` on: (N, 3, H, W)."""
        each = range(first, first + self.pictures_per_prompt)
        samples = [draw_statement(statement, i, self.seed, self.size) for statement in self.statements for i in each]
        images = as_input([sample.image for sample in samples])
        return images if self.real == "rendered" else reconstructed(images, pl_module.codec)

    def write(self, trainer: Trainer, step: int, scores: dict[int, dict[str, Estimate]]) -> None:
        assert self.classifier is not None
        content = {
            "step": step,
            "num_prompts": len(self.statements),
            "pictures_per_prompt": self.pictures_per_prompt,
            "split": self.split,
            "real": self.real,
            "seed": self.seed,
            "classifier": {"fingerprint": self.classifier.fingerprint(), **self.classifier.report},
            "interval": f"95 %, bootstrap of {self.comparison.resamples} resamples of the prompts",
            "scores": {str(count): estimates_of(found) for count, found in scores.items()},
            "floor": estimates_of(self.floor),
        }
        path = Path(trainer.default_root_dir) / "fidelity" / f"step-{step:08d}.json"
        write_atomically(path, json.dumps(content) + "\n")

    def log_scores(self, trainer: Trainer, step: int, scores: dict[int, dict[str, Estimate]]) -> None:
        served = self.sampling.num_inference_steps
        metrics = {f"fidelity/{name}_floor": value for name, value in values_of(self.floor).items()}
        for count, found in scores.items():
            ending = "" if count == served else f"_{count}_steps"
            metrics |= {f"fidelity/{name}{ending}": value for name, value in values_of(found).items()}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values_of(found).items())
            rank_zero_info(f"step {step}: fidelity with {count} inference steps: {shown}")
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])


def picture_set(
    images: Tensor, prompts: Sequence[int] | np.ndarray, classifier: TinyWorldClassifier, settings: ComparisonSettings
) -> PictureSet:
    """What comparisons need of pictures, float (N, 3, H, W) in [-1, 1]; prompts: the number of each one's."""
    metric = FidelityMetric(classifier.features, settings)
    numbers = torch.as_tensor(np.asarray(prompts))
    for places in torch.arange(len(images)).split(BATCH):
        metric.update(images[places], numbers[places], real=False)
    return metric.pictures(real=False)


@torch.no_grad()
def reconstructed(images: Tensor, codec: LatentCodec) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] after a codec and back, with the 256 levels that drawn pictures have."""
    decoded = torch.cat([codec.decode(codec.encode(part)).cpu() for part in images.split(BATCH)])
    return ((decoded + 1) * 127.5).round() / 127.5 - 1


def values_of(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def estimates_of(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.as_dict() for name, estimate in estimates.items()}
