"""The paper's ablations on the embedded data.

python launch/build_data.py emoji_mini && python launch/ablate.py emoji     (hours on two cores; resumable)

Many short runs on a third of the quickstart's data. With time, the quickstart's own length and data tell more:
--options --data.release emoji_small, in which all other options of the base apply.
"""

from trace_jax.retrieval.ablation import Suite

config = Suite(
    name="emoji",
    options=(
        *("--data.release", "emoji_mini"),
        *("--data.batch-size", "48", "--data.hard-negatives", "0"),
        *("--optimizer.warmup-steps", "8"),
        *("--training.steps", "80"),
    ),
    variants={
        "trace": (),
        # Table 5; and the encoder of the two-stage pipeline (Sec. 4.6): it is given the traces of "trace", and needs
        # room for them beside its own texts
        "no_trace": ("--data.trace", "none", "--evaluation.reasoner", "{trace}", "--data.max-text-tokens", "112"),
        "answer_only": ("--data.trace", "answer"),
        "reasoning_only": ("--data.trace", "reasoning"),
        "emb_token": ("--data.position", "token"),  # Table 4
        "closing_tag": ("--data.closing-tag", "</think>"),
        "candidate_answer": ("--data.candidate-trace", "answer"),  # Table 6
        "candidate_full": ("--data.candidate-trace", "both"),
        "detached": ("--loss.detach-emission",),  # Sec. 3.3: do the losses conflict?
        "generation_0": ("--loss.generation", "0"),  # Table 8
        "generation_0.5": ("--loss.generation", "0.5"),
        "generation_2": ("--loss.generation", "2"),
        # Table 7: an eighth of the rank, and twice; twice alpha
        "lora_small": ("--model.lora.rank", "4", "--model.lora.alpha", "8"),
        "lora_large": ("--model.lora.rank", "64", "--model.lora.alpha", "128"),
        "lora_alpha": ("--model.lora.alpha", "128"),
    },
)
