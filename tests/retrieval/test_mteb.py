"""The model of MTEB, on a task that exists in memory alone; skipped where MTEB is not installed."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

with warnings.catch_warnings():  # its libraries' own
    warnings.simplefilter("ignore")
    mteb = pytest.importorskip("mteb")
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import EncoderProtocol
    from mteb.types import PromptType

    from trace_jax.retrieval.mteb_model import MtebModel

from trace_jax.data.schema import Document, Query
from trace_jax.retrieval.measures import ndcg_at

PROMPT = "Find the picture after this change."
COUNT = 6


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (28, 28), (40 * number, 255 - 40 * number, 90))
    image.paste((255, 255, 255), (0, 0, 4 * number + 4, 14))
    return image


def png(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


class Changes(AbsTaskRetrieval):
    """Every query has two right answers."""

    metadata = TaskMetadata(
        name="Changes",
        description="Pictures and changes, drawn here.",
        reference=None,
        dataset={"path": "in/memory", "revision": "1"},
        type="Any2AnyRetrieval",
        category="it2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt={"query": PROMPT},
    )

    def load_data(self, num_proc: int | None = None, **_) -> None:
        ids = [str(i) for i in range(COUNT)]
        asked = {"id": ids, "text": [f"make it {i}" for i in ids], "image": [picture(i) for i in range(COUNT)]}
        data = RetrievalSplitData(
            queries=datasets.Dataset.from_dict(asked),
            corpus=datasets.Dataset.from_dict({"id": ids, "image": [picture(i) for i in range(COUNT)]}),
            relevant_docs={str(i): {str((i + 1) % COUNT): 1, str((i + 2) % COUNT): 1} for i in range(COUNT)},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def expected(retriever) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of the task's queries and documents by our own API."""
    queries = [Query(f"make it {i}", png(i), PROMPT) for i in range(COUNT)]
    documents = [Document(image=png(i)) for i in range(COUNT)]
    return retriever.encode_query(queries).embeddings, retriever.encode_document(documents).embeddings


@pytest.mark.filterwarnings("ignore")  # MTEB's own
def test_mteb_measures_what_we_measure(retriever, expected):
    model = MtebModel(retriever)
    assert isinstance(model, EncoderProtocol)
    result = mteb.evaluate(model, Changes(), cache=None, co2_tracker=False, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    queries, documents = expected
    found = np.argsort(-queries @ documents.T, axis=1, kind="stable")
    right = [frozenset({(i + 1) % COUNT, (i + 2) % COUNT}) for i in range(COUNT)]
    assert scores["ndcg_at_10"] == pytest.approx(ndcg_at(found, right, 10).mean(), abs=1e-4)
    assert result.model_revision == retriever.key and result.model_name == "trace_jax/tiny"


def test_its_batches_become_our_items(retriever, expected):
    model, task = MtebModel(retriever), Changes.metadata
    batches = [
        {"id": ["0", "1"], "text": ["make it 0", "make it 1"], "image": [picture(0), picture(1)]},
        {"id": ["2"], "text": ["make it 2"], "image": [picture(2)]},
    ]
    found = model.encode(batches, task_metadata=task, prompt_type=PromptType.query)
    np.testing.assert_allclose(found, expected[0][:3], atol=2e-5)
    documents = [{"image": [picture(i) for i in range(COUNT)]}]
    vectors = model.encode(documents, task_metadata=task, prompt_type=PromptType.document)
    np.testing.assert_allclose(vectors, expected[1], atol=2e-5)
    np.testing.assert_allclose(model.similarity(found, vectors)[1, 1], found[1] @ vectors[1], atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(found, vectors[:3])[1], found[1] @ vectors[1], atol=1e-6)
    assert model.encode([], task_metadata=task, prompt_type=PromptType.document).shape == (0, retriever.width)
    with pytest.raises(ValueError, match="Changes, item 1: empty document"):
        model.encode([{"text": ["a", ""]}], task_metadata=task, prompt_type=PromptType.document)
