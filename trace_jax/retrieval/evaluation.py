"""Recall and what explains it: routing, traces, the ceiling with true traces, speed (paper Sec. 4.2, 4.5,
Table 2).

What counts is measured with the first of a task's prompts, so that figures repeat; M-BEIR draws one of four at random.
What costs time, the encoding of a query file in one mode, is kept under `<run_dir>/queries/`; all else is made anew
from it.
"""

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from tqdm import tqdm

from trace_jax.config import Config, to_json
from trace_jax.data.builders import unseen
from trace_jax.data.builders.layout import did_of
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import POOLS, PROMPTS, SPLITS, Benchmark, Labelled, QuerySet
from trace_jax.retrieval.embedder import Encoded, Retriever
from trace_jax.retrieval.generation import Mode
from trace_jax.retrieval.index import ExactIndex, SearchIndex, exact_search, open_index, recall_against
from trace_jax.retrieval.measures import average_precision_at, hits_at, percent, rankings, recalls
from trace_jax.retrieval.packing import Room
from trace_jax.retrieval.pools import CandidateVectors
from trace_jax.retrieval.summary import lay_over, summarise

log = logging.getLogger(__name__)

# "given" hands every query its true trace: the ceiling. "external" puts the trace that another run wrote into its text
# and embeds it directly: the pipeline of two models (paper Sec. 4.6).
EvaluationMode = Mode | Literal["given", "external"]
CIRCO_KS = (5, 10, 25, 50)  # of mAP, which its authors measure by
DEEPER = {"fashion200k": (20, 50), "fashioniq": (20, 50), "mtfiq": (8,), unseen.CIRCO: (25, 50)}  # k of recall, beside
BY_KIND = 5  # the k of the recall that is broken down by the kind of query
SAMPLE = 1024  # queries of all files looked at to choose the static shapes
CHECKED_QUERIES = 256  # of each query file, to measure an index against exact search


# ---- traces ----------------------------------------------------------------------------------------------


def is_right(trace: str, answer: str) -> bool:
    """Whether a trace ends with the answer as a clause; case, spaces and the final stop do not count."""
    written, wanted = _plain(trace), _plain(answer)
    return bool(wanted) and re.search(rf"(^|[.?!:;] ){re.escape(wanted)}$", written) is not None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


# ---- encoding, kept on disk ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scope:
    """Which part of a benchmark is measured: query files as in `Benchmark.choose`, and the pools they search."""

    tasks: Sequence[str] = ("all",)
    splits: Sequence[str] = SPLITS
    pools: Sequence[str] = POOLS
    prompts: Literal["first", "all"] = "first"  # "all" also asks with each of the four, for their spread


def _asked(prompt: int) -> str:
    """What the files of a prompt other than the first are called by."""
    return f"_prompt{prompt + 1}" if prompt else ""


def results_path(config: Config, query_set: QuerySet, mode: EvaluationMode, prompt: int = 0) -> epath.Path:
    """Where the encoded queries of a file, mode and prompt lie."""
    folder = epath.Path(config.run_dir) / "queries" / config.benchmark / mode
    return folder / f"{query_set.stem}{_asked(prompt)}.npz"


def load_results(
    config: Config, query_set: QuerySet, mode: EvaluationMode, key: str, prompt: int = 0
) -> Encoded | None:
    """The encoded queries of a file; None when they are not there, or of another key, or damaged."""
    try:
        arrays: dict[str, Any] = artifacts.read_arrays(results_path(config, query_set, mode, prompt))
        if str(arrays.pop("key")) != key:
            return None
        lists = {name: arrays.pop(name).tolist() for name in ("traces", "errors", "seconds")}
        return Encoded(**lists, **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode(
    config: Config,
    retriever: Retriever,
    query_set: QuerySet,
    mode: EvaluationMode,
    labelled: Labelled,
    *,
    key: str,
    prompt: int = 0,
    rooms: dict[bool, Room] | None = None,
) -> Encoded:
    """Encodes a query file, loaded with a prompt, in one mode and keeps the result under `key` (`results_key`)."""
    if mode == "given":
        traces = [trace + config.data.closing_tag if trace else "" for trace in labelled.traces]
        results = retriever.encode_query_with_trace(labelled.queries, traces, rooms=rooms)
    elif mode == "external":
        traces = _read_reasoner(config, query_set, prompt)["traces"].tolist()
        asked = [
            dataclasses.replace(query, text=f"{query.text} {trace}".strip())
            for query, trace in zip(labelled.queries, traces, strict=True)
        ]
        results = retriever.encode_query(asked, "direct", names=labelled.qids, rooms=rooms)
        results = dataclasses.replace(results, traces=traces, reasoned=np.array(list(map(bool, traces)), bool))
    else:
        results = retriever.encode_query(labelled.queries, mode, names=labelled.qids, rooms=rooms)
    artifacts.write_arrays(
        results_path(config, query_set, mode, prompt),
        key=np.array(key),
        **{field.name: np.asarray(getattr(results, field.name)) for field in dataclasses.fields(results)},
    )
    return results


def queries_key(config: Config, retriever: Retriever, benchmark: Benchmark) -> str:
    """What encoded queries depend on: the retriever, the queries, how long a trace may be, and how it is drawn."""
    options = config.evaluation
    drawn = [options.temperature, options.samples, config.training.seed] if options.temperature else []
    some = [options.queries] if options.queries else []
    return artifacts.key_of(
        retriever.key,
        benchmark.fingerprint,
        sorted(benchmark.instructions.items()),
        options.max_trace_tokens,
        config.data.max_trace_tokens,
        options.cache_dtype,
        *drawn,
        *some,
    )


def results_key(
    config: Config,
    retriever: Retriever,
    benchmark: Benchmark,
    query_set: QuerySet,
    mode: EvaluationMode,
    *,
    prompt: int = 0,
) -> str:
    """What the encoded queries of a file depend on: as `queries_key`, and on another run's traces."""
    key = queries_key(config, retriever, benchmark)
    return artifacts.key_of(key, str(_read_reasoner(config, query_set, prompt)["key"])) if mode == "external" else key


def _read_reasoner(config: Config, query_set: QuerySet, prompt: int) -> dict[str, np.ndarray]:
    """The queries of a file as the run `evaluation.reasoner` encoded them. Raises MissingStageError."""
    reasoner = dataclasses.replace(config, workdir=config.evaluation.reasoner)
    path = results_path(reasoner, query_set, config.evaluation.mode, prompt)
    if not config.evaluation.reasoner or not path.exists():
        raise artifacts.MissingStageError(
            f"no traces in {path}: mode external takes those of --evaluation.reasoner; run launch/evaluate.py on it"
        )
    return artifacts.read_arrays(path)


# ---- one query file --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Searcher:
    """Searches the pools of a release, keeps the run files, and checks each index against exact search."""

    config: Config
    benchmark: Benchmark
    store: CandidateVectors
    indexes: dict[str, SearchIndex | ExactIndex] = dataclasses.field(default_factory=dict)
    checked: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def index(self, pool: str) -> SearchIndex | ExactIndex:
        """The index of a pool, loaded once."""
        if pool not in self.indexes:
            self.indexes[pool] = open_index(self.config, self.benchmark, pool, self.store.index_key)
        return self.indexes[pool]

    def search(
        self,
        query_set: QuerySet,
        mode: EvaluationMode,
        scope: str,
        labelled: Labelled,
        results: Encoded,
        *,
        prompt: int = 0,
    ) -> np.ndarray:
        """The dids found in the local or global pool, as integers, best first: [n, k] int64. Writes the run file."""
        k = depth(self.config, query_set)
        if scope == "local" and labelled.galleries:
            found, scores = self._search_galleries(labelled, results.embeddings, k)
        else:
            index = self.index(pool_of(query_set, scope))
            rows, scores = index.search(results.embeddings, k + max(map(len, labelled.excluded), default=0))
            found, scores = leave_out(np.where(rows >= 0, index.ids[rows], -1), scores, labelled.excluded, k)
        lines = []
        for qid, ids, values in zip(labelled.qids, found.tolist(), scores.tolist(), strict=True):
            ranked = enumerate(zip(ids, values, strict=True), start=1)
            lines += [
                f"{qid} Q0 {did_of(did)} {rank} {value:.6f} {mode}\n" for rank, (did, value) in ranked if did >= 0
            ]
        artifacts.write_bytes(run_file(self.config, query_set, mode, scope, prompt), "".join(lines).encode())
        return found

    def _search_galleries(self, labelled: Labelled, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the few candidates of each query, as an index does: dids [n, k] int64 (-1 beyond them), scores.

        Of equal scores wrong answers come first: a right one must be above them, as CC-Neg and SugarCrepe ask, and
        embeddings that are all alike find nothing.
        """
        ids = np.unique(np.concatenate([np.fromiter(each, np.int64) for each in labelled.galleries]))
        vectors = self.store.of(ids)[:]
        found = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for query, (gallery, right) in enumerate(zip(labelled.galleries, labelled.positives, strict=True)):
            own = np.sort(np.fromiter(gallery, np.int64))
            # A row at a time: in a product of matrices, equal rows may differ in their last bits.
            values = (vectors[np.searchsorted(ids, own)] * queries[query]).sum(axis=1)
            order = np.lexsort((own, np.isin(own, list(right)), -values))[:k]
            found[query, : len(order)], scores[query, : len(order)] = own[order], values[order]
        return found, scores

    def check(self, pool: str, queries: np.ndarray) -> None:
        """Compares an index with exact search on some queries [q, D]."""
        index, k = self.index(pool), max(self.config.evaluation.ks)
        exact, _ = exact_search(queries, self.store.of(index.ids), k)
        share = recall_against(index.search(queries, k)[0], exact)
        self.checked.setdefault(pool, []).append(share)


def leave_out(
    found: np.ndarray, scores: np.ndarray, excluded: Sequence[frozenset[int]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k results of each query, dids and scores [n, <= k], without those that are left out; -1 where too few
    others were found.
    """
    rows = [list(map(excluded[i].__contains__, row)) for i, row in enumerate(found.tolist())]
    out = np.array(rows, bool).reshape(found.shape)
    found, scores = np.where(out, -1, found), np.where(out, -np.inf, scores)
    kept = np.argsort(out, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, kept, axis=1), np.take_along_axis(scores, kept, axis=1)


def submit(searcher: Searcher, query_set: QuerySet, labelled: Labelled, results: Encoded) -> str:
    """Searches for queries whose right answers a server keeps, and writes what it is sent (CIRCO's is known); returns
    the path.
    """
    config, mode = searcher.config, searcher.config.evaluation.mode
    found = searcher.search(query_set, mode, "local", labelled, results)
    path = run_file(config, query_set, mode, "local")
    if query_set.dataset == unseen.CIRCO:
        rows = zip(labelled.qids, found.tolist(), strict=True)
        ranked = {qid: [did_of(did) for did in row if did >= 0] for qid, row in rows}
        sent = unseen.circo_submission(searcher.benchmark.folder / "release", ranked)
        path = path.with_name(f"{query_set.stem}_submission.json")
        artifacts.write_bytes(path, json.dumps(sent).encode())
    log.info("%s: its server has the right answers; send it %s", query_set.stem, path)
    return str(path)


def pool_of(query_set: QuerySet, scope: str) -> str:
    """The pool that a query file searches, "local" or "global"."""
    return query_set.pool if scope == "local" else query_set.global_pool


def ks_of(config: Config, query_set: QuerySet) -> tuple[int, ...]:
    """The k of recall@k: those of the configuration, and those that a data set's authors add."""
    return config.evaluation.ks + DEEPER.get(query_set.dataset, ())


def depth(config: Config, query_set: QuerySet) -> int:
    """How many results of a query are kept."""
    return max(config.evaluation.neighbours, *ks_of(config, query_set))


def run_file(config: Config, query_set: QuerySet, mode: EvaluationMode, scope: str, prompt: int = 0) -> epath.Path:
    """The results of a query file in TREC's six columns, under UniIR's name: "single" is the local pool."""
    kind = {"local": "single", "global": "union"}[scope]
    name = f"mbeir_{query_set.dataset}_task{query_set.task_id}_{kind}_pool_{query_set.split}{_asked(prompt)}"
    folder = epath.Path(config.run_dir) / "run_files" / config.benchmark / mode
    return folder / f"{name}_k{depth(config, query_set)}_run.txt"


def measure(
    searcher: Searcher,
    query_set: QuerySet,
    labelled: Labelled,
    results: dict[EvaluationMode, Encoded],
    pools: Sequence[str],
) -> dict[str, Any]:
    """All figures of a query file; of the modes in `results`, the first is the one that counts. Those of routing and of
    traces are None where the release does not say which queries are complex.
    """
    config, main = searcher.config, next(iter(results))
    ks, complex_, simple, kinds = ks_of(config, query_set), labelled.complex, labelled.simple, np.array(labelled.kinds)
    known = bool((complex_ | simple).any())
    only_complex = [right for right, is_complex in zip(labelled.positives, complex_, strict=True) if is_complex]
    by_mode: dict[str, Any] = {}
    by_kind: dict[str, Any] = {}
    for mode, result in results.items():
        row: dict[str, Any] = {"ranking": {}, **{scope: {} for scope in POOLS}}
        by_mode[mode] = row
        for scope in pools:
            found = searcher.search(query_set, mode, scope, labelled, result)
            row[scope] = recalls(found, labelled.positives, ks)
            row["ranking"][scope] = rankings(found, labelled.positives)
            if query_set.dataset == unseen.CIRCO:
                precisions = {k: average_precision_at(found, labelled.positives, k) for k in CIRCO_KS}
                row["ranking"][scope] |= {f"mAP@{k}": percent(values) for k, values in precisions.items()}
            if scope == "local" and mode == main:
                hits = hits_at(found, labelled.positives, BY_KIND)
                by_kind = {
                    kind: {"queries": int((kinds == kind).sum()), f"R@{BY_KIND}": percent(hits[kinds == kind])}
                    for kind in sorted(set(labelled.kinds) - {""})
                }
            if scope == "local" and complex_.any():
                row["local_complex"] = recalls(found[complex_], only_complex, ks)
        row["reasoned_fraction"] = round(float(result.reasoned.mean()), 4)
        lengths = result.trace_tokens[result.reasoned]
        row["trace_tokens"] = round(float(lengths.mean()), 2) if len(lengths) else 0.0
        row["capped_fraction"] = round(float(result.capped.mean()), 4)
        row["queries_per_second"] = round(len(labelled.qids) / result.seconds, 2) if result.seconds else None
    chosen = results[main]
    ceiling = by_mode.pop("given", None)
    wrote = chosen.reasoned & complex_
    right = np.array(
        [
            is_right(trace.removesuffix(config.data.closing_tag), answer)
            for trace, answer in zip(chosen.traces, labelled.answers, strict=True)
        ],
        bool,
    )
    return {
        "dataset": query_set.dataset,
        "queries": len(labelled.qids),
        "complex_queries": int(complex_.sum()) if known else None,
        "simple_queries": int(simple.sum()) if known else None,
        **{f"{scope}_pool": len(searcher.benchmark.ids(pool_of(query_set, scope))) for scope in POOLS},
        **by_mode[main],
        "routing": {
            "simple_direct": percent(~chosen.reasoned[simple]) if simple.any() else None,
            "complex_reasoned": percent(chosen.reasoned[complex_]) if complex_.any() else None,
        },
        "traces": {
            "written": int(wrote.sum()) if known else None,
            "right": percent(right[wrote]) if wrote.any() else None,
            "right_of_complex": percent((right & wrote)[complex_]) if complex_.any() else None,
        },
        "kinds": by_kind,
        "ceiling": ceiling,
        "modes": by_mode,
    }


def spread(
    searcher: Searcher, query_set: QuerySet, each: Sequence[tuple[Labelled, Encoded]], pools: Sequence[str]
) -> dict[str, Any]:
    """Recall by the prompt that a file is asked with: the mean, the standard deviation and each of n prompts."""
    figures: dict[str, Any] = {}
    for scope in pools:
        rows = []
        for prompt, (labelled, results) in enumerate(each):
            mode = searcher.config.evaluation.mode
            found = searcher.search(query_set, mode, scope, labelled, results, prompt=prompt)
            rows.append(recalls(found, labelled.positives, ks_of(searcher.config, query_set)))
        figures[scope] = {
            k: {"mean": round(float(np.mean(values)), 2), "deviation": round(float(np.std(values, ddof=1)), 2)}
            | {f"prompt {i}": value for i, value in enumerate(values, start=1)}
            for k in rows[0]
            if (values := [row[k] for row in rows])
        }
    return figures


# ---- the whole release -----------------------------------------------------------------------------------


def evaluate(
    config: Config,
    retriever: Retriever,
    benchmark: Benchmark,
    modes: Sequence[EvaluationMode] = (),
    scope: Scope | None = None,
) -> tuple[dict[str, Any], int]:
    """Measures a retriever on the query files of a release; writes `metrics_path` and the run files.

    `modes` are run besides `config.evaluation.mode`, whose figures are the ones that count. What `metrics_path` holds
    of the same checkpoint, configuration and data, and is not in this scope, stays. Returns the metrics and the number
    of queries that had to be encoded. Raises MissingStageError when indexes are missing or of another checkpoint,
    ValueError for a scope that no query file is in.
    """
    scope = scope or Scope()
    run: list[EvaluationMode] = list(dict.fromkeys([config.evaluation.mode, *modes]))
    searcher = Searcher(config, benchmark, CandidateVectors(config, benchmark, retriever.whole_key))
    chosen = benchmark.choose(scope.tasks, scope.splits)
    for pool in sorted({pool_of(query_set, each) for query_set in chosen for each in scope.pools}):
        searcher.index(pool)
    entries: dict[QuerySet, dict[str, Any]] = {}
    submissions: dict[str, str] = {}
    passes = len(run) + (PROMPTS - 1 if scope.prompts == "all" else 0)
    encoded, total = 0, passes * sum(benchmark.count(query_set) for query_set in chosen)
    with tqdm(desc="evaluating", unit="query", dynamic_ncols=True, total=total) as bar:

        @functools.cache
        def rooms() -> dict[bool, Room]:
            """The same shapes for all files: each that is compiled costs more than reading many queries."""
            of_each = math.ceil(SAMPLE / len(chosen))
            return retriever.rooms_for([query for each in chosen for query in benchmark.sample(each, of_each)])

        def results_of(query_set: QuerySet, mode: EvaluationMode, labelled: Labelled, prompt: int = 0) -> Encoded:
            nonlocal encoded
            bar.set_postfix_str(f"{query_set.stem} {mode}{_asked(prompt)}", refresh=False)
            key = results_key(config, retriever, benchmark, query_set, mode, prompt=prompt)
            kept = load_results(config, query_set, mode, key, prompt)
            encoded += 0 if kept else len(labelled.qids)
            bar.update(len(labelled.qids) if mode != "given" else 0)
            return kept or encode(config, retriever, query_set, mode, labelled, key=key, prompt=prompt, rooms=rooms())

        for query_set in chosen:
            labelled = benchmark.load(query_set)
            has_ceiling = query_set.trained and bool(labelled.complex.any())
            wanted: list[EvaluationMode] = [*run, "given"] if has_ceiling else run
            results: dict[EvaluationMode, Encoded] = {mode: results_of(query_set, mode, labelled) for mode in wanted}
            if not any(labelled.positives):
                submissions[query_set.stem] = submit(searcher, query_set, labelled, results[run[0]])
                continue
            entries[query_set] = measure(searcher, query_set, labelled, results, scope.pools)
            if scope.prompts == "all":
                others = [benchmark.load(query_set, prompt) for prompt in range(1, PROMPTS)]
                each = [(o, results_of(query_set, run[0], o, prompt)) for prompt, o in enumerate(others, start=1)]
                each = [(labelled, results[run[0]]), *each]
                entries[query_set]["prompts"] = spread(searcher, query_set, each, scope.pools)
            for pool in {pool_of(query_set, each) for each in scope.pools} - set(searcher.checked):
                searcher.check(pool, results[run[0]].embeddings[:CHECKED_QUERIES])
    made = identify(config, retriever, benchmark)
    before = artifacts.read_json(metrics_path(config)) or {}
    if not made.items() <= before.items():
        before = {"files": {}, "submissions": {}, "indexes": {}}
    indexes = {
        pool: {"kind": index.about["kind"], "candidates": len(index.ids)}
        | {"recall_against_exact": round(min(searcher.checked[pool]), 4)}
        for pool, index in searcher.indexes.items()
        if pool in searcher.checked
    }
    files = lay_over(before["files"], {query_set.stem: entry for query_set, entry in entries.items()})
    metrics = made | summarise({q: files[q.stem] for q in benchmark.query_sets if q.stem in files})
    metrics["submissions"] = before["submissions"] | submissions
    metrics["indexes"] = before["indexes"] | indexes
    artifacts.write_json(metrics_path(config), metrics)
    return metrics, encoded


def record_seconds(config: Config, benchmark: Benchmark) -> None:
    """Puts the wall seconds of all stages so far, the data's among them, into metrics.json."""
    folders = (benchmark.folder, config.run_dir)
    stages = [artifacts.read_json(epath.Path(folder) / "seconds.json") or {} for folder in folders]
    metrics = artifacts.read_json(metrics_path(config))
    artifacts.write_json(metrics_path(config), metrics | {"seconds": stages[0] | stages[1]})


def metrics_path(config: Config) -> epath.Path:
    """Where the figures of a run lie; those on a benchmark other than its own release have a file of their own."""
    own = config.benchmark == config.data.release
    return epath.Path(config.run_dir) / ("metrics.json" if own else f"metrics_{config.benchmark}.json")


def identify(config: Config, retriever: Retriever, benchmark: Benchmark) -> dict[str, Any]:
    """What all figures of a `metrics_path` are of; with anything else, they are not of one kind."""
    return {
        "config": config.name,
        "config_hash": config_hash(config),
        "seeds": {"training": config.training.seed},  # sampled traces are a function of the prompt
        "release": config.benchmark,
        "records": benchmark.fingerprint,
        "qrels": benchmark.qrels_digest,
        "mode": config.evaluation.mode,
        "asked": config.evaluation.queries,  # of each file; 0 are all
        "checkpoint": {
            "step": retriever.step,
            "identity": retriever.identity,
            "sha256": retriever.digest,
            "queries_key": queries_key(config, retriever, benchmark),
        },
    }


def config_hash(config: Config) -> str:
    """A digest of the configuration, wherever it runs."""
    return artifacts.key_of(to_json(dataclasses.replace(config, workdir="")))
