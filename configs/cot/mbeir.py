"""M-BEIR-CoT after the paper: the split by data set of its Tables 9 and 10, a large teacher behind a local server.

vllm serve Qwen/Qwen2.5-VL-72B-Instruct
python launch/build_cot.py mbeir --source M-BEIR --output data/mbeir_cot
"""

from trace_jax.cot.config import CotConfig, Teacher

_TEACHER = Teacher(model="Qwen/Qwen2.5-VL-72B-Instruct", concurrency=256)
_SIMPLE = ("visualnews", "mscoco", "fashion200k", "webqa", "edis", "nights")
_COMPLEX = ("cirr", "fashioniq", "infoseek", "oven")
config = CotConfig(
    name="mbeir",
    teacher=_TEACHER,
    verifier=_TEACHER,
    policy={**dict.fromkeys(_SIMPLE, "simple"), **dict.fromkeys(_COMPLEX, "complex")},
    audit=0.01,  # eleven thousand assessments, for the agreement
)
