"""What a release asks to be measured: its query files, their pools and right answers (M-BEIR's evaluation
protocol).

A candidate belongs to several pools but has one did; all of them are numbered once, in the order of their
dids, and a pool is a list of such rows. "global_test" is the union of the pools that the test queries
search, "global_val" likewise.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from trace_jax.config import Config
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.schema import TASKS, Document, Query, placed

SPLITS = ("val", "test")
POOLS = ("local", "global")
PROMPTS = 4  # M-BEIR's, for each data set and task


@dataclasses.dataclass(frozen=True)
class QuerySet:
    """One query file."""

    stem: str  # mbeir_<dataset>_task<t>_<split>
    dataset: str
    task_id: int
    split: str
    pool: str  # the stem of its local pool
    trained: bool  # its data set has training queries; otherwise it is an unseen set

    @property
    def task(self) -> str:
        """The task's short name: t2i, ..."""
        return TASKS[self.task_id]

    @property
    def global_pool(self) -> str:
        """The union pool of its split."""
        return f"global_{self.split}"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The queries of a file with what is known of them; n queries, in the file's order."""

    qids: list[str]
    queries: list[Query]
    positives: list[frozenset[int]]  # dids as integers; empty where nothing is right
    galleries: list[frozenset[int]]  # what a query is measured among, of a benchmark that says so; else none
    excluded: list[frozenset[int]]  # what is left out of a query's results
    complex: np.ndarray  # [n] bool: a trace belongs to it
    simple: np.ndarray  # [n] bool: none does; of queries that the release's cot/ does not name neither is known
    reasonings: list[str]
    answers: list[str]
    kinds: list[str]  # what sort of query its data set says it is; "" where it does not

    @property
    def traces(self) -> list[str]:
        """The true traces, as training writes them; "" for simple queries."""
        pairs = zip(self.reasonings, self.answers, strict=True)
        return [f"{reasoning} {answer}".strip() for reasoning, answer in pairs]


class Benchmark:
    """The evaluation side of `<root>/<release>`. Raises FileNotFoundError when its records are not built."""

    def __init__(self, config: Config) -> None:
        self.name, self._most = config.benchmark, config.evaluation.queries
        self.folder = pathlib.Path(config.data.root) / self.name
        release = self.folder / "release"
        if not release.is_dir():
            raise FileNotFoundError(
                f"no release in {self.folder}: run `python launch/build_data.py {self.name}` first"
                " (or launch/prepare_data.py for a release that is not the emoji's)"
            )
        self._trained = {
            path.stem.removeprefix("mbeir_").removesuffix("_train")
            for path in (release / "query" / "train").glob("*.jsonl")
        }
        # Where all training queries are in the union alone, no file says of which data sets they are: of all.
        self._trains_all = not self._trained and "train" in layout.query_files(release)
        self.query_sets = tuple(
            query_set
            for split in SPLITS
            for path in sorted((release / "query" / split).glob("*.jsonl"))
            if (query_set := self._query_set(path.stem)) is not None
        )

    def _query_set(self, stem: str) -> QuerySet | None:
        match = layout.QUERY_FILE.fullmatch(stem)
        if match is None:
            return None
        dataset, task, split = match["dataset"], int(match["task"]), match["split"]
        pool = layout.local_pool(self.folder / "release", stem)
        if not pool.exists():
            raise FileNotFoundError(f"{self.folder}: no pool {pool.stem} for the queries {stem}")
        trained = self._trains_all or dataset in self._trained
        return QuerySet(stem, dataset, task, split, pool.stem, trained)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of what the records, of queries and candidates, were built from."""
        return json.loads((self.folder / "records" / "stamp.json").read_text("utf-8"))["fingerprint"]

    @functools.cached_property
    def qrels_digest(self) -> str:
        """A digest of all right answers: they are read as they are, and are no part of the records."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / "release/qrels").glob("*/*.txt")):
            digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
        return digest.hexdigest()

    # ---- candidates --------------------------------------------------------------------------------------

    @functools.cached_property
    def _pool_ids(self) -> dict[str, np.ndarray]:
        return {pool: self.local_ids(pool) for pool in self.searched_pools}

    @property
    def searched_pools(self) -> tuple[str, ...]:
        """The local pools that some query file searches."""
        return tuple(sorted({query_set.pool for query_set in self.query_sets}))

    @property
    def all_pools(self) -> tuple[str, ...]:
        """Every pool that is searched: the local ones, then the global one of each split that has queries."""
        return self.searched_pools + tuple(sorted({query_set.global_pool for query_set in self.query_sets}))

    def source(self, pool: str) -> mbeir.Source[layout.CandidateRecord]:
        """The records of a local pool, in the file's order."""
        return mbeir.load_candidates(self.folder, pool)

    def local_ids(self, pool: str) -> np.ndarray:
        """The dids of a local pool as integers, in the file's order: [n] int64."""
        return np.fromiter((layout.hash_did(did) for did in self.source(pool).keys), np.int64)

    def ids(self, pool: str) -> np.ndarray:
        """The dids of a local or global pool as integers, ascending, each once: [n] int64.

        Raises ValueError for an unknown pool, with a "did you mean".
        """
        if pool in self._pool_ids:
            return np.unique(self._pool_ids[pool])
        if pool in self.all_pools:
            members = {q.pool for q in self.query_sets if q.global_pool == pool}
            return np.unique(np.concatenate([self._pool_ids[member] for member in sorted(members)]))
        near = difflib.get_close_matches(pool, self.all_pools, n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" There are: {', '.join(self.all_pools)}"
        raise ValueError(f"unknown pool {pool!r}.{hint}")

    @functools.cached_property
    def candidates(self) -> "Candidates":
        """All candidates of all searched pools, each once."""
        return Candidates(self, self.searched_pools)

    # ---- queries -----------------------------------------------------------------------------------------

    @functools.cached_property
    def instructions(self) -> dict[tuple[int, str, str], list[str]]:
        """The prompts of each data set and task, as `layout.load_instructions` has them."""
        return layout.load_instructions(self.folder / "release")

    def instruction(self, task_id: int, dataset_id: int | None = None, prompt: int = 0) -> str:
        """A prompt of a task, the first unless told: evaluation is deterministic, where M-BEIR draws one of four.

        `dataset_id` defaults to the first data set that has the task. Raises ValueError when none does, or where it has
        fewer prompts.
        """
        source, target = (layout.SIDES[side] for side in TASKS[task_id].split("2"))
        for (dataset, query, candidate), prompts in self.instructions.items():
            if (query, candidate) == (source, target) and dataset_id in (None, dataset) and prompt < len(prompts):
                return prompts[prompt]
        raise ValueError(
            f"{self.folder}: no instruction {prompt + 1} for {TASKS[task_id]} of data set {dataset_id}; add it to"
            " release/instructions/query_instructions.tsv"
        )

    @functools.cached_property
    def _traced(self) -> dict[str, frozenset[str]]:
        """Of each split the qids that cot/ calls simple or complex."""
        return {split: frozenset(layout.load_traces(self.folder / "release", split)) for split in SPLITS}

    def count(self, query_set: QuerySet) -> int:
        """The number of queries of a file that are asked, without reading them."""
        return len(self._rows(len(mbeir.load_queries(self.folder, query_set.stem))))

    def _rows(self, total: int) -> Sequence[int]:
        """Which queries of a file are asked: all, or `evaluation.queries` spread over it."""
        asked = min(self._most or total, total)
        return [i * total // asked for i in range(asked)]

    def choose(self, tasks: Sequence[str] = ("all",), splits: Sequence[str] = SPLITS) -> tuple[QuerySet, ...]:
        """The query files of some splits and tasks; a task is "it2i", "cirr" or "cirr_task7", or "all".

        Raises ValueError for one that fits no file, with a "did you mean".
        """
        found = {
            query_set: {"all", query_set.task, query_set.dataset, f"{query_set.dataset}_task{query_set.task_id}"}
            for query_set in self.query_sets
            if query_set.split in splits
        }
        if not found:
            raise ValueError(f"{self.name} has no query files of {' or '.join(splits)}")
        known = set().union(*found.values())
        for task in tasks:
            if task not in known:
                near = difflib.get_close_matches(task, known, n=3, cutoff=0.3) or sorted(known)
                raise ValueError(f"no query file of {self.name} for the task {task!r}: did you mean {', '.join(near)}?")
        return tuple(query_set for query_set, names in found.items() if names & set(tasks))

    def load(self, query_set: QuerySet, prompt: int = 0) -> Labelled:
        """Reads a query file, asked with one of its prompts. The positives are those of its qrels; the images stay
        encoded.
        """
        source = mbeir.load_queries(self.folder, query_set.stem)
        records = [source[row] for row in self._rows(len(source))]
        path = self.folder / "release" / "qrels" / query_set.split / f"{query_set.stem}_qrels.txt"
        judged = layout.load_judged(path) if path.exists() else {}  # a server may keep the answers to itself

        def of(wanted: Callable[[int], bool]) -> list[frozenset[int]]:
            dids = [judged.get(record["qid"], {}) for record in records]
            return [frozenset(layout.hash_did(did) for did in each if wanted(each[did])) for each in dids]

        limited = any(0 in dids.values() for dids in judged.values())  # only then are wrong answers listed
        return Labelled(
            qids=[record["qid"] for record in records],
            queries=[self._query(query_set, record, prompt) for record in records],
            positives=of(lambda relevance: relevance > 0),
            galleries=of(lambda relevance: relevance >= 0) if limited else [],
            excluded=of(lambda relevance: relevance < 0),
            complex=np.array([record["complex"] for record in records], bool),
            simple=np.array([not r["complex"] and r["qid"] in self._traced[query_set.split] for r in records], bool),
            reasonings=[record["reasoning"] for record in records],
            answers=[record["answer"] for record in records],
            kinds=[_kind(record["src_content"]) for record in records],
        )

    def sample(self, query_set: QuerySet, count: int) -> list[Query]:
        """At most so many queries of a file, spread over those that are asked; no other is read."""
        source = mbeir.load_queries(self.folder, query_set.stem)
        asked = self._rows(len(source))
        return [self._query(query_set, source[row]) for row in asked[:: math.ceil(len(asked) / count)]]

    def _query(self, query_set: QuerySet, record: layout.QueryRecord, prompt: int = 0) -> Query:
        images = placed(record["query_txt"], record["images"])
        return Query(record["query_txt"], images, self.instruction(query_set.task_id, record["dataset_id"], prompt))


def _kind(src_content: str) -> str:
    """The "kind" of a source content that is a JSON object; "" for any other."""
    try:
        content = json.loads(src_content)
    except json.JSONDecodeError:
        return ""
    return str(content.get("kind", "")) if isinstance(content, dict) else ""


class Candidates:
    """The candidates of some pools by row, ascending by did; a did of several pools is one row."""

    def __init__(self, benchmark: Benchmark, pools: tuple[str, ...]) -> None:
        ids = [benchmark.local_ids(pool) for pool in pools]
        starts = np.cumsum([0, *map(len, ids)])
        self.ids, first = np.unique(np.concatenate(ids), return_index=True)  # [n] int64, and where each first occurs
        self._source = np.searchsorted(starts, first, side="right") - 1
        self._row = first - starts[self._source]
        self._sources = [benchmark.source(pool) for pool in pools]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows of dids given as integers, all of which must be there: [n] int64."""
        return np.searchsorted(self.ids, ids)

    def document(self, row: int) -> Document:
        """One candidate."""
        record = self._sources[self._source[row]][int(self._row[row])]
        return Document(record["txt"], record["image"] or None)
