"""What a run leaves on disk: files that are whole or absent, marks of what they were made from, wall
seconds.

A stage marks a folder (`about.json`) with the key of the checkpoint and the data that it is made from. One with
another mark is stale: it is never read, and made anew or beside the old one.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

MARK = "about.json"


class MissingStageError(RuntimeError):
    """An earlier stage has not been run, or for another checkpoint; the message says which command to run."""


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file beside its place and renames it: after a kill or on a full disk it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    partial.write_bytes(data)
    partial.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.Path) -> Any:
    """Reads JSON; None when there is no such file, or one that is no JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_arrays(path: epath.Path, **arrays: np.ndarray) -> None:
    """Writes an .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads an .npz. Raises FileNotFoundError, or ValueError when it is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as archive:
            return dict(archive)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error


def key_of(*parts: Any) -> str:
    """A short digest of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Stage:
    """One run of a stage; set `worked` to False when everything was done before."""

    worked: bool = True


@contextlib.contextmanager
def stage(run_dir: str, name: str) -> Iterator[Stage]:
    """Records a stage's wall seconds in `<run_dir>/seconds.json`, unless it failed or had nothing to do.

    Of several processes the first one writes.
    """
    started, running = time.monotonic(), Stage()
    yield running
    path = epath.Path(run_dir) / "seconds.json"
    seconds = read_json(path) or {}
    if jax.process_index() == 0 and (running.worked or name not in seconds):
        write_json(path, seconds | {name: round(time.monotonic() - started, 1)})
