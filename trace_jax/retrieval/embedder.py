"""From queries and documents to vectors: one model, one processor, and the checkpoint that they come from.

All are packed many to a row. Documents, and queries that do not reason or whose trace is given, are read once (paper
Sec. 3.1: candidates never reason); other queries go through generation. The shapes are few and static; results come
back in the order of the input, and do not depend on what else is in the batch beyond the noise of float arithmetic.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from tqdm import tqdm

from trace_jax import sharding
from trace_jax.config import Config
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Document, Query
from trace_jax.data.tokenizer import Processor, append
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.retrieval.artifacts import MissingStageError, key_of
from trace_jax.retrieval.drafts import Memory
from trace_jax.retrieval.generation import (
    MODES,
    Decoding,
    Generation,
    Mode,
    Program,
    Reasoning,
    Work,
    cache_bytes,
    compilations,
    generate,
    warm_up,
)
from trace_jax.retrieval.items import Item, read_document, read_query
from trace_jax.retrieval.packing import LEAST_LENGTH, Packer, Room, Rows, power_of_two, rounded
from trace_jax.training.checkpoint import read_config
from trace_jax.training.losses import normalize
from trace_jax.training.train import load_model, model_identity, restore_model, split_model

log = logging.getLogger(__name__)

WINDOW = 1024  # sequences, and their decoded images, that are in memory at once
AHEAD = 16  # batches that wait for the devices while the host reads and packs what comes next

OnError = Literal["raise", "skip"]
Window = tuple[np.ndarray, list[Tokens]]  # the numbers of some items, and their sequences


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Queries or documents as vectors, in the order given; n of them, d features. Documents have no traces."""

    embeddings: np.ndarray  # [n, d] float32, L2-normalised; zeros for an item that was skipped
    errors: list[str]  # why an item was skipped; "" where it was not
    prompt_tokens: np.ndarray  # [n] int32: what was read, visual tokens too
    traces: list[str]  # what the model wrote before <|emb|>; "" where it wrote nothing
    trace_tokens: np.ndarray  # [n] int32: the length of the trace
    reasoned: np.ndarray  # [n] bool: the first token was not <|emb|>
    capped: np.ndarray  # [n] bool: the trace reached its limit before <|emb|>
    seconds: float  # wall time, without what compiling took

    @classmethod
    def blank(cls, count: int, width: int) -> "Encoded":
        """Nothing yet."""
        return cls(
            embeddings=np.zeros((count, width), np.float32),
            errors=[""] * count,
            prompt_tokens=np.zeros(count, np.int32),
            traces=[""] * count,
            trace_tokens=np.zeros(count, np.int32),
            reasoned=np.zeros(count, bool),
            capped=np.zeros(count, bool),
            seconds=0.0,
        )


def trained_digest(model: Qwen2_5_VL, trainable: tuple[str, ...]) -> str:
    """SHA-256 of what is trained: names, shapes and values, a parameter at a time; the same on any mesh and any number
    of hosts. All processes that hold the model must ask for it.
    """
    digest = hashlib.sha256()
    paths: dict[tuple, Any] = traverse_util.flatten_dict(split_model(model, trainable)[1])
    flat = {"/".join(map(str, path)): parameter for path, parameter in paths.items()}
    for path, parameter in sorted(flat.items()):
        own = parameter.is_fully_addressable
        values = np.asarray(parameter if own else multihost_utils.process_allgather(parameter, tiled=True))
        digest.update(f"{path} {values.shape} {values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()


class Retriever:
    """A model that turns queries and documents into comparable vectors."""

    def __init__(
        self,
        model: Qwen2_5_VL,
        processor: Processor,
        config: Config,
        mesh: jax.sharding.Mesh,
        *,
        step: int,
        identity: str,
        digest: str | None = None,
    ) -> None:
        """Takes the model over: its adapters become a part of its weights (`Qwen2_5_VL.fold_adapters`). `digest` is
        that of a model to which this has happened.
        """
        self.model, self.processor, self.config, self.mesh = model, processor, config, mesh
        self.step, self.identity = step, identity
        self.digest = digest or trained_digest(model, config.model.trainable)
        with jax.set_mesh(mesh):
            model.fold_adapters()
            model.unstack()
        data, runs = config.data, config.model
        options, hidden = config.evaluation, model.architecture.language.hidden_size
        if options.dimensions is not None and not 0 < options.dimensions <= hidden:
            raise ValueError(f"--evaluation.dimensions {options.dimensions}: the model has {hidden}")
        self.width = options.dimensions or hidden  # d
        self.work = Work()  # of all decoding so far
        self.memory = Memory()  # of all traces so far, for drafts
        self._shards = sharding.data_shards(mesh)
        self._packer = Packer(
            geometry=processor.geometry,
            pad_token=processor.pad,
            most=math.ceil(options.batch_size / self._shards),
            shards=self._shards,
            row_length=data.row_length,
            patch_row_length=data.patch_row_length,
            share=runs.attention == "xla",  # splash cannot tell a shared beginning
        )
        self._cache_dtype = jnp.dtype(config.evaluation.cache_dtype or model.dtype)
        self._warm: dict[bool, Room] = {}  # after `warm_up`: the shapes of every call
        self._longest = 0

    @classmethod
    def load(cls, run: Config | str | os.PathLike, *, untrained: bool = False) -> "Retriever":
        """The newest good checkpoint of a run, with its base; or the base alone, when `untrained`.

        `run` is the run's configuration, or its folder, local or gs://, whose checkpoint holds the configuration.
        Raises MissingStageError when the run has no checkpoint, CheckpointError when none of them can be
        read or they belong to another model.
        """
        config = run if isinstance(run, Config) else read_config(run)
        folder = epath.Path(config.run_dir) / "checkpoints"
        if not untrained and not (folder.exists() and any(path.name.isdigit() for path in folder.iterdir())):
            raise MissingStageError(
                f"no checkpoint in {folder}: run `make quickstart` (or launch/train.py {config.name}) first"
            )
        mesh = sharding.make_mesh(config.evaluation.mesh or config.mesh, jax.local_devices())  # each host by itself
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

    @functools.cached_property
    def whole_key(self) -> str:
        """Names the base, the trained values and all that changes a document's vector before it is cut."""
        data, runs = self.config.data, self.config.model
        return key_of(
            self.identity,
            self.digest,
            data.prompts,
            data.max_text_tokens,
            data.min_pixels,
            data.max_pixels,
            runs.dtype,
            runs.param_dtype,
            *([data.position] if data.position != "before" else []),
            *([self.config.evaluation.max_trace_tokens] if data.candidate_trace != "none" else []),
        )

    @property
    def key(self) -> str:
        """`whole_key`, and how many features are kept: names the vectors that this retriever gives."""
        return cut_key(self.whole_key, self.config.evaluation.dimensions)

    def configured(self, config: Config) -> "Retriever":
        """The same model under other options."""
        known = {"step": self.step, "identity": self.identity, "digest": self.digest}
        return Retriever(self.model, self.processor, config, self.mesh, **known)

    # ---- documents, and queries whose trace is given -----------------------------------------------------

    def encode_document(
        self,
        documents: Sequence[Item],
        *,
        names: Sequence[str] | None = None,
        rooms: dict[bool, Room] | None = None,
        cut: bool = True,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> Encoded:
        """Documents as vectors; they never reason (paper Sec. 3.1; but for the ablation of Table 6, where those do that
        were trained to: `data.candidate_trace`). See `Encoded`, and `read_document` for the items.

        `rooms` (from `rooms_for` a sample) keeps the shapes of a long job the same from call to call. A
        text over `data.max_text_tokens` is cut, or refused with TextTooLongError when `cut` is False.

        An item that cannot be read, an image that is none or a text that is refused, raises ValueError or
        TypeError, naming it as in `names`, by default by its number; with `on_error` "skip" it gets zeros for
        a vector and its message in `errors`. `progress` shows a bar.
        """
        reader = self._document_reader(documents, names, on_error, cut=cut)
        if self.config.data.candidate_trace != "none":
            return self._encode_written(len(documents), reader, "adaptive", rooms, progress=progress)
        return self._encode_packed(len(documents), reader, rooms, progress=progress)

    def encode_shards(
        self, shards: Iterable[tuple[Sequence[Item], Sequence[str]]], *, rooms: dict[bool, Room]
    ) -> Iterator[np.ndarray]:
        """Documents as vectors [n, d] float32, a shard at a time: those of a pool that memory need not hold.

        Each shard comes with the names of its items. Its vectors are those of `encode_document` and do not depend on
        other shards; but the devices compute while the host reads the next ones. Raises as `encode_document`.
        """
        if self.config.data.candidate_trace != "none":
            for documents, names in shards:
                yield self.encode_document(documents, names=names, rooms=rooms).embeddings
            return
        sizes: collections.deque[int] = collections.deque()  # of the shards that have been read

        def windows() -> Iterator[Window]:
            for documents, names in shards:
                reader, numbers = self._document_reader(documents, names, "raise"), np.arange(len(documents))
                sizes.append(len(numbers))
                read = (reader.read(i, []) for i in numbers.tolist())
                yield numbers, [self.processor.finish(sequence) for sequence in read if sequence is not None]

        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for part in self._states(windows(), rooms):
            parts.append(part)  # batches come in order, each of one shard
            if sum(len(members) for members, _ in parts) == sizes[0]:
                members, states = map(np.concatenate, zip(*parts, strict=True))
                yield cut_vectors(states[np.argsort(members)], self.width)
                sizes.popleft()
                parts.clear()

    def _document_reader(
        self, documents: Sequence[Item], names: Sequence[str] | None, on_error: OnError, *, cut: bool = True
    ) -> "_Reader":
        def tokenize(i: int, name: str) -> Tokens:
            return self.processor.document(read_document(documents[i]), name, cut=cut)

        return self._reader(tokenize, "document", names, on_error)

    def encode_query_with_trace(
        self, queries: Sequence[Query], traces: Sequence[str], *, rooms: dict[bool, Room] | None = None
    ) -> Encoded:
        """Queries that are handed their traces ("" for none); with true ones, the ceiling."""
        limit = self.config.data.max_trace_tokens
        given = [self.processor.encode(trace)[:limit] if trace else [] for trace in traces]

        def tokenize(i: int, name: str) -> Tokens:
            return append(self.processor.query(queries[i], name), given[i])

        encoded = self._encode_packed(len(queries), self._reader(tokenize, "query"), rooms)
        lengths = np.array([len(tokens) for tokens in given], np.int32)
        return dataclasses.replace(encoded, traces=list(traces), trace_tokens=lengths, reasoned=lengths > 0)

    def rooms_for(self, sample: Sequence[Query | Document]) -> dict[bool, Room]:
        """Static shapes for many calls, from a sample of their items: those without images, and those with."""
        return self._packer.rooms([self.processor.finish(sequence) for sequence in self._read(sample)], sample=True)

    def warm_up(self, sample: Sequence[Query | Document], mode: Mode | None = None) -> None:
        """Compiles what encoding needs, so that a server's first queries do not wait for it, nor any later ones.

        From now on all calls take the shapes of this sample, whatever the number of their items. Only an item that is
        longer than all of the sample, or has more images, may still have something compiled. `mode` as in
        `encode_query`; direct calls, and documents, are always included.
        """
        mode, sequences = mode or self.config.evaluation.mode, self._read(sample)
        self._longest = rounded(max(map(len, sequences)), LEAST_LENGTH)
        self._warm = self.rooms_for(sample)
        numbers = np.arange(len(sequences))
        self._encode([(numbers, [self.processor.finish(sequence) for sequence in sequences])], len(sequences))
        if mode != "direct":
            with jax.set_mesh(self.mesh):
                batches = (rows for _, rows in self._batches([(numbers, sequences)]))
                warm_up(self.model, batches, mode=mode, **self._decoding(self._longest, len(sequences)))

    def _read(self, sample: Sequence[Query | Document]) -> list[Tokens]:
        read = self.processor
        return [read.query(item) if isinstance(item, Query) else read.document(item) for item in sample]

    def _reader(
        self,
        tokenize: Callable[[int, str], Tokens],
        kind: str,
        names: Sequence[str] | None = None,
        on_error: OnError = "raise",
    ) -> "_Reader":
        return _Reader(tokenize, kind, names, on_error, self._packer.row_length)

    def _encode_packed(
        self,
        count: int,
        reader: "_Reader",
        rooms: dict[bool, Room] | None = None,
        *,
        progress: bool = False,
    ) -> Encoded:
        """The normalised state of each sequence's last token, which predicts <|emb|>, or is it (`data.position`)."""
        encoded = Encoded.blank(count, self.width)
        windows = (
            (chosen, [self.processor.finish(prompt) for prompt in prompts])
            for chosen, prompts in self._windows(reader, encoded, progress)
        )
        states = self._encode(windows, count, rooms)
        return dataclasses.replace(encoded, embeddings=cut_vectors(states, self.width))

    def _encode(self, windows: Iterable[Window], count: int, rooms: dict[bool, Room] | None = None) -> np.ndarray:
        """The state at the end of each sequence, of unit length, by its number: [count, D] float32, else zeros."""
        out = np.zeros((count, self.model.architecture.language.hidden_size), np.float32)
        for members, states in self._states(windows, rooms):
            out[members] = states
        return out

    def _states(
        self, windows: Iterable[Window], rooms: dict[bool, Room] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of a batch at a time, in order: the numbers of its items [n], and the states at their ends [n, D]."""
        waiting: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

        def fetch() -> tuple[np.ndarray, np.ndarray]:
            members, states = waiting.popleft()
            return members[members >= 0], np.asarray(states).reshape(len(members), -1)[members >= 0]

        for members, rows in self._batches(windows, rooms):
            with jax.set_mesh(self.mesh):
                waiting.append((members, _read(self.model, rows)))
            if len(waiting) > AHEAD:
                yield fetch()
        while waiting:
            yield fetch()

    def _batches(
        self, windows: Iterable[Window], rooms: dict[bool, Room] | None = None
    ) -> Iterator[tuple[np.ndarray, Rows]]:
        """Packed batches on the devices, and the number of the item that each of their places holds; -1: none."""
        for numbers, sequences in windows:
            for members, rows in self._packer.deal(sequences, self._fitting(sequences, rooms)):
                yield np.where(members >= 0, numbers[members], -1), sharding.to_devices(rows, self.mesh)

    def _fitting(self, sequences: Sequence[Tokens], rooms: dict[bool, Room] | None) -> dict[bool, Room]:
        """The caller's shapes, or those of `warm_up`; measured is only what neither has, which a long job has not."""
        known = rooms or self._warm
        return self._packer.rooms([each for each in sequences if bool(each.images) not in known]) | known

    def _windows(self, reader: "_Reader", encoded: Encoded, progress: bool) -> Iterator[Window]:
        """The items, as many as are in memory at once; notes down the errors, and the lengths of the others."""
        count = len(encoded.errors)
        with tqdm(total=count, desc="encoding", unit=reader.kind, disable=not progress, dynamic_ncols=True) as bar:
            for first in range(0, count, WINDOW):
                numbers = range(first, min(first + WINDOW, count))
                read = {i: sequence for i in numbers if (sequence := reader.read(i, encoded.errors)) is not None}
                if read:
                    chosen, sequences = np.array(list(read)), list(read.values())
                    encoded.prompt_tokens[chosen] = [len(sequence) for sequence in sequences]
                    yield chosen, sequences
                bar.update(len(numbers))

    # ---- queries -----------------------------------------------------------------------------------------

    def encode_query(
        self,
        queries: Sequence[Item],
        mode: Mode | None = None,
        *,
        names: Sequence[str] | None = None,
        cut: bool = True,
        on_error: OnError = "raise",
        rooms: dict[bool, Room] | None = None,
        progress: bool = False,
    ) -> Encoded:
        """Reasons where the model chooses to (or never, or always: `mode`), then embeds.

        See `Encoded`, `read_query` for the items, and `encode_document` for all else.
        """

        def tokenize(i: int, name: str) -> Tokens:
            return self.processor.query(read_query(queries[i]), name, cut=cut)

        reader = self._reader(tokenize, "query", names, on_error)
        mode = mode or self.config.evaluation.mode
        return self._encode_written(len(queries), reader, mode, rooms, progress=progress)

    def _encode_written(
        self,
        count: int,
        reader: "_Reader",
        mode: Mode,
        rooms: dict[bool, Room] | None = None,
        *,
        progress: bool = False,
    ) -> Encoded:
        """What follows the traces that the model writes."""
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(map(repr, MODES))}")
        started, compiling = time.perf_counter(), compilations()[1] + _read.seconds
        if mode == "direct":
            encoded = self._encode_packed(count, reader, rooms, progress=progress)
            return dataclasses.replace(encoded, seconds=_since(started, compiling))
        encoded, written = Encoded.blank(count, self.width), [[] for _ in range(count)]
        for members, result in self._generate(self._windows(reader, encoded, progress), count, mode, rooms):
            encoded.embeddings[members] = cut_vectors(result.embeddings, self.width)
            encoded.reasoned[members], encoded.capped[members] = result.reasoned, result.capped
            encoded.trace_tokens[members] = result.lengths
            for i, trace in zip(members, result.traces(), strict=True):
                written[i], encoded.traces[i] = trace, self.processor.decode(trace).strip()
        if self.processor.position == "token":  # an ablation: all is read once more, with <|emb|>
            whole = self._encode_packed(count, reader.with_traces(written), rooms=None, progress=progress)
            encoded = dataclasses.replace(encoded, embeddings=whole.embeddings)
        return dataclasses.replace(encoded, seconds=_since(started, compiling))

    def _generate(
        self, windows: Iterable[Window], count: int, mode: Reasoning, rooms: dict[bool, Room] | None = None
    ) -> Iterator[tuple[np.ndarray, Generation]]:
        """What is written after prompts, at most `count`, and their numbers.

        All windows are one stream, so that slots are refilled from window to window; but a prompt that is longer than
        all before needs another cache, and begins another.
        """
        longest = self._longest

        def room(window: Window) -> int:
            nonlocal longest
            longest = max(longest, rounded(max(map(len, window[1])), LEAST_LENGTH))
            return longest

        for length, stream in itertools.groupby(windows, room):
            dealt: list[np.ndarray] = []

            def batches(stream: Iterable[Window] = stream, dealt: list[np.ndarray] = dealt) -> Iterator[Rows]:
                for members, rows in self._batches(stream, rooms):
                    dealt.append(members)
                    yield rows

            with jax.set_mesh(self.mesh):
                options = self._decoding(length, count)
                result = generate(self.model, batches(), mode=mode, memory=self.memory, **options)
            self.work = self.work.plus(result.work)
            members = np.concatenate(dealt)
            rows = {name: getattr(result, name)[members >= 0] for name in Generation._fields if name != "work"}
            yield members[members >= 0], result._replace(**rows)

    def _decoding(self, longest: int, count: int) -> dict[str, Any]:
        """How traces are written after `count` prompts of at most `longest` tokens: arguments of `generate`."""
        options = self.config.evaluation
        decoding = Decoding(
            stops=(self.processor.emb, self.processor.end),
            max_new_tokens=options.max_trace_tokens,
            drafts=options.drafts,
            temperature=options.temperature,
            samples=options.samples,
            seed=self.config.training.seed,
        )
        most = options.batch_size if self._warm else min(options.batch_size, power_of_two(count * options.samples))
        each = power_of_two(math.ceil(most / self._shards))
        slots = self._shards * min(each, self._slots_in_memory(decoding.cache_length(longest)))
        return {"decoding": decoding, "longest": longest, "slots": slots, "cache_dtype": self._cache_dtype}

    def _slots_in_memory(self, length: int) -> int:
        """How many rows of so many slots a shard's devices have room for (`evaluation.cache_gib`): a power of two."""
        architecture, heads = self.model.architecture.language, self.mesh.shape["tensor"]
        # The devices of a shard hold a row together where its heads can be dealt to them, else each of them does.
        share = heads if architecture.num_kv_heads % heads == 0 else 1
        row = cache_bytes(architecture, length, self._cache_dtype) / share
        room = int(self.config.evaluation.cache_gib * 2**30 / row)
        if not room:
            raise ValueError(
                f"--evaluation.cache-gib {self.config.evaluation.cache_gib} has no room for one row of {length} tokens:"
                f" it takes {row / 2**30:.2g} GiB"
            )
        return 1 << (room.bit_length() - 1)


def cut_key(key: str, dimensions: int | None) -> str:
    """The name of vectors that are cut to so many features; None keeps all."""
    return key_of(key, dimensions) if dimensions else key


def cut_vectors(vectors: np.ndarray, width: int) -> np.ndarray:
    """The first features alone, of unit length again (Matryoshka): [n, D] -> [n, d]; zeros stay."""
    vectors = vectors[:, :width]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _since(started: float, compiling: float) -> float:
    """Seconds since `started`, but for those of compiling, of which there had been `compiling`."""
    return time.perf_counter() - started - (compilations()[1] + _read.seconds - compiling)


class _Reader:
    """Items to sequences, one at a time; what cannot be read is raised, or noted down."""

    def __init__(
        self,
        tokenize: Callable[[int, str], Tokens],
        kind: str,
        names: Sequence[str] | None,
        on_error: OnError,
        longest: int,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error {on_error!r} is neither 'raise' nor 'skip'")
        self._tokenize, self._names, self._skip = tokenize, names, on_error == "skip"
        self._longest, self.kind = longest - 1, kind  # <|emb|> may follow

    def with_traces(self, traces: Sequence[Sequence[int]]) -> "_Reader":
        """The same items, each with so many tokens after it."""
        other = copy.copy(self)
        other._tokenize = lambda i, name: append(self._tokenize(i, name), traces[i])
        return other

    def read(self, number: int, errors: list[str]) -> Tokens | None:
        """Item `number`; None, and its message among the errors, where it is skipped."""
        name = self._names[number] if self._names else f"{self.kind} {number}"
        try:
            sequence = self._tokenize(number, name)
            if len(sequence) > self._longest:
                raise ValueError(
                    f"{len(sequence)} tokens with its images, and a row has {self._longest}; give fewer or smaller"
                    " images, or raise data.row_length"
                )
            return sequence
        except (ValueError, TypeError) as error:
            named = str(error).startswith(name)
            if self._skip:
                errors[number] = str(error) if named else f"{name}: {error}"
                return None
            if named:
                raise
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name}: {error}") from error


@Program
def _read(model: Qwen2_5_VL, rows: Rows) -> jax.Array:
    """The normalised states at the ends of packed sequences: [S, N, D] float32."""
    return normalize(model(rows.inputs, at=jnp.asarray(rows.last)))
