"""The embedded base: a small Qwen2.5-VL that learns to see and write before TRACE makes a retriever of it.

python launch/build_base.py     (tokenizer, random start, this training and two more; hours on 2 cores, resumable)
"""

from trace_jax.config import Config, Data, Loss, Model, Optimizer, Training

# Thousands of examples of each kind in all the steps. A picture of a thing is told apart from 12 readings, a fact or a
# clock from 30 to 80; people need few of each, because tone, gender and job are shared by all of them.
READ = {
    "caption": {"person": 37, "thing": 12, "flag": 6, "symbol": 2.5, "clock": 3.0},
    "words": {"person": 6, "thing": 3, "flag": 0.5, "symbol": 0.8, "clock": 0.8},
    "attribute": {"person": 8, "flag": 2, "symbol": 2.5, "clock": 2},
    "edit": {"person": 40, "symbol": 6, "clock": 9},
    "question": {"person": 6, "flag": 24, "clock": 6.5},
    "read": {"person": 6, "thing": 1.5, "flag": 1, "symbol": 0.4, "clock": 0.4},
    "translation": {"person": 7, "thing": 2, "symbol": 0.4, "clock": 0.4},
    "text edit": {"person": 10, "symbol": 2.4, "clock": 4.7},
    "riddle": {"person": 2, "flag": 5},
    "fact": {"": 34},
    "imagined": {"thing": 0, "clock": 0},  # emoji_base_composed reads them
}

config = Config(
    name="emoji_base",
    model=Model(
        base="runs/emoji_base/start",
        lora=None,
        trainable=(r"(vision|projector|language)/.*",),
        dtype="float32",
        param_dtype="float32",
        scan_layers=False,
        remat="none",
    ),
    data=Data(
        source="generative",
        release="emoji_small",
        batch_size=64,
        prompts="short",
        row_length=128,
        patch_row_length=64,
        min_pixels=14 * 14,
        max_pixels=56 * 56,
        jitter=0.1,
        weights={
            f"{what} {subject}".strip(): share for what, shares in READ.items() for subject, share in shares.items()
        },
    ),
    loss=Loss(retrieval=0.0, vocabulary_chunk=256),
    optimizer=Optimizer(learning_rate=1.5e-3, warmup_steps=200, weight_decay=0.05, final_fraction=0.02),
    training=Training(steps=4000, log_every=25, checkpoint_every=500, checkpoint_minutes=10),
)
