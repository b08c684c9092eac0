"""Models and runs, in and out of Hugging Face: what `launch/convert.py` does.

In: a base is checked, or rewritten in our own layout, of which every process of a pod reads its own shards straight
from a bucket; a PEFT adapter becomes the first checkpoint of a run. Out: a run becomes a complete Hugging Face folder,
merged or as a PEFT adapter, with a model card whose snippet embeds queries with transformers alone.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from trace_jax import sharding
from trace_jax.config import Config, Lora
from trace_jax.data import instructions
from trace_jax.data.processor import IMAGE_PROCESSOR, PROCESSOR, image_settings
from trace_jax.data.tokenizer import EMB, Processor, local_files
from trace_jax.model import weights
from trace_jax.model.adapter import load_adapter, save_adapter
from trace_jax.model.architecture import Architecture
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.training.checkpoint import CheckpointError, Checkpoints
from trace_jax.training.losses import loss_parameters
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import init_optimizer, load_model, model_identity, restore_model, split_model

log = logging.getLogger(__name__)

ADAPTED = ("lora_a", "lora_b", "emb_row")


def check_base(folder: str) -> str:
    """Compares a folder's tensors with its config.json, reading headers only; says in a line what is there.

    Raises FileNotFoundError, or ValueError that lists every missing, unexpected and mis-shaped tensor.
    """
    architecture = Architecture.from_hf(folder)
    model = nnx.eval_shape(lambda: Qwen2_5_VL(architecture, rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in weights.flat_parameters(model).items()}
    checkpoint = weights.Checkpoint(folder)
    table = weights.sources(architecture, shapes)
    expected = {key: source.shape for source in table.values() for key in source.keys}
    weights.check(checkpoint.shapes, expected, "config.json")
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    return (
        f"{folder}: a Qwen2.5-VL of {count:,} parameters in {len(expected)} tensors and {len(checkpoint.files)} files;"
        " nothing is missing, unexpected or mis-shaped"
    )


def convert_base(source: str, folder: str, mesh: jax.sharding.Mesh, dtype: str) -> None:
    """Writes the Hugging Face folder `source` in our own layout into `folder`; either may be remote.

    The result is a `--model.base` like the source, with the same fingerprint: checkpoints of the one go on with the
    other. The weights are in `dtype`, the projector, which trains, in float32. Raises FileExistsError when `folder` is
    there already; other errors as `weights.load`.
    """
    target = epath.Path(folder)
    if multihost_utils.broadcast_one_to_all(np.array(target.exists())):  # a process that is late sees others' files
        raise FileExistsError(f"{folder} is there already; choose another or remove it")
    model = weights.load(
        source,
        shardings=lambda path, shape: sharding.sharding_of(path, shape, mesh),
        param_dtype=jnp.dtype(dtype),
    )
    weights.save_base(model, target, source)
    if jax.process_index() == 0:
        with local_files(source) as texts:
            for file in _texts(texts):
                (target / file.name).write_bytes(file.read_bytes())


def export_merged(config: Config, folder: str, *, step: int | None = None, dtype: str = "float32") -> None:
    """Writes a run's checkpoint (the newest, or of `step`) as a plain Qwen2.5-VL for transformers.

    `dtype` is that of the files: bfloat16 rounds what was trained, and the model card then says so. Raises
    CheckpointError when there is no checkpoint, FileExistsError when `folder` is there already, and ValueError for an
    ablation that embeds otherwise than TRACE.
    """
    whole = config
    if config.model.param_dtype == "int8":  # the base's own weights are merged into, not their rounding
        whole = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16"))
    with _whole(folder) as partial:
        processor, step, model = _restored(whole, step)
        _copy_texts(config, processor, partial)
        weights.save(model, partial, dtype=jnp.dtype(dtype))
        (partial / "README.md").write_text(_card(config, step, processor, adapter=False, dtype=dtype))


def export_adapter(config: Config, folder: str, *, step: int | None = None) -> None:
    """Writes a run's checkpoint as an adapter for the PEFT library; errors as `export_merged`.

    Raises ValueError when the run trains what such an adapter does not hold.
    """
    with _whole(folder) as partial:
        processor, step, model = _restored(config, step)
        _adapter_only(config, model)
        _copy_texts(config, processor, partial)
        (partial / "config.json").unlink()  # an adapter's folder has none: transformers takes it for a model's
        fingerprint = weights.fingerprint(config.model.base)
        save_adapter(model, _lora(config), partial, base=_origin(config), fingerprint=fingerprint)
        (partial / "README.md").write_text(_card(config, step, processor, adapter=True, dtype="float32"))


def import_adapter(config: Config, folder: str) -> None:
    """Makes a PEFT adapter the checkpoint 0 of a run: it can be searched with, evaluated and trained on.

    Raises CheckpointError when the run has checkpoints already, and what `load_adapter` raises.
    """
    mesh = sharding.make_mesh(config.mesh)
    processor = Processor.from_hf(config.model.base, config.data)
    model = load_model(config, processor, mesh)
    _adapter_only(config, model)
    load_adapter(model, _lora(config), folder, fingerprint=weights.fingerprint(config.model.base))
    _, trainable, _ = split_model(model, config.model.trainable)
    trainable |= loss_parameters(config.loss, sharding.replicated(mesh))
    checkpoints = Checkpoints(config, model_identity(config))
    if checkpoints.restore(trainable=trainable) is not None:
        raise CheckpointError(f"{checkpoints.folder} holds checkpoints already; choose another --workdir")
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    checkpoints.save(0, trainable, init_optimizer(optimizer, trainable, mesh), wait=True)
    checkpoints.close()


def _restored(config: Config, step: int | None) -> tuple[Processor, int, Qwen2_5_VL]:
    if (config.data.position, config.data.candidate_trace) != ("before", "none"):
        raise ValueError(f"{config.name}: no card says how to embed with another data.position or candidate_trace")
    processor = Processor.from_hf(config.model.base, config.data)
    restored = restore_model(config, processor, sharding.make_mesh(config.mesh), step)
    if restored is None:
        raise CheckpointError(f"no checkpoint of {config.name} in {config.run_dir}")
    return processor, *restored


def _origin(config: Config) -> str:
    """The Hugging Face folder that the base was made of, or is."""
    origin = epath.Path(config.model.base) / weights.ORIGIN
    return json.loads(origin.read_text())["source"] if origin.exists() else config.model.base


def _lora(config: Config) -> Lora:
    if config.model.lora is None:
        raise ValueError(f"{config.name} has no adapters (model.lora is None); export it merged")
    return config.model.lora


def _adapter_only(config: Config, model: Qwen2_5_VL) -> None:
    """Raises ValueError unless exactly the adapters, the projector and <|emb|> train."""
    _lora(config)
    _, trainable, _ = split_model(model, config.model.trainable)
    trained = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.State(trainable))}
    held = {
        path
        for path in weights.flat_parameters(model)
        if path.startswith("projector/") or path.rpartition("/")[2] in ADAPTED
    }
    if trained != held:
        raise ValueError(
            f"a PEFT adapter holds LoRA, the projector and {EMB}; {config.name} (--model.trainable) trains also"
            f" {sorted(trained - held)}, and does not train {sorted(held - trained)}"
        )


@contextlib.contextmanager
def _whole(folder: str) -> Iterator[pathlib.Path]:
    """A folder that is there whole or not at all. Raises FileExistsError when it is there already."""
    target = pathlib.Path(folder)
    if target.exists():
        raise FileExistsError(f"{folder} is there already; choose another or remove it")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(target)


def _texts(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a model's folder holds beside weights and card: configurations, tokenizer, licence."""
    ours = (weights.ORIGIN, "README.md")
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.name not in ours
        and (file.suffix in (".json", ".jinja", ".txt") or file.name.startswith("LICENSE"))
        and not file.name.endswith(".index.json")
    ]


def _copy_texts(config: Config, processor: Processor, folder: pathlib.Path) -> None:
    """The base's texts, the tokenizer that knows <|emb|>, and the run's own limits of pixels."""
    with local_files(config.model.base) as texts:
        for file in _texts(texts):
            shutil.copyfile(file, folder / file.name)
    processor.tokenizer.save_pretrained(folder)
    images = image_settings(folder)
    images.pop("size", None)  # says the same as the limits
    images |= {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    written = {IMAGE_PROCESSOR: images}
    if (folder / PROCESSOR).exists():
        written[PROCESSOR] = json.loads((folder / PROCESSOR).read_text()) | {"image_processor": images}
    for name, settings in written.items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")


# ---- the model card ----------------------------------------------------------------------------------------------

SNIPPET = '''\
{imports}

FOLDER = "."  # of this file
{load}
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
image_processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
EMB, END, IMAGE = tokenizer.convert_tokens_to_ids(["<|emb|>", "<|im_end|>", "<|image_pad|>"])
MERGED = model.config.vision_config.spatial_merge_size ** 2  # patches of a visual token
# (role, has text, has image) -> the system turn
PROMPTS = {{
{prompts}
}}


@torch.no_grad()
def embed(text="", image=None, role="query", reason={reason}):
    """The L2-normalised embedding, and what the model wrote before it. `image` is a PIL image."""
    images, place = {{}}, ""
    if image is not None:
        images = dict(image_processor(images=[image.convert("RGB")], return_tensors="pt"))
        count = int(images["image_grid_thw"].prod()) // MERGED
        place = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
    system = PROMPTS[role, bool(text), image is not None]
    turns = f"<|im_start|>system\\n{{system}}<|im_end|>\\n<|im_start|>user\\n{{place}}{{text}}<|im_end|>\\n"
    prompt = tokenizer(turns + "<|im_start|>assistant\\n", return_tensors="pt", add_special_tokens=False)
    tokens = start = prompt.input_ids

    def inputs(tokens):
        types = (tokens == IMAGE).int()
        return {{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": types, **images}}

    if reason and role == "query":
        stop = {{"eos_token_id": [EMB, END], "pad_token_id": END}}
        tokens = model.generate(**inputs(tokens), **stop, do_sample=False, max_new_tokens={limit})
        if tokens[0, -1] in (EMB, END):
            tokens = tokens[:, :-1]  # the embedding is the state that predicts <|emb|>
    state = model(**inputs(tokens), output_hidden_states=True).hidden_states[-1][0, -1]
    return torch.nn.functional.normalize(state, dim=0), tokenizer.decode(tokens[0, start.shape[1] :])


embedding, trace = embed({example!r})
'''
MERGED_IMPORTS = """\
import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration"""
MERGED_LOAD = "model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()"
ADAPTER_IMPORTS = "import torch\nfrom peft import PeftModel\n" + MERGED_IMPORTS.removeprefix("import torch\n")
ADAPTER_LOAD = """\
BASE = {base!r}  # a Hugging Face folder
base = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
model = PeftModel.from_pretrained(base, FOLDER).eval()"""


def _snippet(config: Config, base: str, *, adapter: bool) -> str:
    """Python that embeds with transformers (and PEFT) alone."""
    kinds = [(True, False), (False, True), (True, True)]
    prompts = [
        f"    ({role!r}, {text}, {image}): {prompt(config.data.prompts, text, image)!r},"
        for role, prompt in (("query", instructions.query_prompt), ("document", instructions.document_prompt))
        for text, image in kinds
    ]
    return SNIPPET.format(
        imports=ADAPTER_IMPORTS if adapter else MERGED_IMPORTS,
        load=ADAPTER_LOAD.format(base=base) if adapter else MERGED_LOAD,
        prompts="\n".join(prompts),
        reason=config.evaluation.mode != "direct",
        limit=config.evaluation.max_trace_tokens,
        example=instructions.format_query("Find the picture that shows this.", "a dog on a beach"),
    )


def _promise(config: Config, *, adapter: bool, dtype: str) -> str:
    """What the snippet's embeddings are to the run's own; the files' `dtype` and the run's options decide."""
    alone = f"with transformers{' and PEFT' if adapter else ''} alone, in float32"
    reasons = {
        "these files are in bfloat16, to which what was trained is rounded": dtype == "bfloat16",
        "the run has its base in int8, this one is not rounded": config.model.param_dtype == "int8",
        "the run multiplies matrices in bfloat16": config.model.dtype == "bfloat16",
    }
    if given := [reason for reason, holds in reasons.items() if holds]:
        return f"Embeddings {alone}. They are near those of the run, not the same: {'; '.join(given)}."
    return f"The same embeddings {alone}:"


def _card(config: Config, step: int, processor: Processor, *, adapter: bool, dtype: str) -> str:
    """README.md of an export."""
    what = "a PEFT adapter (LoRA, the projector and the row of `<|emb|>`)" if adapter else "a plain Qwen2.5-VL"
    base = _origin(config)
    return f"""---
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: feature-extraction
---
# {config.name}

A TRACE retriever (arXiv 2603.02929), exported from trace_jax as {what}.

- Base: `{base}`, weights {weights.fingerprint(config.model.base)}; checkpoint of step {step}.
- `{EMB}` is token {processor.emb}. The embedding is the last layer's state, after the final norm, that predicts it. The
  model may write a chain of thought before it (at most {config.evaluation.max_trace_tokens} tokens).
- Images have {config.data.min_pixels} to {config.data.max_pixels} pixels (`{IMAGE_PROCESSOR}`).

{_promise(config, adapter=adapter, dtype=dtype)}

```python
{_snippet(config, base, adapter=adapter)}```

A query's text is its instruction and its words, each ending like a sentence. Compare embeddings by their dot product.
"""
