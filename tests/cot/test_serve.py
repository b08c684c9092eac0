"""A real OpenAI-compatible server: `transformers serve` with a tiny random Qwen2.5-VL, pictures included.

Random weights write garbage: the protocol must work, and the garbage must be filtered, counted and reported.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.cot.release import write_release
from tests.cot.test_server import config
from trace_jax.config import ROOT
from trace_jax.cot import pipeline
from trace_jax.cot.build import run
from trace_jax.cot.cache import Cache
from trace_jax.cot.config import Teacher

ASSETS = ROOT / "trace_jax/assets/emoji_base"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# transformers' own processor wants a video processor too, and that wants torchvision; pictures need neither.
PROCESSOR = """
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin


class PictureProcessor(Qwen2_5_VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = -1
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
"""


def save_model(folder: pathlib.Path) -> None:
    """A Qwen2.5-VL of a few hundred thousand random parameters with the embedded base's tokenizer and processor."""
    import torch
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("im_end", "image_pad", "vision_start", "vision_end")
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
                "bos_token_id": None,
                "eos_token_id": ids["im_end"],
                "pad_token_id": ids["im_end"],
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [1],
            },
            image_token_id=ids["image_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    )
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["im_end"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "processing_picture.py").write_text(PROCESSOR)
    about = {
        "processor_class": "PictureProcessor",
        "auto_map": {"AutoProcessor": "processing_picture.PictureProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(about))


@contextlib.contextmanager
def serving(model: pathlib.Path, log: pathlib.Path):
    """`transformers serve` on a free port; gives its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(pathlib.Path(sys.executable).parent / "transformers"), "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--trust-remote-code"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                time.sleep(0.5)
            else:
                pytest.fail(f"the server never came up: {log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    release = write_release(tmp_path / "release", 24)
    save_model(tmp_path / "model")
    with serving(tmp_path / "model", tmp_path / "serve.log") as url:
        teacher = Teacher(
            model=str(tmp_path / "model"), base_url=url, concurrency=4, timeout=120, max_tokens=24, structured="off"
        )
        policy = {"fashioniq": "complex", "infoseek": "complex", "mscoco": "simple"}
        options = config(url, teacher=teacher, verifier=teacher, policy=policy, unanswered="stop")
        build = pipeline.Build(options, release, tmp_path / "out")
        run(build)
    cache = Cache(build.cache)
    spent = {stage: part for (stage, _), part in cache.spent().items()}
    cache.close()
    assert spent["assess"].requests == 24 and spent["generate"].requests == 18
    assert all(part.prompt_tokens > 20 * part.requests and part.completion_tokens > 0 for part in spent.values())
    card = json.loads((build.output / "card.json").read_text())
    # What a random model writes has no tags, and its opinions cannot be read.
    assert {row["reason"]: row["rows"] for row in card["dropped"]} == {"format": 18}
    assert sum(row["unread"] for row in card["policy"]) == 24
    assert {row["dataset"]: row["kept"] for row in card["simple"] if row["kept"]} == {"mscoco": 6}
    assert all(not path.read_text() for path in build.output.glob("rows/mbeir_fashioniq*.jsonl"))
    shown = (build.output / "dropped/mbeir_fashioniq_task7_train.jsonl").read_text().splitlines()
    assert len(shown) == 12 and all(json.loads(line)["raw"] for line in shown)
