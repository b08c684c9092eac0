"""One HTML page of a run that opens from disk: tables, curves, and searches with their pictures and traces.

Nothing on it is picked by hand: the queries shown are the first of each task in the order of the SHA-256 of
their qid, and misses stand beside as many hits.
"""

import base64
import dataclasses
import hashlib
import io
import math
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from trace_jax.config import Config
from trace_jax.data.builders import layout
from trace_jax.data.processor import open_image
from trace_jax.data.schema import TASKS, Document
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark, Labelled, QuerySet
from trace_jax.retrieval.embedder import Encoded
from trace_jax.retrieval.evaluation import is_right, load_results, metrics_path, run_file
from trace_jax.retrieval.plots import curves, points
from trace_jax.retrieval.tables import write_tables
from trace_jax.training.metrics import read_metrics

EXAMPLES = 24  # searches shown, at least, and at least three a task
CONTRASTS = 2  # misses of each task shown beside as many hits
SHOWN = 5  # results of a search
THUMBNAIL = 160  # pixels
TASK_TITLES = {
    "t2i": "text → image",
    "t2t": "text → text",
    "t2it": "text → image with text",
    "i2t": "image → text",
    "i2i": "image → image",
    "it2t": "image and question → text",
    "it2i": "image and change → image",
    "it2it": "image and text → image with text",
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """A candidate as it is shown."""

    did: str
    text: str
    image: str  # data URI; "" where there is none
    score: float | None
    right: bool


@dataclasses.dataclass(frozen=True)
class Example:
    """A search as it is shown."""

    task: str
    dataset: str
    qid: str
    instruction: str
    text: str
    images: list[str]
    complex: bool
    reasoned: bool
    trace: str
    truth: str
    trace_right: bool
    tiles: list[Tile]
    rank: int | None  # of the first right answer among those kept; None when there is none
    kept: int
    answer: Tile | None  # a right answer, where none is shown


class Examples:
    """The searches of one query file in the mode that counts."""

    def __init__(
        self,
        config: Config,
        benchmark: Benchmark,
        query_set: QuerySet,
        labelled: Labelled,
        results: Encoded,
    ) -> None:
        self._benchmark, self._query_set, self._labelled, self._results = (
            benchmark,
            query_set,
            labelled,
            results,
        )
        self._found: dict[str, list[tuple[int, float]]] = {}
        for line in run_file(config, query_set, config.evaluation.mode, "local").read_text().splitlines():
            qid, _, did, _, score, *_ = line.split()
            self._found.setdefault(qid, []).append((layout.hash_did(did), float(score)))
        self.order = sorted(range(len(labelled.qids)), key=lambda i: hashlib.sha256(labelled.qids[i].encode()).digest())

    def rank(self, query: int) -> int | None:
        """The rank of the first right answer among the results kept, from 1; None when there is none."""
        found, right = self._found.get(self._labelled.qids[query], []), self._labelled.positives[query]
        return next((rank for rank, (did, _) in enumerate(found, start=1) if did in right), None)

    def is_hit(self, query: int) -> bool:
        """Whether a right answer is among the results shown."""
        return (self.rank(query) or SHOWN + 1) <= SHOWN

    def example(self, query: int) -> Example:
        """One search, with its pictures."""
        labelled, asked = self._labelled, self._labelled.queries[query]
        found, right = self._found.get(labelled.qids[query], []), labelled.positives[query]
        trace, answer = self._results.traces[query], labelled.answers[query]
        hidden = not self.is_hit(query) and right
        return Example(
            task=self._query_set.task,
            dataset=self._query_set.dataset,
            qid=labelled.qids[query],
            instruction=asked.instruction,
            text=asked.text,
            images=[data_uri(image) for image in asked.images],
            complex=bool(labelled.complex[query]),
            reasoned=bool(self._results.reasoned[query]),
            trace=trace,
            truth=labelled.traces[query],
            trace_right=is_right(trace, answer),
            tiles=[self._tile(did, score, did in right) for did, score in found[:SHOWN]],
            rank=self.rank(query),
            kept=len(found),
            answer=self._tile(min(right), None, True) if hidden else None,
        )

    def _tile(self, did: int, score: float | None, right: bool) -> Tile:
        document = self._document(did)
        return Tile(layout.did_of(did), document.text, data_uri(document.image), score, right)

    def _document(self, did: int) -> Document:
        candidates = self._benchmark.candidates
        return candidates.document(int(candidates.rows(np.array([did]))[0]))


def data_uri(image: bytes | None) -> str:
    """An encoded image, made small, as a data URI; "" for none. Raises ValueError for no image."""
    if image is None:
        return ""
    picture = open_image(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def examples_of(config: Config, benchmark: Benchmark, query_set: QuerySet, key: str) -> Examples:
    """The searches of a file. Raises MissingStageError when it is not evaluated."""
    results = load_results(config, query_set, config.evaluation.mode, key)
    if results is None:
        raise artifacts.MissingStageError(f"{query_set.stem} is not evaluated: run launch/evaluate.py first")
    return Examples(config, benchmark, query_set, benchmark.load(query_set), results)


def choose(config: Config, benchmark: Benchmark, key: str, measured: Collection[str]) -> dict[str, list[Example]]:
    """The searches that the page shows, of the files that were measured (their stems): "examples", "hits" and "misses"
    (as many of each), and "unseen".
    """
    shown: dict[str, list[Example]] = {"examples": [], "hits": [], "misses": [], "unseen": []}
    files = [q for q in benchmark.query_sets if q.split == "test" and q.stem in measured]
    files.sort(key=lambda query_set: (query_set.task_id, query_set.stem))
    first = max(3, math.ceil(EXAMPLES / max(1, sum(query_set.trained for query_set in files))))
    for query_set in files:
        examples = examples_of(config, benchmark, query_set, key)
        if not query_set.trained:
            shown["unseen"] += [examples.example(query) for query in examples.order[:1]]
            continue
        shown["examples"] += [examples.example(query) for query in examples.order[:first]]
        rest = examples.order[first:]
        hits = [query for query in rest if examples.is_hit(query)]
        misses = [query for query in rest if not examples.is_hit(query)]
        count = min(CONTRASTS, len(hits), len(misses))
        shown["hits"] += [examples.example(query) for query in hits[:count]]
        shown["misses"] += [examples.example(query) for query in misses[:count]]
    return shown


def render(context: dict[str, Any]) -> str:
    """Fills the page's template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Callable[..., str]] = {"percent": percent, "duration": duration, "number": number}
    environment.filters |= filters
    return environment.get_template("report.html.jinja").render(context)


def percent(value: float | None) -> str:
    """A share that is in percent already; a dash for none."""
    return "–" if value is None else f"{value:.1f}"


def number(value: float | None) -> str:
    """A count or a speed; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def write_report(config: Config, benchmark: Benchmark, compare: Sequence[tuple[str, str]] = ()) -> epath.Path:
    """Writes the page beside its metrics and returns its path, and the paper's tables where M-BEIR was measured;
    `compare` adds columns: (name, run_dir) of other runs.

    Raises MissingStageError when this run or one of the others has not been evaluated.
    """
    metrics = _metrics(config)
    others = {name: _metrics(dataclasses.replace(config, workdir=folder)) for name, folder in compare}
    seconds = metrics.get("seconds", {})
    licences = benchmark.folder / "release" / "LICENSES.md"
    page = render(
        {
            "config": config,
            "metrics": metrics,
            "others": others,
            "seconds": seconds,
            "tasks": [task for task in TASKS.values() if task in metrics["tasks"]],
            "titles": TASK_TITLES,
            "ks": [f"R@{k}" for k in config.evaluation.ks],
            "modes": list(dict.fromkeys(mode for entry in metrics["tasks"].values() for mode in entry["modes"])),
            "curves": curves(read_metrics(config.run_dir)),
            "shown": choose(
                config,
                benchmark,
                metrics["checkpoint"]["queries_key"],
                [stem for stem, entry in metrics["files"].items() if entry["local"]],
            ),
            "tables": [(table, points(table)) for table in write_tables(config, metrics)],
            "candidates": len(benchmark.candidates),
            "licences": licences.read_text(encoding="utf-8") if licences.exists() else "",
        }
    )
    path = metrics_path(config).parent / metrics_path(config).name.replace("metrics", "report", 1)
    path = path.with_suffix(".html")
    artifacts.write_bytes(path, page.encode())
    return path


def _metrics(config: Config) -> dict[str, Any]:
    metrics = artifacts.read_json(metrics_path(config))
    if metrics is None:
        raise artifacts.MissingStageError(
            f"no figures in {metrics_path(config)}: run `make quickstart` (or launch/evaluate.py) first"
        )
    return metrics
