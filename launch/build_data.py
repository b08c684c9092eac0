"""Builds a data set: the embedded emoji, or any release folder in M-BEIR's layout.

`python launch/build_data.py emoji_small` draws and writes the release, then turns it into ArrayRecord;
`python launch/build_data.py mbeir --release /path/to/M-BEIR` only does the latter. What is there already is
skipped.
"""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tyro

from trace_jax.data.builders import mbeir
from trace_jax.data.emoji import release
from trace_jax.data.emoji.world import SIZES
from trace_jax.retrieval import artifacts, program


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to build, and where."""

    name: tyro.conf.Positional[str] = "emoji_small"
    """emoji_small, emoji_full, tiny, or with --release a name of your own."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """The folder that holds every data set; this one goes to its subfolder NAME."""
    release: pathlib.Path | None = None
    """A release folder in M-BEIR's layout, instead of the embedded emoji."""


def main(arguments: Arguments) -> None:
    """Builds what is missing; raises SystemExit with one clear line if it cannot."""
    folder = arguments.data_dir / arguments.name
    if arguments.release is None and arguments.name not in SIZES:
        raise SystemExit(f"no data set {arguments.name!r}: choose from {', '.join(SIZES)}, or give --release")
    with program.clear_errors(mbeir.ReleaseError), artifacts.stage(str(folder), "data") as stage:
        source = arguments.release
        if source is None:
            source = folder / "release"
            info = release.build(arguments.name, source)
            print(f"{source}: {info['pictures']:,} pictures of {info['emoji']:,} emoji", flush=True)
        stage.worked = mbeir.build(source, folder)
    stamp = json.loads((folder / "records/stamp.json").read_text())
    print(f"{folder / 'records'}: {'written' if stage.worked else 'complete'}, {stamp['fingerprint'][:12]}", flush=True)


if __name__ == "__main__":
    program.prepare_logging()
    main(tyro.cli(Arguments, description=__doc__))
