"""Whether the text that a picture was to show can be read in it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evaluation.benchmarks.text import edit_distance
from zimage_lit.components.text_reader import TextReader
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.pictures import as_pil

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|「([^」]+)」|『([^』]+)』|《([^》]+)》')


class OCRReward(RewardCallback):
    """1 − the character error rate of what RapidOCR reads, 0 at the worst; text that nobody asked for counts as error.

    The wanted text is `text` (a string) or `texts` (a list) of a prompt's metadata, else what the prompt has in
    quotation marks; prompts without any are not judged. See `lines_score`.

    ignore_case: whether `Open` is as good as `OPEN`.
    min_confidence: lines that the reader is less sure of are not read, in [0, 1].
    options: of RapidOCR, such as `Det.model_path` and `Rec.model_path` for models of one's own.

    Raises UserError where RapidOCR is not installed (`pip install 'zimage-lit[ocr]'`) or does not know an option.
    """

    device = "cpu"

    def __init__(
        self,
        ignore_case: bool = False,
        min_confidence: float = 0.5,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.ignore_case = ignore_case
        self.min_confidence = min_confidence
        self.options = options or {}

    def load(self) -> None:
        self._reader = TextReader(f"the reward {self.name}", self.options)

    def applies_to(self, prompt: str, metadata: Metadata) -> bool:
        return bool(wanted_texts(prompt, metadata))

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        wanted = [wanted_texts(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        read = [self.read(image) for image in images]
        pairs = zip(read, wanted, strict=True)
        return torch.tensor([lines_score(lines, texts, self.ignore_case) for lines, texts in pairs])

    def read(self, image: Tensor) -> list[str]:
        """The lines of text in a uint8 (3, H, W) picture, in the reader's order: from top to bottom."""
        lines = self._reader.read(as_pil(image))
        return [text for text, confidence in lines if confidence >= self.min_confidence]


def wanted_texts(prompt: str, metadata: Metadata) -> list[str]:
    """What a picture is to show in letters: by the metadata, else what the prompt has in quotation marks."""
    if "texts" in metadata or "text" in metadata:
        texts = metadata["texts"] if "texts" in metadata else [metadata["text"]]
    else:
        texts = [next(group for group in match.groups() if group) for match in QUOTED.finditer(prompt)]
    return [text for text in texts if text.strip()]


def text_score(read: str, wanted: str, ignore_case: bool = False) -> float:
    """1 − edits / characters wanted, 0 at the worst; spaces do not count, and every extra character is an edit.

    Raises ValueError where no text is wanted.
    """
    read, wanted = plain(read, ignore_case), plain(wanted, ignore_case)
    if not wanted:
        raise ValueError("text_score needs the text that is wanted, and it has no characters.")
    return max(0.0, 1 - edit_distance(read, wanted) / len(wanted))


def lines_score(lines: Sequence[str], wanted: Sequence[str], ignore_case: bool = False) -> float:
    """`text_score` of several texts against the lines that were read, whose order means nothing.

    Lines and texts are paired so that the edits are fewest; a line without a text, or a text without a line, costs all
    its characters. A text that runs over several lines is read as a whole too; the better of both readings counts.
    """
    texts = [plain(text, ignore_case) for text in wanted]
    found = [plain(line, ignore_case) for line in lines]
    size = len(texts) + len(found)
    cost = np.zeros((size, size))
    cost[: len(texts), : len(found)] = [[edit_distance(line, text) for line in found] for text in texts]
    cost[: len(texts), len(found) :] = np.array([len(text) for text in texts])[:, None]
    cost[len(texts) :, : len(found)] = np.array([len(line) for line in found])[None, :]
    paired = 1 - cost[linear_sum_assignment(cost)].sum() / sum(map(len, texts))
    return max(float(paired), text_score("".join(lines), "".join(wanted), ignore_case))


def plain(text: str, ignore_case: bool) -> str:
    """Without spaces, and in one case where case does not matter."""
    text = "".join(text.split())
    return text.casefold() if ignore_case else text
