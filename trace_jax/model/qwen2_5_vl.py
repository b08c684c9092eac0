"""Qwen2.5-VL: vision encoder, projector and decoder together, with the learned row of <|emb|>."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trace_jax import sharding
from trace_jax.config import Lora
from trace_jax.data import schema
from trace_jax.data.schema import Inputs
from trace_jax.model.architecture import Architecture
from trace_jax.model.attention import Backend
from trace_jax.model.cache import Cache, KeysValues
from trace_jax.model.language import Decoder
from trace_jax.model.layers import DTypes, Linear, Remat, unstack_layers
from trace_jax.model.projector import Projector
from trace_jax.model.vision import VisionEncoder

Array = jax.Array
# Of the projections in bfloat16, those whose adapters `fold_adapters` puts below them. The inputs of the other two are
# split over tensor, and the TPU compiler takes longer for them so (docs/tpu.md).
APPENDED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
VISUAL = "visual features"  # what the vision encoder gives, by the name that a remat policy knows it by


def take_states(hidden: Array, index: Array) -> Array:
    """Picks states of each shard. hidden [S, R, L, D], index [S, N] flat into R*L (negative: any) -> [S, N, D]."""
    shards, rows, length, width = hidden.shape
    flat = hidden.reshape(shards, rows * length, width)
    return jnp.take_along_axis(flat, jnp.maximum(index, 0)[..., None], axis=1)


class Head(NamedTuple):
    """The output rows: the base's, and the learned one of <|emb|> that stands in for one of them.

    They are kept apart: put together they would be a copy of [vocab, D] in every step, and the row's gradient would
    take that of the whole.
    """

    base: Array  # [vocab, D], as stored
    row: Array | None = None  # [D] float32
    token: int | None = None  # which row of the base it stands in for
    dtype: Any = jnp.float32  # of the product

    def logits(self, hidden: Array) -> Array:
        """[..., D] float -> [..., vocab] float32, the product in `dtype` summed in float32."""
        hidden = hidden.astype(self.dtype)

        def project(rows: Array) -> Array:
            return jnp.einsum("...d,vd->...v", hidden, rows.astype(self.dtype), preferred_element_type=jnp.float32)

        logits = project(self.base)
        if self.row is None:
            return logits
        there = (jnp.arange(len(self.base)) == self.token).reshape((1,) * (logits.ndim - 1) + (-1,))
        return jnp.where(there, project(self.row[None]), logits)

    def row_of(self, token: int) -> Array:
        """The output row of one token: [D], as stored."""
        return self.base[token] if self.row is None or token != self.token else self.row


class Qwen2_5_VL(nnx.Module):  # noqa: N801 (the model's own name)
    """The model of TRACE. D is the decoder's hidden size; the other shape letters are in data/schema.py.

    `emb_row` [D] float32 is the learned <|emb|>: it stands in for row `emb_token_id` of the head and of the input
    embedding. `lora` adapts the decoder's linear layers. `dtype` is what matrix products run in, `param_dtype` what
    the base is stored in, where int8 means the decoder's kernels, and bfloat16 for the rest; LoRA, projector and
    emb_row are stored in float32. Raises ValueError for an emb_token_id outside the vocabulary or unknown LoRA targets
    or a dropout outside [0, 1).
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        lora: Lora | None = None,
        emb_token_id: int | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        scan_layers: bool = True,
        remat: Remat = "none",
        attention: Backend = "xla",
        rngs: nnx.Rngs,
    ) -> None:
        language = architecture.language
        if emb_token_id is not None and not 0 <= emb_token_id < language.vocab_size:
            raise ValueError(f"emb_token_id {emb_token_id} is outside the vocabulary of {language.vocab_size}")
        known = Lora().targets
        if lora is not None and not set(lora.targets) <= set(known):
            raise ValueError(f"LoRA targets {sorted(set(lora.targets) - set(known))} are none of {known}")
        if lora is not None and not 0 <= lora.dropout < 1:
            raise ValueError(f"LoRA dropout {lora.dropout} is not in [0, 1)")
        int8 = jnp.dtype(param_dtype) == jnp.int8
        dtypes = DTypes(jnp.dtype(dtype), jnp.dtype(jnp.bfloat16 if int8 else param_dtype))
        run = {"scan_layers": scan_layers, "remat": remat, "attention": attention}
        self.vision = VisionEncoder(architecture.vision, dtypes=dtypes, rngs=rngs, **run)
        self.projector = Projector(architecture.vision, dtypes=dtypes, rngs=rngs)
        self.language = Decoder(language, lora=lora, dtypes=dataclasses.replace(dtypes, int8=int8), rngs=rngs, **run)
        self.lm_head = (
            None
            if language.tie_embeddings
            else Linear(language.hidden_size, language.vocab_size, dtypes=dtypes, rngs=rngs)
        )
        row = 0.02 * jax.random.normal(rngs.params(), (language.hidden_size,), jnp.float32)
        self.emb_row = None if emb_token_id is None else nnx.Param(row)
        self.architecture = architecture
        self.emb_token_id = emb_token_id
        self.dtype = dtypes.compute

    def fold_adapters(self) -> None:
        """Makes the adapters a part of the weights, for inference: they then cost next to nothing.

        Weights in float32 take them up. In bfloat16 rounding would swallow most of what they change: they stay whole,
        below the weights of the projections `APPENDED`; the others and int8 keep theirs. Run it under the mesh.
        """
        for keys, module in nnx.iter_modules(self.language):
            if isinstance(module, Linear):
                wide = module.kernel.dtype == jnp.float32
                if wide or (module.kernel.dtype == module.dtype and keys[-1] in APPENDED):
                    module.fold("/".join(map(str, ("language", *keys))), below=not wide)

    def unstack(self) -> None:
        """Holds the decoder's layers one by one, if they are unrolled anyhow: XLA:CPU would copy each of them out of
        the stack at every token. Their parameters' paths are others then.
        """
        if not self.language.scan_layers:
            layers: Any = unstack_layers(self.language.layers, self.architecture.language.num_layers)
            self.language.layers = layers

    # ---- states --------------------------------------------------------------------------------------------------

    def visual(self, inputs: Inputs) -> Array:
        """The images as visual tokens, in the order of the patches: [S, V * P / 4, D] in the compute dtype."""
        shards, rows, length, _ = inputs.patches.shape

        def flat(x: schema.Array) -> Array:
            return jnp.asarray(x).reshape(shards * rows, length, *x.shape[3:])

        features = self.vision(
            flat(inputs.patches),
            flat(inputs.patch_positions),
            flat(inputs.image_segments),
            flat(inputs.window_segments),
        )
        features = checkpoint_name(features, VISUAL)
        return sharding.gathered(self.projector, "projector")(features).reshape(
            shards, -1, self.architecture.language.hidden_size
        )

    def embed(self, tokens: Array) -> Array:
        """Input embeddings: [...] int32 -> [..., D] in the compute dtype, <|emb|> from its learned row."""
        x = sharding.gathered(self.language.embed_tokens, "language/embed_tokens")(tokens)
        if self.emb_row is None:
            return x
        row = self.emb_row[...].astype(self.dtype).reshape((1,) * tokens.ndim + (-1,))
        return jnp.where((tokens == self.emb_token_id)[..., None], row, x)

    def _read(
        self,
        inputs: Inputs,
        visual: Array | None,
        *,
        keep: bool,
        at: Array | None = None,
        dropout: Array | None = None,
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        shards, rows, length = inputs.tokens.shape
        pick = None if at is None else lambda x: take_states(x.reshape(shards, rows, length, -1), at)
        x = self.embed(jnp.asarray(inputs.tokens))
        if visual is None and inputs.patches.size:
            visual = self.visual(inputs)
        if visual is not None and visual.size:
            index = jnp.asarray(inputs.visual_index).reshape(shards, -1)
            placed = jax.vmap(lambda images, at: jnp.take(images, at, axis=0, mode="clip"))(visual, index)
            x = jnp.where((index >= 0).reshape(x.shape[:3])[..., None], placed.reshape(x.shape), x)
        states, cache = self.language(
            x.reshape(shards * rows, length, -1),
            jnp.asarray(inputs.segments).reshape(shards * rows, length),
            jnp.asarray(inputs.positions).reshape(shards * rows, length, 3),
            keep=keep,
            pick=pick,
            dropout=dropout,
        )
        return states if at is not None else states.reshape(*inputs.tokens.shape, -1), cache

    def __call__(
        self, inputs: Inputs, *, visual: Array | None = None, at: Array | None = None, dropout: Array | None = None
    ) -> Array:
        """The last layer's states after the final norm: [S, R, L, D] float32; padding holds finite nonsense.

        `at` [S, N] int32, flat into R * L: only these, [S, N, D], for which the last layer's products are computed
        alone; not for training, and a negative one is any. `visual` takes the place of `self.visual(inputs)`. Inputs
        without patches (V = 0) skip the vision encoder. `dropout` is the key of the adapters' dropout; None, as
        everywhere but in training, is off.
        """
        return self._read(inputs, visual, keep=False, at=at, dropout=dropout)[0]

    # ---- head ----------------------------------------------------------------------------------------------------

    def head(self) -> Head:
        """The output head with the learned row of <|emb|>, whole over fsdp."""
        if self.lm_head is None:
            base = sharding.gathered(self.language.embed_tokens, "language/embed_tokens").embedding[...]
        else:
            base = sharding.gathered(self.lm_head, "lm_head").kernel[...].T
        row = None if self.emb_row is None else self.emb_row[...]
        return Head(base, row, self.emb_token_id, self.dtype)

    def logits(self, hidden: Array) -> Array:
        """[..., D] float -> [..., vocab] float32."""
        return self.head().logits(hidden)

    # ---- generation ----------------------------------------------------------------------------------------------

    def prefill(
        self, inputs: Inputs, *, visual: Array | None = None, at: Array | None = None
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        """As a call; also returns the keys and values of every layer, S * R rows of L slots."""
        return self._read(inputs, visual, keep=True, at=at)

    def decode(self, cache: Cache, tokens: Array, positions: Array, at: Array, seen: Array) -> tuple[Array, Cache]:
        """Reads the next n tokens of every row: tokens [rows, n], positions [rows, n, 3].

        All rows write their keys and values to the slots from `at` [] int32, and a token sees the slots of its row that
        `seen` [rows, n, slots] bool tells. Returns the states [rows, n, D] float32 and the cache with the tokens in it.
        """
        return self.language.decode(self.embed(tokens), positions, cache, at, seen)
