"""trace_jax: TRACE retrievers (arXiv 2603.02929) in JAX, for TPUs.

The public names are imported on first use, so that reading a configuration does not wait for the model's libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_jax.config import load_config
    from trace_jax.data.schema import Document, Query
    from trace_jax.retrieval.embedder import Retriever

__all__ = ["Document", "Query", "Retriever", "load_config"]

_HOMES = {
    "Document": "trace_jax.data.schema",
    "Query": "trace_jax.data.schema",
    "Retriever": "trace_jax.retrieval.embedder",
    "load_config": "trace_jax.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
