import dataclasses
import json
import logging
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.config import ROOT, Lora, Mesh, to_json
from trace_jax.training import checkpoint
from trace_jax.training.checkpoint import CheckpointError, Checkpoints, code_version, read_config


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


def test_training_on_moves_a_harmed_checkpoint_aside_and_deletes_nothing(saved):
    shutil.rmtree(folder(saved, 2) / "trainable")
    checkpoints = Checkpoints(saved, "base A")
    assert checkpoints.restore(trainable=trainable(0), optimizer=optimizer(0))[0] == 1
    checkpoints.save(2, trainable(7), optimizer(2), wait=True)
    checkpoints.close()
    assert (restore(saved)[1]["trainable"]["kernel"] == 7).all()
    (aside,) = pathlib.Path(saved.run_dir).glob("unreadable_checkpoint_2_*")
    assert (aside / "optimizer").is_dir()


def unanswered(monkeypatch, times, error):
    """Storage that does not answer the first `times` reads; the waits are noted, not waited for."""
    real, waits = checkpoint._read_meta, []

    def read(where):
        if len(failed) < times:
            failed.append(where)
            raise error
        return real(where)

    failed = []
    monkeypatch.setattr(checkpoint, "_read_meta", read)
    monkeypatch.setattr(checkpoint.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("UNAVAILABLE: try again")], ids=str)
def test_storage_that_does_not_answer_is_asked_again_and_is_no_damage(saved, monkeypatch, error):
    waits = unanswered(monkeypatch, 2, error)
    assert restore(saved)[0] == 2 and waits == [1, 4]
    waits = unanswered(monkeypatch, 99, error)
    with pytest.raises(CheckpointError, match=r"checkpoint .*/2 cannot be read: "):
        restore(saved)
    assert waits == [1, 4, 15] and folder(saved, 2).exists()


@pytest.mark.parametrize(("others", "step"), [(checkpoint.READ, 2), (checkpoint.UNREADABLE, 1), (checkpoint.SILENT, 0)])
def test_what_one_process_cannot_read_none_takes(saved, monkeypatch, caplog, others, step):
    """Another process, which ends so with checkpoint 2 and reads all others."""
    answers = iter([others, checkpoint.READ])
    monkeypatch.setattr(
        checkpoint.multihost_utils, "process_allgather", lambda own: np.stack([own, [own[0], next(answers)]])
    )
    if step == 0:
        with pytest.raises(CheckpointError, match="/2 cannot be read: another process fails to"):
            restore(saved)
    else:
        assert restore(saved)[0] == step
        assert ("another process" in caplog.text) == (step == 1)


@pytest.mark.parametrize(("theirs", "seen"), [(1, r"\[1, 2\]"), (checkpoint.NONE, r"\[-1, 2\]")])
def test_processes_that_see_different_checkpoints_do_not_train(saved, monkeypatch, theirs, seen):
    other = np.array([theirs, checkpoint.READ], np.int32)
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", lambda own: np.stack([own, other]))
    with pytest.raises(CheckpointError, match=f"different checkpoints in .*: {seen}; --workdir must be one folder"):
        restore(saved)


def changed(config, **parts):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **options) for name, options in parts.items()}
    )


def test_other_options_of_what_is_learned_are_refused_by_name(saved):
    other = changed(
        saved,
        model={"lora": Lora(rank=4, alpha=8.0, dropout=0.1)},
        data={"batch_size": 8, "weights": {"t2i": 2.0}},
        optimizer={"learning_rate": 0.5},
        training={"seed": 7},
    )
    with pytest.raises(CheckpointError, match="trained with other options") as error:
        restore(other)
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "data.batch_size:",
        "data.weights.t2i:",
        "model.lora.dropout:",
        "optimizer.learning_rate:",
        "training.seed:",
    ]
    assert "optimizer.learning_rate: 0.001 there, 0.5 here" in lines[4] and "--workdir" in lines[-1]
    checkpoints = Checkpoints(other, "base A")  # who does not train on may read it
    assert checkpoints.restore(trainable=trainable(0))[0] == 2
    checkpoints.close()


def test_where_and_how_a_run_is_computed_may_change(saved, caplog):
    other = changed(
        saved,
        model={"remat": "full", "scan_layers": False},
        data={"row_length": 256, "rows": 9},
        training={"checkpoint_every": 7, "log_every": 3, "profile": (1, 2), "chunks": 2},
        evaluation={"batch_size": 2},
    )
    assert restore(dataclasses.replace(other, mesh=Mesh(data=8)))[0] == 2
    assert "training.steps" not in caplog.text
    assert restore(changed(saved, training={"steps": 60}))[0] == 2
    assert "training.steps was 6 and is 60" in caplog.text
    with pytest.raises(CheckpointError, match=r"/2 is beyond --training.steps 1;"):
        restore(changed(saved, training={"steps": 1}))


def test_options_that_an_older_checkpoint_does_not_know_have_their_defaults(saved):
    file = folder(saved, 2) / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["config"]["loss"]["detach_emission"], meta["config"]["training"]["wandb"]
    meta["config"]["data"]["gone"] = 1
    file.write_text(json.dumps(meta))
    assert restore(saved)[0] == 2
    with pytest.raises(CheckpointError, match="loss.detach_emission: False there, True here"):
        restore(changed(saved, loss={"detach_emission": True}))


def test_the_configuration_is_of_the_newest_checkpoint_that_can_be_read(saved, caplog):
    assert read_config(saved.run_dir) == saved
    (folder(saved, 2) / "meta" / "metadata").write_text("{")
    (folder(saved, 2).parent / "9").mkdir()  # being written
    assert read_config(saved.run_dir) == saved
    assert "/9 cannot be read" in caplog.text and "/2 cannot be read" in caplog.text
    (folder(saved, 1) / "meta" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2, 9\] in"):
        read_config(saved.run_dir)


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
