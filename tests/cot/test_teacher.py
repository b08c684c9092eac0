"""Requests: payload and key, retries and pauses, cache and budget, keys that stay secret."""

import asyncio
import contextlib
import json
import logging
import sqlite3
import time
from email.utils import formatdate

import pytest
from aiohttp import web

from trace_jax.cot import client, teacher
from trace_jax.cot.cache import Answer, Cache
from trace_jax.cot.client import Request, key_of, payload
from trace_jax.cot.config import Budget, Teacher
from trace_jax.cot.prompts import VERDICT

PNG = b"\x89PNG\r\n\x1a\nrest"
REQUEST = Request("verify", "Be strict.", "Does it fit?", (PNG,), VERDICT, qid="7:1")
MODEL = Teacher(model="m", base_url="http://127.0.0.1:1/v1", attempts=3, backoff=0.01, max_backoff=0.5, timeout=5)


def good(text: str = "yes", prompt: int = 10, completion: int = 5) -> web.Response:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return web.json_response({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage})


def ask(handler, requests: list[Request], **options) -> tuple[list, list[float]]:
    """Asks a server whose answers `handler(attempt number, request)` gives; the results, and when attempts came."""

    async def run():
        times: list[float] = []

        async def handle(request: web.Request) -> web.StreamResponse:
            await request.read()
            times.append(time.monotonic())
            return handler(len(times), request)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        one = client.Client(Teacher(**(vars(MODEL) | {"base_url": url} | options)))
        results = await asyncio.gather(*map(one.ask, requests), return_exceptions=True)
        await one.close()
        await runner.cleanup()
        return results, times

    return asyncio.run(run())


def test_payload_follows_the_protocol():
    body = payload(REQUEST, MODEL)
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be strict."}
    image, text = user["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "Does it fit?"}
    assert body["response_format"]["json_schema"]["schema"] == VERDICT
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert "7:1" not in json.dumps(body)
    assert payload(REQUEST, Teacher(structured="json_object"))["response_format"] == {"type": "json_object"}
    assert "response_format" not in payload(REQUEST, Teacher(structured="off"))
    assert "max_completion_tokens" in payload(REQUEST, Teacher(token_field="max_completion_tokens"))


def test_the_key_names_all_that_the_answer_depends_on_and_nothing_else():
    def key(model: dict | None = None, **request) -> str:
        return key_of(Request(**(vars(REQUEST) | request)), Teacher(**(vars(MODEL) | (model or {}))))

    assert key() == key(qid="7:2", target="7:9") == key({"base_url": "http://elsewhere/v1", "concurrency": 9})
    changed = [key(text="?"), key(system="?"), key(images=(PNG + b"!",)), key(schema=None), key({"model": "n"})]
    changed += [key({"temperature": 0.5}), key({"seed": 1}), key({"max_tokens": 9}), key({"structured": "off"})]
    assert len({key(), *changed}) == 1 + len(changed)


def test_attempts_end_and_say_why():
    results, times = ask(lambda n, r: web.Response(status=503), [REQUEST])
    assert isinstance(results[0], client.TransientError) and str(results[0]) == "HTTP 503 (3 attempts)"
    assert len(times) == 3


def test_waits_double_with_jitter():
    _, times = ask(lambda n, r: web.Response(status=500), [REQUEST], backoff=0.2, attempts=3)
    first, second = times[1] - times[0], times[2] - times[1]
    assert first >= 0.1 and second >= 0.2  # at least half of 0.2 and of 0.4


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_transient_answers_are_tried_again(status):
    results, times = ask(lambda n, r: good() if n > 1 else web.Response(status=status), [REQUEST])
    assert results == [Answer("yes", "stop", 10, 5)] and len(times) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"choices": [{"mess',
        "[]",
        '{"choices": []}',
        '{"choices": [{}]}',
        "null",
        '{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
        '{"error": {"message": "overloaded"}}',
    ],
)
def test_answers_that_are_not_whole_are_tried_again(text):
    cut = lambda: web.Response(text=text, content_type="application/json")  # noqa: E731
    results, times = ask(lambda n, r: good() if n > 1 else cut(), [REQUEST])
    assert results == [Answer("yes", "stop", 10, 5)] and len(times) == 2


@pytest.mark.parametrize("value", ["0.3", "date", "date without a zone"])
def test_retry_after_is_honoured(value):
    date = formatdate(time.time() + 1.5, usegmt=value == "date")  # the last ends in -0000
    header = date if "date" in value else value

    def handler(n, request):
        return web.Response(status=429, headers={"Retry-After": header}) if n == 1 else good()

    results, times = ask(handler, [REQUEST], max_backoff=5)
    assert isinstance(results[0], Answer) and times[1] - times[0] >= (0.3 if value == "0.3" else 0.4)


@pytest.mark.parametrize(("said", "limit", "waits"), [("0.5", 900.0, (0.5, 60)), ("30", 0.1, (0.1, 20))])
def test_retry_after_is_obeyed_beyond_the_longest_backoff_up_to_a_limit_of_its_own(said, limit, waits):
    def handler(n, request):
        return web.Response(status=429, headers={"Retry-After": said}) if n == 1 else good()

    results, times = ask(handler, [REQUEST], max_backoff=0.05, max_retry_after=limit)
    assert isinstance(results[0], Answer) and waits[0] <= times[1] - times[0] < waits[1]


@pytest.mark.parametrize("headers", [{"Retry-After": "0.4"}, {}])
def test_a_limit_of_one_holds_the_others_back(headers):
    def handler(n, request):
        return web.Response(status=429, headers=headers) if n == 1 else good()

    async def run():
        times = []

        async def handle(request):
            await request.read()
            times.append(time.monotonic())
            return handler(len(times), request)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        one = client.Client(Teacher(**(vars(MODEL) | {"base_url": url, "backoff": 0.8, "max_backoff": 0.8})))
        first = asyncio.create_task(one.ask(REQUEST))
        while not times:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await one.ask(REQUEST)  # sent after the limit was named
        await first
        await one.close()
        await runner.cleanup()
        return times

    times = asyncio.run(run())
    assert min(times[1:]) - times[0] >= 0.4


def test_requests_keep_to_the_rate():
    _, times = ask(lambda n, r: good(), [REQUEST] * 5, requests_per_minute=600)
    assert times[-1] - times[0] >= 0.4 * 0.95  # five requests, a tenth of a second apart


def test_a_request_that_is_refused_for_good_is_an_answer():
    results, times = ask(lambda n, r: web.Response(status=400, text="too long"), [REQUEST])
    assert results[0].error == "HTTP 400: too long" and len(times) == 1


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 410])
def test_a_wrong_key_or_model_or_an_empty_account_stops_everything_at_once(status):
    results, times = ask(lambda n, r: web.Response(status=status), [REQUEST])
    assert isinstance(results[0], client.StoppedError) and len(times) == 1


def test_keys_come_from_the_environment_and_go_nowhere_else(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    seen = []

    def handler(n, request):
        seen.append(request.headers.get("Authorization"))
        return web.Response(status=401)

    with caplog.at_level(logging.DEBUG):
        results, _ = ask(handler, [REQUEST], key_variable="MY_KEY")
    assert seen == ["Bearer sk-very-secret"]
    assert "secret" not in str(results) + caplog.text + json.dumps(payload(REQUEST, MODEL)) + repr(MODEL)


def test_a_server_that_refuses_in_its_own_field_is_read():
    refusal = {"choices": [{"message": {"content": None, "refusal": "I'm sorry"}, "finish_reason": "stop"}]}
    assert client.parse(refusal).text == "I'm sorry"


# The cache and the budget ---------------------------------------------------------------------


def test_the_cache_keeps_the_first_answer_and_counts(tmp_path):
    cache = Cache(tmp_path / "a/requests.sqlite")
    assert cache.get("k") is None
    cache.put("k", "assess", "m", Answer("one", "stop", 10, 5), 0.25)
    cache.put("k", "assess", "m", Answer("two", "stop", 99, 99), 9.0)
    cache.put("l", "verify", "n", Answer("", error="HTTP 400"), 0.0)
    cache.close()
    again = Cache(tmp_path / "a/requests.sqlite")
    assert again.get("k") == Answer("one", "stop", 10, 5) and again.get("l").error == "HTTP 400"
    assert (again.total().requests, again.total().tokens, again.total().dollars) == (2, 15, 0.25)
    assert set(again.spent()) == {("assess", "m"), ("verify", "n")}
    again.close()


def test_a_half_written_answer_is_forgotten(tmp_path):
    """The end of the write-ahead log is cut as by a power failure: the last answer goes, those before it stay."""
    cache = Cache(tmp_path / "c.sqlite")
    for number in range(20):
        cache.put(str(number), "assess", "m", Answer(f"text {number} " * 50), 0.0)
    wal = (tmp_path / "c.sqlite-wal").read_bytes()
    main = (tmp_path / "c.sqlite").read_bytes()
    cache.close()
    (tmp_path / "d.sqlite").write_bytes(main)
    (tmp_path / "d.sqlite-wal").write_bytes(wal[:-1000])
    torn = Cache(tmp_path / "d.sqlite")
    assert all(torn.get(str(number)) == Answer(f"text {number} " * 50) for number in range(19))
    assert torn.get("19") is None
    torn.close()


class _Fake:
    """A client that answers at once, or fails as told; counts what it was asked."""

    def __init__(self, result=None, delay: float = 0.0) -> None:
        self.result, self.delay, self.asked = result or Answer("yes", "stop", 60, 40), delay, 0

    async def ask(self, request: Request) -> Answer:
        self.asked += 1
        await asyncio.sleep(self.delay)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def close(self) -> None:
        pass


@contextlib.contextmanager
def online(tmp_path, fake: _Fake, monkeypatch, budget: Budget | None = None, **options):
    monkeypatch.setattr(teacher, "Client", lambda model: fake)
    model = Teacher(**(vars(MODEL) | options))
    one = teacher.OnlineTeacher(model, budget or Budget(), tmp_path / "requests.sqlite")
    try:
        yield one
    finally:
        one.close()


def numbered(count: int) -> list[Request]:
    return [Request("assess", "s", str(number)) for number in range(count)]


def test_the_same_request_is_asked_once_also_while_it_is_in_flight(tmp_path, monkeypatch):
    fake = _Fake(delay=0.05)
    with online(tmp_path, fake, monkeypatch) as one:
        results = [future.result(10) for future in [one.submit(REQUEST) for _ in range(5)]]
    assert fake.asked == 1 and results == [fake.result] * 5
    with online(tmp_path, fake, monkeypatch) as one:
        assert one.submit(REQUEST).result(10) == fake.result
    assert fake.asked == 1


def test_under_a_budget_the_first_request_goes_alone(tmp_path, monkeypatch):
    """It tells how large requests are: four at once, of unknown size, would cost 400."""
    fake = _Fake(delay=0.01)  # 100 tokens each
    options = {"max_tokens": 40, "concurrency": 4}
    with online(tmp_path, fake, monkeypatch, Budget(tokens=250), **options) as one:
        results = [future.result(10) for future in [one.submit(request) for request in numbered(8)]]
    assert fake.asked == sum(isinstance(result, Answer) for result in results) == 2
    with online(tmp_path, fake, monkeypatch, Budget(tokens=350), **options) as one:  # a later start knows it
        results = [future.result(10) for future in [one.submit(request) for request in numbered(8)]]
    assert fake.asked == sum(isinstance(result, Answer) for result in results) == 3


def test_a_budget_needs_a_server_that_counts(tmp_path, monkeypatch):
    fake = _Fake(Answer("yes"))
    with online(tmp_path, fake, monkeypatch, Budget(dollars=5), concurrency=4) as one:
        results = [future.result(10) for future in [one.submit(request) for request in numbered(8)]]
    assert fake.asked == 1 and "does not tell the tokens" in results[-1].why
    with online(tmp_path, fake, monkeypatch, Budget(), concurrency=4) as one:
        assert all(isinstance(one.submit(request).result(10), Answer) for request in numbered(8))


@pytest.mark.parametrize(
    ("budget", "most"), [(Budget(tokens=1000), 1000), (Budget(dollars=0.001), 1000), (Budget(tokens=90), 100)]
)
def test_the_budget_stops_cleanly_and_is_never_broken(tmp_path, monkeypatch, budget, most):
    fake = _Fake(delay=0.01)  # 100 tokens, a ten-thousandth of a dollar
    prices = {"input_price": 1.0, "output_price": 1.0, "max_tokens": 40, "concurrency": 4}
    with online(tmp_path, fake, monkeypatch, budget, **prices) as one:
        results = [future.result(10) for future in [one.submit(request) for request in numbered(40)]]
    answered = [result for result in results if isinstance(result, Answer)]
    stopped = [result for result in results if isinstance(result, teacher.Unanswered)]
    cache = Cache(tmp_path / "requests.sqlite")
    assert cache.total().requests == len(answered) == fake.asked
    if most == 1000:
        assert cache.total().tokens <= most and len(answered) >= 5
    cache.close()
    assert stopped and all(result.stopped and "budget" in result.why for result in stopped)
    with online(tmp_path, fake, monkeypatch, Budget(), **prices) as one:  # a higher cap goes on with the rest
        assert all(isinstance(one.submit(request).result(10), Answer) for request in numbered(40))
    assert fake.asked == 40


def test_a_server_that_is_down_is_given_up(tmp_path, monkeypatch):
    fake = _Fake(client.TransientError("HTTP 503"))
    with online(tmp_path, fake, monkeypatch, give_up_after=5, concurrency=1) as one:
        results = [future.result(10) for future in [one.submit(request) for request in numbered(20)]]
    assert fake.asked == 5
    assert [result.stopped for result in results] == [False] * 5 + [True] * 15
    assert "5 requests in a row got no answer, the last for: HTTP 503" in results[-1].why
    connection = sqlite3.connect(tmp_path / "requests.sqlite")
    assert connection.execute("SELECT COUNT(*) FROM answers").fetchone() == (0,)
    connection.close()


def test_a_server_that_rejects_everything_drops_nothing(tmp_path, monkeypatch):
    """An option that the server does not know is refused like a bad request, but of every row."""
    fake = _Fake(Answer("", error="HTTP 400: no such parameter"))
    with online(tmp_path, fake, monkeypatch, give_up_after=5, concurrency=1) as one:
        results = [future.result(10) for future in [one.submit(request) for request in numbered(20)]]
    assert fake.asked == 5 and all(isinstance(result, teacher.Unanswered) for result in results[4:])
    assert "5 requests in a row were rejected, the last with HTTP 400: no such" in results[-1].why
    with online(tmp_path, _Fake(), monkeypatch, give_up_after=5) as one:  # nothing of it was kept
        assert all(one.submit(request).result(10).text == "yes" for request in numbered(20))


def test_some_rejections_are_kept(tmp_path, monkeypatch):
    fake = _Fake(Answer("", error="HTTP 400: too long"))
    for _ in range(2):
        with online(tmp_path, fake, monkeypatch, give_up_after=5) as one:
            assert all(one.submit(request).result(10) == fake.result for request in numbered(3))
    assert fake.asked == 3


def test_a_wrong_key_stops_the_rest(tmp_path, monkeypatch):
    fake = _Fake(client.StoppedError("check the key"))
    with online(tmp_path, fake, monkeypatch, concurrency=1) as one:
        results = [future.result(10) for future in [one.submit(request) for request in numbered(5)]]
    assert fake.asked == 1 and all(result.stopped and result.why == "check the key" for result in results)
