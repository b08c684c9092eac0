"""Images and packing on the host, in numpy: resize, patches in window order, M-RoPE positions, packed rows.

Pixels stay bytes: an eighth of what the normalised patches, with the frame repeated along time, would be to move.

Follows Qwen2.5-VL's reference rules: sides are rounded to whole merge units within [min_pixels, max_pixels], patches
are grouped in merge units of 2x2, units in attention windows, windows row by row. Everything that depends on the data
is decided here, so that the compiled program sees static shapes only.
"""

import dataclasses
import functools
import io
import json
import math
import pathlib
import re
import warnings
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from trace_jax.data.schema import SHARED, Inputs

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
MOST_PIXELS = 80_000_000  # of an image file; above it, the file is taken for a decompression bomb
LONGEST = 200  # the longer side over the shorter one; the reference's limit
# Not all that Pillow opens: a user's EPS would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
# How MP4, QuickTime, 3GP, Matroska, WebM, AVI, MPEG and Flash files begin.
VIDEO = re.compile(rb".{4}ftyp(iso|mp4|avc|M4V|3g|qt)|\x1aE\xdf\xa3|RIFF.{4}AVI |\x00\x00\x01[\xb3\xba]|FLV\x01", re.S)

# Pillow warns from 89 million pixels on; such files are refused here, so nobody needs the warning. (A filter for one
# call would be no help: filters belong to the process, and images are decoded in threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How an image becomes patches. Sizes in pixels.

    Raises ValueError for limits that no size can keep to.
    """

    patch_size: int = 14
    merge_size: int = 2
    window_size: int = 112
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 300 * 28 * 28

    def __post_init__(self) -> None:
        token = (self.patch_size * self.merge_size) ** 2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < token:
            raise ValueError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: give 0 < min_pixels <= max_pixels, "
                f"and max_pixels of one visual token ({token} pixels) at least"
            )

    @property
    def patch_pixels(self) -> int:
        """Bytes of a flattened patch: channels x height x width."""
        return 3 * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that the projector merges into one visual token."""
        return self.merge_size**2

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path, *, min_pixels: int, max_pixels: int) -> "Geometry":
        """Reads config.json and the `image_settings` of a Hugging Face folder; the pixel limits are ours.

        Raises ValueError, listing them, for settings of the processor that no published Qwen2.5-VL has.
        """
        vision = json.loads((pathlib.Path(folder) / "config.json").read_text())["vision_config"]
        settings = image_settings(folder)
        supported = {
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": int(Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "patch_size": vision["patch_size"],
            "temporal_patch_size": vision["temporal_patch_size"],
            "merge_size": vision["spatial_merge_size"],
        }
        other = {key: settings[key] for key, value in supported.items() if settings.get(key, value) != value}
        if other:
            raise ValueError(
                f"{folder}: an image processor with {other} is not supported; expected "
                f"{ {key: supported[key] for key in other} }"
            )
        return cls(
            patch_size=vision["patch_size"],
            merge_size=vision["spatial_merge_size"],
            window_size=vision["window_size"],
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )


def image_settings(folder: str | pathlib.Path | epath.Path) -> dict[str, Any]:
    """What a Hugging Face folder, local or remote, says of its image processor; nothing where it says nothing.

    As transformers reads it: the part of processor_config.json, where processors are saved since version 5, before
    preprocessor_config.json.
    """
    folder = epath.Path(folder)
    whole, own = folder / PROCESSOR, folder / IMAGE_PROCESSOR
    nested = json.loads(whole.read_text()).get("image_processor") if whole.exists() else None
    return nested or (json.loads(own.read_text()) if own.exists() else {})


@dataclasses.dataclass(frozen=True)
class Patches:
    """One image, ready for the vision encoder; n patches in window order."""

    values: np.ndarray  # [n, patch_pixels] uint8: a channel after the other; the model normalises them
    positions: np.ndarray  # [n, 2] int32: row and column in the patch grid
    windows: np.ndarray  # [n] int32: 0, 1, ... the attention window
    slots: np.ndarray  # [n / merge_unit] int32: for each visual token in reading order, its merged patch
    grid: tuple[int, int]  # visual tokens down and across


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One tokenised text with its images; l tokens."""

    tokens: np.ndarray  # [l] int32, one <|image_pad|> per visual token
    positions: np.ndarray  # [l, 3] int32
    images: tuple[Patches, ...]
    is_visual: np.ndarray  # [l] bool: the placeholders

    def __len__(self) -> int:
        return len(self.tokens)


def decode_image(data: bytes, name: str = "image") -> np.ndarray:
    """As `open_image`, its pixels: [height, width, 3] uint8."""
    return np.asarray(open_image(data, name))


def open_image(data: bytes, name: str = "image") -> Image.Image:
    """Decodes an image file, to RGB: upright by its EXIF, transparency on white.

    Of an animation the first frame is taken; of 16-bit samples the high byte. Raises ValueError, naming `name` and the
    mend: before any pixel is decoded, for a video, a single pixel (a placeholder), sides over 200:1, over 80 million
    pixels, and 32-bit samples; then for bytes that are none of FORMATS, or are cut off.
    """
    if VIDEO.match(data):
        raise ValueError(f"{name}: a video; video is not supported, give one frame of it as an image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: over the limit of {MOST_PIXELS:,} pixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable image (none of {', '.join(FORMATS)}); replace the file") from error
    except Exception as error:  # what Pillow raises on a broken header depends on the format
        raise ValueError(f"{name}: not a readable image ({error}); replace the file") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{name}: {width}x{height} is over the limit of {MOST_PIXELS:,} pixels; scale it down")
    if width * height <= 1:
        raise ValueError(f"{name}: {width}x{height}, a single pixel shows nothing; replace the file")
    _check_sides(height, width, name)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(f"{name}: nothing says which 32-bit sample is white; save it with 8 or 16 bits a channel")
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Exception as error:  # likewise, on broken data
        raise ValueError(f"{name}: not a readable image ({error}); replace the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, as the reference does, but for 16 bits, which Pillow would clip to white."""
    if image.mode.startswith("I"):  # I;16, or of a PPM, whose samples Pillow brings to 16 bits
        samples = np.asarray(image)
        grey = (samples >> 8).astype(np.uint8)
        grey[samples == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_sides(height: int, width: int, name: str) -> None:
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"{name}: {width}x{height} pixels are longer than {LONGEST}:1; crop it")


def fit_size(height: int, width: int, geometry: Geometry) -> tuple[int, int]:
    """The (height, width) in pixels that an image is resized to: whole merge units, area within the limits.

    Raises ValueError for sides of more than 200:1, which the reference refuses too.
    """
    factor = geometry.patch_size * geometry.merge_size
    _check_sides(height, width, "image")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > geometry.max_pixels:
        scale = math.sqrt(height * width / geometry.max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < geometry.min_pixels:
        scale = math.sqrt(geometry.min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


@functools.lru_cache(maxsize=4096)
def _window_order(rows: int, columns: int, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a grid of visual tokens: the order of patches, their positions, and their windows (all read-only)."""
    merge, side = geometry.merge_size, geometry.window_size // geometry.merge_size // geometry.patch_size
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = (row // side) * math.ceil(columns / side) + column // side
    order = np.argsort(window, kind="stable")  # visual tokens, window by window
    inner_row, inner_column = np.divmod(np.arange(merge * merge), merge)
    positions = np.stack(
        [
            (row[order, None] * merge + inner_row).reshape(-1),
            (column[order, None] * merge + inner_column).reshape(-1),
        ],
        axis=1,
    ).astype(np.int32)
    windows = np.repeat(window[order], merge * merge).astype(np.int32)
    slots = np.empty_like(order)
    slots[order] = np.arange(rows * columns)
    return positions, windows, slots.astype(np.int32)


def patchify(image: Image.Image | np.ndarray, geometry: Geometry) -> Patches:
    """An RGB image, or its pixels [height, width, 3] uint8 -> patches in window order."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = fit_size(picture.height, picture.width, geometry)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    size, merge = geometry.patch_size, geometry.merge_size
    rows, columns = height // size // merge, width // size // merge
    positions, windows, slots = _window_order(rows, columns, geometry)
    grid = np.asarray(picture).reshape(rows * merge, size, columns * merge, size, 3).transpose(0, 2, 4, 1, 3)
    values = grid[positions[:, 0], positions[:, 1]]  # [n, channel, y, x]: the one gather
    return Patches(values.reshape(len(values), -1), positions, windows, slots, (rows, columns))


def rope_positions(is_visual: np.ndarray, grids: SequenceOf[tuple[int, int]]) -> np.ndarray:
    """M-RoPE positions [l, 3] of a sequence whose placeholders `is_visual` [l] belong to `grids`, in order.

    Text counts on by one in all three components; an image holds time still and counts rows and columns; the text
    after it goes on from the largest position used.
    """
    positions = np.empty((len(is_visual), 3), np.int32)
    at, next_position = 0, 0
    starts = np.flatnonzero(is_visual)
    for rows, columns in grids:
        start = int(starts[starts >= at][0])
        text = start - at
        positions[at:start] = (next_position + np.arange(text))[:, None]
        next_position += text
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[start : start + rows * columns] = next_position + np.stack([0 * row, row, column], axis=1)
        at, next_position = start + rows * columns, next_position + max(rows, columns)
    positions[at:] = (next_position + np.arange(len(is_visual) - at))[:, None]
    return positions


def first_fit(lengths: SequenceOf[int], capacity: int, rows: int | None = None) -> list[int]:
    """Assigns each length to a row, longest first, into the first row with room; -1 where no row is left.

    `rows` limits how many rows may be opened. Raises ValueError when a length is over the capacity.
    """
    assigned, room = [-1] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > capacity:
            raise ValueError(f"{lengths[i]} do not fit into a row of {capacity}; raise the row length")
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            if rows is not None and len(room) == rows:
                continue
            room.append(capacity)
            row = len(room) - 1
        room[row] -= lengths[i]
        assigned[i] = row
    return assigned


def fit_sharing(
    sequences: SequenceOf[Sequence], capacity: int, rows: int | None = None
) -> tuple[list[int], np.ndarray]:
    """Assigns sequences to rows in which what all of a row begin with, texts and images, stands once.

    Returns the row of each, as `first_fit`, and how many tokens each row shares: less than any of its sequences has.
    Sequences that begin alike come one after another, each into the row where it costs the fewest slots. Raises
    ValueError as `first_fit`.
    """
    numbers = {id(image): -3 - number for number, image in enumerate(unique_images(sequences))}  # in a token's place
    own = np.full((len(sequences), max(map(len, sequences), default=1)), -1, np.int32)
    for i, sequence in enumerate(sequences):
        own[i, : len(sequence) - 1] = sequence.tokens[:-1]  # the last one is its own
        shown = [np.full(len(image.slots), numbers[id(image)], np.int32) for image in sequence.images]
        if shown:
            own[i, np.flatnonzero(sequence.is_visual)] = np.concatenate(shown)
    begins = np.full_like(own, -2)  # of each row's first sequence; the last column differs from any other's
    assigned = [-1] * len(sequences)
    used, count, shared = np.zeros((3, len(sequences)), np.int64)
    in_use = 0
    for i in sorted(range(len(sequences)), key=lambda i: own[i].tobytes()):
        length = len(sequences[i])
        if length > capacity:
            raise ValueError(f"{length} do not fit into a row of {capacity}; raise the row length")
        common = np.minimum((begins[:in_use] != own[i]).argmax(axis=1), shared[:in_use])
        # The others of the row may come to share less than before.
        cost = (count[:in_use] - 1) * (shared[:in_use] - common) + length - common
        fitting = np.flatnonzero(used[:in_use] + cost <= capacity)
        if len(fitting):
            row = int(fitting[cost[fitting].argmin()])
            used[row] += cost[row]
            shared[row] = common[row]
        elif rows is None or in_use < rows:
            row, in_use = in_use, in_use + 1
            begins[row, : length - 1] = own[i, : length - 1]
            used[row], shared[row] = length, length - 1
        else:
            continue
        count[row] += 1
        assigned[i] = row
    return assigned, shared


def fit_rows(
    sequences: SequenceOf[Sequence], capacity: int, rows: int | None = None, *, share: bool
) -> tuple[list[int], np.ndarray]:
    """The row of each sequence, and how many tokens each row shares: by `fit_sharing`, else by `first_fit` and none."""
    if share:
        return fit_sharing(sequences, capacity, rows)
    return first_fit(list(map(len, sequences)), capacity, rows), np.zeros(len(sequences), np.int64)


def unique_images(sequences: SequenceOf[Sequence]) -> list[Patches]:
    """The images of some sequences; one that several of them hold, the same object, is there once."""
    return list({id(image): image for sequence in sequences for image in sequence.images}.values())


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of one shard, without the leading S, and where each sequence went."""

    inputs: Inputs
    starts: np.ndarray  # [sequences] int32: flat slot of the first token, or of the first that is not shared; -1 where
    # the sequence found no room
    shared: np.ndarray  # [sequences] int32: its first tokens, which stand at its row's beginning


def pack(
    sequences: SequenceOf[Sequence],
    geometry: Geometry,
    *,
    rows: int,
    row_length: int,
    patch_rows: int,
    patch_row_length: int,
    pad_token: int,
    share: bool = False,
) -> Packed:
    """Packs sequences into `rows` x `row_length` tokens and their images into `patch_rows` x `patch_row_length`.

    With `share`, what all the sequences of a row begin with stands once, at its beginning (`fit_sharing`).

    A sequence that finds no room, or whose images find none, is left out as a whole (start -1). An image that several
    sequences hold (the same object) is packed, and computed, once. Raises ValueError when a sequence is longer than a
    row or an image larger than a vision row.
    """
    unit = geometry.merge_unit
    images = unique_images(sequences)
    rows_of_images = first_fit([len(image.values) for image in images], patch_row_length, patch_rows)
    image_row = {id(image): row for image, row in zip(images, rows_of_images, strict=True)}
    fits = [i for i, sequence in enumerate(sequences) if all(image_row[id(image)] >= 0 for image in sequence.images)]
    own, sharing = fit_rows([sequences[i] for i in fits], row_length, rows, share=share)
    text_rows = dict(zip(fits, own, strict=True))

    tokens = np.full((rows, row_length), pad_token, np.int32)
    segments = np.zeros((rows, row_length), np.int32)
    positions = np.zeros((rows, row_length, 3), np.int32)
    visual_index = np.full((rows, row_length), -1, np.int32)
    patches = np.zeros((patch_rows, patch_row_length, geometry.patch_pixels), np.uint8)
    patch_positions = np.zeros((patch_rows, patch_row_length, 2), np.int32)
    image_segments = np.zeros((patch_rows, patch_row_length), np.int32)
    window_segments = np.zeros((patch_rows, patch_row_length), np.int32)
    starts, shares = np.full(len(sequences), -1, np.int32), np.zeros(len(sequences), np.int32)
    used, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    patches_used, placed, windows = (np.zeros(patch_rows, np.int32) for _ in range(3))

    slots = {}  # by image: its merged patches
    for image in unique_images([sequences[i] for i in fits if text_rows[i] >= 0]):
        row = image_row[id(image)]
        first, n = int(patches_used[row]), len(image.values)
        there = slice(first, first + n)
        placed[row] += 1
        patches[row, there], patch_positions[row, there] = image.values, image.positions
        image_segments[row, there] = placed[row]
        window_segments[row, there] = image.windows + 1 + windows[row]
        windows[row] += image.windows.max() + 1
        slots[id(image)] = (row * patch_row_length + first) // unit + image.slots
        patches_used[row] += n

    for i, sequence in enumerate(sequences):
        row = text_rows.get(i, -1)
        if row < 0:
            continue
        shares[i] = shared = int(sharing[row])
        index = np.full(len(sequence), -1, np.int32)
        if sequence.images:
            index[sequence.is_visual] = np.concatenate([slots[id(each)] for each in sequence.images])
        count[row] += 1
        parts = [(SHARED, slice(0, shared))] if count[row] == 1 else []
        for segment, part in (*parts, (count[row], slice(shared, len(sequence)))):
            at = slice(used[row], used[row] + part.stop - part.start)
            tokens[row, at], positions[row, at] = sequence.tokens[part], sequence.positions[part]
            segments[row, at], visual_index[row, at] = segment, index[part]
            used[row] = at.stop
        starts[i] = row * row_length + at.start
    return Packed(
        Inputs(tokens, segments, positions, visual_index, patches, patch_positions, image_segments, window_segments),
        starts,
        shares,
    )


def stack_shards(shards: SequenceOf[Inputs]) -> Inputs:
    """Gives the arrays of equally shaped shards their leading axis S."""
    return Inputs(*(np.stack(arrays) for arrays in zip(*shards, strict=True)))
