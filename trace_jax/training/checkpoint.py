"""Orbax checkpoints: trainable parameters, optimizer state, step (= data position) and what they belong to.

The items are stored apart, so that inference reads the trainable parameters alone.
"""

import dataclasses
import json
import logging
import os
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from trace_jax.config import Config, from_json, to_json
from trace_jax.data.schema import tree_bytes

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or read; the message says which and what to do."""


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run, under `<run_dir>/checkpoints`, local or gs://.

    `identity` names the base model and the adapters; a checkpoint of another identity is refused.
    """

    config: Config
    identity: str

    def __post_init__(self) -> None:
        self.folder = epath.Path(self.config.run_dir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=self.config.training.keep, create=True),
            item_names=("trainable", "optimizer", "meta"),
        )

    def save(self, step: int, trainable: Any, optimizer: Any, *, wait: bool = False) -> None:
        """Writes two pytrees of arrays as step `step`, in the background unless `wait`.

        Raises CheckpointError when the disk has no room, before anything is written.
        """
        if step in self._manager.all_steps():
            return
        needed = tree_bytes((trainable, optimizer))
        if "://" not in str(self.folder):
            free = shutil.disk_usage(self.folder).free
            if free < 1.2 * needed:
                raise CheckpointError(
                    f"no room for checkpoint {step} in {self.folder}: it needs {needed / 1e6:.0f} MB,"
                    f" {free / 1e6:.0f} MB are free. Make room and run the same command again;"
                    f" it goes on from step {self._manager.latest_step() or 0}."
                )
        meta = {"step": step, "identity": self.identity, "config": to_json(self.config)}
        items = {
            "trainable": ocp.args.StandardSave(trainable),
            "optimizer": ocp.args.StandardSave(optimizer),
            "meta": ocp.args.JsonSave(meta),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))
        if wait:
            self._manager.wait_until_finished()

    def restore(self, *, only: int | None = None, **templates: Any) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint, or that of step `only`, as (step, items); None when there is none.

        `templates` holds the items wanted, "trainable" or both, as pytrees to be shaped and sharded like.

        Without `only`, one that is corrupt or incomplete is passed over with a warning, for the one before it. Raises
        CheckpointError when none can be read, or when they belong to another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if only is not None:
            if only not in steps:
                raise CheckpointError(f"no checkpoint {only} in {self.folder}; there are {sorted(steps)}")
            steps = [only]
        for step in steps:
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                if meta["identity"] != self.identity:
                    raise CheckpointError(
                        f"{self.folder}/{step} belongs to another model:\n  saved   {meta['identity']}\n"
                        f"  running {self.identity}\nChoose another --workdir or delete the folder."
                    )
                wanted = {
                    name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, template))
                    for name, template in templates.items()
                }
                return step, dict(self._manager.restore(step, args=ocp.args.Composite(**wanted)).items())
            except CheckpointError:
                raise
            except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
                reason = str(error).strip().splitlines()[0]
                if only is not None:
                    raise CheckpointError(f"checkpoint {self.folder}/{step} cannot be read: {reason}") from error
                log.warning("checkpoint %s/%d cannot be read (%s); trying the one before it", self.folder, step, reason)
                shutil.rmtree(self.folder / str(step), ignore_errors=True)
        if steps:
            raise CheckpointError(f"none of the checkpoints {steps} in {self.folder} can be read")
        return None

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_config(run: str | os.PathLike) -> Config:
    """The configuration that the newest checkpoint of a run's folder, local or gs://, was saved with.

    The folder may have moved since. Raises CheckpointError where there is no checkpoint.
    """
    folder = epath.Path(run) / "checkpoints"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
    if not steps:
        raise CheckpointError(f"no checkpoint in {folder}: give the folder of a run that launch/train.py wrote")
    meta = json.loads((folder / str(steps[-1]) / "meta" / "metadata").read_text())
    return dataclasses.replace(from_json(meta["config"]), workdir=str(run))
