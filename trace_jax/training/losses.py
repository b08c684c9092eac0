"""The hybrid objective L = lambda_gen * L_gen + lambda_ret * L_ret (paper Sec. 3.3), in float32.

Every loss returns (sum, count) over the global batch, so that means are exact however the batch is split.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trace_jax import config
from trace_jax.data.schema import Batch
from trace_jax.model.attention import MASKED
from trace_jax.model.qwen2_5_vl import Head


class Mean(NamedTuple):
    """A metric that can be summed over steps and devices before it is divided."""

    total: jax.Array
    count: jax.Array

    def value(self) -> jax.Array:
        """The total over the count; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1)


def share(chosen: jax.Array, weight: jax.Array) -> Mean:
    """The weighted share of what is chosen, [...] bool, of what `weight`, [...] float32, counts."""
    return Mean(jnp.sum(jnp.where(chosen, weight, 0.0)), jnp.sum(weight))


def take_states(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Picks states of each shard. hidden [S, R, L, D], index [S, N] flat into R*L (negative: any) -> [S, N, D]."""
    shards, rows, length, width = hidden.shape
    flat = hidden.reshape(shards, rows * length, width)
    return jnp.take_along_axis(flat, jnp.maximum(index, 0)[..., None], axis=1)


def normalize(states: jax.Array) -> jax.Array:
    """L2-normalises the last axis; embeddings are compared by cosine (paper Sec. 3.1)."""
    states = states.astype(jnp.float32)
    return states * jax.lax.rsqrt(jnp.sum(states * states, axis=-1, keepdims=True) + 1e-12)


def token_cross_entropy(
    states: jax.Array, head: Head, tokens: jax.Array, weights: jax.Array, chunk: int
) -> tuple[Mean, jax.Array]:
    """L_gen: cross-entropy of supervised tokens only, `chunk` tokens of a shard at a time.

    states [S, T, D], tokens and weights [S, T], T a multiple of `chunk`. Returns the summed loss
    with its weight, and which tokens the argmax gets right, [S, T] bool. Logits are made again in the backward pass,
    so [S, T, vocabulary] never exists.
    """
    shards, count, _ = states.shape
    chunk = min(chunk, count)

    @jax.checkpoint
    def one(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        state, token, weight = part
        logits = head.logits(state)
        picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(losses * weight), jnp.argmax(logits, axis=-1) == token

    def chunked(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(shards, count // chunk, chunk, *array.shape[2:]), 1, 0)

    parts = (chunked(states), chunked(tokens), chunked(weights))
    total, correct = jax.lax.scan(one, jnp.zeros((), jnp.float32), parts)
    return Mean(total, jnp.sum(weights)), jnp.moveaxis(correct, 0, 1).reshape(shards, count)


def info_nce(
    queries: jax.Array,
    documents: jax.Array,
    *,
    valid: jax.Array,
    document_key: jax.Array,
    positives: jax.Array,
    temperature: float | jax.Array,
) -> tuple[Mean, Mean]:
    """L_ret: InfoNCE from query to document over the global batch; N = S * B.

    queries and documents [N, D] normalised, valid [N] bool, document_key [N], positives [N, K]. A document that is
    known to be right for a query (its key is among the query's positives) is never its negative. Returns the loss and
    the recall@1 within the batch. The arrays are global: the compiler gathers the documents across devices.
    """
    scores = jnp.einsum("nd,md->nm", queries, documents, preferred_element_type=jnp.float32) / temperature
    own = jnp.eye(len(queries), dtype=bool)
    known = functools.reduce(
        jnp.logical_or,
        [positives[:, k, None] == document_key[None, :] for k in range(positives.shape[1])],
        document_key[:, None] == document_key[None, :],
    )
    scores = jnp.where(own | (valid[None, :] & ~known), scores, MASKED)
    own_score = jnp.diagonal(scores)
    losses = jax.nn.logsumexp(scores, axis=1) - own_score
    weight = valid.astype(jnp.float32)
    return Mean(jnp.sum(losses * weight), jnp.sum(weight)), share(own_score >= jnp.max(scores, axis=1), weight)


def hybrid_loss(
    hidden: jax.Array, head: Head, batch: Batch, emb: int, options: config.Loss
) -> tuple[jax.Array, dict[str, Mean]]:
    """The objective of one step and its metrics. hidden [S, R, L, D] float32.

    `emb` is the id of <|emb|>. The embedding of a sequence is the state that predicts <|emb|>, i.e. of the token right
    before it (paper Table 4, "pre-token").
    """
    states = take_states(hidden, batch.target_index)
    generation, correct = token_cross_entropy(
        states, head, batch.target_token, batch.target_weight, options.vocabulary_chunk
    )
    metrics = {
        "loss_gen": generation,
        "token_accuracy": share(correct, batch.target_weight),
    }
    loss = options.generation * generation.value()
    if options.retrieval:
        valid = (batch.query_index >= 0) & (batch.document_index >= 0)
        queries = normalize(take_states(hidden, batch.query_index))
        documents = normalize(take_states(hidden, batch.document_index))
        width = queries.shape[-1]
        retrieval, recall = info_nce(
            queries.reshape(-1, width),
            documents.reshape(-1, width),
            valid=valid.reshape(-1),
            document_key=batch.document_key.reshape(-1),
            positives=batch.positives.reshape(-1, batch.positives.shape[-1]),
            temperature=options.temperature,
        )
        loss = loss + options.retrieval * retrieval.value()
        emits = _emits_first(hidden, head, batch, emb)
        weight = valid.astype(jnp.float32)
        cosine = jnp.einsum("sbd,d->sb", queries, normalize(head.row_of(emb)))
        metrics |= {
            "loss_ret": retrieval,
            "recall_in_batch": recall,
            "emb_first": share(emits, weight),
            "routing_accuracy": share(emits != batch.reasoned, weight),
            "simple_fraction": share(~batch.reasoned, weight),
            "emb_cosine": Mean(jnp.sum(cosine * weight), jnp.sum(weight)),
        }
    return loss, metrics | {"loss": Mean(loss, jnp.ones(()))}


def _emits_first(hidden: jax.Array, head: Head, batch: Batch, emb: int) -> jax.Array:
    """Which queries route to direct embedding: the argmax at the prompt's end is <|emb|> (Eq. 2). [S, B] bool."""
    logits = head.logits(take_states(hidden, batch.first_index))
    return jnp.argmax(logits, axis=-1) == emb
