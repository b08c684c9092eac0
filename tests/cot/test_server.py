"""Whole builds against the scripted server: exactly the right rows survive, nothing is paid twice, nothing depends on
the order of the answers or on how often the build was killed.
"""

import collections
import hashlib
import json
import multiprocessing
import pathlib
import random
import signal
import sqlite3
import time

import pytest

from tests.cot.release import good_trace, kind, write_release
from tests.cot.server import Scripted, fate
from trace_jax.config import ROOT
from trace_jax.cot import pipeline
from trace_jax.cot.build import run
from trace_jax.cot.config import CotConfig, Filters, Teacher, Verify
from trace_jax.cot.schema import order, read_rows

TOKENIZER = str(ROOT / "trace_jax/assets/emoji_base")


def config(url: str, timeout: float = 6, **changes) -> CotConfig:
    """`timeout` is far longer than a busy machine needs for an answer: one that is given up would be paid again."""
    teacher = Teacher(
        model="scripted", base_url=url, concurrency=16, timeout=timeout, attempts=4, backoff=0.01, give_up_after=1000
    )
    options = {
        "name": "scripted",
        "teacher": teacher,
        "verifier": teacher,
        "filters": Filters(tokenizer=TOKENIZER),
        "verify": Verify(controls=0.1),
        "unanswered": "drop",
        "part_rows": 400,
        "records": False,
    }
    return CotConfig(**(options | changes))


def digests(output: pathlib.Path) -> dict[str, str]:
    """Path -> hash of every file of the output, what is under work/ apart."""
    files = (
        path for path in sorted(output.rglob("*")) if path.is_file() and "work" not in path.relative_to(output).parts
    )
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def traces(output: pathlib.Path) -> dict[str, dict]:
    lines = [
        line for path in sorted(output.glob("release/cot/train/*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {record["qid"]: record for record in map(json.loads, lines)}


def check_rows(output: pathlib.Path, size: int) -> None:
    """Exactly the right rows survive, with their traces; every other has its reason."""
    expected = {f"{kind(n)}:{n}": fate(n) for n in range(1, size + 1)}
    kept = traces(output)
    assert set(kept) == {qid for qid, reason in expected.items() if not reason}
    for qid, record in kept.items():
        number = order(qid)[1]
        assert record["complex"] == (kind(number) != 9)
        assert (record["reasoning"], record["answer"]) == (good_trace(number) if record["complex"] else ("", ""))
    rows = [row for path in sorted(output.glob("dropped/*.jsonl")) for row in read_rows(path)]
    assert {row.qid: row.dropped for row in rows} == {qid: reason for qid, reason in expected.items() if reason}
    reasons = collections.Counter(reason for reason in expected.values() if reason)
    card = json.loads((output / "card.json").read_text())
    assert {row["reason"]: row["rows"] for row in card["dropped"]} == reasons
    queries = [line for path in output.glob("release/query/train/*.jsonl") for line in path.read_text().splitlines()]
    assert {json.loads(line)["qid"] for line in queries} == set(kept)


def check_scripted(tmp_path: pathlib.Path, size: int, **options) -> None:
    release = write_release(tmp_path / "release", size)
    with Scripted(delay=0.002) as server:
        build = pipeline.Build(config(server.url, **options), release, tmp_path / "out")
        run(build)
        assert max(server.answered.values()) == 1
        asked = sum(server.attempts.values())
        assert 1 < server.most_together <= 16  # requests in flight
    check_rows(build.output, size)
    connection = sqlite3.connect(build.cache)
    assert connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0] == sum(server.answered.values())
    connection.close()
    assert asked > sum(server.answered.values())  # what went wrong was tried again


def test_exactly_the_right_rows_survive(tmp_path):
    check_scripted(tmp_path, 320)


@pytest.mark.slow
def test_exactly_the_right_rows_survive_of_five_thousand(tmp_path):
    check_scripted(tmp_path, 5000, timeout=20, part_rows=5000)


def build_all(url: str, release: pathlib.Path, output: pathlib.Path) -> None:
    """What is killed."""
    run(pipeline.Build(config(url), release, output))


def check_kills(tmp_path: pathlib.Path, size: int, kills: int, seed: int) -> None:
    """A build that is killed at random moments and started again ends like an undisturbed one, and pays for nothing
    twice that it had on disk when it died.
    """
    release = write_release(tmp_path / "release", size)
    with Scripted(delay=0.01) as server:
        run(pipeline.Build(config(server.url), release, tmp_path / "calm"))
        undisturbed = sum(server.answered.values())
    generator, output = random.Random(seed), tmp_path / "killed"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([build_all.__module__])  # what a build imports takes longer than the build
    with Scripted(delay=0.01) as server:
        died = 0
        for last in [False] * kills + [True]:
            process = processes.Process(target=build_all, args=(server.url, release, output))
            process.start()
            if not last:
                # A random moment of the work that is left: after so many more answers, in the middle of everything.
                goal = sum(server.answered.values()) + generator.randrange(1, max(2, undisturbed // kills))
                while process.is_alive() and sum(server.answered.values()) < goal:
                    time.sleep(0.005)
                if process.is_alive():
                    process.kill()
                    died += 1
            process.join(600)
            assert process.exitcode == (0 if last else -signal.SIGKILL)
            if not last:
                connection = sqlite3.connect(output / "work/requests.sqlite")
                stored = connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
                connection.close()
                # Every answer that is not on disk was in flight when a kill came.
                assert sum(server.answered.values()) - stored <= 16 * died
        assert died == kills
        assert sum(server.answered.values()) - undisturbed <= 16 * kills
        assert sum(count - 1 for count in server.answered.values()) <= 16 * kills
    assert digests(output) == digests(tmp_path / "calm")
    check_rows(output, size)


def test_a_killed_build_goes_on(tmp_path):
    check_kills(tmp_path, 240, 2, seed=1)


@pytest.mark.slow
def test_ten_kills_leave_no_trace(tmp_path):
    check_kills(tmp_path, 1200, 10, seed=2)
