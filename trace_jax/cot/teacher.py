"""Who answers: `submit(request)` gives a future of an `Answer`, or of an `Unanswered` that says why not.

The server's answers go through the cache and the budget. The metadata teacher needs neither: it reads the traces that
a release has of its own (the embedded emoji's are right by construction). What it says passes the same filters.
"""

import asyncio
import concurrent.futures
import dataclasses
import json
import threading
from pathlib import Path
from typing import Protocol

from trace_jax.cot.cache import Answer, Cache
from trace_jax.cot.client import Client, Request, StoppedError, TransientError, key_of
from trace_jax.cot.config import Budget, Teacher
from trace_jax.data.builders import layout


@dataclasses.dataclass(frozen=True)
class Unanswered:
    """No answer. `stopped`: no other request will get one either, until someone mends the cause."""

    why: str
    stopped: bool = False


Result = Answer | Unanswered


class Asked(Protocol):
    """What the stages ask."""

    def submit(self, request: Request) -> concurrent.futures.Future[Result]:
        """Starts a request."""
        ...

    def close(self) -> None:
        """Waits for nothing, frees everything."""
        ...


def dollars(answer: Answer, model: Teacher) -> float:
    """What an answer costs at the model's prices."""
    return (answer.prompt_tokens * model.input_price + answer.completion_tokens * model.output_price) / 1e6


class OnlineTeacher:
    """A server behind the cache and the budget; its requests run in an event loop of their own thread."""

    def __init__(self, model: Teacher, budget: Budget, cache: Path) -> None:
        self._model, self._budget = model, budget
        self._cache = Cache(cache)
        self._stopped = ""
        self._failures = 0  # in a row
        self._rejected: list[tuple[str, Request, Answer]] = []  # in a row: kept only when others are answered
        read, written = self._cache.largest(model.model)
        # What a request in flight is taken to cost.
        self._largest = Answer("", prompt_tokens=read, completion_tokens=max(written, model.max_tokens))
        self._in_flight = 0
        self._pending: dict[str, asyncio.Future[Result]] = {}
        self._capped = bool(budget.tokens or budget.dollars)
        # Under a budget the first request goes alone: it tells how large requests are.
        self._shut = model.concurrency - 1 if self._capped and not read else 0
        self._slots = asyncio.Semaphore(model.concurrency - self._shut)
        spent = self._cache.total()
        self._tokens, self._dollars = spent.tokens, spent.dollars
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()
        self._client = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> Client:
        return Client(self._model)

    def submit(self, request: Request) -> concurrent.futures.Future[Result]:
        """Starts a request, or joins the same one that is in flight."""
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    async def _answer(self, request: Request) -> Result:
        key = key_of(request, self._model)
        if (known := self._cache.get(key)) is not None:
            return known
        if key in self._pending:
            return await self._pending[key]
        self._pending[key] = future = self._loop.create_future()
        try:
            result: Result = await self._pay(key, request)
        except Exception as error:
            future.cancel()
            raise error
        finally:
            del self._pending[key]
        future.set_result(result)
        return result

    async def _pay(self, key: str, request: Request) -> Result:
        async with self._slots:
            if stopped := self._stopped or self._over_budget():
                self._stopped = stopped
                return Unanswered(stopped, stopped=True)
            self._in_flight += 1
            try:
                answer = await self._client.ask(request)
            except TransientError as error:
                self._failures += 1
                if self._failures >= self._model.give_up_after:
                    self._stopped = f"{self._failures} requests in a row got no answer, the last for: {error}"
                return Unanswered(str(error))
            except StoppedError as error:
                self._stopped = str(error)
                return Unanswered(self._stopped, stopped=True)
            finally:
                self._in_flight -= 1
            self._failures = 0
            if answer.error:
                return self._reject(key, request, answer)
            self._keep_rejected()
            cost = dollars(answer, self._model)
            self._cache.put(key, request.stage, self._model.model, answer, cost)
            self._tokens += answer.prompt_tokens + answer.completion_tokens
            self._dollars += cost
            self._largest = Answer(
                "",
                prompt_tokens=max(self._largest.prompt_tokens, answer.prompt_tokens),
                completion_tokens=max(self._largest.completion_tokens, answer.completion_tokens),
            )
            if self._capped and not answer.prompt_tokens:
                self._stopped = "the server does not tell the tokens of its answers, so no budget can be kept"
            for _ in range(self._shut):
                self._slots.release()
            self._shut = 0
            return answer

    def _reject(self, key: str, request: Request, answer: Answer) -> Result:
        """A server that rejects everything is asked wrongly: then nothing is kept, and no row is dropped for it."""
        self._rejected.append((key, request, answer))
        if len(self._rejected) < self._model.give_up_after:
            return answer
        self._stopped = f"{len(self._rejected)} requests in a row were rejected, the last with {answer.error}"
        self._rejected.clear()
        return Unanswered(self._stopped, stopped=True)

    def _keep_rejected(self) -> None:
        for key, request, answer in self._rejected:
            self._cache.put(key, request.stage, self._model.model, answer, 0.0)
        self._rejected.clear()

    def _over_budget(self) -> str:
        """Why one request more may break the budget; those in flight count as much as the largest so far."""
        flying = self._in_flight + 1
        tokens = self._tokens + flying * (self._largest.prompt_tokens + self._largest.completion_tokens)
        money = self._dollars + flying * dollars(self._largest, self._model)
        if self._budget.tokens and tokens > self._budget.tokens:
            return f"the budget of {self._budget.tokens:,} tokens: {self._tokens:,} are spent, {flying} may be next"
        if self._budget.dollars and money > self._budget.dollars:
            return f"the budget of ${self._budget.dollars:,.2f}: ${self._dollars:,.2f} is spent"
        return ""

    def close(self) -> None:
        """Closes connections, thread and cache."""
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._keep_rejected()
        self._cache.close()


class MetadataTeacher:
    """Answers from the release's own traces (cot/) and qrels."""

    def __init__(self, release: Path) -> None:
        self._traces = layout.load_traces(release, "train")
        self._right: dict[str, set[str]] = {}
        for path in sorted((release / "qrels/train").glob("*.txt")):
            self._right |= layout.load_qrels(path)
        if not self._traces or not self._right:
            raise layout.ReleaseError(
                f"{release}: no traces in cot/train or no qrels/train, so its metadata cannot teach; choose kind openai"
            )

    def submit(self, request: Request) -> concurrent.futures.Future[Result]:
        """Knows at once."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        future.set_result(Answer(self._text(request)))
        return future

    def _text(self, request: Request) -> str:
        trace = self._traces.get(request.qid, layout.SIMPLE)
        if request.stage == "assess":
            reason = "It has a trace." if trace["complex"] else "It has none."
            return json.dumps({"complex": trace["complex"], "reason": reason})
        if request.stage == "generate":
            return f"<reasoning>{trace['reasoning']}</reasoning><answer>{trace['answer']}</answer>"
        right = request.target in self._right.get(request.qid, ())
        true = right and request.claim == (trace["reasoning"], trace["answer"])
        return json.dumps({"consistent": true, "confidence": 1.0, "reason": "Compared with the metadata."})

    def close(self) -> None:
        """Nothing is open."""
