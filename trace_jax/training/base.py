"""The embedded base model: its tokenizer, its random start, and the folder that is committed.

`launch/build_base.py` walks through it: train a byte-level BPE on the release's training texts, write a random
Qwen2.5-VL of a few million parameters as an ordinary Hugging Face folder, pretrain it generatively in three stages
(configs/emoji_base.py, emoji_base_exact.py, emoji_base_composed.py), and export the result.
"""

import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
import transformers
from flax import nnx
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trace_jax import sharding
from trace_jax.config import ROOT, Config
from trace_jax.data import instructions
from trace_jax.data.tokenizer import Processor
from trace_jax.model import weights
from trace_jax.model.architecture import Architecture
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.training.checkpoint import CheckpointError
from trace_jax.training.metrics import read_metrics
from trace_jax.training.train import restore_model

EMBEDDED = ROOT / "trace_jax" / "assets" / "emoji_base"
VOCABULARY = 2048  # rows of the embedding; the last few are spare, <|emb|> takes the first of them
BPE_TOKENS = 2016
# Qwen2.5-VL's added tokens, in its order; the first fourteen are special.
ADDED_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
SPECIAL = 14
# Qwen's pre-tokenisation: contractions, words with the space before them, single digits, punctuation, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    + instructions.assistant_prompt("paper")
    + "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "model_type": "qwen2_5_vl",
    "depth": 6,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_heads": 5,
    "in_channels": 3,
    "in_chans": 3,
    "out_hidden_size": 192,
    "patch_size": 7,
    "spatial_patch_size": 7,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 28,
    "fullatt_block_indexes": [2, 5],
    "hidden_act": "silu",
}
LANGUAGE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vocab_size": VOCABULARY,
}


def training_texts(release: pathlib.Path) -> Iterator[str]:
    """Everything that is written in the training split: the generative corpus, queries, candidates, instructions."""
    files = {
        "generative/train.jsonl": ("prompt", "response"),
        "query/union_train/mbeir_union_up_train.jsonl": ("query_txt",),
        "cand_pool/global/mbeir_union_train_cand_pool.jsonl": ("txt",),
    }
    for name, fields in files.items():
        with (release / name).open() as lines:
            for line in lines:
                record = json.loads(line)
                yield from (instructions.format_string(record[field]) for field in fields if record[field])
    prompts = [
        line.split("\t")[4:] for line in (release / "instructions" / "query_instructions.tsv").read_text().splitlines()
    ]
    turns = [instructions.assistant_prompt(style) for style in ("paper", "short")]
    for turn in [*turns, "Query.", "Document.", "system\n", "user\n", "assistant\n", *chain.from_iterable(prompts[1:])]:
        yield from [turn] * 500  # said in every sequence: they shall be whole tokens


def train_tokenizer(release: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE in Qwen's format, with Qwen2.5-VL's added tokens and chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(release), trainer)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in ADDED_TOKENS[:SPECIAL]]
    )
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ADDED_TOKENS[SPECIAL:]])
    return transformers.Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # pyright: ignore[reportArgumentType]  (as Qwen: byte-level, nothing is unknown)
        additional_special_tokens=ADDED_TOKENS[1:SPECIAL],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LANGUAGE["max_position_embeddings"],
    )


def hf_config(token_id: dict[str, int]) -> dict[str, Any]:
    """config.json of the embedded base."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **LANGUAGE,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": token_id["<|endoftext|>"],
        "eos_token_id": token_id["<|im_end|>"],
        "pad_token_id": token_id["<|endoftext|>"],
        "image_token_id": token_id["<|image_pad|>"],
        "video_token_id": token_id["<|video_pad|>"],
        "vision_start_token_id": token_id["<|vision_start|>"],
        "vision_end_token_id": token_id["<|vision_end|>"],
        "vision_token_id": token_id["<|vision_pad|>"],
        "vision_config": VISION,
    }


IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 7,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 14 * 14,
    "max_pixels": 56 * 56,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_start(config: Config) -> None:
    """Writes the random start, a complete Hugging Face folder, at `config.model.base`, unless it is there."""
    folder = pathlib.Path(config.model.base)
    if (folder / "config.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = train_tokenizer(pathlib.Path(config.data.root) / config.data.release / "release")
    tokenizer.save_pretrained(partial)
    (partial / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n")
    (partial / "config.json").write_text(json.dumps(hf_config(tokenizer.get_vocab()), indent=2) + "\n")
    model = Qwen2_5_VL(Architecture.from_hf(partial), rngs=nnx.Rngs(config.training.seed))
    weights.save(model, partial)
    partial.rename(folder)


def export(stages: Sequence[Config], folder: pathlib.Path) -> None:
    """Writes what the last of these trainings made as a Hugging Face folder in bfloat16, its card telling of them all.

    Raises CheckpointError when that one has no checkpoint.
    """
    config = stages[-1]
    processor = Processor.from_hf(config.model.base, config.data)
    restored = restore_model(config, processor, sharding.make_mesh(config.mesh))
    if restored is None:
        raise CheckpointError(f"no checkpoint of {config.name} in {config.run_dir}")
    graph, state = nnx.split(restored[1])
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(config.model.base, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    weights.save(nnx.merge(graph, state), partial)
    (partial / "README.md").write_text(model_card(stages))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def model_card(stages: Sequence[Config]) -> str:
    """README.md of the exported folder: what it is, and each stage's steps, time and losses, as its run logged them."""
    told, curve = [], []
    for config in stages:
        rows, batch = read_metrics(config.run_dir), config.data.batch_size
        seconds = sum((b["step"] - a["step"]) * batch / b["examples_per_second"] for a, b in pairwise(rows))
        pictures = f"moved by up to {config.data.jitter:.0%}" if config.data.jitter else "as they are"
        told.append(
            f"  - `configs/{config.name}.py`, pictures {pictures}: {rows[-1]['step']} steps of {batch} examples, peak\n"
            f"    learning rate {config.optimizer.learning_rate}; about {seconds / 3600:.1f} hours on two CPU cores"
        )
        curve += [
            f"| {config.name} | {row['step']} | {row['loss']:.3f} | {row['token_accuracy']:.3f} |"
            for row in [*rows[: -1 : max(1, len(rows) // 10)], rows[-1]]
        ]
    lines = "\n".join
    return f"""---
license: apache-2.0
library_name: transformers
---
# emoji_base

The embedded base model of trace_jax: a Qwen2.5-VL (windowed and full vision blocks, patch merger, M-RoPE, grouped-query
attention, SwiGLU) of about five million parameters that describes emoji of 56x56 pixels, says what an edit of one would
give, and knows the capital, continent and currency of the countries whose flags it has seen. It is the starting point
of `python launch/train.py emoji_tiny`, and of no other use.

- Data: the generative corpus of the release `{stages[-1].data.release}`, train split alone. The drawings are Twemoji
  (c) Twitter, Inc and other contributors, CC BY 4.0, and OpenMoji, CC BY-SA 4.0; names Unicode License v3; country
  facts GeoNames, CC BY 4.0.
- Training: every parameter, AdamW.
{lines(told)}
- Rebuild: `make base`.

| stage | step | loss (cross-entropy) | token accuracy |
|---|---|---|---|
{lines(curve)}
"""
