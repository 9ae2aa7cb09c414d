"""What the throughput callback counts, against sums written out and hand-made clocks."""

import csv
import os
from pathlib import Path

import lightning
import pytest
import torch

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.flops import TrainingWork, forward_flops
from zimage_lit.callbacks import throughput
from zimage_lit.callbacks.throughput import BatchRecord, FetchClock, Forward, Throughput, Window
from zimage_lit.errors import UserError
from zimage_lit.hardware import peak_flops

CONFIG = S3DiTConfig(
    dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
    axes_dims=[8, 12, 12], axes_lens=[1536, 64, 64], pad_multiple=8,
)  # fmt: skip
GRIDS, CAPTIONS = [(4, 4), (4, 3)], [5, 9]  # patches, tokens
IMAGES = [rows * columns for rows, columns in GRIDS]
REAL, PACKED = 16 + 12 + 5 + 9, 16 + 16 + 8 + 16


def example(requires_grad: bool = False):
    latents = [torch.randn(16, 2 * rows, 2 * columns, requires_grad=requires_grad) for rows, columns in GRIDS]
    captions = [torch.randn(length, 64, requires_grad=requires_grad) for length in CAPTIONS]
    return latents, torch.rand(len(latents)), captions


class Stage(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = S3DiT(CONFIG)

    def training_step(self, batch, batch_idx):
        self.backbone.eval()
        with torch.no_grad():
            self.backbone(*example())  # pictures drawn on the way are no training
        self.backbone.train()
        return torch.stack([x.square().mean() for x in self.backbone(*example())]).mean()

    def validation_step(self, batch, batch_idx):
        self.backbone(*example())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(module, callback, folder, steps=9, **settings) -> list[dict[str, str]]:
    """The rows of the run's metrics."""
    logger = lightning.pytorch.loggers.CSVLogger(folder)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, logger=logger,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback], log_every_n_steps=4, **settings,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.zeros(100), batch_size=1)
    trainer.fit(module, data, data)
    if trainer.global_rank:
        return []
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_everything_is_logged_and_agrees_with_itself(tmp_path):
    module = Stage()
    rows = fit(module, Throughput(peak_tflops=0.5), tmp_path, val_check_interval=2, limit_val_batches=1)
    assert [row["step"] for row in rows] == ["3", "7"]
    for row in rows:
        value = {name.removeprefix("throughput/"): float(number) for name, number in row.items() if number}
        assert value["tokens_per_second"] / value["images_per_second"] == pytest.approx(REAL / 2)
        assert value["padding"] == pytest.approx(1 - REAL / PACKED)
        flops = TrainingWork(module.backbone).flops(IMAGES, CAPTIONS)[0]
        assert value["tflops"] == pytest.approx(value["images_per_second"] / 2 * flops / 1e12)
        assert value["mfu"] == pytest.approx(value["tflops"] / 0.5) and "hfu" not in value
        assert 0 <= value["data_wait"] < 1 and 0 <= value["pause"] < 1
        assert 0.05 < value["peak_memory_gib"] < 100


def test_accumulated_batches_are_counted_and_logged_once_a_step(tmp_path, monkeypatch):
    windows, original = [], Throughput.window
    monkeypatch.setattr(Throughput, "window", lambda *a: windows.append(original(*a)) or windows[-1])
    monkeypatch.setattr(throughput, "PAUSE", 1e9)
    fit(Stage(), Throughput(), tmp_path, steps=8, accumulate_grad_batches=3)
    # all batches until then but the last, whose end is not known yet
    assert [window.images for window in windows] == [2 * (4 * 3 - 1), 2 * 4 * 3]


def test_a_device_without_a_known_peak_has_no_mfu(tmp_path):
    (row, *_) = fit(Stage(), Throughput(), tmp_path)
    assert row["throughput/tflops"] and not {"throughput/mfu", "throughput/hfu"} & row.keys()


def test_recomputation_is_work_done_and_not_the_models_own(tmp_path):
    module = Stage()
    module.parallelize = type("Settings", (), {"activation_checkpointing": "full"})()
    (row, *_) = fit(module, Throughput(peak_tflops=0.5), tmp_path)
    assert float(row["throughput/hfu"]) / float(row["throughput/mfu"]) == pytest.approx(4 / 3)


def test_a_module_of_another_kind_has_its_memory_and_waiting_measured(tmp_path):
    class Line(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[:, None]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    (row, *_) = fit(Line(), Throughput(), tmp_path, limit_val_batches=0)
    assert {name for name in row if name.startswith("throughput/")} == {
        "throughput/data_wait", "throughput/pause", "throughput/peak_memory_gib"
    }  # fmt: skip


def test_waiting_and_pauses_are_taken_apart():
    """Steps of 1 s; the third waits 10 s for its data, the fifth is followed by 20 s of validation."""
    callback = Throughput()
    work = TrainingWork(S3DiT(CONFIG))
    began, waited = [0.0, 1.0, 2.0, 13.0, 14.0, 35.0, 36.0], [0.0, 0.0, 0.0, 10.0, 10.0, 10.0, 10.0]
    forwards = [Forward(work, IMAGES, CAPTIONS, learns=True), Forward(work, IMAGES, CAPTIONS, learns=False)]
    callback._records = [BatchRecord(b, w, forwards) for b, w in zip(began, waited, strict=True)]
    window = callback.window(torch.device("cpu"))
    assert (window.seconds, window.pauses, window.waited) == (15.0, 21.0, 10.0)
    assert (window.images, window.tokens, window.packed_tokens) == (5 * 2, 5 * REAL, 5 * PACKED)
    assert window.model_flops == 5 * (3 + 1) * forward_flops(CONFIG, IMAGES, CAPTIONS)


def test_the_clock_measures_fetching_alone_and_the_users_profiler_goes_on(monkeypatch):
    clock_times = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(throughput, "time", type("Clock", (), {"perf_counter": lambda: next(clock_times)}))
    inner = lightning.pytorch.profilers.SimpleProfiler()
    clock = FetchClock(inner)
    fetching = "[_TrainingEpochLoop].train_dataloader_next"
    for name in (fetching, "run_training_batch", fetching):
        with clock.profile(name):
            pass
    assert clock.waited == 3.5
    assert "run_training_batch" in inner.recorded_durations and "run_training_batch" in clock.summary()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA T4", None),
        ("Imaginary 9000", None),
    ],
)
def test_peaks_are_found_by_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_peak_must_be_positive():
    with pytest.raises(UserError, match="peak_tflops must be more than 0"):
        Throughput(peak_tflops=0)


# ---------------------------------------------------------------------------------------------------- two ranks


def train_rank(folder: Path) -> None:
    """What a launcher would start on each rank, with windows whose sums are known."""
    rank = int(os.environ["LOCAL_RANK"])
    Throughput.window = lambda *_: Window(  # type: ignore[method-assign]
        seconds=1.0 + rank, pauses=2.0, waited=0.5 * rank, images=10 * (rank + 1), tokens=300, packed_tokens=400,
        model_flops=1e12, executed_flops=1e12, peak_memory=2**30 * (1 + rank),
    )  # fmt: skip
    rows = fit(Stage(), Throughput(peak_tflops=10), folder, strategy="ddp", devices=2, use_distributed_sampler=False)
    if rank == 0:
        value = {name.removeprefix("throughput/"): float(number) for name, number in rows[0].items() if number}
        expected = {"images_per_second": 15.0, "tokens_per_second": 300.0, "padding": 0.25, "data_wait": 0.25,
                    "pause": 0.5, "tflops": 0.5, "mfu": 0.05, "peak_memory_gib": 2.0}  # fmt: skip
        assert {name: value[name] for name in expected} == pytest.approx(expected)


def test_two_ranks_are_summed_over_the_time_of_the_slower(pair, tmp_path):
    pair(train_rank, tmp_path)
