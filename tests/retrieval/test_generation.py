"""Generation against a naive loop of full forward passes, routing, capping, and compaction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.retrieval import generation
from trace_jax.retrieval.generation import generate

SEQUENCES = [
    tiny.sequence(10, 5, [(16, 16)]),
    tiny.sequence(11, 9),
    tiny.sequence(12, 4, [(24, 24)]),
    tiny.sequence(13, 3),
    tiny.sequence(14, 17),
    tiny.sequence(15, 2, [(16, 24), (8, 8)]),
]
LIMIT = 12
READ = jax.jit(lambda model, inputs: model(inputs))


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VL:
    """A random model whose few likely tokens include <|emb|> and the end of the turn."""
    model = Qwen2_5_VL(tiny.architecture(), emb_token_id=tiny.EMB, scan_layers=False, rngs=nnx.Rngs(3))
    kernel = model.lm_head.kernel[...]
    model.lm_head.kernel[...] = kernel.at[:, 20:].set(0.0)
    states = READ(model, tiny.prompts(SEQUENCES))[0]
    model.emb_row[...] = 0.14 * states[1, len(SEQUENCES[1]) - 1]  # the second prompt asks for <|emb|>
    return model


def run(model, sequences, mode="adaptive", limit=LIMIT):
    return generate(
        model,
        tiny.prompts(sequences),
        emb_token_id=tiny.EMB,
        end_token_id=tiny.TURN_END,
        max_new_tokens=limit,
        mode=mode,
    )


def naive(model, sequence, mode, limit=LIMIT):
    """One row by full forward passes: embedding, trace, capped."""
    tokens, positions, trace = sequence.tokens, sequence.positions, []
    while True:
        inputs = tiny.prompts([sequence])
        row, at = jax.tree.map(np.copy, inputs), len(sequence)
        row.tokens[0, 0, at : at + len(trace)] = trace
        row.segments[0, 0, at : at + len(trace)] = 1
        row.positions[0, 0, at : at + len(trace)] = (positions.max() + 1 + np.arange(len(trace)))[:, None]
        state = READ(model, row)[0, 0, len(tokens) + len(trace) - 1]
        logits = np.array(model.logits(state))
        if mode == "always" and not trace:
            logits[[tiny.EMB, tiny.TURN_END]] = -np.inf
        token = int(np.argmax(logits))
        stop = token in (tiny.EMB, tiny.TURN_END) or mode == "direct"
        if stop or len(trace) == limit:
            return np.asarray(state / jnp.linalg.norm(state)), trace, not stop
        trace.append(token)


@pytest.mark.parametrize("mode", ["adaptive", "direct", "always"])
def test_equals_naive_decoding(model, mode):
    result = run(model, SEQUENCES, mode)
    traces = result.traces()
    for i, sequence in enumerate(SEQUENCES):
        embedding, trace, capped = naive(model, sequence, mode)
        assert traces[i] == trace
        assert result.capped[i] == capped
        assert result.reasoned[i] == bool(trace)
        np.testing.assert_allclose(result.embeddings[i], embedding, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=1e-6)
    print(mode, traces, result.capped)


def test_both_routes_are_taken(model):
    """The fixture is worth something only when some rows reason, some do not, some end and some are capped."""
    result = run(model, SEQUENCES)
    assert 0 < result.reasoned.sum() < len(SEQUENCES)
    always = run(model, SEQUENCES, "always")
    assert always.reasoned.all() and 0 < always.capped.sum() < len(SEQUENCES)


def test_cap(model):
    long = run(model, SEQUENCES, "always")
    short = run(model, SEQUENCES, "always", 1)
    assert [trace[:1] for trace in long.traces()] == short.traces()
    lengths = np.array([len(trace) for trace in long.traces()])
    np.testing.assert_array_equal(short.capped, lengths > 1)


@pytest.mark.parametrize("order", [[0], [4, 1], [5, 3, 1], [5, 4, 3, 2, 1, 0]])
def test_rows_do_not_depend_on_the_batch(model, order):
    whole = run(model, SEQUENCES, "always")
    part = run(model, [SEQUENCES[i] for i in order], "always")
    np.testing.assert_array_equal(part.tokens, whole.tokens[order])
    np.testing.assert_allclose(part.embeddings, whole.embeddings[order], atol=1e-5)


def test_direct_rows_are_not_decoded(model, monkeypatch):
    sizes = []
    original = generation._decode

    def spy(model, prefilled, rows, idle, **options):
        sizes.append((len(rows), int((~idle).sum())))
        return original(model, prefilled, rows, idle, **options)

    monkeypatch.setattr(generation, "_decode", spy)
    reasoned = int(run(model, SEQUENCES).reasoned.sum())
    assert sizes == [(1 << (reasoned - 1).bit_length(), reasoned)]
    run(model, SEQUENCES, "direct")
    assert len(sizes) == 1


def test_same_shapes_compile_once(model):
    run(model, SEQUENCES, "always")
    before = generation._decode._cache_size(), generation._prefill._cache_size()
    run(model, SEQUENCES[::-1], "always")
    assert before == (generation._decode._cache_size(), generation._prefill._cache_size())


def test_errors(model):
    with pytest.raises(ValueError, match="none of"):
        run(model, SEQUENCES, "sometimes")
    with pytest.raises(ValueError, match="at least one"):
        run(model, SEQUENCES, limit=0)
    with pytest.raises(ValueError, match="one left-aligned sequence"):
        generate(model, tiny.inputs(), emb_token_id=1, end_token_id=2, max_new_tokens=3)
