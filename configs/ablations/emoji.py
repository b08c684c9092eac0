"""The paper's ablations on the embedded data.

python launch/ablate.py emoji     (after launch/build_data.py emoji_small; resumable)
"""

from trace_jax.retrieval.ablation import Suite

config = Suite(
    name="emoji",
    variants={
        "trace": (),
        "no_trace": ("--data.trace", "none"),  # Table 5
        "answer_only": ("--data.trace", "answer"),
        "reasoning_only": ("--data.trace", "reasoning"),
        "closing_tag": ("--data.closing-tag", "</think>"),  # Table 4
        "generation_0": ("--loss.generation", "0"),  # Table 8
        "generation_0.5": ("--loss.generation", "0.5"),
        "generation_2": ("--loss.generation", "2"),
        "lora_small": (
            "--model.lora.rank",
            "4",
            "--model.lora.alpha",
            "8",
        ),  # Table 7: an eighth of the rank, and twice
        "lora_large": ("--model.lora.rank", "64", "--model.lora.alpha", "128"),
    },
)
