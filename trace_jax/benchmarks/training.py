"""The training step beside transformers with PEFT."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trace_jax import sharding
from trace_jax.benchmarks.measuring import interleaved, report
from trace_jax.config import Config, load_config
from trace_jax.data.pipeline import Pipeline
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.tokenizer import Processor
from trace_jax.model.architecture import Architecture
from trace_jax.model.vision import normalize_pixels
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import (
    TrainState,
    host_batches,
    init_optimizer,
    load_model,
    make_train_step,
    split_model,
)


def train_step(config: str = "emoji_tiny", steps: int = 8, json: pathlib.Path | None = None) -> None:
    """Seconds of a training step on one device: ours beside transformers with PEFT, same pairs, loss and precision.

    Theirs as it is commonly written: one padded batch of queries, one of documents, the head on supervised tokens
    alone, InfoNCE from query to document, AdamW. The two losses of the first batch are printed: they must agree.

    Args:
        config: of configs/; its base must be there, its release built.
        steps: batches, each read by both; the first, which compiles, is left out.
        json: where to write the figures.
    """
    chosen = load_config(config)
    chosen = dataclasses.replace(chosen, loss=dataclasses.replace(chosen.loss, both_directions=False))
    processor = Processor.from_hf(chosen.model.base, chosen.data)
    mesh = sharding.make_mesh(chosen.mesh, jax.devices()[:1])
    pipeline = host_batches(chosen, processor, mesh)
    contestants = {
        "trace_jax": _our_step(chosen, processor, mesh, pipeline),
        "transformers, PEFT": _torch_step(chosen, processor, pipeline),
    }
    losses = {name: run(0) for name, run in contestants.items()}
    seconds = interleaved(contestants, range(1, steps))
    ratio = seconds["transformers, PEFT"] / seconds["trace_jax"]
    print(f"{config}, {chosen.data.batch_size} pairs a step, {steps - 1} steps of each in turns, medians\n")
    print(f"{'':26}{'s/step':>9}{'first loss':>12}")
    for name, each in seconds.items():
        print(f"{name:26}{each:9.2f}{losses[name]:12.4f}")
    print(f"\n{ratio:.2f} times transformers' speed")
    report({"seconds": seconds, "first_loss": losses, "ratio": ratio, "threads": os.cpu_count()}, json)


def _our_step(
    config: Config, processor: Processor, mesh: jax.sharding.Mesh, pipeline: Pipeline
) -> Callable[[int], float]:
    """Batch number -> its loss, after a step of training on it."""
    graph, trainable, frozen = split_model(load_model(config, processor, mesh), config.model.trainable)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    state = TrainState(trainable, init_optimizer(optimizer, trainable, mesh))
    shardings = jax.tree.map(lambda array: array.sharding, state)
    compiled = make_train_step(graph, optimizer, processor.emb, config, shardings)
    batches = [sharding.to_devices(pipeline.batches[i], mesh) for i in range(2)]

    def run(index: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, measured = compiled(state, frozen, batches[index % 2])
        return float(measured["loss"].value())

    return run


def _torch_step(config: Config, processor: Processor, pipeline: Pipeline) -> Callable[[int], float]:
    """The same with transformers and PEFT (requirements-dev.txt)."""
    import peft
    import torch
    import transformers

    vision = Architecture.from_hf(config.model.base).vision
    lora = config.model.lora
    assert lora is not None, f"{config.name} has no adapters to compare"
    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model.base, dtype=torch.float32)
    adapted = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (a fraction is fine)
        target_modules=rf".*language_model.*\.({'|'.join(lora.targets)})",
    )
    model: Any = peft.get_peft_model(base, adapted).get_base_model()
    for parameter in model.model.visual.merger.parameters():
        parameter.requires_grad_(True)
    head = model.lm_head.weight
    row = torch.nn.Parameter(head[processor.end].detach().clone())  # of <|emb|>
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] + [row]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate, weight_decay=0.0)

    def states(sequences: Sequence[Tokens]) -> Any:
        """[n, longest, D], right-padded."""
        tokens, mask = np.full((2, len(sequences), max(map(len, sequences))), processor.pad, np.int64)
        for at, sequence in enumerate(sequences):
            tokens[at, : len(sequence)], mask[at] = sequence.tokens, np.arange(tokens.shape[1]) < len(sequence)
        given = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": 1 * (tokens == processor.image_pad)}
        images = [image for sequence in sequences for image in sequence.images]
        if images:  # ours are in window order, theirs in reading order
            values = [
                image.values.reshape(len(image.slots), -1)[image.slots].reshape(-1, vision.patch_pixels)
                for image in images
            ]
            given["pixel_values"] = np.array(normalize_pixels(jnp.asarray(np.concatenate(values)), vision))
            given["image_grid_thw"] = np.array([[1, 2 * image.grid[0], 2 * image.grid[1]] for image in images])
        return model.model(**{name: torch.tensor(value) for name, value in given.items()}).last_hidden_state

    def run(index: int) -> float:
        items = pipeline.batch_of(index % 2)
        queries = [item.query for item in items]
        hidden = states(queries)
        documents = [item.documents[0] for item in items] + [d for item in items for d in item.documents[1:]]
        found = states(documents)
        ends = torch.tensor([len(query) - 1 for query in queries])
        rows = torch.arange(len(items))
        supervised = [(at, item.prompt - 1 + i, t) for at, item in enumerate(items) for i, t in enumerate(item.targets)]
        at, place, token = torch.tensor(supervised).T
        picked = hidden[at, place]
        logits = (picked @ head.T).index_copy(1, torch.tensor([processor.emb]), (picked @ row)[:, None])
        generation = torch.nn.functional.cross_entropy(logits, token)

        last = torch.tensor([len(document) - 1 for document in documents])
        vectors = torch.nn.functional.normalize(found[torch.arange(len(documents)), last], dim=-1)
        scores = torch.nn.functional.normalize(hidden[rows, ends], dim=-1) @ vectors.T / config.loss.temperature
        keys = [item.example.document_key for item in items]
        keys += [key for item in items for _, key in item.example.negatives]
        known = np.array([np.isin(keys, item.example.positives) for item in items])
        known[:, : len(items)] &= ~np.eye(len(items), dtype=bool)
        retrieval = torch.nn.functional.cross_entropy(scores.masked_fill(torch.tensor(known), -torch.inf), rows)

        loss = config.loss.generation * generation + config.loss.retrieval * retrieval
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm)
        optimizer.step()
        return loss.item()

    return run
