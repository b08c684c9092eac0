"""Images of a thousand sizes compile at most as many programs as there are shapes to round to."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from trace_jax.data.schema import Document, Query
from trace_jax.data.tokenizer import Processor
from trace_jax.retrieval import embedder
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.packing import LEAST_LENGTH, LEAST_PATCHES, rounded

LONGEST_PROMPT, MOST_PATCHES = 256, 512


@pytest.fixture(scope="module")
def wide(retriever) -> Retriever:
    """Takes images of up to 100 visual tokens, so that prompts and images have many lengths."""
    unit = 4 * retriever.processor.geometry.patch_size**2
    sizes = {"min_pixels": unit, "max_pixels": 100 * unit, "row_length": 512, "patch_row_length": MOST_PATCHES}
    data = dataclasses.replace(retriever.config.data, **sizes)
    config = dataclasses.replace(retriever.config, data=data)
    processor = Processor.from_hf(config.model.base, data)
    known = {"identity": "wide", "digest": retriever.digest}
    return Retriever(retriever.model, processor, config, retriever.mesh, step=0, **known)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """1,000 pictures of 5 to 400 pixels a side, up to 8:1."""
    rng, files = np.random.default_rng(0), []
    for _ in range(1000):
        height = int(np.exp(rng.uniform(np.log(5), np.log(400))))
        width = int(np.clip(height * np.exp(rng.uniform(-2, 2)), 5, 400))
        file = io.BytesIO()
        Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist())).save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.mark.slow
def test_packed_documents(wide, files, capsys):
    documents = [Document("a picture" * (i % 3), file) for i, file in enumerate(files)]
    before = embedder._read.compilations
    vectors = wide.encode_document(documents, rooms=wide.rooms_for(documents[:200])).embeddings
    programs, buckets = embedder._read.compilations - before, 1  # all of them have an image
    with capsys.disabled():
        print(f"\n{len(documents)} documents of random sizes: {programs} programs, {buckets} bucket")
    assert np.isfinite(vectors).all()
    assert 0 < programs <= buckets


@pytest.mark.slow
def test_one_prompt_at_a_time(wide, files, capsys):
    queries = [Query("more of these" * (i % 5), file, "Find it.") for i, file in enumerate(files)]
    lengths = {rounded(length, LEAST_LENGTH) for length in range(1, LONGEST_PROMPT + 1)}
    patches = {rounded(length, LEAST_PATCHES) for length in range(1, MOST_PATCHES + 1)}
    before = embedder._read.compilations
    vectors = np.concatenate([wide.encode_query([query], "direct").embeddings for query in queries])
    programs, buckets = embedder._read.compilations - before, len(lengths) * len(patches)
    with capsys.disabled():
        print(f"\n{len(queries)} prompts with images of random sizes: {programs} programs, {buckets} buckets")
    assert np.isfinite(vectors).all()
    assert len(patches) / 2 < programs <= buckets  # the sizes do vary
