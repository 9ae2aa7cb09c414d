"""Rewards by questions to a vision-language model, played by a server that answers by a table."""

import json
import math
import socket
import threading
from collections.abc import Iterator
from concurrent.futures.thread import _threads_queues as waited_for
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.vision_language import (
    Answer,
    EndpointSettings,
    InstructionReward,
    RatingReward,
    YesNoReward,
    rating,
    yes_share,
)

IMAGES = [torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (0, 255)]


class Model(ThreadingHTTPServer):
    """`answers`: from a part of the question to the answer's text, or to its text and tokens."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Player)

    @property
    def settings(self) -> EndpointSettings:
        return EndpointSettings(f"http://127.0.0.1:{self.server_port}/v1/", "model-7b", workers=2)

    def choice(self, asked: dict[str, Any]) -> dict[str, Any]:
        question = next(part["text"] for part in asked["messages"][0]["content"] if part["type"] == "text")
        known = next(answer for part, answer in self.answers.items() if part in question)
        text, tokens = known if isinstance(known, tuple) else (known, None)
        return {"message": {"role": "assistant", "content": text}, "logprobs": {"content": tokens} if tokens else None}


class Player(BaseHTTPRequestHandler):
    server: Model

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers.get("Authorization"))
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [self.server.choice(asked)]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Model()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def token(text: str, **chances: float) -> dict[str, Any]:
    return {"token": text, "top_logprobs": [{"token": word, "logprob": math.log(p)} for word, p in chances.items()]}


def test_yes_or_no_is_asked_for_each_picture_with_its_prompt(model: Model) -> None:
    model.answers = {"a cat": ("Yes", [token("Yes", Yes=0.5, yes=0.1, No=0.2, Maybe=0.2)]), "a dog": "No."}
    scores = RewardSet([YesNoReward(model.settings)]).score(IMAGES, ["a cat", "a dog"])["yes_no"]
    torch.testing.assert_close(scores, torch.tensor([0.75, 0.0]))
    request = next(asked for asked in model.asked if "a cat" in str(asked))
    assert (request["model"], request["temperature"], request["logprobs"]) == ("model-7b", 0, True)
    picture, question = request["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBORw0KGgo")
    assert question["text"].endswith("Prompt: a cat")


def test_a_rating_is_the_expected_number(model: Model) -> None:
    model.answers = {
        "a cat": ("4", [token("4", **{"4": 0.6, "5": 0.2, "x": 0.2})]),
        "a dog {low}": "I give it 2 of 5.",
    }
    scores = RewardSet([RatingReward(model.settings)]).score(IMAGES, ["a cat", "a dog {low}"])["rating"]
    torch.testing.assert_close(scores, torch.tensor([(4.25 - 1) / 4, 0.25]))
    assert "from 1 (bad) to 5 (excellent)" in str(model.asked[0])


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (Answer("yes"), 1.0),
        (Answer("Well, no."), 0.0),
        (Answer("yesterday it was not"), math.nan),
        (Answer("maybe"), math.nan),
        (Answer("<think> </think> Yes", (("<think>", {"no": 0.9}), ("▁Yes", {"▁Yes": 0.3, "▁no": 0.1}))), 0.75),
    ],
)
def test_yes_share(answer: Answer, share: float) -> None:
    assert yes_share(answer) == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "low", "high", "value"),
    [("7", 1, 10, 7), ("10", 1, 10, 10), ("11", 1, 10, math.nan), ("3.5 stars", 1, 5, 3.5), ("good", 1, 5, math.nan)],
)
def test_rating(text: str, low: int, high: int, value: float) -> None:
    assert rating(Answer(text), low, high) == pytest.approx(value, nan_ok=True)


def test_an_answer_that_is_none_is_no_judgement(model: Model) -> None:
    model.answers = {"a cat": "I cannot see it", "a dog": "yes"}
    scores = RewardSet([YesNoReward(model.settings)]).score(IMAGES, ["a cat", "a dog"])["yes_no"]
    assert scores[0].isnan() and scores[1] == 1


def test_the_share_of_elements_that_the_picture_satisfies(model: Model) -> None:
    model.answers = {
        "Break the following": "1. Is there a cat?\n- Is it red?\n\n* Is it left of a dog?\n",
        "Is there a cat?": "yes",
        "Is it red?": "no",
        "Is it left of a dog?": "Yes",
        "Is it large?": "hm",
    }
    reward = InstructionReward(model.settings)
    rewards = RewardSet([reward])
    metadata = [{}, {"questions": ["Is it red?", "Is it large?"]}]
    scores = rewards.score(IMAGES, ["a cat", "given"], metadata)["instruction"]
    torch.testing.assert_close(scores, torch.tensor([2 / 3, 0.0]))
    questions = [asked for asked in model.asked if "Break the" in str(asked)]
    rewards.score(IMAGES[:1], ["a cat"])
    assert len([asked for asked in model.asked if "Break the" in str(asked)]) == len(questions) == 1
    assert "image_url" not in str(questions[0]) and questions[0]["max_tokens"] == 1024
    again = InstructionReward(model.settings)
    again.load_state_dict(json.loads(json.dumps(reward.state_dict())))  # a run that goes on asks the same questions
    model.answers.pop("Break the following")
    assert RewardSet([again]).score(IMAGES[:1], ["a cat"])["instruction"].item() == pytest.approx(2 / 3)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = model.settings
    settings.api_key_env = "MY_KEY"
    model.answers = {"": "yes"}
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="the environment variable MY_KEY holds no key: set it"):
        YesNoReward(settings, required=False).prepare("cpu")
    monkeypatch.setenv("MY_KEY", "hidden")
    reward = YesNoReward(settings)
    assert RewardSet([reward]).score(IMAGES, ["a", "b"])["yes_no"].tolist() == [1, 1]
    assert model.keys == ["Bearer hidden"] * 2 and "hidden" not in str(vars(reward)) + reward.version


def test_settings_that_make_no_sense_are_refused() -> None:
    endpoint = EndpointSettings("http://localhost/v1", "m")
    with pytest.raises(UserError, match=r"question must hold \{prompt\} in its place: 'Is it good\?'"):
        YesNoReward(endpoint, question="Is it good?")
    with pytest.raises(UserError, match="low must be below high, not 5 and 5"):
        RatingReward(endpoint, low=5)


def test_questions_that_were_given_up_do_not_hold_the_end_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes questions and answers none
        settings = EndpointSettings(f"http://127.0.0.1:{silent.getsockname()[1]}", "m", workers=2, wait=0)
        reward = YesNoReward(settings, time_limit=0.2, required=False)
        with pytest.warns(UserWarning, match="no answer within"):
            assert RewardSet([reward]).score(IMAGES, ["a", "b"])["yes_no"].isnan().all()
        asking = set(threading.enumerate()) - before
        assert asking and all(thread.daemon for thread in asking)
        assert asking.isdisjoint(waited_for)  # the interpreter waits for these, daemons or not
