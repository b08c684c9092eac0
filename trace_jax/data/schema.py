"""What flows through the house: queries, documents, examples, and the one static-shape batch.

Shape letters, used in every docstring of the package:
  S  shards: data-parallel groups of devices, times the chunks of gradient caching; every array of a batch has S as
     its leading axis and no index of one shard points into another, so that nothing but the retrieval loss crosses
     devices
  R  packed text rows of a shard, L  tokens of a row
  V  packed vision rows of a shard, P  patches of a row (a multiple of the merge unit, 4)
  B  pairs of a shard, T  supervised tokens of a shard, K  known positives kept for a query, H  its hard negatives
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

SHARED = -1  # the segment of a beginning that all sequences of a row have in common: each of them sees it
Array = Any  # numpy on the host, jax.Array on the devices: one struct for both

# M-BEIR's task ids; i is image, t text, it both. 5 (i -> it) exists in no data set.
TASKS = {0: "t2i", 1: "t2t", 2: "t2it", 3: "i2t", 4: "i2i", 6: "it2t", 7: "it2i", 8: "it2it"}


MARK = "<image>"
"""Where a picture stands in the text of a query of several."""


@dataclasses.dataclass(frozen=True)
class Query:
    """What a user asks. `image` is an encoded file (PNG, JPEG, ...); text or image may be missing, not both.

    Of several images, as a dialog or a story has them, `image` is a tuple, and the text says where each stands: it
    holds as many times `<image>`.
    """

    text: str = ""
    image: bytes | tuple[bytes, ...] | None = None
    instruction: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip() and self.image is None:
            raise ValueError("empty query: give it a text, an image, or both")
        for image in self.images:
            _check_image(image)
        if isinstance(self.image, tuple) and f"{self.instruction}{self.text}".count(MARK) != len(self.image):
            raise ValueError(f"{len(self.image)} images, and {self.text.count(MARK)} times {MARK} in the text")

    @property
    def images(self) -> tuple[bytes, ...]:
        """All its images."""
        return self.image if isinstance(self.image, tuple) else (self.image,) if self.image is not None else ()


def placed(text: str, images: Sequence[bytes]) -> bytes | tuple[bytes, ...] | None:
    """The `image` of a query of this text: images that it marks the places of, or one that goes before it, or none."""
    return tuple(images) if images and MARK in text else next(iter(images), None)


@dataclasses.dataclass(frozen=True)
class Document:
    """What is searched for: a text, an encoded image file, or both."""

    text: str = ""
    image: bytes | None = None

    def __post_init__(self) -> None:
        if not self.text.strip() and self.image is None:
            raise ValueError("empty document: give it a text, an image, or both")
        _check_image(self.image)


def _check_image(image: Any) -> None:
    """Raises TypeError for a path, pixels, or the frames of a video."""
    if image is not None and not isinstance(image, bytes):
        raise TypeError(
            f"the image is a {type(image).__name__}; give the bytes of one image file (video is not supported)"
        )


@dataclasses.dataclass(frozen=True)
class Example:
    """One training pair, or (without a document) one prompt and response of the generative pretraining.

    `target` is what the model shall write before the closing token: the trace R of the paper, empty for a simple
    query. `positives` are the document keys that must never count as this query's negatives; the pair's own
    document is among them. Examples of one `query_key` ask the same, so that what is right for one is right for all.
    `negatives` are (document, key) of wrong answers that lie near.
    """

    query: Query
    document: Document | None
    target: str
    task: int
    query_key: int = -1  # nobody else's
    document_key: int = 0
    positives: tuple[int, ...] = ()
    negatives: tuple[tuple[Document, int], ...] = ()
    document_targets: tuple[str, ...] = ()  # as `target`, of the document and the negatives; () where none reasons
    name: str = ""  # the record that it came from, for error messages


class Inputs(NamedTuple):
    """What the model reads: sequences packed into rows, and the patches of their images packed into rows.

    A row of text holds several sequences, told apart by `segments`; attention never crosses a segment, but that all of
    a row see its SHARED beginning, if it has one. Patches are in window order (the order in which Qwen2.5-VL
    computes), merge units of 4 contiguous.
    """

    tokens: Array  # [S, R, L] int32; padding is the pad token
    segments: Array  # [S, R, L] int32; 1, 2, ... within a row; 0 is padding, -1 a beginning that the row shares
    positions: Array  # [S, R, L, 3] int32: M-RoPE time, height, width; padding is 0
    visual_index: Array  # [S, R, L] int32: which merged patch of the shard (0 .. V*P/4 - 1) stands here; -1 is text
    patches: Array  # [S, V, P, channels * patch * patch] uint8; padding is 0
    patch_positions: Array  # [S, V, P, 2] int32: row and column in the image's patch grid
    image_segments: Array  # [S, V, P] int32: 1, 2, ... within a row, one an image; 0 is padding
    window_segments: Array  # [S, V, P] int32: 1, 2, ... within a row, one an attention window; 0 is padding


class Batch(NamedTuple):
    """One training step's worth. Indices `*_index` are flat into the shard's R*L token slots."""

    inputs: Inputs
    query_index: Array  # [S, B] int32: the state that predicts <|emb|>; -1 where the slot holds no pair
    query_key: Array  # [S, B] int32: equal keys are the same query, whatever its qid; -1 as above
    document_index: Array  # [S, B] int32: likewise for the pair's document
    document_key: Array  # [S, B] int32: equal keys are the same document
    negative_index: Array  # [S, B, H] int32: likewise for hard negatives; -1 where a query has fewer
    negative_key: Array  # [S, B, H] int32
    positives: Array  # [S, B, K] int32: keys that are never negatives of this query; padding is -1
    task: Array  # [S, B] int32
    reasoned: Array  # [S, B] bool: the query has a trace
    first_index: Array  # [S, B] int32: the query's last prompt token, whose prediction routes; -1 as above
    target_index: Array  # [S, T] int32: the state that predicts a supervised token; padding is 0
    target_token: Array  # [S, T] int32
    target_weight: Array  # [S, T] float32: 1 supervised, 0 padding


def tree_bytes(tree: Any) -> int:
    """Bytes of all the arrays of a tree, as stored once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
