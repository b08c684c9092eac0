"""Queries to embeddings: prefill, first-token routing, and batched decoding of the rows that reason (paper Sec. 3.1).

Two compiled programs. The first reads all prompts and predicts their first tokens; rows whose first token is <|emb|>
are done (Eq. 2). The host gathers the others into a batch of the next power of two, and the second program decodes
these alone, greedily, until each writes <|emb|>. The embedding is the state that predicts <|emb|> ("pre-token",
Table 4), so that emitting the token costs no step.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax.data.schema import Inputs
from trace_jax.model.language import Cache
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

Array = jax.Array
Mode = Literal["adaptive", "direct", "always"]
NO_TOKEN = -1


class Generation(NamedTuple):
    """What `generate` returns, on the host; N rows, T = max_new_tokens."""

    embeddings: np.ndarray  # [N, D] float32, unit length; zeros for an empty row
    tokens: np.ndarray  # [N, T] int32: the trace, without <|emb|>; -1 after its end
    lengths: np.ndarray  # [N] int32: tokens of the trace, 0 where the row did not reason
    reasoned: np.ndarray  # [N] bool: the row wrote a trace
    capped: np.ndarray  # [N] bool: the trace was cut at T tokens

    def traces(self) -> list[list[int]]:
        """The traces as token ids, empty where a row did not reason."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


class _Prefilled(NamedTuple):
    """After the prompts: N rows of L slots."""

    state: Array  # [N, D] float32 at the prompt's last token
    first: Array  # [N] int32: the first token
    lengths: Array  # [N] int32
    position: Array  # [N] int32: M-RoPE position of the next token
    cache: Cache  # of L slots


class _Loop(NamedTuple):
    """Carried by the decoding loop; n rows."""

    step: Array  # [] int32: tokens read so far
    cache: Cache
    state: Array  # [n, D] float32: the last state of each row
    token: Array  # [n] int32: to be read next
    done: Array  # [n] bool
    capped: Array  # [n] bool
    written: Array  # [n, T] int32


def generate(
    model: Qwen2_5_VL,
    inputs: Inputs,
    *,
    emb_token_id: int,
    end_token_id: int | None = None,
    max_new_tokens: int,
    mode: Mode = "adaptive",
) -> Generation:
    """Embeds prompts, one a row and left-aligned (segments 1, then 0); N = S * R rows.

    `mode`: "adaptive" lets the first token decide; "direct" takes the state at the prompt's end for all; "always"
    forbids to stop at the first token. `end_token_id` (default: the architecture's eos_token_id) ends a trace like
    <|emb|>: the state that predicts it is the embedding. A trace that has not ended after `max_new_tokens` tokens is
    capped: its last state is the embedding. A row's result does not depend on the other rows. Raises ValueError for
    an unknown mode, fewer than one new token, or rows with several sequences.
    """
    if mode not in ("adaptive", "direct", "always"):
        raise ValueError(f"mode {mode!r} is none of 'adaptive', 'direct', 'always'")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allow at least one")
    segments = np.asarray(inputs.segments).reshape(-1, inputs.segments.shape[-1])
    if segments.max(initial=0) > 1 or (np.diff(segments, axis=1) > 0).any():
        raise ValueError("generation needs one left-aligned sequence a row; pack with one sequence a row")
    count = len(segments)
    end_token_id = model.architecture.eos_token_id if end_token_id is None else end_token_id
    stops = (emb_token_id,) if end_token_id is None else (emb_token_id, end_token_id)
    lengths = (segments > 0).sum(axis=1)
    tokens = np.full((count, max_new_tokens), NO_TOKEN, np.int32)
    reasoned, capped = np.zeros(count, bool), np.zeros(count, bool)
    if mode == "direct":
        states = np.array(_read(model, inputs))
    else:
        prefilled = _prefill(model, inputs, forbidden=stops if mode == "always" else ())
        states = np.array(prefilled.state)
        reasoned = ~np.isin(np.asarray(prefilled.first), stops) & (lengths > 0)
        rows = np.flatnonzero(reasoned)
        if len(rows):
            bucket = 1 << (len(rows) - 1).bit_length()
            padded = np.resize(rows, bucket).astype(np.int32)
            idle = np.arange(bucket) >= len(rows)
            end = _decode(model, prefilled, padded, idle, stops=stops, max_new_tokens=max_new_tokens)
            states[rows], tokens[rows], capped[rows] = (np.asarray(part)[: len(rows)] for part in end)
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    embeddings = np.where(lengths[:, None] > 0, states / np.maximum(norms, 1e-12), 0.0).astype(np.float32)
    written = (tokens != NO_TOKEN).sum(axis=1).astype(np.int32)
    return Generation(embeddings, tokens, written, reasoned, capped)


def _last(hidden: Array, lengths: Array) -> Array:
    """[N, L, D], [N] -> the state of each row's last token [N, D]."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def _lengths(inputs: Inputs) -> Array:
    length = inputs.segments.shape[-1]
    return (jnp.asarray(inputs.segments).reshape(-1, length) > 0).sum(axis=1, dtype=jnp.int32)


@jax.jit
def _read(model: Qwen2_5_VL, inputs: Inputs) -> Array:
    """The state at the end of every prompt: [N, D] float32."""
    hidden = model(inputs)
    return _last(hidden.reshape(-1, *hidden.shape[2:]), _lengths(inputs))


@functools.partial(jax.jit, static_argnames=("forbidden",))
def _prefill(model: Qwen2_5_VL, inputs: Inputs, *, forbidden: tuple[int, ...]) -> _Prefilled:
    """Reads the prompts and predicts their first tokens, which are not among `forbidden`."""
    hidden, cache = model.prefill(inputs, inputs.tokens.shape[-1])
    lengths = _lengths(inputs)
    state = _last(hidden, lengths)
    logits = model.logits(state)
    if forbidden:
        logits = logits.at[:, jnp.asarray(forbidden)].set(-jnp.inf)
    position = jnp.asarray(inputs.positions).reshape(len(lengths), -1).max(axis=1) + 1
    return _Prefilled(state, jnp.argmax(logits, axis=-1).astype(jnp.int32), lengths, position, cache)


@functools.partial(jax.jit, static_argnames=("stops", "max_new_tokens"))
def _decode(
    model: Qwen2_5_VL,
    prefilled: _Prefilled,
    rows: Array,
    idle: Array,
    *,
    stops: tuple[int, ...],
    max_new_tokens: int,
) -> tuple[Array, Array, Array]:
    """Decodes rows [n] of the prefilled batch; `idle` [n] bool marks those that only fill it up.

    Returns the final states [n, D] float32, the tokens written [n, T] int32, and which rows were capped [n] bool.
    """
    room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0))
    cache = jax.tree.map(lambda slots: jnp.pad(slots[rows], room), prefilled.cache)
    first, lengths, position = prefilled.first[rows], prefilled.lengths[rows], prefilled.position[rows]
    written = jnp.full((len(rows), max_new_tokens), NO_TOKEN, jnp.int32).at[:, 0].set(first)

    def step(loop: _Loop) -> _Loop:
        positions = jnp.tile((position + loop.step)[:, None], (1, 3))
        state, cache = model.decode(loop.cache, loop.token, positions, lengths + loop.step)
        token = jnp.argmax(model.logits(state), axis=-1).astype(jnp.int32)
        active = ~loop.done
        going = active & ~jnp.isin(token, jnp.asarray(stops))
        full = loop.step + 1 == max_new_tokens
        entry = jnp.where(going & ~full, token, NO_TOKEN)
        at = jnp.minimum(loop.step + 1, max_new_tokens - 1)
        return _Loop(
            step=loop.step + 1,
            cache=cache,
            state=jnp.where(active[:, None], state, loop.state),
            token=token,
            done=~going | full,
            capped=loop.capped | (going & full),
            written=jnp.where(full, loop.written, loop.written.at[:, at].set(entry)),
        )

    start = _Loop(
        step=jnp.int32(0),
        cache=cache,
        state=prefilled.state[rows],
        token=first,
        done=jnp.asarray(idle),
        capped=jnp.zeros(len(rows), bool),
        written=written,
    )
    end = jax.lax.while_loop(lambda loop: ~loop.done.all(), step, start)
    return end.state, end.written, end.capped
