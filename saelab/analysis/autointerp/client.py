"""A judge behind any endpoint that speaks OpenAI's chat format: OpenAI, OpenRouter, vLLM, llama.cpp, Ollama.

Many requests at once, at most ``concurrency``; each is tried again, with growing waits, after a rate limit (429), a
server error, a lost connection, a timeout or a reply that is no JSON. A request that fails for good is a failed
judgement; when ``MOST_ERRORS`` have failed, the run stops and says so: nothing that was answered is lost.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from saelab.analysis.autointerp.judge import Done, JudgeError, Reply, Request, as_dicts
from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.core.progress import Bar, progress

MOST_ERRORS = 10
"""Requests that may fail for good before a run stops."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, unless the server asks for more."""
TOP_LOGPROBS = 10


class JudgeConfig(Config):
    """Which judge answers, and how fast it may be asked."""

    model: str | None = None
    """Model that explains and judges, by its name at the endpoint; none: only what needs no language model."""
    endpoint: str | None = None
    """Base URL, such as http://localhost:8000/v1; default: OpenAI's, or what OPENAI_BASE_URL says."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; local servers need none."""
    local: bool = False
    """Load the model in this process with transformers (a Hugging Face id or a folder of a chat model)."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests under way at once."""
    retries: int = Field(default=6, ge=0)
    """Tries after the first one."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the second try; doubled for each further one, and spread by chance."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds a request may take."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Rate limit on requests."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Rate limit on tokens (prompt and answer, estimated before sending)."""
    input_price: float | None = Field(default=None, ge=0)
    """US dollars for a million tokens of prompt, for the cost estimate and the bill."""
    output_price: float | None = Field(default=None, ge=0)
    """US dollars for a million tokens of answer."""


class Pace:
    """Lets amounts through at a rate: each waits until those before it have had their time."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def wait(self, amount: float, now: float) -> float:
        """Book ``amount`` and return the seconds to wait before it may go."""
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_each
        return start - now


class HttpJudge:
    """Asks an endpoint; see the module's docstring."""

    def __init__(self, config: JudgeConfig) -> None:
        if config.model is None:
            raise ConfigError("no judge is named; give --judge.model NAME")
        try:
            import openai  # noqa: F401 - so that it is missed before any work is done
        except ImportError:
            raise ConfigError("a judge needs the openai client; pip install 'saelab[explain]'") from None
        self.config, self.name = config, config.model
        self._chance = random.Random(0)  # spreads the waits; no result depends on it
        self._key = os.environ.get(config.key_variable, "")
        if not self._key and config.endpoint is None and "OPENAI_BASE_URL" not in os.environ:
            raise ConfigError(
                f"{config.key_variable} is not set; set it to your API key, or the --judge.endpoint of a local server"
            )

    def ask(self, requests: Sequence[Request], done: Done) -> None:
        """Answer all requests, from a thread of its own (a notebook has an event loop running already)."""
        problem: list[BaseException] = []
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._ask_all(requests, done))

        def work() -> None:
            asyncio.set_event_loop(loop)
            try:
                loop.run_until_complete(task)
            except BaseException as error:
                problem.append(error)
            finally:
                loop.close()

        thread = threading.Thread(target=work, name="saelab-judge")
        thread.start()
        try:
            thread.join()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            thread.join()
            raise
        if problem:
            raise problem[0]

    async def _ask_all(self, requests: Sequence[Request], done: Done) -> None:
        from openai import AsyncOpenAI

        paces = Pace(self.config.requests_per_minute), Pace(self.config.tokens_per_minute)
        waiting = iter(enumerate(requests))
        errors: list[str] = []
        client = AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.config.endpoint,
            timeout=self.config.timeout,
            max_retries=0,
        )

        async def worker(bar: Bar) -> None:
            for number, request in waiting:
                reply = await self._answer(client, request, paces)
                done(number, reply)
                bar.advance(1)
                if reply.error:
                    errors.append(reply.error)
                if len(errors) >= MOST_ERRORS:
                    raise JudgeError(
                        f"{self.name}: {len(errors)} requests failed for good, the last with: {errors[-1]}; all "
                        "replies so far are kept, run the same command again to go on"
                    )

        with progress(f"ask {self.name}"[:24], len(requests), unit="requests") as bar:
            async with client:
                workers = [asyncio.create_task(worker(bar)) for _ in range(min(self.config.concurrency, len(requests)))]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for one in workers:
                        one.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, client: Any, request: Request, paces: tuple[Pace, Pace]) -> Reply:
        problem = ""
        for attempt in range(self.config.retries + 1):
            now = time.monotonic()
            wait = max(paces[0].wait(1, now), paces[1].wait(request.estimated_tokens() + request.max_tokens, now))
            if wait > 0:
                await asyncio.sleep(wait)
            reply, problem, pause = await self._try(client, request)
            if reply is not None:
                return reply
            if attempt < self.config.retries:
                grown = min(self.config.backoff * 2**attempt, LONGEST_WAIT) * self._chance.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, grown))
        return Reply("", error=problem)

    async def _try(self, client: Any, request: Request) -> tuple[Reply | None, str, float]:
        """Return a reply; or None, what went wrong, and the seconds that the server asks to wait."""
        import openai

        extra: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if request.logprobs else {}
        try:
            found = await client.chat.completions.create(
                model=self.name,
                messages=as_dicts(request.messages),
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                **extra,
            )
            return _read(found), "", 0.0
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(
                f"{self.name} at {client.base_url} refuses: {_short(error)}; check model, endpoint, and the key in "
                f"{self.config.key_variable}"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if "content" in str(error) and "filter" in str(error):
                return Reply("", refused=True), "", 0.0
            return Reply("", error=_short(error)), "", 0.0
        except openai.APIStatusError as error:
            return None, _short(error), _retry_after(error)
        except (openai.APIError, json.JSONDecodeError, ValueError, TypeError, AttributeError, KeyError) as error:
            return None, f"{type(error).__name__}: {_short(error)}", 0.0


def _read(found: Any) -> Reply:
    """Read a completion; raises :class:`ValueError` when it is none (some servers send errors with status 200)."""
    choices = getattr(found, "choices", None)
    if not choices:
        raise ValueError("the reply has no choices")
    choice = choices[0]
    message = choice.message
    refused = bool(getattr(message, "refusal", None)) or choice.finish_reason == "content_filter"
    logprobs = getattr(getattr(choice, "logprobs", None), "content", None) or []
    usage = found.usage
    return Reply(
        text=message.content or "",
        refused=refused,
        prompt_tokens=int(getattr(usage, "prompt_tokens", 0) or 0),
        completion_tokens=int(getattr(usage, "completion_tokens", 0) or 0),
        logprobs=tuple(
            (t.token, tuple((other.token, float(other.logprob)) for other in t.top_logprobs or [])) for t in logprobs
        ),
    )


def _retry_after(error: Any) -> float:
    try:
        return min(float(error.response.headers.get("retry-after", 0)), 600.0)
    except ValueError:
        return 0.0


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
