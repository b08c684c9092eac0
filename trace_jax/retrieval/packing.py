"""Sequences to the few static shapes that the model reads: many to a row, and what all of a row begin with once."""

import collections
import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trace_jax.data.processor import Geometry, first_fit, fit_rows, pack, stack_shards, unique_images
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Array, Inputs

SLACK = 1.04  # room of a packed batch above what a sample needs
SEATS = 1.25  # likewise, of sequences above those of a batch on average: others are shorter
LEAST_LENGTH = 16  # tokens of a row that holds all there is; longer ones are multiples
LEAST_PATCHES = 64  # patches, likewise
LEAST_ROWS = 4  # rows of a long job, likewise


@dataclasses.dataclass(frozen=True)
class Room:
    """The static shape of one shard's part of a packed batch."""

    sequences: int
    rows: int
    row_length: int
    patch_rows: int
    patch_row_length: int


class Rows(NamedTuple):
    """Sequences that are read at once, N of each of S shards, and where each of them is."""

    inputs: Inputs
    last: Array  # [S, N] int32: flat slot of the last token; -1 is no sequence
    lengths: Array  # [S, N] int32: tokens, with those that the row shares; 0 is no sequence
    shared: Array  # [S, N] int32: how many of them stand at the row's beginning, for all of the row


@dataclasses.dataclass(frozen=True)
class Packer:
    """Deals sequences to shards and packs them; those with images apart from those without."""

    geometry: Geometry
    pad_token: int
    most: int  # sequences of a shard
    shards: int
    row_length: int  # at most
    patch_row_length: int  # likewise
    share: bool  # what sequences begin with stands once a row

    def rooms(self, sequences: Sequence[Tokens], *, sample: bool = False) -> dict[bool, Room]:
        """Static shapes for sequences without images and for those with; or for many more than this `sample`.

        Of these, more than usual may be short: seats cost little, and rows are to be full.
        """
        kinds = {v: [each for each in sequences if bool(each.images) == v] for v in (False, True)}
        fit = self._room_of_many if sample else self._room
        return {visual: fit(kind) for visual, kind in kinds.items() if kind}

    def _room_of_many(self, sample: Sequence[Tokens]) -> Room:
        count = min(self.most, math.ceil(len(sample) / self.shards))
        rows, patch_rows = (
            rounded(math.ceil(number * SLACK), LEAST_ROWS)
            for number in self._needed([sample[i * len(sample) // count] for i in range(count)])
        )
        patch_rows = min(patch_rows, sum(len(each.images) for each in sample))  # a row holds at least one image
        return Room(2 * power_of_two(count), rows, self.row_length, patch_rows, self.patch_row_length)

    def _room(self, sequences: Sequence[Tokens]) -> Room:
        images = unique_images(sequences)
        each = math.ceil(len(sequences) / self.shards)
        if len(sequences) <= min(self.most, each):  # one batch, of which all is known
            length = min(self.row_length, rounded(sum(map(len, sequences)), LEAST_LENGTH))
            patches = sum(len(image.values) for image in images)
            patch_length = min(self.patch_row_length, rounded(patches, LEAST_PATCHES))
            rows, patch_rows = map(few, self._needed(sequences, length, patch_length))
            return Room(power_of_two(each), rows, length, min(patch_rows, len(images)), patch_length)
        needed = self._needed(sequences)
        fewest = math.ceil(each / self.most)

        def room(batches: int) -> Room:
            """Of each of so many batches: a last one that is nearly empty costs no less."""
            parts = batches * self.shards
            rows, patch_rows = (few(max(math.ceil(n / parts), round(n * SLACK / parts))) for n in needed)
            seats = few(math.ceil(each / batches * SEATS))
            return Room(seats, rows, self.row_length, min(patch_rows, len(images)), self.patch_row_length)

        def slots(batches: int) -> int:
            one = room(batches)
            return batches * (one.rows * one.row_length + one.patch_rows * one.patch_row_length)

        # Sizes are few: some more batches may be a better fit.
        return room(min(range(fewest, 2 * fewest + 1), key=slots))

    def _needed(
        self, sequences: Sequence[Tokens], row_length: int | None = None, patch_row_length: int | None = None
    ) -> tuple[int, int]:
        """Rows, and rows of patches."""
        row_length, patch_row_length = row_length or self.row_length, patch_row_length or self.patch_row_length
        text, _ = fit_rows(sequences, row_length, share=self.share)
        patches = first_fit([len(image.values) for image in unique_images(sequences)], patch_row_length)
        return max(text) + 1, max(patches, default=-1) + 1

    def deal(self, sequences: Sequence[Tokens], rooms: dict[bool, Room]) -> Iterator[tuple[np.ndarray, Rows]]:
        """Batches, and which sequence each of their S * N places holds (-1: none).

        Those that begin alike, or show the same image, are read together. A sequence that finds no room comes first in
        the next batch, and one that has none even there, with more images than the sample of which the rooms are, in
        one of its own.
        """
        for visual, room in rooms.items():
            pending = collections.deque(
                _alike([i for i, s in enumerate(sequences) if bool(s.images) == visual], sequences)
            )
            while pending:
                first = pending[0]
                hands = [self._hand(sequences, pending, room) for _ in range(self.shards)]
                if pending and pending[0] == first and not any((members >= 0).any() for members, _ in hands):
                    pending.popleft()
                    alone = collections.deque([first])
                    own = self.rooms([sequences[first]])[visual]
                    hands = [self._hand(sequences, alone, own) for _ in range(self.shards)]
                members, rows = zip(*hands, strict=True)
                inputs, *places = zip(*rows, strict=True)
                yield np.concatenate(members), Rows(stack_shards(inputs), *map(np.stack, places))

    def _hand(
        self, sequences: Sequence[Tokens], pending: collections.deque[int], room: Room
    ) -> tuple[np.ndarray, Rows]:
        """One shard's part, taken from those who wait: its members [N], and its arrays without S."""
        hand = [pending.popleft() for _ in range(min(room.sequences, len(pending)))]
        chosen = [sequences[i] for i in hand]
        packed = pack(
            chosen,
            self.geometry,
            rows=room.rows,
            row_length=room.row_length,
            patch_rows=room.patch_rows,
            patch_row_length=room.patch_row_length,
            pad_token=self.pad_token,
            share=self.share,
        )
        placed = packed.starts >= 0
        pending.extendleft(reversed([i for i, fits in zip(hand, placed, strict=True) if not fits]))
        lengths = np.array([len(sequence) for sequence in chosen], np.int32)

        def of_all(values: np.ndarray, nothing: int) -> np.ndarray:
            """[members] -> [N] int32."""
            out = np.full(room.sequences, nothing, np.int32)
            out[: len(hand)] = np.where(placed, values, nothing)
            return out

        last = of_all(packed.starts + lengths - packed.shared - 1, -1)
        rows = Rows(packed.inputs, last, of_all(lengths, 0), of_all(packed.shared, 0))
        return of_all(np.array(hand, np.int32), -1), rows


def _alike(chosen: Sequence[int], sequences: Sequence[Tokens]) -> list[int]:
    """These sequences in another order: the same image one after another, and of texts what begins alike.

    Images are in no order, so that all batches are a like mixture and take as much room.
    """

    def key(i: int) -> tuple[list[int], bytes]:
        return [zlib.crc32(image.values.data) for image in sequences[i].images], sequences[i].tokens.tobytes()

    return sorted(chosen, key=key)


def few(count: int) -> int:
    """The next of four sizes between two powers of two: of short jobs, for which compiling is dearer than some rows."""
    step = max(1, power_of_two(count) // 8)
    return math.ceil(count / step) * step


def rounded(size: int, least: int) -> int:
    """The next of a few sizes, multiples of `least` and mostly at most an eighth larger: few shapes to compile."""
    step = max(least, 1 << max(size.bit_length() - 4, 0))
    return math.ceil(size / step) * step


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
