"""Any reward as a server for `RemoteReward`, in an environment of its own:

    python -m zimage_lit.rewards.server my_rewards.Warmth [key=value …] [--host 127.0.0.1] [--port 8000] [--device cpu]

key=value are arguments of the class. One that does not need this package can be ten lines of the standard library:

    import base64, http.server, json
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"version": "1", "kind": "pointwise"})
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [judge(base64.b64decode(png), text) for png, text in zip(asked["images"], asked["prompts"])]
            self.answer({"version": "1", "scores": scores})
        def answer(self, content):
            self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(content).encode())
    http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()

Who can reach the port can make it work: let it listen on another address than this machine's own only in a network
that you trust.
"""

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from zimage_lit.config import parse_overrides
from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import RewardCallback
from zimage_lit.rewards.pictures import from_png
from zimage_lit.rewards.reward_set import RewardSet
from zimage_lit.validate import check_arguments, import_class

LARGEST_REQUEST = 1 << 30  # bytes


class RewardServer(ThreadingHTTPServer):
    """Serves one reward, one request at a time: its networks are not asked twice at once. Port 0 is any free one."""

    daemon_threads = True

    def __init__(self, reward: RewardCallback, host: str = "127.0.0.1", port: int = 8000, device: str = "cpu") -> None:
        reward.prepare(device)
        reward.required, reward.invalid_limit = True, 1.0  # what becomes of failures is for the run to say
        self.reward = reward
        self.rewards = RewardSet([reward])
        self.turn = threading.Lock()
        super().__init__((host, port), Handler)

    def health(self) -> dict[str, Any]:
        kind = "pointwise" if self.reward.kind == "pointwise" else "groupwise"
        return {"name": self.reward.name, "kind": kind, "version": self.reward.version}

    def score(self, asked: Any) -> dict[str, Any]:
        """The answer to a request. Raises ValueError for one of the wrong form, UserError where the reward fails."""
        check_request(asked)
        images = [from_png(text) for text in asked["images"]]
        with self.turn:
            scores = self.rewards.score(images, asked["prompts"], asked.get("metadata"), group_ids=[0] * len(images))
        values = scores[self.reward.name].tolist()
        return {"scores": [None if math.isnan(value) else value for value in values], "version": self.reward.version}


def check_request(asked: Any) -> None:
    """ValueError for anything but lists of texts, and of objects where metadata are given."""
    forms = {"images": str, "prompts": str, "metadata": dict}
    for key, form in forms.items():
        values = asked.get(key, [] if key == "metadata" else None) if isinstance(asked, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, form) for value in values):
            raise ValueError("a request is an object with lists of texts, images and prompts, and of objects, metadata")


class Handler(BaseHTTPRequestHandler):
    """GET /health and POST /score."""

    server: RewardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, self.server.health())
        else:
            self.answer(404, {"error": f"there is no {self.path}, only /health and /score"})

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > LARGEST_REQUEST:
            self.close_connection = True  # what was sent has not been read
            return self.answer(413, {"error": f"a request must say its length, {LARGEST_REQUEST} bytes at most"})
        content = self.rfile.read(int(size))
        if self.path != "/score":
            return self.answer(404, {"error": f"there is no {self.path}, only /health and /score"})
        try:
            self.answer(200, self.server.score(json.loads(content)))
        except UserError as error:
            self.answer(500, {"error": str(error)})
        except (ValueError, RecursionError) as error:  # the latter from lists nested too deep
            self.answer(400, {"error": str(error)})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet: a run asks thousands of times."""


def build_server(arguments: Sequence[str] | None = None) -> RewardServer:
    """The server that the command line asks for. Raises UserError for a class or settings that are not there."""
    parser = argparse.ArgumentParser(prog="python -m zimage_lit.rewards.server", description="serve a reward")
    parser.add_argument("class_path", help="of the reward, such as my_rewards.Warmth")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="arguments of the class")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="where its networks compute")
    given = parser.parse_args(arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own code
    reward_class = import_class("class_path", given.class_path)
    if not (isinstance(reward_class, type) and issubclass(reward_class, RewardCallback)):
        raise UserError(f"{given.class_path} is no RewardCallback: name one.")
    settings = parse_overrides(given.settings)
    check_arguments("", reward_class, settings)
    return RewardServer(reward_class(**settings), given.host, given.port, given.device)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        server = build_server(arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    host, port = server.server_address[:2]
    print(f"{server.reward.name} ({server.reward.version}) listens on http://{host!s}:{port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
