"""Every kind of source gives its records in a fixed order, and names what it cannot use."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_modules.sources import Record, Rejection, open_source
from zimage_lit.errors import UserError


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path, part_size: int = 1000, **options: Any) -> list[Record | Rejection]:
    """All records, each part read as a worker that got it from another process would."""
    source = open_source(path, part_size, **options)
    parts = [list(pickle.loads(pickle.dumps(part)).records()) for part in source.parts]
    assert [len(records) for records in parts] == [part.count for part in source.parts]
    assert all(0 < len(records) <= part_size for records in parts)
    return [record for records in parts for record in records]


def good(records: list[Record | Rejection]) -> list[Record]:
    assert all(isinstance(record, Record) for record in records), records
    return records  # type: ignore[return-value]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------- folder


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    sidecar = {
        "captions": {"zh": {"short": "一只猫", "long": "一只猫在垫子上"}, "short": "a cat"},
        "caption": "a cat on a mat",
        "text": "MEOW",
        "concept": "cat",
        "author": {"name": "Ann"},
        "id": 7,
    }
    write(
        tmp_path,
        {
            "b.png": picture(1),
            "b.txt": "\ufeffa dog\n",
            "a/z.jpg": picture(2),
            "a/z.json": json.dumps(sidecar),
            "a/z.txt": "not taken",
            ".hidden/c.png": b"",
            ".DS_Store": b"",
        },
    )
    dog, cat = good(read(tmp_path, part_size=1))
    assert (dog.place, dog.id, dog.captions) == ("b.png", "b.png", {"en": {"medium": "a dog"}})
    assert dog.pictures == {"image": ("b.png", picture(1))} and dog.metadata == {} and dog.concept is None
    assert cat.id == "a/z.jpg" and cat.concept == "cat" and cat.metadata == {"author": {"name": "Ann"}, "id": 7}
    assert cat.captions == {
        "zh": {"short": "一只猫", "long": "一只猫在垫子上"},
        "en": {"short": "a cat", "medium": "a cat on a mat", "text": "MEOW"},
    }


def test_the_language_of_plain_captions_is_a_setting(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.txt": "一只猫"})
    (record,) = good(read(tmp_path, language="zh"))
    assert record.captions == {"zh": {"medium": "一只猫"}}


def test_a_sidecar_may_call_its_caption_anything(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(), "a.json": '{"alt": "one", "caption": 3}', "b.png": picture(), "b.txt": "two"})
    one, two = good(read(tmp_path, columns={"caption": "alt"}))
    assert one.captions == {"en": {"medium": "one"}} and one.metadata == {"caption": 3}
    assert two.captions == {"en": {"medium": "two"}} and two.metadata == {}


def test_what_is_wrong_in_a_folder_is_a_rejection_each(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.png": picture(),
            "b.png": picture(),
            "b.txt": " \n",
            "c.png": picture(),
            "c.txt": b"caf\xe9",
            "d.png": picture(),
            "d.json": "{",
            "e.png": picture(),
            "e.json": "[1]",
            "f.png": picture(),
            "f.json": '{"caption": 5}',
            "g.png": picture(),
            "g.json": '{"text": "only what is written"}',
            "h.png": picture(),
            "h.json": '{"caption": "\\ud800"}',
            "i.txt": "nothing beside it",
            "j.png": picture(),
            "j.json": '{"caption": "a", "note": "\\ud800"}',
        },
    )
    (tmp_path / "k.png").symlink_to("nowhere")
    found = {record.place: record.reason for record in read(tmp_path) if isinstance(record, Rejection)}
    assert {place: reason.partition(":")[0] for place, reason in found.items()} == {
        "a.png": "no caption",
        "b.png": "empty caption",
        "c.png": "unreadable sidecar",
        "d.png": "unreadable sidecar",
        "e.png": "unreadable sidecar",
        "f.png": "unreadable caption",
        "g.png": "no caption",
        "h.png": "unreadable caption",
        "i.txt": "no picture",
        "j.png": "unreadable record",
        "k.png": "missing file",
    }


# ---------------------------------------------------------------------------------------------------- lines


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write(tmp_path, {f"pictures/{number}.png": picture(number) for number in range(5)})


@pytest.mark.parametrize("part_size", [1, 2, 100])
def test_jsonl_by_columns_of_any_name(pictures: Path, part_size: int) -> None:
    lines = [
        {"file": f"pictures/{n}.png", "description": f"number {n}", "中文": f"第{n}", "key": n, "extra": [n]}
        for n in range(5)
    ]
    path = jsonl(pictures / "list.jsonl", *lines)
    columns = {"image": "file", "caption": {"en": {"long": "description"}}, "caption.zh.short": "中文", "id": "key"}
    records = good(read(path, part_size, columns=columns))
    assert [record.id for record in records] == ["0", "1", "2", "3", "4"]
    assert [record.pictures["image"][1] for record in records] == [picture(n) for n in range(5)]
    assert records[3].captions == {"en": {"long": "number 3"}, "zh": {"short": "第3"}}
    assert records[3].metadata == {"extra": [3]} and records[3].place == "list.jsonl:4"


def test_a_line_that_cannot_be_used_is_named_with_its_number(pictures: Path) -> None:
    path = jsonl(pictures / "list.jsonl", {"image": "pictures/0.png", "caption": "a"})
    with path.open("ab") as stream:
        stream.write(b'\n{"image": \n["image"]\n{"image": "pictures/9.png", "caption": "a"}\n{"caption": "a"}\n')
        stream.write(b'{"image": "pictures", "caption": "a"}\n{"image": "http://a.b/c.png", "caption": "a"}\n')
        stream.write(b'{"image": "%s", "caption": "a"}\n{"image": "a\\u0000", "caption": "a"}\n' % (b"a" * 999))
        stream.write(b'{"image": 5, "caption": "a"}\n{"image": "pictures/1.png"}\n"\xff"\n')
    records = read(path, part_size=2)
    assert isinstance(records[0], Record)
    found = [(record.place, record.reason.partition(":")[0]) for record in records[1:] if isinstance(record, Rejection)]
    assert found == [
        ("list.jsonl:3", "unreadable record"),
        ("list.jsonl:4", "unreadable record"),
        ("list.jsonl:5", "missing file"),
        ("list.jsonl:6", "no picture"),
        ("list.jsonl:7", "unreadable file"),
        ("list.jsonl:8", "missing file"),
        ("list.jsonl:9", "missing file"),
        ("list.jsonl:10", "missing file"),
        ("list.jsonl:11", "unreadable record"),
        ("list.jsonl:12", "no caption"),
        ("list.jsonl:13", "unreadable record"),
    ]


@pytest.mark.parametrize("part_size", [1, 2, 100])
def test_csv_with_rows_over_several_lines(pictures: Path, part_size: int) -> None:
    path = pictures / "list.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file_name", "caption", "caption.zh.long", "year"])
        rows.writerow(["pictures/0.png", "one\nor, two", "猫", "1999"])
        rows.writerow(["pictures/1.png", 'a "quoted" one', "", "2000"])
        stream.write("pictures/2.png,too,many,fields,here\r\n\r\n")
        stream.write("pictures/3.png,last one,狗,2001")
    first, second, third, last = read(path, part_size)
    assert isinstance(first, Record) and isinstance(second, Record) and isinstance(last, Record)
    assert first.captions == {"en": {"medium": "one\nor, two"}, "zh": {"long": "猫"}} and first.place == "list.csv:2"
    assert second.captions == {"en": {"medium": 'a "quoted" one'}} and second.metadata == {"year": "2000"}
    assert third == Rejection("list.csv:5", "unreadable record: 5 fields where the header has 4")
    assert last.place == "list.csv:7" and last.pictures["image"][1] == picture(3)


def test_tsv_and_bytes_that_are_not_utf8(pictures: Path) -> None:
    (pictures / "list.tsv").write_bytes(b"image\tcaption\npictures/0.png\tcaf\xe9\npictures/1.png\tfine, too\n")
    bad, fine = read(pictures / "list.tsv", part_size=1)
    assert bad == Rejection("list.tsv:2", "unreadable record: it is not UTF-8")
    assert isinstance(fine, Record) and fine.captions == {"en": {"medium": "fine, too"}}


# ---------------------------------------------------------------------------------------------------- roles


def test_editing_preference_and_prompts(pictures: Path) -> None:
    edited = {"image": "pictures/1.png", "source": "pictures/0.png", "caption": "darker", "caption.en.difference": "d"}
    source = open_source(jsonl(pictures / "edits.jsonl", edited))
    (record,) = good(list(source.parts[0].records()))
    assert source.roles == ["image", "source"] and list(record.pictures) == ["image", "source"]
    assert record.captions == {"en": {"instruction": "darker", "difference": "d"}}
    assert record.group == "pictures/0.png"  # edits of one picture stay in one split

    pair = {"winner": "pictures/1.png", "loser": "pictures/0.png", "prompt": "bright"}
    source = open_source(jsonl(pictures / "pairs.jsonl", pair))
    (record,) = good(list(source.parts[0].records()))
    assert source.roles == ["winner", "loser"] and record.pictures["loser"][1] == picture(0)

    source = open_source(jsonl(pictures / "prompts.jsonl", {"prompt": "a cat", "source": "a book", "count": 1}))
    (record,) = good(list(source.parts[0].records()))
    assert source.roles == [] and record.pictures == {} and record.captions == {"en": {"medium": "a cat"}}
    assert record.metadata == {"source": "a book", "count": 1}


def test_a_column_can_be_left_to_the_metadata(pictures: Path) -> None:
    line = {"image": "pictures/1.png", "source": "wikipedia", "caption": "a cat"}
    source = open_source(jsonl(pictures / "list.jsonl", line), columns={"source": None})
    (record,) = good(list(source.parts[0].records()))
    assert source.roles == ["image"] and record.metadata == {"source": "wikipedia"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "fil"}, r"columns\.image=fil: .*list\.jsonl has no such column, only image, words, source"),
        ({"imag": "image"}, r"columns\.imag is not known .did you mean 'image'"),
        ({"image": 3}, r"columns\.image must be the name of a column or null, not 3"),
        ({"winner": "image", "caption": "words"}, r"columns\.winner needs columns\.loser too"),
        ({}, "has no column that is known for captions, only image, words, source: name it as columns.caption="),
    ],
)
def test_columns_that_cannot_be_are_refused(pictures: Path, columns: dict[str, Any], message: str) -> None:
    path = jsonl(pictures / "list.jsonl", {"image": "pictures/1.png", "words": "a", "source": "pictures/0.png"})
    with pytest.raises(UserError, match=message):
        open_source(path, columns=columns)


# ---------------------------------------------------------------------------------------------------- Arrow


def test_parquet_with_paths_and_row_groups(pictures: Path) -> None:
    table = pa.table(
        {
            "image": [f"pictures/{n}.png" for n in range(5)],
            "captions": [{"en": {"short": f"n {n}"}, "zh": {"short": f"第{n}" if n else None}} for n in range(5)],
            "embedding": [b"123"] * 5,
            "score": [n / 2 for n in range(5)],
        }
    )
    pq.write_table(table, pictures / "list.parquet", row_group_size=3)
    for part_size in (2, 1000):
        records = good(read(pictures / "list.parquet", part_size))
        assert [record.pictures["image"][1] for record in records] == [picture(n) for n in range(5)]
        assert records[4].captions == {"en": {"short": "n 4"}, "zh": {"short": "第4"}}
        assert records[0].captions == {"en": {"short": "n 0"}}
        assert records[4].place == "list.parquet:4" and records[4].metadata == {"score": 2.0}


def saved(folder: Path, count: int = 5, **options: Any) -> Path:
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    rows = {
        "photo": [{"bytes": picture(n), "path": f"{n}.png"} for n in range(count)],
        "text": [f"words {n}" for n in range(count)],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(folder, **options)
    return folder


def test_a_hugging_face_folder_as_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", num_shards=2)
    for part_size in (2, 1000):
        records = good(read(folder, part_size, columns={"caption": "text"}))
        assert [record.pictures["image"] for record in records] == [(f"{n}.png", picture(n)) for n in range(5)]
        assert [record.captions for record in records] == [{"en": {"medium": f"words {n}"}} for n in range(5)]
    with pytest.raises(UserError, match="has no column that is known for captions, only photo, text"):
        open_source(folder)


def test_a_hugging_face_folder_of_splits_must_be_told_which(tmp_path: Path) -> None:
    saved(tmp_path / "set" / "train")
    saved(tmp_path / "set" / "test")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"has the splits train, test: name one of them, such as source=.*/set/train"):
        open_source(tmp_path / "set")
    assert open_source(tmp_path / "set" / "test", columns={"caption": "text"}).num_records == 5


def test_a_hugging_face_folder_of_parquet_shards(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard in range(2):
        rows = [{"bytes": picture(shard), "path": None}, {"bytes": None, "path": None}]
        table = pa.table({"image": pa.array(rows, kind), "caption": ["a", "b"]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"train-{shard:05d}.parquet")
    first, empty, second, _ = read(tmp_path)
    assert isinstance(first, Record) and isinstance(second, Record)
    assert first.pictures["image"] == ("", picture(0)) and second.pictures["image"] == ("", picture(1))
    assert empty == Rejection("data/train-00000.parquet:1", "no picture: image is empty")


# ---------------------------------------------------------------------------------------------------- tars


def tar(path: Path, count: int, shade: int = 0) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for n in range(count):
            captions = {"json": {"captions": {"zh": {"short": f"第{n}"}}, "n": n}} if n % 2 else {"txt": f"number {n}"}
            writer.write({"__key__": f"sub/{n:04d}", "png": picture(shade + n), **captions})
    return path


@pytest.mark.parametrize("part_size", [1, 3, 100])
def test_webdataset_tars(tmp_path: Path, part_size: int) -> None:
    tar(tmp_path / "shard-1.tar", 4, shade=100)
    tar(tmp_path / "shard-0.tar", 5)
    records = good(read(tmp_path, part_size))
    assert [record.pictures["image"][1] for record in records] == [
        picture(n) for n in (0, 1, 2, 3, 4, 100, 101, 102, 103)
    ]
    assert records[0].captions == {"en": {"medium": "number 0"}} and records[0].id == "shard-0.tar:sub/0000"
    assert records[1].captions == {"zh": {"short": "第1"}} and records[1].metadata == {"n": 1}
    assert len({record.id for record in records}) == 9


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_a_tar_of_edits_and_what_lacks_a_picture(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "edits.tar", "w") as archive:
        for key in ("b", "a"):
            add(archive, f"{key}.jpg", picture(1))
            if key == "a":
                add(archive, f"{key}.source.jpg", picture(0))
            add(archive, f"{key}.txt", b"brighter")
        add(archive, "d" * 150 + ".txt", b"a long name")
    source = open_source(tmp_path / "edits.tar")
    lacking, record, alone = list(source.parts[0].records())
    assert source.roles == ["image", "source"] and isinstance(record, Record)
    assert record.pictures == {"image": ("image.jpg", picture(1)), "source": ("source.jpg", picture(0))}
    assert record.captions == {"en": {"instruction": "brighter"}}
    assert lacking == Rejection("edits.tar:b", "no picture: only jpg, txt, no source")
    assert isinstance(alone, Rejection) and alone.place == "edits.tar:" + "d" * 150


@pytest.mark.parametrize("part_size", [1, 2, 100])
def test_a_tar_that_breaks_off_or_is_damaged_gives_what_it_has(tmp_path: Path, part_size: int) -> None:
    content = tar(tmp_path / "a.tar", 6).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        places = {member.name: member for member in archive}
    cut = places["sub/0003.png"].offset_data + 10
    (tmp_path / "a.tar").write_bytes(content[:cut])
    *records, cut_off, rejection = read(tmp_path / "a.tar", part_size)
    assert [record.id for record in good(records)] == [f"a.tar:sub/000{n}" for n in range(3)]
    assert cut_off == Rejection("a.tar:sub/0003", "broken archive: it ends in the middle of png")
    assert rejection.place == "a.tar" and rejection.reason.startswith("broken archive: ")

    header = places["sub/0003.png"].offset
    (tmp_path / "a.tar").write_bytes(content[:header] + b"\xff" * 512 + content[header + 512 :])
    *records, rejection = read(tmp_path / "a.tar", part_size)
    assert len(records) >= 3 and rejection.reason == "broken archive: it has no proper end, what followed is lost"

    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    (rejection,) = read(tmp_path / "a.tar", part_size)
    assert isinstance(rejection, Rejection) and rejection.reason.startswith("broken archive: ")


# ---------------------------------------------------------------------------------------------------- recognition


def test_what_is_no_source_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no source .*/nowhere: correct source="):
        open_source(tmp_path / "nowhere")
    write(tmp_path, {"list.xlsx": b"", "empty/.keep": b"", "mixed/a.png": b"", "mixed/b.tar": b""})
    with pytest.raises(UserError, match=r"list\.xlsx is no file of a known kind .*format="):
        open_source(tmp_path / "list.xlsx")
    with pytest.raises(UserError, match="holds nothing that can be read"):
        open_source(tmp_path / "empty")
    with pytest.raises(UserError, match=r"several kinds of sources .a\.png, b\.tar.*format="):
        open_source(tmp_path / "mixed")
    assert open_source(tmp_path / "mixed", format="folder").num_records == 2
    write(tmp_path, {"photos/metadata.csv": "file_name,text\n", "photos/a.png": b""})
    with pytest.raises(UserError, match=r"holds metadata\.csv: give that file as source=.*format=folder"):
        open_source(tmp_path / "photos")
    with pytest.raises(UserError, match=r"read as csv, holds no records"):
        open_source(tmp_path / "photos" / "metadata.csv", columns={"caption": "text"})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read as parquet"):
        open_source(tmp_path / "broken.parquet")


def test_a_source_is_known_again_by_its_names_and_sizes(tmp_path: Path) -> None:
    write(tmp_path, {"one/a.png": picture(), "one/a.txt": "a", "two/a.png": picture(), "two/a.txt": "a"})
    assert open_source(tmp_path / "one").listing == open_source(tmp_path / "two").listing
    (tmp_path / "two" / "a.txt").write_text("ab")
    assert open_source(tmp_path / "one").listing != open_source(tmp_path / "two").listing


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    write(tmp_path, {"a/a.png": picture(), "a/a.txt": "a"})
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert [record.place for record in good(read(tmp_path))] == ["a/a.png"]


# ---------------------------------------------------------------------------------------------------- any


def test_columns_that_first_appear_far_down_a_manifest_are_known(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture()})
    english = [{"image": "a.png", "caption.en.medium": "a cat"}] * 120
    chinese = {"image": "a.png", "caption.zh.medium": "一只猫", "concept": "cat"}
    *_, last = good(read(jsonl(tmp_path / "list.jsonl", *english, chinese)))
    assert last.captions == {"zh": {"medium": "一只猫"}} and last.concept == "cat" and last.metadata == {}


def test_captions_beside_pictures_are_found_in_capitals_too(tmp_path: Path) -> None:
    write(tmp_path, {"A.PNG": picture(), "A.TXT": "a cat", "b.png": picture(1), "b.txt": "a dog"})
    assert [record.captions["en"]["medium"] for record in good(read(tmp_path))] == ["a cat", "a dog"]


def test_what_is_made_from_one_picture_belongs_together(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(1), "b.png": picture(2)})
    lines = [{"id": str(n), "image": name, "caption": "a cat"} for n, name in enumerate(("a.png", "a.png", "b.png"))]
    first, same, other = (record.group for record in good(read(jsonl(tmp_path / "list.jsonl", *lines))))
    assert first == same != other

    embedded = [{"bytes": picture(shade), "path": "image.png"} for shade in (1, 1, 2)]
    pq.write_table(pa.table({"image": embedded, "caption": ["a cat"] * 3}), tmp_path / "list.parquet")
    first, same, other = (record.group for record in good(read(tmp_path / "list.parquet")))
    assert first == same != other
