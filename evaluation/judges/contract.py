"""What a judge is: it looks at pictures and says what it sees, as plain data that is kept and scored later.

A benchmark asks its judges by role (`ROLES`); any class whose `judge` answers such questions can have the role, from
this package or a user's own. Judgements are kept by the pictures' hashes, the question and the judge's `identity`, so
they must depend on nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from PIL import Image

ROLES: Mapping[str, str] = {
    "detector": (
        'objects of the classes in {"classes": [...]}, and their colours for those in {"colors": [...]} -> '
        '{"detections": [{"cls", "box": [x1, y1, x2, y2, score], "color": name or null}]}'
    ),
    "ocr": 'text, in lines -> {"lines": [{"text", "confidence"}]}',
    "vlm": '{"prompt", "max_new_tokens"} -> {"answer"}, what a vision-language model replies',
    "clip": '{"text"} -> {"similarity"}: the cosine of picture and text',
    "vqa": '{"question"} -> {"answer"}, a word or a few in small letters',
    "llm2clip": '{"text"} -> {"similarity"}: the cosine of picture and text',
    "style": '{"style": the name of the reference pictures} -> {"csd": [cosine to each], "se": [the same]}',
    "distance": 'of two pictures -> {"distance"}',
    "verifier": '{"metadata": what was asked for} -> what TinyWorld\'s verifier sees, as `verifier.judge` says it',
}


class Asked(NamedTuple):
    """One question about a picture, or about two for `distance`."""

    pictures: tuple[Image.Image, ...]  # RGB
    question: Mapping[str, Any]  # plain data, as the role says


@dataclass(frozen=True)
class JudgeRecord:
    """Who judged, for results and audits.

    model, revision: as its makers call it; the revision is what tells the weights apart (a hash of the files).
    differs: why its judgements cannot be compared with published ones, empty for the benchmark's own judge.
    settings: all that its judgements depend on beside the weights.   versions: of the libraries that it runs in.
    """

    judge: str  # class
    model: str
    revision: str
    differs: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What judgements are kept by: a library's new version does not make them void, but is in the record."""
        return {key: value for key, value in asdict(self).items() if key not in ("differs", "versions")}

    @property
    def key(self) -> str:
        """The identity in 12 hex digits."""
        return sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]


class Judge(Protocol):
    """A model that looks at pictures. Its constructor takes folders and settings and reads nothing large."""

    def record(self) -> JudgeRecord:
        """Who it is. UserError, in a sentence that names the folder and the way out, where it cannot be used."""
        ...

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """A judgement for each question, in order, as plain data; weights are read at the first call.

        The same whatever else is asked in the call. An exception ends the evaluation: it must never be made a score.
        """
        ...
