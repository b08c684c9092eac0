"""trace_jax: TRACE retrievers (arXiv 2603.02929) in JAX, for TPUs."""
