"""The preference set from the finished parts of `lightning run pairs`, and again without what a review drops."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.assembly import assemble_split
from data_modules.folder_lock import GO_ON, differences, sole_preparation
from data_modules.manifest import MANIFEST, read_manifest, write_manifest
from data_modules.part_writer import BYTES_PER_TOKEN, MAX_TOKENS, SplitWriter, split_of
from data_modules.samples import encode_sample
from zimage_lit.errors import UserError
from zimage_lit.files import read_json, write_atomically
from zimage_lit.pairs.prompts import PAIR
from zimage_lit.pairs.review_page import ShownPair, review_page
from zimage_lit.pairs.selection import PAIRED

FOLDER_KEY = "output"
WORK = ".pairs"  # below the output: the parts, with the pictures of all pairs
PART = "part.json"
DRAWING = "settings.json"  # below WORK: what decided the parts
ASSEMBLY = "assembly.json"  # below WORK: how the set was last put together from them
REVIEW = "review.json"  # below WORK: id of a pair -> kept or dropped
DECIDE_THE_SET = ("val_share", "review_pairs")  # settings of the assembly that change the files
UNFINISHED = "unfinished-"
UNFINISHED_SET = "finish the set first, by the command that began it"
CHUNK_BYTES = 64 * 2**20
ROLES = ("winner", "loser")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Hold the folder's lock; says how to go on where that is broken off."""
    with sole_preparation(output, FOLDER_KEY):
        try:
            yield
        except KeyboardInterrupt:
            Console(stderr=True).print(f"{output}: {GO_ON}", highlight=False, soft_wrap=True)
            raise
        except OSError as error:
            raise UserError(f"Making pairs in {output} stopped ({error}): mend that; {GO_ON}.") from error


def picture_name(group: str, number: int) -> str:
    return f"{group}-{number:04d}.png"


@dataclass(frozen=True)
class FoundPair:
    """A pair of a finished part."""

    id: str
    split: str
    entry: dict[str, Any]  # its prompt's in part.json
    pair: dict[str, Any]  # winner, loser, margin
    folder: Path  # of the part

    def picture(self, role: str) -> Path:
        return self.folder / picture_name(self.entry["group"], self.pair[role])

    def sample(self, role: str) -> dict[str, Any]:
        found: dict[str, Any] = self.entry["samples"][self.pair[role]]
        return found

    def metadata(self, judges: Mapping[str, str]) -> dict[str, Any]:
        """What a training sample knows of its pair."""
        known = {
            "margin": self.pair["margin"],
            "difficulty": self.entry["difficulty"],
            "group": self.entry["group"],
            "seeds": [self.sample(role)["seed"] for role in ROLES],
            "scores": {role: self.sample(role)["scores"] for role in ROLES},
            "judges": {name: judges[name] for name in self.sample("winner")["scores"]},
        }
        return {**self.entry["metadata"], PAIR: known}


def assemble(output: Path, assembly: Mapping[str, Any], verdicts: Mapping[str, str]) -> None:
    """Put the set together from its parts, without the pairs whose verdict is "dropped"; can be done again and again.

    assembly: its settings, as the task's assembly_settings gives them. verdicts: id of a pair -> kept or dropped, of
    those that a person has looked at. Both are noted first, so that whoever is killed from there on goes on with them.
    Raises UserError where no pair is left to train on: a finished set then stays as it is, and an unfinished one tells
    the reasons in summary.json and samples.jsonl.
    """
    drawing = read_json(output / WORK / DRAWING, f"delete {output} and make it anew")
    settings = {**drawing, **assembly}
    folders = part_folders(output, settings)
    entries = [(folder, entry) for folder in folders for entry in read_json(folder / PART)["prompts"]]
    pairs = list(found_pairs(entries, settings["val_share"]))
    kept = [pair for pair in pairs if verdicts.get(pair.id) != "dropped"]
    summary = summarise(entries, pairs, kept, settings)
    problem = nothing_to_train_on(output, summary, pairs)
    if problem and (output / MANIFEST).exists():
        raise problem
    if not problem:
        write_atomically(output / WORK / ASSEMBLY, json.dumps(assembly, ensure_ascii=False))
        write_atomically(output / WORK / REVIEW, json.dumps(verdicts, sort_keys=True))
    (output / MANIFEST).unlink(missing_ok=True)
    write_lines(output / "samples.jsonl", sample_rows(entries))
    write_lines(output / "pairs.jsonl", (pair_row(pair, settings["judges"], verdicts.get(pair.id)) for pair in pairs))
    write_atomically(output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    show(summary)
    if problem:
        if not pairs:
            shutil.rmtree(output / WORK)  # so that the next command may have other settings
        raise problem
    page = review_page(shown_pairs(pairs, verdicts, settings["review_pairs"]), settings["name"], set_id(drawing))
    write_atomically(output / "review.html", page)
    write_set(output, kept, {**settings, "dropped": dropped(verdicts)})
    Console().print(f"{output}: look at the pairs in {output / 'review.html'}", highlight=False, soft_wrap=True)


def is_assembled(output: Path, assembly: Mapping[str, Any]) -> bool:
    """Whether a finished set was put together with these settings and with the verdicts that are noted.

    Raises UserError where it was put together otherwise and its parts are no longer there.
    """
    wanted = {name: assembly[name] for name in DECIDE_THE_SET}
    if (output / WORK / REVIEW).is_file():
        wanted["dropped"] = dropped(noted_verdicts(output))
    different = differences(read_manifest(output).settings, wanted)
    if different and not (output / WORK).is_dir():
        raise UserError(
            f"{output} was put together with {', '.join(different)} and its parts in {WORK} are gone: give the same "
            f"settings, set {FOLDER_KEY} to another folder, or delete this one to make it anew."
        )
    return not different


def noted_verdicts(output: Path) -> dict[str, str]:
    """Those of the last review; none where there was no review."""
    path = output / WORK / REVIEW
    return read_json(path, "delete it and apply the review again") if path.is_file() else {}


def dropped(verdicts: Mapping[str, str]) -> list[str]:
    return sorted(name for name, verdict in verdicts.items() if verdict == "dropped")


def part_folders(output: Path, settings: Mapping[str, Any]) -> list[Path]:
    folders = [output / WORK / f"{number:06d}" for number in range(settings["num_parts"])]
    missing = [folder for folder in folders if not (folder / PART).is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing: {UNFINISHED_SET}.")
    return folders


def found_pairs(entries: Sequence[tuple[Path, dict[str, Any]]], val_share: float) -> Iterator[FoundPair]:
    for folder, entry in entries:
        split = split_of(entry["text"], val_share)
        for pair in entry["pairs"]:
            yield FoundPair(f"{entry['group']}-{pair['winner']}-{pair['loser']}", split, entry, pair, folder)


def sample_rows(entries: Sequence[tuple[Path, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for _, entry in entries:
        for sample in entry["samples"]:
            yield {"group": entry["group"], "prompt": entry["text"], **sample}


def pair_row(pair: FoundPair, judges: Mapping[str, str], verdict: str | None) -> dict[str, Any]:
    """A line of pairs.jsonl; `review` is null where nobody has looked."""
    known = pair.metadata(judges)[PAIR]
    pictures = {role: pair.sample(role)["picture"] for role in ROLES}
    row = {"id": pair.id, "split": pair.split, "prompt": pair.entry["text"], **known, "pictures": pictures}
    return row | {"metadata": pair.entry["metadata"], "review": verdict}


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_set(output: Path, pairs: Sequence[FoundPair], settings: dict[str, Any]) -> None:
    """train/, val/ and the manifest, which comes last."""
    work = output / WORK / f"{UNFINISHED}set"
    for folder in (work, output / "train", output / "val"):
        shutil.rmtree(folder, ignore_errors=True)
    writers = {split: SplitWriter(work / split, CHUNK_BYTES) for split in ("train", "val")}
    caption_sets: Counter[str] = Counter()
    for pair in pairs:
        language, kind, text = (pair.entry[name] for name in ("language", "kind", "text"))
        pictures: dict[str, np.ndarray | bytes] = {role: pair.picture(role).read_bytes() for role in ROLES}
        sample = encode_sample(pictures, {language: {kind: text}}, pair.metadata(settings["judges"]), pair.id)
        tokens = min(MAX_TOKENS, math.ceil(len(text.encode()) / BYTES_PER_TOKEN))
        writers[pair.split].add(sample, [settings["width"], settings["height"], tokens, -1])
        caption_sets[json.dumps([[language, kind]])] += 1
    hashes: dict[str, str] = {}
    splits = {split: len(writer.rows) for split, writer in writers.items() if writer.rows}
    for split in splits:
        chunks = writers[split].close()
        columns = np.array(writers[split].rows, dtype=np.int64)
        hashes |= assemble_split(output / split, [(work / split, chunks)], writers[split].config, columns)
    shutil.rmtree(work)
    names = sorted({(language, kind) for found in caption_sets for language, kind in json.loads(found)})
    captions = {language: [kind for own, kind in names if own == language] for language, _ in names}
    settings = {**settings, "caption_sets": dict(sorted(caption_sets.items()))}
    write_manifest(output, settings["name"], splits, captions, settings, hashes)


def summarise(
    entries: Sequence[tuple[Path, dict[str, Any]]],
    pairs: Sequence[FoundPair],
    kept: Sequence[FoundPair],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What summary.json says: what was drawn, why it made no pair, how many pairs there are in which split."""
    outcomes = Counter(sample["outcome"] for _, entry in entries for sample in entry["samples"])
    splits = Counter(pair.split for pair in kept)
    counts = {split: splits[split] for split in ("train", "val") if splits[split]}
    return {
        "prompts": {"drawn": len(entries), **settings["prompts_left_out"]},
        "pictures": dict(sorted(outcomes.items(), key=lambda entry: (-entry[1], entry[0]))),
        "pairs": {**counts, "dropped by review": len(pairs) - len(kept)},
        "prompts with pairs": len({pair.entry["group"] for pair in kept}),
        "settings": dict(settings),
    }


def nothing_to_train_on(output: Path, summary: Mapping[str, Any], pairs: Sequence[FoundPair]) -> UserError | None:
    """The sentence for a set without a pair in the training split; None where it has one. pairs: before the review."""
    if "train" in summary["pairs"]:
        return None
    if any(pair.split == "train" for pair in pairs):
        return UserError(f"the review would leave {output} without a pair to train on: keep some of them.")
    if pairs:
        return UserError(
            f"all {len(pairs)} pairs in {output} would be for validation: lower val_share (nothing is drawn again)."
        )
    reasons = "; ".join(f"{number} {reason}" for reason, number in summary["pictures"].items())
    return UserError(
        f"no pair was found among {sum(summary['pictures'].values())} pictures ({reasons}): draw more "
        "(samples_per_prompt), or widen pass_rate, margin or matched, or lower winner_at_least; "
        f"{output / 'samples.jsonl'} has every score."
    )


def show(summary: Mapping[str, Any]) -> None:
    """The table at the end."""
    table = Table("", "number", show_edge=False)
    table.columns[1].justify = "right"
    table.add_row("prompts", f"{summary['prompts']['drawn']:,}")
    table.add_row("pictures", f"{sum(summary['pictures'].values()):,}")
    for outcome, number in summary["pictures"].items():
        table.add_row(f"  {outcome}", f"{number:,}", end_section=outcome == PAIRED)
    for name, number in summary["pairs"].items():
        table.add_row(f"pairs, {name}", f"{number:,}")
    Console().print(table)


# ----------------------------------------------------------------------------------------------------------- review


def set_id(drawing: Mapping[str, Any]) -> str:
    """By which a review knows the set that it is about, wherever and with whatever val_share it is put together."""
    return sha256(json.dumps(drawing, sort_keys=True).encode()).hexdigest()[:16]


def shown_pairs(pairs: Sequence[FoundPair], verdicts: Mapping[str, str], most: int) -> Iterator[ShownPair]:
    """Those on the page in their order; where there are more, `most` of them by a lot that depends on their ids."""
    lots = sorted(pairs, key=lambda pair: sha256(pair.id.encode()).digest())
    chosen = {pair.id for pair in lots[:most]}
    for pair in pairs:
        if pair.id in chosen:
            yield ShownPair(
                pair.id,
                pair.entry["text"],
                pair.pair["margin"],
                pair.entry["difficulty"],
                pair.picture("winner").read_bytes(),
                pair.picture("loser").read_bytes(),
                pair.sample("winner")["scores"],
                pair.sample("loser")["scores"],
                verdicts.get(pair.id),
            )


def apply_review(output: Path, file: Path) -> None:
    """Put a finished set together anew, without what the review drops; an earlier review counts no more."""
    drawing = read_json(output / WORK / DRAWING, "name the output=… of a finished set of pairs")
    review = read_json(file, "save it from the set's review.html again")
    if review.get("set") != set_id(drawing):
        raise UserError(f"{file} is the review of another set than {output}: save one from its review.html.")
    known = {
        pair.id
        for folder in part_folders(output, drawing)
        for pair in found_pairs([(folder, entry) for entry in read_json(folder / PART)["prompts"]], 0)
    }
    verdicts: dict[str, str] = {}
    for verdict in ("kept", "dropped"):
        names = review.get(verdict)
        if not isinstance(names, list) or not known.issuperset(map(str, names)):
            raise UserError(f"{file}: {verdict} is no list of this set's pairs: save it from the page again.")
        verdicts |= dict.fromkeys(names, verdict)
    assembly = read_json(output / WORK / ASSEMBLY, UNFINISHED_SET)
    with writing(output):
        assemble(output, assembly, verdicts)
