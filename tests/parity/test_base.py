"""The embedded base: transformers reads the same folder and computes the same."""

import functools
import io
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from trace_jax.config import ROOT, load_config
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.processor import pack, stack_shards
from trace_jax.data.schema import Document, Query
from trace_jax.data.tokenizer import Processor, append
from trace_jax.model import weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = ROOT / "trace_jax" / "assets" / "emoji_base"
READ = jax.jit(lambda model, inputs: (hidden := model(inputs), model.logits(hidden)))
IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"


def picture():
    image = Image.new("RGB", (56, 56), "white")
    image.paste((200, 30, 40), (10, 8, 44, 50))
    image.paste((250, 220, 60), (20, 15, 30, 28))
    return image


@pytest.fixture(scope="module")
def reference():
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        BASE, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def test_the_base_is_small():
    assert sum(file.stat().st_size for file in BASE.rglob("*")) < 20e6
    assert 2e6 < sum(leaf.size for leaf in weights.flat_parameters(weights.load(BASE)).values()) < 6e6


@pytest.mark.parametrize("with_image", [True, False])
def test_states_and_logits_equal_transformers(reference, with_image):
    processor = Processor.from_hf(BASE, load_config("emoji_tiny").data)
    file = io.BytesIO()
    picture().save(file, "PNG")
    prompt = processor.chat("Answer.", "Describe the picture.", file.getvalue() if with_image else None)
    sequence = append(prompt, processor.encode("A red square."))
    packed = pack(
        [sequence],
        processor.geometry,
        rows=1,
        row_length=len(sequence),
        patch_rows=1,
        patch_row_length=64,
        pad_token=processor.pad,
    )
    model = weights.load(BASE)
    hidden, logits = READ(model, stack_shards([packed.inputs]))
    ours = np.asarray(hidden)[0, 0], np.asarray(logits)[0, 0]

    tokens = torch.tensor(sequence.tokens[None].astype(np.int64))
    arguments = {"input_ids": tokens, "mm_token_type_ids": (tokens == processor.image_pad).int()}
    if with_image:
        images = transformers.AutoImageProcessor.from_pretrained(BASE, backend="pil")
        arguments |= images(images=[picture()], return_tensors="pt")
    with torch.no_grad():
        output = reference(**arguments, output_hidden_states=True)
    for mine, theirs in zip(ours, (output.hidden_states[-1][0], output.logits[0]), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def embed(tiny_config):
    """Forty embeddings, of queries and documents of every kind, by dtype and param_dtype."""
    processor = Processor.from_hf(BASE, load_config("emoji_tiny").data)
    release = pathlib.Path(tiny_config.data.root) / "tiny"
    candidates = mbeir.load_candidates(release, layout.TRAIN_POOL)
    records = [candidates[int(row)] for row in np.linspace(0, len(candidates) - 1, 20)]
    documents = [Document(record["txt"], record["image"] or None) for record in records]
    kinds = {(bool(document.text), document.image is not None) for document in documents}
    assert kinds == {(True, False), (False, True), (True, True)}
    sequences = [processor.document(document) for document in documents]
    sequences += [processor.query(Query(document.text, document.image, "Find it.")) for document in documents]
    packed = pack(
        sequences, processor.geometry, rows=24, row_length=128, patch_rows=32, patch_row_length=64, pad_token=0
    )
    assert (packed.starts >= 0).all()
    last = packed.starts + [len(sequence) - 1 for sequence in sequences]

    @functools.cache
    def run(dtype: str, param_dtype: str) -> np.ndarray:
        model = weights.load(BASE, dtype=dtype, param_dtype=param_dtype)
        states, _ = READ(model, stack_shards([packed.inputs]))
        states = np.asarray(states).reshape(-1, states.shape[-1])[last]
        return states / np.linalg.norm(states, axis=-1, keepdims=True)

    return run


@pytest.mark.parametrize("param_dtype", ["bfloat16", "int8"])
def test_fewer_bits_embed_as_float32_does(embed, capsys, param_dtype):
    """Matrix products in bfloat16, of weights in bfloat16 and of kernels in int8."""
    cosines = (embed("bfloat16", param_dtype) * embed("float32", "float32")).sum(axis=-1)
    with capsys.disabled():
        least, mean = cosines.min(), cosines.mean()
        print(f"\n{param_dtype} to float32, {len(cosines)} embeddings: least {least:.5f}, mean {mean:.5f}")
    assert least >= 0.999


def test_the_chat_template_is_ours():
    processor = Processor.from_hf(BASE, load_config("emoji_tiny").data)
    file = io.BytesIO()
    picture().save(file, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": content}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ours = processor.chat("Answer.", "What is it?", file.getvalue())
    once = text.replace(IMAGE_TEXT, IMAGE_TEXT.replace("<|image_pad|>", "<|image_pad|>" * 16))
    assert processor.tokenizer.encode(once, add_special_tokens=False) == ours.tokens.tolist()
