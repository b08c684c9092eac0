"""Floating-point operations that the architecture needs, counted by hand.

Only matrix products count (2 a multiply-add), and every slot of the static shapes, padding too: how full the slots are
is the data's affair, and logged in training.
"""

import re

from trace_jax.config import Config
from trace_jax.data.pipeline import Capacity
from trace_jax.model.architecture import Architecture


def model_flops(architecture: Architecture, config: Config, capacity: Capacity, shards: int) -> dict[str, float]:
    """What one training step needs without recomputation, by part, over all devices.

    A product y = x w costs 2 |x| out forward. Backward it costs as much for x where a gradient flows through it, and
    as much for w where w trains. Attention is causal, so half a square; backward costs it twice its forward. Windows
    attend within themselves. Frozen vision costs its forward alone; the frozen language model passes gradients on to
    adapters and projector.
    """
    language, vision, lora = architecture.language, architecture.vision, config.model.lora
    tokens = shards * capacity.rows * config.data.row_length
    patches = shards * capacity.patch_rows * config.data.patch_row_length
    pairs, targets = shards * capacity.pairs, shards * capacity.targets

    def passes(*paths: str, flows: bool = True) -> int:
        """Forward, backward to the input, backward to the weight."""
        return 1 + flows + any(_trains(config, path) for path in paths)

    kernels = _kernels(architecture)
    parts = {"language model": 0.0, "LoRA": 0.0}
    for name, (inner, outer) in kernels.items():
        block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        path = f"language/layers/{block}/{name}"
        product = 2 * tokens * language.num_layers
        parts["language model"] += passes(f"{path}/kernel") * product * inner * outer
        if lora is not None and name in lora.targets:
            parts["LoRA"] += 3 * product * lora.rank * (inner + outer)
    half = config.data.row_length / 2
    parts["causal attention"] = 3 * 4 * tokens * half * language.num_layers * language.num_heads * language.head_dim

    seen = _vision_trains(config)
    wide, deep = vision.hidden_size, vision.intermediate_size
    a_block = 2 * wide * (4 * wide + 3 * deep)
    window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.full_attention_blocks)
    attended = full * config.data.patch_row_length + (vision.depth - full) * window
    times = 3 if seen else 1
    parts["vision"] = times * patches * (vision.depth * a_block + 2 * vision.patch_dim * wide)
    parts["vision attention"] = times * 4 * patches * attended * wide
    merged = wide * vision.merge_unit
    product = 2 * (patches / vision.merge_unit) * merged * (merged + vision.out_hidden_size)
    parts["projector"] = passes("projector/mlp_0/kernel") * product

    head = 2 * language.hidden_size * language.vocab_size
    trained = passes("language/embed_tokens/embedding" if language.tie_embeddings else "lm_head/kernel")
    parts["output head"] = head * (trained * targets + (pairs if config.loss.retrieval else 0))
    parts["InfoNCE"] = 3 * 2 * pairs**2 * language.hidden_size if config.loss.retrieval else 0.0
    return parts


def forward_flops(
    architecture: Architecture, *, tokens: int, seen: float, heads: int, patches: int = 0, ends: int | None = None
) -> float:
    """Reading `tokens` that each attend to `seen` slots, with logits for `heads` of them; LoRA not counted.

    `ends` are the tokens whose last state is wanted, by default all: of the others, the last layer needs no more than
    queries, keys and values.
    `patches` are of one image a row of full attention; they count without their attention, which is small.
    """
    language, vision = architecture.language, architecture.vision
    kernels = {name: inner * outer for name, (inner, outer) in _kernels(architecture).items()}
    linear = sum(kernels.values())
    unread = linear - sum(kernels[name] for name in ("q_proj", "k_proj", "v_proj"))
    attended = 2 * seen * language.num_heads * language.head_dim
    wide = vision.hidden_size
    merged = wide * vision.merge_unit
    image = vision.depth * wide * (4 * wide + 3 * vision.intermediate_size) + vision.patch_dim * wide
    image += merged * (merged + vision.out_hidden_size) / vision.merge_unit
    read = 2 * tokens * language.num_layers * (linear + attended)
    read -= 0 if ends is None else 2 * (tokens - ends) * unread
    return read + 2 * heads * language.hidden_size * language.vocab_size + 2 * patches * image


def _kernels(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """The linear layers of a decoder layer: (in, out)."""
    language = architecture.language
    size, hidden = language.hidden_size, language.intermediate_size
    q, kv = language.num_heads * language.head_dim, language.num_kv_heads * language.head_dim
    attention = {"q_proj": (size, q), "k_proj": (size, kv), "v_proj": (size, kv), "o_proj": (q, size)}
    return attention | {"gate_proj": (size, hidden), "up_proj": (size, hidden), "down_proj": (hidden, size)}


def _trains(config: Config, path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in config.model.trainable)


def _vision_trains(config: Config) -> bool:
    return _trains(config, "vision/blocks/mlp/gate_proj/kernel")
