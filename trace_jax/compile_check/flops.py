"""Floating-point operations that a traced program does, in its matrix products alone (2 a multiply-add).

What the architecture needs is in model/flops.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np
from jax.interpreters import partial_eval

Known = Mapping[Any, Any]  # variable -> its value, of those that are constants


def program_flops(jaxpr: jex.ClosedJaxpr) -> float:
    """The matrix products of a program over all devices, loops multiplied out; what has no use is left out.

    A loop whose length is not known counts once, a conditional as its dearest branch. A kernel counts every step of its
    grid but those that the constant block mask of splash attention skips: the blocks above the diagonal of a causal
    call. A block is computed whole, whatever segments see of it.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return _count(used, dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)))


def _count(jaxpr: Any, known: Known) -> float:
    return sum(_count_equation(equation, known) for equation in jaxpr.eqns)


def _count_equation(equation: Any, known: Known) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    passed = equation.invars[: params["num_consts"]] if name == "scan" else equation.invars
    counts = [
        _count(jaxpr, constants | _inside(jaxpr, passed, known, first=name == "scan"))
        for jaxpr, constants in _inner_jaxprs(list(params.values()))
    ]
    if name == "cond":
        return max(counts, default=0.0)
    times = 1.0
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size  # the shapes within are of one device
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid) * _computed(equation, known)
    return times * sum(counts)


def _inner_jaxprs(values: Sequence[Any]) -> Iterator[tuple[Any, dict[Any, Any]]]:
    """The programs among an equation's parameters, with their constants."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)
        elif isinstance(value, jex.ClosedJaxpr):
            yield value.jaxpr, dict(zip(value.jaxpr.constvars, value.consts, strict=True))
        elif isinstance(value, jex.Jaxpr):
            yield value, {}


def _inside(jaxpr: Any, passed: Sequence[Any], known: Known, *, first: bool) -> dict[Any, Any]:
    """The constants that an equation passes to a program within: to its first arguments, or else to its last."""
    own = jaxpr.invars[: len(passed)] if first else jaxpr.invars[-len(passed) :]
    pairs = zip(own, passed[-len(own) :], strict=True)
    return {
        inner: known[outer]
        for inner, outer in pairs
        if not isinstance(outer, jex.Literal) and outer in known and inner.aval.shape == outer.aval.shape
    }


def _computed(kernel: Any, known: Known) -> float:
    """The share of a kernel's grid that computes: what the block mask, where it is a constant, does not skip."""
    names = kernel.params["jaxpr"].debug_info.arg_names or ()
    if "block_mask_ref" not in names:
        return 1.0
    mask = known.get(kernel.invars[names.index("block_mask_ref")])
    return 1.0 if mask is None else np.count_nonzero(mask) / np.size(mask)
