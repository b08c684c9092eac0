"""The candidates' vectors on disk: made once for each did, in shards that survive a kill.

`<run_dir>/embeddings/<release>/00012.npy` holds rows 12*512 ... of `Benchmark.candidates`, [<=512, D]
float32. The mark of the folder names the checkpoint and the candidates; under another mark everything is
made anew.
"""

import hashlib
import io

import numpy as np
from etils import epath
from tqdm import tqdm

from trace_jax.config import Config
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark, did_of
from trace_jax.retrieval.embedder import Retriever

SHARD = 512  # candidates of a file, and what is decoded at once
SAMPLE = 256  # candidates looked at to choose the static shapes


class CandidateVectors:
    """The folder of a run's candidate vectors."""

    def __init__(self, config: Config, benchmark: Benchmark) -> None:
        self.folder = epath.Path(config.run_dir) / "embeddings" / benchmark.name
        self.candidates = benchmark.candidates
        self.shards = -(-len(self.candidates) // SHARD)
        self._digest = hashlib.sha256(self.candidates.ids.tobytes()).hexdigest()[:16]

    def mark(self, key: str | None) -> dict[str, object]:
        """What the folder says of itself when a retriever of this key wrote it."""
        return {"key": key, "candidates": len(self.candidates), "dids": self._digest}

    @property
    def key(self) -> str | None:
        """The key of the retriever that made these; None when there are none, or of other candidates."""
        key = (artifacts.read_json(self.folder / artifacts.MARK) or {}).get("key")
        return key if artifacts.read_json(self.folder / artifacts.MARK) == self.mark(key) else None

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [shard for shard in range(self.shards) if self._path(shard).name not in there]

    def _path(self, shard: int) -> epath.Path:
        return self.folder / f"{shard:05d}.npy"

    def write(self, shard: int, vectors: np.ndarray) -> None:
        """Writes one shard, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, vectors)
        artifacts.write_bytes(self._path(shard), buffer.getvalue())

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of ascending rows: [n, D] float32. One shard is in memory beside the result.

        Raises MissingStageError when shards are missing.
        """
        if self.key is None or self.missing():
            raise artifacts.MissingStageError(
                f"the candidates in {self.folder} are not all embedded: run `make quickstart` first"
            )
        parts = []
        bounds = np.searchsorted(rows, np.arange(self.shards + 1) * SHARD)
        for shard in np.flatnonzero(np.diff(bounds)):
            vectors = np.load(io.BytesIO(self._path(int(shard)).read_bytes()))
            parts.append(vectors[rows[bounds[shard] : bounds[shard + 1]] - shard * SHARD])
        return np.concatenate(parts)


def embed_candidates(config: Config, retriever: Retriever, benchmark: Benchmark) -> int:
    """Embeds what is not embedded yet of all pools of a release; returns how many candidates that were.

    The shapes are chosen from a sample of all candidates, so that a job that was stopped gives the same
    vectors.
    """
    store = CandidateVectors(config, benchmark)
    artifacts.open_folder(store.folder, store.mark(retriever.key))
    missing, total = store.missing(), len(store.candidates)
    if not missing:
        return 0
    rows = range(0, total, max(1, total // SAMPLE))
    rooms = retriever.rooms_for([store.candidates.document(row) for row in rows])
    done = total - sum(_size(shard, total) for shard in missing)
    with tqdm(total=total, initial=done, desc="embedding", unit="candidate", dynamic_ncols=True) as bar:
        for shard in missing:
            rows = range(shard * SHARD, shard * SHARD + _size(shard, total))
            documents = [store.candidates.document(row) for row in rows]
            names = [f"candidate {did_of(int(store.candidates.ids[row]))}" for row in rows]
            store.write(shard, retriever.encode_document(documents, names=names, rooms=rooms).embeddings)
            bar.update(len(documents))
    return total - done


def _size(shard: int, total: int) -> int:
    return min(SHARD, total - shard * SHARD)
