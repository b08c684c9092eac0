"""Finished requests on disk: nothing is paid twice; and the ledger of what they cost.

One SQLite file in write-ahead mode, synchronised at every answer: a killed process, or a machine that loses its
power, loses the requests in flight and nothing else. Several processes of one machine may share it.
"""

import dataclasses
import sqlite3
from pathlib import Path

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, error TEXT NOT NULL, dollars REAL NOT NULL
) WITHOUT ROWID
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered. `error` tells why the server refuses this request for good; then there is no text."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Spent:
    """What requests cost."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens


class Cache:
    """Key -> answer. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute(_TABLE)

    def get(self, key: str) -> Answer | None:
        """The answer to a request that was finished before."""
        found = self._database.execute(
            "SELECT text, finish, prompt_tokens, completion_tokens, error FROM answers WHERE key = ?", (key,)
        ).fetchone()
        return None if found is None else Answer(*found)

    def put(self, key: str, stage: str, model: str, answer: Answer, dollars: float) -> None:
        """Records an answer; it is on disk when this returns. The first answer to a request stays."""
        self._database.execute(
            "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, stage, model, *dataclasses.astuple(answer), dollars),
        )

    def spent(self) -> dict[tuple[str, str], Spent]:
        """(stage, model) -> what it cost, in the order of the names."""
        rows = self._database.execute(
            "SELECT stage, model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(dollars) "
            "FROM (SELECT * FROM answers ORDER BY key) GROUP BY stage, model ORDER BY stage, model"
        )
        return {(stage, model): Spent(*figures) for stage, model, *figures in rows}

    def largest(self, model: str) -> tuple[int, int]:
        """Most tokens that one request to a model read, and most that it wrote; 0 where none was finished."""
        found = self._database.execute(
            "SELECT MAX(prompt_tokens), MAX(completion_tokens) FROM answers WHERE model = ?", (model,)
        ).fetchone()
        return found[0] or 0, found[1] or 0

    def total(self) -> Spent:
        """What everything cost."""
        parts = self.spent().values()
        return Spent(*(sum(getattr(part, field.name) for part in parts) for field in dataclasses.fields(Spent)))

    def close(self) -> None:
        """Closes the file."""
        self._database.close()
