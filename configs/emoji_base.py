"""The embedded base: a small Qwen2.5-VL that learns to see and write before TRACE makes a retriever of it.

python launch/build_base.py     (tokenizer, random start, this training, export; hours on 2 cores, resumable)
"""

from trace_jax.config import Config, Data, Loss, Model, Optimizer, Training

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
        weights={
            "caption": 3,
            "words": 0.7,
            "attribute": 1,
            "edit": 3.5,
            "question": 0.8,
            "read": 0.8,
            "text edit": 0.8,
            "riddle": 0.25,
            "fact": 0.5,
        },
    ),
    loss=Loss(retrieval=0.0, vocabulary_chunk=256),
    optimizer=Optimizer(learning_rate=1.5e-3, warmup_steps=200, weight_decay=0.05, final_fraction=0.02),
    training=Training(steps=2200, log_every=25, checkpoint_every=500, checkpoint_minutes=10),
)
