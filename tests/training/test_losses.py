import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.config import Loss
from trace_jax.data.schema import Batch
from trace_jax.model.qwen2_5_vl import Head
from trace_jax.training.losses import (
    SCALE,
    Documents,
    bounded,
    info_nce,
    loss_parameters,
    normalize,
    read_out,
    take_states,
    token_cross_entropy,
)


def states(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("chunk", [1, 4, 12, 100])
def test_chunked_cross_entropy_equals_the_whole(chunk):
    hidden, head = states(0, 2, 12, 8), states(1, 30, 8)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 30)
    weights = (jnp.arange(24).reshape(2, 12) % 5 > 0).astype(jnp.float32)

    def chunked(hidden, head):
        return token_cross_entropy(hidden, Head(head), tokens, weights, chunk)[0].value()

    def whole(hidden, head):
        logs = jax.nn.log_softmax(jnp.einsum("std,vd->stv", hidden, head))
        picked = jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * weights) / jnp.sum(weights)

    for ours, theirs in zip(
        jax.value_and_grad(chunked, argnums=(0, 1))(hidden, head)[1],
        jax.value_and_grad(whole, argnums=(0, 1))(hidden, head)[1],
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(chunked(hidden, head), whole(hidden, head), rtol=1e-6)


def test_accuracy_is_of_the_right_tokens():
    head = jnp.eye(6)
    tokens = jnp.array([[0, 1, 2, 3]])
    hidden = jax.nn.one_hot(jnp.array([[0, 1, 5, 3]]), 6)
    _, correct = token_cross_entropy(hidden, Head(head), tokens, jnp.ones((1, 4)), 2)
    assert correct.tolist() == [[True, True, False, True]]


def reference_info_nce(queries, documents, valid, keys, query_keys, positives, temperature, both_directions):
    def wrong(i, j):
        known = keys[j] == keys[i] or keys[j] in positives[i] or (j < len(queries) and query_keys[j] == query_keys[i])
        return j != i and valid[j] and not known

    def loss(own, others):
        scores = np.array([own, *others]) / temperature
        return np.log(np.exp(scores).sum()) - scores[0]

    losses = []
    for i in np.flatnonzero(valid[: len(queries)]):
        own = queries[i] @ documents[i]
        forward = loss(own, [queries[i] @ documents[j] for j in range(len(documents)) if wrong(i, j)])
        pairs = np.flatnonzero(valid[: len(queries)])
        backward = loss(own, [queries[j] @ documents[i] for j in pairs if wrong(j, i)])
        losses.append((forward + backward) / 2 if both_directions else forward)
    return np.mean(losses)


@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize("hard", [0, 3])
def test_info_nce_masks_known_positives_duplicates_and_empty_slots(hard, both_directions):
    queries, documents = normalize(states(0, 7, 5)), normalize(states(1, 7 + hard, 5))
    valid = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 1][: 7 + hard], bool)
    keys = np.array([10, 11, 12, 10, 14, 15, 16, 17, 18, 12][: 7 + hard])
    positives = np.array([[10, 12], [11, -1], [12, -1], [10, -1], [14, 16], [15, -1], [16, -1]])
    query_keys = np.array([0, 1, 2, 3, 1, 5, 6])  # 1 and 4 ask the same, and know different answers
    every = Documents(documents, jnp.asarray(keys), jnp.asarray(valid))
    own, negatives = (Documents(*(part[at] for part in every)) for at in (slice(7), slice(7, None)))
    options = {"temperature": 0.1, "both_directions": both_directions}
    given = {"query_key": jnp.asarray(query_keys), "positives": jnp.asarray(positives)}
    loss, recall = info_nce(queries, own, negatives, **given, **options)
    given = (np.asarray(queries), np.asarray(documents), valid, keys, query_keys, positives)
    expected = reference_info_nce(*given, **options)
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)
    assert loss.count == 6 and 0 <= recall.value() <= 1


@pytest.mark.parametrize("both_directions", [False, True])
def test_an_empty_slot_has_no_gradient_and_no_nan(both_directions):
    documents = normalize(states(1, 3, 5))
    valid = jnp.array([True, True, False])

    def loss(queries):
        own = Documents(documents, jnp.array([1, 2, -1]), valid)
        none = Documents(*(part[:0] for part in own))
        positives = jnp.array([[1], [2], [-1]])
        options = {"temperature": 0.1, "both_directions": both_directions}
        keys = {"query_key": jnp.array([1, 2, -1]), "positives": positives}
        return info_nce(normalize(queries), own, none, **keys, **options)[0].value()

    gradient = jax.grad(loss)(states(0, 3, 5).at[2].set(0.0))
    assert np.isfinite(gradient).all() and (gradient[2] == 0).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("both_directions", [False, True])
def test_the_right_answers_of_the_same_query_are_not_its_negatives(both_directions):
    """Two pairs of one query, whose answers are right for both: the loss is that of each alone."""
    queries, documents = normalize(states(0, 1, 5).repeat(2, axis=0)), normalize(states(1, 2, 5))
    own = Documents(documents, jnp.array([1, 2]), jnp.array([True, True]))
    none = Documents(*(part[:0] for part in own))
    known = {"positives": jnp.array([[1], [2]]), "temperature": 0.1, "both_directions": both_directions}
    masked, recall = info_nce(queries, own, none, query_key=jnp.array([7, 7]), **known)
    np.testing.assert_allclose(masked.value(), 0.0, atol=1e-6)
    assert recall.value() == 1
    assert info_nce(queries, own, none, query_key=jnp.array([7, 8]), **known)[0].value() > 0.1


def test_states_are_taken_within_their_shard():
    hidden = jnp.arange(2 * 2 * 3 * 1, dtype=jnp.float32).reshape(2, 2, 3, 1)
    assert take_states(hidden, jnp.array([[0, 5], [2, -1]]))[..., 0].tolist() == [[0, 5], [8, 6]]


def test_detached_the_emission_trains_the_row_of_emb_alone():
    """Two queries in one row: one writes tokens 7 and 9 and then <|emb|>, one emits <|emb|> at once."""
    pairs = {"query_index": [[4, 8]], "document_index": [[10, 11]], "negative_index": np.zeros((1, 2, 0))}
    targets = {"target_index": [[2, 3, 4, 8]], "target_token": [[7, 9, tiny.EMB, tiny.EMB]], "first_index": [[2, 8]]}
    fields = {name: jnp.asarray(value, jnp.int32) for name, value in {**pairs, **targets}.items()}
    given = {"target_weight": jnp.ones((1, 4)), **fields}
    batch = Batch(**{name: given.get(name) for name in Batch._fields})

    def gradients(detached):
        def loss(hidden, row):
            head = Head(states(1, tiny.VOCABULARY, 8), row, tiny.EMB)
            options = Loss(vocabulary_chunk=4, detach_emission=detached)
            return read_out(hidden, head, batch, tiny.EMB, options).generation.total

        return jax.grad(loss, argnums=(0, 1))(states(0, 1, 1, 12, 8), states(2, 8))

    (hidden, row), (whole, same) = gradients(True), gradients(False)
    np.testing.assert_allclose(row, same, rtol=1e-6)
    assert np.flatnonzero(np.abs(whole).max(axis=-1)).tolist() == [2, 3, 4, 8]
    assert np.flatnonzero(np.abs(hidden).max(axis=-1)).tolist() == [2, 3]
    np.testing.assert_allclose(hidden[0, 0, 2:4], whole[0, 0, 2:4], rtol=1e-6)


def test_a_learned_temperature_stays_between_a_hundredth_and_one():
    assert loss_parameters(Loss(), None) == {} and bounded({"kernel": 1}) == {"kernel": 1}
    scale = loss_parameters(Loss(temperature=0.05, learn_temperature=True), None)[SCALE]
    np.testing.assert_allclose(jnp.exp(-scale), 0.05, rtol=1e-6)
    for given, temperature in ((9.0, 0.01), (-1.0, 1.0), (3.0, np.exp(-3.0))):
        np.testing.assert_allclose(jnp.exp(-bounded({SCALE: jnp.float32(given)})[SCALE]), temperature, rtol=1e-6)
    for temperature in (0.005, 2.0):
        with pytest.raises(ValueError, match=f"temperature {temperature}: .* between 0.01 and 1"):
            loss_parameters(Loss(temperature=temperature, learn_temperature=True), None)
