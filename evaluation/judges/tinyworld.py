"""TinyWorld's verifier as a judge: shapes, colours and letters by rules, no weights."""

import inspect
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from data_modules.tinyworld import verifier
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.weights import library_versions


class TinyWorldVerifier:
    """The judge of the role `verifier`; it is TinyWorld's own, so its judgements compare with all that it gave."""

    def record(self) -> JudgeRecord:
        """Its revision is the text of its rules."""
        rules = sha256(inspect.getsource(verifier).encode()).hexdigest()[:16]
        return JudgeRecord(
            "TinyWorldVerifier", "TinyWorld's verifier", rules, "", versions=library_versions("numpy", "scipy")
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """`verifier.judge` of each picture, less the metadata that the question has already."""
        found = [verifier.judge(np.asarray(one.pictures[0]), dict(one.question["metadata"])) for one in asked]
        return [{key: value for key, value in judged.items() if key != "metadata"} for judged in found]
