"""Qwen2.5-VL's vision encoder: patches in window order, most blocks attending within windows, some within images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trace_jax import sharding
from trace_jax.model.architecture import VisionArchitecture
from trace_jax.model.attention import Backend, attention
from trace_jax.model.layers import (
    ATTENTION,
    DTypes,
    Linear,
    Remat,
    RMSNorm,
    Rotary,
    SwiGLU,
    rotate,
    run_layers,
    stack_layers,
    vision_rotary,
)

Array = jax.Array
NORM_EPS = 1e-6  # fixed by the reference, not in config.json


def normalize_pixels(patches: Array, architecture: VisionArchitecture) -> Array:
    """[..., patch_pixels] uint8 -> [..., patch_dim] float32: normalised by channel, the frame repeated along time.

    Of the reference's values up to the last bit, because XLA's division is not rounded as numpy's.
    """
    shape = patches.shape[:-1]
    by_channel = (1,) * len(shape) + (architecture.in_channels, 1)
    mean, std = (
        np.asarray(x, np.float32).reshape(by_channel) for x in (architecture.image_mean, architecture.image_std)
    )
    pixels = (patches.reshape(*shape, architecture.in_channels, -1).astype(jnp.float32) / np.float32(255) - mean) / std
    return jnp.repeat(pixels[..., None, :], architecture.temporal_patch_size, axis=-2).reshape(*shape, -1)


class VisionAttention(nnx.Module):
    """Multi-head attention with one fused projection and 2-D rotary embeddings."""

    def __init__(self, architecture: VisionArchitecture, *, dtypes: DTypes, rngs: nnx.Rngs) -> None:
        size = architecture.hidden_size
        self.qkv = Linear(size, 3 * size, bias=True, dtypes=dtypes, rngs=rngs)
        self.proj = Linear(size, size, bias=True, dtypes=dtypes, rngs=rngs)
        self.num_heads = architecture.num_heads

    def __call__(self, x: Array, rotary: Rotary, segments: Array, backend: Backend) -> Array:
        """[rows, P, hidden], angles [rows, P, head_dim / 2], segments [rows, P] -> [rows, P, hidden]."""
        rows, length, size = x.shape

        def by_head(columns: Array) -> Array:
            """The reference has q of all heads, then k, then v. To split heads over devices, the weights are put in
            another order, which costs less than to gather what they give.
            """
            return columns.reshape(*columns.shape[:-1], 3, self.num_heads, -1).swapaxes(-3, -2).reshape(columns.shape)

        qkv = jax.tree.map(by_head, self.qkv)(x)
        qkv = qkv.reshape(rows, length, self.num_heads, 3, -1).transpose(3, 0, 2, 1, 4)
        q, k, v = rotate(qkv[0], rotary), rotate(qkv[1], rotary), qkv[2]
        y = attention(q, k, v, segments_q=segments, segments_kv=segments, causal=False, backend=backend)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(rows, length, size))


class VisionBlock(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, architecture: VisionArchitecture, *, dtypes: DTypes, rngs: nnx.Rngs) -> None:
        size = architecture.hidden_size
        self.norm1 = RMSNorm(size, eps=NORM_EPS, dtype=dtypes.compute, param_dtype=dtypes.params)
        self.attn = VisionAttention(architecture, dtypes=dtypes, rngs=rngs)
        self.norm2 = RMSNorm(size, eps=NORM_EPS, dtype=dtypes.compute, param_dtype=dtypes.params)
        self.mlp = SwiGLU(size, architecture.intermediate_size, bias=True, dtypes=dtypes, rngs=rngs)

    def __call__(self, x: Array, rotary: Rotary, segments: Array, backend: Backend) -> Array:
        """Shapes as `VisionAttention`."""
        x = x + checkpoint_name(self.attn(self.norm1(x), rotary, segments, backend), ATTENTION)
        return x + self.mlp(self.norm2(x))


class VisionEncoder(nnx.Module):
    """Patches to features. All blocks share one body; which segments it attends within differs by block."""

    def __init__(
        self,
        architecture: VisionArchitecture,
        *,
        dtypes: DTypes,
        scan_layers: bool,
        remat: Remat,
        attention: Backend,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch_embed = Linear(architecture.patch_dim, architecture.hidden_size, dtypes=dtypes, rngs=rngs)
        self.blocks = stack_layers(
            lambda keys: VisionBlock(architecture, dtypes=dtypes, rngs=keys), architecture.depth, rngs
        )
        self.architecture = architecture
        self.scan_layers = scan_layers
        self.remat: Remat = remat
        self.attention: Backend = attention

    def __call__(self, patches: Array, positions: Array, image_segments: Array, window_segments: Array) -> Array:
        """[rows, P, patch_pixels] uint8, [rows, P, 2], [rows, P], [rows, P] int32 -> [rows, P, hidden].

        Padding (segment 0) gives finite values that mean nothing.
        """
        architecture = self.architecture
        rotary = vision_rotary(positions, architecture.head_dim, architecture.rope_theta)
        full = np.isin(np.arange(architecture.depth), architecture.full_attention_blocks)

        def body(block: VisionBlock, x: Array, is_full: Array) -> tuple[Array, None]:
            segments = jnp.where(is_full, image_segments, window_segments)
            return block(x, rotary, segments, self.attention), None

        x = sharding.gathered(self.patch_embed, "vision/patch_embed")(normalize_pixels(patches, architecture))
        run = {"path": "vision/blocks", "scan": self.scan_layers, "remat": self.remat}
        return run_layers(body, x, self.blocks, full, **run)[0]
