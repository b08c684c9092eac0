import dataclasses

import numpy as np
import pytest

from trace_jax import sharding
from trace_jax.config import Mesh
from trace_jax.data.schema import Document, Query
from trace_jax.data.tokenizer import TextTooLongError
from trace_jax.retrieval import pools
from trace_jax.retrieval.artifacts import MissingStageError
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.pools import CandidateVectors, embed_candidates


@pytest.fixture(scope="module")
def documents(benchmark_) -> list[Document]:
    """Texts, images and both, of several lengths, mixed."""
    rows = np.linspace(0, len(benchmark_.candidates) - 1, 23).astype(int)
    return [benchmark_.candidates.document(int(row)) for row in np.random.default_rng(0).permutation(rows)]


@pytest.fixture(scope="module")
def queries(benchmark_) -> list[Query]:
    sets = [query_set for query_set in benchmark_.query_sets if query_set.split == "val"]
    return [query for query_set in sets for query in benchmark_.load(query_set).queries[:3]]


def test_documents_do_not_depend_on_their_company(retriever, documents):
    together = retriever.encode_documents(documents)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    order = np.random.default_rng(1).permutation(len(documents))
    shuffled = retriever.encode_documents([documents[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], atol=2e-5)
    alone = retriever.encode_documents(documents[:1])
    np.testing.assert_allclose(alone, together[:1], atol=2e-5)
    assert retriever.encode_documents([]).shape == (0, together.shape[1])


def test_too_little_room_only_takes_more_batches(retriever, documents):
    rooms = {kind: dataclasses.replace(room, rows=1) for kind, room in retriever.rooms_for(documents).items()}
    np.testing.assert_allclose(
        retriever.encode_documents(documents, rooms=rooms), retriever.encode_documents(documents), atol=2e-5
    )


def test_queries_do_not_depend_on_their_company(retriever, queries):
    together = retriever.encode_queries(queries, "adaptive")
    np.testing.assert_allclose(np.linalg.norm(together.embeddings, axis=1), 1, atol=1e-5)
    for i in (0, len(queries) - 1):
        alone = retriever.encode_queries([queries[i]], "adaptive")
        np.testing.assert_allclose(alone.embeddings[0], together.embeddings[i], atol=2e-5)
        assert alone.traces[0] == together.traces[i]
        assert alone.trace_tokens[0] == together.trace_tokens[i]


def test_direct_queries_are_read_like_documents(retriever, queries):
    direct = retriever.encode_queries(queries, "direct", timed=True)
    assert not direct.reasoned.any()
    assert direct.traces == [""] * len(queries)
    assert direct.seconds > 0
    given = retriever.encode_queries_with_traces(queries, [""] * len(queries))
    np.testing.assert_allclose(direct.embeddings, given, atol=2e-5)
    traced = retriever.encode_queries_with_traces(queries, ["a red square."] * len(queries))
    assert (np.abs(traced - given).max(axis=1) > 1e-3).all()


def test_always_reasons_within_the_limit(retriever, queries):
    always = retriever.encode_queries(queries[:4], "always")
    assert always.reasoned.all()
    assert (always.trace_tokens >= 1).all()
    assert (always.trace_tokens <= retriever.config.evaluation.max_trace_tokens).all()


def test_shards_do_not_change_the_result(tiny_config, retriever, documents, queries):
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=1, tensor=4))
    config = dataclasses.replace(tiny_config, mesh=Mesh(data=2, fsdp=1, tensor=4))
    sharded = Retriever.load(config, untrained=True)
    assert sharding.data_shards(mesh) == 2
    np.testing.assert_allclose(sharded.encode_documents(documents), retriever.encode_documents(documents), atol=2e-5)
    one, other = sharded.encode_queries(queries[:5], "direct"), retriever.encode_queries(queries[:5], "direct")
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=2e-5)


def test_a_users_long_text_is_refused_and_a_data_sets_is_cut(retriever):
    long = "a red square and " * 100
    with pytest.raises(TextTooLongError, match="limit is 64"):
        retriever.encode_queries([Query(long)], cut=False)
    assert retriever.encode_documents([Document(long)]).shape[0] == 1


def test_an_unreadable_image_is_named(retriever):
    with pytest.raises(ValueError, match="candidate 7:1"):
        retriever.encode_documents([Document(image=b"no image")], names=["candidate 7:1"])


def test_without_a_checkpoint_the_error_says_what_to_run(fresh_config):
    with pytest.raises(MissingStageError, match="make quickstart"):
        Retriever.load(fresh_config)


def test_keys_tell_checkpoints_and_lengths_apart(retriever):
    def key(**changes) -> str:
        config = dataclasses.replace(retriever.config, data=dataclasses.replace(retriever.config.data, **changes))
        return Retriever(
            retriever.model, retriever.processor, config, retriever.mesh, step=0, identity=retriever.identity
        ).key

    assert key() == retriever.key
    assert key(max_text_tokens=9) != retriever.key
    assert key(batch_size=9) == retriever.key


def test_embedding_goes_on_after_a_kill(fresh_config, benchmark_, retriever, monkeypatch, evaluated):
    config, store = fresh_config, CandidateVectors(fresh_config, benchmark_)
    whole = CandidateVectors(evaluated[0], benchmark_)
    write, written = CandidateVectors.write, []

    def die_at_the_second(self, shard, vectors):
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, vectors)

    monkeypatch.setattr(CandidateVectors, "write", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed_candidates(config, retriever, benchmark_)
    monkeypatch.undo()
    with pytest.raises(MissingStageError, match="not all embedded"):
        store.read(np.arange(3))
    assert embed_candidates(config, retriever, benchmark_) == len(benchmark_.candidates) - pools.SHARD
    rows = np.arange(len(benchmark_.candidates))
    np.testing.assert_array_equal(store.read(rows), whole.read(rows))
    np.testing.assert_array_equal(store.read(rows[510:515]), whole.read(rows)[510:515])
    assert embed_candidates(config, retriever, benchmark_) == 0


def test_vectors_of_another_checkpoint_are_made_anew(fresh_config, benchmark_, retriever):
    store = CandidateVectors(fresh_config, benchmark_)
    assert store.key is None
    for shard in range(store.shards):
        store.write(shard, np.zeros((1, 4), np.float32))
    assert store.missing() == []
    assert embed_candidates(fresh_config, retriever, benchmark_) == len(benchmark_.candidates)
    assert store.key == retriever.key
