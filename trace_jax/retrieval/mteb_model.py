"""A retriever as a model of MTEB, whose tasks of texts and images it can then be measured on (docs/mteb.md).

MTEB is an option (requirements-mteb.txt): nothing else of the package imports this module.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.model_meta import ModelMeta, ScoringFunction  # pyright: ignore[reportMissingImports]
from mteb.types import PromptType  # pyright: ignore[reportMissingImports]

from trace_jax.retrieval.embedder import WINDOW, Retriever
from trace_jax.retrieval.items import read_document

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata  # pyright: ignore[reportMissingImports]


class MtebModel:
    """What `mteb.evaluate` takes: its encoder protocol over a `Retriever`.

    Queries reason as `config.evaluation.mode` says, asked with the task's own prompt. Documents, and the two sides of a
    task that has no queries, are embedded as documents.
    """

    def __init__(self, retriever: Retriever) -> None:
        config = retriever.config
        self.retriever = retriever
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"trace_jax/{config.name}",
            revision=retriever.key,  # results are kept under it: another checkpoint has another
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=config.data.max_text_tokens,
            embed_dim=retriever.width,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image"],
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: "TaskMetadata",
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The items of MTEB's batches (columns "text" and "image") as vectors: [n, d] float32, L2-normalised.

        A thousand are in memory at once. Raises ValueError for an item without text and image, naming it by its number.
        """
        del hf_split, hf_subset, options
        retriever, parts, rooms = self.retriever, [np.zeros((0, self.retriever.width), np.float32)], None
        rows, asked = _rows(inputs), {"instruction": _instruction(task_metadata)}
        while window := list(itertools.islice(rows, WINDOW)):
            names = [f"{task_metadata.name}, item {sum(map(len, parts)) + i}" for i in range(len(window))]
            if prompt_type == PromptType.query:
                encoded = retriever.encode_query([row | asked for row in window], names=names)
            else:
                encoded = retriever.encode_document(window, names=names, rooms=rooms)
                rooms = rooms or retriever.rooms_for([read_document(row) for row in window])  # all else in these shapes
            parts.append(encoded.embeddings)
        return np.concatenate(parts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of all pairs: [n, d], [m, d] -> [n, m] float32."""
        return np.atleast_2d(embeddings1) @ np.atleast_2d(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of the pairs at the same place: [n, d], [n, d] -> [n] float32."""
        return np.sum(np.atleast_2d(embeddings1) * np.atleast_2d(embeddings2), axis=-1)


def _rows(inputs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The items of batches, one at a time."""
    for batch in inputs:
        columns = {name: batch[name] for name in ("text", "image") if name in batch}
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _instruction(task: "TaskMetadata") -> str:
    """The prompt that a task's queries are asked with; "" where it has none."""
    prompt = task.prompt
    return (prompt.get("query") if isinstance(prompt, dict) else prompt) or ""
