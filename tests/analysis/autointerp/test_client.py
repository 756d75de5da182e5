"""The judge behind HTTP: retries, rate limits, timeouts, refusals, broken replies, the cache."""

import sys
import time

import pytest

from saelab.analysis.autointerp.client import HttpJudge, JudgeConfig, Pace
from saelab.analysis.autointerp.judge import CachedJudge, CountingJudge, JudgeError, Reply, Request, ask_all
from saelab.analysis.autointerp.prompts import Message
from saelab.core.errors import ConfigError, CorruptError
from tests.analysis.autointerp.server import serve


def requests(n, start=0):
    return [Request((Message("user", f"question {k}"),)) for k in range(start, start + n)]


def judge(url, **options):
    return HttpJudge(JudgeConfig(**{"model": "m", "endpoint": url, "backoff": 0.01, "timeout": 5.0, **options}))


def test_replies_come_in_the_order_of_the_requests():
    with serve(lambda q, m, n: {"text": f"re {q}", "sleep": 0.02 * (n % 3)}) as (script, url):
        replies = ask_all(judge(url, concurrency=4), requests(12))
    assert [r.text for r in replies] == [f"re question {k}" for k in range(12)]
    assert replies[0] == Reply("re question 0", prompt_tokens=100, completion_tokens=10)
    assert set(script.asked.values()) == {1}


def test_no_more_at_once_than_allowed():
    def slow(question, messages, number):
        time.sleep(0.03)
        return "x"

    with serve(slow) as (script, url):
        ask_all(judge(url, concurrency=3), requests(12))
    assert 2 <= script.most_at_once <= 3


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 429, "retry_after": 0.05},
        {"status": 429, "retry_after": "soon"},
        {"status": 500},
        {"status": 503},
        {"raw": b'{"id": "x", "choices": [{"mess'},
        {"raw": b'{"error": "overloaded"}'},
        {"raw": b"[]"},
        {"raw": b""},
        {"text": "cut off", "missing": 50},
        {"sleep": 1.0, "text": "late"},
    ],
    ids=str,
)
def test_trouble_is_tried_again(trouble):
    with serve(lambda q, m, n: trouble if n in (1, 2) else "well") as (script, url):
        replies = ask_all(judge(url, concurrency=1, timeout=0.4), requests(2))
    assert [r.text for r in replies] == ["well", "well"]
    assert script.number == 4


def test_a_request_that_fails_for_good_is_an_error_and_not_kept(tmp_path):
    with serve(lambda q, m, n: {"status": 500} if q.endswith(" 1") else "well") as (script, url):
        cached = CachedJudge(judge(url, retries=2), tmp_path / "r.db")
        replies = ask_all(cached, requests(3))
        assert [r.text for r in replies] == ["well", "", "well"]
        assert "500" in replies[1].error
        assert cached.usage.errors == 1
        assert script.number == 2 + 3
        ask_all(cached, requests(3))
    assert script.number == 5 + 3  # only the failed one is asked again
    assert cached.usage.cached == 2


def test_a_dead_endpoint_stops_the_run_in_one_line():
    with pytest.raises(JudgeError, match="run the same command again") as error:
        ask_all(judge("http://127.0.0.1:9/v1", retries=0), requests(30))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_stops_at_once(status):
    with serve(lambda q, m, n: {"status": status}) as (script, url), pytest.raises(JudgeError, match="check model"):
        ask_all(judge(url, concurrency=1), requests(30))
    assert script.number == 1


def test_refusals_are_replies_that_are_paid_and_kept(tmp_path):
    with serve(lambda q, m, n: {"refusal": "I cannot help with that", "text": None}) as (script, url):
        cached = CachedJudge(judge(url), tmp_path / "r.db")
        first = ask_all(cached, requests(2))
        assert first == ask_all(cached, requests(2))
    assert all(reply.refused for reply in first)
    assert script.number == 2
    assert (cached.usage.requests, cached.usage.refusals, cached.usage.cached) == (2, 2, 2)


def test_content_filter_by_status_is_a_refusal():
    with serve(lambda q, m, n: {"status": 400, "text": "blocked by content filter"}) as (_, url):
        assert ask_all(judge(url), requests(1))[0].refused
    with serve(lambda q, m, n: {"status": 400, "text": "context too long"}) as (script, url):
        assert "context too long" in ask_all(judge(url), requests(1))[0].error
    assert script.number == 1  # asking the same again would fail the same


def test_equal_requests_are_asked_once(tmp_path):
    with serve(lambda q, m, n: f"reply {n}") as (script, url):
        cached = CachedJudge(judge(url), tmp_path / "r.db")
        replies = ask_all(cached, [*requests(2), *requests(2)])
    assert script.number == 2
    assert [r.text for r in replies[:2]] == [r.text for r in replies[2:]]
    assert cached.usage.cached == 2


def test_the_cache_knows_every_part_of_a_request(tmp_path):
    one = Request((Message("user", "a"),))
    others = [
        Request((Message("system", "a"),)),
        Request((Message("user", "a"),), max_tokens=5),
        Request((Message("user", "a"),), temperature=1.0),
        Request((Message("user", "a"),), logprobs=True),
    ]
    cached = CachedJudge(CountingJudge("m"), tmp_path / "r.db")
    other = CachedJudge(CountingJudge("m2"), tmp_path / "r.db")
    keys = [cached.key(r) for r in (one, *others)] + [other.key(one)]
    assert len(set(keys)) == len(keys)


def test_two_judges_share_the_file(tmp_path):
    with serve(lambda q, m, n: "x") as (script, url):
        ask_all(CachedJudge(judge(url), tmp_path / "r.db"), requests(5))
        ask_all(CachedJudge(judge(url), tmp_path / "r.db"), requests(8))
    assert script.number == 8


def test_a_broken_cache_is_one_line(tmp_path):
    (tmp_path / "r.db").write_text("no database, but long enough to be looked at" * 30)
    with pytest.raises(CorruptError, match="move it away"):
        ask_all(CachedJudge(CountingJudge("m"), tmp_path / "r.db"), requests(1))


def test_cost_is_that_of_the_tokens(tmp_path):
    with serve(lambda q, m, n: "x") as (_, url):
        cached = CachedJudge(judge(url), tmp_path / "r.db", input_price=2.0, output_price=10.0)
        ask_all(cached, requests(5))
    assert cached.usage.cost == pytest.approx((500 * 2 + 50 * 10) / 1e6)
    assert CachedJudge(judge(url), tmp_path / "r.db").usage.cost is None


def test_log_probabilities_are_read(tmp_path):
    tokens = [
        {"token": "[", "logprob": 0.0, "bytes": None, "top_logprobs": []},
        {
            "token": "1", "logprob": -0.1, "bytes": None,
            "top_logprobs": [{"token": "1", "logprob": -0.1, "bytes": None}],
        },
    ]  # fmt: skip
    with serve(lambda q, m, n: {"text": "[1]", "logprobs": tokens}) as (_, url):
        cached = CachedJudge(judge(url), tmp_path / "r.db")
        one = [Request((Message("user", "a"),), logprobs=True)]
        first = ask_all(cached, one)[0]
        assert first.logprobs == (("[", ()), ("1", (("1", -0.1),)))
        assert ask_all(cached, one)[0] == first


def test_pace_spreads_requests():
    pace = Pace(60)
    assert [pace.wait(1, 0.0) for _ in range(4)] == [0, 1, 2, 3]
    assert pace.wait(1, 100.0) == 0
    assert Pace(None).wait(5, 0.0) == 0


def test_rate_limit_is_kept():
    with serve(lambda q, m, n: "x") as (script, url):
        ask_all(judge(url, requests_per_minute=600, concurrency=8), requests(6))
    assert script.times[-1] - script.times[0] >= 0.25


def test_missing_key_and_missing_client_are_one_line(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        HttpJudge(JudgeConfig(model="m"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"saelab\[explain\]"):
        HttpJudge(JudgeConfig(model="m"))


def test_works_inside_a_running_event_loop():
    import asyncio

    async def notebook(url):
        return ask_all(judge(url), requests(2))

    with serve(lambda q, m, n: "x") as (_, url):
        assert [r.text for r in asyncio.run(notebook(url))] == ["x", "x"]
