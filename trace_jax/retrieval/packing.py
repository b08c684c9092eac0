"""Sequences to the few static shapes that the model reads: many to a row, and what they all begin with once a row."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trace_jax.data.processor import Geometry, first_fit, pack, stack_shards
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Array, Inputs

SLACK = 1.04  # room of a packed batch above what a sample needs
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
        rooms = {}
        for visual in (False, True):
            kind = [sequence for sequence in sequences if bool(sequence.images) == visual]
            if not kind:
                continue
            each = math.ceil(len(kind) / self.shards)
            # Dealt evenly: a last batch that is nearly empty costs as much as a full one.
            count = min(self.most, each) if sample else math.ceil(each / math.ceil(each / self.most))
            some = [kind[i * len(kind) // count] for i in range(count)] if len(kind) > count else kind
            whole = not sample and some is kind
            lengths = [len(sequence) for sequence in kind]
            images = [len(image.values) for sequence in some for image in sequence.images]
            most, most_patches = self.row_length, self.patch_row_length
            if whole:
                most = min(most, rounded(sum(lengths), LEAST_LENGTH))
                most_patches = min(most_patches, rounded(sum(images), LEAST_PATCHES))
            shared = self._shared(some)
            needed = max(first_fit([len(sequence) - shared for sequence in some], most - shared)) + 1
            needed_patches = max(first_fit(images, most_patches), default=-1) + 1
            slack = 1 if whole else SLACK
            rows, patch_rows = (
                rounded(math.ceil(number * slack), LEAST_ROWS) if sample else few(math.ceil(number * slack))
                for number in (needed, needed_patches)
            )
            patch_rows = min(patch_rows, len(images))  # a row holds at least one image
            seats = power_of_two(count)
            rooms[visual] = Room(2 * seats if sample else seats, rows, most, patch_rows, most_patches)
        return rooms

    def deal(self, sequences: Sequence[Tokens], rooms: dict[bool, Room]) -> Iterator[tuple[np.ndarray, Rows]]:
        """Batches, and which sequence each of their S * N places holds (-1: none).

        In order; a sequence that finds no room comes first in the next, and one that has none even there, with more
        images than the sample of which the rooms are, in one of its own.
        """
        for visual, room in rooms.items():
            pending = collections.deque(i for i, each in enumerate(sequences) if bool(each.images) == visual)
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
        shared = self._shared(chosen)
        packed = pack(
            chosen,
            self.geometry,
            rows=room.rows,
            row_length=room.row_length,
            patch_rows=room.patch_rows,
            patch_row_length=room.patch_row_length,
            pad_token=self.pad_token,
            shared=shared,
        )
        placed = packed.starts >= 0
        pending.extendleft(reversed([i for i, fits in zip(hand, placed, strict=True) if not fits]))
        lengths = np.array([len(sequence) for sequence in chosen], np.int32)

        def of_all(values: np.ndarray, nothing: int) -> np.ndarray:
            """[members] -> [N] int32."""
            out = np.full(room.sequences, nothing, np.int32)
            out[: len(hand)] = np.where(placed, values, nothing)
            return out

        last = of_all(packed.starts + lengths - shared - 1, -1)
        rows = Rows(packed.inputs, last, of_all(lengths, 0), of_all(np.full(len(hand), shared), 0))
        return of_all(np.array(hand, np.int32), -1), rows

    def _shared(self, sequences: Sequence[Tokens]) -> int:
        """Tokens that all sequences begin with: text, and not all of any."""
        if not self.share or len(sequences) < 2:
            return 0
        first = sequences[0].tokens
        shared = len(first)
        for each in sequences:
            own = each.is_visual.copy()
            own[-1] = True
            shared = min(shared, int(own.argmax()))
            other = first[:shared] != each.tokens[:shared]
            shared = int(other.argmax()) if other.any() else shared
        return shared


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
