"""Orbax checkpoints: trainable parameters, optimizer state, step (= data position) and what they belong to.

The items are stored apart, so that inference reads the trainable parameters alone.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from trace_jax.config import ROOT, Config, from_json, to_json
from trace_jax.data.schema import tree_bytes

log = logging.getLogger(__name__)

# Options in which a run may differ from the checkpoint that it goes on from: where and how the same steps are computed,
# and what is told, kept and measured of them. The base is compared by its weights; more steps are warned about.
FREE = re.compile(
    r"name|workdir|(mesh|evaluation)(\..+)?|model\.(base|scan_layers|remat|attention)"
    r"|data\.(root|rows|row_length|patch_rows|patch_row_length)|loss\.vocabulary_chunk"
    r"|training\.(steps|chunks|log_every|checkpoint_every|checkpoint_minutes|keep|keep_every|validate_every"
    r"|validation_batches|spike|profile(\..+)?|wandb|prefetch)"
)
DAMAGED = (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError)  # what a damaged one raises
NONE = -1  # the step of no checkpoint
RETRY_SECONDS = (1, 4, 15)  # waits, when storage does not answer
READ, UNREADABLE, SILENT, REFUSED = range(4)  # how reading a checkpoint ends; the worst of all processes counts


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

        Checkpoints that `restore` could not read are first moved to `<run_dir>/unreadable_checkpoint_*`. Raises
        CheckpointError when the disk has no room, before anything is written.
        """
        self._set_aside()
        if step not in self._manager.all_steps():
            self._write(step, trainable, optimizer)
        if wait:
            self._manager.wait_until_finished()

    def _write(self, step: int, trainable: Any, optimizer: Any) -> None:
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

    def restore(self, *, only: int | None = None, **templates: Any) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint, or that of step `only`, as (step, items); None when there is none.

        `templates` holds the items wanted, "trainable" or both, as pytrees to be shaped and sharded like. Who wants the
        optimizer goes on with the training: the checkpoint's options must then be the run's, but for the FREE ones.

        Without `only`, one that is corrupt or incomplete is passed over with a warning, for the one before it; it stays
        where it is until something is saved. All processes agree on each: what one of them cannot read, none takes.
        Raises CheckpointError when none can be read, when storage does not answer, when processes see different ones,
        when they belong to another model, or were trained with other options.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if only is not None:
            if only not in steps:
                raise CheckpointError(f"no checkpoint {only} in {self.folder}; there are {sorted(steps)}")
            steps = [only]
        for step in (*steps, NONE):
            items, error = ({}, None) if step == NONE else self._attempt(step, templates)
            ends = multihost_utils.process_allgather(np.array([step, _outcome(error)], np.int32))
            if (ends[:, 0] != step).any():
                raise CheckpointError(
                    f"processes see different checkpoints in {self.folder}: {sorted(set(ends[:, 0].tolist()))};"
                    " --workdir must be one folder that all of them share, such as gs://..."
                )
            if step == NONE:
                break
            worst = ends[:, 1].max()
            if worst == READ:
                return step, items
            if isinstance(error, CheckpointError):
                raise error
            reason = (str(error).strip() or repr(error)).splitlines()[0] if error else "another process fails to"
            if worst != UNREADABLE or only is not None:
                raise CheckpointError(f"checkpoint {self.folder}/{step} cannot be read: {reason}") from error
            log.warning("checkpoint %s/%d cannot be read (%s); trying the one before it", self.folder, step, reason)
            self._unreadable.append(step)
        if steps:
            raise CheckpointError(f"none of the checkpoints {steps} in {self.folder} can be read")
        return None

    def _attempt(self, step: int, templates: dict[str, Any]) -> tuple[dict[str, Any], Exception | None]:
        """Reads items of a checkpoint, again and again where storage does not answer; with the error in which it ends.

        Each process reads for itself: Orbax's own `restore` waits at its end for all others, also for one that failed.
        """
        folder, waits = self.folder / str(step), iter(RETRY_SECONDS)
        while True:
            try:
                self._check(step, _read_meta(folder), goes_on="optimizer" in templates)
                handler = ocp.StandardCheckpointHandler()
                shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, templates)
                return {
                    name: handler.restore(folder / name, args=ocp.args.StandardRestore(shape))
                    for name, shape in shapes.items()
                }, None
            except (CheckpointError, OSError, *DAMAGED) as error:
                if _outcome(error) != SILENT or (wait := next(waits, None)) is None:
                    return {}, error
                log.warning("checkpoint %s cannot be read (%s); trying again in %d s", folder, error, wait)
                time.sleep(wait)

    def _check(self, step: int, meta: dict[str, Any], *, goes_on: bool) -> None:
        """Raises CheckpointError for a checkpoint of another model, or one that this run may not go on from."""
        if meta["identity"] != self.identity:
            raise CheckpointError(
                f"{self.folder}/{step} belongs to another model:\n  saved   {meta['identity']}\n"
                f"  running {self.identity}\nChoose another --workdir or delete the folder."
            )
        if not goes_on or step == 0:  # nothing is learned yet at 0
            return
        saved = from_json(meta["config"])
        if changed := _changed(saved, self.config):
            raise CheckpointError(
                f"{self.folder}/{step} was trained with other options:\n  "
                + "\n  ".join(changed)
                + "\nGive them as they were to go on, or choose another --workdir to start anew."
            )
        steps = self.config.training.steps
        if step > steps:
            raise CheckpointError(
                f"{self.folder}/{step} is beyond --training.steps {steps}; raise it, or choose another --workdir"
            )
        if step < steps != saved.training.steps:
            log.warning(
                "training.steps was %d and is %d: from step %d on the learning rate is as in a run of %d steps",
                saved.training.steps,
                steps,
                step,
                steps,
            )

    def _set_aside(self) -> None:
        """Moves the checkpoints that could not be read out of the way of new ones: none is ever deleted for it."""
        if not self._unreadable:
            return
        if jax.process_index() == 0:
            for step in self._unreadable:
                target = self.folder.parent / f"unreadable_checkpoint_{step}_{time.time_ns()}"
                (self.folder / str(step)).rename(target)
                log.warning("checkpoint %d, which cannot be read, is now %s", step, target)
        multihost_utils.sync_global_devices("unreadable checkpoints are set aside")
        self._unreadable.clear()
        self._manager.reload()

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _outcome(error: Exception | None) -> int:
    """How an attempt to read ended in this error: READ, UNREADABLE, SILENT or REFUSED."""
    if error is None:
        return READ
    if isinstance(error, CheckpointError):
        return REFUSED
    missing = isinstance(error, DAMAGED)
    silent = any(word in str(error) for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED"))  # TensorStore's ValueErrors
    return UNREADABLE if missing and not silent else SILENT


def _changed(saved: Config, running: Config) -> list[str]:
    """The options in which two configurations differ, but for the FREE ones, a line each."""
    then, now = (_flat(to_json(config)) for config in (saved, running))
    return [
        f"{name}: {then.get(name)} there, {now.get(name)} here"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not FREE.fullmatch(name)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as one, names joined by a dot."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    """What a checkpoint says of itself, which `save` wrote as JSON."""
    return json.loads((folder / "meta" / "metadata").read_text())


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
    """The configuration that the newest readable checkpoint of a run's folder, local or gs://, was saved with.

    The folder may have moved since. Raises CheckpointError where there is no checkpoint, or none that can be read.
    """
    folder = epath.Path(run) / "checkpoints"
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else [])
    if not steps:
        raise CheckpointError(f"no checkpoint in {folder}: give the folder of a run that launch/train.py wrote")
    for step in reversed(steps):
        try:
            saved = from_json(_read_meta(folder / str(step))["config"])
            return dataclasses.replace(saved, workdir=str(run))
        except DAMAGED as error:
            log.warning("checkpoint %s/%d cannot be read (%s); trying the one before it", folder, step, error)
    raise CheckpointError(f"none of the checkpoints {steps} in {folder} can be read")
