"""Tests run on eight CPU devices, with strict promotion of dtypes and ranks; warnings are errors (pyproject.toml)."""

import atexit
import dataclasses
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA:CPU sizes its pool of threads by this. Devices that wait for each other in a collective hold one each: with as few
# threads as devices, what they wait for may find none and the program hangs.
os.environ.setdefault("NPROC", "32")
# Tests compile much and compute little.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests trace the same program anew: a process compiles it once.
COMPILED = tempfile.TemporaryDirectory(prefix="trace_jax_compiled_")
atexit.register(COMPILED.cleanup)
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

from trace_jax.config import Config, Data, Evaluation, Lora, Loss, Mesh, Model, Optimizer, Training
from trace_jax.data.builders import mbeir
from trace_jax.data.emoji import release
from trace_jax.training import base


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory) -> pathlib.Path:
    """The tiny emoji release."""
    folder = tmp_path_factory.mktemp("tiny") / "data" / "tiny" / "release"
    release.build("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_release) -> Config:
    """A complete experiment in miniature: the tiny emoji release, a random base of a few thousand parameters."""
    root = tiny_release.parents[2]
    mbeir.build(tiny_release, tiny_release.parent)
    config = Config(
        name="tiny",
        workdir=str(root / "run"),
        model=Model(
            base=str(root / "base"),
            lora=Lora(rank=4, alpha=8.0),
            dtype="float32",
            param_dtype="float32",
            scan_layers=True,
            remat="none",
        ),
        data=Data(
            root=str(root / "data"),
            release="tiny",
            prompts="short",
            batch_size=16,
            row_length=128,
            patch_row_length=64,
            min_pixels=14 * 14,
            max_pixels=56 * 56,
            max_text_tokens=64,
            max_trace_tokens=48,
            jitter=0.1,
        ),
        loss=Loss(vocabulary_chunk=64),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2),
        mesh=Mesh(data=1, fsdp=1, tensor=-1),
        training=Training(steps=6, log_every=1, checkpoint_every=100),
        evaluation=Evaluation(batch_size=16, max_trace_tokens=8),
    )
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            base,
            "LANGUAGE",
            base.LANGUAGE
            | small
            | {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
            },
        )
        patch.setattr(
            base,
            "VISION",
            base.VISION
            | {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 48,
                "fullatt_block_indexes": [1],
            },
        )
        base.make_start(config)
    return config


@pytest.fixture
def fresh_config(tiny_config, tmp_path) -> Config:
    """`tiny_config` with a run directory of its own."""
    return dataclasses.replace(tiny_config, workdir=str(tmp_path / "run"))
