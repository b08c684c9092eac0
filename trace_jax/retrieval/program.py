"""What the programs of this room share (embed, build_index, ...): options and one-line errors."""

import argparse
import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from trace_jax import config
from trace_jax.config import Config
from trace_jax.retrieval.artifacts import MissingStageError
from trace_jax.retrieval.benchmark import POOLS, SPLITS
from trace_jax.retrieval.generation import MODES
from trace_jax.training.checkpoint import CheckpointError


def _several(text: str) -> tuple[str, ...]:
    """Names with commas between, at least one."""
    names = tuple(part for part in text.split(",") if part)
    if not names:
        raise argparse.ArgumentTypeError("name at least one")
    return names


def _among(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Reads names that must be among the known ones."""

    def read(text: str) -> tuple[str, ...]:
        names = _several(text)
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return names

    return read


def _compared(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=run_dir")
    return name, folder


def arguments(given: Sequence[str], about: str | None) -> tuple[Config, Any]:
    """Reads `[config] [own options] [overrides]`: the config, and what is no part of it.

    Raises SystemExit with a "did you mean" for an unknown config or option.
    """
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Overrides are those of launch/train.py, e.g. --evaluation.batch-size 64 --workdir runs/mine.",
        allow_abbrev=False,
    )
    parser.add_argument("--untrained", action="store_true", help="the base alone, in <run>_untrained")
    parser.add_argument("--benchmark", default="", help="the release to search and measure on (evaluation.benchmark)")
    parser.add_argument(
        "--modes", type=_among(*MODES, "external"), default=("direct",), help="modes to run beside --evaluation.mode"
    )
    parser.add_argument("--pools", type=_among(*POOLS), default=POOLS, help="local, global, or both: local,global")
    parser.add_argument("--tasks", type=_several, default=("all",), help="all, or some: it2i,cirr,oven_task6")
    parser.add_argument("--splits", type=_among(*SPLITS), default=SPLITS, help="val, test, or both: val,test")
    parser.add_argument(
        "--prompts", choices=("first", "all"), default="first", help="ask with the first prompt, or with each of four"
    )
    parser.add_argument("--compare", type=_compared, nargs="+", default=[], help="name=run_dir of other runs")
    parser.add_argument("--vertex", help="a folder for the pools in the format of Vertex AI Vector Search")
    options, rest = parser.parse_known_args(given)
    chosen = config.from_command_line(rest)
    if options.benchmark:
        searched = dataclasses.replace(chosen.evaluation, benchmark=options.benchmark)
        chosen = dataclasses.replace(chosen, evaluation=searched)
    if options.untrained:  # never in the run itself, whose vectors and figures it would replace
        chosen = dataclasses.replace(chosen, workdir=f"{chosen.run_dir.rstrip('/')}_untrained")
    return chosen, options


def prepare(run_dir: str) -> None:
    """What a program of a run does first: plain log lines, and what is compiled stays with the run."""
    prepare_logging()
    keep_compiled(run_dir)


def prepare_logging() -> None:
    """Plain lines for people; libraries speak up only to warn."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for library in ("absl", "jax", "apache_beam", "fsspec", "gcsfs"):
        logging.getLogger(library).setLevel(logging.WARNING)


def keep_compiled(run_dir: str) -> None:
    """What XLA compiles for a run stays in `<run>/compiled`, local or gs://, for the next program or attempt.

    The environment variable JAX_COMPILATION_CACHE_DIR names another folder.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # JAX opens it again for each program, wherever the process stands by then.
        folder = run_dir if "://" in run_dir else pathlib.Path(run_dir).absolute()
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(folder) / "compiled"))


@contextlib.contextmanager
def clear_errors(*more: type[Exception]) -> Iterator[None]:
    """Turns the errors that a user can mend, and those of the types `more`, into one line and exit code 1."""
    try:
        yield
    except (MissingStageError, CheckpointError, FileNotFoundError, *more) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: {error}. Nothing half-written was kept; the same command goes on.") from error
