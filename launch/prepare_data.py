"""Checks a release in M-BEIR's layout, then turns it into ArrayRecord: M-BEIR itself, or one of your own.

`python launch/prepare_data.py mbeir --source /path/to/M-BEIR` asks for every file of M-BEIR and compares its counts
with the published ones; under any other name, what is there is checked. --source may be a bucket (gs://): its texts are
copied, its pictures are read from there. The names of unseen.py (urban1k, circo, ...) take a benchmark as its authors
release it (docs/data.md says which files). Nothing is built from a release with a problem, and all problems are listed.
What is done already is skipped.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tyro
from etils import epath

from trace_jax.data.builders import layout, mbeir, unseen
from trace_jax.data.builders.check import check
from trace_jax.retrieval import artifacts, program

TEXTS = ("query", "cand_pool", "qrels", "instructions", "cot")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to prepare, and where."""

    name: tyro.conf.Positional[str]
    """mbeir, one of unseen.SETS, or a name of your own."""
    source: str
    """The release: a folder, or gs://BUCKET/FOLDER."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """The folder that holds every data set; this one goes to its subfolder NAME."""
    accept: tuple[Literal["missing pictures", "undecodable", "empty", "dangling ids", "duplicate ids"], ...] = ()
    """Faults that you have looked at. Records without their text or a good picture are left out and listed in
    records/dropped.jsonl; ids are counted only, and a training query still needs its right answers."""
    only_check: bool = False
    """Print the table and build nothing."""
    runner: str = ""
    """An Apache Beam runner that builds the files side by side; all its workers must see the data directory."""
    beam_options: tuple[str, ...] = ()
    """Options of that runner, e.g. --direct_num_workers=8 --direct_running_mode=multi_processing."""


def copy_texts(source: epath.Path, release: pathlib.Path) -> None:
    """Copies all but the pictures, file by file; a file that is there with its size is not copied again."""
    for folder in TEXTS:
        for path in (*source.glob(f"{folder}/*"), *source.glob(f"{folder}/*/*")):
            target = release / path.relative_to(source)
            if path.is_dir() or (target.exists() and target.stat().st_size == path.stat().length):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(target.name + ".partial")
            path.copy(beside, overwrite=True)
            beside.rename(target)


def with_beam(
    write: Callable[[mbeir.Part], None], parts: Sequence[mbeir.Part], *, runner: str, options: Sequence[str]
) -> None:
    """Writes the parts on an Apache Beam runner, each as one element."""
    import apache_beam as beam  # its import takes seconds, and most builds need none
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as pipeline:
        _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(write)


def main(arguments: Arguments) -> None:
    """Checks, then builds what is missing; raises SystemExit with what is wrong if it cannot."""
    folder, release = arguments.data_dir / arguments.name, pathlib.Path(arguments.source)
    if not re.fullmatch(r"\w[\w.-]*", arguments.name):
        raise SystemExit(f"error: {arguments.name!r} is no name for a data set: letters, digits, _, - and . make one")
    with program.clear_errors(layout.ReleaseError), artifacts.stage(str(folder), "data") as stage:
        source = epath.Path(arguments.source)
        if not source.is_dir():
            raise layout.ReleaseError(f"{source} is no folder; give the one that holds query/ and cand_pool/")
        if "://" in arguments.source or arguments.name in unseen.SETS:
            release = folder / "release"
            if release.is_symlink():
                release.unlink()  # what is written next is no change of a release elsewhere
        if "://" in arguments.source:
            copy_texts(source, release)
        if arguments.name in unseen.SETS:
            unseen.write(arguments.name, pathlib.Path(arguments.source), release)
        report = check(
            release,
            folder / "check",
            images=arguments.source,
            complete=arguments.name == "mbeir",
            accepted=arguments.accept,
        )
        print(report.table, flush=True)
        report.raise_for_problems()
        if arguments.only_check:
            return
        run = mbeir.one_by_one
        if arguments.runner:
            run = functools.partial(with_beam, runner=arguments.runner, options=arguments.beam_options)
        stage.worked = mbeir.build(release, folder, images=arguments.source, dropped=report.dropped, run=run)
    stamp = json.loads((folder / "records/stamp.json").read_text())
    if report.dropped:
        print(f"{len(report.dropped):,} records are left out, listed in {folder / 'records/dropped.jsonl'}", flush=True)
    print(f"{folder / 'records'}: {'written' if stage.worked else 'complete'}, {stamp['fingerprint'][:12]}", flush=True)


if __name__ == "__main__":
    program.prepare_logging()
    main(tyro.cli(Arguments, description=__doc__))
