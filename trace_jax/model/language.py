"""The decoder: grouped-query attention with M-RoPE over packed rows, and a few tokens at a time over a KV cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trace_jax.config import Lora
from trace_jax.model.architecture import LanguageArchitecture
from trace_jax.model.attention import Backend, attention
from trace_jax.model.cache import Cache, KeysValues, LayerCache, attend_to, update
from trace_jax.model.layers import (
    ATTENTION,
    DTypes,
    Linear,
    Remat,
    RMSNorm,
    Rotary,
    SwiGLU,
    dropout_key,
    lora_for,
    rotate,
    run_layers,
    stack_layers,
    text_rotary,
    unstack_layers,
)

Array = jax.Array


Pick = Callable[[Array], Array]  # [rows, length, features] -> [..., features]
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # q, k, v -> the result, and what to keep


class SelfAttention(nnx.Module):
    """Grouped-query attention; who attends to whom, and what is kept, is the caller's `attend`."""

    def __init__(
        self, architecture: LanguageArchitecture, *, lora: Lora | None, dtypes: DTypes, rngs: nnx.Rngs
    ) -> None:
        def linear(name: str, in_features: int, out_features: int, bias: bool) -> Linear:
            adapter = lora_for(lora, name)
            return Linear(in_features, out_features, bias=bias, lora=adapter, dtypes=dtypes, rngs=rngs)

        size, width = architecture.hidden_size, architecture.head_dim
        self.q_proj = linear("q_proj", size, architecture.num_heads * width, True)
        self.k_proj = linear("k_proj", size, architecture.num_kv_heads * width, True)
        self.v_proj = linear("v_proj", size, architecture.num_kv_heads * width, True)
        self.o_proj = linear("o_proj", architecture.num_heads * width, size, False)
        self.head_dim = width

    def __call__(
        self, x: Array, rotary: Rotary, attend: Attend, dropout: Array | None = None, pick: Pick | None = None
    ) -> tuple[Array, Any]:
        """[rows, length, hidden], angles [rows, length, head_dim / 2] -> [rows, length, hidden], what is kept.

        `dropout` is the layer's key, None: off. `pick` takes the states out for which the result is wanted.
        """

        def heads(project: Linear, name: str) -> Array:
            y = project(x, dropout_key(dropout, name))
            return y.reshape(*y.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)

        q, k = rotate(heads(self.q_proj, "q_proj"), rotary), rotate(heads(self.k_proj, "k_proj"), rotary)
        y, kept = attend(q, k, heads(self.v_proj, "v_proj"))
        y = y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        y = y if pick is None else pick(y)
        return self.o_proj(y, dropout_key(dropout, "o_proj")), kept


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(
        self, architecture: LanguageArchitecture, *, lora: Lora | None, dtypes: DTypes, rngs: nnx.Rngs
    ) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(
                architecture.hidden_size,
                eps=architecture.norm_eps,
                dtype=dtypes.compute,
                param_dtype=dtypes.params,
            )

        size, hidden = architecture.hidden_size, architecture.intermediate_size
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(architecture, lora=lora, dtypes=dtypes, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = SwiGLU(size, hidden, bias=False, lora=lora, dtypes=dtypes, rngs=rngs)

    def __call__(
        self, x: Array, rotary: Rotary, attend: Attend, dropout: Array | None = None, pick: Pick | None = None
    ) -> tuple[Array, Any]:
        """As `SelfAttention`."""
        y, kept = self.self_attn(self.input_layernorm(x), rotary, attend, dropout, pick)
        x = (x if pick is None else pick(x)) + checkpoint_name(y, ATTENTION)
        return x + self.mlp(self.post_attention_layernorm(x), dropout), kept


class Embedding(nnx.Module):
    """`embedding` [vocab, features]."""

    def __init__(self, count: int, features: int, *, dtypes: DTypes, rngs: nnx.Rngs) -> None:
        values = 0.02 * jax.random.normal(rngs.params(), (count, features), jnp.float32)
        self.embedding = nnx.Param(values.astype(dtypes.params))
        self.dtype = dtypes.compute

    def __call__(self, tokens: Array) -> Array:
        """[...] int32 -> [..., features] in the compute dtype."""
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(self.dtype)


class Decoder(nnx.Module):
    """Embeddings, stacked layers, final norm."""

    def __init__(
        self,
        architecture: LanguageArchitecture,
        *,
        lora: Lora | None,
        dtypes: DTypes,
        scan_layers: bool,
        remat: Remat,
        attention: Backend,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed_tokens = Embedding(architecture.vocab_size, architecture.hidden_size, dtypes=dtypes, rngs=rngs)
        self.layers = stack_layers(
            lambda keys: DecoderLayer(architecture, lora=lora, dtypes=dtypes, rngs=keys),
            architecture.num_layers,
            rngs,
        )
        self.norm = RMSNorm(
            architecture.hidden_size, eps=architecture.norm_eps, dtype=jnp.float32, param_dtype=dtypes.params
        )
        self.architecture = architecture
        self.scan_layers = scan_layers
        self.remat: Remat = remat
        self.attention: Backend = attention

    def _rotary(self, positions: Array) -> Rotary:
        return text_rotary(positions, self.architecture.mrope_section, self.architecture.rope_theta)

    def __call__(
        self,
        x: Array,
        segments: Array,
        positions: Array,
        *,
        keep: bool = False,
        pick: Pick | None = None,
        dropout: Array | None = None,
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        """Packed rows: x [rows, L, hidden], segments [rows, L], positions [rows, L, 3] int32.

        Returns the states after the final norm [rows, L, hidden] float32, and, to `keep`, the keys and values of every
        layer (else an empty tuple). With `pick`, only the states that it takes out are computed to the end, in the
        shape that it gives them. `dropout` is the step's key of the adapters' dropout, None: off.
        """
        rotary = self._rotary(positions)

        def within(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues | None]:
            y = attention(q, k, v, segments_q=segments, segments_kv=segments, causal=True, backend=self.attention)
            return y, (k, v) if keep else None

        def body(
            layer: DecoderLayer, x: Array, index: Array, pick: Pick | None = None
        ) -> tuple[Array, KeysValues | None]:
            key = None if dropout is None else jax.random.fold_in(dropout, index)
            return layer(x, rotary, within, key, pick)

        x, kept = run_layers(
            body,
            x,
            self.layers,
            np.arange(self.architecture.num_layers, dtype=np.int32),
            path="language/layers",
            scan=self.scan_layers,
            remat=self.remat,
            last=None if pick is None else functools.partial(body, pick=pick),
        )
        return self.norm(x), tuple(kept) if keep else ()

    def decode(self, x: Array, positions: Array, cache: Cache, at: Array, seen: Array) -> tuple[Array, Cache]:
        """The next n tokens of every row: x [rows, n, hidden], positions [rows, n, 3], at [] int32.

        The tokens of all rows take the slots from `at`, so that the cache is written in place by one slice, and see
        the slots that `seen` [rows, n, slots] bool tells. Returns their states after the final norm [rows, n, hidden]
        float32, and the cache with the tokens in it, of whatever dtype it is. Unrolled over layers whatever
        `scan_layers` says.
        """
        rotary = self._rotary(positions)

        def put(old: Array, new: Array, slots: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, at, slots)

        caches = []
        for layer, old in zip(unstack_layers(self.layers, len(cache)), cache, strict=True):

            def to_cache(q: Array, k: Array, v: Array, old: LayerCache = old) -> tuple[Array, LayerCache]:
                kept = update(old, k, v, put)
                return attend_to(kept, q, seen, backend=self.attention), kept

            x, kept = layer(x, rotary, to_cache)
            caches.append(kept)
        return self.norm(x), tuple(caches)
