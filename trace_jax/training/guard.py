"""Stops a run whose loss is no number, or leaps; keeps the batch that did it.

A step is judged while the devices work on the next one, so that looking costs no time. What is not judged yet is judged
before a checkpoint is written (`settle`): no checkpoint holds parameters that a bad step has touched.
"""

import collections
import dataclasses
import io
import math
import statistics
from typing import Any

import jax
import numpy as np
from etils import epath

from trace_jax.config import Config
from trace_jax.data.pipeline import Pipeline
from trace_jax.data.schema import Batch
from trace_jax.training.losses import Mean

WINDOW = 100  # steps of the running median
FEWEST = 20  # steps that must be known before a loss can be called a spike


@dataclasses.dataclass
class Guard:
    """Judges every step of a run, one after the other."""

    config: Config
    pipeline: Pipeline

    def __post_init__(self) -> None:
        self._losses = collections.deque(maxlen=WINDOW)
        self._pending: tuple[int, Batch, dict[str, Mean]] | None = None

    def look(self, step: int, batch: Batch, measured: dict[str, Mean]) -> None:
        """Judges the step before, and takes the host's part of a batch and what the devices will measure on it.

        Raises FloatingPointError as `settle` does.
        """
        self.settle()
        self._pending = (step, batch, measured)

    def settle(self) -> None:
        """Judges the last step, waiting for it; raises FloatingPointError that says what to look at and what to do."""
        if self._pending is None:
            return
        (step, batch, measured), self._pending = self._pending, None
        loss, norm = (float(jax.device_get(measured[name]).value()) for name in ("loss", "gradient_norm"))
        if not math.isfinite(loss):
            self._stop(step, batch, f"the loss is not a number at step {step}")
        if not math.isfinite(norm):
            self._stop(step, batch, f"the gradient is not a number at step {step}, the loss is {loss:.4g}")
        factor = self.config.training.spike
        if factor and len(self._losses) >= FEWEST:
            median = statistics.median(self._losses)
            if loss > factor * median:
                self._stop(
                    step,
                    batch,
                    f"the loss leaps to {loss:.4g} at step {step}; the median of the {len(self._losses)} steps before"
                    f" is {median:.4g} (--training.spike {factor:g} times it is the limit)",
                )
        self._losses.append(loss)

    def _stop(self, step: int, batch: Batch, reason: str) -> None:
        file = save_batch(self.config.run_dir, step, batch, self.pipeline.names(step - 1))
        raise FloatingPointError(
            f"{reason}. Its batch is in {file}: np.load(...)['names'] are the records, shard by shard, the other arrays"
            " are the fields of Batch and Inputs (trace_jax/data/schema.py). Mend a record that is wrong, or raise"
            " --training.spike if the leap does no harm: the same command goes on from the newest checkpoint, which is"
            " from before. With another --optimizer.learning-rate or --training.seed it is another run, in another"
            " --workdir."
        )


def save_batch(run_dir: str, step: int, batch: Batch, names: np.ndarray) -> epath.Path:
    """Writes the host's part of a batch as <run_dir>/bad_batch_<step>[_host<i>].npz, with the names of its records."""
    host = f"_host{jax.process_index()}" if jax.process_count() > 1 else ""
    file = epath.Path(run_dir) / f"bad_batch_{step}{host}.npz"
    arrays: dict[str, Any] = batch._asdict() | batch.inputs._asdict() | {"names": names}
    del arrays["inputs"]
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    file.write_bytes(content.getvalue())
    return file
