"""What people do wrong with real runs: one sentence each, and nothing that was made is lost."""

import resource
from pathlib import Path

import pytest
import torch
from lock_holder import held_by_another

from zimage_lit import cli
from zimage_lit.run_folder import last_checkpoint, read_status

SMALL = [
    "quickstart",
    "trainer.max_steps=4",
    "trainer.accelerator=cpu",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "trainer.callbacks.samples=null",
    "trainer.callbacks.score.init_args.prompts_per_task=1",
    "trainer.callbacks.score.init_args.sampling.num_inference_steps=1",
    "trainer.callbacks.checkpoint.init_args.every_n_steps=2",
    "model.init_args.backbone={preset: tiny, n_layers: 1}",
    "data.init_args.num_samples=64",
    "data.init_args.num_val_samples=8",
    "data.init_args.batch_size=8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds one finished run, `base`, and checkpoints that are none."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["run", *SMALL, "run.name=base"]) == 0
    (folder / "torn.ckpt").write_bytes(last_checkpoint(folder / "outputs/base").read_bytes()[:10_000])
    (folder / "text.ckpt").write_text("once upon a time")
    torch.save({"weights": torch.ones(2)}, folder / "foreign.ckpt")
    (folder / "a_file").write_text("")
    return folder


def error_of(words: list[str], capsys: pytest.CaptureFixture) -> str:
    assert cli.main(["run", *SMALL, *words]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.resume=absent.ckpt"], "there is no absent.ckpt"),
        (["run.resume=outputs"], "there is no checkpoint file outputs"),
        (["run.resume=torn.ckpt"], "torn.ckpt cannot be read as a checkpoint"),
        (["run.resume=text.ckpt"], "text.ckpt cannot be read as a checkpoint"),
        (["run.resume=foreign.ckpt"], "foreign.ckpt is not a checkpoint of a training run"),
        (
            ["run.resume=outputs/base/checkpoints/last.ckpt", "model.init_args.backbone.n_layers=2"],
            "of another backbone: 15 tensors do not fit, the first is backbone.layers.1.",
        ),
        (
            ["run.resume=outputs/base/checkpoints/last.ckpt", "model.init_args.optimizer.name=adamw"],
            "was trained with optimizer.name=muon, not adamw",
        ),
        (["run.output_dir=a_file"], "cannot write a_file/config.yaml (File exists)"),
    ],
)
def test_a_run_that_cannot_begin_says_why(folder, monkeypatch, capsys, words: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    before = last_checkpoint(folder / "outputs/base").read_bytes()
    assert message in error_of(["run.name=next", *words], capsys)
    assert last_checkpoint(folder / "outputs/base").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.init_args.backbone=small",
            "model.init_args.backbone=small is neither a preset (tiny, z-image-6b) nor a folder",
        ),
        ("model.init_args.backbone.n_layerz=6", "model.init_args.backbone.n_layerz is not a setting of S3DiTConfig"),
        ("model.init_args.backbone.dim=100", "S3DiTConfig: axes_dims [8, 12, 12] must add up to the head size"),
        ("model.init_args.optimizer.lr=-1", "optimizer.lr must be 0 or more, not -1"),
        ("model.init_args.optimizer.betas=[2, 3]", "optimizer.betas must lie in [0, 1), not [2.0, 3.0]"),
        ("model.init_args.optimizer.muon_ns_steps=0", "optimizer.muon_ns_steps must be at least 1"),
        ("model.init_args.optimizer.warmup_steps=-5", "optimizer.warmup_steps must be 0 or more"),
        ("model.init_args.timesteps.shift=0", "shift must be a positive number"),
        ("trainer.callbacks.ema.init_args.decay=2", "EMA: decay must lie in [0, 1), not 2"),
        ("trainer.callbacks.report.init_args.every_n_steps=0", "HTMLReport: every_n_steps must be at least 1"),
        ("trainer.callbacks.score.init_args.every_n_steps=0", "TinyWorldScore: every_n_steps must be at least 1"),
        ("trainer.callbacks.score.init_args.prompts_per_task=0", "TinyWorldScore: prompts_per_task must be at least 1"),
        ("trainer.callbacks.score.init_args.language=fr", "TinyWorldScore: language must be en or zh, not fr"),
        ("trainer.callbacks.score.init_args.sampling.shift=0", "shift must be"),
        ("data.init_args.num_workers=-1", "data.init_args.num_workers is -1: set it to 0 or more"),
        ("run.name=", "run.name and run.output_dir must not be empty"),
    ],
)
def test_a_value_out_of_its_range_is_one_sentence(folder, monkeypatch, capsys, setting: str, message: str) -> None:
    monkeypatch.chdir(folder)
    line = error_of(["run.name=range", setting], capsys)
    assert message in line and len(line) < 300 and "Union" not in line


def test_a_beginning_that_is_not_there_is_named_before_data_are_drawn(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    words = ["run.name=next", "model.init_args.init_from=outputs/bas", "data.init_args.data_dir=none_yet"]
    assert "model.init_args.init_from: there is no outputs/bas: run what makes it first" in error_of(words, capsys)
    assert not Path("none_yet").exists()


def test_two_commands_do_not_work_on_one_run_at_once(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    with held_by_another(folder / "outputs/.twice.lock"):
        message = error_of(["run.name=twice"], capsys)
        assert "another command is at work in outputs/twice: wait for its end, stop it, or give another" in message
        assert not Path("outputs/twice").exists()
    assert cli.main(["run", *SMALL, "run.name=twice"]) == 0


def test_sizes_on_top_of_a_presets_name_are_refused(folder, monkeypatch, capsys) -> None:
    """They would otherwise be completed by the sizes of the 6 B model."""
    monkeypatch.chdir(folder)
    words = ["run.name=sizes", "model.init_args.backbone=tiny", "model.init_args.backbone.n_layers=6"]
    assert "model.init_args.backbone.preset must be tiny, z-image-6b" in error_of(words, capsys)


def test_a_decay_without_an_end_is_refused(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    words = ["run.name=endless", "trainer.max_steps=-1", "trainer.max_time=00:00:01:00", "trainer.max_epochs=-1"]
    assert "optimizer.decay=linear needs an end of training" in error_of(words, capsys)


def test_what_fails_after_the_last_step_is_done_again_by_the_same_command(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    precious = Path("outputs/late/pipeline/notes.txt")
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    assert "pipeline is not empty" in error_of(["run.name=late"], capsys)
    assert read_status(Path("outputs/late"))["status"] == "failed" and precious.read_text() == "precious"
    assert torch.load(last_checkpoint(Path("outputs/late")), weights_only=True)["global_step"] == 3
    precious.unlink()
    assert cli.main(["run", *SMALL, "run.name=late"]) == 0
    assert Path("outputs/late/pipeline/model_index.json").is_file() and Path("outputs/late/report.html").is_file()


def test_a_disk_that_fills_up_anywhere_is_one_sentence(folder, monkeypatch, capsys) -> None:
    """The limit on file sizes makes the very write fail half-way, as a full disk does."""
    monkeypatch.chdir(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, file in ((100, "config.yaml"), (6_000, "scores/step-00000000.json")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            words = [f"run.name=full-{size}", "trainer.callbacks.score.init_args.prompts_per_task=5"]
            code = cli.main(["run", *SMALL, *words])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code in (1, 2)
        assert f"cannot write outputs/full-{size}/{file} (File too large)" in capsys.readouterr().err
