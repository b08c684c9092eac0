"""The patch merger, which TRACE trains in full (paper Fig. 3): merge units of patches become visual tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trace_jax.model.architecture import VisionArchitecture
from trace_jax.model.layers import DTypes, Linear, RMSNorm
from trace_jax.model.vision import NORM_EPS

Array = jax.Array


class Projector(nnx.Module):
    """Norm, concatenation of a unit's patches, two linear layers around an exact GELU; float32 parameters."""

    def __init__(self, architecture: VisionArchitecture, *, dtypes: DTypes, rngs: nnx.Rngs) -> None:
        dtypes = dataclasses.replace(dtypes, params=jnp.dtype(jnp.float32))
        merged = architecture.hidden_size * architecture.merge_unit
        size = architecture.hidden_size
        self.ln_q = RMSNorm(size, eps=NORM_EPS, dtype=dtypes.compute, param_dtype=dtypes.params)
        self.mlp_0 = Linear(merged, merged, bias=True, dtypes=dtypes, rngs=rngs)
        self.mlp_2 = Linear(merged, architecture.out_hidden_size, bias=True, dtypes=dtypes, rngs=rngs)
        self.merge_unit = architecture.merge_unit

    def __call__(self, x: Array) -> Array:
        """[rows, P, vision hidden] -> [rows, P / merge_unit, language hidden]."""
        rows, length, size = x.shape
        x = self.ln_q(x).reshape(rows, length // self.merge_unit, self.merge_unit * size)
        return self.mlp_2(jax.nn.gelu(self.mlp_0(x), approximate=False))
