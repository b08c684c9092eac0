"""Several processes on one machine, as on the hosts of a slice: the same losses as one, and one end for all."""

import dataclasses
import os
import signal
import socket
import time

import pytest

from tests.programs import start
from trace_jax.config import Config, Mesh, load_config
from trace_jax.training.metrics import read_metrics


def configured(config: Config, folder, steps: int) -> Config:
    training = dataclasses.replace(config.training, steps=steps, checkpoint_every=100)
    data = dataclasses.replace(config.data, weights=load_config("emoji_tiny").data.weights)
    loss = dataclasses.replace(config.loss, learn_temperature=True, both_directions=True)
    workdir = str(folder)
    return dataclasses.replace(config, workdir=workdir, training=training, data=data, loss=loss, mesh=Mesh(4, 2, 1))


def launch(config: Config, processes: int) -> list:
    """Starts training in so many processes that share eight CPU devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "JAX_NUM_CPU_DEVICES": str(8 // processes),
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    if processes == 1:
        return [start("train", config, JAX_NUM_CPU_DEVICES="8")]
    return [start("train", config, JAX_PROCESS_ID=str(i), **shared) for i in range(processes)]


def errors(running: list) -> list[str]:
    return [process.communicate()[1][-3000:] for process in running]


def losses(config: Config) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(config.run_dir)}


def test_two_processes_train_as_one(tiny_config, tmp_path):
    one, two = (configured(tiny_config, tmp_path / name, 4) for name in ("one", "two"))
    for config, processes in ((one, 1), (two, 2)):
        running = launch(config, processes)
        said = errors(running)
        assert [process.returncode for process in running] == [0] * processes, said
    assert set(losses(two)) == {1, 2, 3, 4}
    for step, loss in losses(one).items():
        assert abs(losses(two)[step] - loss) <= 1e-5 * loss


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
