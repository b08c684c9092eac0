"""The stages as Apache Beam pipelines: a worker takes a part (a file of rows), and writes the same part, changed.

A stage's folder is named by all that its rows depend on (options, prompts, the stage before), and a part of it exists
only when it is whole. So a run that was killed, stopped by its budget or given other options does what is missing, and
nothing twice; and the bytes do not depend on the order in which answers or workers come.
"""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from trace_jax.cot import duplicates, source
from trace_jax.cot.config import CotConfig, Teacher
from trace_jax.cot.filters import Rules
from trace_jax.cot.prompts import Prompts
from trace_jax.cot.schema import Row, dump, read_rows, write_lines
from trace_jax.cot.stages import make_stage
from trace_jax.cot.teacher import Asked, MetadataTeacher, OnlineTeacher, Result, Unanswered
from trace_jax.data.builders import layout, mbeir

VERSION = "1.1.0"
"""Rises whenever a stage makes other rows or files of the same options."""

NAMES = ("assess", "generate", "filter", "verify")
_LOCAL = "DirectRunner"


class UnfinishedError(RuntimeError):
    """Requests without an answer: the message says how many and why; the same command asks for them again."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One build: its options, the release that it reads and the folder that it writes; both on a file system that every
    worker sees.
    """

    config: CotConfig
    release: Path
    output: Path
    runner: str = _LOCAL
    beam_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.output.resolve().is_relative_to(self.release.resolve()):
            raise ValueError(f"{self.output} is in the release that is read: choose another --output")
        made = self.output / "release"
        ours = self.work.exists() and not made.is_symlink() and made.resolve() != self.release.resolve()
        if made.exists() and not ours:
            raise ValueError(f"{made} is another data set's, and would be overwritten: choose another --output")

    @property
    def work(self) -> Path:
        """What the stages keep between them; may be deleted after a build, with the answers that were paid for."""
        return self.output / "work"

    @property
    def cache(self) -> Path:
        """The finished requests."""
        return self.work / "requests.sqlite"

    def pipeline(self) -> beam.Pipeline:
        """An empty pipeline on the chosen runner, which runs as the `with` block ends.

        The direct runner is Beam's in-process engine, named outright: by the name alone Beam would first try to fetch
        the binary of another one.
        """
        options = PipelineOptions(list(self.beam_options))
        runner = FnApiRunner() if self.runner == _LOCAL else self.runner
        return beam.Pipeline(runner=runner, options=options)


# Names of folders -----------------------------------------------------------------------------


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _identity(model: Teacher) -> list[Any]:
    """What answers depend on."""
    return [model.kind, model.model, model.temperature, model.seed, model.max_tokens, model.structured]


def folders(build: Build) -> dict[str, Path]:
    """Stage -> its folder. The first is "source"."""
    config = build.config
    asked = Prompts(config.prompts).hashes()
    instructions = sorted(layout.load_instructions(build.release).items())
    depends: dict[str, list[Any]] = {
        "source": [
            mbeir.fingerprint(build.release),
            instructions,
            config.part_rows,
            config.limit,
            config.verify.controls,
        ],
        "assess": [_identity(config.teacher), asked, config.policy, config.audit, config.unanswered],
        "generate": [_identity(config.teacher), asked, config.show_gold, config.show_gold_of, config.unanswered],
        "filter": [dataclasses.asdict(config.filters), asked],
        "verify": [_identity(config.verifier), asked, config.verify.min_confidence, config.unanswered],
    }
    found, key = {}, VERSION
    for stage, parts in depends.items():
        key = _digest(stage, key, parts)
        found[stage] = build.work / f"{stage}-{key}"
    return found


# Stages that ask ------------------------------------------------------------------------------


def open_teacher(build: Build, model: Teacher) -> Asked:
    """Who answers a stage's requests."""
    if model.kind == "metadata":
        return MetadataTeacher(build.release)
    return OnlineTeacher(model, build.config.budget, build.cache)


class AskPart(beam.DoFn):
    """Part name -> the part, with the answers of one stage in its rows."""

    def __init__(self, build: Build, stage: str) -> None:
        self._build, self._stage = build, stage

    def setup(self) -> None:
        """Opens the teacher."""
        self._asking = make_stage(self._stage, self._build.config, self._build.release)
        self._teacher = open_teacher(self._build, self._asking.model())
        self._before, self._after = neighbours(self._build, self._stage)

    def teardown(self) -> None:
        """Closes the teacher."""
        self._teacher.close()

    def process(self, part: str) -> Iterator[tuple[str, int]]:
        """Writes the part, or beside its place a note of what has no answer; yields nothing."""
        missing: collections.Counter[str] = collections.Counter()
        lines = (dump(row) for row in self._rows(read_rows(self._before / part), missing))
        path, note = self._after / part, self._after / f"{part}.unanswered"
        write_lines(path.with_name(f".{part}.whole"), lines)
        if missing:
            path.with_name(f".{part}.whole").unlink()
            write_lines(note, [json.dumps(dict(sorted(missing.items())))])
        else:
            note.unlink(missing_ok=True)
            path.with_name(f".{part}.whole").replace(path)
        yield from ()

    def _rows(self, rows: Iterator[Row], missing: collections.Counter[str]) -> Iterator[Row]:
        """The rows in their order, while requests of the next ones are under way."""
        window = 4 * self._asking.model().concurrency
        waiting: collections.deque[tuple[Row, list[Any]]] = collections.deque()
        for row in rows:
            asked = [] if row.dropped else self._asking.requests(row)
            waiting.append((row, [self._teacher.submit(request) for request in asked]))
            if len(waiting) > window:
                yield self._finish(*waiting.popleft(), missing)
        while waiting:
            yield self._finish(*waiting.popleft(), missing)

    def _finish(self, row: Row, futures: list[Any], missing: collections.Counter[str]) -> Row:
        results: list[Result] = [future.result() for future in futures]
        for result in results:
            if isinstance(result, Unanswered) and (result.stopped or self._build.config.unanswered == "stop"):
                missing[result.why] += 1
        return row if row.dropped else self._asking.finish(row, results)


def neighbours(build: Build, stage: str) -> tuple[Path, Path]:
    """The folder that a stage reads and the one that it writes."""
    found = folders(build)
    names = list(found)
    return found[names[names.index(stage) - 1]], found[stage]


# The rules ------------------------------------------------------------------------------------


class JudgePart(beam.DoFn):
    """Part name -> the part after the rules that look at one row, and beside it what near-duplicates are found by."""

    def __init__(self, build: Build, before: Path, after: Path) -> None:
        self._build, self._before, self._after = build, before, after

    def setup(self) -> None:
        """Loads tokenizer and language model."""
        self._rules = Rules(self._build.config.filters, Prompts(self._build.config.prompts))

    def process(self, part: str) -> Iterator[None]:
        """Judges what is not judged yet; yields nothing."""
        judged, compared = self._after / part, self._after / f"{part}.compared"
        if not judged.exists():
            write_lines(judged, (dump(self._rules.judge(row)) for row in read_rows(self._before / part)))
        if not compared.exists():
            kept = (row for row in read_rows(judged) if row.complex and not row.dropped)
            write_lines(compared, (json.dumps([duplicates.group_key(row), row.qid, row.text]) for row in kept))
        yield from ()


class CompareShard(beam.DoFn):
    """Number of a shard of the groups -> a file of its near-duplicates: qid -> qid of the earlier one."""

    def __init__(self, build: Build, parts: list[str], judged: Path) -> None:
        self._options, self._parts, self._judged = build.config.filters, parts, judged
        self.shards = math.ceil(len(parts) * build.config.part_rows / duplicates.SHARD)

    def file(self, shard: int) -> Path:
        """Where the near-duplicates of a shard are."""
        return self._judged / f"duplicates-{shard:05}.json"

    def process(self, shard: int) -> Iterator[None]:
        """Reads what all parts have of the shard, so that one shard is in memory; yields nothing."""
        if not self.file(shard).exists():
            write_lines(self.file(shard), [json.dumps(duplicates.of_all(self._rows(shard), self._options))])
        yield from ()

    def _rows(self, shard: int) -> Iterator[tuple[str, str, str]]:
        for part in self._parts:
            with (self._judged / f"{part}.compared").open(encoding="utf-8") as file:
                yield from (row for row in map(json.loads, file) if duplicates.shard_of(row[0], self.shards) == shard)


class DropPart(beam.DoFn):
    """Part name -> the part without its near-duplicates."""

    def __init__(self, found: list[Path], before: Path, after: Path) -> None:
        self._found, self._before, self._after = found, before, after

    def setup(self) -> None:
        """Reads the near-duplicates of all shards."""
        self._earlier: dict[str, str] = {}
        for path in self._found:
            self._earlier |= json.loads(path.read_text("utf-8"))

    def process(self, part: str) -> Iterator[None]:
        """Writes the part; yields nothing."""
        earlier, rows = self._earlier, read_rows(self._before / part)
        dropped = (row.drop("duplicate", earlier[row.qid]) if row.qid in earlier else row for row in rows)
        write_lines(self._after / part, map(dump, dropped))
        yield from ()


def _filter(build: Build, parts: list[str], todo: list[str]) -> None:
    """Judges, compares and drops, through files: a shuffle by Beam would hold all rows in one machine's memory."""
    before, after = neighbours(build, "filter")
    judged = after / "judged"
    compare = CompareShard(build, parts, judged)
    shards = list(range(compare.shards))
    _each(build, "judge", parts, JudgePart(build, before, judged))
    _each(build, "compare", shards, compare)
    _each(build, "drop", todo, DropPart(list(map(compare.file, shards)), judged, after))


# Running --------------------------------------------------------------------------------------


def _each(build: Build, label: str, elements: list[Any], work: beam.DoFn) -> None:
    """Has the workers of a runner do one thing with each element; returns when all is done."""
    with build.pipeline() as pipeline:
        _ = pipeline | beam.Create(elements) | beam.Reshuffle() | label >> beam.ParDo(work)


def read_source(build: Build) -> list[str]:
    """The parts of the release's queries, which are written unless they are there. Raises ReleaseError."""
    folder = folders(build)["source"]
    index = folder / "parts.json"
    if not index.exists():
        parts = source.read(build.release, build.config, folder)
        write_lines(index, [json.dumps(parts)])
    return json.loads(index.read_text("utf-8"))


def missing_parts(build: Build, stage: str, parts: list[str]) -> list[str]:
    """The parts that a stage has not written."""
    folder = folders(build)[stage]
    return [part for part in parts if not (folder / part).exists()]


def need_stage_before(build: Build, stage: str, parts: list[str]) -> None:
    """Raises UnfinishedError when the stage before is not done."""
    names = [*folders(build), "write"]
    before = names[names.index(stage) - 1]
    if missing_parts(build, before, parts):
        raise UnfinishedError(f"stage {stage} needs stage {before}, which is not done for these options: run it first")


def run_stage(build: Build, stage: str, parts: list[str]) -> int:
    """Writes the parts of a stage that are missing; returns how many those were.

    Raises UnfinishedError when the stage before has not been run, or when requests have no answer.
    """
    need_stage_before(build, stage, parts)
    todo = missing_parts(build, stage, parts)
    if todo and stage == "filter":
        _filter(build, parts, todo)
    elif todo:
        model = make_stage(stage, build.config, build.release).model()
        open_teacher(build, model).close()  # what is wrong with it is said plainly here; by Beam, in a traceback
        _each(build, stage, todo, AskPart(build, stage))
    if left := missing_parts(build, stage, parts):
        raise UnfinishedError(_unanswered(folders(build)[stage], stage, left))
    return len(todo)


def _unanswered(folder: Path, stage: str, parts: list[str]) -> str:
    reasons: collections.Counter[str] = collections.Counter()
    for part in parts:
        note = folder / f"{part}.unanswered"
        if note.exists():
            reasons.update(json.loads(note.read_text("utf-8")))
    why = "; ".join(f"{count:,} for: {reason}" for reason, count in reasons.most_common(3))
    return (
        f"stage {stage}: {sum(reasons.values()):,} requests have no answer ({why}). What was answered is kept; the same"
        " command goes on."
    )
