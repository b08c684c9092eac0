import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.model.qwen2_5_vl import Head
from trace_jax.training.losses import Documents, info_nce, normalize, take_states, token_cross_entropy


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


def reference_info_nce(queries, documents, valid, keys, positives, temperature):
    losses = []
    for i in range(len(queries)):
        if not valid[i]:
            continue
        negatives = [
            j
            for j in range(len(documents))
            if j != i and valid[j] and keys[j] != keys[i] and keys[j] not in positives[i]
        ]
        scores = np.array([queries[i] @ documents[j] / temperature for j in [i, *negatives]])
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
    return np.mean(losses)


@pytest.mark.parametrize("hard", [0, 3])
def test_info_nce_masks_known_positives_duplicates_and_empty_slots(hard):
    queries, documents = normalize(states(0, 7, 5)), normalize(states(1, 7 + hard, 5))
    valid = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 1][: 7 + hard], bool)
    keys = np.array([10, 11, 12, 10, 14, 15, 16, 17, 18, 12][: 7 + hard])
    positives = np.array([[10, 12], [11, -1], [12, -1], [10, -1], [14, 16], [15, -1], [16, -1]])
    every = Documents(documents, jnp.asarray(keys), jnp.asarray(valid))
    own, negatives = (Documents(*(part[at] for part in every)) for at in (slice(7), slice(7, None)))
    loss, recall = info_nce(queries, own, negatives, positives=jnp.asarray(positives), temperature=0.1)
    expected = reference_info_nce(np.asarray(queries), np.asarray(documents), valid, keys, positives, 0.1)
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)
    assert loss.count == 6 and 0 <= recall.value() <= 1


def test_an_empty_slot_has_no_gradient_and_no_nan():
    documents = normalize(states(1, 3, 5))
    valid = jnp.array([True, True, False])

    def loss(queries):
        own = Documents(documents, jnp.array([1, 2, -1]), valid)
        none = Documents(*(part[:0] for part in own))
        positives = jnp.array([[1], [2], [-1]])
        return info_nce(normalize(queries), own, none, positives=positives, temperature=0.1)[0].value()

    gradient = jax.grad(loss)(states(0, 3, 5).at[2].set(0.0))
    assert np.isfinite(gradient).all() and (gradient[2] == 0).all() and (gradient[0] != 0).any()


def test_states_are_taken_within_their_shard():
    hidden = jnp.arange(2 * 2 * 3 * 1, dtype=jnp.float32).reshape(2, 2, 3, 1)
    assert take_states(hidden, jnp.array([[0, 5], [2, -1]]))[..., 0].tolist() == [[0, 5], [8, 6]]
