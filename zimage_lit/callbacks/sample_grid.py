"""Pictures of fixed prompts and seeds while the model learns, step 0 included."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning import LightningModule, Trainer
from PIL import Image

from zimage_lit.callbacks.sampling import SamplingSettings, checked_sizes, draw_pictures, joins_in_drawing
from zimage_lit.callbacks.schedule import Scheduled
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import write_atomically
from zimage_lit.grids import encoded, labelled_grid


class SampleGrid(Scheduled):
    """Draws `prompts` every `every_n_steps`: one grid on disk (`samples/step-….png`), one image per prompt in MLflow.

    Keys (`samples/prompt_00` …) and steps are the same in every run, so two runs line up in the comparison view.

    canvases: [width, height] in pixels, which the prompts take in turn; None: the size of `sampling` for all.
    step_counts: numbers of inference steps, for each of which all prompts are drawn (samples/prompt_00/4_steps …), one
        row of the grid after the other; None: that of `sampling`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        every_n_steps: int = 1000,
        seed: int = 0,
        sampling: SamplingSettings | None = None,
        canvases: list[tuple[int, int]] | None = None,
        step_counts: list[int] | None = None,
    ) -> None:
        super().__init__(at_least_one("SampleGrid: every_n_steps", every_n_steps))
        if not prompts:
            raise UserError("SampleGrid: prompts is empty, give at least one prompt.")
        self.prompts = list(prompts)
        self.seed = seed
        self.sampling = sampling or SamplingSettings()
        sizes = checked_sizes("SampleGrid: canvases", canvases, self.sampling)
        self.sizes = [sizes[place % len(sizes)] for place in range(len(self.prompts))]
        if step_counts is not None and not step_counts:
            raise UserError("SampleGrid: step_counts is empty, give at least one number of steps, or null.")
        self.step_counts = step_counts
        for steps in step_counts or []:
            at_least_one("SampleGrid: step_counts", steps)
        self._drawn_step = -1

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._drawn_step or not joins_in_drawing(trainer):
            return
        self._drawn_step = step
        seeds = [self.seed + i for i in range(len(self.prompts))]
        rows: dict[int | None, list[Image.Image]] = {}
        counts: Sequence[int | None] = self.step_counts or [None]
        for steps in counts:
            sampling = replace(self.sampling, num_inference_steps=steps) if steps else self.sampling
            rows[steps] = draw_pictures(trainer, pl_module, sampling, self.prompts, seeds, self.sizes)
        if trainer.is_global_zero:
            self.write(trainer, rows, step)

    def write(self, trainer: Trainer, rows: dict[int | None, list[Image.Image]], step: int) -> None:
        """rows: number of steps (None where that goes without saying) -> a picture for each prompt."""
        pictures = [picture for row in rows.values() for picture in row]
        labels = [f"{steps} steps: {prompt}" if steps else prompt for steps in rows for prompt in self.prompts]
        columns = len(self.prompts) if self.step_counts else None
        grid = encoded(labelled_grid(pictures, labels, columns), "PNG")
        write_atomically(Path(trainer.default_root_dir) / "samples" / f"step-{step:08d}.png", grid)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                for steps, row in rows.items():
                    for place, picture in enumerate(row):
                        name = f"samples/prompt_{place:02d}"
                        logger.log_image(f"{name}/{steps}_steps" if steps else name, picture, step)
