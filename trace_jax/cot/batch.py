"""Offline batch APIs: a stage's open requests as JSONL files to send, and the answers' JSONL files read back.

A line to send is {"custom_id", "method", "url", "body"}; one that comes back is {"custom_id", "response":
{"status_code", "body"}, "error"}. The custom_id is the request's key in the cache, so answers may come in any order,
file or number.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax.cot.cache import Answer, Cache
from trace_jax.cot.client import REJECTED, TransientError, key_of, parse, payload, rejection
from trace_jax.cot.pipeline import Build, UnfinishedError, need_stage_before, neighbours
from trace_jax.cot.schema import read_rows, write_lines
from trace_jax.cot.stages import make_stage
from trace_jax.cot.teacher import dollars
from trace_jax.data.builders import layout

REQUESTS = 50_000  # of a file: what the hosted batch APIs accept
BYTES = 180_000_000


def folder(build: Build, stage: str) -> Path:
    """Where a stage's files are exchanged."""
    return build.output / "batch" / stage


def read_answers(build: Build, stage: str) -> int:
    """Puts every answer of answers*.jsonl into the cache; returns how many. Lines without one are asked for again.

    Raises ReleaseError for a line that is none of a batch API, and UnfinishedError where all requests were rejected:
    then they were asked wrongly, and nothing of it is kept.
    """
    model = make_stage(stage, build.config, build.release).model()
    count, rejected = 0, list[tuple[str, Answer]]()
    with contextlib.closing(Cache(build.cache)) as cache:
        for path in sorted(folder(build, stage).glob("answers*.jsonl")):
            for where, record in layout.lines(path):
                if not isinstance(key := record.get("custom_id"), str):
                    raise layout.ReleaseError(f"{where}: no custom_id; put answers here as the batch API wrote them")
                response = record.get("response") or {}
                if not isinstance(response, dict):
                    raise layout.ReleaseError(f"{where}: response is no object; is it what the batch API wrote?")
                status, body = response.get("status_code"), response.get("body")
                if status in REJECTED:
                    rejected.append((key, rejection(status, json.dumps(body))))
                elif status == 200 and (answer := _whole(body)) is not None:
                    cache.put(key, stage, model.model, answer, dollars(answer, model))
                    count += 1
        if not count and len(rejected) >= model.give_up_after:
            raise UnfinishedError(
                f"stage {stage}: all {len(rejected):,} requests were rejected, the last with {rejected[-1][1].error}."
                f" Mend the options, and delete {folder(build, stage)}/answers*.jsonl"
            )
        for key, answer in rejected:
            cache.put(key, stage, model.model, answer, 0.0)
    return count + len(rejected)


def _whole(body: Any) -> Answer | None:
    try:
        return parse(body)
    except TransientError:
        return None


def _open_requests(build: Build, stage: str, parts: list[str]) -> Iterator[str]:
    asking = make_stage(stage, build.config, build.release)
    cache, before, seen = Cache(build.cache), neighbours(build, stage)[0], set[str]()
    for part in parts:
        for row in read_rows(before / part):
            for request in [] if row.dropped else asking.requests(row):
                key = key_of(request, asking.model())
                if key not in seen and cache.get(key) is None:
                    seen.add(key)
                    body = payload(request, asking.model())
                    line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
                    yield json.dumps(line, ensure_ascii=False)
    cache.close()


def write_requests(build: Build, stage: str, parts: list[str]) -> list[Path]:
    """Writes what is still to be asked for a stage into requests-*.jsonl; returns the files."""
    for stale in folder(build, stage).glob("requests-*.jsonl"):
        stale.unlink()
    written: list[Path] = []
    lines: list[str] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if lines:
            written.append(folder(build, stage) / f"requests-{len(written):05}.jsonl")
            write_lines(written[-1], lines)
            lines.clear()
            size = 0

    for line in _open_requests(build, stage, parts):
        lines.append(line)
        size += len(line.encode())
        if len(lines) == REQUESTS or size > BYTES:
            flush()
    flush()
    return written


def exchange(build: Build, stage: str, parts: list[str]) -> None:
    """Reads the answers that are there. Raises UnfinishedError, with the files to send, while some are missing."""
    if make_stage(stage, build.config, build.release).model().kind == "metadata":
        return
    need_stage_before(build, stage, parts)
    logging.info("%s: %s answers read", stage, f"{read_answers(build, stage):,}")
    if files := write_requests(build, stage, parts):
        names = "\n".join(f"  {path}" for path in files)
        raise UnfinishedError(
            f"stage {stage} waits for its batch. Send these files:\n{names}\nPut what comes back beside them as"
            " answers*.jsonl, and run the same command again."
        )
