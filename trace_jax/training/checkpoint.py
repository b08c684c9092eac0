"""Orbax checkpoints: trainable parameters, optimizer state, step (= data position) and what they belong to.

The items are stored apart, so that inference reads the trainable parameters alone.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from trace_jax.config import ROOT, Config, from_json, to_json
from trace_jax.data.schema import tree_bytes

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or read; the message says which and what to do."""


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run, under `<run_dir>/checkpoints`, local or gs://.

    `identity` names the base model and the adapters; a checkpoint of another identity is refused. The newest
    `training.keep` stay, and those whose step `training.keep_every` divides.
    """

    config: Config
    identity: str

    def __post_init__(self) -> None:
        run = epath.Path(self.config.run_dir)
        remote = "://" in self.config.run_dir  # `absolute` would make a local path of it
        self.folder = (run if remote else run.absolute()) / "checkpoints"
        self._unreadable: list[int] = []
        options = self.config.training
        kept = [managers.LatestN(options.keep)]
        kept += [managers.EveryNSteps(options.keep_every)] if options.keep_every else []
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=managers.AnyPreservationPolicy(kept), create=True),
            item_names=("trainable", "optimizer", "meta"),
        )

    def save(self, step: int, trainable: Any, optimizer: Any, *, wait: bool = False) -> None:
        """Writes two pytrees of arrays as step `step`, in the background unless `wait`.

        Checkpoints that `restore` could not read are removed. Raises CheckpointError when the disk has no room, before
        anything is written.
        """
        while self._unreadable:
            self._manager.delete(self._unreadable.pop())
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
        meta = {"step": step, "identity": self.identity, "config": to_json(self.config), "code": code_version()}
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

        Without `only`, one that is corrupt or incomplete is passed over with a warning, for the one before it; it stays
        where it is until something is saved. Raises CheckpointError when none can be read, or when they belong to
        another model.
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
                self._unreadable.append(step)
        if steps:
            raise CheckpointError(f"none of the checkpoints {steps} in {self.folder} can be read")
        return None

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


@functools.cache
def code_version() -> dict[str, str]:
    """Which code runs: "commit" by git where there is a repository ("-dirty" when files differ from it), else "".

    "sources" is the hash of the package's files, with or without git: a TPU VM gets the files alone.
    """
    package = ROOT / "trace_jax"
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return {"commit": commit, "sources": digest.hexdigest()[:16]}


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
