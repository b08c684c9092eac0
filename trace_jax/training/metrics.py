"""What a run tells: a line for people, events for TensorBoard, and a JSON-lines file for the report."""

import json
import time
from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter

from trace_jax.training.losses import Mean


class MetricLog:
    """Sums metrics between log steps and writes their means.

    `<run_dir>/metrics.jsonl` holds one object a log step; on resume, what lies beyond the restored step is cut. Of
    several processes the first one writes.
    """

    def __init__(self, run_dir: str, start_step: int) -> None:
        self._file = epath.Path(run_dir) / "metrics.jsonl"
        self._rows = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        self._writes = jax.process_index() == 0
        events = str(epath.Path(run_dir) / "tensorboard")
        self._events = SummaryWriter(events, purge_step=start_step + 1, write_to_disk=self._writes)
        self._sums: list[dict[str, Mean]] = []
        self._last = (time.perf_counter(), start_step)

    def add(self, metrics: dict[str, Mean]) -> None:
        """Keeps one step's metrics, on the device, and waits until those of the step before are there."""
        if self._sums:
            jax.block_until_ready(self._sums[-1])
        self._sums.append(metrics)

    def write(self, step: int, extra: dict[str, float], examples: int) -> dict[str, float]:
        """Means since the last call; `examples` counts the pairs of a step. Raises on a loss that is no number."""
        summed = jax.device_get(jax.tree.map(lambda *parts: sum(parts), *self._sums))
        means: dict[str, float] = {name: float(mean.value()) for name, mean in summed.items()}
        self._sums = []
        now, (then, last_step) = time.perf_counter(), self._last
        seconds = max(now - then, 1e-9)
        self._last = (now, step)
        means |= extra
        means["examples_per_second"] = examples * (step - last_step) / seconds
        if "tokens" in summed:
            means["tokens_per_second"] = float(summed["tokens"].total) / seconds
        if not means["loss"] == means["loss"]:
            raise FloatingPointError(f"the loss is not a number at step {step}; lower --optimizer.learning-rate")
        self._rows.append({"step": step} | {name: round(value, 6) for name, value in means.items()})
        if self._writes:
            self._file.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        for name, value in means.items():
            self._events.add_scalar(name, value, step)
        return means

    def close(self) -> None:
        """Flushes the events."""
        self._events.close()


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; empty when there is none. A torn last line is dropped."""
    file = epath.Path(run_dir) / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def describe(step: int, steps: int, means: dict[str, float]) -> str:
    """One human-readable line."""
    parts = [f"step {step}/{steps}", f"loss {means['loss']:.3f}", f"gen {means['loss_gen']:.3f}"]
    if "loss_ret" in means:
        parts += [
            f"ret {means['loss_ret']:.3f}",
            f"recall {means['recall_in_batch']:.2f}",
            f"<|emb|> first {means['emb_first']:.2f}",
            f"routing {means['routing_accuracy']:.2f}",
        ]
    else:
        parts.append(f"token accuracy {means['token_accuracy']:.3f}")
    parts += [
        f"lr {means['learning_rate']:.1e}",
        f"{means['tokens_per_second']:,.0f} tokens/s",
        f"{means['examples_per_second']:.1f} examples/s",
    ]
    return " | ".join(parts)
