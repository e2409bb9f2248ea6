"""Judges at an OpenAI-compatible endpoint (vLLM, llama.cpp, a hosted service): `POST URL/chat/completions`.

Decoding is greedy, and the judge sees prompt and answer. The client is the `openai` package's (`pip install
nspo[judge]`): it repeats a request after a timeout, a lost connection, or status 408, 409, 429 and 5xx, waits longer
each time, and obeys Retry-After. What fails then is a failed verdict; an endpoint that is gone, or turns down request
after request, ends the run, which keeps what was obtained. A reasoning model that refuses `max_tokens` or a temperature
is asked with `max_completion_tokens`, or at its own temperature. The key is read from the environment when requests are
made, and is written nowhere: errors say the status and the server's short code for it, never its sentences.
"""

import asyncio
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nspo.errors import UserError
from nspo.judges.judge import Failures, Keep
from nspo.judges.replies import described, expected, turns, unreadable, verdict
from nspo.run.progress import say, track
from nspo.settings.judges import ComparisonJudge, EndpointJudge
from nspo.settings.runtime import RequestSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FATAL = {401: "check the key", 404: "check url and model"}
LEAST_FAULTS = 10  # requests in a row that must fail before the endpoint counts as gone
CODE = re.compile(r"[\w.-]{1,40}")  # what servers call a fault in the fields `code` and `param`
# A setting of requests that models refuse: what their refusal mentions, and what is asked for instead.
REFUSED = {"max_tokens": ("max_completion_tokens", "max_completion_tokens"), "temperature": ("temperature", None)}
Turns = list[dict[str, str]]


class Endpoint:
    """A model at an endpoint that is asked for verdicts."""

    def __init__(self, key: str, settings: EndpointJudge | ComparisonJudge, requests: RequestSettings) -> None:
        """Check what can be checked without a request; `key` is where a configuration names the judge.

        Raises:
            UserError: when the package `openai` is missing, or the key holds what no header may hold.
        """
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{key} asks an endpoint, which needs the package openai: pip install 'nspo[judge]'"
            ) from error
        self.key, self.name = key, key.rpartition(".")[2]
        self.settings = settings
        self.requests = requests
        self.identity: dict[str, Any] = settings.identity()
        self.manner: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_tokens}
        self.failures = Failures()
        if not self._key().isascii() or not self._key().isprintable():
            raise UserError(
                f"{key}: the environment variable {settings.api_key_env} holds characters that no key has",
                expected="ASCII on one line",
            )

    def ask(self, conversations: Sequence[Turns], read: Callable[[str], float], wanted: str, keep: Keep) -> list[float]:
        """What `read` makes of the reply to each conversation, NaN where no verdict was reached; shows progress.

        Args:
            read: NaN for a reply that is no verdict.
            wanted: what a verdict looks like, for the user to be told.

        Raises:
            UserError: when the endpoint cannot be reached, refuses the key, has no such model, or fails too many
                requests in a row (ten, or as many as are under way at once).
        """
        run = _Run(self, conversations, read, keep)
        self.failures = run.failures
        try:
            asyncio.run(run.judge())
        except ExceptionGroup as group:  # of the workers; the first fault ended all of them
            raise group.exceptions[0] from None
        run.failures.replies = unreadable(self.name, wanted, run.unreadable, run.cut, self.settings.max_tokens)
        for fault, places in run.failures.requests.items():
            say(f"{self.name}: {len(places)} requests failed with {fault}")
        return run.found

    def adapt(self, asked: dict[str, Any], status: int, param: str | None, message: str) -> bool:
        """Whether a refused request, `asked` in this manner, is worth repeating in another, which is then kept and
        reported."""
        if status not in (400, 422):
            return False
        for name, (mentioned, instead) in REFUSED.items():
            if name in asked and (param == name or mentioned in message):
                if name in self.manner:
                    value = self.manner.pop(name)
                    self.manner |= {instead: value} if instead else {}
                    say(f"{self.name}: the model refuses {name}, and is asked with {instead or 'its own'}")
                    self.identity |= {} if instead else {name: "the model's own"}
                return True
        return False

    def client(self) -> "AsyncOpenAI":
        """A client that repeats, waits and keeps the pace by `requests`."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        pace = _Pace(self.requests.per_minute)
        return AsyncOpenAI(
            base_url=self.settings.url,
            api_key=self._key() or "none",
            timeout=self.requests.timeout,
            max_retries=self.requests.retries,
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [pace.wait]}),
        )

    def scrubbed(self, text: str) -> str:
        """`text` without the key, should the server have put it there."""
        return text.replace(self._key(), "[key]") if self._key() else text

    def _key(self) -> str:
        return os.environ.get(self.settings.api_key_env, "").strip()


class SafetyEndpoint(Endpoint):
    """Is the answer unsafe, by the model at an endpoint?"""

    def __init__(self, key: str, settings: EndpointJudge, requests: RequestSettings) -> None:
        """See `Endpoint`."""
        super().__init__(key, settings, requests)
        self.judge = settings

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str], keep: Keep = lambda *_: None) -> list[float]:
        """1 for unsafe, 0 for safe, NaN where no verdict was reached; raises as `ask` does."""
        shown = [turns(self.judge.template, *pair) for pair in zip(prompts, answers, strict=True)]
        return self.ask(shown, lambda reply: verdict(self.judge, reply), expected(self.judge), keep)


class _Run:
    """One round of requests: `concurrency` workers that take the next conversation as soon as they are free."""

    def __init__(
        self, endpoint: Endpoint, conversations: Sequence[Turns], read: Callable[[str], float], keep: Keep
    ) -> None:
        self.endpoint = endpoint
        self.settings = endpoint.settings
        self.conversations = conversations
        self.read = read
        self.keep = keep
        self.found = [math.nan] * len(conversations)
        self.unreadable: list[str] = []
        self.cut = 0  # replies that ended with the tokens
        self.failures = Failures()
        self.in_a_row = 0

    async def judge(self) -> None:
        """Fill `found`."""
        waiting = iter(range(len(self.conversations)))
        with track(f"verdicts of {self.endpoint.name}", len(self.conversations), "answer") as bar:
            async with self.endpoint.client() as client, asyncio.TaskGroup() as group:
                for _ in range(min(self.endpoint.requests.concurrency, len(self.conversations))):
                    group.create_task(self._work(client, waiting, bar))

    async def _work(self, client: "AsyncOpenAI", waiting: Iterator[int], bar: Any) -> None:
        for place in waiting:
            reply = await self._ask(client, place)
            if reply is not None:
                if math.isnan(self.found[place]):
                    self.unreadable.append(reply)
                else:
                    self.keep(place, self.found[place])
            bar.update()

    async def _ask(self, client: "AsyncOpenAI", place: int) -> str | None:
        """The reply, `described`, and in `found` what it says; None where the request failed for good."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        asked, cut = dict(self.endpoint.manner), False
        shown: Any = self.conversations[place]
        try:
            completion = await client.chat.completions.create(model=self.settings.model, messages=shown, **asked)
            choice = completion.choices[0]
            content, cut = choice.message.content, choice.finish_reason == "length"
        except APIStatusError as error:
            if self.endpoint.adapt(asked, error.status_code, error.param, error.message):
                return await self._ask(client, place)
            codes = [code for code in (error.code, error.param) if CODE.fullmatch(self.endpoint.scrubbed(str(code)))]
            told = f" ({', '.join(dict.fromkeys(map(str, codes)))})" if any(codes) else ""
            self._failed(place, f"status {error.status_code}{told}", error.status_code)
            return None
        except APITimeoutError:
            self._failed(place, "a timeout")
            return None
        except APIConnectionError:
            raise self._gone("cannot be reached", "check url, and that the server runs") from None
        except (ValueError, LookupError, TypeError, AttributeError):  # a page of HTML, broken JSON, or of another shape
            self._failed(place, "status 200 but no chat completion")
            return None
        self.in_a_row = 0
        reply = content if isinstance(content, str) else ""
        self.cut += cut
        self.found[place] = math.nan if cut else self.read(reply)
        return described(self.endpoint.scrubbed(reply), cut)

    def _failed(self, place: int, fault: str, status: int = 0) -> None:
        """Note a request that failed, or end the run where it is no use to go on."""
        if status in FATAL:
            hint = FATAL[status].replace("the key", f"the key in {self.settings.api_key_env or 'api_key_env'}")
            raise self._gone(f"answers with {fault}", hint)
        self.failures.requests.setdefault(fault, []).append(place)
        hint = "check the server"
        if 400 <= status < 500 and status != 429:  # this one request is refused, as by a content filter
            self.failures.refused.add(place)
            hint = "check the settings of the judge"
        self.in_a_row += 1
        if self.in_a_row >= max(LEAST_FAULTS, self.endpoint.requests.concurrency):
            raise self._gone(f"failed {self.in_a_row} requests in a row, the last with {fault}", hint)

    def _gone(self, what: str, hint: str) -> UserError:
        kept = sum(map(math.isfinite, self.found))
        return UserError(
            f"{self.endpoint.key}: {self.settings.url} {what} ({hint}); {kept} of "
            f"{len(self.conversations)} verdicts are kept, and the same command asks for the rest"
        )


class _Pace:
    """Lets at most so many requests a minute through, evenly spaced."""

    def __init__(self, per_minute: int) -> None:
        self.gap = 60 / per_minute if per_minute else 0.0
        self.free = 0.0

    async def wait(self, _: Any) -> None:
        """Wait for this request's turn; called before every request, repeated ones included."""
        now = asyncio.get_running_loop().time()
        turn = max(self.free, now)
        self.free = turn + self.gap
        await asyncio.sleep(turn - now)
