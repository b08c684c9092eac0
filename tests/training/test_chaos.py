"""Runs that are killed again and again, on local disk and in a bucket, end with the parameters of one left in peace."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.bucket import Bucket
from tests.programs import flags, start
from trace_jax.config import ROOT, Config, load_config

KILLS = 20
STEPS, EVERY = 300, 3  # of a run, and between its checkpoints
# Prints the step of the newest checkpoint and the hash of all its parameters.
DIGEST = """
import hashlib, sys
import numpy as np
from trace_jax import config, sharding
from trace_jax.data.tokenizer import Processor
from trace_jax.model.weights import flat_parameters
from trace_jax.training.train import restore_model
chosen = config.load_config("emoji_tiny", sys.argv[1:])
processor = Processor.from_hf(chosen.model.base, chosen.data)
step, model = restore_model(chosen, processor, sharding.make_mesh(chosen.mesh))
digest = hashlib.sha256()
for path, leaf in sorted(flat_parameters(model).items()):
    digest.update(path.encode() + np.asarray(leaf[...]).tobytes())
print(step, digest.hexdigest())
"""


def configured(config: Config, workdir: str, steps: int, every: int) -> Config:
    training = dataclasses.replace(config.training, steps=steps, checkpoint_every=every)
    data = dataclasses.replace(config.data, weights=load_config("emoji_tiny").data.weights)
    return dataclasses.replace(config, workdir=workdir, training=training, data=data)


def digest(config: Config, **environment: str) -> str:
    command = [sys.executable, "-c", DIGEST, *flags(config)]
    more = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    ran = subprocess.run(command, cwd=ROOT, env=more, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.splitlines()[-1]


def finish(config: Config, **environment: str) -> str:
    process = start("train", config, **environment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return errors


@pytest.fixture
def bucket(tmp_path):
    server = Bucket(tmp_path / "bucket")
    yield server
    server.kill()


@pytest.mark.slow
def test_a_bucket_that_dies_during_a_save_loses_nothing(tiny_config, tmp_path, bucket):
    local = configured(tiny_config, str(tmp_path / "local"), 12, 4)
    finish(local)
    remote = configured(tiny_config, "gs://runs/one", 12, 4)
    process = start("train", remote, **bucket.environment)
    while not any("checkpoints" in name for name in bucket.objects()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    bucket.kill()
    time.sleep(3)
    bucket.start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert digest(remote, **bucket.environment) == digest(local)
    assert any("metrics.jsonl" in name for name in bucket.objects())


@pytest.fixture(scope="module")
def straight(tiny_config, tmp_path_factory):
    """The digest of a run that is left in peace, and the seconds up to its first checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    config = configured(tiny_config, str(folder), STEPS, EVERY)
    began = time.monotonic()
    process = start("train", config)
    while not newest(folder):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    ready = time.monotonic() - began
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return digest(config), ready


def newest(run: pathlib.Path) -> int:
    """The step of the newest checkpoint, which may not be whole yet."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "bucket"])
def test_killed_at_random_it_ends_with_the_same_parameters(tiny_config, tmp_path, straight, bucket, place):
    expected, ready = straight
    folder = {"local": tmp_path / "killed", "bucket": tmp_path / "bucket" / "runs" / "killed"}[place]
    environment = bucket.environment if place == "bucket" else {}
    killed = configured(tiny_config, "gs://runs/killed" if place == "bucket" else str(folder), STEPS, EVERY)
    rng, ended = random.Random(0), []
    for _ in range(KILLS):
        began, goal = newest(folder), EVERY * rng.randint(0, 4)
        process = start("train", killed, **environment)
        if not goal:
            time.sleep(rng.uniform(0, ready))  # while it starts
        while process.poll() is None and newest(folder) < began + goal:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # in a step, or while its checkpoint is written
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        ended.append(process.returncode)
    # It was still at work, each time, and ended by nothing else.
    assert len(set(ended)) > 1 and set(ended) <= {-signal.SIGKILL, -signal.SIGTERM, os.EX_TEMPFAIL}
    assert "going on from checkpoint" in finish(killed, **environment)
    assert digest(killed, **environment) == expected
