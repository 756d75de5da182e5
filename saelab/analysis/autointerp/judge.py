"""What a judge is: something that answers chat requests. And the disk cache that lets no request be paid for twice."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from saelab.analysis.autointerp.prompts import Message, Messages
from saelab.core.errors import CorruptError, OutputError, SaelabError

CHARACTERS_PER_TOKEN = 3.2
"""For estimates made without the judge's tokenizer; code has about three characters to a token, prose four."""
OVERHEAD_TOKENS = 4
"""Tokens of a chat template around each message, for estimates."""


class JudgeError(SaelabError):
    """A judge cannot be reached, refuses the key, or keeps failing."""


@dataclass(frozen=True)
class Request:
    """One question to a judge."""

    messages: Messages
    """The chat so far."""
    max_tokens: int = 300
    """Most tokens of the answer."""
    temperature: float = 0.0
    """0 for the likeliest answer."""
    logprobs: bool = False
    """Ask for the probabilities of the likeliest tokens at each place."""

    def estimated_tokens(self) -> int:
        """Return about how many tokens the prompt has."""
        characters = sum(len(message.content) for message in self.messages)
        return round(characters / CHARACTERS_PER_TOKEN) + OVERHEAD_TOKENS * len(self.messages)


@dataclass(frozen=True)
class Reply:
    """What a judge answered."""

    text: str
    """The answer; empty after a refusal or an error."""
    refused: bool = False
    """The judge (or its content filter) would not answer."""
    error: str = ""
    """Why there is no answer, after all retries; such replies are not kept, so the next run asks again."""
    prompt_tokens: int = 0
    """Tokens of the prompt, as the endpoint counts them."""
    completion_tokens: int = 0
    """Tokens of the answer."""
    logprobs: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()
    """For each token of the answer: the token, and the likeliest tokens with their log-probabilities."""


Done = Callable[[int, Reply], None]
"""Called with the number of a request and its reply as soon as it is there."""


@runtime_checkable
class Judge(Protocol):
    """Answers chat requests, many at once."""

    name: str
    """What it is called in results; the model's name."""

    def ask(self, requests: Sequence[Request], done: Done) -> None:
        """Answer all requests, calling ``done`` for each, in any order. Raises :class:`JudgeError`."""


@dataclass
class Usage:
    """What was asked and what it cost, of one run."""

    requests: int = 0
    """Requests answered by the judge."""
    cached: int = 0
    """Requests answered from the disk."""
    prompt_tokens: int = 0
    """Tokens of the prompts that were sent."""
    completion_tokens: int = 0
    """Tokens of the answers to them."""
    refusals: int = 0
    """Answers that were refusals."""
    errors: int = 0
    """Requests without an answer after all retries."""
    input_price: float | None = None
    """US dollars for a million tokens of prompt."""
    output_price: float | None = None
    """US dollars for a million tokens of answer."""

    @property
    def cost(self) -> float | None:
        """US dollars; None when the prices are not known."""
        if self.input_price is None or self.output_price is None:
            return None
        return (self.prompt_tokens * self.input_price + self.completion_tokens * self.output_price) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the cost too."""
        return {**asdict(self), "cost": self.cost}


_SCHEMA = "create table if not exists replies (key text primary key, judge text, reply text)"


class CachedJudge:
    """A judge whose replies are kept in a file, by the content of the request and the judge's name.

    Each reply is on the disk before the next is waited for, so a killed run, started again, asks only what had no
    reply yet. Refusals are kept (they were paid for), errors are not. Several processes may share the file.
    """

    def __init__(self, judge: Judge, path: Path, input_price: float | None = None, output_price: float | None = None):
        self.judge, self.path, self.name = judge, path, judge.name
        self.usage = Usage(input_price=input_price, output_price=output_price)
        """What was asked since this object was made."""

    def ask(self, requests: Sequence[Request], done: Done) -> None:
        """Answer from the file what is there, ask the judge for the rest; equal requests are asked once."""
        keys = [self.key(request) for request in requests]
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        try:
            with closing(sqlite3.connect(self.path, timeout=60, check_same_thread=False)) as database:
                database.execute(_SCHEMA)
                self._ask(database, requests, places, done)
        except sqlite3.OperationalError as error:
            raise OutputError(f"cannot use {self.path} ({error}); is the folder writable, the disk not full?") from None
        except sqlite3.DatabaseError as error:
            raise CorruptError(f"{self.path} does not hold replies ({error}); move it away") from None

    def _ask(self, database: Any, requests: Sequence[Request], places: dict[str, list[int]], done: Done) -> None:
        missing: list[str] = []
        for key, where in places.items():
            row = database.execute("select reply from replies where key = ?", (key,)).fetchone()
            if row is None:
                missing.append(key)
                self.usage.cached += len(where) - 1
                continue
            self.usage.cached += len(where)
            for place in where:
                done(place, _reply(row[0]))

        def keep(number: int, reply: Reply) -> None:
            key = missing[number]
            if reply.error:
                self.usage.errors += 1
            else:
                with database:
                    entry = (key, self.name, json.dumps(asdict(reply)))
                    database.execute("insert or replace into replies values (?, ?, ?)", entry)
                self.usage.requests += 1
                self.usage.prompt_tokens += reply.prompt_tokens
                self.usage.completion_tokens += reply.completion_tokens
                self.usage.refusals += reply.refused
            for place in places[key]:
                done(place, reply)

        if missing:
            self.judge.ask([requests[places[key][0]] for key in missing], keep)

    def key(self, request: Request) -> str:
        """Return the hash of a request's content and the judge's name."""
        return hashlib.sha256(json.dumps([self.name, asdict(request)], sort_keys=True).encode()).hexdigest()


def _reply(text: str) -> Reply:
    data = json.loads(text)
    tokens = tuple((token, tuple((other, p) for other, p in likeliest)) for token, likeliest in data.pop("logprobs"))
    return Reply(**data, logprobs=tokens)


def ask_all(judge: Judge, requests: Sequence[Request]) -> list[Reply]:
    """Ask all and return the replies in the order of the requests."""
    replies: list[Reply | None] = [None] * len(requests)

    def done(place: int, reply: Reply) -> None:
        replies[place] = reply

    judge.ask(requests, done)
    assert all(reply is not None for reply in replies), "a judge left a request without a reply"
    return [reply for reply in replies if reply is not None]


@dataclass
class Estimate:
    """What a run would send, found out without sending anything."""

    requests: int = 0
    """Requests."""
    prompt_tokens: int = 0
    """Tokens of the prompts, estimated from their characters."""
    completion_tokens: int = 0
    """Tokens of the answers, at their expected length."""
    example: Messages = field(default_factory=tuple)
    """One full prompt."""

    def cost(self, input_price: float | None, output_price: float | None) -> float | None:
        """US dollars at these prices for a million tokens; None when they are not known."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            input_price=input_price,
            output_price=output_price,
        ).cost


class CountingJudge:
    """Sends nothing: counts what would be sent, and answers with ``stand_in`` so that later stages can be counted."""

    def __init__(self, name: str, expected_tokens: int = 60, stand_in: str = "") -> None:
        self.name, self.stand_in, self.expected_tokens = name, stand_in, expected_tokens
        self.estimate = Estimate()
        """What was counted so far."""

    def ask(self, requests: Sequence[Request], done: Done) -> None:
        """Count."""
        for place, request in enumerate(requests):
            self.estimate.requests += 1
            self.estimate.prompt_tokens += request.estimated_tokens()
            self.estimate.completion_tokens += min(self.expected_tokens, request.max_tokens)
            self.estimate.example = self.estimate.example or request.messages
            done(place, Reply(self.stand_in))


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as the OpenAI format has them."""
    return [{"role": message.role, "content": message.content} for message in messages]
