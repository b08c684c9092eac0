"""Writes a finished build.

OUTPUT/release    an M-BEIR release: cot/train/*_cot.jsonl, the queries that are kept, links to all the rest of the
                  source; launch/prepare_data.py reads it like any other
OUTPUT/records    the same as TFDS data sets in ArrayRecord: queries joined with their traces by qid
OUTPUT/rows       everything that is known of every kept row: <stem>.jsonl and <stem>.parquet
OUTPUT/dropped    the same of dropped rows, with their reasons: <stem>.jsonl
OUTPUT/README.md, card.html, card.json   the dataset card
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from trace_jax.cot import card
from trace_jax.cot.filters import load_tokenizer
from trace_jax.cot.pipeline import Build, folders, need_stage_before
from trace_jax.cot.schema import Row, dump, read_rows, write_lines
from trace_jax.cot.statistics import Statistics
from trace_jax.data.builders import mbeir

_TYPES = {
    "task": pa.int8(),
    "complex": pa.bool_(),
    "assessed": pa.bool_(),
    "gold": pa.bool_(),
    "consistent": pa.bool_(),
    "confidence": pa.float64(),
    "decoy_consistent": pa.bool_(),
    "decoy_confidence": pa.float64(),
    "prompts": pa.map_(pa.string(), pa.string()),
}
_SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in Row.__dataclass_fields__])
_BATCH = 5000  # rows of a Parquet row group
_MADE = ("train", "union_train")
"""The folders of query/ and cot/ whose files are written; all others are the source's."""


def trace_line(row: Row) -> str:
    """A line of cot/, as `layout.load_traces` reads it: texts are empty where the query is simple."""
    trace = {"qid": row.qid, "complex": row.complex, "reasoning": row.reasoning, "answer": row.answer}
    return json.dumps(trace, ensure_ascii=False)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(partial, _SCHEMA) as writer:
        for batch in _batches(rows):
            columns = {
                name: [list(row.prompts.items()) if name == "prompts" else getattr(row, name) for row in batch]
                for name in _SCHEMA.names
            }
            writer.write_table(pa.table(columns, schema=_SCHEMA))
    partial.replace(path)


class WriteStem(beam.DoFn):
    """(stem, its parts) -> the stem's files, and its statistics under work/."""

    def __init__(self, build: Build, before: Path, after: Path) -> None:
        self._build, self._before, self._after = build, before, after

    def setup(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self._build.config.filters.tokenizer)

    def process(self, element: tuple[str, list[str]]) -> Iterator[None]:
        """Reads the parts once for each kind of file, so that no more than a row group is in memory."""
        stem, parts = element
        output, config = self._build.output, self._build.config

        def rows(dropped: bool) -> Iterator[Row]:
            return (row for part in parts for row in read_rows(self._before / part) if bool(row.dropped) == dropped)

        def tokens(text: str) -> int:
            return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

        write_lines(output / f"release/cot/train/{stem}_cot.jsonl", map(trace_line, rows(dropped=False)))
        write_lines(output / f"rows/{stem}.jsonl", map(dump, rows(dropped=False)))
        _write_parquet(output / f"rows/{stem}.parquet", rows(dropped=False))
        write_lines(output / f"dropped/{stem}.jsonl", map(dump, rows(dropped=True)))
        statistics = Statistics()
        for part in parts:
            for row in read_rows(self._before / part):
                statistics.add(row, config.policy.get(row.dataset), tokens, config.verify.min_confidence)
        write_lines(self._after / f"{stem}.statistics", [statistics.dump()])
        yield from ()


def _keep_queries(source: Path, target: Path, kept: set[str]) -> None:
    """Copies a query file without the queries that have been dropped: without its trace a complex query would be
    trained as a simple one.
    """
    with source.open(encoding="utf-8") as file:
        write_lines(target, (line.rstrip("\n") for line in file if json.loads(line)["qid"] in kept))


def _linked(source: Path) -> Iterator[Path]:
    """What a built release takes from its source as it is: files of query/ and cot/, since a few of them are made anew,
    and everything else whole.
    """
    for entry in sorted(source.iterdir()):
        if entry.name in ("query", "cot"):
            yield from (path for path in sorted(entry.glob("*/*.jsonl")) if path.parent.name not in _MADE)
        else:
            yield entry


def _write_release(build: Build) -> None:
    source, target = build.release.resolve(), build.output / "release"
    kept: set[str] = set()
    for path in sorted((target / "cot/train").glob("*_cot.jsonl")):
        with path.open(encoding="utf-8") as file:
            kept.update(json.loads(line)["qid"] for line in file)
    for path in _linked(source):
        link = target / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for folder in _MADE:
        for path in sorted((source / "query" / folder).glob("*.jsonl")):
            _keep_queries(path, target / "query" / folder / path.name, kept)


def write(build: Build, parts: list[str]) -> bool:
    """Writes everything anew from the verified parts, unless that is done; says whether it had to.

    Raises UnfinishedError when some are missing.
    """
    need_stage_before(build, "write", parts)
    before, mark = folders(build)["verify"], build.work / "written.json"
    done = [before.name, build.config.name, build.config.records, str(build.release)]
    if mark.exists() and json.loads(mark.read_text("utf-8")) == done:
        return False
    mark.unlink(missing_ok=True)
    stems: dict[str, list[str]] = {}
    for part in parts:
        stems.setdefault(part.rsplit("-", 1)[0], []).append(part)
    after = build.work / "statistics"
    for stale in (build.output / "release", build.output / "rows", build.output / "dropped", after):
        shutil.rmtree(stale, ignore_errors=True)
    with build.pipeline() as pipeline:
        _ = pipeline | beam.Create(list(stems.items())) | beam.Reshuffle() | beam.ParDo(WriteStem(build, before, after))
    _write_release(build)
    lines = [(after / f"{stem}.statistics").read_text("utf-8").rstrip("\n") for stem in sorted(stems)]
    card.write_card(build, lines)
    if build.config.records:
        mbeir.build(build.output / "release", build.output)
    write_lines(mark, [json.dumps(done)])
    return True
