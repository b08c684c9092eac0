"""Recall and what explains it: routing, traces, the ceiling with true traces, speed (paper Sec. 4.2, 4.5,
Table 2).

Recall@k is UniIR's: 1 if any right answer is among the first k, else 0; a query without right answers
counts 0. What costs time, the encoding of a query file in one mode, is kept under `<run_dir>/queries/`; all
else is made anew from it.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from tqdm import tqdm

from trace_jax.config import Config
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark, Labelled, QuerySet, did_of
from trace_jax.retrieval.embedder import Encoded, Retriever
from trace_jax.retrieval.generation import Mode
from trace_jax.retrieval.index import SearchIndex, exact_search, index_folder, recall_against
from trace_jax.retrieval.pools import CandidateVectors

log = logging.getLogger(__name__)

EvaluationMode = Mode | Literal["given"]  # "given" hands every query its true trace: the ceiling
MODES = ("adaptive", "direct", "always", "given")
BY_KIND = 5  # the k of the recall that is broken down by the kind of query
CHECKED_QUERIES = 256  # of each query file, to measure an index against exact search


# ---- measures --------------------------------------------------------------------------------------------


def hits_at(found: np.ndarray, positives: Sequence[frozenset[int]], k: int) -> np.ndarray:
    """Whether a right answer is among the first k: found [n, >=k] int64 dids, best first -> [n] bool."""
    return np.array([not right.isdisjoint(row[:k].tolist()) for row, right in zip(found, positives, strict=True)], bool)


def recalls(found: np.ndarray, positives: Sequence[frozenset[int]], ks: Sequence[int]) -> dict[str, float]:
    """UniIR's recall in percent, {"R@1": ...}; 0 for no queries at all."""
    return {f"R@{k}": _percent(hits_at(found, positives, k)) for k in ks}


def is_right(trace: str, answer: str) -> bool:
    """Whether a trace ends with the answer as a clause; case, spaces and the final stop do not count."""
    written, wanted = _plain(trace), _plain(answer)
    return bool(wanted) and re.search(rf"(^|[.?!:;] ){re.escape(wanted)}$", written) is not None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def _percent(values: np.ndarray) -> float:
    return round(100 * float(np.mean(values)), 2) if len(values) else 0.0


# ---- encoding, kept on disk ------------------------------------------------------------------------------


def results_path(config: Config, query_set: QuerySet, mode: EvaluationMode) -> epath.Path:
    """Where the encoded queries of a file and mode lie."""
    return epath.Path(config.run_dir) / "queries" / config.data.release / mode / f"{query_set.stem}.npz"


def load_results(config: Config, query_set: QuerySet, mode: EvaluationMode, key: str) -> Encoded | None:
    """The encoded queries of a file; None when they are not there, or of another key, or damaged."""
    try:
        arrays: dict[str, Any] = artifacts.read_arrays(results_path(config, query_set, mode))
        if str(arrays.pop("key")) != key:
            return None
        lists = {name: arrays.pop(name).tolist() for name in ("traces", "errors", "seconds")}
        return Encoded(**lists, **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode(
    config: Config, retriever: Retriever, query_set: QuerySet, mode: EvaluationMode, labelled: Labelled
) -> Encoded:
    """Encodes a query file in one mode and keeps the result."""
    if mode == "given":
        results = retriever.encode_query_with_trace(labelled.queries, labelled.traces)
    else:
        results = retriever.encode_query(labelled.queries, mode, names=labelled.qids)
    artifacts.write_arrays(
        results_path(config, query_set, mode),
        key=np.array(queries_key(config, retriever)),
        **{field.name: np.asarray(getattr(results, field.name)) for field in dataclasses.fields(results)},
    )
    return results


def queries_key(config: Config, retriever: Retriever) -> str:
    """What encoded queries depend on: the retriever, how long a trace may be, and how it is drawn."""
    options = config.evaluation
    drawn = [options.temperature, options.samples, config.training.seed] if options.temperature else []
    return artifacts.key_of(
        retriever.key, options.max_trace_tokens, config.data.max_trace_tokens, options.cache_dtype, *drawn
    )


# ---- one query file --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Searcher:
    """Searches the pools of a release, keeps the run files, and checks each index against exact search."""

    config: Config
    benchmark: Benchmark
    key: str
    indexes: dict[str, SearchIndex] = dataclasses.field(default_factory=dict)
    checked: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def index(self, pool: str) -> SearchIndex:
        """The index of a pool, loaded once."""
        if pool not in self.indexes:
            folder = index_folder(self.config, self.benchmark, pool)
            self.indexes[pool] = SearchIndex.load(folder, key=self.key)
        return self.indexes[pool]

    def search(
        self, query_set: QuerySet, mode: EvaluationMode, pool: str, qids: Sequence[str], results: Encoded
    ) -> np.ndarray:
        """The dids found in a pool, as integers, best first: [n, k] int64. Writes UniIR's run file."""
        k = max(self.config.evaluation.neighbours, *self.config.evaluation.ks)
        index = self.index(pool)
        rows, scores = index.search(results.embeddings, k)
        found = np.where(rows >= 0, index.ids[rows], -1)
        lines = []
        for qid, ids, values in zip(qids, found.tolist(), scores.tolist(), strict=True):
            ranked = enumerate(zip(ids, values, strict=True), start=1)
            lines += [
                f"{qid} Q0 {did_of(did)} {rank} {value:.6f} {mode} {query_set.task_id}\n"
                for rank, (did, value) in ranked
                if did >= 0
            ]
        kind = "union" if pool == query_set.global_pool else "single"
        artifacts.write_bytes(run_file(self.config, query_set, mode, kind), "".join(lines).encode())
        return found

    def check(self, pool: str, queries: np.ndarray) -> None:
        """Compares an index with exact search on some queries [q, D]."""
        index, store = self.index(pool), CandidateVectors(self.config, self.benchmark)
        vectors = store.read(store.candidates.rows(index.ids))
        k = max(self.config.evaluation.ks)
        share = recall_against(index.search(queries, k)[0], exact_search(queries, vectors, k)[0])
        self.checked.setdefault(pool, []).append(share)


def run_file(config: Config, query_set: QuerySet, mode: EvaluationMode, kind: str) -> epath.Path:
    """UniIR's run file of a query file: `kind` is "single" (the local pool) or "union" (the global one)."""
    name = f"mbeir_{query_set.dataset}_task{query_set.task_id}_{kind}_pool_{query_set.split}"
    k = max(config.evaluation.neighbours, *config.evaluation.ks)
    return epath.Path(config.run_dir) / "run_files" / mode / f"{name}_k{k}_run.txt"


def measure(
    searcher: Searcher, query_set: QuerySet, labelled: Labelled, results: dict[EvaluationMode, Encoded]
) -> dict[str, Any]:
    """All figures of a query file; of the modes in `results`, the first is the one that counts."""
    config, main = searcher.config, next(iter(results))
    ks, complex_, kinds = config.evaluation.ks, labelled.complex, np.array(labelled.kinds)
    only_complex = [right for right, is_complex in zip(labelled.positives, complex_, strict=True) if is_complex]
    by_mode: dict[str, Any] = {}
    by_kind: dict[str, Any] = {}
    for mode, result in results.items():
        by_mode[mode] = row = {}
        for scope, pool in (("local", query_set.pool), ("global", query_set.global_pool)):
            found = searcher.search(query_set, mode, pool, labelled.qids, result)
            row[scope] = recalls(found, labelled.positives, ks)
            if scope == "local" and mode == main:
                hits = hits_at(found, labelled.positives, BY_KIND)
                by_kind = {
                    kind: {"queries": int((kinds == kind).sum()), f"R@{BY_KIND}": _percent(hits[kinds == kind])}
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
        [is_right(trace, answer) for trace, answer in zip(chosen.traces, labelled.answers, strict=True)], bool
    )
    return {
        "dataset": query_set.dataset,
        "queries": len(labelled.qids),
        "complex_queries": int(complex_.sum()),
        "local_pool": len(searcher.index(query_set.pool).ids),
        "global_pool": len(searcher.index(query_set.global_pool).ids),
        **by_mode[main],
        "routing": {
            "simple_direct": _percent(~chosen.reasoned[~complex_]) if (~complex_).any() else None,
            "complex_reasoned": _percent(chosen.reasoned[complex_]) if complex_.any() else None,
        },
        "traces": {
            "written": int(wrote.sum()),
            "right": _percent(right[wrote]) if wrote.any() else None,
            "right_of_complex": _percent((right & wrote)[complex_]) if complex_.any() else None,
        },
        "kinds": by_kind,
        "ceiling": ceiling,
        "modes": by_mode,
    }


# ---- the whole release -----------------------------------------------------------------------------------


def evaluate(
    config: Config, retriever: Retriever, benchmark: Benchmark, modes: Sequence[Mode] = ()
) -> tuple[dict[str, Any], int]:
    """Measures a retriever on every query file of a release; writes `<run_dir>/metrics.json` and the run
    files.

    `modes` are run besides `config.evaluation.mode`, whose figures are the ones that count. Returns the
    metrics and the number of queries that had to be encoded. Raises MissingStageError when indexes are
    missing or of another checkpoint.
    """
    run: list[EvaluationMode] = list(dict.fromkeys([config.evaluation.mode, *modes]))
    searcher, key = Searcher(config, benchmark, retriever.key), queries_key(config, retriever)
    for pool in benchmark.all_pools:
        searcher.index(pool)
    entries: dict[QuerySet, dict[str, Any]] = {}
    routed: dict[bool, list[np.ndarray]] = {False: [], True: []}
    encoded, total = 0, len(run) * sum(benchmark.count(query_set) for query_set in benchmark.query_sets)
    with tqdm(desc="evaluating", unit="query", dynamic_ncols=True, total=total) as bar:
        for query_set in benchmark.query_sets:
            labelled = benchmark.load(query_set)
            has_ceiling = query_set.trained and bool(labelled.complex.any())
            wanted: list[EvaluationMode] = [*run, "given"] if has_ceiling else run
            results: dict[EvaluationMode, Encoded] = {}
            for mode in wanted:
                bar.set_postfix_str(f"{query_set.dataset} {query_set.task} {query_set.split} {mode}", refresh=False)
                kept = load_results(config, query_set, mode, key)
                encoded += 0 if kept else len(labelled.qids)
                results[mode] = kept or encode(config, retriever, query_set, mode, labelled)
                bar.update(len(labelled.qids) if mode != "given" else 0)
            entries[query_set] = measure(searcher, query_set, labelled, results)
            for pool in {query_set.pool, query_set.global_pool} - set(searcher.checked):
                searcher.check(pool, results[run[0]].embeddings[:CHECKED_QUERIES])
            if query_set.split == "test" and query_set.trained:
                for kind in (False, True):
                    routed[kind].append(results[run[0]].reasoned[labelled.complex == kind])
    metrics = summarise(config, retriever, entries)
    metrics["routing"] = {
        "simple_direct": _percent(~np.concatenate(routed[False])) if routed[False] else None,
        "complex_reasoned": _percent(np.concatenate(routed[True])) if routed[True] else None,
    }
    metrics["indexes"] = {
        pool: {"kind": index.about["kind"], "candidates": len(index.ids)}
        | {"recall_against_exact": round(min(searcher.checked[pool]), 4)}
        for pool, index in searcher.indexes.items()
        if pool in searcher.checked
    }
    artifacts.write_json(metrics_path(config.run_dir), metrics)
    return metrics, encoded


def record_seconds(config: Config, benchmark: Benchmark) -> None:
    """Puts the wall seconds of all stages so far, the data's among them, into metrics.json."""
    folders = (benchmark.folder, config.run_dir)
    stages = [artifacts.read_json(epath.Path(folder) / "seconds.json") or {} for folder in folders]
    metrics = artifacts.read_json(metrics_path(config.run_dir))
    artifacts.write_json(metrics_path(config.run_dir), metrics | {"seconds": stages[0] | stages[1]})


def metrics_path(run_dir: str) -> epath.Path:
    """Where the figures of a run lie."""
    return epath.Path(run_dir) / "metrics.json"


def summarise(config: Config, retriever: Retriever, entries: dict[QuerySet, dict[str, Any]]) -> dict[str, Any]:
    """Arranges the figures of all query files: by task, by unseen set, and of the validation split."""
    tasks: dict[str, list[dict]] = {}
    unseen: dict[str, dict[str, dict]] = {}
    validation: dict[str, list[dict]] = {}
    for query_set, entry in entries.items():
        if query_set.split == "val":
            validation.setdefault(query_set.task, []).append(entry)
        elif query_set.trained:
            tasks.setdefault(query_set.task, []).append(entry)
        else:
            unseen.setdefault(query_set.dataset, {})[query_set.task] = entry
    merged = {task: merge(same) for task, same in tasks.items()}

    def average(scope: str, mode: str | None = None) -> float | None:
        rows = [entry["modes"].get(mode) if mode else entry for entry in merged.values()]
        values = [row[scope]["R@5"] for row in rows if row and "R@5" in row[scope]]
        return round(float(np.mean(values)), 2) if values else None

    modes = sorted({mode for entry in merged.values() for mode in entry["modes"]})
    return {
        "config": config.name,
        "release": config.data.release,
        "mode": config.evaluation.mode,
        "checkpoint": {
            "step": retriever.step,
            "identity": retriever.identity,
            "queries_key": queries_key(config, retriever),
        },
        "average": average("local"),
        "average_global": average("global"),
        "average_by_mode": {mode: average("local", mode) for mode in modes},
        "tasks": merged,
        "unseen": unseen,
        "validation": {task: merge(same) for task, same in validation.items()},
    }


def merge(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One entry for a task that several data sets share: counts are summed, all else is the plain mean."""
    if len(entries) == 1:
        return dict(entries[0])
    counts = ("queries", "complex_queries", "local_pool", "written")

    def join(name: str, values: list[Any]) -> Any:
        there = [value for value in values if value is not None]
        if not there:
            return None
        if isinstance(there[0], dict):
            names = dict.fromkeys(inner for value in there for inner in value)
            return {inner: join(inner, [value.get(inner) for value in there]) for inner in names}
        if isinstance(there[0], str):
            return ", ".join(there)
        return sum(there) if name in counts else round(float(np.mean(there)), 4)

    return {name: join(name, [entry[name] for entry in entries]) for name in entries[0]}


def describe(metrics: dict[str, Any]) -> str:
    """The figures in a few lines."""
    lines = [f"{'':8}{'queries':>8}{'pool':>8}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'global R@5':>12}{'reasoned':>10}"]
    for task, entry in metrics["tasks"].items():
        local = "".join(f"{entry['local'].get(k, 0):8.1f}" for k in ("R@1", "R@5", "R@10"))
        lines.append(
            f"{task:8}{entry['queries']:8,}{entry['local_pool']:8,}{local}{entry['global']['R@5']:12.1f}"
            f"{entry['reasoned_fraction']:10.2f}"
        )
    routing = metrics["routing"]
    lines.append(f"mean R@5 {metrics['average']} local, {metrics['average_global']} global")
    lines.append(
        f"{routing['simple_direct']} % of simple queries emit <|emb|> first,"
        f" {routing['complex_reasoned']} % of complex ones reason first"
    )
    return "\n".join(lines)
