"""What a run tells: a line for people, events for TensorBoard (and W&B), and a JSON-lines file for the report."""

import contextlib
import importlib
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter

from trace_jax.chips import GIB, chip_of
from trace_jax.config import Config, to_json
from trace_jax.training.losses import Mean

SHOWN = ("val_loss", "val_recall_in_batch")  # of the validation, in the line for people


class MetricLog:
    """Sums metrics between log steps and writes their means.

    `<run_dir>/metrics.jsonl` holds one object a log step; on resume, what lies beyond the restored step is cut. Of
    several processes the first one writes. `step_flops` is what a step needs of all devices, for the MFU.
    """

    def __init__(self, config: Config, start_step: int, step_flops: float) -> None:
        run_dir = config.run_dir
        self._file = epath.Path(run_dir) / "metrics.jsonl"
        self._rows = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        self._writes = jax.process_index() == 0
        events = str(epath.Path(run_dir) / "tensorboard")
        self._events = SummaryWriter(events, purge_step=start_step + 1, write_to_disk=self._writes)
        self._wandb = _wandb_run(config) if config.training.wandb and self._writes else None
        self._sums: list[dict[str, Mean]] = []
        self._examples, self._step_flops = config.data.batch_size, step_flops
        self._waited = self._aside = 0.0
        self._last = (time.perf_counter(), start_step)

    def add(self, metrics: dict[str, Mean]) -> None:
        """Keeps one step's metrics, on the device."""
        self._sums.append(metrics)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs within counts as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs within is no part of the steps' time: looks at the validation split."""
        started = time.perf_counter()
        yield
        self._aside += time.perf_counter() - started

    def write(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Means and speeds since the last call."""
        summed = jax.device_get(jax.tree.map(lambda *parts: sum(parts), *self._sums))
        means: dict[str, float] = {name: float(mean.value()) for name, mean in summed.items()}
        now, (then, last_step) = time.perf_counter(), self._last
        steps, seconds = step - last_step, max(now - then - self._aside, 1e-9)
        means |= extra
        means["step_seconds"] = seconds / steps
        means["data_wait"] = self._waited / seconds  # share of the time
        means["examples_per_second"] = self._examples * steps / seconds
        means["tokens_per_second"] = float(summed["tokens"].total) / seconds
        means |= _devices(self._step_flops * steps / seconds)
        self._sums, self._waited, self._aside, self._last = [], 0.0, 0.0, (now, step)
        self._rows.append({"step": step} | {name: float(f"{value:.7g}") for name, value in means.items()})
        if self._writes:  # beside its place, then renamed: a kill in between loses no row
            partial = self._file.with_name(f".{self._file.name}.partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
            partial.replace(self._file)
        for name, value in means.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(means, step=step)
        return means

    def close(self) -> None:
        """Flushes the events."""
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _devices(flops_per_second: float) -> dict[str, float]:
    """The most memory that a device of this host has used, and the share of their peak that a rate of model FLOPs is.

    Each only where the devices tell: the CPU tells neither.
    """
    found: dict[str, float] = {}
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(used):
        found["memory_gib"] = max(used) / GIB
    chip = chip_of(jax.local_devices()[0])
    if chip is not None:
        found["mfu"] = flops_per_second / (chip.bf16_flops * jax.device_count())
    return found


def _wandb_run(config: Config) -> Any:
    """A run of Weights & Biases, gone on with when the training is. Raises ValueError where it is not installed."""
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            "--training.wandb needs the wandb package: pip install wandb; or leave the option out"
        ) from error
    own_id = "".join(letter if letter.isalnum() else "-" for letter in config.run_dir)[-64:]
    return wandb.init(
        project=config.training.wandb, name=config.name, id=own_id, resume="allow", config=to_json(config)
    )


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
    parts += [f"val {name.removeprefix('val_')} {value:.3f}" for name, value in means.items() if name in SHOWN]
    parts += [
        f"lr {means['learning_rate']:.1e}",
        f"{means['tokens_per_second']:,.0f} tokens/s",
        f"{means['examples_per_second']:.1f} examples/s",
    ]
    return " | ".join(parts)
