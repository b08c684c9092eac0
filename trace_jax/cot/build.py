"""A whole build: its stages in their order, each skipped where it is done."""

import logging
import time
from collections.abc import Sequence

from trace_jax.cot import batch, pipeline, write
from trace_jax.cot.filters import load_tokenizer
from trace_jax.cot.stages import STAGES

NAMES = (*pipeline.NAMES, "write")


def run(build: pipeline.Build, stages: Sequence[str] = NAMES, *, as_files: bool = False) -> None:
    """Runs the stages. With `as_files` requests and answers are exchanged as files (batch.py).

    Raises ReleaseError for what is wrong with the source, ValueError for what is wrong with the options, and
    UnfinishedError where requests have no answer yet; the same call goes on from there.
    """
    load_tokenizer(build.config.filters.tokenizer)  # before anything is paid for
    parts = pipeline.read_source(build)
    for stage in stages:
        started = time.monotonic()
        if as_files and stage in STAGES and pipeline.missing_parts(build, stage, parts):
            batch.exchange(build, stage, parts)
        if stage == "write":
            done = len(parts) if write.write(build, parts) else 0
        else:
            done = pipeline.run_stage(build, stage, parts)
        logging.info("%s: %d of %d parts, %.1f s", stage, done, len(parts), time.monotonic() - started)
