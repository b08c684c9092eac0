"""Which losses stop a run."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.data.schema import Batch
from trace_jax.training.guard import FEWEST, Guard
from trace_jax.training.losses import Mean


def guard(config, spike=3.0):
    training = dataclasses.replace(config.training, spike=spike)
    names = types.SimpleNamespace(names=lambda step: np.array([[f"record {step}"]]))
    return Guard(dataclasses.replace(config, training=training), names)


def look(guard, step, loss, norm=1.0):
    fields = {name: np.zeros(1) for name in Batch._fields if name != "inputs"}
    batch = Batch(inputs=tiny.inputs(), **fields)
    one = jnp.ones(())
    guard.look(step, batch, {"loss": Mean(jnp.float32(loss), one), "gradient_norm": Mean(jnp.float32(norm), one)})


def calm(guard, steps=FEWEST):
    for step in range(1, steps + 1):
        look(guard, step, 1.0 + 0.1 * (step % 3))
    return steps + 1


def test_a_leap_stops_one_step_later_and_names_the_record(fresh_config, tmp_path):
    (tmp_path / "run").mkdir()
    watched = guard(fresh_config)
    step = calm(watched)
    look(watched, step, 3.5)
    with pytest.raises(FloatingPointError, match=rf"leaps to 3.5 at step {step}; the median of the {FEWEST} .* 1.1 "):
        look(watched, step + 1, 1.0)
    assert np.load(tmp_path / "run" / f"bad_batch_{step}.npz")["names"].tolist() == [[f"record {step - 1}"]]


def test_what_is_left_is_judged_before_a_checkpoint(fresh_config, tmp_path):
    (tmp_path / "run").mkdir()
    for loss, norm, reason in ((np.nan, 1.0, "the loss is not"), (np.inf, 1.0, "the loss is not"), (1, np.nan, "grad")):
        watched = guard(fresh_config)
        look(watched, 1, loss, norm)
        with pytest.raises(FloatingPointError, match=f"{reason}.*at step 1"):
            watched.settle()
        watched.settle()  # said once


def test_a_first_step_a_small_rise_and_a_switched_off_guard_do_not_stop(fresh_config):
    watched = guard(fresh_config)
    look(watched, 1, 50.0)
    step = calm(watched, 2 * FEWEST)
    look(watched, step, 3.2)
    watched.settle()
    watched = guard(fresh_config, spike=0.0)
    look(watched, calm(watched), 1e9)
    watched.settle()
