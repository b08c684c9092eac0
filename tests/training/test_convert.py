"""Runs out of and into Hugging Face: the exported folder's own snippet gives our embeddings."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.bucket import Bucket
from tests.programs import flags
from trace_jax import sharding
from trace_jax.config import ROOT, Config, Mesh
from trace_jax.data import instructions
from trace_jax.data.pipeline import training_batches
from trace_jax.data.schema import Document, Query
from trace_jax.data.tokenizer import Processor
from trace_jax.model import weights
from trace_jax.model.qwen2_5_vl import take_states
from trace_jax.retrieval.embedder import Retriever
from trace_jax.training import convert
from trace_jax.training.checkpoint import CheckpointError, Checkpoints
from trace_jax.training.losses import normalize
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import init_optimizer, load_model, model_identity, restore_model, split_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks it
STEP = 3


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory) -> Config:
    """A run with one checkpoint, whose adapters, projector and <|emb|> are not what they start as."""
    config = dataclasses.replace(tiny_config, workdir=str(tmp_path_factory.mktemp("run")), mesh=Mesh(data=1, fsdp=-1))
    mesh, processor = sharding.make_mesh(config.mesh), Processor.from_hf(config.model.base, config.data)
    model, key = load_model(config, processor, mesh), jax.random.key(0)
    for path, leaf in weights.flat_parameters(model).items():
        if path.startswith("projector/") or path.endswith(("lora_b", "emb_row")):
            key, use = jax.random.split(key)
            scale = 0.02 if path == "emb_row" else 0.1  # as other tokens' rows: it is not what every query begins with
            leaf[...] = leaf[...] + jax.device_put(scale * jax.random.normal(use, leaf.shape), leaf[...].sharding)
    _, trainable, _ = split_model(model, config.model.trainable)
    checkpoints = Checkpoints(config, model_identity(config))
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    checkpoints.save(STEP, trainable, init_optimizer(optimizer, trainable, mesh), wait=True)
    checkpoints.close()
    return config


@pytest.fixture(scope="module")
def retriever(run) -> Retriever:
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    processor = Processor.from_hf(run.model.base, run.data)
    restored = restore_model(run, processor, mesh)
    assert restored is not None
    return Retriever(restored[1], processor, run, mesh, step=STEP, identity="")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    image = Image.new("RGB", (70, 40), "white")
    image.paste((200, 30, 40), (10, 8, 44, 30))
    return image


@pytest.fixture(scope="module")
def expected(retriever, picture) -> list[tuple]:
    """(arguments of the snippet's embed, our embedding, our trace) of queries of every kind, and a document."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    png, instruction = file.getvalue(), "find the picture after this change"
    queries = [
        Query(instruction=instruction, text="a red car", image=None),
        Query(instruction="", text="", image=png),
        Query(instruction=instruction, text="but blue", image=png),
    ]
    found = []
    for mode in ("adaptive", "direct"):
        results = retriever.encode_query(queries, mode)
        for query, embedding, trace in zip(queries, results.embeddings, results.traces, strict=True):
            text = instructions.format_query(query.instruction, query.text)
            arguments = {"text": text, "image": query.image and picture, "reason": mode == "adaptive"}
            found.append((arguments, embedding, trace))
        assert mode == "direct" or results.reasoned.any()
    document = retriever.encode_document([Document(text="a red car", image=png)]).embeddings[0]
    found.append(({"text": "A red car.", "image": picture, "role": "document"}, document, ""))
    return found


def run_snippet(folder: pathlib.Path, monkeypatch):
    """Executes the Python of the README, as a user would in that folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder)
    namespace = {}
    exec(compile(code[1], "README.md", "exec"), namespace)
    assert namespace["embedding"].shape == (48,)
    return namespace["embed"]


def compare(embed, expected):
    worst = 0.0
    for arguments, ours, trace in expected:
        theirs, written = embed(**arguments)
        np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4)
        worst = max(worst, np.abs(theirs.numpy() - ours).max())
        assert re.sub(r"<\|\w+\|>", "", written).strip() == trace
    print(f"largest difference {worst:.2e}")


def test_the_merged_folder_s_snippet_gives_our_embeddings(run, expected, tmp_path, monkeypatch):
    folder = tmp_path / "merged"
    convert.export_merged(run, str(folder))
    compare(run_snippet(folder, monkeypatch), expected)

    _, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    base = transformers.AutoTokenizer.from_pretrained(run.model.base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|emb|>") == len(base) == len(tokenizer) - 1
    assert tokenizer.encode("<|emb|>", add_special_tokens=False) == [len(base)]
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert (images["min_pixels"], images["max_pixels"]) == (run.data.min_pixels, run.data.max_pixels)
    assert "missing" not in convert.check_base(str(folder)).split(";")[0]
    with pytest.raises(FileExistsError, match="there already"):
        convert.export_merged(run, str(folder))
    with pytest.raises(CheckpointError, match=r"no checkpoint 2 in .* there are \[3\]"):
        convert.export_merged(run, str(tmp_path / "other"), step=2)


def test_the_adapter_s_snippet_gives_our_embeddings_and_it_comes_back(run, expected, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    convert.export_adapter(run, str(folder), step=STEP)
    compare(run_snippet(folder, monkeypatch), expected)

    again = dataclasses.replace(run, workdir=str(tmp_path / "again"))
    convert.import_adapter(again, str(folder))
    mesh, processor = sharding.make_mesh(run.mesh), Processor.from_hf(run.model.base, run.data)
    restored, original = (restore_model(config, processor, mesh) for config in (again, run))
    assert restored is not None and original is not None and restored[0] == 0
    parameters = weights.flat_parameters(restored[1])
    for path, leaf in weights.flat_parameters(original[1]).items():
        np.testing.assert_array_equal(parameters[path][...], leaf[...], err_msg=path)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        convert.import_adapter(again, str(folder))


def test_a_bfloat16_base_is_merged_in_float32_and_the_card_promises_what_holds(run, tmp_path):
    def readme(folder):
        return " ".join((tmp_path / folder / "README.md").read_text().split())

    stored = dataclasses.replace(run, model=dataclasses.replace(run.model, param_dtype="bfloat16"))
    mesh, processor = sharding.make_mesh(run.mesh), Processor.from_hf(run.model.base, run.data)
    _, ours = restore_model(stored, processor, mesh)
    batch = training_batches(stored, processor, shards=1).batches[0]
    at = jnp.asarray(batch.query_index)
    read = jax.jit(lambda model: normalize(take_states(model(batch.inputs), at)))
    expected = read(ours)
    near = {}
    for name, options in (("whole", {}), ("rounded", {"dtype": "bfloat16"})):
        convert.export_merged(stored, str(tmp_path / name), **options)
        found = np.asarray(read(weights.load(tmp_path / name)))
        near[name] = np.abs(found - np.asarray(expected)).max()
    print(near)
    assert near["whole"] < 1e-5 < 1e-4 < near["rounded"]
    assert "The same embeddings with transformers alone, in float32:" in readme("whole")
    assert "near those of the run, not the same: these files are in bfloat16" in readme("rounded")


@pytest.mark.parametrize(
    ("options", "reason"), [({"dtype": "bfloat16"}, "multiplies"), ({"param_dtype": "int8"}, "its base in int8")]
)
def test_a_run_that_computes_otherwise_is_promised_less(run, options, reason):
    config = dataclasses.replace(run, model=dataclasses.replace(run.model, **options))
    said = convert._promise(config, adapter=True, dtype="float32")
    assert said.startswith("Embeddings with transformers and PEFT alone") and reason in said


def test_what_an_adapter_cannot_hold_is_refused(run, tmp_path):
    model = dataclasses.replace(run.model, trainable=(*run.model.trainable, r"language/norm/.*"))
    with pytest.raises(ValueError, match=r"trains also \['language/norm/scale'\]"):
        convert.import_adapter(dataclasses.replace(run, model=model), str(tmp_path))
    full = dataclasses.replace(run.model, lora=None, trainable=(r".*",))
    with pytest.raises(ValueError, match="has no adapters"):
        convert.import_adapter(dataclasses.replace(run, model=full), str(tmp_path))


def test_an_ablation_that_embeds_otherwise_is_not_exported(run, tmp_path):
    ablation = dataclasses.replace(run, data=dataclasses.replace(run.data, position="token"))
    with pytest.raises(ValueError, match=r"no card says how to embed with another data\.position"):
        convert.export_merged(ablation, str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_a_converted_base_serves_the_runs_of_its_source(run, tmp_path):
    base = tmp_path / "base"
    convert.convert_base(run.model.base, str(base), sharding.make_mesh(Mesh(data=1, fsdp=8)), "float32")
    config = dataclasses.replace(run, model=dataclasses.replace(run.model, base=str(base)))
    assert model_identity(config) == model_identity(run)
    mesh = sharding.make_mesh(run.mesh)
    restored = restore_model(config, Processor.from_hf(base, run.data), mesh)
    original = restore_model(run, Processor.from_hf(run.model.base, run.data), mesh)
    assert restored is not None and original is not None
    parameters = weights.flat_parameters(restored[1])
    for path, leaf in weights.flat_parameters(original[1]).items():
        np.testing.assert_array_equal(parameters[path][...], leaf[...], err_msg=path)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the older one"])
def test_a_base_as_transformers_5_saves_it_is_exported_with_the_run_s_limits(run, tmp_path, beside):
    """Its image processor is a part of processor_config.json, which transformers reads first."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    for file in convert._texts(pathlib.Path(run.model.base)):
        (base / file.name).write_bytes(file.read_bytes())
    older = base / "preprocessor_config.json"
    images = json.loads(older.read_text()) | {"size": {"shortest_edge": 1, "longest_edge": 9}, "image_std": [0.5] * 3}
    (base / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    if not beside:
        older.unlink()
    config = dataclasses.replace(run, model=dataclasses.replace(run.model, base=str(base)))
    convert._copy_texts(config, Processor.from_hf(base, config.data), out)
    exported = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    limits = (exported.size["shortest_edge"], exported.size["longest_edge"])
    assert limits == (run.data.min_pixels, run.data.max_pixels)
    assert tuple(exported.image_std) == (0.5,) * 3


@pytest.mark.slow
def test_the_command_line(run, tmp_path):
    def convert_(*arguments):
        command = [sys.executable, str(ROOT / "launch" / "convert.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    checked = convert_("check", run.model.base)
    assert checked.returncode == 0 and "nothing is missing" in checked.stdout
    missing = convert_("to-hf", tmp_path / "out", "--config", "emoji_tiny", "--workdir", tmp_path / "none")
    assert missing.returncode == 1 and "no checkpoint of emoji_tiny" in missing.stderr
    assert not (tmp_path / "out").exists()


UPLOAD = """
import pathlib, sys
from etils import epath
source, target = pathlib.Path(sys.argv[1]), epath.Path(sys.argv[2])
target.mkdir(parents=True, exist_ok=True)
for file in source.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
"""


@pytest.mark.slow
def test_the_command_line_in_a_bucket(run, tmp_path):
    """A Hugging Face folder and an adapter in a bucket become a base there and a run here."""
    bucket, program = Bucket(tmp_path / "bucket"), ROOT / "launch" / "convert.py"
    again = dataclasses.replace(
        run, workdir=str(tmp_path / "again"), model=dataclasses.replace(run.model, base="gs://runs/base")
    )
    convert.export_adapter(run, str(tmp_path / "adapter"))

    def python(*arguments: object) -> str:
        environment = os.environ | bucket.environment | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    try:
        python("-c", UPLOAD, run.model.base, "gs://runs/hf")
        python("-c", UPLOAD, tmp_path / "adapter", "gs://runs/adapter")
        assert "gs://runs/hf: a Qwen2.5-VL of " in python(program, "check", "gs://runs/hf")
        python(program, "from-hf", "gs://runs/hf", "gs://runs/base", "--dtype", "float32")
        python(program, "from-peft", "gs://runs/adapter", "--config", "emoji_tiny", *flags(again))
    finally:
        bucket.kill()
    mesh, processor = sharding.make_mesh(run.mesh), Processor.from_hf(run.model.base, run.data)
    here = dataclasses.replace(again, model=run.model)
    restored, original = (restore_model(config, processor, mesh) for config in (here, run))
    assert restored is not None and original is not None and restored[0] == 0
    parameters = weights.flat_parameters(restored[1])
    for path, leaf in weights.flat_parameters(original[1]).items():
        np.testing.assert_array_equal(parameters[path][...], leaf[...], err_msg=path)
