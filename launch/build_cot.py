"""Builds M-BEIR-CoT: which training queries need reasoning, and the traces for those that do.

`python launch/build_cot.py CONFIG --source RELEASE --output FOLDER [overrides]`; configs are the files of configs/cot/.
Stopped anywhere, the same command goes on. Everything after a lone `--` goes to Apache Beam.
"""

import argparse
import logging
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax.config import load_config
from trace_jax.cot import batch, pipeline, write
from trace_jax.cot.config import CotConfig
from trace_jax.cot.stages import STAGES
from trace_jax.data.builders.mbeir import ReleaseError

STAGE_NAMES = (*pipeline.NAMES, "write")


def _stages(text: str) -> tuple[str, ...]:
    stages = tuple(part for part in text.split(",") if part)
    if unknown := set(stages) - set(STAGE_NAMES):
        raise argparse.ArgumentTypeError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGE_NAMES)}")
    return tuple(stage for stage in STAGE_NAMES if stage in stages)


def _exchange(build: pipeline.Build, stage: str, parts: list[str]) -> None:
    """Reads a batch's answers; raises SystemExit with the files to send while some are missing."""
    if (build.config.verifier if stage == "verify" else build.config.teacher).kind == "metadata":
        return
    count = batch.read_answers(build, stage)
    logging.info("%s: %s answers read", stage, f"{count:,}")
    if files := batch.write_requests(build, stage, parts):
        names = "\n".join(f"  {path}" for path in files)
        raise SystemExit(
            f"stage {stage} waits for its batch. Send these files:\n{names}\nPut what comes back beside them as"
            " answers*.jsonl, and run the same command again."
        )


def main(arguments: list[str]) -> None:
    """Runs the chosen stages in order; raises SystemExit with one clear line if it cannot."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="a file of configs/cot/, such as emoji or mbeir")
    parser.add_argument("--source", type=pathlib.Path, required=True, help="a release folder in M-BEIR's layout")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write")
    parser.add_argument("--stages", type=_stages, default=STAGE_NAMES, help=f"of {','.join(STAGE_NAMES)}; default all")
    parser.add_argument("--batch", action="store_true", help="exchange requests and answers as files")
    parser.add_argument("--runner", default="DirectRunner", help="of Apache Beam (default DirectRunner)")
    options, overrides = parser.parse_known_args(arguments[:cut])
    config = load_config(options.config, overrides, CotConfig, "configs/cot")
    source, output = options.source.resolve(), options.output.resolve()  # workers may stand elsewhere
    build = pipeline.Build(config, source, output, options.runner, tuple(arguments[cut + 1 :]))
    try:
        parts = pipeline.read_source(build)
        for stage in options.stages:
            started = time.monotonic()
            if options.batch and stage in STAGES and pipeline.missing_parts(build, stage, parts):
                _exchange(build, stage, parts)
            if stage == "write":
                write.write(build, parts)
                done = len(parts)
            else:
                done = pipeline.run_stage(build, stage, parts)
            logging.info("%s: %d of %d parts, %.1f s", stage, done, len(parts), time.monotonic() - started)
    except (pipeline.UnfinishedError, ReleaseError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "apache_beam"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    main(sys.argv[1:])
