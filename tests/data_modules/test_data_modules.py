"""The data modules over really prepared data: what their batches hold, how they resume, and what they refuse."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from data_modules import (
    EditingDataModule,
    MixtureDataModule,
    PreferenceDataModule,
    PromptDataModule,
    TextToImageDataModule,
)
from data_modules.buckets import SizeMapping
from data_modules.manifest import Manifest, read_manifest, write_manifest
from data_modules.preparation import PrepareSettings, prepare
from data_modules.samples import Batch, CaptionChooser
from data_modules.streaming import OrderedLoader, ResumableLoader
from zimage_lit import cli
from zimage_lit.config import compose
from zimage_lit.errors import UserError
from zimage_lit.validate import check_config

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")

PICTURES = 36
SIZES = SizeMapping(resolution=96)
BUDGET = 300  # packed tokens; at SIZES a picture has up to 64 and a caption up to 64 with their pads
CONCEPTS = (None, "cat", "dog")


def picture(index: int) -> np.ndarray:
    """Noise, uint8 (H, W, 3), 40 to 200 pixels a side."""
    dice = np.random.default_rng(index)
    height, width = dice.choice([40, 64, 100, 200], 2)
    return dice.integers(0, 256, (height, width, 3), dtype=np.uint8)


def prepared(folder: Path, lines: list[dict[str, Any]], pixels: Callable[[int], np.ndarray], **settings: Any) -> Path:
    """The prepared data of a list; each picture is made from the number that its name begins with."""
    folder.mkdir()
    for line in lines:
        for role in {"image", "source", "winner", "loser"} & line.keys():
            Image.fromarray(pixels(int(line[role].split(".")[0]))).save(folder / line[role])
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"min_side": 16, "part_size": 10, "num_workers": 1, **settings}
    prepare(PrepareSettings(str(folder / "list.jsonl"), str(folder / "data"), **settings))
    return folder / "data"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes; of every three one has no concept, one is a cat, one a dog; a fifth for validation."""
    lines = [
        {
            "image": f"{n}.png",
            "captions": {"en": {"short": f"short {n}", "long": f"long {n} " + "word " * n}, "zh": {"short": f"短 {n}"}},
            "id": f"id-{n}",
            "concept": CONCEPTS[n % 3],
            "number": n,
        }
        for n in range(PICTURES)
    ]
    return prepared(tmp_path_factory.mktemp("t2i") / "list", lines, picture, val_share=0.2)


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        {
            "image": f"{100 + n}.png",
            "source": f"{n}.png",
            "caption.en.instruction": f"edit {n}",
            "caption.en.difference": f"differs {n}",
        }
        for n in range(14)
    ]
    return prepared(tmp_path_factory.mktemp("edits") / "list", lines, picture)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"winner": f"{n}.png", "loser": f"{100 + n}.png", "prompt": f"prompt {n}", "id": n} for n in range(12)]
    return prepared(tmp_path_factory.mktemp("pairs") / "list", lines, picture)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"prompt": f"{n} cats", "tag": "counting", "include": [{"class": "cat", "count": n}]} for n in range(10)]
    return prepared(tmp_path_factory.mktemp("prompts") / "list", lines, picture)


def set_up(module: LightningDataModule) -> Any:
    module.setup("fit")
    return module


def refused(call: Callable[[], Any]) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def text_to_image(folder: Path, **options: Any) -> TextToImageDataModule:
    return set_up(TextToImageDataModule(str(folder), **{"batch_size": 4, "sizes": SIZES, **options}))


def number_of(batch: Batch, place: int) -> int:
    return int(batch["metadata"][place]["number"])


def rewritten(folder: Path, target: Path, **settings: Any) -> Path:
    """The same data with other settings in the manifest."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "manifest.json":
            (target / path.name).symlink_to(path)
    old: Manifest = read_manifest(folder)
    write_manifest(target, old.name, old.splits, old.captions, {**old.settings, **settings})
    return target


# ---------------------------------------------------------------------------------------------------- text to image


def test_pictures_come_at_their_training_size_in_batches_within_the_budget(pictures: Path) -> None:
    module = text_to_image(pictures, batch_size=None, token_budget=BUDGET, drop_last=False, num_workers=2)
    seen: Counter[int | str] = Counter()
    sizes: set[int] = set()
    for batch in module.train_dataloader():
        for place, image in enumerate(batch["images"]):
            height, width, _ = picture(number_of(batch, place)).shape
            expected = SIZES(width, height)
            assert (image.shape[2], image.shape[1]) == (int(expected[0]), int(expected[1]))
        image_tokens = max(image.shape[1] * image.shape[2] // 256 for image in batch["images"])
        assert len(batch["ids"]) * image_tokens <= BUDGET
        seen.update(batch["ids"])
        sizes.add(len(batch["ids"]))
    assert set(seen.values()) == {1} and len(seen) == module.manifest.splits["train"]
    assert len(sizes) > 1


def test_windows_mix_only_chunks_that_are_neighbours(pictures: Path) -> None:
    loader = text_to_image(pictures, window=1, batch_size=2, drop_last=False).train_dataloader()
    samples = loader.reader.samples
    chunks = [samples.chunk_of(index) for keys in islice(loader.keys(), len(loader)) for _, index in keys]
    changes = sum(before != after for before, after in pairwise(chunks))
    num_chunks = len(samples.chunk_ends)
    assert num_chunks == 4 and num_chunks - 1 <= changes <= 2 * (num_chunks - 1)  # one batch may lie in two


def test_concepts_come_as_often_as_their_weights_say(pictures: Path) -> None:
    module = text_to_image(pictures, batch_size=1, concept_weights={"cat": 0.0, "dog": 2.0})
    found = Counter(number_of(batch, 0) for batch in module.train_dataloader())
    assert {CONCEPTS[number % 3]: times for number, times in found.items()} == {None: 1, "dog": 2}
    assert len({times for number, times in found.items() if number % 3 == 0}) == 1


@pytest.mark.parametrize("limit", [{"batch_size": 100}, {"batch_size": None, "token_budget": BUDGET}])
def test_validation_has_every_sample_once_whatever_the_weights_and_the_batch(
    pictures: Path, limit: dict[str, Any]
) -> None:
    module = text_to_image(pictures, concept_weights={"cat": 0.0, "dog": 3.0}, **limit)
    loader = module.val_dataloader()
    names = Counter(name for batch in loader for name in batch["ids"])
    assert set(names.values()) == {1} and len(names) == module.manifest.splits["val"] > 1
    if "token_budget" not in limit:
        assert len(loader) == 1


def test_words_in_the_picture_are_no_caption_unless_asked_for(tmp_path: Path) -> None:
    lines = [{"image": f"{n}.png", "caption": "a sign", "text": "STOP"} for n in range(20)]
    data = prepared(tmp_path / "list", lines, picture)
    captions = {caption for batch in text_to_image(data).train_dataloader() for caption in batch["captions"]}
    assert captions == {"a sign"}
    asked = text_to_image(data, caption_weights={"en": {"text": 1.0}})
    assert {caption for batch in asked.train_dataloader() for caption in batch["captions"]} == {"STOP"}


def test_pictures_whose_sides_do_not_fit_must_be_resized(pictures: Path, tmp_path: Path) -> None:
    message = refused(lambda: text_to_image(pictures, sizes=None))
    sides = [picture(n).shape[:2] for n in range(PICTURES)]
    assert (
        " of the " in message and f"pictures in {pictures / 'train'} have sides that are no multiple of 16" in message
    )
    assert message.endswith("set data.init_args.sizes.resolution, for example to 1024, and they are resized.")
    assert any(f"the first {width}x{height}:" in message for height, width in sides if height % 16 or width % 16)

    encoded = rewritten(pictures, tmp_path / "encoded", encoded_by={"codec": "f" * 64})
    assert len(text_to_image(encoded, sizes=None).train_dataloader()) > 0
    half = rewritten(pictures, tmp_path / "half", encoded_by={"text_encoder": "f" * 64})
    assert "no multiple of 16" in refused(lambda: text_to_image(half, sizes=None))


def test_pictures_whose_sides_fit_are_taken_as_they_are(tmp_path: Path) -> None:
    def tile(index: int) -> np.ndarray:
        return np.full((32 + 16 * (index % 2), 64, 3), index, dtype=np.uint8)

    data = prepared(tmp_path / "list", [{"image": f"{n}.png", "caption": str(n)} for n in range(6)], tile)
    for batch in text_to_image(data, sizes=None, batch_size=2).train_dataloader():
        for image, caption in zip(batch["images"], batch["captions"], strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), tile(int(caption)))


# ---------------------------------------------------------------------------------------------------- other kinds


def test_edits_have_both_pictures_and_what_is_to_be_done(edits: Path) -> None:
    module = set_up(
        EditingDataModule(
            str(edits), batch_size=7, sizes=SizeMapping(None), caption_weights={"en": {"instruction": 1.0}}
        )
    )
    (first, second) = module.train_dataloader()
    for batch in (first, second):
        for image, source, caption in zip(batch["images"], batch["sources"], batch["captions"], strict=True):
            number = int(caption.removeprefix("edit "))
            for found, stored in ((image, picture(100 + number)), (source, picture(number))):
                width, height = SizeMapping(None)(stored.shape[1], stored.shape[0])
                assert found.shape == (3, int(height), int(width))
                if stored.shape[:2] == (int(height), int(width)):
                    assert np.array_equal(found.permute(1, 2, 0).numpy(), stored)


def test_the_budget_counts_both_pictures(edits: Path, pairs: Path, pictures: Path) -> None:
    def longest(module: TextToImageDataModule) -> int:
        message = refused(lambda: set_up(module).train_dataloader())
        return int(message.split(" has ")[1].split(" tokens")[0])

    square: dict[str, Any] = {
        "batch_size": None,
        "token_budget": 1,
        "sizes": SizeMapping(resolution=64, upscale=True, crop_to_square=True),
    }
    assert longest(EditingDataModule(str(edits), **square)) == 2 * 16 + 32  # of an image 16, of its caption's pads 32
    assert longest(PreferenceDataModule(str(pairs), **square)) == 2 * (32 + 32)  # each picture has a sequence


def test_pairs_stay_together(pairs: Path) -> None:
    module = set_up(PreferenceDataModule(str(pairs), batch_size=4, sizes=SIZES))
    sizes = {n: tuple(int(side) for side in SIZES(*picture(n).shape[1::-1])) for n in [*range(12), *range(100, 112)]}
    seen = []
    for batch in module.train_dataloader():
        assert "images" not in batch
        for name, caption, winner, loser in zip(
            batch["ids"], batch["captions"], batch["winners"], batch["losers"], strict=True
        ):
            number = int(name)
            assert caption == f"prompt {number}"
            assert winner.shape[:0:-1] == sizes[number] and loser.shape[:0:-1] == sizes[100 + number]
            seen.append(number)
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prompts_come_once_with_their_metadata(prompts: Path, num_workers: int) -> None:
    module = set_up(PromptDataModule(str(prompts), batch_size=5, num_workers=num_workers))
    seen = []
    for batch in module.train_dataloader():
        assert set(batch) == {"captions", "metadata", "ids"} and len(batch["captions"]) == 5
        for caption, metadata in zip(batch["captions"], batch["metadata"], strict=True):
            count = int(caption.split()[0])
            assert caption == f"{count} cats"
            assert metadata == {"tag": "counting", "include": [{"class": "cat", "count": count}]}
            seen.append(count)
    assert sorted(seen) == list(range(10))


# ---------------------------------------------------------------------------------------------------- mixtures


def mixture(pictures: Path, edits: Path, num_workers: int = 0, **options: Any) -> MixtureDataModule:
    pictures_by_budget = TextToImageDataModule(
        str(pictures), batch_size=None, token_budget=BUDGET, sizes=SIZES, drop_last=False, seed=1
    )
    return MixtureDataModule(
        {"pictures": pictures_by_budget, "edits": EditingDataModule(str(edits), batch_size=3, sizes=SIZES, seed=2)},
        **{"weights": {"pictures": 4, "edits": 1}, "num_workers": num_workers, **options},
    )


class Recorder(LightningModule):
    """Learns next to nothing and notes the ids of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int | str]] = []
        self.validated: list[tuple[int, list[int | str]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["ids"])
        return self.layer(torch.ones(1, 1)).mean()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append((dataloader_idx, batch["ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(module: LightningDataModule, folder: Path, steps: int, ckpt_path: Path | None = None) -> Recorder:
    recorder = Recorder()
    keep_all = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[keep_all], logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=module, ckpt_path=ckpt_path, weights_only=False)
    return recorder


def is_edit(ids: list[int | str]) -> bool:
    return not str(ids[0]).startswith("id-")


def test_a_mixture_trains_four_to_one_and_resumes_in_the_middle(pictures: Path, edits: Path, tmp_path: Path) -> None:
    steps = 45  # of epochs of about 15 steps
    whole = train(mixture(pictures, edits), tmp_path / "whole", steps)
    flags = np.array([is_edit(ids) for ids in whole.seen])
    assert len(flags) == steps
    for size in (5, 10, 20):
        shares = np.convolve(flags, np.ones(size), "valid")
        assert np.abs(shares - size / 5).max() <= 1
    first_epoch = [name for ids in whole.seen if is_edit(ids) for name in ids][:12]
    assert len(set(first_epoch)) == 12  # two of fourteen fill no batch
    assert {loader for loader, _ in whole.validated} == {0}  # the edits have no validation split
    for step, num_workers in ((4, 0), (17, 0), (23, 2), (38, 0)):
        folder = tmp_path / f"resumed-{step}"
        resumed = train(mixture(pictures, edits, num_workers), folder, steps, tmp_path / "whole" / f"{step}.ckpt")
        assert resumed.seen == whole.seen[step:]


def test_a_mixture_with_other_weights_cannot_go_on(pictures: Path, edits: Path, tmp_path: Path) -> None:
    train(mixture(pictures, edits), tmp_path, 3)
    with pytest.raises(UserError, match=r"weights=.* cannot be continued exactly"):
        train(mixture(pictures, edits, weights={"pictures": 3, "edits": 1}), tmp_path, 5, tmp_path / "2.ckpt")


def test_every_rank_takes_its_own_part_of_the_same_data_set(pictures: Path, edits: Path) -> None:
    class Place:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size = rank, 2

    ranks = []
    for rank in range(2):
        module = mixture(pictures, edits)
        module.trainer = Place(rank)  # type: ignore[assignment]
        ranks.append([batch["ids"] for batch in set_up(module).train_dataloader()])
    assert len(ranks[0]) == len(ranks[1]) > 4
    for first, second in zip(*ranks, strict=True):
        assert is_edit(first) == is_edit(second) and not set(first) & set(second)


def test_an_experiment_names_a_mixture(
    pictures: Path, edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mixed.yaml").write_text(f"""
defaults: [defaults/run]
trainer: {{accelerator: cpu, logger: false}}
model:
  class_path: zimage_lit.stages.FlowMatchingModule
  init_args:
    text_encoder: {{class_path: zimage_lit.components.Qwen3TextEncoder, init_args: {{folder: encoder}}}}
    codec: {{class_path: zimage_lit.components.PatchPCACodec, init_args: {{folder: codec}}}}
data:
  class_path: data_modules.MixtureDataModule
  init_args:
    weights: {{pictures: 4, edits: 1}}
    data:
      pictures:
        class_path: data_modules.TextToImageDataModule
        init_args:
          data_dir: {pictures}
          batch_size: null
          token_budget: {BUDGET}
          sizes: {{resolution: 96}}
          concept_weights: {{cat: 2}}
          cache: {{max_bytes: 1000000}}
      edits:
        class_path: data_modules.EditingDataModule
        init_args: {{data_dir: {edits}, batch_size: 3, sizes: {{resolution: 96, upscale: true}}}}
""")
    config = compose("mixed", ["data.init_args.data.edits.init_args.batch_size=2"])
    check_config(config)
    built = cli.build(config)
    assert isinstance(built.datamodule, MixtureDataModule)
    assert isinstance(built.datamodule.data["pictures"], TextToImageDataModule)
    assert isinstance(built.datamodule.data["edits"], EditingDataModule)
    assert built.datamodule.data["edits"].sizes == SizeMapping(resolution=96, upscale=True)
    batches = list(islice(set_up(built.datamodule).train_dataloader(), 5))
    assert sorted(len(batch["ids"]) for batch in batches if is_edit(batch["ids"])) == [2]

    wrong = compose("mixed", ["data.init_args.data.edits.init_args.batchsize=2"])
    message = refused(lambda: check_config(wrong))
    assert message.startswith("data.init_args.data.edits.init_args.batchsize is not a setting of EditingDataModule")
    wrong = compose("mixed", ["data.init_args.data.edits.class_path=data_modules.sources.Record"])
    assert "data.init_args.data" in refused(lambda: check_config(wrong))


def test_a_mixture_tells_tracking_of_all_its_data(pictures: Path, edits: Path) -> None:
    info = mixture(pictures, edits).dataset_info()
    assert info["num_samples"] == read_manifest(pictures).splits["train"] + 14
    assert info["path"] == f"{edits}, {pictures}" and info["name"] == "data+data"
    other = mixture(pictures, edits, weights={"pictures": 1, "edits": 1}).dataset_info()
    assert other["fingerprint"] != info["fingerprint"] == mixture(pictures, edits).dataset_info()["fingerprint"]


def test_data_sets_of_other_components_do_not_mix(pictures: Path, edits: Path, tmp_path: Path) -> None:
    folders = [
        rewritten(pictures, tmp_path / "one", encoded_by={"codec": "a", "text_encoder": "b"}),
        rewritten(edits, tmp_path / "two", encoded_by={"codec": "c"}),
    ]
    message = refused(lambda: mixture(folders[0], folders[1]).encoded_by)
    assert message == "data.init_args.data.edits was encoded by another codec than those before it."
    assert mixture(folders[0], edits).encoded_by == {"codec": "a", "text_encoder": "b"}


# ---------------------------------------------------------------------------------------------------- refusals


def test_data_of_another_kind_name_the_class_to_use(pictures: Path, edits: Path, pairs: Path, prompts: Path) -> None:
    homes: dict[type[TextToImageDataModule], Path] = {
        TextToImageDataModule: pictures,
        EditingDataModule: edits,
        PreferenceDataModule: pairs,
        PromptDataModule: prompts,
    }
    for asked in homes:
        for right, folder in homes.items():
            module = asked(str(folder), **({} if asked is PromptDataModule else {"sizes": SIZES}))
            if asked is right:
                set_up(module)
            else:
                message = refused(lambda module=module: set_up(module))  # type: ignore[misc]
                assert f"and {asked.__name__} needs " in message
                assert message.endswith(f": set data.class_path to data_modules.{right.__name__}.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": None}, "Set one of data.init_args.batch_size and data.init_args.token_budget, the other to"),
        ({"token_budget": 100}, "Set one of data.init_args.batch_size and data.init_args.token_budget, the other to"),
        ({"batch_size": 0}, "data.init_args.batch_size is 0: set it to 1 or more"),
        ({"batch_size": None, "token_budget": -1}, "data.init_args.token_budget is -1: set it to 1 or more"),
        ({"window": 0}, "data.init_args.window is 0: set it to 1 or more"),
        ({"num_workers": -1}, "data.init_args.num_workers is -1: set it to 0 or more"),
    ],
)
def test_wrong_settings_are_refused_before_any_file_is_read(options: dict[str, Any], message: str) -> None:
    assert message in refused(lambda: TextToImageDataModule("nowhere", **options))


def test_settings_that_do_not_fit_the_data_are_named(
    pictures: Path, prompts: Path, noise_folder: Path, tmp_path: Path
) -> None:
    def training(folder: Path, **options: Any) -> str:
        return refused(lambda: text_to_image(folder, **options).train_dataloader())

    size = read_manifest(pictures).splits["train"]
    assert f"has {size} samples, fewer than the 1000 of one batch" in training(pictures, batch_size=1000)
    assert "concept_weights.cow names a concept that the data do not have: they have cat, dog." in training(
        pictures, concept_weights={"cow": 1.0}
    )
    assert "concept_weights.cat is -1" in training(pictures, concept_weights={"cat": -1.0})
    assert "more than data.init_args.token_budget=50: set that to" in training(
        pictures, batch_size=None, token_budget=50
    )
    assert "planning.npz is missing, which data.init_args.sizes" in training(noise_folder)
    assert "the data have no planning.npz" in training(noise_folder, sizes=None, batch_size=None, token_budget=100)
    encoded = rewritten(pictures, tmp_path / "encoded", encoded_by={"codec": "f" * 64})
    assert "has latents of pictures of fixed sizes: leave out data.init_args.sizes" in training(encoded)


def test_a_validation_split_that_cannot_be_shared_is_named(pictures: Path) -> None:
    reader = text_to_image(pictures).val_dataloader().reader  # type: ignore[union-attr]
    for limit in ({"batch_size": 4}, {"batch_size": None, "token_budget": BUDGET}):
        message = refused(
            lambda limit=limit: OrderedLoader(reader, rank=0, world_size=64, table=reader.table(), **limit)  # type: ignore[misc]
        )
        assert "samples for 64 devices: prepare the data with a larger val_share, or set trainer.limit" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"pictures": 4}}, "weights names pictures and the data sets are pictures, edits."),
        ({"weights": {"pictures": 4, "edits": 0}}, "weights.edits is 0: set it to a number above 0"),
        ({"num_workers": -1}, "data.init_args.num_workers is -1: set it to 0 or more"),
        ({"steps_per_epoch": 0}, "data.init_args.steps_per_epoch is 0: set it to 1 or more, or leave it out"),
        ({"data": {}}, "data.init_args.data names no data set: name at least one."),
    ],
)
def test_wrong_mixtures_are_named(pictures: Path, edits: Path, options: dict[str, Any], message: str) -> None:
    def make() -> None:
        if "data" in options:
            MixtureDataModule(weights={}, **options)
        set_up(mixture(pictures, edits, **options)).train_dataloader()

    assert message in refused(make)


def test_a_caption_of_words_alone_is_named() -> None:
    message = refused(lambda: CaptionChooser(None, 0)({"en": {"text": "STOP"}}, 0, 0))
    assert message.startswith("has captions of the kinds en.text, and ")


def test_loaders_take_the_rank_of_the_trainer(pictures: Path) -> None:
    reader = text_to_image(pictures).train_dataloader().reader
    ranks = [ResumableLoader(reader, "", 3, seed=0, rank=rank, world_size=3, table=reader.table()) for rank in range(3)]
    names = [name for loader in ranks for batch in loader for name in batch["ids"]]
    assert len(names) == len(set(names)) == len(reader) - len(reader) % 9


def test_weights_that_leave_a_sample_without_a_caption_are_refused_at_setup(tmp_path: Path) -> None:
    lines = [{"caption.en.short": "a"}, {"caption.en.short": "b", "caption.zh.short": "c"}, {"caption.zh.short": "d"}]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1))
    data, one_language = str(tmp_path / "data"), {"en": {"short": 1.0}}
    message = refused(lambda: PromptDataModule(data, batch_size=1, caption_weights=one_language).setup("fit"))
    assert message.startswith(f"1 of the samples in {data} have no captions but zh.short, and data.init_args.caption")
    PromptDataModule(data, batch_size=1, caption_weights={**one_language, "zh": {"short": 1.0}}).setup("fit")


def test_a_position_is_not_continued_with_other_captions(pictures: Path) -> None:
    state = text_to_image(pictures, batch_size=2).train_dataloader().state_dict()
    weights = {language: dict.fromkeys(kinds, 1.0) for language, kinds in read_manifest(pictures).captions.items()}
    other = text_to_image(pictures, batch_size=2, caption_weights=weights).train_dataloader()
    assert "caption_weights=None and this run has caption_weights={" in refused(lambda: other.load_state_dict(state))
