"""One OpenAI-compatible chat-completions endpoint: images as data URLs, retries, rate.

aiohttp is the HTTP client: it is kept up, holds hundreds of requests open cheaply, and leaves retrying to us, which
must obey a budget and a limit of rate that all requests share.
"""

import asyncio
import base64
import dataclasses
import datetime
import email.utils
import hashlib
import json
import os
import random
from typing import Any

import aiohttp

from trace_jax.cot.cache import Answer
from trace_jax.cot.config import Teacher

REJECTED = {400, 413, 422}
"""Statuses that refuse this one request for good; another one may be answered."""
_TRANSIENT = {408, 409, 425, 429}  # and every 5xx; all other statuses (key, money, permission, model) refuse everything
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a model. `images` are encoded files, shown before the text. `schema` is the JSON schema of the
    answer, None for free text. The last three tell an offline teacher what it is about; no server sees them.
    """

    stage: str
    system: str
    text: str
    images: tuple[bytes, ...] = ()
    schema: dict[str, Any] | None = None
    qid: str = ""
    target: str = ""  # did of the target shown
    claim: tuple[str, str] = ("", "")  # the reasoning and answer to verify


class TransientError(Exception):
    """No attempt was answered."""


class StoppedError(Exception):
    """No further request makes sense; the message says why."""


def payload(request: Request, model: Teacher) -> dict[str, Any]:
    """The body of the request."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images
    ]
    content.append({"type": "text", "text": request.text})
    body: dict[str, Any] = {
        "model": model.model,
        "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": content}],
        "temperature": model.temperature,
        "seed": model.seed,
        model.token_field: model.max_tokens,
    }
    if request.schema is not None and model.structured == "json_schema":
        schema = {"name": request.stage, "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.schema is not None and model.structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def key_of(request: Request, model: Teacher) -> str:
    """Names a request by all that its answer depends on: model, prompt, inputs and parameters; not the server."""
    parts = {
        "model": model.model or model.kind,
        "system": request.system,
        "text": request.text,
        "images": [hashlib.sha256(image).hexdigest() for image in request.images],
        "schema": request.schema,
        "parameters": [model.temperature, model.seed, model.max_tokens, model.structured],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def parse(body: dict[str, Any]) -> Answer:
    """The answer of a chat completion. Raises TransientError for one that is not whole."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError("text in its content")
        return Answer(
            text=text,
            finish=choice.get("finish_reason") or "stop",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise TransientError(f"an answer without {error}") from error


def rejection(status: int, body: str) -> Answer:
    """What stands in the cache for a request that the server refuses for good."""
    return Answer("", error=f"HTTP {status}: {body[:200]}")


class Client:
    """Asks one endpoint. Lives in one event loop."""

    def __init__(self, model: Teacher) -> None:
        self._model = model
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(model.key_variable)) else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=model.timeout),
            connector=aiohttp.TCPConnector(limit=model.concurrency),
            trust_env=True,
        )
        self._next_slot = 0.0  # no attempt starts before
        self._random = random.Random()

    async def ask(self, request: Request) -> Answer:
        """The answer, after as many attempts as the options allow.

        Raises TransientError when no attempt was answered, and StoppedError when no request will be.
        """
        body = payload(request, self._model)
        for attempt in range(1, self._model.attempts + 1):
            await self._wait_for_slot()
            try:
                return await self._attempt(body)
            except TransientError as error:
                if attempt == self._model.attempts:
                    raise TransientError(f"{error} ({attempt} attempts)") from error
                await self._pause(attempt, error)
        raise TransientError("no attempt is allowed")

    async def _attempt(self, body: dict[str, Any]) -> Answer:
        url = f"{self._model.base_url.rstrip('/')}/chat/completions"
        try:
            async with self._session.post(url, json=body) as response:
                if response.status in _TRANSIENT or response.status >= 500:
                    raise _BusyError(response.status, _retry_after(response.headers.get("Retry-After")))
                if response.status != 200 and response.status not in REJECTED:
                    raise StoppedError(
                        f"{url} answers {response.status} {response.reason}: check the address, the key, the model and"
                        " the account"
                    )
                data = await response.read()
        except TimeoutError as error:
            raise TransientError("timeout") from error
        except aiohttp.ClientError as error:
            raise TransientError(f"connection: {type(error).__name__}") from error
        if response.status != 200:
            return rejection(response.status, data.decode(errors="replace"))
        try:
            parsed = json.loads(data)
        except ValueError as error:
            raise TransientError("truncated JSON") from error
        return parse(parsed)

    async def _wait_for_slot(self) -> None:
        """Keeps requests apart by the rate, and all of them still after a 429, also those that wait already."""
        clock = asyncio.get_running_loop().time
        while (wait := self._next_slot - clock()) > 0:
            await asyncio.sleep(wait)
        if self._model.requests_per_minute > 0:
            self._next_slot = clock() + 60 / self._model.requests_per_minute

    async def _pause(self, attempt: int, error: TransientError) -> None:
        if isinstance(error, _BusyError) and error.retry_after is not None:
            wait = min(error.retry_after, self._model.max_retry_after)
        else:
            longest = min(self._model.backoff * 2 ** (attempt - 1), self._model.max_backoff)
            wait = longest * self._random.uniform(0.5, 1.0)
        if isinstance(error, _BusyError) and error.status == 429:  # the limit is everyone's
            self._next_slot = max(self._next_slot, asyncio.get_running_loop().time() + wait)
        await asyncio.sleep(wait)

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()


class _BusyError(TransientError):
    def __init__(self, status: int, retry_after: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.retry_after = status, retry_after


def _retry_after(value: str | None) -> float | None:
    """Seconds, given as such or as a date; None where there is none or it cannot be read."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment.replace(tzinfo=moment.tzinfo or datetime.UTC)  # "-0000" is read as no zone
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def data_url(image: bytes) -> str:
    """An encoded picture as a data URL."""
    kind = next((kind for magic, kind in _MAGIC.items() if image.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
