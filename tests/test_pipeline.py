import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_lit import cli
from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.components import PatchPCACodec, Qwen3TextEncoder, build_tiny_qwen3
from zimage_lit.config import compose, to_yaml
from zimage_lit.errors import UserError
from zimage_lit.pipeline import (
    SamplingDefaults,
    ZImagePipeline,
    generate_task,
    load_pipeline,
    read_prompts,
    to_picture,
)

PROMPTS = ["a red circle", "two blue squares and a green triangle left of them", "the word CAT"]
QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0}


def with_random_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that let every part of the network speak, the gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """A pipeline of the embedded parts: tiny backbone, PatchPCACodec, tiny Qwen3."""
    root = tmp_path_factory.mktemp("own")
    config = S3DiTConfig(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
        axes_dims=[8, 8, 8], axes_lens=[1536, 64, 64], pad_multiple=8,
    )  # fmt: skip
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = ZImagePipeline(
        with_random_weights(S3DiT(config)),
        build_tiny_qwen3(root / "qwen", PROMPTS, hidden_size=64),
        PatchPCACodec.fit(images, root / "codec"),
        shift=2.0,
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=2.0,
    )
    pipeline.save_pretrained(root / "pipeline")
    return root / "pipeline"


@pytest.fixture
def own(own_folder):
    return ZImagePipeline.from_pretrained(own_folder, device="cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """diffusers' pipeline of tiny parts, and the folder that diffusers saved it to."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from diffusers import ZImagePipeline as DiffusersPipeline
    from transformers import AutoTokenizer, Qwen3Model

    root = tmp_path_factory.mktemp("published")
    build_tiny_qwen3(root / "qwen", PROMPTS, hidden_size=64)
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64,
        axes_dims=[8, 12, 12], axes_lens=[1536, 64, 64],
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = DiffusersPipeline(
        FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae.eval(),
        Qwen3Model.from_pretrained(root / "qwen").eval(),
        AutoTokenizer.from_pretrained(root / "qwen"),
        with_random_weights(transformer).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "pipeline")
    return pipeline, root / "pipeline"


def pixels(pictures):
    return [np.asarray(picture) for picture in pictures]


# ----------------------------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg_truncation": 0.1}, {"cfg_normalization": 1.0}],
    ids=["guidance", "truncation", "renormalisation"],
)
def test_a_folder_saved_by_diffusers_gives_the_pictures_of_diffusers(published, settings):
    theirs, folder = published
    ours = ZImagePipeline.from_pretrained(folder, device="cpu")
    common = {"height": 48, "width": 32, "num_inference_steps": 4, **settings}
    seeds = [3, 4, 5]

    def run_theirs(output_type):
        return theirs(
            list(PROMPTS),
            negative_prompt=["blurred"] * 3,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type=output_type,
            **common,
        ).images

    latents = ours.latents(PROMPTS, ["blurred"] * 3, seeds, guidance_scale=4.0, **common)
    expected = run_theirs("latent")
    print("largest latent difference", float((torch.stack(latents) - expected).abs().max()))
    torch.testing.assert_close(torch.stack(latents), expected, atol=1e-4, rtol=1e-4)
    pictures = ours(PROMPTS, negative_prompt="blurred", seed=seeds, guidance_scale=4.0, **common)
    for ours_one, theirs_one in zip(pixels(pictures), pixels(run_theirs("pil")), strict=True):
        assert np.abs(ours_one.astype(int) - theirs_one.astype(int)).max() <= 1


def test_a_fine_tune_begins_from_a_published_folder(published):
    given = [f"model.init_args.init_from={published[1]}", "data.init_args.data_dir=data", "trainer.logger=false"]
    prompts = "trainer.callbacks.samples.init_args.prompts=[a red circle]"
    module = cli.build(compose("finetune", [*given, prompts, "trainer.accelerator=cpu"])).model
    module.configure_model()
    pictures = [torch.full((3, 32, 48), 200, dtype=torch.uint8), torch.zeros((3, 64, 32), dtype=torch.uint8)]
    losses = module.losses({"images": pictures, "captions": PROMPTS[:2]}, "train", 0)
    assert losses.shape == (2,) and losses.isfinite().all()
    losses.sum().backward()
    assert module.backbone.config.dim == 64 and all(p.grad is not None for p in module.backbone.layers.parameters())


def test_a_published_folder_sets_the_defaults_of_its_model(published):
    pipeline = ZImagePipeline.from_pretrained(published[1], device="cpu")
    assert pipeline.defaults == SamplingDefaults(
        shift=6.0, height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0
    )
    assert SamplingDefaults.published(3.0) == SamplingDefaults(3.0, 1024, 1024, 8, 1.0)


def test_diffusers_loads_what_we_save_from_published_parts(published, tmp_path):
    from diffusers import ZImagePipeline as DiffusersPipeline

    theirs, folder = published
    ZImagePipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "again")
    again = DiffusersPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.shift == 6.0
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    results = [p(["a red circle"], generator=torch.Generator().manual_seed(0), **call).images for p in (theirs, again)]
    assert torch.equal(*results)


# ----------------------------------------------------------------------------------------- same seed, same picture


def test_a_picture_does_not_depend_on_what_it_is_asked_for_together_with(own):
    together = pixels(own(PROMPTS, seed=[7, 8, 9], **QUICK))
    backwards = pixels(own(PROMPTS[::-1], seed=[9, 8, 7], **QUICK))[::-1]
    alone = [pixels(own(prompt, seed=seed, **QUICK))[0] for prompt, seed in zip(PROMPTS, (7, 8, 9), strict=True)]
    for a, b, c in zip(together, backwards, alone, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_one_seed_draws_several_pictures(own):
    several = pixels(own([PROMPTS[0]] * 3, seed=7, draw=[0, 1, 2], **QUICK))
    assert np.array_equal(several[0], pixels(own(PROMPTS[0], seed=7, **QUICK))[0])
    assert not np.array_equal(several[1], several[2])
    assert np.array_equal(several[2], pixels(own(PROMPTS[0], seed=7, draw=2, **QUICK))[0])
    with pytest.raises(UserError, match="draw has 2 entries for 1 prompts"):
        own(PROMPTS[0], draw=[0, 1], **QUICK)


def test_one_seed_for_several_prompts_is_the_seed_of_each(own):
    together = pixels(own(PROMPTS, seed=7, **QUICK))
    assert np.array_equal(together[2], pixels(own(PROMPTS[2], seed=7, **QUICK))[0])


@pytest.mark.parametrize("batch_size", [2, 3])
def test_computing_pictures_together_changes_them_by_rounding_at_most(own, batch_size):
    negatives, seeds = [""] * 3, [7, 8, 9]
    alone = own.latents(PROMPTS, negatives, seeds, height=32, width=48, **QUICK)
    together = own.latents(PROMPTS, negatives, seeds, height=32, width=48, batch_size=batch_size, **QUICK)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    pairs = zip(pixels(own(PROMPTS, **QUICK)), pixels(own(PROMPTS, batch_size=batch_size, **QUICK)), strict=True)
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in pairs)


def test_prompt_seed_guidance_and_negative_prompt_all_matter(own):
    base = pixels(own("a red circle", seed=1, **QUICK))[0]
    others = {
        "prompt": own("two blue squares", seed=1, **QUICK),
        "seed": own("a red circle", seed=2, **QUICK),
        "guidance_scale": own("a red circle", seed=1, num_inference_steps=3, guidance_scale=1.0),
        "negative_prompt": own("a red circle", seed=1, negative_prompt="the word CAT", **QUICK),
        "num_inference_steps": own("a red circle", seed=1, num_inference_steps=4, guidance_scale=3.0),
        "solver": own("a red circle", seed=1, solver="heun", **QUICK),
        "eta": own("a red circle", seed=1, solver="cps", eta=0.3, **QUICK),
        "renoise": own("a red circle", seed=1, solver="renoise", **QUICK),
    }
    for name, pictures in others.items():
        assert not np.array_equal(base, pixels(pictures)[0]), name


# ----------------------------------------------------------------------------------------- loading and saving


def test_saving_and_loading_keeps_pictures_defaults_and_parts(own, own_folder, tmp_path):
    own.save_pretrained(tmp_path / "copy")
    again = ZImagePipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert again.defaults == own.defaults == SamplingDefaults(2.0, 32, 48, 4, 2.0)
    assert isinstance(again.codec, PatchPCACodec) and isinstance(again.text_encoder, Qwen3TextEncoder)
    (picture,), (expected,) = again("a red circle"), own("a red circle")
    assert picture.size == (48, 32) and np.array_equal(picture, expected)
    files = {path.relative_to(own_folder) for path in own_folder.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("writer", ["shutil.copytree", "zimage_lit.backbone.checkpoints.write_tensors"])
def test_a_save_that_fails_leaves_the_older_pipeline_alone(own, own_folder, tmp_path, monkeypatch, writer):
    shutil.copytree(own_folder, tmp_path / "pipeline")
    before = {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}

    def full_disk(_, path, *__, **___):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writer, full_disk)
    named = rf"Cannot save the pipeline to {tmp_path}/pipeline \(.*No space left on device.*nothing there was changed"
    with pytest.raises(UserError, match=named) as refusal:
        own.save_pretrained(tmp_path / "pipeline")
    assert "partial" not in str(refusal.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_saving_does_not_replace_a_folder_that_is_no_pipeline(own, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no pipeline"):
        own.save_pretrained(tmp_path)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "There is no folder"),
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: edit(folder / "model_index.json", _class_name="FluxPipeline"), 'describes a "FluxPipeline"'),
        (
            lambda folder: edit(folder / "model_index.json", vae=["diffusers", "AsymmetricVAE"]),
            "known are AutoencoderKL",
        ),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks its vae/ folder"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", use_dynamic_shifting=True), "no use_dynamic"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_spoilt_folder_is_named_in_one_sentence(own_folder, tmp_path, spoil, message):
    shutil.copytree(own_folder, tmp_path / "pipeline")
    spoil(tmp_path / "pipeline")
    with pytest.raises(UserError, match=message):
        ZImagePipeline.from_pretrained(tmp_path / "pipeline")


# ----------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 40}, "height=40 does not fit this model: use a multiple of 16"),
        ({"width": 0}, "width=0 does not fit"),
        ({"height": 1040}, "height=1040 does not fit this model: use a multiple of 16 pixels, at most 1024"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"cfg_truncation": 1.5}, r"cfg_truncation must lie in \[0, 1\]"),
        ({"cfg_normalization": -1.0}, "cfg_normalization must be a finite number from 0"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
        ({"prompt": PROMPTS[:2], "seed": [1, -1]}, "seed must lie between 0 and 18446744073709551615, not -1"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries"),
        ({"prompt": "circle " * 600}, "at most 512"),
    ],
)
def test_a_wrong_call_is_refused_in_one_sentence(own, call, message):
    with pytest.raises(UserError, match=message):
        own(**{"prompt": "a red circle", **call}, on_step=lambda *_: pytest.fail("drawn before it was refused"))


def test_the_largest_size_has_a_position_for_every_row(own):
    own.check_size(1024, 16)


def test_pixels_are_rounded_to_the_nearest_level():
    levels = torch.arange(256).float()
    image = ((levels + 0.4) / 127.5 - 1).clamp(-1, 1).view(1, 16, 16).expand(3, 16, 16)
    assert np.array_equal(np.asarray(to_picture(image))[..., 0].reshape(-1), np.arange(256))


# ----------------------------------------------------------------------------------------- lightning run generate


def test_generate_writes_pictures_that_say_how_they_were_made(own, own_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  the word CAT \n两个蓝色方块\n", encoding="utf-8")
    settings = {
        "checkpoint": str(own_folder),
        "prompts": str(tmp_path / "prompts.txt"),
        "output": str(tmp_path / "pictures"),
        "seed": 5,
        "images_per_prompt": 2,
        "height": 48,
        "device": "cpu",
    }
    generate_task(settings)
    records = [json.loads(line) for line in (tmp_path / "pictures/prompts.jsonl").read_text("utf-8").splitlines()]
    wanted = [(p, seed) for p in ("a red circle", "the word CAT", "两个蓝色方块") for seed in (5, 6)]
    assert [(record["prompt"], record["seed"]) for record in records] == wanted
    for record, (prompt, seed) in zip(records, wanted, strict=True):
        picture = Image.open(tmp_path / "pictures" / record["file"])
        assert picture.text["prompt"] == prompt and picture.text["seed"] == str(seed)
        made = json.loads(picture.text["parameters"])
        assert made["guidance_scale"] == 2.0 and made["num_inference_steps"] == 4 and made["height"] == 48
        assert np.array_equal(picture, own(prompt, seed=seed, height=48)[0])
    assert Image.open(tmp_path / "pictures/grid.png").width > 2 * 48
    files = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert files == {"prompts.jsonl", "grid.png", *(record["file"] for record in records)}


def test_generate_replaces_pictures_only_when_told_and_nothing_else_ever(own_folder, tmp_path):
    settings = {"checkpoint": str(own_folder), "prompts": "a red circle", "output": str(tmp_path), "device": "cpu"}
    generate_task({**settings, "seed": 1})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty; name another output=…, or give overwrite=true"):
        generate_task({**settings, "seed": 2})
    generate_task({**settings, "seed": 2, "overwrite": True})
    names = {"00000-seed2.png", "grid.png", "prompts.jsonl", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with pytest.raises(UserError, match="height=40"):
        generate_task({**settings, "height": 40, "overwrite": True})
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("record", ['{"file": "00000-se', '{"picture": "a.png"}', "[]"])
def test_generate_replaces_nothing_where_it_is_unclear_what(own_folder, tmp_path, record):
    (tmp_path / "prompts.jsonl").write_text(record)
    with pytest.raises(UserError, match=r"prompts\.jsonl does not say which pictures to replace"):
        generate_task(
            {"checkpoint": str(own_folder), "prompts": "x", "output": str(tmp_path), "overwrite": True, "device": "cpu"}
        )
    assert (tmp_path / "prompts.jsonl").read_text() == record


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
@pytest.mark.parametrize(
    ("full", "kept"), [("prompts.jsonl", 1), ("00001-seed1.png", 1), ("grid.png", 2)], ids=["record", "picture", "grid"]
)
def test_generate_on_a_full_disk_keeps_what_is_written_and_says_where(own_folder, tmp_path, full, kept):
    (tmp_path / full).symlink_to("/dev/full")
    settings = {"prompts": "a red circle", "output": str(tmp_path), "images_per_prompt": 2, "num_inference_steps": 1}
    with pytest.raises(
        UserError, match=rf"Cannot write to {tmp_path} \(.*No space left.*already written there are kept"
    ):
        generate_task({**settings, "checkpoint": str(own_folder), "overwrite": True, "device": "cpu"})
    pictures = [path for path in sorted(tmp_path.glob("0*.png")) if not path.is_symlink()]
    assert [Image.open(path).text["seed"] for path in pictures] == [str(seed) for seed in range(kept)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "missing.txt"}, "no file missing.txt"),
        ({"prompts": "Missing.CSV"}, "no file Missing.CSV .* a text file with one prompt a line"),
        ({"prompts": "/"}, "no file / to read prompts from; give a text file"),
        ({"prompts": "  "}, "prompts is empty"),
        ({"prompts": "circle " * 600}, "at most 512"),
        ({"checkpoint": "nowhere"}, "checkpoint: there is no nowhere; give"),
        ({"height": 40}, "height=40"),
        ({"width": 4096}, "width=4096 .* at most 1024"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"images_per_prompt": 0}, "images_per_prompt must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"cfg_truncation": -0.5}, "cfg_truncation must lie in"),
        ({"cfg_start": -0.5}, "cfg_start must lie in"),
        ({"cfg_normalization": math.nan}, "cfg_normalization must be a finite number"),
        ({"negative_prompt": "circle " * 600}, "at most 512"),
        ({"seed": 10**20}, "seed=100000000000000000000 .* range of seeds, which is 0 to 18446744073709551615"),
        ({"seed": -1}, "seed=-1 with"),
        ({"seed": 2**64 - 1, "images_per_prompt": 2}, "images_per_prompt=2 leaves the range of seeds"),
        ({"stepz": 3}, "stepz"),
        ({"height": "tall"}, "height"),
        ({"device": "cuda:0"}, "torch finds no GPU"),
        ({"device": "foo"}, "device=foo cannot be used here"),
        ({"device": "meta"}, "device=meta cannot be used here"),
        pytest.param(
            {"device": "mps"},
            "device=mps cannot be used here",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has one"),
        ),
    ],
)
def test_generate_refuses_wrong_settings_before_writing_anything(own_folder, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = {"checkpoint": str(own_folder), "prompts": "a red circle", "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=message):
        generate_task({**settings, **changes})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inner", ["", "inner", "inner/most"])
def test_generate_names_the_file_that_is_in_the_way_of_its_folder(own_folder, tmp_path, inner):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file; name a folder"):
        generate_task({"checkpoint": str(own_folder), "prompts": "x", "output": str(tmp_path / "file" / inner)})


@pytest.mark.parametrize("prompt", ["a sign that says readme.md", "circle", "1.5"])
def test_what_only_resembles_a_file_is_a_prompt(prompt):
    assert read_prompts(prompt) == [prompt]


def test_a_run_folder_leads_to_its_exported_pipeline(own, own_folder, tmp_path):
    shutil.copytree(own_folder, tmp_path / "run/pipeline")
    again = load_pipeline(tmp_path / "run", "cpu")
    assert np.array_equal(again("a red circle")[0], own("a red circle")[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a pipeline"):
        load_pipeline(tmp_path / "empty")


def run_config(own_folder, backbone):
    """What a training writes to its folder's config.yaml."""
    sampling = {"height": 32, "width": 48, "shift": 2.0}
    grid = {"class_path": "zimage_lit.callbacks.sample_grid.SampleGrid"}
    codec = {"class_path": "zimage_lit.components.PatchPCACodec", "init_args": {"folder": str(own_folder / "vae")}}
    encoder = {"class_path": "zimage_lit.components.Qwen3TextEncoder", "init_args": {"folder": str(own_folder)}}
    return {
        "trainer": {
            "callbacks": {
                "ema": {"class_path": "zimage_lit.callbacks.ema.EMA"},
                "grid": {**grid, "init_args": {"prompts": ["x"], "sampling": sampling}},
            }
        },
        "model": {
            "class_path": "zimage_lit.stages.FlowMatchingModule",
            "init_args": {"backbone": backbone, "codec": codec, "text_encoder": encoder, "init_from": "elsewhere"},
        },
    }


@pytest.mark.parametrize("averaged", [True, False])
def test_a_training_checkpoint_is_enough_to_draw(own, own_folder, tmp_path, averaged):
    """Its run's config.yaml names the other parts; the averaged weights are preferred to the last ones."""
    config = run_config(own_folder, {"preset": "tiny", **dataclasses.asdict(own.backbone.config)})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    weights = own.backbone.state_dict()
    spoilt = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    checkpoint = {
        "state_dict": {f"backbone.{name}": w for name, w in (spoilt if averaged else weights).items()},
        "callbacks": {"EMA": {"updates": 3, "average": weights}} if averaged else {},
        "pytorch-lightning_version": "2",
    }
    torch.save(checkpoint, tmp_path / "checkpoints/last.ckpt")
    pipeline = load_pipeline(tmp_path, "cpu")
    assert pipeline.defaults == SamplingDefaults(2.0, 32, 48, num_inference_steps=20, guidance_scale=3.0)
    assert np.array_equal(pipeline("a red circle", **QUICK)[0], own("a red circle", **QUICK)[0])


def test_a_damaged_or_homeless_checkpoint_is_named(own_folder, tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"torn")
    with pytest.raises(UserError, match="does not lie in a run's folder"):
        load_pipeline(checkpoint)
    (tmp_path / "run/config.yaml").write_text(to_yaml(run_config(own_folder, backbone="tiny")))
    with pytest.raises(UserError, match=r"last.ckpt cannot be read as a checkpoint"):
        load_pipeline(tmp_path / "run")
