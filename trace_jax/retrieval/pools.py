"""The candidates' vectors on disk: made once for each did, in shards that survive a kill.

`<run_dir>/embeddings/<release>/<key>/00012.npy` holds rows 12*512 ... of `Benchmark.candidates`: [<=512, D], the bits
of bfloat16 as uint16, for npy knows no bfloat16; of a large pool, 4096 rows. 00012.npy.sha256 is its SHA-256, as
`sha256sum --check` reads it. The key names the checkpoint and the records, so that vectors of another one lie beside
these, and stay. `<run_dir>/embeddings/<release>/about.json` says which key was embedded last.
"""

import dataclasses
import hashlib
import io

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from trace_jax import sharding
from trace_jax.config import Config
from trace_jax.data.builders.layout import did_of
from trace_jax.data.schema import Document
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever, cut_key, cut_vectors

SHARD, LARGE_SHARD = 512, 4096  # candidates of a file, and what is decoded at once; the last batch is partly empty
LARGE = 100_000  # candidates from which on files are large
SAMPLE = 256  # candidates looked at to choose the static shapes, or four batches: not all kinds are frequent


class CandidateVectors:
    """The vectors of all candidates of a release, in all D features on disk, cut to d where they are read."""

    def __init__(self, config: Config, benchmark: Benchmark, whole_key: str | None = None) -> None:
        """Those of a retriever of this `whole_key`, or those that were embedded last.

        Raises MissingStageError when nothing was, or other records than the release's now.
        """
        root = epath.Path(config.run_dir) / "embeddings" / benchmark.name
        self._mark = root / artifacts.MARK
        self.dimensions = config.evaluation.dimensions
        self.candidates = benchmark.candidates
        self.shard = SHARD if len(self.candidates) < LARGE else LARGE_SHARD
        self.shards = -(-len(self.candidates) // self.shard)
        about = artifacts.read_json(self._mark) or {}
        if whole_key is not None:
            large = [self.shard] if self.shard != SHARD else []  # files of another size are others
            self.key = artifacts.key_of(whole_key, benchmark.fingerprint, *large)
        elif (about.get("records"), about.get("shard", SHARD)) == (benchmark.fingerprint, self.shard):
            self.key = str(about["key"])
        else:
            raise artifacts.MissingStageError(
                f"the candidates in {root} are not embedded, or the release was another one then:"
                " run `make quickstart` (or launch/embed.py) first"
            )
        self._about = {
            "key": self.key,
            "records": benchmark.fingerprint,
            "candidates": len(self.candidates),
            "shard": self.shard,
        }
        self.folder = root / self.key

    @property
    def index_key(self) -> str:
        """Names the vectors as `read` gives them: what is made of them is stored under it."""
        return cut_key(self.key, self.dimensions)

    def mark(self) -> None:
        """Notes down that these are the vectors that were embedded last."""
        if artifacts.read_json(self._mark) != self._about:
            artifacts.write_json(self._mark, self._about)

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there as it was written."""
        try:
            self._load(shard)
        except artifacts.MissingStageError:
            return False
        return True

    def write(self, shard: int, vectors: np.ndarray) -> None:
        """Writes one shard [rows, D] float32, then its checksum; each is whole or absent."""
        buffer = io.BytesIO()
        np.save(buffer, vectors.astype(jnp.bfloat16).view(np.uint16))
        path = self._path(shard)
        artifacts.write_bytes(path, buffer.getvalue())
        artifacts.write_bytes(_checksum(path), _line(path, buffer.getvalue()))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of ascending rows: [n, d] float32, of unit length. One shard is in memory beside the result.

        Raises MissingStageError when one is missing or damaged, naming it.
        """
        bounds = np.searchsorted(rows, np.arange(self.shards + 1) * self.shard)
        vectors = np.zeros((len(rows), 0), np.float32)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            first, last = bounds[shard : shard + 2]
            whole = self._load(shard)[rows[first:last] - shard * self.shard].astype(np.float32)
            width = self.dimensions or whole.shape[1]
            if not vectors.size:
                vectors = np.empty((len(rows), width), np.float32)
            vectors[first:last] = cut_vectors(whole, width)
        return vectors

    def of(self, ids: np.ndarray) -> "Vectors":
        """The vectors of ascending dids [n] int64, all of which must be there."""
        return Vectors(self, self.candidates.rows(ids))

    def rows_of(self, shard: int) -> range:
        """The rows of the candidates that a file holds."""
        return range(shard * self.shard, min((shard + 1) * self.shard, len(self.candidates)))

    def _path(self, shard: int) -> epath.Path:
        return self.folder / f"{shard:05d}.npy"

    def _load(self, shard: int) -> np.ndarray:
        """A shard: [rows, D] bfloat16."""
        path = self._path(shard)
        try:
            data = path.read_bytes()
            whole = _checksum(path).read_bytes() == _line(path, data)
        except FileNotFoundError:
            whole, data = False, b""
        if not whole:
            raise artifacts.MissingStageError(
                f"the candidates are not all embedded: {path} is {'damaged' if data else 'missing'};"
                " run launch/embed.py, which makes what is not there"
            )
        return np.load(io.BytesIO(data)).view(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors that are read where they are sliced: n of them, d features."""

    store: CandidateVectors
    rows: np.ndarray  # [n] int64, ascending

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Some of them: [m, d] float32."""
        return self.store.read(self.rows[part])


def _checksum(path: epath.Path) -> epath.Path:
    return path.parent / f"{path.name}.sha256"


def _line(path: epath.Path, data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()


def for_pools(config: Config) -> Config:
    """The configuration with the mesh and the batch that pools are embedded with."""
    own = config.evaluation
    mesh, batch = own.pool_mesh or own.mesh, own.pool_batch_size or own.batch_size
    return dataclasses.replace(config, evaluation=dataclasses.replace(own, mesh=mesh, batch_size=batch))


def sampled(total: int, batch_size: int) -> range:
    """The rows of candidates that are looked at to choose the static shapes, spread over all."""
    return range(0, total, max(1, total // max(SAMPLE, 4 * batch_size)))


def embed_candidates(config: Config, retriever: Retriever, benchmark: Benchmark) -> int:
    """Embeds what is not embedded yet, or damaged, of all pools of a release; returns how many candidates that were.

    Of several processes each embeds its share of the shards with its own devices, and waits for the others. The shapes
    are chosen from a sample of all candidates, so that a job that was stopped gives the same vectors.
    """
    store = CandidateVectors(config, benchmark, retriever.whole_key)
    uncut = dataclasses.replace(retriever.config.evaluation, dimensions=None)
    retriever = retriever.configured(dataclasses.replace(retriever.config, evaluation=uncut))
    if jax.process_index() == 0:
        store.mark()
    total, mine = len(store.candidates), sharding.dealt(range(store.shards))
    missing = [shard for shard in mine if not store.is_whole(shard)]
    embedded, share = (sum(len(store.rows_of(shard)) for shard in some) for some in (missing, mine))
    sample = sampled(total, retriever.config.evaluation.batch_size) if missing else ()
    rooms = retriever.rooms_for([store.candidates.document(row) for row in sample])

    def documents(shard: int) -> tuple[list[Document], list[str]]:
        rows = store.rows_of(shard)
        names = [f"candidate {did_of(int(store.candidates.ids[row]))}" for row in rows]
        return [store.candidates.document(row) for row in rows], names

    quiet = not missing or jax.process_index() > 0
    with tqdm(
        total=share, initial=share - embedded, desc="embedding", unit="candidate", dynamic_ncols=True, disable=quiet
    ) as bar:
        for shard, vectors in zip(missing, retriever.encode_shards(map(documents, missing), rooms=rooms), strict=True):
            store.write(shard, vectors)
            bar.update(len(vectors))
    multihost_utils.sync_global_devices("embedded")
    return embedded
