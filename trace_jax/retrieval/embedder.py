"""From queries and documents to vectors: one model, one processor, and the checkpoint that they come from.

Documents, and queries whose trace is given, are packed many to a row and read once (paper Sec. 3.1:
candidates never reason). Queries go through generation, one prompt a row. The shapes are few and static;
results come back in the order of the input, and do not depend on what else is in the batch beyond the noise
of float arithmetic.
"""

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath

from trace_jax import sharding
from trace_jax.config import Config
from trace_jax.data.processor import Packed, first_fit, pack, stack_shards
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Document, Inputs, Query
from trace_jax.data.tokenizer import Processor, append
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.retrieval.artifacts import MissingStageError, key_of
from trace_jax.retrieval.generation import Generation, Mode, generate
from trace_jax.training.losses import normalize, take_states
from trace_jax.training.train import load_model, model_identity, restore_model

log = logging.getLogger(__name__)

SLACK = 1.04  # room of a packed batch above what a sample needs
LEAST_LENGTH = 64  # tokens or patches of a row with one prompt
WINDOW = 1024  # sequences, and their decoded images, that are in memory at once


@dataclasses.dataclass(frozen=True)
class QueryResults:
    """Encoded queries, in the order given; n queries, D features."""

    embeddings: np.ndarray  # [n, D] float32, L2-normalised
    traces: list[str]  # what the model wrote before <|emb|>; "" where it wrote nothing
    trace_tokens: np.ndarray  # [n] int32: the length of the trace
    reasoned: np.ndarray  # [n] bool: the first token was not <|emb|>
    capped: np.ndarray  # [n] bool: the trace reached its limit before <|emb|>
    seconds: float  # wall time, without what warming up took


@dataclasses.dataclass(frozen=True)
class Room:
    """The static shape of one shard's part of a packed batch."""

    sequences: int
    rows: int
    patch_rows: int


class Retriever:
    """A model that turns queries and documents into comparable vectors.

    `key` names the checkpoint and all that changes an embedding; what is stored is stored under it.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        processor: Processor,
        config: Config,
        mesh: jax.sharding.Mesh,
        *,
        step: int,
        identity: str,
    ) -> None:
        self.model, self.processor, self.config, self.mesh = model, processor, config, mesh
        self.step, self.identity = step, identity
        data, runs = config.data, config.model
        self.key = key_of(
            identity,
            step,
            data.prompts,
            data.max_text_tokens,
            data.min_pixels,
            data.max_pixels,
            runs.dtype,
            runs.param_dtype,
        )
        self.width = model.architecture.language.hidden_size  # D
        self._shards = sharding.data_shards(mesh)
        self._warm: set[tuple] = set()

    @classmethod
    def load(cls, config: Config, *, untrained: bool = False) -> "Retriever":
        """The base of `config` with the newest good checkpoint of its run, or alone when `untrained`.

        Raises MissingStageError when the run has no checkpoint, CheckpointError when none of them can be
        read or they belong to another model.
        """
        folder = epath.Path(config.run_dir) / "checkpoints"
        if not untrained and not (folder.exists() and any(path.name.isdigit() for path in folder.iterdir())):
            raise MissingStageError(
                f"no checkpoint in {folder}: run `make quickstart` (or launch/train.py {config.name}) first"
            )
        mesh = sharding.make_mesh(config.evaluation.mesh or config.mesh)
        processor = Processor.from_hf(config.model.base, config.data)
        identity = model_identity(config)
        if untrained:
            return cls(load_model(config, processor, mesh), processor, config, mesh, step=0, identity=identity)
        restored = restore_model(config, processor, mesh)
        if restored is None:
            raise MissingStageError(f"no checkpoint in {folder}: run `make quickstart` first")
        step, model = restored
        if step < config.training.steps:
            log.warning("%s is trained for %d of %d steps only", config.run_dir, step, config.training.steps)
        return cls(model, processor, config, mesh, step=step, identity=identity)

    # ---- documents, and queries whose trace is given -----------------------------------------------------

    def encode_documents(
        self,
        documents: Sequence[Document],
        *,
        names: Sequence[str] | None = None,
        rooms: dict[bool, Room] | None = None,
        cut: bool = True,
    ) -> np.ndarray:
        """Documents as vectors: [n, D] float32, L2-normalised, in the order given.

        `rooms` (from `rooms_for` a sample) keeps the shapes of a long job the same from call to call. A
        text over `data.max_text_tokens` is cut, or refused with TextTooLongError when `cut` is False.
        Raises ValueError for an image that cannot be read, naming it as in `names`.
        """

        def tokenize(i: int) -> Tokens:
            return self.processor.document(documents[i], names[i] if names else "", cut=cut)

        return self._encode_packed(len(documents), tokenize, rooms)

    def encode_queries_with_traces(self, queries: Sequence[Query], traces: Sequence[str]) -> np.ndarray:
        """Queries that are handed their traces ("" for none): [n, D] float32; with true ones, the ceiling."""
        limit = self.config.data.max_trace_tokens

        def tokenize(i: int) -> Tokens:
            trace = self.processor.encode(traces[i])[:limit] if traces[i] else []
            return append(self.processor.query(queries[i]), trace)

        return self._encode_packed(len(queries), tokenize, coarse=True)

    def rooms_for(self, documents: Sequence[Document]) -> dict[bool, Room]:
        """Static shapes that fit a sample of documents: those without images, and those with."""
        return self._rooms_for([self.processor.document(document) for document in documents])

    def _rooms_for(self, sequences: Sequence[Tokens], *, coarse: bool = False) -> dict[bool, Room]:
        """`coarse` needs fewer shapes and wastes up to half a batch: for short jobs, where compiling is the cost."""
        data = self.config.data
        full = math.ceil(self.config.evaluation.batch_size / self._shards)
        rooms = {}
        for visual in (False, True):
            kind = [sequence for sequence in sequences if bool(sequence.images) == visual]
            if not kind:
                continue
            count = min(full, _power_of_two(math.ceil(len(kind) / self._shards)))
            sample = [kind[i * len(kind) // count] for i in range(count)]
            rows = max(first_fit([len(s) for s in sample], data.row_length)) + 1
            images = [len(image.values) for s in sample for image in s.images]
            patch_rows = max(first_fit(images, data.patch_row_length), default=-1) + 1
            rows, patch_rows = math.ceil(rows * SLACK), math.ceil(patch_rows * SLACK)
            rows = _power_of_two(rows) if coarse else _rounded(rows, 1)
            patch_rows = min(_rounded(patch_rows, 1), len(images))  # a row holds at least one image
            rooms[visual] = Room(count, rows, patch_rows)
        return rooms

    def _encode_packed(
        self,
        count: int,
        tokenize: Callable[[int], Tokens],
        rooms: dict[bool, Room] | None = None,
        *,
        coarse: bool = False,
    ) -> np.ndarray:
        """The normalised state of each sequence's last token, which predicts <|emb|>: [count, D] float32."""
        parts = [np.empty((0, self.width), np.float32)]
        for first in range(0, count, WINDOW):
            sequences = [tokenize(i) for i in range(first, min(first + WINDOW, count))]
            rooms = self._rooms_for(sequences, coarse=coarse) | (rooms or {})
            parts.append(self._encode_window(sequences, rooms))
        return np.concatenate(parts)

    def _encode_window(self, sequences: Sequence[Tokens], rooms: dict[bool, Room]) -> np.ndarray:
        out = np.empty((len(sequences), self.width), np.float32)
        waiting: list[tuple[list[list[int]], jax.Array]] = []
        for visual, room in rooms.items():
            chosen = [i for i, sequence in enumerate(sequences) if bool(sequence.images) == visual]
            hands = list(self._hands(sequences, chosen, room))
            for first in range(0, len(hands), self._shards):
                shards = hands[first : first + self._shards]
                shards += [([], self._pack([], room))] * (self._shards - len(shards))
                index = np.full((self._shards, room.sequences), -1, np.int32)
                for shard, (members, packed) in enumerate(shards):
                    lengths = np.array([len(sequences[i]) for i in members], np.int32)
                    index[shard, : len(members)] = packed.starts + lengths - 1
                batch = stack_shards([packed.inputs for _, packed in shards]), index
                with jax.set_mesh(self.mesh):
                    states = _read(self.model, *sharding.to_devices(batch, self.mesh))
                waiting.append(([members for members, _ in shards], states))
        for shards, states in waiting:  # fetched last: the host packs while the device computes
            fetched = np.asarray(states)
            for shard, members in enumerate(shards):
                out[members] = fetched[shard, : len(members)]
        return out

    def _hands(self, sequences: Sequence[Tokens], chosen: list[int], room: Room) -> Iterator[tuple[list[int], Packed]]:
        """Deals sequences to shards, in order; one that finds no room in a shard comes first in the next."""
        pending = collections.deque(chosen)
        while pending:
            hand = [pending.popleft() for _ in range(min(room.sequences, len(pending)))]
            packed = self._pack([sequences[i] for i in hand], room)
            placed = packed.starts >= 0
            pending.extendleft(reversed([i for i, fits in zip(hand, placed, strict=True) if not fits]))
            members = [i for i, fits in zip(hand, placed, strict=True) if fits]
            yield members, Packed(packed.inputs, packed.starts[placed])

    def _pack(self, sequences: Sequence[Tokens], room: Room) -> Packed:
        return pack(
            sequences,
            self.processor.geometry,
            rows=room.rows,
            row_length=self.config.data.row_length,
            patch_rows=room.patch_rows,
            patch_row_length=self.config.data.patch_row_length,
            pad_token=self.processor.pad,
        )

    # ---- queries -----------------------------------------------------------------------------------------

    def encode_queries(
        self,
        queries: Sequence[Query],
        mode: Mode | None = None,
        *,
        names: Sequence[str] | None = None,
        cut: bool = True,
        timed: bool = False,
    ) -> QueryResults:
        """Reasons where the model chooses to (or never, or always: `mode`), then embeds; see QueryResults.

        `timed` runs the first batch of every shape once beforehand, so that `seconds` holds no compilation.
        `names`, `cut` and errors as in `encode_documents`.
        """
        mode, names = mode or self.config.evaluation.mode, names or [""] * len(queries)
        windows = [slice(first, first + WINDOW) for first in range(0, max(len(queries), 1), WINDOW)]
        parts = [self._encode_queries(queries[at], names[at], mode, cut, timed) for at in windows]
        joined = ("embeddings", "trace_tokens", "reasoned", "capped")
        return QueryResults(
            traces=[trace for part in parts for trace in part.traces],
            seconds=sum(part.seconds for part in parts),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in joined},
        )

    def _encode_queries(
        self, queries: Sequence[Query], names: Sequence[str], mode: Mode, cut: bool, timed: bool
    ) -> QueryResults:
        count, started = len(queries), time.perf_counter()
        sequences = [self.processor.query(query, name, cut=cut) for query, name in zip(queries, names, strict=True)]
        seconds = time.perf_counter() - started
        embeddings = np.empty((count, self.width), np.float32)
        traces, lengths = [""] * count, np.zeros(count, np.int32)
        reasoned, capped = np.zeros(count, bool), np.zeros(count, bool)
        size = min(self.config.evaluation.batch_size, _power_of_two(count))
        size = math.ceil(size / self._shards) * self._shards
        for members in _batches(sequences, size):
            started = time.perf_counter()
            filled = members + members[:1] * (size - len(members))
            inputs = sharding.to_devices(self._one_a_row([sequences[i] for i in filled]), self.mesh)
            begun, result = time.perf_counter(), self._generate(inputs, mode)
            deciding = _power_of_two(int(result.reasoned.sum()))  # generation has a shape for so many rows
            signature = (mode, inputs.tokens.shape, inputs.patches.shape, deciding)
            if timed and signature not in self._warm:
                self._warm.add(signature)
                started += time.perf_counter() - begun
                result = self._generate(inputs, mode)
            real = slice(len(members))
            embeddings[members] = result.embeddings[real]
            reasoned[members], capped[members] = result.reasoned[real], result.capped[real]
            for i, trace in zip(members, result.traces(), strict=False):
                traces[i], lengths[i] = self.processor.decode(trace).strip(), len(trace)
            seconds += time.perf_counter() - started
        return QueryResults(embeddings, traces, lengths, reasoned, capped, seconds)

    def _generate(self, inputs: Inputs, mode: Mode) -> Generation:
        limit = self.config.evaluation.max_trace_tokens
        ends = {"emb_token_id": self.processor.emb, "end_token_id": self.processor.end}
        with jax.set_mesh(self.mesh):
            return generate(self.model, inputs, max_new_tokens=limit, mode=mode, **ends)

    def _one_a_row(self, sequences: Sequence[Tokens]) -> Inputs:
        """Prompts of one kind, left-aligned, dealt to the shards in order; few different lengths."""
        length = _rounded(max(len(sequence) for sequence in sequences), LEAST_LENGTH)
        patches = max((len(image.values) for s in sequences for image in s.images), default=0)
        patches = _rounded(patches, LEAST_LENGTH)
        each = [
            pack(
                [sequence],
                self.processor.geometry,
                rows=1,
                row_length=length,
                patch_rows=1 if patches else 0,
                patch_row_length=patches,
                pad_token=self.processor.pad,
            ).inputs
            for sequence in sequences
        ]
        joined, rows = stack_shards(each), len(sequences) // self._shards
        place = np.arange(len(sequences), dtype=np.int32) % rows * (patches // self.processor.geometry.merge_unit)
        index = np.where(joined.visual_index >= 0, joined.visual_index + place[:, None, None], np.int32(-1))
        joined = joined._replace(visual_index=index)
        return Inputs(*(x.reshape(self._shards, rows * x.shape[1], *x.shape[2:]) for x in joined))


@jax.jit
def _read(model: Qwen2_5_VL, inputs: Inputs, index: jax.Array) -> jax.Array:
    """The normalised states at flat slots `index` [S, N] (negative: any) of packed rows: [S, N, D]."""
    return normalize(take_states(model(inputs), index))


def _batches(sequences: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Indices, `size` at a time: those without images, then those with, each by patches and length."""

    def order(i: int) -> tuple[int, int, int]:
        return sum(len(image.values) for image in sequences[i].images), len(sequences[i]), i

    for visual in (False, True):
        kind = sorted((i for i, s in enumerate(sequences) if bool(s.images) == visual), key=order)
        for first in range(0, len(kind), size):
            yield kind[first : first + size]


def _rounded(size: int, least: int) -> int:
    """The next of a few sizes, multiples of `least` and mostly at most an eighth larger: few shapes to compile."""
    step = max(least, 1 << max(size.bit_length() - 4, 0))
    return math.ceil(size / step) * step


def _power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
