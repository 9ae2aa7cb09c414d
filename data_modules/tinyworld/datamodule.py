"""TinyWorld as a LightningDataModule: prepares itself at first use."""

from data_modules.balancing import BalanceSettings
from data_modules.manifest import Verify
from data_modules.text_to_image import CaptionWeights, TextToImageDataModule

# Mostly GenEval's own phrasing, which scoring uses, and enough of the rest to understand it.
CAPTION_WEIGHTS: CaptionWeights = {
    "en": {"short": 0.6, "medium": 0.1, "tags": 0.05, "long": 0.05, "user": 0.05},
    "zh": {"short": 0.11, "medium": 0.01, "tags": 0.01, "long": 0.01, "user": 0.01},
}


class TinyWorldDataModule(TextToImageDataModule):
    """Text-to-image batches of TinyWorld; `val` holds held-out combinations only.

    Args:
        data_dir: where the data set is prepared, with its codec and text encoder; made if missing.
        num_samples: training samples to draw.
        world_seed: of the world: which samples are drawn at preparation.
        seed: of the order of the samples and the choice of captions in training.
        num_val_samples: validation samples to draw.
        canvases: [width, height] of the pictures in pixels, each as often as the others, mixed in a batch; multiples of
            16 from 48 up; None: 64x64 alone.
        task_weights: task -> share of the samples drawn, in proportion, none for those not named; None: those that
            make a balanced score (`world.TASK_WEIGHTS`).
        downscale: how much smaller the finished pictures are made, a side: the same scenes at a low resolution. 2 makes
            32x32 pixels of 64x64.
        batch_size, num_workers, caption_weights, shuffle, drop_last, verify, token_budget, balance: see
            TextToImageDataModule. A sample's concepts for `balance` are its task, counts, relations, classes, colours.

    Raises:
        UserError: see `prepare` and TextToImageDataModule.
    """

    def __init__(
        self,
        data_dir: str = "data/tinyworld",
        num_samples: int = 40_000,
        world_seed: int = 0,
        seed: int = 0,
        num_val_samples: int = 512,
        batch_size: int | None = 64,
        num_workers: int = 0,
        caption_weights: CaptionWeights | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        verify: Verify = "sha256",
        canvases: list[tuple[int, int]] | None = None,
        task_weights: dict[str, float] | None = None,
        downscale: int = 1,
        token_budget: int | None = None,
        balance: BalanceSettings | None = None,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            caption_weights=CAPTION_WEIGHTS if caption_weights is None else caption_weights,
            shuffle=shuffle,
            drop_last=drop_last,
            verify=verify,
            token_budget=token_budget,
            balance=balance,
        )
        self.canvases = canvases
        self.task_weights = task_weights
        self.downscale = downscale
        self.num_samples = num_samples
        self.world_seed = world_seed
        self.num_val_samples = num_val_samples

    def prepare_data(self) -> None:
        from data_modules.tinyworld.prepare import prepare

        prepare(
            self.data_dir,
            self.num_samples,
            self.world_seed,
            num_val_samples=self.num_val_samples,
            canvases=self.canvases,
            task_weights=self.task_weights,
            downscale=self.downscale,
        )
