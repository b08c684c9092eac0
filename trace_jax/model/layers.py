"""Building blocks: Linear with its optional LoRA, RMSNorm, SwiGLU, rotary embeddings, stacks of layers.

The dtype policy is written here, once: parameters are stored in `DTypes.params`, matrix products run in
`DTypes.compute`; norms and rotary angles are float32, and so is everything that TRACE trains (LoRA, projector,
the row of <|emb|>). Whatever else trains is loaded in float32 (`weights.stored_dtype`).
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import sharding
from trace_jax.config import Lora

Array = jax.Array
Remat = Literal["none", "dots", "attention", "full"]
INT8 = 127.0  # the largest value of a quantised kernel
ATTENTION = "attention"  # what attention reads and gives, by the name that a remat policy knows it by
M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class DTypes:
    """What matrix products run in, and what the base's parameters are stored in."""

    compute: jnp.dtype
    params: jnp.dtype
    int8: bool = False  # kernels are stored as `quantized` makes them


def quantized(kernel: Array) -> tuple[Array, Array]:
    """A kernel [..., in, out] as int8 [..., in, out] and the float32 scale [..., out] of its columns, whose product it
    is but for rounding: at most half a scale.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / INT8, jnp.float32(1))
    return jnp.round(kernel / scale).astype(jnp.int8), scale[..., 0, :]


def with_adapter(kernel: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """A kernel [..., in, out] with its adapter added, in float32."""
    return kernel.astype(jnp.float32) + scale * jnp.matmul(lora_a, lora_b, precision=jax.lax.Precision.HIGHEST)


class Linear(nnx.Module):
    """y = x kernel + bias + scale (drop(x) lora_a) lora_b, in `dtypes.compute`.

    `kernel` [in, out], or with `dtypes.int8` as `quantized` makes it, with `kernel_scale` [out] float32; `bias` [out];
    `lora_a` [in, rank], uniform as PEFT's kaiming_uniform(sqrt 5); `lora_b` [rank, out], zeros. Bias and adapters are
    optional. After `fold` with `below`, `kernel` is [in + rank, out] and there is no `lora_b`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        lora: Lora | None = None,
        dtypes: DTypes,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (in_features, out_features), jnp.float32)
        stored, column = quantized(kernel) if dtypes.int8 else (kernel.astype(dtypes.params), None)
        self.kernel = nnx.Param(stored)
        self.kernel_scale = None if column is None else nnx.Param(column)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtypes.params)) if bias else None
        rank = 0 if lora is None else lora.rank
        limit = 1 / math.sqrt(in_features)
        a = jax.random.uniform(rngs.params(), (in_features, rank), jnp.float32, minval=-limit, maxval=limit)
        self.lora_a = nnx.LoRAParam(a) if rank else None
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, out_features), jnp.float32)) if rank else None
        self.scale = 0.0 if lora is None else lora.alpha / (math.sqrt(rank) if lora.rslora else rank)
        self.dropout = 0.0 if lora is None else lora.dropout
        self.dtype = dtypes.compute

    def __call__(self, x: Array, dropout: Array | None = None) -> Array:
        """[..., in] any float -> [..., out] in the compute dtype. `dropout` is the key of the adapter's; None: off.

        The product is a plain matrix product: XLA:CPU takes twice as long for the gradient of a batched one.
        """
        leading = x.shape[:-1]
        x = x.astype(self.dtype).reshape(-1, x.shape[-1])
        if self.lora_a is not None and self.lora_b is None:
            x = jnp.concatenate([x, x @ self.lora_a[...].astype(self.dtype)], axis=-1)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.kernel_scale is not None:
            y = y.astype(jnp.float32)
            y = (y * _row(self.kernel_scale[...], y)).astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            seen = x
            if dropout is not None and self.dropout:
                kept = jax.random.bernoulli(dropout, 1 - self.dropout, x.shape)
                seen = jnp.where(kept, x / jnp.asarray(1 - self.dropout, self.dtype), jnp.zeros((), self.dtype))
            low = seen @ self.lora_a[...].astype(self.dtype)
            y = y + jnp.asarray(self.scale, self.dtype) * (low @ self.lora_b[...].astype(self.dtype))
        if self.bias is not None:
            y = y + _row(self.bias[...], y)
        return y.reshape(*leading, -1)

    def fold(self, path: str, *, below: bool) -> None:
        """Makes the adapter a part of the kernel at `path`, of one layer or of a stack. Added, it is gone; `below` puts
        its rows under the kernel's: one product then gives both, and nothing is rounded that was not.
        """
        if self.lora_a is None or self.lora_b is None:
            return

        def make(kernel: Array, lora_a: Array, lora_b: Array) -> Array:
            if below:
                new = jnp.concatenate([kernel, (self.scale * lora_b).astype(kernel.dtype)], axis=-2)
            else:
                new = with_adapter(kernel, lora_a, lora_b, self.scale).astype(kernel.dtype)
            return sharding.placed(new, f"{path}/kernel")

        self.kernel = nnx.Param(jax.jit(make)(self.kernel[...], self.lora_a[...], self.lora_b[...]))
        self.lora_a = nnx.LoRAParam(self.lora_a[...].astype(self.dtype)) if below else None
        self.lora_b = None


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32; `scale` [features]."""

    def __init__(self, features: int, *, eps: float, dtype: Any, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """[..., features] any float -> the same shape in `dtype`."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * _row(self.scale[...], x)).astype(self.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, features: int, hidden: int, *, bias: bool, lora: Lora | None = None, dtypes: DTypes, rngs: nnx.Rngs
    ) -> None:
        def linear(name: str, in_features: int, out_features: int) -> Linear:
            adapter = lora_for(lora, name)
            return Linear(in_features, out_features, bias=bias, lora=adapter, dtypes=dtypes, rngs=rngs)

        self.gate_proj = linear("gate_proj", features, hidden)
        self.up_proj = linear("up_proj", features, hidden)
        self.down_proj = linear("down_proj", hidden, features)

    def __call__(self, x: Array, dropout: Array | None = None) -> Array:
        """[..., features] -> [..., features]. `dropout` is the layer's key, None: off."""
        gate = self.gate_proj(x, dropout_key(dropout, "gate_proj"))
        up = self.up_proj(x, dropout_key(dropout, "up_proj"))
        return self.down_proj(jax.nn.silu(gate) * up, dropout_key(dropout, "down_proj"))


def lora_for(lora: Lora | None, name: str) -> Lora | None:
    """`lora` when the linear layer called `name` is among its targets."""
    return lora if lora is not None and name in lora.targets else None


def dropout_key(layer: Array | None, name: str) -> Array | None:
    """The key of the linear layer called `name`, from that of its decoder layer; None stays None."""
    return None if layer is None else jax.random.fold_in(layer, zlib.crc32(name.encode()))


def _row(vector: Array, like: Array) -> Array:
    """[n] -> [1, ..., n] of the rank and dtype of `like`."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


# ---- rotary embeddings -------------------------------------------------------------------------------------------

Rotary = tuple[Array, Array]  # cosine and sine, [..., length, head_dim / 2] float32


def _frequencies(count: int, theta: float) -> np.ndarray:
    """[count] float32: theta^(-i / count), rounded where the reference rounds: far into a text the last bit counts."""
    exponents = np.arange(count, dtype=np.float32) / np.float32(count)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)


def text_rotary(positions: Array, section: Sequence[int], theta: float) -> Rotary:
    """M-RoPE: [..., 3] int32 positions -> cosine and sine [..., head_dim / 2].

    The first section[0] frequencies turn with the time, the next section[1] with the height, the rest with the width.
    """
    component = np.repeat(np.arange(3), section)
    return _turn(positions[..., component], _frequencies(sum(section), theta))


def vision_rotary(positions: Array, head_dim: int, theta: float) -> Rotary:
    """2-D: [..., 2] int32 rows and columns -> cosine and sine [..., head_dim / 2], half the angles for each."""
    component = np.repeat(np.arange(2), head_dim // 4)
    return _turn(positions[..., component], np.tile(_frequencies(head_dim // 4, theta), 2))


def _turn(positions: Array, frequencies: np.ndarray) -> Rotary:
    positions = positions.astype(jnp.float32)
    angles = positions * _row(jnp.asarray(frequencies), positions)
    # A loop of two steps, which XLA does not fuse: else it computes them anew in every layer and head. (A barrier is
    # gone before XLA:CPU fuses; a loop over rows would gather what the mesh splits.)
    cos, sin = jax.lax.map(lambda even: jax.lax.cond(even, jnp.cos, jnp.sin, angles), jnp.array([True, False]))
    return cos, sin


def rotate(x: Array, rotary: Rotary) -> Array:
    """Turns x [rows, heads, length, head_dim] by the angles [rows, length, head_dim / 2], in float32."""
    cos, sin = (part[:, None] for part in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# ---- stacks of layers --------------------------------------------------------------------------------------------


def stack_layers(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """One module whose parameters hold those of `count` layers along a leading axis."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def unstack_layers(layers: M | list[M], count: int) -> list[M]:
    """The single layers of a stack, or of a list of them; the gradients come back by one concatenation."""
    if isinstance(layers, list):
        return layers
    leaves, structure = jax.tree.flatten(layers)
    split = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    return [structure.unflatten([part[i].reshape(part[i].shape[1:]) for part in split]) for i in range(count)]


def run_layers(
    body: Callable[[Any, Array, Any], tuple[Array, Any]],
    x: Array,
    layers: nnx.Module,
    extra: np.ndarray,
    *,
    path: str,
    scan: bool,
    remat: Remat,
    last: Callable[[Any, Array, Any], tuple[Array, Any]] | None = None,
) -> tuple[Array, list[Any]]:
    """Folds `body(layer, x, extra[i]) -> (x, kept)` over the stack at `path`; returns x and what each layer kept.

    On a mesh each layer's weights are gathered in the body, one layer at a time (`sharding.gathered`). `scan` compiles
    one body for all layers, else the loop is unrolled (faster on XLA:CPU). `remat`: "full" saves only the input of each
    layer for the backward pass, "attention" also what attention reads and gives, so that only the MLP is computed
    again, "dots" the products with weights, "none" everything. `last` is the body of the last layer where that is
    another one; it is not for gradients.
    """

    def gathering(body: Any, layer: nnx.Module, x: Array, one: Any) -> tuple[Array, Any]:
        return body(sharding.gathered(layer, path, stacked=True), x, one)

    run: Any = functools.partial(gathering, body)
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        run = jax.checkpoint(run, policy=policy, prevent_cse=not scan)
    elif remat == "attention":
        policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)
        run = jax.checkpoint(run, policy=policy, prevent_cse=not scan)
    elif remat == "full":
        run = jax.checkpoint(run, prevent_cse=not scan)
    elif remat != "none":
        raise ValueError(f"remat {remat!r} is none of 'none', 'dots', 'attention', 'full'")
    count = len(extra)
    if scan and last is not None:

        def one_of(index: Array | int) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)

        # By number: the layers but one would be a copy of nearly all weights.
        x, kept = jax.lax.scan(lambda x, i: run(one_of(i), x, jnp.asarray(extra)[i]), x, jnp.arange(count - 1))
        x, own = gathering(last, one_of(count - 1), x, extra[-1])
        return x, [*(jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i in range(count - 1)), own]
    if scan:
        x, kept = jax.lax.scan(lambda x, each: run(each[0], x, each[1]), x, (layers, jnp.asarray(extra)))
        return x, [jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i in range(count)]
    outputs = []
    runs = [run] * (count - 1) + [run if last is None else functools.partial(gathering, last)]
    for each, layer, one in zip(runs, unstack_layers(layers, count), extra, strict=True):
        x, kept = each(layer, x, one)
        outputs.append(kept)
    return x, outputs
