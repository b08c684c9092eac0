"""The 3B model, for a v5e slice of 16 chips; all else as the 7B one.

python launch/train.py mbeir_qwen2_5_vl_3b --workdir gs://BUCKET/trace_3b     (on every worker of the slice)
python launch/compile_check.py mbeir_qwen2_5_vl_3b --topology v5e:4x4         (on any machine)
"""

import dataclasses

from trace_jax.config import Mesh, load_config

_7b = load_config("mbeir_qwen2_5_vl_7b")
config = dataclasses.replace(
    _7b,
    name="mbeir_qwen2_5_vl_3b",
    model=dataclasses.replace(
        _7b.model,
        base="models/qwen2_5_vl_3b",  # the hub's Qwen/Qwen2.5-VL-3B-Instruct
        remat="full",  # a v5e chip has 16 GiB
    ),
    evaluation=dataclasses.replace(_7b.evaluation, mesh=Mesh(data=-1, fsdp=1, tensor=2)),  # it has two key heads
)
