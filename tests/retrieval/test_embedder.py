"""Queries and documents of every form become vectors, whatever their company; pools survive a kill."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Mesh, to_json
from trace_jax.data.schema import MARK, Document, Query
from trace_jax.data.tokenizer import Processor, TextTooLongError, append
from trace_jax.model.qwen2_5_vl import take_states
from trace_jax.retrieval import embedder, pools
from trace_jax.retrieval.artifacts import MissingStageError
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.generation import cache_bytes, compilations
from trace_jax.retrieval.pools import CandidateVectors, embed_candidates
from trace_jax.training.checkpoint import CheckpointError, read_config
from trace_jax.training.train import load_model


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
    together = retriever.encode_document(documents).embeddings
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    order = np.random.default_rng(1).permutation(len(documents))
    shuffled = retriever.encode_document([documents[i] for i in order]).embeddings
    np.testing.assert_allclose(shuffled, together[order], atol=2e-5)
    alone = retriever.encode_document(documents[:1]).embeddings
    np.testing.assert_allclose(alone, together[:1], atol=2e-5)
    assert retriever.encode_document([]).embeddings.shape == (0, together.shape[1])


def test_too_little_room_only_takes_more_batches(retriever, documents):
    rooms = {kind: dataclasses.replace(room, rows=1) for kind, room in retriever.rooms_for(documents).items()}
    np.testing.assert_allclose(
        retriever.encode_document(documents, rooms=rooms).embeddings,
        retriever.encode_document(documents).embeddings,
        atol=2e-5,
    )


def test_an_item_that_no_room_fits_gets_its_own(retriever, queries):
    """A sample may hold one image an item, and an item many."""
    one = [query for query in queries if query.images][:3]
    several = tuple(png(np.full((14, 14, 3), grey, np.uint8)) for grey in (0, 90, 180, 255))
    many = [Query(f"first {MARK}{MARK} then {MARK}{MARK}", several, "Find."), *one]
    rooms = {True: dataclasses.replace(retriever.rooms_for(one)[True], patch_rows=1)}
    for mode in ("direct", "always"):
        tight, roomy = (retriever.encode_query(many, mode, rooms=each) for each in (rooms, None))
        np.testing.assert_allclose(tight.embeddings, roomy.embeddings, atol=2e-5)
        assert tight.traces == roomy.traces


def test_rooms_of_a_sample_leave_seats_for_shorter_items(retriever, documents):
    texts = [Document("a cat", None)] * 64
    room = retriever.rooms_for([Document("a cat with a long tail on a green sofa", None)] * 16)[False]
    assert room.sequences == 32
    held = [(members >= 0).sum() for members, _ in retriever._packer.deal(_read(retriever, texts), {False: room})]
    assert max(held) > 16


def _read(retriever: Retriever, documents: list[Document]) -> list:
    return [retriever.processor.document(document) for document in documents]


def test_an_item_longer_than_a_row_is_named(retriever, queries):
    pictures = tuple(png(np.full((56, 56, 3), grey, np.uint8)) for grey in range(16))
    long = Query(MARK * len(pictures), pictures, "Find.")
    with pytest.raises(ValueError, match=r"^query 1: .* tokens with its images, and a row has"):
        retriever.encode_query([queries[0], long], "direct")
    kept = retriever.encode_query([queries[0], long], "direct", on_error="skip")
    assert kept.errors[0] == "" and "data.row_length" in kept.errors[1] and not kept.embeddings[1].any()


def test_queries_do_not_depend_on_their_company(retriever, queries):
    together = retriever.encode_query(queries, "adaptive")
    np.testing.assert_allclose(np.linalg.norm(together.embeddings, axis=1), 1, atol=1e-5)
    for i in (0, len(queries) - 1):
        alone = retriever.encode_query([queries[i]], "adaptive")
        np.testing.assert_allclose(alone.embeddings[0], together.embeddings[i], atol=2e-5)
        assert alone.traces[0] == together.traces[i]
        assert alone.trace_tokens[0] == together.trace_tokens[i]


def test_slots_are_filled_from_window_to_window(retriever, queries, monkeypatch):
    """Windows are one stream, which only a prompt that is longer than all before interrupts."""
    caches, generate = [], embedder.generate

    def counted(*arguments, **options):
        caches.append(options["longest"])
        return generate(*arguments, **options)

    expected = retriever.encode_query(queries, "always")
    monkeypatch.setattr(embedder, "generate", counted)
    monkeypatch.setattr(embedder, "WINDOW", 4)
    order = np.argsort(expected.prompt_tokens, kind="stable")
    for rising, some in ((True, order), (False, order[::-1])):
        caches.clear()
        found = retriever.encode_query([queries[i] for i in some], "always")
        assert found.traces == [expected.traces[i] for i in some]
        np.testing.assert_allclose(found.embeddings, expected.embeddings[some], atol=2e-5)
        np.testing.assert_array_equal(found.prompt_tokens, expected.prompt_tokens[some])
        assert caches == sorted(set(caches)) and (len(caches) > 1) == rising
    assert len(queries) > 2 * 4


def test_shards_are_those_of_single_calls(retriever, documents):
    """And the devices have work when the first one is asked for: the next ones have been read."""
    shards, read = [documents[:9], documents[9:10], documents[10:]], []
    rooms = retriever.rooms_for(documents)

    def parts(shards=shards):
        for shard in shards:
            read.append(len(shard))
            yield shard, [f"candidate {i}" for i in range(len(shard))]

    for shard, vectors in zip(shards, retriever.encode_shards(parts(), rooms=rooms), strict=True):
        assert read == [9, 1, len(documents) - 10]
        np.testing.assert_array_equal(vectors, retriever.encode_document(shard, rooms=rooms).embeddings)
    with pytest.raises(ValueError, match="^candidate 1: "):
        list(retriever.encode_shards(parts([[documents[0], Document(image=b"no image")]]), rooms=rooms))


def test_nothing_is_compiled_after_warming_up(retriever, queries):
    options = dataclasses.replace(retriever.config.evaluation, batch_size=32)
    warm = retriever.configured(dataclasses.replace(retriever.config, evaluation=options))
    jobs = [(some, mode) for some in (queries, queries[:1], queries[::2]) for mode in ("adaptive", "direct")]
    expected = [retriever.encode_query(some, mode) for some, mode in jobs]
    warm.warm_up(queries)
    before = compilations()[0], embedder._read.compilations
    for (some, mode), wanted in zip(jobs, expected, strict=True):
        found = warm.encode_query(some, mode)
        np.testing.assert_allclose(found.embeddings, wanted.embeddings, atol=2e-5)
        assert found.traces == wanted.traces
    warm.encode_document([Document(query.text) for query in queries if not query.images])
    assert (compilations()[0], embedder._read.compilations) == before


def test_direct_queries_are_read_like_documents(retriever, queries):
    direct = retriever.encode_query(queries, "direct")
    assert not direct.reasoned.any()
    assert direct.traces == [""] * len(queries)
    assert direct.seconds > 0
    given = retriever.encode_query_with_trace(queries, [""] * len(queries)).embeddings
    np.testing.assert_allclose(direct.embeddings, given, atol=2e-5)
    traced = retriever.encode_query_with_trace(queries, ["a red square."] * len(queries)).embeddings
    assert (np.abs(traced - given).max(axis=1) > 1e-3).all()


def changed(retriever: Retriever, **data) -> Retriever:
    """The same model under other options of the data."""
    config = dataclasses.replace(retriever.config, data=dataclasses.replace(retriever.config.data, **data))
    processor = Processor.from_hf(config.model.base, config.data)
    known = {"identity": retriever.identity, "digest": retriever.digest}
    return Retriever(retriever.model, processor, config, retriever.mesh, step=0, **known)


def test_the_embedding_may_be_the_state_of_emb_itself(retriever, queries, documents):
    other = changed(retriever, position="token")
    assert other.key != retriever.key
    sequence = append(other.processor.document(documents[0]), [other.processor.emb])
    ((members, rows),) = other._packer.deal([sequence], other._packer.rooms([sequence]))
    state = np.asarray(take_states(retriever.model(rows.inputs), rows.last))[0, list(members).index(0)]
    found = other.encode_document(documents[:3]).embeddings
    np.testing.assert_allclose(found[0], state / np.linalg.norm(state), atol=2e-5)
    direct = other.encode_query(queries, "direct")
    given = other.encode_query_with_trace(queries, [""] * len(queries)).embeddings
    np.testing.assert_allclose(direct.embeddings, given, atol=2e-5)
    always, before = other.encode_query(queries[:3], "always"), retriever.encode_query(queries[:3], "always")
    assert always.traces == before.traces
    assert (np.abs(always.embeddings - before.embeddings).max(axis=1) > 1e-3).all()


def test_candidates_that_were_trained_to_may_reason(retriever, documents):
    other = changed(retriever, candidate_trace="answer")
    assert other.key != retriever.key
    found = other.encode_document(documents[:5])
    assert found.reasoned.any() and not retriever.encode_document(documents[:5]).reasoned.any()
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)


def test_always_reasons_within_the_limit(retriever, queries):
    always = retriever.encode_query(queries[:4], "always")
    assert always.reasoned.all()
    assert (always.trace_tokens >= 1).all()
    assert (always.trace_tokens <= retriever.config.evaluation.max_trace_tokens).all()


def test_shards_do_not_change_the_result(tiny_config, retriever, documents, queries):
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=1, tensor=4))
    config = dataclasses.replace(tiny_config, mesh=Mesh(data=2, fsdp=1, tensor=4))
    sharded = Retriever.load(config, untrained=True)
    assert sharding.data_shards(mesh) == 2
    assert sharded.digest == retriever.digest and sharded.key == retriever.key
    np.testing.assert_allclose(
        sharded.encode_document(documents).embeddings, retriever.encode_document(documents).embeddings, atol=2e-5
    )
    one, other = sharded.encode_query(queries[:5], "direct"), retriever.encode_query(queries[:5], "direct")
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=2e-5)


@pytest.mark.slow
def test_reasoning_is_the_same_on_a_mesh(tiny_config, retriever, queries):
    config = dataclasses.replace(tiny_config, mesh=Mesh(data=2, fsdp=2, tensor=2))
    sharded = Retriever.load(config, untrained=True)
    for _ in range(2):
        found, expected = (each.encode_query(queries, "always") for each in (sharded, retriever))
        assert found.traces == expected.traces
        np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-5)
        compiled = compilations()
    sharded.encode_query(queries[::-1], "always")
    assert compilations() == compiled


def test_a_users_long_text_is_refused_and_a_data_sets_is_cut(retriever):
    long = "a red square and " * 100
    with pytest.raises(TextTooLongError, match="limit is 64"):
        retriever.encode_query([Query(long)], cut=False)
    assert retriever.encode_document([Document(long)]).embeddings.shape[0] == 1


def test_an_unreadable_image_is_named(retriever):
    with pytest.raises(ValueError, match="candidate 7:1"):
        retriever.encode_document([Document(image=b"no image")], names=["candidate 7:1"])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_an_image_may_come_in_many_forms(retriever, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    file = tmp_path / "picture.png"
    file.write_bytes(png(pixels))
    forms = [file.read_bytes(), str(file), file, Image.fromarray(pixels), pixels]
    queries = [{"text": "but blue", "image": form, "instruction": "Find it."} for form in forms]
    found = retriever.encode_query([*queries, Query("but blue", forms[0], "Find it.")], "direct").embeddings
    np.testing.assert_allclose(found, np.repeat(found[:1], len(found), axis=0), atol=1e-6)
    alone = retriever.encode_document(
        [{"image": pixels}, Document(image=forms[0]), "text", {"text": "text"}]
    ).embeddings
    np.testing.assert_allclose(alone[0], alone[1], atol=1e-6)
    np.testing.assert_allclose(alone[2], alone[3], atol=1e-6)


BAD = {
    "empty query": "  ",
    "no such image file": {"image": "/nowhere/picture.png"},
    "not a readable image": {"text": "x", "image": b"no image"},
    "unknown picture": {"text": "x", "picture": b""},
    "the image is a list": {"image": [1, 2]},
    "pixels float32": {"image": np.zeros((4, 4, 3), np.float32)},
    "a int cannot be embedded": 7,
    "half of a character": "a\ud800",
    "the image cannot be read": {
        "image": Image.open(io.BytesIO(png(np.eye(64, dtype=np.uint8)[..., None].repeat(3, 2))[:-40]))
    },
    "limit is 64": "a red square and " * 100,
}


def test_a_bad_item_does_not_sink_the_rest(retriever):
    items = ["a red square", *BAD.values(), "a blue one"]
    encoded = retriever.encode_query(items, "always", cut=False, on_error="skip", progress=True)
    for i, message in enumerate(BAD, start=1):
        assert encoded.errors[i].startswith(f"query {i}") and message in encoded.errors[i]
        with pytest.raises((ValueError, TypeError), match=message):
            retriever.encode_query([items[i]], cut=False)
    assert encoded.errors[0] == encoded.errors[-1] == ""
    assert not encoded.embeddings[1:-1].any() and not encoded.prompt_tokens[1:-1].any()
    good = retriever.encode_query(["a red square", "a blue one"], "always")
    np.testing.assert_allclose(encoded.embeddings[[0, -1]], good.embeddings, atol=2e-5)
    assert [encoded.traces[0], encoded.traces[-1]] == good.traces
    np.testing.assert_array_equal(encoded.prompt_tokens[[0, -1]], good.prompt_tokens)
    documents = retriever.encode_document(["a red square", "", b""], on_error="skip")
    assert documents.embeddings[0].any() and all(documents.errors[1:])
    with pytest.raises(ValueError, match="neither 'raise' nor 'skip'"):
        retriever.encode_query([""], on_error="ignore")


def evaluating(retriever, **changes) -> Retriever:
    """The same model with other options of evaluation."""
    options = dataclasses.replace(retriever.config.evaluation, **changes)
    return retriever.configured(dataclasses.replace(retriever.config, evaluation=options))


def test_vectors_cut_to_their_first_features(retriever, documents, queries):
    short = evaluating(retriever, dimensions=16)
    assert short.key != retriever.key and short.whole_key == retriever.whole_key
    for whole, cut in (
        (retriever.encode_document(documents).embeddings, short.encode_document(documents).embeddings),
        (retriever.encode_query(queries, "direct").embeddings, short.encode_query(queries, "direct").embeddings),
    ):
        assert cut.shape[1] == 16
        expected = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
        np.testing.assert_allclose(cut, expected, atol=1e-5)
    with pytest.raises(ValueError, match="the model has 48"):
        evaluating(retriever, dimensions=49)


@pytest.mark.parametrize("dtypes", [("float32", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")], ids=str)
def test_a_base_in_fewer_bits_changes_embeddings_a_little(retriever, documents, queries, dtypes):
    """With adapters that change more than rounding does: each dtype has its own way to fold them."""
    dtype, param_dtype = dtypes
    config = dataclasses.replace(
        retriever.config, model=dataclasses.replace(retriever.config.model, dtype=dtype, param_dtype=param_dtype)
    )
    found = {}
    for name, chosen in (("whole", retriever.config), ("small", config)):
        base = tiny.train_adapters(load_model(chosen, retriever.processor, retriever.mesh))
        found[name] = Retriever(base, retriever.processor, chosen, retriever.mesh, step=0, identity=retriever.identity)
    assert found["small"].key != found["whole"].key
    whole, small = (found[name].encode_document(documents).embeddings for name in ("whole", "small"))
    rounding = (whole * small).sum(axis=1).min()
    assert 0.99 < rounding < 1 - 1e-6
    assert (whole * retriever.encode_document(documents).embeddings).sum(axis=1).max() < rounding
    assert found["small"].encode_query(queries[:3], "always").reasoned.all()


def test_memory_for_the_slots_changes_nothing_but_their_number(retriever, queries):
    row = cache_bytes(retriever.model.architecture.language, 64 + 8, "float32")
    frugal = evaluating(retriever, cache_gib=2.5 * row / 2**30, drafts=0)
    found, expected = (each.encode_query(queries, "always") for each in (frugal, retriever))
    assert found.traces == expected.traces
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-5)
    with pytest.raises(ValueError, match="cache-gib"):
        evaluating(retriever, cache_gib=0.5 * row / 2**30).encode_query(queries, "always")


def test_several_samples_are_averaged(retriever, queries):
    drawn = evaluating(retriever, temperature=1.0, samples=2)
    found = drawn.encode_query(queries[:4], "always")
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(drawn.encode_query(queries[2:4], "always").embeddings, found.embeddings[2:], atol=2e-5)


def random_item(rng: np.random.Generator):
    """Text of any Unicode, pictures of any mode and size, cut and broken files, wrong types."""
    kind = rng.integers(10)
    if kind < 4:
        ranges = [(0, 128), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000), (0xD800, 0xE000)]
        low, high = ranges[rng.choice(5, p=[0.4, 0.2, 0.2, 0.15, 0.05])]
        text = "".join(map(chr, rng.integers(low, high, int(rng.choice([0, 1, 7, 80, 3000])))))
        return text if kind else {"text": text, "image": None, "instruction": text[:5]}
    mode = rng.choice(["RGB", "RGBA", "L", "1", "P", "CMYK", "LA", "I;16"])
    size = tuple(np.exp(rng.uniform(0, 5, 2)).astype(int).tolist())
    file = io.BytesIO()
    image = Image.new(mode, size, int(rng.integers(256)) if mode in ("L", "1", "P", "I;16") else None)
    if kind == 4:
        return {"image": image}
    if kind == 5:
        return {"text": "x", "image": rng.integers(0, 256, rng.integers(0, 9, 3)).astype(np.uint8)}
    suffix = "PNG" if mode in ("RGBA", "LA", "P", "I;16", "1") else str(rng.choice(["TIFF", "JPEG"]))
    image.save(file, suffix)
    data = bytearray(file.getvalue())
    if kind == 6:
        data = data[: int(rng.integers(len(data)))]
    elif kind == 7:
        for at in rng.integers(len(data), size=5):
            data[at] = rng.integers(256)
    elif kind == 8:
        return rng.choice(np.array([None, 3, b"x", (), "<|emb|><|image_pad|><|im_end|>"], object))
    return {"text": "<|vision_start|>\0", "image": bytes(data)}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_whatever_comes_gives_a_vector_or_an_error(retriever, count):
    rng = np.random.default_rng(count)
    items = [random_item(rng) for _ in range(count)]
    queries = retriever.encode_query(items, "always", on_error="skip")
    documents = retriever.encode_document(
        [{k: v for k, v in item.items() if k != "instruction"} if isinstance(item, dict) else item for item in items],
        on_error="skip",
    )
    for encoded in (queries, documents):
        lengths = np.linalg.norm(encoded.embeddings, axis=1)
        np.testing.assert_allclose(lengths, [0.0 if error else 1.0 for error in encoded.errors], atol=1e-5)
        assert 0.2 * count < np.count_nonzero(lengths) < 0.95 * count  # both do happen
    assert (queries.trace_tokens <= retriever.config.evaluation.max_trace_tokens).all()


def test_a_run_is_loaded_from_its_folder(tiny_config, tmp_path):
    folder = tmp_path / "moved"
    meta = folder / "checkpoints" / "6" / "meta"
    meta.mkdir(parents=True)
    (meta / "metadata").write_text(json.dumps({"config": to_json(tiny_config)}))
    assert read_config(folder) == dataclasses.replace(tiny_config, workdir=str(folder))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Retriever.load(str(tmp_path))


def test_without_a_checkpoint_the_error_says_what_to_run(fresh_config):
    with pytest.raises(MissingStageError, match="make quickstart"):
        Retriever.load(fresh_config)


def test_keys_tell_checkpoints_and_lengths_apart(retriever, retrained):
    def key(**changes) -> str:
        data = dataclasses.replace(retriever.config.data, **changes)
        return retriever.configured(dataclasses.replace(retriever.config, data=data)).key

    assert key() == retriever.key != retrained.key
    assert (retrained.step, retrained.identity) == (retriever.step, retriever.identity)
    assert key(max_text_tokens=9) != retriever.key
    assert key(batch_size=9) == retriever.key


def test_embedding_goes_on_after_a_kill(fresh_config, benchmark_, retriever, monkeypatch, evaluated):
    config, store = fresh_config, CandidateVectors(fresh_config, benchmark_, retriever.whole_key)
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
    rows = np.arange(len(benchmark_.candidates))
    with pytest.raises(MissingStageError, match=r"not all embedded: .*00001\.npy is missing"):
        store.read(rows)
    assert embed_candidates(config, retriever, benchmark_) == len(benchmark_.candidates) - pools.SHARD
    np.testing.assert_array_equal(store.read(rows), whole.read(rows))
    np.testing.assert_array_equal(store.read(rows[510:515]), whole.read(rows)[510:515])
    assert embed_candidates(config, retriever, benchmark_) == 0


def test_a_large_pool_has_larger_files_and_a_mesh_of_its_own(retriever, evaluated, benchmark_, tmp_path, monkeypatch):
    options = dataclasses.replace(evaluated[0].evaluation, pool_mesh=Mesh(data=1, fsdp=2), pool_batch_size=64)
    config = pools.for_pools(dataclasses.replace(evaluated[0], evaluation=options))
    assert (config.evaluation.mesh, config.evaluation.batch_size) == (options.pool_mesh, 64)
    mesh = sharding.make_mesh(config.evaluation.mesh, jax.devices()[:2])
    processor, identity = retriever.processor, retriever.identity
    split = Retriever(load_model(config, processor, mesh), processor, config, mesh, step=0, identity=identity)
    whole, other = CandidateVectors(config, benchmark_), dataclasses.replace(config, workdir=str(tmp_path / "run"))
    monkeypatch.setattr(pools, "LARGE", 600)
    monkeypatch.setattr(pools, "LARGE_SHARD", 600)
    total = len(benchmark_.candidates)
    assert embed_candidates(other, split, benchmark_) == total
    large = CandidateVectors(other, benchmark_)
    assert large.shards == -(-total // 600) and len(large.rows_of(large.shards - 1)) == total - 600 * (large.shards - 1)
    rows = np.arange(total)
    assert whole.shard == pools.SHARD
    assert (large.read(rows) * whole.read(rows)).sum(axis=1).min() > 0.9999
    with pytest.raises(MissingStageError, match="not embedded"):  # small files of what is a large pool now
        CandidateVectors(config, benchmark_)


def copied(config, tmp_path):
    """A run with the vectors of another one."""
    shutil.copytree(epath.Path(config.run_dir) / "embeddings", tmp_path / "run" / "embeddings")
    return dataclasses.replace(config, workdir=str(tmp_path / "run"))


def test_vectors_of_another_checkpoint_lie_beside(benchmark_, retriever, retrained, evaluated, tmp_path, monkeypatch):
    config = copied(evaluated[0], tmp_path)
    first = CandidateVectors(config, benchmark_)
    rows, before = np.arange(3), first.read(np.arange(3))
    monkeypatch.setattr(Retriever, "encode_shards", lambda _, shards, **__: (np.zeros((len(s), 48)) for s, _ in shards))
    assert embed_candidates(config, retrained, benchmark_) == len(benchmark_.candidates)
    second = CandidateVectors(config, benchmark_)
    assert second.key != first.key and not second.read(rows).any()
    assert embed_candidates(config, retriever, benchmark_) == 0
    assert CandidateVectors(config, benchmark_).key == first.key
    np.testing.assert_array_equal(first.read(rows), before)


def test_stored_vectors_are_cut_where_they_are_read(benchmark_, retriever, evaluated, tmp_path):
    config, short = copied(evaluated[0], tmp_path), evaluating(retriever, dimensions=16)
    whole = CandidateVectors(config, benchmark_)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, dimensions=16))
    assert embed_candidates(config, short, benchmark_) == 0
    cut, rows = CandidateVectors(config, benchmark_), np.array([0, 3, 511, 512])
    assert cut.folder == whole.folder and cut.index_key != whole.index_key
    expected = whole.read(rows)[:, :16]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(cut.read(rows), expected, atol=1e-6)
    cut.folder.joinpath("00001.npy").unlink()
    assert embed_candidates(config, short, benchmark_) == min(pools.SHARD, len(benchmark_.candidates) - pools.SHARD)
    assert whole.read(rows).shape == (4, 48)  # of all features again
    np.testing.assert_allclose(cut.read(rows), expected, atol=1e-6)


def test_vectors_are_stored_in_bfloat16(benchmark_, retriever, evaluated):
    store = CandidateVectors(evaluated[0], benchmark_)
    stored = np.load(store.folder / "00000.npy")
    assert stored.dtype == np.uint16 and stored.shape == (pools.SHARD, 48)
    vectors = store.read(np.arange(5))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    fresh = retriever.encode_document([benchmark_.candidates.document(row) for row in range(5)]).embeddings
    np.testing.assert_allclose(vectors, fresh, atol=2**-8)


def test_a_damaged_shard_is_named_and_made_anew_alone(benchmark_, retriever, evaluated, tmp_path):
    config = copied(evaluated[0], tmp_path)
    store = CandidateVectors(config, benchmark_)
    shards = {path: path.read_bytes() for path in sorted(store.folder.iterdir())}
    assert [path.name for path in shards][:2] == ["00000.npy", "00000.npy.sha256"]
    damaged = bytearray(shards[store.folder / "00000.npy"])
    damaged[-7] ^= 1
    (store.folder / "00000.npy").write_bytes(bytes(damaged))
    with pytest.raises(MissingStageError, match=r"00000\.npy is damaged; run launch/embed\.py"):
        store.read(np.arange(3))
    assert store.read(np.array([512])).shape == (1, 48)
    assert embed_candidates(config, retriever, benchmark_) == pools.SHARD
    assert {path: path.read_bytes() for path in sorted(store.folder.iterdir())} == shards
    (store.folder / "00001.npy.sha256").unlink()
    assert not store.is_whole(1)
