"""A reward that lives elsewhere: in another process, environment or machine, behind HTTP.

What travels is JSON, and pictures as PNG files in base64 inside it: nothing that either side would execute. A server
answers two requests (`zimage_lit.rewards.server` is one; any other will do):

    GET  /health -> {"version": text, "kind": "pointwise" | "groupwise"}
    POST /score     {"images": [PNG in base64, …], "prompts": [text, …], "metadata": [object, …]}
                 -> {"scores": [number, or null for "could not judge", …], "version": text}
    and, where it fails, a status of 400 or above with {"error": text}
"""

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import requests
import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.pictures import as_png

BUSY = (429, 502, 503, 504)  # statuses of a server that is not there yet, or has too much to do
UNREACHABLE = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds between two attempts


class RemoteReward(RewardCallback):
    """Scores of a server.

    url: of the server, such as http://localhost:8000.
    kind: groupwise where the server has to see a group whole.
    wait: seconds that a call goes on asking a server that does not answer or is busy; then the call has failed, and
        the run stops or, with `required: false`, goes on without these scores.
    request_timeout: seconds that one answer may take.

    With a `time_limit`, let it be longer than `wait`. Raises UserError for an address that is none.
    """

    device = "cpu"

    def __init__(
        self,
        url: str,
        kind: Literal["pointwise", "groupwise"] = "pointwise",
        wait: float = 60.0,
        request_timeout: float = 120.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.url = checked_url(f"the reward {self.name}", url)
        self.kind = kind
        self.connection = Connection(wait, request_timeout)
        self._answered = "never asked"

    def load(self) -> None:
        """Ask for the server's kind: a groupwise judge must not be shown groups in pieces."""
        try:
            known = self.connection.ask("GET", f"{self.url}/health")
        except ConnectionError as error:
            if self.required:
                raise UserError(f"the reward {self.name}: {error}: start its server, or mend the url.") from None
            warnings.warn(f"the reward {self.name}: {error}", stacklevel=2)
            return
        if known.get("kind", self.kind) != self.kind:
            raise UserError(f"the reward {self.name}: {self.url} is {known['kind']}: set kind to {known['kind']}.")

    @property
    def version(self) -> str:
        """The address, and the version that the server gave in its last answer."""
        return f"{self.url} {self._answered}"

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        content = {
            "images": [as_png(image) for image in images],
            "prompts": list(prompts),
            "metadata": [dict(known) for known in metadata],
        }
        answer = self.connection.ask("POST", f"{self.url}/score", content)
        self._answered = str(answer.get("version", "without a version"))
        return as_scores(answer.get("scores"), self.url)


class Connection:
    """JSON over HTTP, patient with servers that are away.

    wait: seconds to go on asking one that does not answer or is busy.   request_timeout: seconds for one answer.
    """

    def __init__(self, wait: float, request_timeout: float, headers: dict[str, str] | None = None) -> None:
        self.wait = wait
        self.request_timeout = request_timeout
        self.headers = headers or {}

    def ask(self, method: str, url: str, content: Any = None) -> dict[str, Any]:
        """The object that the server answers; ConnectionError, with what went wrong, where there is none in time."""
        deadline, pause, told = time.monotonic() + self.wait, FIRST_PAUSE, False
        while True:
            try:
                answer = requests.request(
                    method, url, json=content, headers=self.headers, timeout=self.request_timeout, allow_redirects=False
                )
            except UNREACHABLE as error:
                problem = f"{url} does not answer ({type(error).__name__})"
            else:
                if answer.status_code not in BUSY:
                    return content_of(answer, url)
                problem = f"{url} is busy (status {answer.status_code})"
            if time.monotonic() + pause > deadline:
                raise ConnectionError(f"{problem}, after {self.wait:g} s of asking")
            if not told:
                warnings.warn(f"{problem}; asking again for up to {self.wait:g} s", stacklevel=2)
                told = True
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def content_of(answer: requests.Response, url: str) -> dict[str, Any]:
    try:
        content = answer.json()
    except requests.JSONDecodeError:
        content = None
    if answer.status_code != 200:
        said = content.get("error") if isinstance(content, dict) else None
        raise ConnectionError(f"{url} answers with status {answer.status_code}: {said or answer.text[:200]}")
    if not isinstance(content, dict):
        raise ConnectionError(f"{url} does not answer with a JSON object, but {answer.text[:200]!r}")
    return content


def as_scores(scores: Any, url: str) -> Tensor:
    """A list of numbers and nulls as float32, null as NaN. ConnectionError for anything else."""
    numbers = isinstance(scores, list) and all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in scores
    )
    if not numbers:
        raise ConnectionError(f"{url} answers without `scores`, a list of numbers and nulls")
    return torch.tensor([math.nan if value is None else value for value in scores], dtype=torch.float32)


def checked_url(who: str, url: str) -> str:
    """Without a slash at its end. UserError for anything but http:// and https://."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{who}: url must begin with http:// or https://, not be {url!r}.")
    return url.rstrip("/")
