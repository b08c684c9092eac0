"""The paper's setting: Qwen2.5-VL-7B on M-BEIR-CoT, global batch 1024, on v5p (16 chips), v6e (64) or v5e (64).

python launch/train.py mbeir_qwen2_5_vl_7b --workdir gs://BUCKET/trace_7b     (on every worker of the slice)
python launch/compile_check.py mbeir_qwen2_5_vl_7b --topology v5p:2x2x4       (v6e:8x8, v5e:8x8; on any machine)

On 64 chips add --data.row-length 1408, which fills the slots better (docs/tpu.md), on v5e --model.remat full, and on
v6e --mesh.data -1 --mesh.fsdp 1: the base is frozen, and each chip has room for a copy. What to add for queries on v5p,
whose chips have room for the whole model and many rows: docs/tpu.md, Decoding.

What the paper leaves open follows LamRA's published training on M-BEIR, the nearest precedent: temperature 0.05, LoRA
on every linear layer, at most 300 visual tokens an image, texts cut at 480 tokens, warm-up over 3 % of the steps, no
weight decay, the Trainer's AdamW (beta2 0.999) and clipping. LoRA has no dropout, unlike LamRA's 0.05. Tasks are
sampled with equal weights, the plainest reading of "balanced over task types".
"""

from trace_jax.config import Config, Data, Evaluation, Lora, Loss, Mesh, Model, Optimizer, Training

config = Config(
    name="mbeir_qwen2_5_vl_7b",
    model=Model(
        base="models/qwen2_5_vl_7b",  # the hub's Qwen/Qwen2.5-VL-7B-Instruct
        lora=Lora(rank=128, alpha=256.0),  # Table 7
        attention="splash",
        remat="attention",  # "full" where memory is short
    ),
    data=Data(
        release="mbeir_cot",
        batch_size=1024,
        row_length=2048,
        patch_row_length=1280,  # the largest image has 1200 patches; a multiple of splash's 128
        max_pixels=300 * 28 * 28,
        max_text_tokens=480,
    ),
    loss=Loss(temperature=0.05),
    optimizer=Optimizer(learning_rate=2e-4, warmup_steps=32, weight_decay=0.0, beta2=0.999, clip_norm=1.0),
    mesh=Mesh(data=1, fsdp=-1),
    training=Training(steps=1068),  # one epoch of 1,093,753 pairs
    evaluation=Evaluation(
        batch_size=256,
        max_trace_tokens=320,
        mesh=Mesh(data=-1, fsdp=1, tensor=4),  # a step of decoding reads each weight once
        pool_mesh=Mesh(data=1, fsdp=-1),  # nothing but weights is sent, nothing computed twice: docs/tpu.md
        pool_batch_size=512,
    ),
)
