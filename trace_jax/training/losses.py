"""The hybrid objective L = lambda_gen * L_gen + lambda_ret * L_ret (paper Sec. 3.3), in float32.

Every loss returns (sum, count) over the global batch, so that means are exact however the batch is split.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trace_jax import config
from trace_jax.data.schema import Batch
from trace_jax.model.attention import MASKED
from trace_jax.model.qwen2_5_vl import Head, take_states

SCALE = "log_scale"  # the parameter's name
LARGEST_SCALE = math.log(100.0)  # CLIP's bound


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


def loss_parameters(options: config.Loss, placed: jax.sharding.Sharding | None) -> dict[str, jax.Array]:
    """What the loss itself learns, beside the model's parameters: {SCALE: log(1 / temperature), [] float32}, or {}.

    Raises ValueError for a temperature outside [0.01, 1], where a learned one stays.
    """
    if not options.learn_temperature:
        return {}
    if not 0 <= -math.log(options.temperature) <= LARGEST_SCALE:
        raise ValueError(f"loss.temperature {options.temperature}: one that is learned starts between 0.01 and 1")
    return {SCALE: jax.device_put(jnp.float32(-math.log(options.temperature)), placed)}


def bounded(trainable: Any) -> Any:
    """Trainable parameters with the learned scale, if there is one, put back between 1 and 100, as CLIP does."""
    if SCALE not in trainable:
        return trainable
    return trainable | {SCALE: jnp.clip(trainable[SCALE], 0.0, LARGEST_SCALE)}


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


class Documents(NamedTuple):
    """Candidates of InfoNCE: M of them, over all shards."""

    vectors: jax.Array  # [M, D] normalised
    key: jax.Array  # [M] int32
    valid: jax.Array  # [M] bool


def info_nce(
    queries: jax.Array,
    documents: Documents,
    negatives: Documents,
    *,
    query_key: jax.Array,
    positives: jax.Array,
    temperature: float | jax.Array,
    both_directions: bool = False,
) -> tuple[Mean, Mean]:
    """L_ret: InfoNCE from query to document over the global batch; N = S * B.

    With `both_directions` its mean with InfoNCE from document to query, in which a query is never the negative of a
    document that is known to be right for it, and hard negatives have no part.

    queries [N, D] normalised; `documents` are N, of which query n's own is the n-th, and a query is valid where it is;
    `negatives` are hard ones, any number; query_key [N], positives [N, K]. A document that is known to be right for a
    query is never its negative: its key is among the query's positives, or it is the own document of the same query
    (an equal key; -1 equals none), under another id or by a right answer beyond the first K. Returns the loss and the
    recall@1 within the batch. The arrays are global: the compiler gathers the documents across devices.
    """

    def scored(candidates: Documents) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("nd,md->nm", queries, candidates.vectors, preferred_element_type=jnp.float32) / temperature
        known = functools.reduce(
            jnp.logical_or,
            [positives[:, k, None] == candidates.key[None, :] for k in range(positives.shape[1])],
            documents.key[:, None] == candidates.key[None, :],
        )
        return scores, candidates.valid[None, :] & ~known

    square, counted = scored(documents)
    own_pair = jnp.eye(len(queries), dtype=bool)
    same = (query_key[:, None] == query_key[None, :]) & (query_key >= 0)[None, :]
    scores = square = jnp.where((counted & ~same) | own_pair, square, MASKED)
    own = jnp.diagonal(square)
    if len(negatives.key):  # beside the others: rows are split over devices, columns are not
        hard, counted = scored(negatives)
        scores = jnp.concatenate([square, jnp.where(counted, hard, MASKED)], axis=1)
    losses = jax.nn.logsumexp(scores, axis=1) - own
    if both_directions:  # the same mask: what is known is known of a query and a document
        backward = jax.nn.logsumexp(jnp.where(documents.valid[:, None] | own_pair, square, MASKED), axis=0)
        losses = (losses + backward - own) / 2
    weight = documents.valid.astype(jnp.float32)
    return Mean(jnp.sum(losses * weight), jnp.sum(weight)), share(own >= jnp.max(scores, axis=1), weight)


class ReadOut(NamedTuple):
    """What the loss needs of a forward pass; for chunks of a batch, with their leading axis C."""

    queries: jax.Array  # [S, B, D] float32, normalised
    documents: jax.Array  # [S, B, D]
    negatives: jax.Array  # [S, B * H, D]
    emits_first: jax.Array  # [S, B] bool: routes to direct embedding
    generation: Mean
    correct: Mean


def read_out(hidden: jax.Array, head: Head, batch: Batch, emb: int, options: config.Loss) -> ReadOut:
    """Reads embeddings and L_gen off the states of one forward pass. hidden [S, R, L, D] float32.

    `emb` is the id of <|emb|>. The embedding of a sequence is the state that predicts <|emb|>, i.e. of the token right
    before it (paper Table 4, "pre-token"). With `options.detach_emission` L_gen does not reach it.
    """
    states = take_states(hidden, batch.target_index)
    if options.detach_emission:
        states = jnp.where((batch.target_token == emb)[..., None], jax.lax.stop_gradient(states), states)
    generation, correct = token_cross_entropy(
        states, head, batch.target_token, batch.target_weight, options.vocabulary_chunk
    )
    negative_index = batch.negative_index.reshape(len(hidden), -1)
    return ReadOut(
        *(normalize(take_states(hidden, at)) for at in (batch.query_index, batch.document_index, negative_index)),
        emits_first=_emits_first(hidden, head, batch, emb),
        generation=generation,
        correct=share(correct, batch.target_weight),
    )


def hybrid_loss(
    out: ReadOut, batch: Batch, emb_row: jax.Array, options: config.Loss, scale: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Mean]]:
    """The objective of one step and its metrics, of the global batch: all of `out` and `batch` may have an axis C.

    emb_row [D] is the head's row of <|emb|>; its cosine to the embeddings is watched, because L_gen pulls them there.
    `scale` is log(1 / temperature), [] float32, where that is learned.
    """
    generation, correct = (Mean(jnp.sum(mean.total), jnp.sum(mean.count)) for mean in (out.generation, out.correct))
    metrics = {"loss_gen": generation, "token_accuracy": correct}
    loss = options.generation * generation.value()
    if options.retrieval:
        width = out.queries.shape[-1]
        queries, documents, negatives = (
            part.reshape(-1, width) for part in (out.queries, out.documents, out.negatives)
        )
        valid = (batch.query_index.reshape(-1) >= 0) & (batch.document_index.reshape(-1) >= 0)
        temperature = jnp.float32(options.temperature) if scale is None else jnp.exp(-scale)
        retrieval, recall = info_nce(
            queries,
            Documents(documents, batch.document_key.reshape(-1), valid),
            Documents(negatives, batch.negative_key.reshape(-1), batch.negative_index.reshape(-1) >= 0),
            query_key=batch.query_key.reshape(-1),
            positives=batch.positives.reshape(-1, batch.positives.shape[-1]),
            temperature=temperature,
            both_directions=options.both_directions,
        )
        loss = loss + options.retrieval * retrieval.value()
        emits, reasoned = out.emits_first.reshape(-1), batch.reasoned.reshape(-1)
        weight = valid.astype(jnp.float32)
        cosine = jnp.einsum("nd,d->n", queries, normalize(emb_row))
        metrics |= {
            "loss_ret": retrieval,
            "recall_in_batch": recall,
            "emb_first": share(emits, weight),
            "routing_accuracy": share(emits != reasoned, weight),
            "simple_fraction": share(~reasoned, weight),
            "temperature": Mean(temperature, jnp.ones(())),
            "emb_cosine": Mean(jnp.sum(cosine * weight), jnp.sum(weight)),
        }
    return loss, metrics | {"loss": Mean(loss, jnp.ones(()))}


def _emits_first(hidden: jax.Array, head: Head, batch: Batch, emb: int) -> jax.Array:
    """Which queries route to direct embedding: the argmax at the prompt's end is <|emb|> (Eq. 2). [S, B] bool."""
    logits = head.logits(take_states(hidden, batch.first_index))
    return jnp.argmax(logits, axis=-1) == emb
