"""A retriever with random weights on the tiny release, and a run that went through every stage with it."""

import dataclasses

import jax
import pytest

from trace_jax import sharding
from trace_jax.config import Config, Mesh
from trace_jax.data.tokenizer import Processor
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.evaluation import evaluate
from trace_jax.retrieval.index import build_indexes
from trace_jax.retrieval.pools import embed_candidates
from trace_jax.training.train import load_model, model_identity


@pytest.fixture(scope="session")
def benchmark_(tiny_config) -> Benchmark:
    return Benchmark(tiny_config)


@pytest.fixture(scope="session")
def retriever(tiny_config) -> Retriever:
    """On one device: compiling for eight takes longer than all that is tested here."""
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    processor = Processor.from_hf(tiny_config.model.base, tiny_config.data)
    model, identity = load_model(tiny_config, processor, mesh), model_identity(tiny_config)
    return Retriever(model, processor, tiny_config, mesh, step=0, identity=identity)


@pytest.fixture(scope="session")
def retrained(tiny_config, retriever) -> Retriever:
    """The same step of the same base, trained otherwise."""
    config = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, seed=1))
    model = load_model(config, retriever.processor, retriever.mesh)
    return Retriever(model, retriever.processor, tiny_config, retriever.mesh, step=0, identity=retriever.identity)


@pytest.fixture(scope="session")
def evaluated(tiny_config, benchmark_, retriever, tmp_path_factory) -> tuple[Config, dict]:
    """The configuration of a run that was embedded, indexed and evaluated, and its metrics."""
    config = dataclasses.replace(tiny_config, workdir=str(tmp_path_factory.mktemp("evaluated")))
    assert embed_candidates(config, retriever, benchmark_) == len(benchmark_.candidates)
    assert build_indexes(config, benchmark_) == len(benchmark_.all_pools)
    metrics, encoded = evaluate(config, retriever, benchmark_, ("direct",))
    assert encoded > 0
    return config, metrics
