"""One record of a source: its pictures as they are, and what its fields say of captions, concept, id and the rest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_modules.images import Rejected
from data_modules.samples import ROLES, Captions
from zimage_lit.config import did_you_mean
from zimage_lit.errors import UserError

# What a data set may be made of, as the pictures of each record: an edited picture and what it was made from, a pair to
# choose from, a picture, or prompts alone.
ROLE_SETS = (("image", "source"), ("winner", "loser"), ("image",), ())
# What a field may stand for, and the names under which it is known without being asked for. `caption.LANGUAGE.KIND` and
# `caption.KIND` go by these very names.
TARGETS = {
    "image": ("image", "file_name", "image_path"),
    "source": ("source",),
    "winner": ("winner",),
    "loser": ("loser",),
    "caption": ("caption", "prompt"),
    "captions": ("captions",),
    "text": ("text",),
    "concept": ("concept",),
    "id": ("id",),
}


@dataclass(frozen=True)
class Record:
    """What one sample is made from.

    place: where it was found, for people.   group: records of one group belong to the same split.
    pictures: role -> (file name, bytes), roles as in ROLE_SETS.   concept: None where there is none.
    """

    place: str
    id: str
    group: str
    pictures: dict[str, tuple[str, bytes]]
    captions: Captions
    metadata: dict[str, Any]
    concept: str | None


@dataclass(frozen=True)
class Rejection:
    """A record that cannot be used, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """Which field stands for what.

    names: target -> name of the field.   roles: the pictures of a record.   asked: what a person said of the names,
    None for a target that is to have no field.   language: of captions that do not say theirs.
    """

    asked: dict[str, str | None]
    language: str
    names: dict[str, str] = field(default_factory=dict)
    roles: list[str] = field(default_factory=lambda: ["image"])

    @classmethod
    def asked_for(cls, columns: Mapping[str, Any] | None, language: str) -> "Columns":
        """From the setting `columns`, whose keys may be dotted or nested. UserError for what is no target."""
        asked = _flat(columns or {})
        for target, name in asked.items():
            if target not in TARGETS and not _is_caption(target):
                known = [*TARGETS, "caption.LANGUAGE.KIND"]
                raise UserError(f"columns.{target} is not known{did_you_mean(target, known, listing='there are')}")
            if name is not None and not isinstance(name, str):
                raise UserError(f"columns.{target} must be the name of a column or null, not {name!r}.")
        return cls(asked, language)

    def of_sidecar(self, fields: Mapping[str, Any]) -> "Columns":
        """For the fields of one sidecar, which tells of captions and concept only."""
        names = {target: name for target, name in self._matches(fields).items() if target not in (*ROLES, "id")}
        return replace(self, names=names)

    def of_table(self, found: Sequence[str], place: str, pictures: Sequence[str] = ()) -> "Columns":
        """For a table with these columns; `pictures` are those that can be nothing but pictures.

        UserError where an asked column is not there, where a role lacks its partner, and where nothing is a caption.
        """
        for target, name in self.asked.items():
            if name is not None and name not in found:
                raise UserError(f"columns.{target}={name}: {place} has no such column, only {', '.join(found)}.")
        names = self._matches(found)
        unused = [name for name in pictures if name not in names.values()]
        if not set(ROLES) & set(names) and "image" not in self.asked and len(unused) == 1:
            names["image"] = unused[0]
        roles = next(roles for roles in ROLE_SETS if set(names) >= set(roles))
        for role in set(ROLES) - set(roles):
            if self.asked.get(role):
                partner = {"source": "image", "winner": "loser", "loser": "winner"}.get(role)
                wanting = f"needs columns.{partner} too" if partner not in names else "is one kind of data too many"
                raise UserError(f"columns.{role} {wanting}: a record has {' or '.join(map(str, ROLE_SETS[:3]))}.")
            names.pop(role, None)
        if not any(_is_caption(target) or target in ("caption", "captions") for target in names):
            raise UserError(
                f"{place} has no column that is known for captions, only {', '.join(found)}: name it as "
                "columns.caption=…, or columns.caption.LANGUAGE.KIND=…."
            )
        return replace(self, names=names, roles=list(roles))

    def _matches(self, found: Any) -> dict[str, str]:
        names = {target: name for target, name in self.asked.items() if name is not None and name in found}
        known = {**TARGETS, **{name: (name,) for name in found if isinstance(name, str) and _is_caption(name)}}
        for target, candidates in known.items():
            name = next((name for name in candidates if name in found and name not in names.values()), None)
            if name is not None and target not in self.asked:
                names[target] = name
        return names


def build_record(
    place: str,
    pictures: dict[str, tuple[str, bytes]],
    fields: Mapping[str, Any],
    columns: Columns,
    record_id: str | None = None,
    shared: str = "",
) -> Record:
    """A record from its pictures and fields; those that stand for nothing become metadata.

    record_id: of sources whose records have a name; else the field `id`, else the place. shared: names the picture that
    other records may have too. Raises Rejected where there is no caption, or something is of the wrong type.
    """
    values = {target: fields[name] for target, name in columns.names.items() if name in fields}
    captions = _captions(values, columns)
    used = set(columns.names.values())
    metadata = {name: value for name, value in fields.items() if name not in used}
    own_id = record_id
    if "id" in columns.names:
        if values.get("id") in (None, ""):
            raise Rejected(f"no id: {columns.names['id']} is empty")
        own_id = str(values["id"])
    concept = None if values.get("concept") in (None, "") else str(values["concept"])
    try:
        metadata = json.loads(json.dumps(metadata, ensure_ascii=False, default=str).encode())
        said = json.dumps(captions, sort_keys=True, ensure_ascii=False)
        group = record_id or shared or own_id or said
        for text in (own_id or "", group, concept or ""):
            text.encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise Rejected(f"unreadable record: it cannot be written as UTF-8 ({error})") from None
    return Record(place, own_id or place, group, pictures, captions, metadata, concept)


def _captions(values: Mapping[str, Any], columns: Columns) -> Captions:
    captions: Captions = {}

    def add(language: str, kind: str, text: Any) -> None:
        if text is None:
            return
        if not isinstance(text, str):
            raise Rejected(f"unreadable caption: {language}.{kind} must be text, not {text!r:.40}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Rejected(f"unreadable caption: {language}.{kind} is not UTF-8") from None
        captions.setdefault(language, {})[kind] = text.strip()

    for name, value in _all_captions(values.get("captions")).items():
        if isinstance(value, dict):
            for kind, text in value.items():
                add(name, kind, text)
        else:
            add(columns.language, name, value)
    for target, value in values.items():
        if target == "caption":
            add(columns.language, "instruction" if "source" in columns.roles else "medium", value)
        elif target == "text":
            add(columns.language, "text", value)
        elif _is_caption(target):
            *language, kind = target.split(".")[1:]
            add(language[0] if language else columns.language, kind, value)
    return _not_empty(captions)


def _all_captions(value: Any) -> dict[str, Any]:
    """language -> kind -> text, or kind -> text; perhaps as JSON, where a table holds text only."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Rejected("unreadable caption: captions is not JSON") from None
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise Rejected(f"unreadable caption: captions must be an object, not {value!r:.40}")
    return value


def _not_empty(captions: Captions) -> Captions:
    """Only what says something; Rejected where nothing does. What is written in a picture does not describe it."""
    kept = {
        language: {kind: text for kind, text in kinds.items() if text}
        for language, kinds in captions.items()
        if any(kinds.values())
    }
    if not any(kind != "text" for kinds in kept.values() for kind in kinds):
        if any(kind != "text" for kinds in captions.values() for kind in kinds):
            raise Rejected("empty caption: it says nothing")
        raise Rejected("no caption: nothing describes it")
    return kept


def _is_caption(target: str) -> bool:
    """`caption.KIND` or `caption.LANGUAGE.KIND`."""
    first, *rest = target.split(".")
    return first == "caption" and 1 <= len(rest) <= 2 and all(rest)


def _flat(columns: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in columns.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
