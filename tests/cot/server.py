"""A scripted OpenAI-compatible server: answers every query well, badly, slowly or not at all, as its number says.

What goes wrong with a query, and at which stage, is a pure function of its number, so the surviving rows and every drop
reason are known beforehand. The server counts what it answered, by the hash of the request.
"""

import asyncio
import base64
import collections
import hashlib
import json
import re
import threading

from aiohttp import web

from tests.cot.release import good_trace, kind

SCRIPT = {
    # number % 40 -> what goes wrong with a complex query; all others are answered well
    1: "refusal",
    2: "format",
    4: "leakage",
    5: "reasoning_length",
    6: "answer_length",
    8: "repetition",
    9: "language",
    10: "unchanged",
    12: "keyword",
    13: "verdict",
    14: "inconsistent",
    16: "confidence",
    17: "rejected",
    18: "assessment",
    20: "unanswered",
}
HICCUPS = {
    # number % 92 -> what the first attempt at a request gets
    **dict.fromkeys((3, 26, 49, 72), "429"),
    **dict.fromkeys((7, 30, 53, 76), "500"),
    **dict.fromkeys((11, 34, 57, 80), "truncated"),
    **dict.fromkeys((19, 42, 65, 88), "disconnect"),
}
HANGS = 460
"""Of so many queries one hangs, the first time that its trace is asked for, until the client gives up."""
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def fate(number: int) -> str:
    """Why a query is dropped; "" for one that survives."""
    if kind(number) == 9:
        return SCRIPT.get(number % 40, "") if SCRIPT.get(number % 40) in ("assessment", "rejected") else ""
    reason = SCRIPT.get(number % 40, "")
    return "" if reason == "unchanged" and kind(number) != 7 else reason


def _generated(number: int) -> str:
    reasoning, answer = good_trace(number)
    match fate(number):
        case "refusal":
            return "I'm sorry, but I cannot assist with that."
        case "format":
            return f"<reasoning>{reasoning}</reasoning><answer>{answer}"  # cut by max_tokens
        case "leakage":
            reasoning += " This agrees with the ground truth."
        case "reasoning_length":
            reasoning = "It is so."
        case "answer_length":
            answer = " ".join([answer] * 12)
        case "repetition":
            reasoning += " it goes on and on" * 12
        case "language":
            reasoning = (
                "Das Bild zeigt ein Kleidungsstück aus dem Laden, und die Farbe ändert sich, während alles andere so"
                " bleibt, wie es auf dem Bild zu sehen ist."
            )
            answer = f"Ein anderes Kleidungsstück, Nummer {number}, aus dem gleichen Geschäft wie vorher."
        case "unchanged":
            answer = reasoning.split(".")[0]
        case "keyword":
            answer = "Something else entirely, which nobody would look for."
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def _verdict(number: int, decoy: bool) -> str:
    reason = fate(number)
    if reason == "verdict":
        return '{"consistent": true, "confi'
    value = {"consistent": True, "confidence": 0.95, "reason": "It fits."}
    if reason == "inconsistent" or decoy:
        value = {"consistent": False, "confidence": 0.9, "reason": "It does not fit."}
    elif reason == "confidence":
        value["confidence"] = 0.7
    return f"Here is my verdict:\n```json\n{json.dumps(value)}\n```"


class Scripted:
    """The server, in a thread of its own. `delay` is seconds that a good answer takes."""

    def __init__(self, delay: float = 0.0, hiccups: bool = True) -> None:
        self.delay, self.hiccups = delay, hiccups
        self.answered: collections.Counter[str] = collections.Counter()  # finished requests, by hash of the body
        self.attempts: collections.Counter[str] = collections.Counter()
        self.keys: set[str | None] = set()  # Authorization headers that came
        self.together = self.most_together = 0
        self.url = ""
        self._ready = threading.Event()

    def __enter__(self) -> "Scripted":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=10_000_000)
        app.router.add_post("/v1/chat/completions", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        self._ready.set()

    async def _stop(self) -> None:
        """Ends what still hangs for the client's time-out, then everything."""
        await self._runner.cleanup()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.keys.add(request.headers.get("Authorization"))
        raw = await request.read()
        digest = hashlib.sha256(raw).hexdigest()
        body = json.loads(raw)
        *pictures, text = body["messages"][1]["content"]
        for picture in pictures:
            head, data = picture["image_url"]["url"].split(",")
            assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
        number = int(re.search(r"(?:item|house|photo) (\d+)", text["text"])[1])
        stage = {'Reply with JSON only: {"complex"': "assess", "Answer to check": "verify"}
        stage = next((name for words, name in stage.items() if words in text["text"]), "generate")
        self.attempts[digest] += 1
        hiccup = HICCUPS.get(number % 92) if self.hiccups and self.attempts[digest] == 1 else None
        if self.hiccups and self.attempts[digest] == 1 and number % HANGS == 15 and stage == "generate":
            hiccup = "timeout"
        if hiccup is not None and (response := await self._hiccup(hiccup, request)) is not None:
            return response
        reason = fate(number)
        if reason == "unanswered" and stage == "generate":
            return web.Response(status=503)
        if reason == "rejected" and stage == "assess":
            self.answered[digest] += 1
            return web.json_response({"error": {"message": "content policy"}}, status=400)
        if stage == "assess":
            content = (
                "I think so." if reason == "assessment" else json.dumps({"complex": kind(number) != 9, "reason": "."})
            )
        elif stage == "generate":
            content = _generated(number)
        else:
            # The house and item of a decoy are another's: its text or picture does not belong to this query.
            target = re.search(r"of the target: .*?House (\d+)", text["text"])
            content = _verdict(number, decoy=target is not None and int(target[1]) != number)
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        await asyncio.sleep(self.delay)
        self.together -= 1
        self.answered[digest] += 1
        message = {"role": "assistant", "content": content}
        return web.json_response(
            {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}
        )

    async def _hiccup(self, hiccup: str, request: web.Request) -> web.StreamResponse | None:
        if hiccup == "429":
            return web.Response(status=429, headers={"Retry-After": "0.02"})
        if hiccup == "500":
            return web.Response(status=500, text="oops")
        if hiccup == "truncated":
            return web.Response(text='{"choices": [{"message": {"content": "<reaso', content_type="application/json")
        if hiccup == "timeout":
            await asyncio.sleep(60)
            return web.Response(status=504)
        assert request.transport is not None
        request.transport.close()
        return None if request.transport is None else web.Response()
