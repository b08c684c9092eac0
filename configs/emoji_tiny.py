"""The default: the embedded base becomes a TRACE retriever on the embedded data, in minutes on two cores.

make quickstart, or: python launch/train.py
"""

from trace_jax.config import Config, Data, Evaluation, Lora, Loss, Model, Optimizer, Training

config = Config(
    name="emoji_tiny",
    workdir="runs/quickstart",
    model=Model(
        lora=Lora(rank=32, alpha=64.0),
        dtype="float32",
        param_dtype="float32",
        scan_layers=False,
        remat="none",
    ),
    data=Data(
        release="emoji_small",
        prompts="short",
        batch_size=96,
        row_length=128,
        patch_row_length=64,
        min_pixels=14 * 14,
        max_pixels=56 * 56,
        max_text_tokens=64,
        # Pictures are harder to tell apart than texts; questions and captioned pictures are easier, or costlier.
        weights={"t2i": 2.5, "i2i": 2.6, "it2i": 2.1, "i2t": 1.6, "t2t": 0.6, "t2it": 0.7, "it2t": 0.7, "it2it": 0.7},
        max_trace_tokens=48,
        hard_negatives=1,
    ),
    loss=Loss(temperature=0.03, both_directions=True, vocabulary_chunk=256),
    optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20),
    training=Training(steps=172, log_every=10, checkpoint_every=40),
    evaluation=Evaluation(max_trace_tokens=48),
)
