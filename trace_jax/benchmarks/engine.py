"""The reasoning engine: what reasoning and drafts cost, and the whole beside transformers."""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro

from trace_jax.benchmarks.measuring import CLOCKS, Clock, interleaved, report, timed
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Query
from trace_jax.model.vision import normalize_pixels
from trace_jax.retrieval import program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.generation import Work
from trace_jax.training import convert


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    run: str = "runs/quickstart"
    """The folder of a trained run."""
    root: str = "data"
    """Where its release is."""
    turns: int = 3
    """Of each measurement; the median counts."""
    clock: Clock = "wall"
    """Wall seconds or, where other programs run, those of this process on all its cores."""
    json: pathlib.Path | None = None
    """Where to write the figures."""


Flat = Annotated[Options, tyro.conf.arg(name="")]  # on the command line without a prefix


def _test_queries(retriever: Retriever, count: int) -> tuple[list[Query], np.ndarray]:
    """So many test queries, evenly from all query files that have training data, and which of them are complex."""
    benchmark = Benchmark(retriever.config)
    files = [benchmark.load(q) for q in benchmark.query_sets if q.split == "test" and q.trained]
    queries = list(itertools.chain(*(file.queries for file in files)))
    is_complex = np.concatenate([file.complex for file in files])
    chosen = np.linspace(0, len(queries) - 1, min(count, len(queries))).round().astype(int)
    return [queries[i] for i in chosen], is_complex[chosen]


def _variant(retriever: Retriever, **options: Any) -> Retriever:
    """The same model with other options of `evaluation`."""
    changed = dataclasses.replace(retriever.config.evaluation, **options)
    return retriever.configured(dataclasses.replace(retriever.config, evaluation=changed))


def engine(options: Flat = Options(), count: int = 2048) -> None:
    """What reasoning costs: adaptive beside direct, and a mixed batch beside the ideal.

    The ideal for a mixed batch is the time of direct for the queries that do not reason, and of decoding the others
    alone, in the best of several batch sizes.

    Args:
        options: which run, and how it is measured.
        count: test queries, simple and complex.
    """
    retriever = _load(options)
    queries, is_complex = _test_queries(retriever, count)
    simple = [query for query, hard in zip(queries, is_complex, strict=True) if not hard]
    thinks = retriever.encode_query(queries, "adaptive").reasoned
    quick, hard = ([q for q, long in zip(queries, thinks, strict=True) if long == kind] for kind in (False, True))
    contestants: dict[str, Callable[[], object]] = {
        "direct, simple queries": lambda: retriever.encode_query(simple, "direct"),
        "adaptive, simple queries": lambda: retriever.encode_query(simple, "adaptive"),
        "adaptive, mixed": lambda: retriever.encode_query(queries, "adaptive"),
        "direct, those that do not reason": lambda: retriever.encode_query(quick, "direct"),
        "adaptive, those that do not reason": lambda: retriever.encode_query(quick, "adaptive"),
    }
    for size in (32, 64, 128):
        alone = _variant(retriever, batch_size=size)
        contestants[f"the others, {size} at once"] = lambda alone=alone: alone.encode_query(hard, "adaptive")
    seconds = timed(contestants, options.turns, options.clock)
    decoding = min(each for name, each in seconds.items() if name.startswith("the others"))
    ideal = seconds["direct, those that do not reason"] + decoding
    print(f"{len(queries)} test queries, {len(simple)} simple; {len(hard)} reason. {options.turns} turns, medians\n")
    for name, each in seconds.items():
        print(f"{name:36}{each:8.2f} s")
    ratios = {
        "adaptive / direct, simple queries": seconds["direct, simple queries"] / seconds["adaptive, simple queries"],
        "the same, where none reasons": seconds["direct, those that do not reason"]
        / seconds["adaptive, those that do not reason"],
        "ideal / adaptive, mixed": ideal / seconds["adaptive, mixed"],
    }
    print()
    for name, ratio in ratios.items():
        print(f"{name:36}{ratio:8.3f}")
    report({"seconds": seconds, "ratios": ratios, "queries": len(queries), "reason": len(hard)}, options.json)


def drafts(options: Flat = Options(), count: int = 512) -> None:
    """What guessing tokens is worth, for one query at a time, a few, and many.

    Every run remembers the traces of as many other queries, as a server would, and none of those that are timed.

    Args:
        options: which run, and how it is measured.
        count: test queries, simple and complex; those that reason are taken, every other one to be remembered.
    """
    retriever = _load(options)
    queries, _ = _test_queries(retriever, count)
    thinks = retriever.encode_query(queries, "adaptive").reasoned
    hard = [query for query, long in zip(queries, thinks, strict=True) if long]
    remembered, asked = hard[1::2], hard[::2]
    some = {1: asked[:16], 8: asked[:64], 128: asked}  # by how many are decoded at once
    figures = []
    for size, taken in some.items():
        guessing = {number: _variant(retriever, batch_size=size, drafts=number) for number in (0, 2, 4)}
        runs: dict[str, Callable[[], object]] = {
            str(number): _remembering(guess, remembered, taken, size) for number, guess in guessing.items()
        }
        seconds = timed(runs, options.turns, options.clock)
        for number, guess in guessing.items():
            rate, work = len(taken) / seconds[str(number)], guess.work
            read, gain = work.tokens / work.useful, seconds["0"] / seconds[str(number)]
            figures.append({"at_once": size, "drafts": number, "queries_per_second": rate, "tokens_a_step": read})
            print(
                f"{size:4} at once, {number} drafts:{rate:8.1f} queries/s, {read:.2f} tokens a step, {gain:.2f} times"
            )
    report({"drafts": figures, "reason": len(hard)}, options.json)


def _remembering(
    retriever: Retriever, before: Sequence[Query], asked: Sequence[Query], size: int
) -> Callable[[], None]:
    """Encodes what is asked for, so many queries a call, each time after the same others."""
    retriever.encode_query(before, "always")
    known, retriever.work = retriever.memory, Work()

    def encode() -> None:
        retriever.memory = dataclasses.replace(known)
        for first in range(0, len(asked), size):
            retriever.encode_query(asked[first : first + size], "adaptive")

    return encode


def _load(options: Options) -> Retriever:
    """The retriever of a run, with its release in its place."""
    program.prepare_logging()
    loaded = Retriever.load(options.run)
    data = dataclasses.replace(loaded.config.data, root=options.root)
    return loaded.configured(dataclasses.replace(loaded.config, data=data))


def transformers(options: Flat = Options(), count: int = 1024) -> None:
    """The engine beside transformers: same weights, prompts and processors, and the same tokens out.

    Ours is timed from texts and image files, and from tokens and pixels, which it still has to pack; transformers is
    given tensors that are ready, sorted by length, in the best of several batch sizes. So many queries that each fills
    several batches: of one batch alone, what is timed is how it ends.

    Args:
        options: which run, and how it is measured.
        count: test queries; those that the release calls complex must always reason, all are embedded directly.
    """
    retriever = _load(options)
    queries, is_complex = _test_queries(retriever, count)
    hard = [query for query, deep in zip(queries, is_complex, strict=True) if deep]
    with tempfile.TemporaryDirectory() as folder:
        convert.export_merged(retriever.config, f"{folder}/model", dtype="float32")
        theirs = _Transformers(f"{folder}/model", retriever)
    sizes = (32, 64, 128)
    read, deep_read = ([retriever.processor.query(query) for query in some] for some in (queries, hard))

    def window(sequences: list[Tokens]) -> list[tuple[np.ndarray, list[Tokens]]]:
        return [(np.arange(len(sequences)), sequences)]

    contestants: dict[str, Callable[[], Any]] = {
        "direct, trace_jax": lambda: retriever.encode_query(queries, "direct").embeddings,
        "always, trace_jax": lambda: retriever.encode_query(hard, "always").traces,
        "direct, trace_jax from tokens": lambda: retriever._encode(window(read), len(read)),
        "always, trace_jax from tokens": lambda: list(retriever._generate(window(deep_read), len(deep_read), "always")),
    }
    for size in sizes:
        direct, always = theirs.batches(queries, size), theirs.batches(hard, size)
        contestants[f"direct, transformers, {size} at once"] = lambda batches=direct: theirs.embed(batches)
        contestants[f"always, transformers, {size} at once"] = lambda batches=always: theirs.write(batches)
    outputs = {name: contestant() for name, contestant in contestants.items()}  # compiles, too
    again = {name: lambda _, run=run: run() for name, run in contestants.items()}
    seconds = interleaved(again, range(options.turns), CLOCKS[options.clock])
    for name, each in seconds.items():
        print(f"{name:36}{each:8.2f} s")
    written = outputs["always, trace_jax"]
    off = np.abs(outputs["direct, trace_jax"] - outputs[f"direct, transformers, {sizes[0]} at once"]).max()
    same = np.mean([a == b for a, b in zip(written, outputs[f"always, transformers, {sizes[0]} at once"], strict=True)])
    ratios = {
        f"{kind}{start}": min(seconds[f"{kind}, transformers, {size} at once"] for size in sizes)
        / seconds[f"{kind}, trace_jax{start}"]
        for kind in ("direct", "always")
        for start in ("", " from tokens")
    }
    print(
        f"\n{len(hard)} traces, {same:.1%} the same; embeddings of {len(queries)} queries differ by at most {off:.1e}"
    )
    print("; ".join(f"{kind}: {ratio:.2f} times transformers" for kind, ratio in ratios.items()))
    report({"seconds": seconds, "ratios": ratios, "same_traces": same, "largest_difference": float(off)}, options.json)


class _Transformers:
    """Hugging Face's own model, with batches as it takes them: padded on the left."""

    def __init__(self, folder: str, retriever: Retriever) -> None:
        import torch  # of requirements-dev.txt
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.torch, self.retriever = torch, retriever
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.limit = retriever.config.evaluation.max_trace_tokens

    def batches(self, queries: Sequence[Query], size: int) -> list[tuple[list[int], dict]]:
        """Indices and arguments of each batch, by length."""
        sequences = [self.retriever.processor.query(query) for query in queries]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        chosen = [order[first : first + size] for first in range(0, len(order), size)]
        return [(members, self._arguments([sequences[i] for i in members])) for members in chosen]

    def _arguments(self, sequences: Sequence[Tokens]) -> dict:
        processor, vision = self.retriever.processor, self.retriever.model.architecture.vision
        length, images = max(map(len, sequences)), [image for each in sequences for image in each.images]
        tokens, mask = np.full((2, len(sequences), length), processor.pad, np.int64)
        mask[:] = 0
        for row, sequence in enumerate(sequences):
            tokens[row, length - len(sequence) :], mask[row, length - len(sequence) :] = sequence.tokens, 1
        arguments: dict[str, np.ndarray] = {
            "input_ids": tokens,
            "attention_mask": mask,
            "mm_token_type_ids": (tokens == processor.image_pad).astype(np.int32),
        }
        if images:
            values = [np.asarray(normalize_pixels(jnp.asarray(image.values), vision)) for image in images]
            unit = vision.merge_unit  # units in reading order
            values = [v.reshape(-1, unit, v.shape[1])[i.slots] for v, i in zip(values, images, strict=True)]
            arguments["pixel_values"] = np.concatenate(values).reshape(-1, vision.patch_dim)
            grids = [[1, *(vision.merge_size * side for side in image.grid)] for image in images]
            arguments["image_grid_thw"] = np.array(grids)
        return {name: self.torch.tensor(value) for name, value in arguments.items()}

    def embed(self, batches: Sequence[tuple[list[int], dict]]) -> np.ndarray:
        """The state at the end of each prompt, of unit length, in the order of the queries."""
        found: dict[int, np.ndarray] = {}
        with self.torch.inference_mode():
            for members, arguments in batches:
                states = self.model.model(**arguments, use_cache=False).last_hidden_state[:, -1].numpy()
                found |= dict(zip(members, states / np.linalg.norm(states, axis=1, keepdims=True), strict=True))
        return np.stack([found[i] for i in range(len(found))])

    def write(self, batches: Sequence[tuple[list[int], dict]]) -> list[str]:
        """Greedy traces in the order of the queries; the first token may not end one."""
        processor, found = self.retriever.processor, {}
        ends = [processor.emb, processor.end]
        options = {"do_sample": False, "min_new_tokens": 1, "max_new_tokens": self.limit, "eos_token_id": ends}
        with self.torch.inference_mode():
            for members, arguments in batches:
                out = self.model.generate(**arguments, **options, pad_token_id=processor.pad).numpy()
                for i, row in zip(members, out[:, arguments["input_ids"].shape[1] :], strict=True):
                    over = np.flatnonzero(np.isin(row, [*ends, processor.pad]))
                    found[i] = processor.decode(row[: over[0]] if len(over) else row).strip()
        return [found[i] for i in range(len(found))]
