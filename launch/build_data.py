"""Draws the embedded emoji data: `python launch/build_data.py emoji_small`.

The release is written in M-BEIR's layout; its traces go through the stages of launch/build_cot.py, whose output is
turned into ArrayRecord. What is there already is skipped. A release of your own, or M-BEIR, goes through
launch/prepare_data.py.
"""

import dataclasses
import json
import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # Beam's import warns of parts that nothing here needs

import tyro

from trace_jax.config import load_config
from trace_jax.cot import build
from trace_jax.cot.config import CotConfig
from trace_jax.cot.pipeline import Build, UnfinishedError
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.emoji import release
from trace_jax.data.emoji.world import SIZES
from trace_jax.retrieval import artifacts, program


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to build, and where."""

    name: tyro.conf.Positional[str] = "emoji_small"
    """emoji_small, emoji_full, emoji_mini (for ablations), or tiny (for tests)."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """The folder that holds every data set; this one goes to its subfolder NAME."""


def _counts(folder: pathlib.Path) -> str:
    card = json.loads((folder / "card.json").read_text("utf-8"))
    kept = sum(row["kept"] or 0 for row in card["reasoning"])
    reasons = ", ".join(f"{row['rows']:,} {row['reason']}" for row in card["dropped"])
    return f"{kept:,} traces, dropped: {reasons or 'none'}; see card.html"


def main(arguments: Arguments) -> None:
    """Builds what is missing; raises SystemExit with one clear line if it cannot."""
    folder = arguments.data_dir / arguments.name
    if arguments.name not in SIZES:
        raise SystemExit(
            f"no data set {arguments.name!r}: choose from {', '.join(SIZES)}; for a release of your own there is"
            " launch/prepare_data.py"
        )
    with program.clear_errors(layout.ReleaseError, UnfinishedError), artifacts.stage(str(folder), "data") as stage:
        info = release.build(arguments.name, folder / "release")
        print(f"{folder / 'release'}: {info['pictures']:,} pictures of {info['emoji']:,} emoji", flush=True)
        config = load_config("emoji", ["--no-records"], CotConfig, "configs/cot")
        build.run(Build(config, (folder / "release").resolve(), (folder / "cot").resolve()))
        print(f"{folder / 'cot'}: {_counts(folder / 'cot')}", flush=True)
        stage.worked = mbeir.build(folder / "cot/release", folder)
    stamp = json.loads((folder / "records/stamp.json").read_text())
    print(f"{folder / 'records'}: {'written' if stage.worked else 'complete'}, {stamp['fingerprint'][:12]}", flush=True)


if __name__ == "__main__":
    program.prepare_logging()
    main(tyro.cli(Arguments, description=__doc__))
