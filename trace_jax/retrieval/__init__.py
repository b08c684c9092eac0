"""Embedding, indexing, searching and measuring with a trained retriever."""
