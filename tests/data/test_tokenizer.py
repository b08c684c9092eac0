import numpy as np
import pytest

from trace_jax.data.schema import Document, Query
from trace_jax.data.tokenizer import EMB, Processor, TextTooLongError, append


@pytest.fixture(scope="module")
def processor(tiny_config):
    return Processor.from_hf(tiny_config.model.base, tiny_config.data)


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


def test_a_trace_goes_on_where_the_prompt_ends(processor):
    prompt = processor.query(Query("a cat", instruction="Find it"))
    longer = append(prompt, [5, 6])
    assert longer.tokens.tolist() == [*prompt.tokens, 5, 6]
    assert (np.diff(longer.positions[-3:, 0]) == 1).all()


def test_a_base_that_is_not_there_is_named(tiny_config):
    with pytest.raises(FileNotFoundError, match="no Hugging Face model in nowhere"):
        Processor.from_hf("nowhere", tiny_config.data)
