import io
import weakref

import numpy as np
import pytest
from PIL import Image

from trace_jax.data.schema import Document, Query, placed
from trace_jax.data.tokenizer import EMB, Processor, TextTooLongError, append


@pytest.fixture(scope="module")
def processor(tiny_config):
    return Processor.from_hf(tiny_config.model.base, tiny_config.data)


def picture(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (side, 2 * side, 100)).save(out, "PNG")
    return out.getvalue()


def test_the_prompt_is_the_chat_template(processor):
    ours = processor.chat("Answer.", "What is it?", None)
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is it?"}]
    theirs = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.tokens.tolist() == list(theirs)


def test_the_template_knows_the_default_system_turn(processor):
    text = processor.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_emb_takes_a_spare_row(processor):
    assert processor.emb == len(processor.tokenizer) - 1 < 2048
    assert processor.tokenizer.convert_ids_to_tokens(processor.emb) == EMB


def test_special_tokens_in_a_text_are_characters(processor):
    tokens = processor.encode(f"{EMB}<|im_end|>")
    assert processor.emb not in tokens and processor.end not in tokens
    assert processor.decode(tokens) == f"{EMB}<|im_end|>"


def test_any_text_survives(processor):
    for text in ["A woman firefighter.", "Où est l'hôtel?", "日本 🚒 1234", "a\n\nb  c"]:
        assert processor.decode(processor.encode(text)) == text


def test_long_texts_are_cut_or_refused(processor):
    words = "word " * 500
    assert len(processor.query(Query(words))) < 200
    with pytest.raises(TextTooLongError, match="the limit is 64"):
        processor.query(Query(words), cut=False)


def test_empty_queries_and_documents_are_refused():
    for kind in (Query, Document):
        with pytest.raises(ValueError, match="empty"):
            kind("  ")


def test_several_images_stand_where_the_text_marks_them(processor):
    files = tuple(picture(side) for side in (28, 56, 14))
    several = processor.query(Query("First <image>then <image><image> last", files, "Find it"))
    visual = [len(image.slots) for image in several.images]
    assert visual == [image.grid[0] * image.grid[1] for image in several.images] and several.is_visual.sum() == sum(
        visual
    )
    start, end = (processor.id_of(f"<|vision_{side}|>") for side in ("start", "end"))
    parts, shown = [], iter(visual)
    for piece in ("Find it. First ", "then ", "", " last."):
        count = next(shown, 0)
        parts += [*processor.encode(piece), *([start, *[processor.image_pad] * count, end] if count else [])]
    tokens = several.tokens.tolist()
    at = len(tokens) - len(parts) - len(processor._format("<|im_end|>\n<|im_start|>assistant\n"))
    assert tokens[at : at + len(parts)] == parts
    alone = processor.query(Query("<image>A change", files[:1]))
    assert alone.tokens.tolist() == processor.query(Query("A change", files[0])).tokens.tolist()
    long = processor.query(Query("word " * 500 + "<image>", files[:1]))
    assert len(long.images) == 1 and len(long) < 200
    with pytest.raises(TextTooLongError, match="the limit is 64"):
        processor.query(Query("word " * 500 + "<image>", files[:1]), cut=False)


def test_images_without_a_place_are_refused():
    with pytest.raises(ValueError, match="2 images, and 1 times <image> in the text"):
        Query("<image> and that", (b"a", b"b"))
    with pytest.raises(TypeError, match="the image is a str"):
        Query("<image>", ("a.jpg",))
    assert placed("one <image>", [b"a"]) == (b"a",)
    assert placed("one", [b"a"]) == b"a" and placed("<image>", []) is None


def test_a_trace_goes_on_where_the_prompt_ends(processor):
    prompt = processor.query(Query("a cat", instruction="Find it"))
    longer = append(prompt, [5, 6])
    assert longer.tokens.tolist() == [*prompt.tokens, 5, 6]
    assert (np.diff(longer.positions[-3:, 0]) == 1).all()


def test_a_base_that_is_not_there_is_named(tiny_config):
    with pytest.raises(FileNotFoundError, match="no Hugging Face model in nowhere"):
        Processor.from_hf("nowhere", tiny_config.data)


def test_the_same_image_file_is_one_object_while_it_is_in_use(processor):
    """Whatever the record's name; two that ask about it hold it once, and nothing is kept of it afterwards."""
    data, other = picture(20), picture(30)
    first, again = processor.patches(data, "query 1"), processor.patches(bytes(bytearray(data)), "query 2")
    assert first is again
    assert processor.patches(other) is not first
    gone = weakref.ref(first)
    del first, again
    assert gone() is None
