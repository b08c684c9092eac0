"""Floating-point operations that a traced program does, in its matrix products alone (2 a multiply-add).

What the architecture needs is in model/flops.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex
from jax.interpreters import partial_eval


def program_flops(jaxpr: jex.ClosedJaxpr) -> float:
    """The matrix products of a program over all devices, loops multiplied out; what has no use is left out.

    A loop whose length is not known counts once, a conditional as its dearest branch. A kernel counts every step of its
    grid, also those that skip a masked block: an upper bound for causal splash attention.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return _count(used)


def _count(jaxpr: Any) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    inner = _inner_jaxprs(list(params.values()))
    counts = [_count(each) for each in inner]
    if name == "cond":
        return max(counts, default=0.0)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size  # the shapes within are of one device
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(counts)


def _inner_jaxprs(values: Sequence[Any]) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, tuple | list):
            found += _inner_jaxprs(value)
        elif isinstance(value, jex.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, jex.Jaxpr):
            found.append(value)
    return found
