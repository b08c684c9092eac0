"""The round trip with the PEFT library itself, both ways, in float32."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.parity.reference import load_hf, padded_batch, random_hf, torch
from tests.parity.test_hf import compare
from trace_jax.config import Lora
from trace_jax.model import adapter, weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks it

LORA = Lora(rank=4, alpha=12.0, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
RSLORA = dataclasses.replace(LORA, rank=3, alpha=5.0, rslora=True, targets=("k_proj", "up_proj"))
LANGUAGE = r"model\.language_model\.layers\.\d+\.\w+\."


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_hf(tiny.architecture(request.param)).save_pretrained(folder)
    return folder


def trained(base, lora):
    """A model whose adapters, projector and <|emb|> are not what they start as."""
    model = weights.load(base, lora=lora, emb_token_id=tiny.EMB, init_emb_from=7)
    key = jax.random.key(0)
    for path, leaf in weights.flat_parameters(model).items():
        if path.startswith("projector/") or path.endswith(("lora_a", "lora_b", "emb_row")):
            key, use = jax.random.split(key)
            leaf[...] = leaf[...] + 0.1 * jax.random.normal(use, leaf.shape)
    return model


def save(model, lora, folder, base):
    adapter.save_adapter(model, lora, folder, base=str(base), fingerprint=weights.fingerprint(base))


def load(lora, folder, base, fingerprint=None):
    model = weights.load(base, lora=lora, emb_token_id=tiny.EMB, init_emb_from=7)
    adapter.load_adapter(model, lora, folder, fingerprint=fingerprint or weights.fingerprint(base))
    return model


def with_peft(base, folder):
    """The adapter in PEFT; every tensor must find its place, and only adapter parameters may be missing ones."""
    reference = load_hf(base)
    model = peft.PeftModel.from_pretrained(reference, folder)
    stored = set(load_file(folder / adapter.TENSORS))
    assert stored == set(peft.get_peft_model_state_dict(model))
    return model.base_model.model.eval()


@pytest.mark.parametrize("lora", [LORA, RSLORA], ids=["lora", "rslora"])
def test_ours_to_peft_and_back(base, tmp_path, lora):
    model = trained(base, lora)
    save(model, lora, tmp_path, base)
    worst = compare(model, with_peft(base, tmp_path), 1e-4)
    print(f"largest difference {worst:.2e}")
    again = weights.flat_parameters(load(lora, tmp_path, base))
    for path, leaf in weights.flat_parameters(model).items():
        np.testing.assert_array_equal(again[path][...], leaf[...], err_msg=path)


def made_by_peft(base, folder, lora, **options):
    """An adapter with random weights, as PEFT writes it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=0.1,
        target_modules=LANGUAGE + f"({'|'.join(lora.targets)})",
        **options,
    )
    model = peft.get_peft_model(load_hf(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = [p for name, p in model.named_parameters() if name.endswith("trainable_tokens_delta.default")]
        for row in tokens[1:]:
            row.copy_(tokens[0])  # <|emb|> has one row
    model.save_pretrained(folder)
    return model.base_model.model.eval()


def gradients_of_peft(reference, sequences, weights_of_logits):
    """Of everything that trains, by the names of the adapter's file in the hub's layout."""
    for sequence, weigh in zip(sequences, weights_of_logits, strict=True):
        arguments, _ = padded_batch([sequence], left=False)
        (reference(**arguments).logits[0] * torch.tensor(weigh)).sum().backward()
    found = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    stored = peft.get_peft_model_state_dict(reference, state_dict=found)
    return {adapter._older(name): gradient.numpy() for name, gradient in stored.items()}


def test_gradients_equal_those_of_torch(base, tmp_path):
    """Of all that TRACE trains: LoRA, the projector and the one row of <|emb|>, which is also read."""
    model, sequences = trained(base, LORA), [tiny.sequence(5, 4, [(16, 24)], begin=[tiny.EMB]), tiny.sequence(6, 9)]
    save(model, LORA, tmp_path, base)
    rng = np.random.default_rng(0)
    weigh = [rng.standard_normal((len(one), tiny.VOCABULARY)).astype(np.float32) / 100 for one in sequences]
    theirs = gradients_of_peft(
        peft.PeftModel.from_pretrained(load_hf(base), tmp_path, is_trainable=True).eval(), sequences, weigh
    )

    packed = tiny.packed(sequences, 1, 64)
    slots = np.concatenate([start + np.arange(len(one)) for start, one in zip(packed.starts, sequences, strict=True)])

    def loss(model, inputs):
        return (model.logits(model(inputs).reshape(-1, 48)[slots]) * np.concatenate(weigh)).sum()

    leaves = weights.flat_parameters(jax.jit(jax.grad(loss))(model, tiny.stack_shards([packed.inputs])))
    parts = adapter.parts(model)
    assert parts.keys() == theirs.keys()
    rows = [name for name, part in parts.items() if part.path == "emb_row"]
    theirs[rows[0]] = sum(theirs[name] for name in rows)  # PEFT has a row for each end, ours is one
    worst = 0.0
    for name in parts.keys() - set(rows[1:]):
        part = parts[name]
        ours = np.asarray(leaves[part.path][...] if part.layer is None else leaves[part.path][...][part.layer])
        ours = (ours.T if part.transposed else ours).reshape(part.shape)
        error = np.abs(ours - theirs[name]).max() / np.abs(theirs[name]).max()
        assert error < 1e-4, name  # 0 / 0 is no number, which is not less
        worst = max(worst, error)
    print(f"largest relative difference {worst:.1e}")


@pytest.mark.parametrize("everything", [True, False], ids=["everything", "lora alone"])
@pytest.mark.parametrize("lora", [LORA, RSLORA], ids=["lora", "rslora"])
def test_peft_to_ours(base, tmp_path, lora, everything):
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    options = {}
    if everything:
        rows = {"embed_tokens": [tiny.EMB]} | ({} if tied else {"lm_head": [tiny.EMB]})
        options = {"modules_to_save": ["visual.merger"], "trainable_token_indices": rows}
    reference = made_by_peft(base, tmp_path, lora, **options)
    compare(load(lora, tmp_path, base), reference, 1e-4)


def test_an_adapter_that_does_not_fit_is_one_error_that_lists_why(base, tmp_path):
    model = trained(base, LORA)
    save(model, LORA, tmp_path, base)
    other = dataclasses.replace(LORA, rank=8, alpha=1.0, rslora=True, targets=("q_proj",))
    with pytest.raises(ValueError) as error:
        load(other, tmp_path, base, fingerprint="0123")
    for line in (
        "rank: 4 in the adapter, 8 in the configuration",
        "alpha: 12.0 in the adapter, 1.0",
        "rslora: False in the adapter, True",
        "targets: ['down_proj', 'gate_proj', 'o_proj', 'q_proj', 'v_proj'] in the adapter, ['q_proj']",
        "base: the adapter was made for the weights",
    ):
        assert line in str(error.value)

    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    changes = {"use_dora": True, "bias": "all", "trainable_token_indices": [3]}
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=r"(?s)use_dora: True.*bias: 'all'.*trainable_token_indices: \[3\]"):
        load(LORA, tmp_path, base)
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config))

    tensors = load_file(tmp_path / adapter.TENSORS)
    prefix = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    tensors["base_model.model.extra"] = tensors.pop(f"{prefix}.lora_A.weight")
    tensors[f"{prefix}.lora_B.weight"] = tensors[f"{prefix}.lora_B.weight"][:-1].copy()
    save_file(tensors, tmp_path / adapter.TENSORS)
    name = re.escape("model.layers.1.self_attn.q_proj")
    with pytest.raises(ValueError, match=rf"(?s)missing: {name}.lora_A.*unexpected: extra.*shape of {name}.lora_B"):
        load(LORA, tmp_path, base)
    with pytest.raises(FileNotFoundError, match="is it a PEFT adapter"):
        load(LORA, base, base)


def test_an_adapter_of_another_width_is_refused(tmp_path):
    small, large = (
        dataclasses.replace(
            tiny.architecture(),
            language=dataclasses.replace(tiny.architecture().language, intermediate_size=width),
        )
        for width in (80, 96)
    )
    for name, architecture in (("small", small), ("large", large)):
        weights.save(weights.Qwen2_5_VL(architecture, rngs=nnx.Rngs(0)), tmp_path / name)
    save(trained(tmp_path / "small", LORA), LORA, tmp_path / "adapter", tmp_path / "small")
    with pytest.raises(ValueError, match=r"shape of model.layers.0.mlp.down_proj.lora_A.weight: \(4, 80\)"):
        fingerprint = weights.fingerprint(tmp_path / "small")
        load(LORA, tmp_path / "adapter", tmp_path / "large", fingerprint)
