"""From a release on disk to batches: which example comes when, and how a batch is packed.

The order is a pure function of (seed, step): step s holds the mixed examples [s*B, (s+1)*B) whatever the number of
hosts, so the step number alone is the data position. Each task is shuffled anew every epoch and the tasks are mixed
by weight (the paper's task-aware sampling), so every batch holds the same share of each.
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any, cast

import grain
import numpy as np

from trace_jax.config import Config
from trace_jax.data import augmentation, instructions
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.processor import Sequence, first_fit, pack, stack_shards, unique_images
from trace_jax.data.schema import TASKS, Batch, Document, Example, Query, placed
from trace_jax.data.tokenizer import Processor, append

MEASURED_BATCHES = 8  # batches looked at to choose the static shapes
SLACK = 1.02  # room above the fullest of them
TRACE_PARTS = {"both": ("reasoning", "answer"), "reasoning": ("reasoning",), "answer": ("answer",), "none": ()}


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The static shapes of one shard's part of a batch."""

    pairs: int  # B
    rows: int  # R
    patch_rows: int  # V
    targets: int  # T


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """An example as token sequences; the query holds its prompt, then its trace."""

    example: Example
    query: Sequence
    prompt: int  # tokens of the query before the trace
    targets: list[int]  # what the states from the prompt's last token on shall predict; empty: not supervised
    documents: list[Sequence]  # the answer, then hard negatives; none in the generative pretraining
    # `prompt` and `targets` of each document, where candidates reason too (paper Table 6)
    document_targets: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def tokens(self) -> int:
        """Of query and documents."""
        return sum(len(sequence) for sequence in self.sequences)

    @functools.cached_property
    def patches(self) -> int:
        """Of all their images."""
        return sum(len(image.values) for sequence in self.sequences for image in sequence.images)

    @property
    def sequences(self) -> list[Sequence]:
        """The query, then the documents."""
        return [self.query, *self.documents]

    @property
    def supervised(self) -> list[tuple[int, int, list[int]]]:
        """What is learned to be written: (number of the sequence, tokens of its prompt, targets)."""
        documents = ((number, *each) for number, each in enumerate(self.document_targets, start=1))
        return [(0, self.prompt, self.targets), *documents]


def retrieval_examples(config: Config, split: str, seed: int) -> dict[str, grain.MapDataset]:
    """The pairs of each task of a release in M-BEIR's layout, shuffled and repeated without end.

    `split` is "train" or "val". Every draw takes a random positive, random hard negatives and one of the four
    instructions, as M-BEIR trains.
    """
    folder = pathlib.Path(config.data.root) / config.data.release
    files, pools = _files(folder, split)
    queries = [mbeir.load_queries(folder, file) for file in files]
    candidates = _Joined([mbeir.load_candidates(folder, pool) for pool in pools])
    place = {did: row for row, did in enumerate(candidates.keys)}
    prompts = layout.load_instructions(folder / "release")

    def trace(record: Any, which: str) -> str:
        return " ".join(record[part] for part in TRACE_PARTS[which]).strip()

    reason = config.data.candidate_trace
    traces = candidate_traces(folder, split) if reason != "none" else {}
    said = {did: trace(record, reason) for did, record in traces.items()}

    def draw(record: dict, rng: np.random.Generator) -> Example:
        seed = int(rng.integers(2**32))

        def document(did: str) -> Document:
            candidate = candidates[place[did]]
            image = candidate["image"]
            return Document(candidate["txt"], _picture(image, seed, config, did) if image else None)

        did = record["pos_dids"][rng.integers(len(record["pos_dids"]))]
        candidate = candidates[place[did]]
        hard = min(config.data.hard_negatives, len(record["neg_dids"]))
        negatives = rng.choice(record["neg_dids"], hard, replace=False) if hard else ()
        shown = [_picture(image, seed, config, record["qid"]) for image in record["images"]]
        choices = prompts[record["dataset_id"], record["modality"], candidate["modality"]]
        return Example(
            query=Query(record["query_txt"], placed(record["query_txt"], shown), choices[rng.integers(len(choices))]),
            document=document(did),
            target=trace(record, config.data.trace),
            task=record["task_id"],
            query_key=_query_key(record),
            document_key=layout.hash_did(did),
            positives=tuple(layout.hash_did(positive) for positive in record["pos_dids"]),
            negatives=tuple((document(str(negative)), layout.hash_did(negative)) for negative in negatives),
            document_targets=tuple(said.get(str(each), "") for each in (did, *negatives)) if said else (),
            name=record["qid"],
        )

    rows = collections.defaultdict(list)
    for row, task in enumerate(itertools.chain.from_iterable(source.tasks for source in queries)):
        rows[TASKS[task]].append(row)
    joined = _Joined(queries)
    return {name: _endless(_Rows(joined, at), seed, name, draw) for name, at in rows.items()}


def _query_key(record: Any) -> int:
    """Names what a query asks, by its task, its text and its pictures as they are stored: 31 bits, as `hash_did`'s."""
    parts = (str(record["task_id"]).encode(), record["query_txt"].encode(), *record["images"])
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest()[:4], "little") >> 1


def candidate_traces(folder: pathlib.Path, split: str) -> dict[str, layout.Trace]:
    """Did -> trace of the pictures that a split's text → image queries name: the first such text is the answer, the
    others are the reasoning. What no query names is not there, and learns to emit <|emb|> at once.
    """
    texts: dict[str, dict[str, None]] = {}
    for path, own in layout.query_files(folder / "release").values():
        for where, record in layout.lines(path) if own == split else ():
            query = layout.read_query(where, record, {}, lambda *_: b"")
            if TASKS.get(query["task_id"]) == "t2i":
                for did in query["pos_dids"]:
                    texts.setdefault(did, {})[instructions.format_string(query["query_txt"])] = None
    named = {did: list(said) for did, said in texts.items()}
    return {did: {"complex": True, "reasoning": " ".join(said[1:]), "answer": said[0]} for did, said in named.items()}


def _files(folder: pathlib.Path, split: str) -> tuple[list[str], list[str]]:
    """The query files of a split, and the pools that hold their candidates."""
    if split == "train":
        return [split], [layout.TRAIN_POOL]
    files = sorted(path.stem for path in (folder / "release" / "query" / split).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: the release has no queries of the split {split!r}; set validate_every to 0")
    return files, sorted({layout.local_pool(folder / "release", file).stem for file in files})


def generative_examples(config: Config, split: str, seed: int) -> dict[str, grain.MapDataset]:
    """The prompts and responses of each kind in the release's generative corpus, shuffled and repeated."""
    release = pathlib.Path(config.data.root) / config.data.release / "release"
    kinds = collections.defaultdict(list)
    with (release / "generative" / f"{split}.jsonl").open() as lines:
        for line in lines:
            record = json.loads(line)
            kinds[record["kind"]].append(record)
    images: dict[str, bytes] = {}

    def draw(record: dict, rng: np.random.Generator) -> Example:
        path, seed = record["img_path"], int(rng.integers(2**32))
        if path and path not in images:
            images[path] = (release / path).read_bytes()
        query = Query(record["prompt"], _picture(images[path], seed, config, path) if path else None)
        return Example(query, None, record["response"], task=-1, name=str(record["id"]))

    return {kind: _endless(records, seed, kind, draw) for kind, records in sorted(kinds.items())}


def _picture(image: bytes, seed: int, config: Config, name: str) -> bytes:
    """A training picture as the draw with this seed shows it: two pictures differently, one picture always alike."""
    if not config.data.jitter:
        return image
    rng = np.random.default_rng((seed, zlib.crc32(image)))
    return augmentation.jitter(image, rng, config.data.jitter, name)


class _Joined:
    """Random-access sources one after another."""

    def __init__(self, sources: SequenceOf[mbeir.Source]) -> None:
        self._sources, self._ends = sources, list(itertools.accumulate(len(source) for source in sources))

    @property
    def keys(self) -> Iterator[str]:
        """The id of every record."""
        return itertools.chain.from_iterable(source.keys for source in self._sources)

    def __getitem__(self, index: int) -> Any:
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which][index - (self._ends[which - 1] if which else 0)]


class _Rows:
    """Some rows of a random-access source."""

    def __init__(self, source: _Joined, rows: list[int]) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._rows[index]]


def _endless(source: Any, seed: int, name: str, draw: Callable) -> grain.MapDataset:
    """Shuffles a source anew every epoch, without end; each task has a seed of its own."""
    own_seed = (seed + zlib.crc32(name.encode())) % 2**31
    return grain.MapDataset.source(source).seed(own_seed).shuffle().repeat().random_map(draw)


def tokenize(example: Example, processor: Processor, config: Config) -> Tokenized:
    """Turns an example into sequences and targets; the closing token is <|emb|>, or <|im_end|> without a document.

    Raises ValueError for a sequence that is longer than a row, naming the example.
    """
    if example.document is None:
        system = instructions.assistant_prompt(processor.prompts)
        prompt = processor.chat(system, example.query.text, example.query.image, example.name)
        closing, documents = processor.end, []
    else:
        prompt = processor.query(example.query, example.name)
        wanted = [example.document, *(negative for negative, _ in example.negatives)]
        closing, documents = processor.emb, [processor.document(each, example.name) for each in wanted]

    def written(target: str) -> list[int]:
        trace = processor.encode(target)[: config.data.max_trace_tokens] if target else []
        return [*trace, *processor.encode(config.data.closing_tag)] if trace and config.data.closing_tag else trace

    trace, document_traces = written(example.target), [written(target) for target in example.document_targets]
    document_targets = []
    if document_traces:
        pairs = list(zip(documents, document_traces, strict=True))
        document_targets = [(len(document), [*each, closing]) for document, each in pairs]
        documents = [append(document, each) for document, each in pairs]
    query = append(prompt, trace)
    if example.document is not None:
        query, *documents = map(processor.finish, (query, *documents))
    longest = max(map(len, (query, *documents)))
    if longest > config.data.row_length:
        raise ValueError(
            f"{example.name}: {longest} tokens are over --data.row-length {config.data.row_length}; raise it, or lower "
            "--data.max-text-tokens, --data.max-trace-tokens or --data.max-pixels"
        )
    supervised = bool(trace) or config.loss.supervise_emb
    targets = [*trace, closing] if supervised else []
    return Tokenized(example, query, len(prompt), targets, documents, document_targets)


def pack_batch(
    examples: SequenceOf[Tokenized], shards: int, capacity: Capacity, processor: Processor, config: Config
) -> Batch:
    """Deals examples to shards and packs each shard. A pair that finds no room is left out (index -1)."""
    parts = [_pack_shard(hand, capacity, processor, config) for hand in deal(examples, shards)]
    fields = {name: np.stack([part[name] for part in parts]) for name in parts[0] if name != "inputs"}
    return Batch(inputs=stack_shards([part["inputs"] for part in parts]), **fields)


def deal(examples: SequenceOf[Tokenized], shards: int) -> list[list[Tokenized]]:
    """Deals a batch so that the shards have alike numbers of pairs, of patches and of tokens.

    In rounds, those with the most patches first; within a round the longest goes to the hand with the fewest tokens.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].patches, -examples[i].tokens, i))
    hands: list[list[Tokenized]] = [[] for _ in range(shards)]
    held = [0] * shards
    for start in range(0, len(order), shards):
        longest = sorted(order[start : start + shards], key=lambda i: (-examples[i].tokens, i))
        for hand, i in zip(sorted(range(shards), key=lambda hand: (held[hand], hand)), longest, strict=False):
            hands[hand].append(examples[i])
            held[hand] += examples[i].tokens
    return hands


def _pack_shard(examples: list[Tokenized], capacity: Capacity, processor: Processor, config: Config) -> dict:
    data = config.data
    packed = pack(
        [sequence for example in examples for sequence in example.sequences],
        processor.geometry,
        rows=capacity.rows,
        row_length=data.row_length,
        patch_rows=capacity.patch_rows,
        patch_row_length=data.patch_row_length,
        pad_token=processor.pad,
    )
    pairs, targets = capacity.pairs, capacity.targets
    out = {
        "inputs": packed.inputs,
        "query_index": np.full(pairs, -1, np.int32),
        "query_key": np.full(pairs, -1, np.int32),
        "document_index": np.full(pairs, -1, np.int32),
        "document_key": np.full(pairs, -1, np.int32),
        "negative_index": np.full((pairs, data.hard_negatives), -1, np.int32),
        "negative_key": np.full((pairs, data.hard_negatives), -1, np.int32),
        "positives": np.full((pairs, data.max_positives), -1, np.int32),
        "task": np.full(pairs, -1, np.int32),
        "reasoned": np.zeros(pairs, bool),
        "first_index": np.full(pairs, -1, np.int32),
        "target_index": np.zeros(targets, np.int32),
        "target_token": np.zeros(targets, np.int32),
        "target_weight": np.zeros(targets, np.float32),
    }
    starts, used = iter(packed.starts), 0
    for i, item in enumerate(examples):
        places = [int(next(starts)) for _ in item.sequences]
        if min(places) < 0 or used + sum(len(written) for _, _, written in item.supervised) > targets:
            continue
        out["first_index"][i] = places[0] + item.prompt - 1
        out["query_index"][i] = places[0] + len(item.query) - 1
        out["task"][i] = item.example.task
        out["reasoned"][i] = len(item.targets) > 1
        if item.documents:
            ends = [place + len(sequence) - 1 for place, sequence in zip(places, item.sequences, strict=True)]
            out["query_key"][i] = item.example.query_key
            out["document_index"][i] = ends[1]
            out["negative_index"][i, : len(ends) - 2] = ends[2:]
            out["negative_key"][i, : len(ends) - 2] = [key for _, key in item.example.negatives]
            out["document_key"][i] = item.example.document_key
            known = item.example.positives[: data.max_positives]
            out["positives"][i, : len(known)] = known
        for number, prompt, written in item.supervised:
            at = slice(used, used + len(written))
            out["target_index"][at] = places[number] + prompt - 1 + np.arange(len(written))
            out["target_token"][at] = written
            out["target_weight"][at] = 1
            used += len(written)
    return out


def measure_capacity(batches: Iterable[SequenceOf[Tokenized]], shards: int, config: Config) -> Capacity:
    """Chooses static shapes from some batches, or hosts' parts of them, each dealt to so many shards.

    A pure function of the data and the seed, the same on all hosts.
    """
    data = config.data
    pairs = rows = patch_rows = targets = 1
    for batch in batches:
        for hand in deal(batch, shards):
            sequences = [sequence for item in hand for sequence in item.sequences]
            images = [len(image.values) for image in unique_images(sequences)]
            pairs = max(pairs, len(hand))
            rows = max(rows, 1 + max(first_fit([len(sequence) for sequence in sequences], data.row_length)))
            patch_rows = max(patch_rows, 1 + max(first_fit(images, data.patch_row_length), default=0))
            targets = max(targets, sum(len(written) for item in hand for _, _, written in item.supervised))
    chunk = config.loss.vocabulary_chunk
    return Capacity(
        pairs=pairs,
        rows=data.rows or round(rows * SLACK),  # of few rows, one more would be much
        patch_rows=data.patch_rows or round(patch_rows * SLACK),
        targets=math.ceil(targets * SLACK**2 / chunk) * chunk,
    )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of this host, by step (the first is 0)."""

    examples: grain.MapDataset  # what each batch is made of: a list of Tokenized
    batches: grain.MapDataset
    capacity: Capacity
    shards: int  # of this host

    def batch_of(self, step: int) -> list[Tokenized]:
        """The examples of a batch, before they are dealt and packed."""
        return cast(list[Tokenized], self.examples[step])

    def names(self, step: int) -> np.ndarray:
        """The records of a batch, where they stand in it: [shards, B] str, "" where there is none."""
        hands = [[item.example.name for item in hand] for hand in deal(self.batch_of(step), self.shards)]
        return np.array([hand + [""] * (self.capacity.pairs - len(hand)) for hand in hands])

    def from_step(self, step: int, prefetch: int) -> Iterator[Batch]:
        """Yields the host's part of batches step, step + 1, ... made ahead in threads."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return iter(self.batches[step:].to_iter_dataset(options))


def training_batches(
    config: Config, processor: Processor, *, shards: int, host: int = 0, hosts: int = 1, split: str = "train"
) -> Pipeline:
    """The training batches of one host of `hosts`, whose devices form shards/hosts of the `shards` shards.

    `split` "val" makes the same of the release's validation queries. Raises ValueError when the batch cannot be dealt
    evenly.
    """
    data = config.data
    if data.batch_size % shards or shards % hosts:
        raise ValueError(f"a batch of {data.batch_size} cannot be dealt to {shards} shards on {hosts} hosts")
    if data.batch_size // hosts % data.same_task:
        raise ValueError(
            f"data.same_task {data.same_task} does not divide the {data.batch_size // hosts} pairs that a host reads"
        )
    sources = {"retrieval": retrieval_examples, "generative": generative_examples}
    examples = sources[data.source](config, split, config.training.seed)
    unknown = set(data.weights) - set(examples)
    if unknown and split == "train":  # the validation queries may be of fewer tasks
        raise ValueError(f"data.weights: no {sorted(unknown)} in {data.release}; there are {sorted(examples)}")
    weights = {name: data.weights.get(name, 1.0) for name in examples}
    chosen = [name for name in examples if weights[name] > 0]
    blocks = [
        examples[name]
        .map(lambda example: tokenize(example, processor, config))
        .batch(data.same_task, drop_remainder=True, batch_fn=list)
        for name in chosen
    ]
    mixed = grain.MapDataset.mix(blocks, weights=[weights[name] for name in chosen])

    each = mixed.batch(  # a host's part
        data.batch_size // hosts // data.same_task,
        drop_remainder=True,
        batch_fn=lambda parts: list(itertools.chain.from_iterable(parts)),
    )
    own = shards // hosts
    # All hosts' parts are measured as they are dealt, so that pairs find room whatever the number of hosts.
    measured = (cast(list[Tokenized], each[i]) for i in range(MEASURED_BATCHES * hosts))
    capacity = measure_capacity(measured, own, config)
    parts = each[host::hosts]
    return Pipeline(parts, parts.map(lambda items: pack_batch(items, own, capacity, processor, config)), capacity, own)
