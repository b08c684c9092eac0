"""Builds M-BEIR-CoT: which training queries need reasoning, and the traces for those that do.

`python launch/build_cot.py CONFIG --source RELEASE --output FOLDER [overrides]`; configs are the files of configs/cot/.
Stopped anywhere, the same command goes on. Everything after a lone `--` goes to Apache Beam.
"""

import argparse
import logging
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # Beam's import warns of parts that nothing here needs

from trace_jax.config import load_config
from trace_jax.cot import build
from trace_jax.cot.config import CotConfig
from trace_jax.cot.pipeline import Build, UnfinishedError
from trace_jax.retrieval import program


def _stages(text: str) -> tuple[str, ...]:
    stages = tuple(part for part in text.split(",") if part)
    if unknown := set(stages) - set(build.NAMES):
        raise argparse.ArgumentTypeError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(build.NAMES)}")
    return tuple(stage for stage in build.NAMES if stage in stages)


def main(arguments: list[str]) -> None:
    """Runs the chosen stages in order; raises SystemExit with one clear line if it cannot."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="a file of configs/cot/, such as emoji or mbeir")
    parser.add_argument("--source", type=pathlib.Path, required=True, help="a release folder in M-BEIR's layout")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write")
    parser.add_argument("--stages", type=_stages, default=build.NAMES, help=f"of {','.join(build.NAMES)}; default all")
    parser.add_argument("--batch", action="store_true", help="exchange requests and answers as files")
    parser.add_argument("--runner", default="DirectRunner", help="of Apache Beam (default DirectRunner)")
    options, overrides = parser.parse_known_args(arguments[:cut])
    source, output = options.source.resolve(), options.output.resolve()  # workers may stand elsewhere
    with program.clear_errors(UnfinishedError, ValueError):
        config = load_config(options.config, overrides, CotConfig, "configs/cot")
        one = Build(config, source, output, options.runner, tuple(arguments[cut + 1 :]))
        build.run(one, options.stages, as_files=options.batch)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    program.prepare_logging()
    main(sys.argv[1:])
