"""Vision-language models as rewards: any server that speaks OpenAI's chat completions, such as vLLM, by its URL."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.pictures import as_png
from zimage_lit.rewards.remote import Connection, checked_url

YES_NO = "Does this image show what the following prompt asks for? Answer yes or no.\nPrompt: {prompt}"
RATING = (
    "Rate how well this image matches the prompt and how well it is made, from {low} (bad) to {high} (excellent). "
    "Answer with the number alone.\nPrompt: {prompt}"
)
DECOMPOSE = (
    "Break the following image prompt down into its elements: objects, numbers, colours, positions, text, style. For "
    "each, write one question that can be answered with yes or no by looking at the image, and whose answer is yes if "
    "the image follows the prompt. One question a line, nothing else.\nPrompt: {prompt}"
)
LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s*")
LONGEST_LIST = 1024  # tokens of a prompt's questions


@dataclass
class EndpointSettings:
    """Where a vision-language model answers."""

    url: str  # the API's base, such as http://localhost:8000/v1
    model: str  # as the server calls it
    api_key_env: str | None = None  # name of the environment variable that holds the key; none for servers without one
    workers: int = 8  # questions that are asked at once
    max_tokens: int = 16  # of an answer
    logprobs: bool = True  # ask for the probabilities of the answer's words; false for servers that cannot say them
    wait: float = 60.0  # seconds to go on asking a server that does not answer or is busy
    request_timeout: float = 120.0  # seconds that one answer may take


@dataclass(frozen=True)
class Answer:
    """text: the words.   tokens: for each token, its text and the likeliest alternatives with their probabilities."""

    text: str
    tokens: tuple[tuple[str, Mapping[str, float]], ...] = ()


class Endpoint:
    """Asks a model about pictures. The key is read from the environment when the first question is asked.

    who: asks, for messages: "the reward yes_no".
    """

    def __init__(self, who: str, settings: EndpointSettings) -> None:
        self.who = who
        self.settings = settings
        self.url = checked_url(who, settings.url) + "/chat/completions"

    def ask_all(self, questions: Sequence[tuple[Tensor | None, str]], max_tokens: int | None = None) -> list[Answer]:
        """One answer to each (picture uint8 (3, H, W) or none, question), in order."""
        connection = Connection(self.settings.wait, self.settings.request_timeout, self.headers())

        def ask(question: tuple[Tensor | None, str]) -> Answer:
            content = self.request(*question, max_tokens or self.settings.max_tokens)
            return read_answer(connection.ask("POST", self.url, content), self.url)

        # Not concurrent.futures: a program that ends would go on asking what a time_limit has long given up.
        with ThreadPool(self.settings.workers) as pool:
            return list(pool.imap(ask, questions))

    def headers(self) -> dict[str, str]:
        variable = self.settings.api_key_env
        if variable is None:
            return {}
        if not os.environ.get(variable):
            raise UserError(f"{self.who}: the environment variable {variable} holds no key: set it.")
        return {"Authorization": f"Bearer {os.environ[variable]}"}

    def request(self, image: Tensor | None, question: str, max_tokens: int) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            picture = {"url": f"data:image/png;base64,{as_png(image)}"}
            parts.insert(0, {"type": "image_url", "image_url": picture})
        chances = {"logprobs": True, "top_logprobs": 20} if self.settings.logprobs and image is not None else {}
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": max_tokens,
            **chances,
        }


class EndpointReward(RewardCallback):
    """What rewards by questions share.   endpoint: where the model answers.   question: holds {prompt} in its place."""

    device = "cpu"

    def __init__(self, endpoint: EndpointSettings, question: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.endpoint = endpoint
        self.question = question
        if "{prompt}" not in question:
            raise UserError(f"the reward {self.name}: question must hold {{prompt}} in its place: {question!r}.")
        self._asked = Endpoint(f"the reward {self.name}", endpoint)

    def load(self) -> None:
        self._asked.headers()  # a key that is missing stops the run before it begins

    def questions(self, prompts: Sequence[str], **words: Any) -> list[str]:
        """The question about each prompt; `words` stand in their places too."""
        asked = self.question
        for word, value in words.items():
            asked = asked.replace(f"{{{word}}}", str(value))
        return [asked.replace("{prompt}", prompt) for prompt in prompts]


class YesNoReward(EndpointReward):
    """How likely the model says yes: its probability of yes against no, or 1 and 0 where it gives no probabilities."""

    def __init__(self, endpoint: EndpointSettings, question: str = YES_NO, **settings: Any) -> None:
        super().__init__(endpoint, question, **settings)

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        asked = list(zip(images, self.questions(prompts), strict=True))
        return torch.tensor([yes_share(answer) for answer in self._asked.ask_all(asked)])


class RatingReward(EndpointReward):
    """The number that the model gives, from `low` to `high` as 0 to 1: expected over its probabilities where it tells
    them and the numbers have one digit.

    question: may hold {low} and {high} as well.
    """

    def __init__(
        self, endpoint: EndpointSettings, question: str = RATING, low: int = 1, high: int = 5, **settings: Any
    ) -> None:
        super().__init__(endpoint, question, **settings)
        if not low < high:
            raise UserError(f"the reward {self.name}: low must be below high, not {low} and {high}.")
        self.low, self.high = low, high

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        asked = list(zip(images, self.questions(prompts, low=self.low, high=self.high), strict=True))
        ratings = [rating(answer, self.low, self.high) for answer in self._asked.ask_all(asked)]
        return (torch.tensor(ratings) - self.low) / (self.high - self.low)


class InstructionReward(EndpointReward):
    """The share of a prompt's elements that the picture satisfies, by one yes-or-no question each.

    The elements are the `questions` of a prompt's metadata; where it has none, the model writes them, once for each
    prompt, when it is asked the `question`. An element that it does not answer with yes or no is left out.
    """

    def __init__(self, endpoint: EndpointSettings, question: str = DECOMPOSE, **settings: Any) -> None:
        super().__init__(endpoint, question, **settings)
        self._elements: dict[str, list[str]] = {}  # questions by prompt

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        self.write_elements(prompts, metadata)
        wanted = [
            known.get("questions") or self._elements[prompt] for prompt, known in zip(prompts, metadata, strict=True)
        ]
        asked = [
            (image, f"{element} Answer yes or no.")
            for image, elements in zip(images, wanted, strict=True)
            for element in elements
        ]
        answers = iter(self._asked.ask_all(asked))
        return torch.tensor([share_of_yes([next(answers) for _ in elements]) for elements in wanted])

    def write_elements(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Have the model write the questions that neither the metadata nor an earlier call has."""
        both = zip(prompts, metadata, strict=True)
        missing = [prompt for prompt, known in both if not known.get("questions") and prompt not in self._elements]
        missing = list(dict.fromkeys(missing))
        answers = self._asked.ask_all([(None, asked) for asked in self.questions(missing)], LONGEST_LIST)
        for prompt, answer in zip(missing, answers, strict=True):
            lines = [LIST_MARK.sub("", line).strip() for line in answer.text.splitlines()]
            self._elements[prompt] = [line for line in lines if line]

    def state_dict(self) -> dict[str, Any]:
        return {"elements": self._elements}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._elements.update(state_dict["elements"])


def read_answer(content: Mapping[str, Any], url: str) -> Answer:
    """The first choice of a chat completion. ConnectionError where the server answers something else."""
    try:
        choice = content["choices"][0]
        text = choice["message"]["content"] or ""
        tokens = tuple(
            (token["token"], {other["token"]: math.exp(other["logprob"]) for other in token["top_logprobs"]})
            for token in (choice.get("logprobs") or {}).get("content") or ()
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ConnectionError(
            f"{url} does not answer with a chat completion ({type(error).__name__}: {error})"
        ) from error
    return Answer(text, tokens)


def first_token(answer: Answer, wanted: Callable[[str], bool]) -> dict[str, float]:
    """Of the first token that is wanted: the probabilities of all wanted words in its place; empty where none is."""
    for text, chances in answer.tokens:
        if wanted(plain_word(text)):
            found: dict[str, float] = {}
            for other, chance in chances.items():
                if wanted(plain_word(other)):
                    found[plain_word(other)] = found.get(plain_word(other), 0.0) + chance
            return found
    return {}


def yes_share(answer: Answer) -> float:
    """P(yes) / (P(yes) + P(no)); without probabilities 1 or 0 by the first such word; NaN where there is neither."""
    chances = first_token(answer, lambda word: word in ("yes", "no"))
    total = sum(chances.values())
    if total > 0:
        return chances.get("yes", 0.0) / total
    said = re.search(r"\b(yes|no)\b", answer.text, re.IGNORECASE)
    return math.nan if said is None else float(said.group(1).lower() == "yes")


def share_of_yes(answers: Sequence[Answer]) -> float:
    """Of the answers that are yes or no; NaN where none is."""
    shares = [share for answer in answers if not math.isnan(share := yes_share(answer))]
    return sum(share > 0.5 for share in shares) / len(shares) if shares else math.nan


def rating(answer: Answer, low: int, high: int) -> float:
    """The number given, from low to high, expected over the chances of one-digit ones; NaN where there is none."""
    ratings = {str(number) for number in range(low, high + 1)}
    if low >= 0 and high <= 9:
        chances = first_token(answer, lambda word: word in ratings)
        if total := sum(chances.values()):
            return sum(int(word) * chance for word, chance in chances.items()) / total
    said = re.search(r"-?\d+(?:\.\d+)?", answer.text)
    value = math.nan if said is None else float(said.group())
    return value if low <= value <= high else math.nan


def plain_word(token: str) -> str:
    return token.strip(" \n\t*_.,:;!\"'▁Ġ").lower()
