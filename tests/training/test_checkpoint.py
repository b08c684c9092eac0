import dataclasses
import json
import logging
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ROOT, to_json
from trace_jax.training.checkpoint import CheckpointError, Checkpoints, code_version


def trainable(value):
    return {"kernel": jnp.full((4, 3), float(value))}


def optimizer(value):
    return {"count": jnp.int32(value)}


@pytest.fixture
def saved(fresh_config):
    checkpoints = Checkpoints(fresh_config, "base A")
    for step in (1, 2):
        checkpoints.save(step, trainable(step), optimizer(step), wait=True)
    checkpoints.close()
    return fresh_config


def restore(config, identity="base A"):
    checkpoints = Checkpoints(config, identity)
    try:
        return checkpoints.restore(trainable=trainable(0), optimizer=optimizer(0))
    finally:
        checkpoints.close()


def folder(config, step):
    return pathlib.Path(Checkpoints(config, "base A").folder) / str(step)


def test_round_trip(saved):
    step, restored = restore(saved)
    assert step == 2 and restored["optimizer"]["count"] == 2
    np.testing.assert_array_equal(restored["trainable"]["kernel"], np.full((4, 3), 2.0))


def test_inference_reads_the_trainable_parameters_alone(saved):
    shutil.rmtree(folder(saved, 2) / "optimizer")
    checkpoints = Checkpoints(saved, "base A")
    step, restored = checkpoints.restore(trainable=trainable(0))
    checkpoints.close()
    assert step == 2 and set(restored) == {"trainable"}


def test_nothing_saved_is_none(fresh_config):
    assert restore(fresh_config) is None


@pytest.mark.parametrize("harm", ["cut", "missing", "meta"])
def test_a_harmed_checkpoint_gives_way_to_the_one_before(saved, harm, caplog):
    newest = folder(saved, 2)
    if harm == "missing":
        shutil.rmtree(newest / "trainable")
    elif harm == "meta":
        for file in (newest / "meta").rglob("*"):
            if file.is_file():
                file.write_text("{")
    else:
        for file in (newest / "trainable").rglob("*"):
            if file.is_file() and file.stat().st_size > 0:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        step, restored = restore(saved)
    assert step == 1 and restored["optimizer"]["count"] == 1
    assert "cannot be read" in caplog.text and "2" in caplog.text
    assert newest.exists()  # who only reads removes nothing


def test_training_on_replaces_a_harmed_checkpoint(saved):
    shutil.rmtree(folder(saved, 2) / "trainable")
    checkpoints = Checkpoints(saved, "base A")
    assert checkpoints.restore(trainable=trainable(0), optimizer=optimizer(0))[0] == 1
    checkpoints.save(2, trainable(7), optimizer(2), wait=True)
    checkpoints.close()
    assert (restore(saved)[1]["trainable"]["kernel"] == 7).all()


def test_a_checkpoint_says_which_code_and_configuration_wrote_it(saved):
    (file,) = (folder(saved, 2) / "meta").glob("metadata*")
    meta = json.loads(file.read_text())
    assert meta["config"] == to_json(saved) and meta["code"] == code_version()
    assert len(meta["code"]["sources"]) == 16 and (meta["code"]["commit"] or not (ROOT / ".git").exists())


def test_another_model_is_refused(saved):
    with pytest.raises(CheckpointError, match="belongs to another model"):
        restore(saved, "base B")
    assert restore(saved)[0] == 2


def test_no_room_is_said_before_anything_is_written(saved, monkeypatch):
    checkpoints = Checkpoints(saved, "base A")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="no room for checkpoint 3.*goes on from step 2"):
        checkpoints.save(3, trainable(3), optimizer(3), wait=True)
    checkpoints.close()
    assert not folder(saved, 3).exists()


@pytest.mark.parametrize(("keep_every", "left"), [(0, ["6", "7"]), (3, ["3", "6", "7"])])
def test_the_newest_are_kept_and_every_nth(fresh_config, keep_every, left):
    training = dataclasses.replace(fresh_config.training, keep=2, keep_every=keep_every)
    checkpoints = Checkpoints(dataclasses.replace(fresh_config, training=training), "base A")
    for step in range(1, 8):
        checkpoints.save(step, trainable(step), optimizer(step), wait=True)
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir() if path.name.isdigit()) == left
