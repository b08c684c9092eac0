"""Fair timing of contestants on a busy machine, and the figures as JSON."""

import collections
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}  # seconds


def interleaved(
    contestants: Mapping[str, Callable[[Any], object]],
    inputs: Sequence[Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each contestant; they take turns at every input, so that a busy machine hurts all alike."""
    seconds = collections.defaultdict(list)
    for one in inputs:
        for name, run in contestants.items():
            started = clock()
            run(one)
            seconds[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(figures: dict, file: pathlib.Path | None) -> None:
    """Writes the figures as JSON, if asked to."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def timed(contestants: dict[str, Callable[[], object]], turns: int, clock: Clock = "wall") -> dict[str, float]:
    """Median seconds of each, after one run to compile.

    "cpu" counts the seconds of this process, summed over its cores: what other programs take is left out, and so is how
    well the cores are used.
    """
    for run in contestants.values():
        run()
    every = {name: lambda _, run=run: run() for name, run in contestants.items()}
    return interleaved(every, range(turns), CLOCKS[clock])
