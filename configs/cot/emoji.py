"""The embedded data: the release's own metadata is the teacher, every query and trace passes the same stages.

launch/build_data.py runs it; apart from that,
python launch/build_cot.py emoji --source data/emoji_small/release --output data/emoji_cot
"""

from trace_jax.cot.config import CotConfig, Filters, Teacher

_METADATA = Teacher(kind="metadata")
config = CotConfig(
    name="emoji",
    teacher=_METADATA,
    verifier=_METADATA,
    show_gold=1.0,  # metadata knows the target
    filters=Filters(
        tokenizer="trace_jax/assets/emoji_base",
        reasoning_tokens=(2, 64),  # a five-million-parameter model writes them: "A judge." is a whole chain of thought
        answer_tokens=(2, 32),
        duplicate_similarity=0.95,  # a word makes another query: a red heart in orange, a blue heart in orange
    ),
)
