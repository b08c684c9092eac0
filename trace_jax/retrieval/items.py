"""What callers may hand over as a query or a document, made into a Query or a Document."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from trace_jax.data.schema import Document, Query

Item = Query | Document | str | Mapping[str, Any]  # a text alone, or {"text": ..., "image": ...}


def read_query(item: Item) -> Query:
    """A Query as it is, a text, or a mapping of text, image (see `read_image`; a tuple of several, if the text marks
    their places as `Query` says) and instruction, each optional.

    Raises ValueError for an empty one, other keys, or an image that is not there; TypeError for any other type.
    """
    query = item if isinstance(item, Query) else Query(**_fields(item, ("text", "image", "instruction")))
    _check_text(query.text + query.instruction)
    return query


def read_document(item: Item) -> Document:
    """As `read_query`, of text and image."""
    document = item if isinstance(item, Document) else Document(**_fields(item, ("text", "image")))
    _check_text(document.text)
    return document


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half of a character (a lone surrogate)") from error


def _fields(item: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, Mapping):
        kinds = "a text, or a mapping of " + ", ".join(known)
        raise TypeError(f"a {type(item).__name__} cannot be embedded; give {kinds}")
    if unknown := sorted(map(str, set(item) - set(known))):
        raise ValueError(f"unknown {', '.join(unknown)}; a mapping holds {', '.join(known)}")
    fields = {name: item[name] for name in known if item.get(name) is not None}
    for name in set(fields) - {"image"}:
        if not isinstance(fields[name], str):
            raise TypeError(f"the {name} is a {type(fields[name]).__name__}; give a str")
    if "image" in fields:
        image = fields["image"]
        fields["image"] = tuple(map(read_image, image)) if isinstance(image, tuple) else read_image(image)
    return fields


def read_image(source: Any) -> bytes:
    """An image file's bytes, from them, a path (local or gs://), a Pillow image, or pixels [height, width, 3] uint8.

    Pixels are kept as they are (PNG). Raises ValueError for a path without a file, a damaged Pillow image, or pixels of
    another shape or dtype, TypeError for any other type.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        path = epath.Path(source)
        try:
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no such image file, or it cannot be read ({error})") from error
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ValueError(f"pixels {source.dtype} {source.shape}; give uint8 [height, width, 3]")
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        raise TypeError(
            f"the image is a {type(source).__name__}; give bytes, a path, a Pillow image or pixels of one image"
            " (video is not supported)"
        )
    file = io.BytesIO()
    try:
        source.load()
    except (OSError, SyntaxError) as error:  # what a file that was opened holds is read only now
        raise ValueError(f"the image cannot be read ({error})") from error
    try:
        source.save(file, "PNG", compress_level=1)
    except OSError:  # a mode that PNG does not have
        file = io.BytesIO()
        source.convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()
