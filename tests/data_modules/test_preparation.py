"""From raw data to a prepared folder: all that is good arrives, all else is named, and always as the same bytes."""

import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from litdata import StreamingDataset
from PIL import Image

from benchmarks.prepare_folder import BREAKERS, make_folder
from data_modules import TextToImageDataModule, assembly, images, part_writer, preparation
from data_modules.buckets import SizeMapping
from data_modules.folder_lock import LOCK
from data_modules.images import read_picture
from data_modules.manifest import read_manifest
from data_modules.part_writer import split_of
from data_modules.preparation import PrepareSettings, prepare
from zimage_lit import cli
from zimage_lit.components import Qwen3TextEncoder, build_tiny_qwen3
from zimage_lit.errors import UserError

NUM_PICTURES = 100
SETTINGS: dict[str, Any] = {"part_size": 15, "val_share": 0.2, "num_workers": 1, "name": "mixed"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of mixed pictures, every fifth broken, and what is to become of those."""
    folder = tmp_path_factory.mktemp("pictures")
    return folder, make_folder(folder, NUM_PICTURES, largest=200, broken_every=5)


@pytest.fixture(scope="module")
def prepared(pictures: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder, prepared by one process."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareSettings(str(pictures[0]), str(output), **SETTINGS))
    return output


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    stream = StreamingDataset(str(folder / split), batch_decode=0)
    return [stream[index] for index in range(len(stream))]


def rejections(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {entry["source"]: entry["reason"] for entry in found}


def png(shade: int, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(folder: Path, lines: list[dict[str, Any]], name: str = "list.jsonl") -> Path:
    """A manifest, with a picture for every name that it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for line in lines:
        for role in ("image", "source", "winner", "loser"):
            if role in line and not (folder / line[role]).exists():
                (folder / line[role]).write_bytes(png(len(line[role])))
    (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return folder / name


# ---------------------------------------------------------------------------------------------------- what arrives


def test_every_broken_picture_is_named_with_its_reason(pictures: tuple[Path, dict[str, str]], prepared: Path) -> None:
    _, expected = pictures
    assert len(set(expected.values())) == len({way.partition(",")[0] for way in BREAKERS})
    assert {place: reason.partition(":")[0] for place, reason in rejections(prepared).items()} == expected


def test_every_good_picture_arrives_as_it_was(pictures: tuple[Path, dict[str, str]], prepared: Path) -> None:
    folder, expected = pictures
    good = [path for path in sorted(folder.rglob("*")) if path.suffix not in (".txt", ".json", "")]
    names = [path.relative_to(folder).as_posix() for path in good]
    arrived = samples(prepared) + samples(prepared, "val")
    assert sorted(sample["id"] for sample in arrived) == sorted(set(names) - set(expected))
    assert {Path(sample["id"]).suffix for sample in arrived} == {
        *(".jpg", ".png", ".webp", ".tiff", ".bmp", ".gif", ".avif", ".ppm")
    }
    for sample in arrived:
        path = folder / sample["id"]
        assert sample["image"].tobytes() == path.read_bytes()
        captions = json.loads(sample["captions"])
        if path.with_suffix(".json").exists():
            described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            assert captions == described.pop("captions") and json.loads(sample["metadata"]) == described
        else:
            assert captions == {"en": {"medium": path.with_suffix(".txt").read_text()}}


def test_the_samples_keep_the_order_of_the_source(prepared: Path) -> None:
    for split in ("train", "val"):
        ids = [sample["id"] for sample in samples(prepared, split)]
        assert ids == sorted(ids) and len(ids) == read_manifest(prepared).splits[split]


def test_planning_tells_what_the_samples_are_like(prepared: Path) -> None:
    for split in ("train", "val"):
        planning = np.load(prepared / split / "planning.npz")
        assert {name: str(planning[name].dtype) for name in planning} == {
            "width": "uint16",
            "height": "uint16",
            "caption_tokens": "uint16",
            "concept": "int32",
        }
        stored = samples(prepared, split)
        shapes = [read_picture(sample["image"].tobytes(), "").shape for sample in stored]
        assert list(zip(planning["height"].tolist(), planning["width"].tolist(), strict=True)) == [
            (height, width) for height, width, _ in shapes
        ]
        longest = [
            max(len(text.encode()) for kinds in json.loads(sample["captions"]).values() for text in kinds.values())
            for sample in stored
        ]
        assert planning["caption_tokens"].tolist() == [-(-size // 3) for size in longest]
        assert (planning["concept"] == -1).all()


def test_the_manifest_and_the_report_say_what_came_in_and_out(prepared: Path) -> None:
    manifest, report = read_manifest(prepared), json.loads((prepared / "preparation.json").read_text())
    assert manifest.name == "mixed" and manifest.captions == {"en": ["medium", "short", "tags"], "zh": ["short"]}
    assert manifest.settings["roles"] == ["image"] and manifest.settings["val_share"] == 0.2
    assert report["records"] == NUM_PICTURES and report["prepared"] == manifest.splits
    assert sum(report["prepared"].values()) + sum(report["rejected"].values()) == NUM_PICTURES
    assert set(content(prepared)) == {*manifest.files, "manifest.json"}
    assert not any("worker" in key or "output" in key for key in manifest.settings)


def test_a_data_module_reads_the_folder(prepared: Path) -> None:
    weights = {"en": {"short": 1.0, "medium": 1.0}}
    module = TextToImageDataModule(str(prepared), batch_size=8, caption_weights=weights, sizes=SizeMapping(None))
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert len(batch["images"]) == 8 and all("picture number" in caption for caption in batch["captions"])


def test_the_table_shows_what_came_in_what_went_out_and_why(
    pictures: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["run", "prepare", f"source={pictures[0]}", f"output={tmp_path / 'data'}", "num_workers=1"]) == 0
    table = {
        line.split("│")[0].strip(): line.split("│")[1].strip()
        for line in capsys.readouterr().out.splitlines()
        if "│" in line and "records" not in line
    }
    assert table == {
        "came in": "100",
        "train": "80",
        "rejected, broken picture": "4",
        **{f"rejected, {reason}": "2" for reason in set(pictures[1].values()) - {"broken picture"}},
    }


# ---------------------------------------------------------------------------------------------------- the same bytes


def in_a_process(target: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process  # type: ignore[return-value]


def descendants(pid: int) -> list[int]:
    """Process ids below a process, on Linux; elsewhere nothing."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in descendants(child)]


def has_workers(pid: int) -> bool:
    """Whether a process is at its work: a signal just after the fork may be lost among the hooks that run then. True
    where nobody can tell."""
    return bool(descendants(pid)) or not Path("/proc/self/task").exists()


def test_two_workers_write_the_same_bytes(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path
) -> None:
    prepare(PrepareSettings(str(pictures[0]), str(tmp_path / "data"), **{**SETTINGS, "num_workers": 2}))
    assert content(tmp_path / "data") == content(prepared)


def test_killed_and_stopped_preparations_go_on_and_end_in_the_same_bytes(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    asked = PrepareSettings(str(pictures[0]), str(data), **{**SETTINGS, "num_workers": 2})

    def finished_parts() -> int:
        return len(list(data.glob(".parts/0*/part.json")))

    def slow_check(*arguments: Any) -> tuple[int, int]:
        time.sleep(0.5 if finished_parts() >= finished else 0.02)  # so that the end does not come before the signal
        return check(*arguments)

    check = part_writer.check
    monkeypatch.setattr(part_writer, "check", slow_check)
    inodes: set[int] = set()
    for finished, ending in ((1, signal.SIGKILL), (3, signal.SIGINT), (5, signal.SIGKILL)):
        process = in_a_process(prepare, asked)
        assert process.pid is not None
        deadline = time.monotonic() + 30
        while (finished_parts() < finished or not has_workers(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.005)
        workers = descendants(process.pid)
        os.kill(process.pid, ending)
        process.join(20)
        assert process.exitcode not in (0, None) and not (data / "manifest.json").exists()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "workers outlived the preparation"
        parts = {path.stat().st_ino for path in data.glob(".parts/0*/train/*.bin")}
        assert parts >= inodes and len(parts) >= finished, "a finished part was done again"
        inodes = parts
    with pytest.raises(UserError, match=r"never finished"):
        TextToImageDataModule(str(data)).setup("fit")

    monkeypatch.undo()
    prepare(asked)
    assert content(data) == content(prepared)
    assert inodes <= {path.stat().st_ino for path in (data / "train").glob("*.bin")}


def test_a_kill_between_the_last_steps_does_no_harm(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    asked = PrepareSettings(str(pictures[0]), str(data), **SETTINGS)
    steps = [(preparation, "_sum_up"), (assembly, "planning_file"), (preparation, "write_manifest"), (shutil, "rmtree")]
    for module, name in steps:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            prepare(asked)
    prepare(asked)
    assert content(data) == content(prepared)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_what_is_finished_and_says_how_to_go_on(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path
) -> None:
    """The kernel refuses larger files to a process, as a full disk would."""
    data, said = tmp_path / "data", tmp_path / "said"
    asked = PrepareSettings(str(pictures[0]), str(data), **SETTINGS)
    largest = sorted(path.stat().st_size for path in (prepared / "train").glob("*.bin"))[-2]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        try:
            prepare(asked)
        except UserError as error:
            said.write_text(str(error))

    in_a_process(limited).join(30)
    assert "File too large" in said.read_text() and "the same command goes on" in said.read_text()
    assert not list(data.glob(".parts/unfinished-*")) and not (data / "manifest.json").exists()
    prepare(asked)
    assert content(data) == content(prepared)


def test_a_killed_worker_is_one_clear_sentence(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = PrepareSettings(str(pictures[0]), str(tmp_path / "data"), **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(part_writer, "split_of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"was killed, perhaps for want of memory: .*the same command goes on"):
            prepare(asked)
    prepare(asked)
    assert content(tmp_path / "data") == content(prepared)


def test_preparations_at_once_wait_for_each_other(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path
) -> None:
    asked = PrepareSettings(str(pictures[0]), str(tmp_path / "data"), **SETTINGS)
    processes = [in_a_process(prepare, asked) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert content(tmp_path / "data") == content(prepared)


def test_a_finished_folder_is_left_as_it_is(
    pictures: tuple[Path, dict[str, str]], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(prepared)
    monkeypatch.setattr(preparation, "_prepare", None)
    prepare(PrepareSettings(str(pictures[0]), str(prepared), **{**SETTINGS, "num_workers": 5}))
    assert content(prepared) == before


# ---------------------------------------------------------------------------------------------------- refusals


def test_other_settings_or_another_source_are_refused_by_name(
    pictures: tuple[Path, dict[str, str]], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"prepared with min_side=64 \(now min_side=65\): set output to another"):
        prepare(PrepareSettings(str(pictures[0]), str(prepared), **SETTINGS, min_side=65))
    other = jsonl(tmp_path, [{"prompt": "a"}])
    with pytest.raises(UserError, match=r"prepared with format=folder .now format=jsonl.*source_listing="):
        prepare(PrepareSettings(str(other), str(prepared), **SETTINGS))

    data = tmp_path / "data"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "_run", interrupted)
        prepare(PrepareSettings(str(other), str(data)))
    with pytest.raises(UserError, match=r"unfinished preparation with min_side=64 \(now min_side=65\): give the same"):
        prepare(PrepareSettings(str(other), str(data), min_side=65))


def test_a_folder_with_other_files_is_not_touched(pictures: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no data set: set output to a folder of its own"):
        prepare(PrepareSettings(str(pictures[0]), str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(UserError, match=r"output=.* lies in the source"):
        prepare(PrepareSettings(str(pictures[0]), str(pictures[0] / "data")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .Not a directory.: set output"):
        prepare(PrepareSettings(str(pictures[0]), str(tmp_path / "file" / "data")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"val_share": 1.0}, "val_share must be from 0 to below 1, not 1.0"),
        ({"num_workers": 0}, "num_workers must be at least 1, not 0"),
        ({"part_size": 0}, "part_size must be at least 1"),
        ({"chunk_mib": 4096}, "chunk_mib must be at most 2048"),
        ({"tokenizer": "/nowhere"}, "There is no folder /nowhere to read a Qwen3 from"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    source = jsonl(tmp_path / "source", [{"prompt": "a"}])
    with pytest.raises(UserError, match=message):
        prepare(PrepareSettings(str(source), str(tmp_path / "data"), **setting))


def test_a_source_of_which_nothing_is_left_can_be_mended(tmp_path: Path) -> None:
    source, data = jsonl(tmp_path / "source", [{"prompt": ""}, {"prompt": " "}]), tmp_path / "data"
    with pytest.raises(UserError, match=r"has no sample to train on: .*rejected\.jsonl says why"):
        prepare(PrepareSettings(str(source), str(data)))
    assert list(rejections(data).values()) == ["empty caption: it says nothing"] * 2
    jsonl(tmp_path / "source", [{"prompt": ""}, {"prompt": "a"}])
    assert prepare(PrepareSettings(str(source), str(data))).splits == {"train": 1}
    assert not (data / LOCK).exists() and list(rejections(data)) == ["list.jsonl:1"]


# ---------------------------------------------------------------------------------------------------- kinds of data


def test_pictures_in_roles_are_stored_by_role(tmp_path: Path) -> None:
    edits = [{"image": f"bright{n}.png", "source": "s.png", "caption": f"brighter {n}"} for n in range(3)]
    data = tmp_path / "edits"
    manifest = prepare(PrepareSettings(str(jsonl(tmp_path / "source", edits)), str(data), num_workers=1))
    assert manifest.settings["roles"] == ["image", "source"] and manifest.captions == {"en": ["instruction"]}
    sample = samples(data)[2]
    assert list(sample) == ["image", "source", "captions", "metadata", "id"]
    assert sample["source"].tobytes() == (tmp_path / "source" / "s.png").read_bytes()
    assert sample["image"].tobytes() == (tmp_path / "source" / "bright2.png").read_bytes()

    pairs = [{"winner": "better.png", "loser": "s.png", "prompt": "grey", "judge": "Ann"}]
    data = tmp_path / "pairs"
    prepare(PrepareSettings(str(jsonl(tmp_path / "source", pairs)), str(data), num_workers=1))
    (sample,) = samples(data)
    assert sample["winner"].tobytes() == png(10) and sample["loser"].tobytes() == png(5)
    assert json.loads(sample["metadata"]) == {"judge": "Ann"}


def test_columns_are_named_on_the_command_line(tmp_path: Path) -> None:
    line = {"file": "a.png", "image": "a.png", "words": "a cat", "zh": "猫", "source": "web"}
    source, data = jsonl(tmp_path / "source", [line | {"source": "b.png"}]), tmp_path / "data"
    columns = ["columns.image=file", "columns.caption.en.long=words", "columns={caption.zh.short: zh, source: null}"]
    assert cli.main(["run", "prepare", f"source={source}", f"output={data}", "num_workers=1", *columns]) == 0
    (sample,) = samples(data)
    assert list(sample) == ["image", "captions", "metadata", "id"]
    assert json.loads(sample["captions"]) == {"en": {"long": "a cat"}, "zh": {"short": "猫"}}
    assert json.loads(sample["metadata"]) == {"image": "a.png", "source": "b.png"}


def test_one_broken_picture_rejects_the_whole_record(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "source", [{"winner": f"w{n}.png", "loser": f"l{n}.png", "prompt": "a"} for n in range(2)]
    )
    (tmp_path / "source" / "l1.png").write_bytes(png(0)[:-30])
    manifest = prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1))
    assert manifest.splits == {"train": 1}
    assert rejections(tmp_path / "data")["list.jsonl:2"].startswith("broken picture: ")


def test_prompts_have_no_pictures_and_keep_their_metadata(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "source", [{"prompt": f"猫 {n}", "tag": "counting", "count": n} for n in range(300)])
    manifest = prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1))
    stored = samples(tmp_path / "data")
    assert manifest.settings["roles"] == [] and manifest.splits == {"train": 300}
    assert json.loads(stored[299]["captions"]) == {"en": {"medium": "猫 299"}}
    assert json.loads(stored[299]["metadata"]) == {"tag": "counting", "count": 299}
    planning = np.load(tmp_path / "data" / "train" / "planning.npz")
    assert not planning["width"].any() and not planning["height"].any()


def test_concepts_are_numbered_in_the_manifest(tmp_path: Path) -> None:
    concepts = ["dog", None, "cat", "dog"]
    source = jsonl(tmp_path / "source", [{"prompt": str(n), "concept": c} for n, c in enumerate(concepts)])
    manifest = prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1, part_size=2))
    assert manifest.settings["concepts"] == ["cat", "dog"]
    assert np.load(tmp_path / "data" / "train" / "planning.npz")["concept"].tolist() == [1, -1, 0, 1]


def test_of_one_id_the_first_good_record_is_taken(tmp_path: Path) -> None:
    ids = ["a", "b", "a", "c", "a", "c", "d"]
    lines = [{"id": name, "image": f"{n}.png", "caption": f"n {n}"} for n, name in enumerate(ids)]
    source = jsonl(tmp_path / "source", lines)
    (tmp_path / "source" / "0.png").write_bytes(b"broken")
    for workers, part_size in ((1, 2), (2, 2), (1, 100)):
        data = tmp_path / f"data{workers}-{part_size}"
        prepare(PrepareSettings(str(source), str(data), num_workers=workers, part_size=part_size, name="a"))
        assert [(s["id"], s["captions"]) for s in samples(data)] == [
            (name, f'{{"en": {{"medium": "n {n}"}}}}') for name, n in (("b", 1), ("a", 2), ("c", 3), ("d", 6))
        ]
        assert {place: reason for place, reason in rejections(data).items() if reason.startswith("dup")} == {
            "list.jsonl:5": "duplicate id: an earlier record has the id a",
            "list.jsonl:6": "duplicate id: an earlier record has the id c",
        }
    assert content(tmp_path / "data1-2") == content(tmp_path / "data2-2")


def test_the_validation_split_does_not_depend_on_the_order(tmp_path: Path) -> None:
    lines = [{"id": f"id {n}", "prompt": f"prompt {n}"} for n in range(400)]
    chosen = []
    for order, name in ((lines, "one"), (lines[::-1], "two"), (lines[:200], "half")):
        data = tmp_path / name
        prepare(PrepareSettings(str(jsonl(tmp_path, order, f"{name}.jsonl")), str(data), val_share=0.1, num_workers=1))
        chosen.append({sample["id"] for sample in samples(data, "val")})
        assert not chosen[-1] & {sample["id"] for sample in samples(data)}
    assert chosen[0] == chosen[1] and chosen[2] == chosen[0] & {line["id"] for line in lines[:200]}
    assert 20 <= len(chosen[0]) <= 60


def test_records_of_one_group_share_a_split() -> None:
    assert {split_of(f"picture {n}.png", 0.5) for n in range(40)} == {"train", "val"}
    assert all(split_of(str(n), 0.0) == "train" for n in range(40))


@pytest.mark.filterwarnings("ignore:The prompt .* has 2401 tokens")
def test_captions_are_counted_with_a_tokenizer_where_one_is_given(tmp_path: Path) -> None:
    build_tiny_qwen3(tmp_path / "encoder", ["a red cube", "一个红色的立方体"], num_layers=2)
    texts = ["a cube", "a red cube on a table", "一个立方体", "word " * 600]
    source = jsonl(tmp_path, [{"caption.en.long": text, "caption.en.short": "a"} for text in texts])
    encoder = Qwen3TextEncoder(tmp_path / "encoder", on_long_prompt="truncate")
    for tokenizer, expected in (
        (str(tmp_path / "encoder"), [len(encoder.tokenize([text])[0]) for text in texts]),
        (None, [2, 7, 5, 512]),
    ):
        data = tmp_path / f"data-{tokenizer is None}"
        prepare(PrepareSettings(str(source), str(data), tokenizer=tokenizer, num_workers=1))
        assert np.load(data / "train" / "planning.npz")["caption_tokens"].tolist() == expected
    assert expected != [len(encoder.tokenize([text])[0]) for text in texts]


def test_large_data_go_into_several_chunks_with_running_numbers(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 300, 300, 3), dtype=np.uint8)  # 270 kB each
    lines = [{"image": f"{n}.bmp", "caption": "noise"} for n in range(10)]
    (tmp_path / "source").mkdir()
    for pixels, line in zip(noise, lines, strict=True):
        Image.fromarray(pixels).save(tmp_path / "source" / line["image"])
    source = jsonl(tmp_path / "source", lines)
    prepare(PrepareSettings(str(source), str(tmp_path / "data"), part_size=6, chunk_mib=1, num_workers=2))
    assert [path.name for path in sorted((tmp_path / "data" / "train").glob("*.bin"))] == [
        f"samples-{n:05d}.bin" for n in range(4)
    ]
    for pixels, sample in zip(noise, samples(tmp_path / "data"), strict=True):
        assert np.array_equal(read_picture(sample["image"].tobytes(), ""), pixels)


def test_a_decoder_that_fails_in_a_new_way_costs_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rgb = images._as_rgb

    def strange(picture: Image.Image) -> np.ndarray:
        if picture.size == (70, 65):
            raise ZeroDivisionError("no dots per inch")
        return as_rgb(picture)

    monkeypatch.setattr(images, "_as_rgb", strange)
    source = jsonl(tmp_path / "source", [{"image": name, "caption": "a"} for name in ("a.png", "b.png")])
    (tmp_path / "source" / "b.png").write_bytes(png(0, (70, 65)))
    prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1))
    assert rejections(tmp_path / "data") == {"list.jsonl:2": "broken picture: no dots per inch"}


def test_sides_and_files_beyond_what_can_be_stored_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "LARGEST_FILE", 14_000)
    source = jsonl(tmp_path / "source", [{"image": name, "caption": "a"} for name in ("a.png", "b.png", "c.bmp")])
    (tmp_path / "source" / "b.png").write_bytes(png(0, (70_000, 64)))
    Image.new("RGB", (80, 80)).save(tmp_path / "source" / "c.bmp")
    prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1))
    found = rejections(tmp_path / "data")
    assert found == {
        "list.jsonl:2": "too large: 70000x64, no side may have more than 65,535 pixels",
        "list.jsonl:3": "too large: a file of 19,254 bytes",
    }
