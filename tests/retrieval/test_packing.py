"""What sequences begin with is read once a row, and nothing depends on how they are packed."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax.data.schema import SHARED
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.retrieval.packing import Room, few, power_of_two, rounded
from trace_jax.training.losses import take_states

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
