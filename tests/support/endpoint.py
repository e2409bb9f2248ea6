"""A judge's endpoint on this machine that answers as it is told, or fails."""

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nspo.settings.judges import EndpointJudge

KEY = "sk-planted-0123456789"


class FakeEndpoint:
    """A local server; what it does to a request is named in the judged answer."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.tries: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.at: list[float] = []
        self.down = False
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.asked.append(body)
                    fake.at.append(time.monotonic())
                    fake.keys.add(self.headers["Authorization"])
                    fake.busy += 1
                    fake.most_busy = max(fake.most_busy, fake.busy)
                    answer = body["messages"][-1]["content"]
                    fake.tries[answer] += 1
                    tried = fake.tries[answer]
                try:
                    self.reply(answer, tried)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client had waited long enough
                finally:
                    with fake.lock:
                        fake.busy -= 1

            def reply(self, answer: str, tried: int) -> None:
                kind, _, rest = answer.partition(":")
                if fake.down or kind == "broken" or (kind == "once" and tried == 1):
                    return self.send(500, {"error": {"message": f"key {KEY}"}})
                if kind == "later" and tried == 1:
                    return self.send(429, {}, {"Retry-After": "1"})
                if kind == "status":
                    return self.send(int(rest), {"error": {"message": f"you sent {KEY}"}})
                if kind == "slow":
                    time.sleep(0.05)
                if kind == "stuck" and tried == 1:
                    time.sleep(0.6)
                if kind == "raw":
                    return self.send(200, rest)
                said = {"say": rest, "echo": f"your key is {KEY}"}.get(kind, "unsafe" if "bad" in answer else "safe")
                reason = "length" if kind == "long" else "stop"
                message = {"role": "assistant", "content": said}
                choice = {"index": 0, "message": message, "finish_reason": reason}
                return self.send(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

            def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                given = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
                for name, value in given.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    """The fake endpoint with a key in the environment, and short waits between tries."""
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = FakeEndpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def settings_of(fake: FakeEndpoint, **changes: Any) -> EndpointJudge:
    """A judge that is shown the judged turns, so that the answer is the last message."""
    return EndpointJudge(**{"kind": "endpoint", "url": fake.url, "model": "guard", "template": "", **changes})


def text_of(found: list[float]) -> str:
    """U unsafe, s safe, - failed."""
    return "".join("-" if math.isnan(value) else "U" if value > 0 else "s" for value in found)
