"""One search for a person: the query, the reasoning that the model wrote, the results, and a picture."""

import dataclasses
import difflib
import io
import json
import pathlib
import textwrap
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from trace_jax.config import Config
from trace_jax.data.builders import layout
from trace_jax.data.processor import open_image
from trace_jax.data.schema import TASKS, Document, Query
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.generation import Mode
from trace_jax.retrieval.index import open_index
from trace_jax.retrieval.pools import CandidateVectors

DEFAULT_TASK = {(True, False): "t2i", (False, True): "i2i", (True, True): "it2i"}  # by (has text, has image)


@dataclasses.dataclass(frozen=True)
class Hit:
    """One result."""

    did: str
    score: float  # cosine similarity
    document: Document


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a search gave, best first. `trace` is what the model wrote; "" where it embedded at once."""

    query: Query
    pool: str
    trace: str
    hits: list[Hit]


def read_query(text: str, image: str | None, instruction: str) -> Query:
    """A query from the command line. Raises ValueError for an empty one or an image that cannot be read."""
    data = None
    if image is not None:
        path = pathlib.Path(image)
        if not path.is_file():
            raise ValueError(f"{image}: no such image file")
        data = path.read_bytes()
        open_image(data, image)
    return Query(text, data, instruction)


def choose_pool(benchmark: Benchmark, name: str | None, query: Query) -> tuple[str, int]:
    """The pool of a name, and the task id whose candidates it holds (a global pool's: images).

    `name` is a task (it2i: the local pool of the first data set that has it), "global", or a pool in full;
    without one, images are searched. Raises ValueError for an unknown one, with a "did you mean".
    """
    usual = DEFAULT_TASK[bool(query.text.strip()), query.image is not None]
    wanted = name or usual
    tests = [query_set for query_set in benchmark.query_sets if query_set.split == "test"]
    by_task = {
        query_set.task: query_set for query_set in sorted(tests, key=lambda q: (not q.trained, q.stem), reverse=True)
    }
    if wanted in by_task:
        return by_task[wanted].pool, by_task[wanted].task_id
    pool = "global_test" if wanted == "global" else wanted
    known = ["global", *by_task, *benchmark.all_pools]
    if pool not in benchmark.all_pools:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}"
        raise ValueError(f"unknown pool {wanted!r}. {hint}")
    number = next(number for number, task in TASKS.items() if task == usual)
    return pool, next((q.task_id for q in benchmark.query_sets if q.pool == pool), number)


def search(config: Config, query: Query, *, pool: str | None = None, top: int = 5, mode: Mode | None = None) -> Answer:
    """Searches a pool of the run with its newest checkpoint.

    Without an instruction, the query gets the first one of the pool's task. Raises MissingStageError when
    there is no checkpoint or no index, TextTooLongError, and ValueError as `choose_pool`.
    """
    benchmark = Benchmark(config)
    chosen, task_id = choose_pool(benchmark, pool, query)
    index = open_index(config, benchmark, chosen)  # before the model, which takes longer to say that nothing is there
    if not query.instruction:
        query = dataclasses.replace(query, instruction=_instruction(benchmark, task_id, query))
    retriever = Retriever.load(config)
    if index.about["key"] != CandidateVectors(config, benchmark, retriever.whole_key).index_key:
        raise artifacts.MissingStageError(
            f"the index of {chosen} is of another checkpoint or release: run launch/embed.py and build_index.py"
        )
    results = retriever.encode_query([query], mode, cut=False)
    rows, scores = index.search(results.embeddings, top)
    candidates = benchmark.candidates
    hits = [
        Hit(layout.did_of(did), float(score), candidates.document(int(candidates.rows(np.array([did]))[0])))
        for did, score in zip(index.ids[rows[0]].tolist(), scores[0], strict=True)
        if np.isfinite(score)  # an approximate index may find fewer
    ]
    return Answer(query, chosen, results.traces[0], hits)


def to_json(config: Config, answer: Answer) -> dict[str, Any]:
    """An answer as plain JSON values; `image` is the path of a result's picture in the release, null for a text."""
    benchmark = Benchmark(config)
    pools = {layout.local_pool(benchmark.folder / "release", each.stem) for each in benchmark.query_sets}
    wanted, paths = {hit.did for hit in answer.hits if hit.document.image}, {}
    for pool in sorted(pools):
        with pool.open() as lines:
            while wanted - paths.keys() and (line := next(lines, None)):
                record = json.loads(line)
                if record["did"] in wanted:
                    paths[record["did"]] = str(benchmark.folder / "release" / record["img_path"])
    return {
        "text": answer.query.text,
        "instruction": answer.query.instruction,
        "pool": answer.pool,
        "trace": answer.trace,
        "results": [
            {"did": hit.did, "score": hit.score, "text": hit.document.text, "image": paths.get(hit.did)}
            for hit in answer.hits
        ],
    }


def _instruction(benchmark: Benchmark, task_id: int, query: Query) -> str:
    """The instruction of the task with the pool's candidates and the modality that the query really has."""
    source = ("i" if query.image is not None else "") + ("t" if query.text.strip() else "")
    name = f"{source}2{TASKS[task_id].split('2')[1]}"
    own = next((number for number, task in TASKS.items() if task == name), task_id)
    return benchmark.instruction(own)


# ---- the picture -----------------------------------------------------------------------------------------

_TILE, _GAP, _INK, _SOFT, _LINE, _PAPER = 168, 16, "#1d2129", "#667085", "#d9dde4", "#ffffff"


def draw(answer: Answer) -> Image.Image:
    """The query and its trace above the results, side by side."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    left = _GAP + (_TILE + _GAP) * len(answer.query.images)
    width = max(_GAP + len(answer.hits) * (_TILE + _GAP), left + 604)
    columns = (width - left - _GAP) // 8
    lines = [(line, small, _SOFT) for line in textwrap.wrap(answer.query.instruction, columns)]
    lines += [(line, font, _INK) for line in textwrap.wrap(answer.query.text, int(columns * 0.85))]
    wrote = f"wrote: {answer.trace}" if answer.trace else "no trace: <|emb|> came first"
    lines += [(line, small, _SOFT) for line in textwrap.wrap(wrote, columns)]
    top = max(_TILE if answer.query.images else 0, 26 * len(lines)) + 2 * _GAP
    words = [textwrap.wrap(hit.document.text, 24) for hit in answer.hits]
    picture = _TILE + 8 if any(hit.document.image for hit in answer.hits) else 0
    bottom = top + _GAP + picture + 17 * min(max(map(len, words), default=0), 8)
    page = Image.new("RGB", (width, bottom + 40), _PAPER)
    pen = ImageDraw.Draw(page)
    for place, image in enumerate(answer.query.images):
        _paste(page, image, (_GAP + place * (_TILE + _GAP), _GAP))
    for row, (line, face, colour) in enumerate(lines):
        pen.text((left, _GAP + 26 * row), line, fill=colour, font=face)
    pen.line([(_GAP, top), (width - _GAP, top)], fill=_LINE)
    for column, hit in enumerate(answer.hits):
        x, y = _GAP + column * (_TILE + _GAP), top + _GAP
        if hit.document.image:
            _paste(page, hit.document.image, (x, y))
        for row, line in enumerate(words[column][:8]):
            pen.text((x, y + picture + 17 * row), line, fill=_INK, font=small)
        pen.text((x, bottom + 8), f"{column + 1}.  {hit.score:.3f}", fill=_SOFT, font=small)
    return page


def _paste(page: Image.Image, image: bytes, at: tuple[int, int]) -> None:
    picture = open_image(image)
    scale = _TILE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    inset = [(_TILE - side) // 2 for side in picture.size]
    page.paste(picture, (at[0] + inset[0], at[1] + inset[1]))
    ImageDraw.Draw(page).rectangle([at, (at[0] + _TILE, at[1] + _TILE)], outline=_LINE)


def save_picture(answer: Answer, path: epath.Path) -> None:
    """Writes the picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    draw(answer).save(buffer, "PNG")
    artifacts.write_bytes(path, buffer.getvalue())
