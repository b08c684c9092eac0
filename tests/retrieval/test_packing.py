"""What sequences begin with is read once a row, and nothing depends on how they are packed."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax.data.processor import fit_sharing
from trace_jax.data.schema import SHARED
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL, take_states
from trace_jax.retrieval.packing import Room, few, power_of_two, rounded

BEGIN = (30, 40, 50, 60)
SEQUENCES = [tiny.sequence(i, 2 + i % 7, [(16, 16)] if i % 3 == 0 else [], begin=BEGIN) for i in range(14)]
TEXTS = [sequence for sequence in SEQUENCES if not sequence.images]


READ = jax.jit(lambda model, rows: take_states(model(rows.inputs), rows.last))
ROOMS = {visual: Room(16, 6, 32, 5 if visual else 0, 64) for visual in (False, True)}  # few shapes to compile


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VL:
    return Qwen2_5_VL(tiny.architecture(), emb_token_id=tiny.EMB, scan_layers=True, rngs=nnx.Rngs(3))


def states(model, sequences, *, share: bool = True) -> np.ndarray:
    """The state at every sequence's end."""
    out = np.zeros((len(sequences), 48), np.float32)
    rooms = {visual: ROOMS[visual] for visual in {bool(sequence.images) for sequence in sequences}}
    for members, rows in tiny.packer(16, share=share).deal(sequences, rooms):
        out[members[members >= 0]] = np.asarray(READ(model, rows))[0, members >= 0]
    return out


def test_a_shared_beginning_changes_nothing(model):
    np.testing.assert_allclose(states(model, SEQUENCES), states(model, SEQUENCES, share=False), atol=1e-5)


def test_a_shared_beginning_is_read_once():
    apart, together = (tiny.packer(16, row_length=256, share=share) for share in (False, True))
    apart, together = (
        sum((rows.inputs.segments != 0).sum() for _, rows in packer.deal(SEQUENCES, packer.rooms(SEQUENCES)))
        for packer in (apart, together)
    )
    assert apart == sum(map(len, SEQUENCES))
    assert together == apart - len(BEGIN) * (len(SEQUENCES) - 2)  # once for each kind


def test_every_row_begins_with_what_its_own_sequences_share():
    """Two instructions: none of the rows mixes them, as each sequence goes where it costs the fewest slots."""
    other = (70, 80, 90)
    more = [tiny.sequence(20 + i, 2 + i % 7, [], begin=other) for i in range(9)]
    packer = tiny.packer(32, row_length=32)
    ((members, rows),) = packer.deal([*TEXTS, *more], packer.rooms([*TEXTS, *more]))
    in_use = np.flatnonzero(rows.inputs.segments[0].max(axis=1) > 0)
    begins = [tuple(rows.inputs.tokens[0, row, : len(BEGIN)]) for row in in_use]
    assert begins.count(BEGIN) > 1 and sum(begin[:3] == other for begin in begins) > 1
    for row, begin in zip(in_use, begins, strict=True):
        shared = len(BEGIN) if begin == BEGIN else len(other)
        assert (rows.inputs.segments[0, row, :shared] == SHARED).all()
        assert (rows.inputs.segments[0, row, shared:] != SHARED).all()
    number = members[members >= 0]
    shares = rows.shared[0, members >= 0]
    assert shares.tolist() == [len(BEGIN) if i < len(TEXTS) else len(other) for i in number]


def test_an_image_that_several_begin_with_is_read_once(model):
    """Asked about twice, it stands once in the row, with the text before it, and once in the rows of patches."""
    about = [dataclasses.replace(tiny.sequence(1, 2, [(16, 16)], begin=BEGIN)) for _ in range(3)]
    about = [dataclasses.replace(each, images=about[0].images, tokens=each.tokens.copy()) for each in about]
    for number, each in enumerate(about):
        each.tokens[-1] = 100 + number
    packer = tiny.packer(16)
    ((members, rows),) = packer.deal(about, packer.rooms(about))
    visual = int(about[0].is_visual.sum())
    assert (rows.inputs.visual_index >= 0).sum() == visual
    assert (rows.inputs.image_segments > 0).sum() == len(about[0].images[0].values)
    assert rows.shared[0, members >= 0].tolist() == [len(about[0]) - 1] * 3
    np.testing.assert_allclose(states(model, about), states(model, about, share=False), atol=1e-5)


def test_rows_are_filled_and_shared_where_it_costs_least():
    """By hand: each goes to the row that begins as it does; what fits nowhere is left out."""
    a = [tiny.sequence(i, 4, [], begin=(1, 2, 3)) for i in range(2)]
    b = [tiny.sequence(i, 4, [], begin=(9, 8, 7)) for i in range(2)]
    length, own = len(a[0]), len(a[0]) - 3
    assigned, shared = fit_sharing([a[0], b[0], a[1], b[1]], length + own, rows=2)
    assert assigned[0] == assigned[2] != assigned[1] == assigned[3]
    assert shared[:2].tolist() == [3, 3]
    assert fit_sharing([*a, *b], length, rows=2)[0].count(-1) == 2
    with pytest.raises(ValueError, match=f"{length} do not fit into a row of {length - 1}; raise the row length"):
        fit_sharing(a, length - 1)


def test_every_row_begins_with_what_is_shared():
    packer = tiny.packer(16, row_length=32)
    ((members, rows),) = packer.deal(TEXTS, packer.rooms(TEXTS))
    in_use = rows.inputs.segments[0].max(axis=1) > 0
    assert in_use.sum() > 1
    assert (rows.inputs.segments[0, in_use, : len(BEGIN)] == SHARED).all()
    assert (rows.inputs.tokens[0, in_use, : len(BEGIN)] == BEGIN).all()
    assert (rows.inputs.segments == SHARED).sum() == len(BEGIN) * in_use.sum()
    assert sorted(members[members >= 0]) == list(range(len(TEXTS)))
    assert rows.lengths[0, members >= 0].tolist() == [len(TEXTS[i]) for i in members[members >= 0]]
    assert (rows.last[0] >= 0).sum() == len(TEXTS)


def test_not_all_of_a_sequence_is_shared(model):
    """Each needs a token of its own, whose state is its embedding; and images are never shared."""
    same = tiny.sequence(1, 5)
    apart = states(model, [same, same], share=False)
    np.testing.assert_allclose(states(model, [same, same]), apart, atol=1e-5)
    pictures = [tiny.sequence(seed, 2, [(16, 16)], begin=BEGIN) for seed in (1, 2)]
    alike = [dataclasses.replace(each, tokens=pictures[0].tokens) for each in pictures]
    assert (np.abs(np.subtract(*states(model, alike))) > 1e-3).any()
    np.testing.assert_allclose(states(model, alike), states(model, alike, share=False), atol=1e-5)


def test_what_finds_no_room_comes_next():
    packer = tiny.packer(16)
    room = Room(16, 1, 32, 0, 192)
    members = [chosen[chosen >= 0].tolist() for chosen, _ in packer.deal(TEXTS, {False: room})]
    assert len(members) > 1
    assert sorted(itertools.chain(*members)) == list(range(len(TEXTS)))


def test_one_short_sequence_gets_one_short_row():
    assert tiny.packer(16).rooms(TEXTS[:1]) == {False: Room(1, 1, 16, 0, 0)}
    assert tiny.packer(16).rooms(TEXTS[:1], sample=True) == {False: Room(2, 4, 64, 0, 192)}


def test_no_batch_is_left_nearly_empty():
    """Nine pictures, a row each and eight to a batch at most, are five and four, and not eight and one."""
    pictures = [tiny.sequence(i, 3, [(16, 16)]) for i in range(9)]
    packer = dataclasses.replace(tiny.packer(8), patch_row_length=len(pictures[0].images[0].values))
    held = [int((members >= 0).sum()) for members, _ in packer.deal(pictures, packer.rooms(pictures))]
    assert held == [5, 4]


def test_sizes_are_few():
    assert [few(count) for count in (0, 1, 3, 8, 9, 60, 65, 81)] == [0, 1, 3, 8, 10, 64, 80, 96]
    assert [rounded(size, 16) for size in (1, 16, 17, 300)] == [16, 16, 32, 304 + 16]
    assert [power_of_two(count) for count in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
