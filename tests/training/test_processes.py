"""Several processes on one machine, as on the hosts of a slice: the same losses as one, and one end for all."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.bucket import Bucket
from tests.programs import environments, start
from trace_jax.config import ROOT, Config, Mesh, load_config
from trace_jax.model import weights
from trace_jax.training.metrics import read_metrics
from trace_jax.training.train import train

EACH_ITS_OWN = Mesh(data=4, fsdp=2, tensor=1)  # of two processes, each reads its own examples


def configured(config: Config, folder, steps: int, *, every: int = 100, mesh: Mesh = EACH_ITS_OWN) -> Config:
    training = dataclasses.replace(config.training, steps=steps, checkpoint_every=every)
    data = dataclasses.replace(config.data, weights=load_config("emoji_tiny").data.weights)
    loss = dataclasses.replace(config.loss, learn_temperature=True, both_directions=True)
    return dataclasses.replace(config, workdir=str(folder), training=training, data=data, loss=loss, mesh=mesh)


def launch(config: Config, processes: int) -> list:
    """Starts training in so many processes that share eight CPU devices."""
    return [start("train", config, **environment) for environment in environments(processes)]


def errors(running: list) -> list[str]:
    return [process.communicate()[1][-3000:] for process in running]


def losses(config: Config) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(config.run_dir)}


@pytest.mark.parametrize(
    "mesh",
    [EACH_ITS_OWN, pytest.param(Mesh(data=1, fsdp=1, tensor=8), marks=pytest.mark.slow)],
    ids=["each its own examples", "both the same examples"],
)
def test_two_processes_train_as_one_and_one_goes_on_with_what_two_began(tiny_config, tmp_path, mesh):
    one, two = (configured(tiny_config, tmp_path / name, 4, every=2, mesh=mesh) for name in ("one", "two"))
    train(one)
    running = launch(two, 2)
    said = errors(running)
    assert [process.returncode for process in running] == [0, 0], said
    expected, found = losses(one), losses(two)
    assert set(expected) == set(found) == {1, 2, 3, 4}
    assert found == pytest.approx(expected, rel=1e-5)

    half = dataclasses.replace(two, workdir=str(tmp_path / "half"))
    shutil.copytree(tmp_path / "two", half.run_dir)
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    train(half)
    resumed = losses(half)
    assert resumed == pytest.approx(expected, rel=1e-5)
    assert (resumed[1], resumed[2]) == (found[1], found[2])  # as they were logged, not trained again


@pytest.mark.slow
def test_a_notice_to_one_process_stops_all_with_a_checkpoint(tiny_config, tmp_path):
    config = configured(tiny_config, tmp_path / "run", 100_000)
    running = launch(config, 2)
    while not losses(config):
        assert all(process.poll() is None for process in running)
        time.sleep(0.1)
    os.kill(running[1].pid, signal.SIGTERM)
    said = errors(running)
    assert all("with a checkpoint; the same command goes on" in text for text in said), said
    assert [process.returncode for process in running] == [os.EX_TEMPFAIL] * 2
    last = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert all(f"stopped at step {last} " in text for text in said)
    again = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=last + 2))
    resumed = launch(again, 2)
    said = errors(resumed)
    assert [process.returncode for process in resumed] == [0, 0], said
    assert max(losses(again)) == last + 2


# Prints the bytes that this process read from the bucket, and the sums of all parameters.
READ = """
import json, sys
import jax, jax.numpy as jnp, tensorstore
from trace_jax import config, sharding
from trace_jax.model import weights
sharding.join_processes()
mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=-1))
model = weights.load(sys.argv[1], shardings=lambda path, shape: sharding.sharding_of(path, shape, mesh))
leaves = {path: leaf[...] for path, leaf in weights.flat_parameters(model).items()}
metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/gcs/bytes_read")
print(json.dumps({
    "read": sum(value["value"] for metric in metrics for value in metric["values"]),
    "sums": {path: float(jnp.sum(jnp.abs(leaf.astype(jnp.float32)))) for path, leaf in leaves.items()},
}))
"""


@pytest.mark.slow
def test_two_processes_convert_a_base_into_a_bucket_and_each_reads_its_own_part(tiny_config, tmp_path):
    bucket, target = Bucket(tmp_path / "bucket"), "gs://runs/base"
    try:

        def run(*command: str) -> list[tuple[int, str, str]]:
            environment = os.environ | bucket.environment | {"PYTHONPATH": str(ROOT)}
            piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running = [
                subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment | own, **piped)
                for own in environments(2)
            ]
            said = [process.communicate() for process in running]
            return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]

        source = tiny_config.model.base
        for code, said, errors in run("launch/convert.py", "from-hf", source, target, "--dtype", "float32"):
            assert code == 0 and f"use it with --model.base {target}" in said, errors[-3000:]
        for code, _, errors in run("launch/convert.py", "from-hf", source, target):
            assert code == 1 and "is there already" in errors
        read = []
        for code, said, errors in run("-c", READ, target):
            assert code == 0, errors[-3000:]
            read.append(json.loads(said.splitlines()[-1]))
    finally:
        bucket.kill()
    whole = {path: np.asarray(leaf[...]) for path, leaf in weights.flat_parameters(weights.load(source)).items()}
    for process in read:
        for path, value in whole.items():
            assert process["sums"][path] == pytest.approx(np.abs(value).sum(), rel=1e-4), path
        assert 0 < process["read"] < 0.7 * sum(value.nbytes for value in whole.values())
