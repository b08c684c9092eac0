import dataclasses
import types

import jax
import numpy as np
import pytest

from trace_jax.data.pipeline import _query_key, deal, retrieval_examples, tokenize, training_batches
from trace_jax.data.schema import TASKS
from trace_jax.data.tokenizer import Processor


@pytest.fixture(scope="module")
def processor(tiny_config):
    return Processor.from_hf(tiny_config.model.base, tiny_config.data)


def keys(batch):
    """The documents of a batch, whatever their order."""
    return sorted(batch.document_key[batch.query_index >= 0].tolist())


def test_a_batch_is_a_pure_function_of_seed_and_step(tiny_config, processor):
    first = training_batches(tiny_config, processor, shards=2)
    again = training_batches(tiny_config, processor, shards=2)
    straight = first.from_step(0, 2)
    resumed = again.from_step(3, 2)
    for _ in range(3):
        next(straight)
    jax.tree.map(np.testing.assert_array_equal, next(straight), next(resumed))
    other = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, seed=1))
    assert keys(first.batches[0]) != keys(training_batches(other, processor, shards=2).batches[0])


def test_hosts_share_the_same_global_batch(tiny_config, processor):
    whole = training_batches(tiny_config, processor, shards=4)
    parts = [training_batches(tiny_config, processor, shards=4, host=h, hosts=2) for h in range(2)]
    for step in range(3):
        together = sorted(key for part in parts for key in keys(part.batches[step]))
        assert together == keys(whole.batches[step])
        assert all(part.batches[step].task.shape[0] == 2 for part in parts)


def test_tasks_are_balanced_in_every_batch(tiny_config, processor):
    for step in range(3):
        tasks, counts = np.unique(
            training_batches(tiny_config, processor, shards=1).batches[step].task, return_counts=True
        )
        assert tasks.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
        assert (counts == 2).all()


def test_sub_batches_of_one_task_are_mixed_by_weight(tiny_config, processor):
    def tasks(same_task, hosts=1):
        data = dataclasses.replace(tiny_config.data, same_task=same_task, weights={"t2i": 3.0})
        config = dataclasses.replace(tiny_config, data=data)
        parts = [training_batches(config, processor, shards=2, host=h, hosts=hosts) for h in range(hosts)]
        return [[item.example.task for part in parts for item in part.examples[step]] for step in range(10)]

    blocks = np.array(tasks(4)).reshape(40, 4)
    assert (blocks == blocks[:, :1]).all()
    assert np.bincount(blocks[:, 0], minlength=9).tolist() == [12, 4, 4, 4, 4, 0, 4, 4, 4]
    assert tasks(4) == tasks(4, hosts=2)
    with pytest.raises(ValueError, match="same_task 16 does not divide the 8 pairs that a host reads"):
        tasks(16, hosts=2)


def test_shards_are_dealt_alike_loads():
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(100, 900)), int(rng.choice([0, 400, 600, 1000]))) for _ in range(512)]
    items = [types.SimpleNamespace(tokens=tokens, patches=patches) for tokens, patches in sizes]
    hands = deal(items, 16)
    assert sorted(id(item) for hand in hands for item in hand) == sorted(map(id, items))
    assert {len(hand) for hand in hands} == {32}
    for name in ("tokens", "patches"):
        loads = [sum(getattr(item, name) for item in hand) for hand in hands]
        assert max(loads) < 1.02 * np.mean(loads), name


def test_weights_choose_tasks_and_unknown_ones_are_named(tiny_config, processor):
    def weighted(**weights):
        data = dataclasses.replace(tiny_config.data, weights=weights)
        return training_batches(dataclasses.replace(tiny_config, data=data), processor, shards=1)

    others = {"t2t": 0.0, "t2it": 0.0, "i2t": 0.0, "i2i": 0.0, "it2t": 0.0, "it2it": 0.0}
    tasks = weighted(it2i=3.0, **others).batches[0].task
    assert (tasks == 7).sum() == 12 and (tasks == 0).sum() == 4
    with pytest.raises(ValueError, match="it2x"):
        weighted(it2x=1.0)


def test_targets_are_the_trace_and_then_emb(tiny_config, processor):
    batch = training_batches(tiny_config, processor, shards=1).batches[0]
    tokens = batch.inputs.tokens[0].reshape(-1)
    reasoned = 0
    for pair in np.flatnonzero(batch.query_index[0] >= 0):
        first, last = batch.first_index[0, pair], batch.query_index[0, pair]
        at = np.flatnonzero(
            (batch.target_index[0] >= first) & (batch.target_index[0] <= last) & (batch.target_weight[0] > 0)
        )
        wanted = [*tokens[first + 1 : last + 1], processor.emb]
        assert batch.target_token[0, at].tolist() == wanted
        assert batch.reasoned[0, pair] == (last > first)
        reasoned += last > first
    assert 0 < reasoned < batch.query_index.size
    assert not (tokens == processor.emb).any()


def test_own_document_is_among_the_positives(tiny_config, processor):
    batch = training_batches(tiny_config, processor, shards=1).batches[0]
    assert (batch.positives == batch.document_key[..., None]).any(axis=-1).all()


def test_a_query_is_the_same_under_any_id_and_with_any_answer(tiny_config, processor):
    """Text, pictures and task make it; the instruction, the zoom, and which right answer was drawn do not."""
    record = {"task_id": 0, "query_txt": "a dog", "images": [b"one"], "qid": "9:1", "pos_dids": ["9:5"]}
    assert _query_key(record) == _query_key(record | {"qid": "9:2", "pos_dids": ["9:6"]}) >= 0
    others = ({"task_id": 1}, {"query_txt": "a cat"}, {"images": [b"two"]}, {"images": []}, {"images": [b"one", b""]})
    assert len({_query_key(record | other) for other in others} | {_query_key(record)}) == 6
    one_task = {name: float(name == "t2i") for name in TASKS.values()}  # whose queries come back soon
    data = dataclasses.replace(tiny_config.data, weights=one_task)
    pipeline = training_batches(dataclasses.replace(tiny_config, data=data), processor, shards=2)
    found = {}
    for step in range(12):
        batch, names = pipeline.batches[step], pipeline.names(step)
        real = batch.query_index >= 0
        assert (batch.query_key[~real] == -1).all()
        for name, key in zip(names[real], batch.query_key[real], strict=True):
            assert found.setdefault(name, key) == key >= 0
    assert len(set(found.values())) > 1


def test_hard_negatives_are_of_pictures_and_never_right(tiny_config, processor):
    data = dataclasses.replace(tiny_config.data, hard_negatives=2)
    batch = training_batches(dataclasses.replace(tiny_config, data=data), processor, shards=2).batches[0]
    has_one = np.isin(batch.task, [4, 7]) & (batch.query_index >= 0)  # their own picture, at least
    assert has_one.any() and (batch.negative_index[has_one][:, 0] >= 0).all()
    assert (batch.negative_index[np.isin(batch.task, [1, 2, 3, 6])] == -1).all()
    for negative in np.moveaxis(batch.negative_key, -1, 0):
        assert not (negative[..., None] == batch.positives)[has_one].any()


def test_a_batch_that_cannot_be_dealt_is_refused(tiny_config, processor):
    with pytest.raises(ValueError, match="cannot be dealt"):
        training_batches(tiny_config, processor, shards=3)


def test_plain_contrastive_has_no_traces(tiny_config, processor):
    data = dataclasses.replace(tiny_config.data, trace="none")
    batch = training_batches(dataclasses.replace(tiny_config, data=data), processor, shards=1).batches[0]
    assert not batch.reasoned.any()
    assert batch.target_weight.sum() == (batch.query_index >= 0).sum()


def test_generative_examples_close_with_the_end_of_the_turn(tiny_config, processor):
    data = dataclasses.replace(tiny_config.data, source="generative")
    batch = training_batches(dataclasses.replace(tiny_config, data=data), processor, shards=1).batches[0]
    assert (batch.document_index == -1).all()
    assert (batch.target_token == processor.end).sum() == (batch.query_index >= 0).sum()


def test_what_fits_no_row_is_refused_by_name(tiny_config, processor):
    def changed(**data):
        return dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, **data))

    with pytest.raises(ValueError, match=r"^\d+:\d+: \d+ tokens are over --data.row-length 16; raise it"):
        training_batches(changed(row_length=16), processor, shards=1)
    with pytest.raises(ValueError, match="images of 64 patches, over --data.patch-row-length 32"):
        Processor.from_hf(tiny_config.model.base, changed(patch_row_length=32).data)


def test_a_trace_is_what_the_configuration_wants_of_it(tiny_config, processor):
    def targets(**options) -> dict[str, list[int]]:
        data = dataclasses.replace(tiny_config.data, max_trace_tokens=200, row_length=512, **options)  # nothing is cut
        config = dataclasses.replace(tiny_config, data=data)
        (examples,) = [source for name, source in retrieval_examples(config, "train", 0).items() if name == "it2i"]
        found = [tokenize(examples[i], processor, config) for i in range(6)]
        assert all(item.targets[-1] == processor.emb for item in found)
        return {item.example.name: item.targets[:-1] for item in found}

    whole, reasoning, answer = (targets(trace=kind) for kind in ("both", "reasoning", "answer"))
    tagged = targets(closing_tag="</think>")
    assert targets(trace="none") == {name: [] for name in whole}
    tag = processor.encode("</think>")
    for name, tokens in whole.items():
        text = processor.decode(tokens)
        assert text == f"{processor.decode(reasoning[name])} {processor.decode(answer[name])}".strip()
        assert tagged[name] == ([*tokens, *tag] if tokens else [])
    assert any(whole.values())


def test_pictures_among_the_candidates_may_write_traces_too(tiny_config):
    def items(**options):
        config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, **options))
        processor = Processor.from_hf(config.model.base, config.data)
        pipeline = training_batches(config, processor, shards=1)
        return processor, pipeline, [item for step in range(3) for item in pipeline.batch_of(step)]

    processor, pipeline, found = items(candidate_trace="both", hard_negatives=1)
    for item in found:
        assert len(item.document_targets) == len(item.documents)
        for document, (prompt, targets) in zip(item.documents, item.document_targets, strict=True):
            assert [*document.tokens[prompt:].tolist(), processor.emb] == targets
    assert all(len(item.document_targets[0][1]) > 1 for item in found if TASKS[item.example.task] == "t2i")
    assert all(len(item.document_targets[0][1]) == 1 for item in found if TASKS[item.example.task].endswith("2t"))
    batch = pipeline.batches[0]
    tokens, at = batch.inputs.tokens.reshape(-1), batch.target_index[0][batch.target_weight[0] > 0]
    told = batch.target_token[0][: len(at)]
    assert len(told) == sum(len(targets) for item in pipeline.batch_of(0) for _, _, targets in item.supervised)
    assert (tokens[at + 1] == told)[told != processor.emb].all()
    assert {*tokens[batch.document_index[0]]}.isdisjoint({processor.emb})
    _, _, short = items(candidate_trace="answer", hard_negatives=1)
    for item, other in zip(found, short, strict=True):
        whole, answer = (example.example.document_targets[0] for example in (item, other))
        assert whole.endswith(answer) and bool(whole) == bool(answer)


def test_the_embedding_may_be_of_the_closing_token_itself(tiny_config):
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, position="token"))
    processor = Processor.from_hf(config.model.base, config.data)
    batch = training_batches(config, processor, shards=1).batches[0]
    usual = training_batches(tiny_config, processor, shards=1).batches[0]
    tokens = batch.inputs.tokens.reshape(-1)
    for index in (batch.query_index, batch.document_index):
        assert (tokens[index[0]] == processor.emb).all()
    np.testing.assert_array_equal(batch.target_token, usual.target_token)
    emitted = (batch.target_token == processor.emb) & (batch.target_weight > 0)
    np.testing.assert_array_equal(np.sort(batch.target_index[emitted]), np.sort(batch.query_index[0] - 1))
