"""The learning-rate schedule and the optax chain."""

from typing import Any

import jax
import optax

from trace_jax import config

DECAYED = ("kernel", "embedding", "lora_a", "lora_b")  # norms, biases and <|emb|> are not


def make_schedule(options: config.Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to `final_fraction` of it at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=min(options.warmup_steps, max(steps - 1, 0)),
        decay_steps=steps,
        end_value=options.learning_rate * options.final_fraction,
    )


def step_of(state: optax.OptState) -> jax.Array:
    """The steps that an optimizer state has taken, [] int32."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def make_optimizer(options: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Only trainable parameters, a nested dict, are ever given to it."""

    def decayed(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, tree)

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            make_schedule(options, steps),
            b1=options.beta1,
            b2=options.beta2,
            weight_decay=options.weight_decay,
            mask=decayed,
        ),
    )
