"""Rewards behind HTTP: a served reward against the same one here, and servers that are wrong, busy or gone."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from toy_rewards import NotANumber, Raising, RankInGroup, Red, Redder, Root, Warmth

from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardCallback, RewardRecord, RewardSet
from zimage_lit.rewards.remote import RemoteReward
from zimage_lit.rewards.server import RewardServer, build_server, main

PNG_SIGNATURE = "iVBORw0KGgo"  # of every PNG file, in base64


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def serving(server: HTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served(reward: RewardCallback) -> Iterator[str]:
    with serving(RewardServer(reward, port=0)) as url:
        yield url


@contextmanager
def answering(*answers: tuple[int, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these answers (status, content) to /score in turn, and the last one again and again."""
    asked: list[dict[str, Any]] = []

    class Played(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.give(200, {"kind": "pointwise"})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.give(*answers[min(len(asked), len(answers)) - 1])

        def give(self, status: int, content: Any) -> None:
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/health")
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with serving(HTTPServer(("127.0.0.1", 0), Played)) as url:
        yield url, asked


def noise(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (3, 5 + i, 8), dtype=torch.uint8, generator=generator) for i in range(number)]


@pytest.mark.parametrize("local", [Warmth(), NotANumber(), Root()])
def test_a_served_reward_gives_the_same_numbers(local: RewardCallback) -> None:
    images, prompts = [*noise(4), torch.zeros(3, 4, 4, dtype=torch.uint8)], list("abcde")
    here = RewardSet([local]).score(images, prompts)[local.name]
    with served(type(local)()) as url:
        there = RewardSet([RemoteReward(url, batch_size=2)]).score(images, prompts)["remote"]
    assert torch.equal(here.nan_to_num(-7), there.nan_to_num(-7))


@pytest.mark.parametrize("local", [RankInGroup(), Redder()])
def test_a_served_reward_sees_whole_groups(local: RewardCallback) -> None:
    images, prompts, ids = noise(5), ["a"] * 5, [0, 1, 0, 1, 0]
    here = RewardSet([local]).score(images, prompts, group_ids=ids)[local.name]
    with served(type(local)()) as url:
        remote = RewardSet([RemoteReward(url, kind="groupwise", batch_size=1)])
        assert torch.equal(remote.score(images, prompts, group_ids=ids)["remote"], here)
        with pytest.raises(UserError, match="is groupwise: set kind to groupwise"):
            RemoteReward(url).prepare("cpu")


def test_what_travels_is_json_with_png_and_the_metadata(tmp_path: Path) -> None:
    with answering((200, {"scores": [0.25, None], "version": "7b"})) as (url, asked):
        rewards = RewardSet([RemoteReward(url, name="far")], RewardRecord(tmp_path / "r.jsonl"))
        scores = rewards.score(noise(2), ["ein Kreis", "圆形"], [{"tag": "word"}, {}])["far"]
    assert scores[0] == 0.25 and scores[1].isnan()
    assert [text[:11] for text in asked[0]["images"]] == [PNG_SIGNATURE] * 2
    assert asked[0]["prompts"] == ["ein Kreis", "圆形"] and asked[0]["metadata"] == [{"tag": "word"}, {}]
    line = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert line["scores"]["far"] == {"score": 0.25, "version": f"{url} 7b"}


def test_a_busy_server_is_asked_again() -> None:
    with answering((503, {}), (429, {}), (200, {"scores": [2]})) as (url, asked):
        with pytest.warns(UserWarning, match=r"busy \(status 503\); asking again for up to 5 s"):
            assert RewardSet([RemoteReward(url, wait=5)]).score(noise(1), ["a"])["remote"].tolist() == [2]
        assert len(asked) == 3 and asked[0] == asked[2]


def test_a_server_that_comes_back_in_time_is_waited_for() -> None:
    with served(Red()) as url:
        port = int(url.rpartition(":")[2])
        rewards = RewardSet([RemoteReward(url, wait=20)])
        rewards.score(noise(1), ["a"])
    later = threading.Timer(0.4, lambda: revived.append(RewardServer(Red(), port=port)))
    revived: list[RewardServer] = []
    later.start()
    threading.Thread(target=lambda: (later.join(), revived[0].serve_forever(0.01)), daemon=True).start()
    with pytest.warns(UserWarning, match="does not answer"):
        scores = rewards.score(noise(1), ["a"])
    revived[0].shutdown()
    revived[0].server_close()
    torch.testing.assert_close(scores["remote"], noise(1)[0][0].float().mean()[None])


def test_a_server_that_stays_away_stops_the_run_or_is_done_without() -> None:
    with served(Red()) as url:
        strict, lenient = RemoteReward(url, wait=0, name="strict"), RemoteReward(url, wait=0, required=False)
        strict.prepare("cpu")
        lenient.prepare("cpu")
    with pytest.raises(UserError, match=r"strict failed \(.*/score does not answer .*after 0 s of asking\)"):
        RewardSet([strict]).score(noise(1), ["a"])
    with pytest.warns(UserWarning, match="1 of its judgements are missing"):
        assert RewardSet([lenient]).score(noise(1), ["a"])["remote"].isnan().all()
    with pytest.raises(UserError, match="start its server, or mend the url"):
        RemoteReward(url, wait=0).prepare("cpu")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"error": "out of memory"}), "status 500: out of memory"),
        ((404, b"<html>"), "status 404: <html>"),
        ((200, b"\x80\x04pickle"), "does not answer with a JSON object"),
        ((200, {"scores": [1, "two"]}), "without `scores`, a list of numbers and nulls"),
        ((200, {"scores": [1, True]}), "without `scores`"),
        ((200, {"scores": [1, 2, 3]}), r"must return a tensor of shape \(2,\)"),
        ((302, {}), "status 302"),
    ],
)
def test_answers_of_another_form_are_named_and_not_asked_for_again(answer: tuple[int, Any], message: str) -> None:
    with answering(answer) as (url, asked):
        with pytest.raises(UserError, match=message):
            RewardSet([RemoteReward(url)]).score(noise(2), ["a", "b"])
        assert len(asked) == 1


def test_a_reward_that_fails_at_the_server_says_why() -> None:
    with served(Raising()) as url, pytest.raises(UserError, match=r"status 500: the reward raising failed .*fell over"):
        RewardSet([RemoteReward(url)]).score(noise(1), ["a"])


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04K\x01.",
        b"[]",
        b'{"images": ["x"], "prompts": "a"}',
        b'{"images": ["not base64!"], "prompts": ["a"]}',
        b'{"images": ["AAAA"], "prompts": ["a"]}',
        b'{"images": [], "prompts": ["a"]}',
        b'{"images": [], "prompts": [], "metadata": [3]}',
        b"[" * 200_000,
    ],
)
def test_the_server_refuses_requests_of_another_form(content: bytes) -> None:
    with served(Red()) as url:
        answer = requests.post(f"{url}/score", data=content, timeout=10)
        assert answer.status_code == 400 and answer.json()["error"]
        assert requests.get(f"{url}/elsewhere", timeout=10).status_code == 404
        assert requests.get(f"{url}/health", timeout=10).json()["kind"] == "pointwise"


def test_the_command_line_serves_a_class_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "my_scorer.py").write_text(
        "import torch\n"
        "from zimage_lit.rewards import RewardCallback\n\n"
        "class Constant(RewardCallback):\n"
        "    def __init__(self, value: float, **settings):\n"
        "        super().__init__(**settings)\n"
        "        self.value = value\n\n"
        "    def score(self, images, prompts, metadata):\n"
        "        return torch.full((len(images),), self.value)\n"
    )
    command = ["my_scorer.Constant", "value=0.125", "weight=2", "--port", "0"]
    with serving(build_server(command)) as url:
        assert RewardSet([RemoteReward(url)]).score(noise(2), ["a", "b"])["remote"].tolist() == [0.125] * 2
    monkeypatch.setattr(RewardServer, "serve_forever", lambda self: None)
    assert main(command) == 0
    assert "constant (my_scorer.Constant-" in (said := capsys.readouterr().out) and "listens on http://127" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy_rewards.Warmth", "weigth=3"], "did you mean 'weight'?"),
        (["toy_rewards.Warmth", "weight=heavy"], "weight must be a number"),
        (["toy_rewards.Cold"], "toy_rewards has no class Cold"),
        (["pathlib.Path"], "pathlib.Path is no RewardCallback"),
    ],
)
def test_the_command_line_refuses_what_is_no_reward(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="url must begin with http:// or https://, not be 'localhost:8000'"):
        RemoteReward("localhost:8000")
