"""Generation against a naive loop of full forward passes, whatever shares its batches and slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.retrieval.drafts import Memory
from trace_jax.retrieval.generation import Decoding, Generation, cache_bytes, compilations, generate
from trace_jax.retrieval.packing import Room

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


def run(
    model,
    sequences,
    mode="adaptive",
    limit=LIMIT,
    batch=3,
    slots=8,
    longest=64,
    cache_dtype=None,
    memory=None,
    **options,
):
    """Generation over batches of so many prompts, without images and with; results in the order given."""
    rooms = {visual: Room(batch, batch, 64, 4 if visual else 0, 192) for visual in (False, True)}
    members, batches = zip(*tiny.packer(batch).deal(sequences, rooms), strict=True)
    decoding = Decoding((tiny.EMB, tiny.TURN_END), limit, **options)
    how = {"longest": longest, "slots": slots, "mode": mode, "cache_dtype": cache_dtype, "memory": memory}
    result = generate(model, batches, decoding, **how)
    place = np.argsort(np.concatenate(members), kind="stable")[-len(sequences) :]  # -1 are empty places
    return Generation(*(part[place] for part in result[:-1]), result.work)


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
        stop = token in (tiny.EMB, tiny.TURN_END)
        if stop or len(trace) == limit:
            return np.asarray(state / jnp.linalg.norm(state)), trace, not stop
        trace.append(token)


@pytest.mark.parametrize("mode", ["adaptive", "always"])
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


def many(count: int, seed: int = 0) -> list:
    """Prompts of many lengths with a common beginning, a third of them with a picture."""
    rng = np.random.default_rng(seed)
    return [
        tiny.sequence(
            100 * seed + i, int(rng.integers(2, 20)), [(16, 16)] if rng.random() < 1 / 3 else [], begin=(30, 40, 50)
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def expected(model):
    """40 prompts one by one, always reasoning."""
    sequences = many(40)
    return sequences, [naive(model, sequence, "always") for sequence in sequences]


@pytest.mark.parametrize(("slots", "batch", "drafts"), [(1, 4, 0), (8, 8, 0), (8, 8, 3), (16, 4, 2), (32, 16, 0)])
def test_any_batch_and_any_slots_give_the_same(model, expected, slots, batch, drafts):
    sequences, alone = expected
    order = np.random.default_rng(slots).permutation(len(sequences))
    result = run(model, [sequences[i] for i in order], "always", batch=batch, slots=slots, drafts=drafts)
    assert result.traces() == [alone[i][1] for i in order]
    assert result.capped.tolist() == [alone[i][2] for i in order]
    np.testing.assert_allclose(result.embeddings, np.stack([alone[i][0] for i in order]), atol=1e-5)


def test_hardly_a_step_is_spent_on_rows_that_have_ended(model, expected):
    sequences, alone = expected
    work = run(model, sequences, "always", batch=8, slots=8).work
    assert work.useful == sum(len(trace) for _, trace, _ in alone) == work.tokens
    assert work.useful > 0.75 * work.passes  # the last rows end in 8 slots of which few are in use


def test_drafts_save_steps(model):
    """A model that repeats itself is one that drafts can guess."""
    sequences = many(12, seed=1)
    plain, guessed = (run(model, sequences, "always", 40, slots=16, drafts=drafts) for drafts in (0, 4))
    np.testing.assert_array_equal(plain.tokens, guessed.tokens)
    assert guessed.work.tokens == plain.work.tokens
    assert guessed.work.steps < plain.work.steps


def test_direct_rows_are_not_decoded(model):
    adaptive = run(model, SEQUENCES)
    assert adaptive.work.tokens == adaptive.lengths.sum() > 0
    assert run(model, SEQUENCES[1:2]).work.steps == 0


def test_cap(model):
    long = run(model, SEQUENCES, "always")
    short = run(model, SEQUENCES, "always", 1)
    assert [trace[:1] for trace in long.traces()] == short.traces()
    lengths = np.array([len(trace) for trace in long.traces()])
    np.testing.assert_array_equal(short.capped, lengths > 1)


def test_a_model_that_never_ends_is_stopped_and_reported(model):
    never = nnx.clone(model)
    never.lm_head.kernel[...] = never.lm_head.kernel[...].at[:, tiny.TURN_END].set(0.0)
    never.emb_row[...] = 0 * never.emb_row[...]
    result = run(never, SEQUENCES, "always", drafts=2)
    assert result.capped.all() and (result.lengths == LIMIT).all()
    for i, sequence in enumerate(SEQUENCES):
        np.testing.assert_allclose(result.embeddings[i], naive(never, sequence, "always")[0], atol=1e-5)


def test_nothing_is_compiled_after_the_first_time(model):
    for drafts in (0, 2):
        run(model, many(20, seed=2), "always", batch=8, slots=16, drafts=drafts)
        before = compilations()
        assert before[0] > 0 and before[1] > 0
        run(model, many(37, seed=3), "always", batch=8, slots=16, drafts=drafts)
        run(model, many(9, seed=4), "always", batch=8, slots=16, drafts=drafts)
        assert compilations() == before


def test_what_was_written_before_is_guessed(model):
    """The second time all guesses are right, and what is written is the same."""
    plain, memory = run(model, SEQUENCES, "always"), Memory()
    first, again = (run(model, SEQUENCES, "always", drafts=3, memory=memory) for _ in range(2))
    assert first.traces() == again.traces() == plain.traces()
    np.testing.assert_allclose(again.embeddings, plain.embeddings, atol=1e-5)
    assert plain.work.useful == plain.work.tokens == again.work.tokens
    assert again.work.useful < first.work.useful < plain.work.useful
    assert again.work.tokens > 2 * again.work.useful


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_cache_of_less_precision(model, cache_dtype):
    """Rows whose trace stays the same end near the same state."""
    full = run(model, SEQUENCES, "always", 1)
    half = run(model, SEQUENCES, "always", 1, cache_dtype=cache_dtype)
    np.testing.assert_array_equal(half.tokens, full.tokens)
    np.testing.assert_allclose(half.embeddings, full.embeddings, atol=0.02)
    assert np.abs(half.embeddings - full.embeddings).max() > 0


def test_a_row_of_an_int8_cache_does_not_depend_on_the_others(model):
    """Each key and value has a scale of its own; a sum in another order may still round one to the next byte."""
    sequences = many(10, seed=6)
    alone = [run(model, [sequence], "always", batch=1, slots=8, cache_dtype="int8") for sequence in sequences]
    together = run(model, sequences, "always", batch=5, slots=8, cache_dtype="int8", drafts=2)
    assert together.traces() == [trace for one in alone for trace in one.traces()]
    np.testing.assert_allclose(together.embeddings, np.concatenate([one.embeddings for one in alone]), atol=2e-3)


def test_what_a_cache_takes():
    language = tiny.architecture().language
    heads, width = 2 * language.num_layers * language.num_kv_heads * 100, language.head_dim
    sizes = {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + 4}  # and a scale
    assert {dtype: cache_bytes(language, 100, dtype) / heads for dtype in sizes} == sizes


def test_samples_belong_to_the_prompt_alone(model):
    sequences = many(10, seed=5)
    one = run(model, sequences, "always", temperature=0.7)
    order = np.random.default_rng(0).permutation(len(sequences))
    mixed = [sequences[i] for i in order]
    other = run(model, mixed, "always", batch=5, slots=4, temperature=0.7, samples=3, drafts=2)
    np.testing.assert_array_equal(other.tokens, one.tokens[order])  # the first of three
    assert (np.abs(other.embeddings - one.embeddings[order]).max(axis=1) > 1e-3).any()
    np.testing.assert_allclose(np.linalg.norm(other.embeddings, axis=1), 1, atol=1e-6)
    assert run(model, sequences, "always", temperature=0.7, seed=1).traces() != one.traces()


def test_a_low_temperature_is_greedy(model):
    cold = run(model, SEQUENCES, "always", temperature=1e-6)
    np.testing.assert_array_equal(cold.tokens, run(model, SEQUENCES, "always").tokens)


def test_errors(model):
    with pytest.raises(ValueError, match="'direct' is neither 'adaptive' nor 'always'"):
        run(model, SEQUENCES, "direct")
    with pytest.raises(ValueError, match="at least one"):
        run(model, SEQUENCES, limit=0)
    with pytest.raises(ValueError, match="same trace"):
        run(model, SEQUENCES, samples=2)
    with pytest.raises(ValueError, match="over the longest"):
        run(model, SEQUENCES, longest=16)
