"""From queries, documents and traces to token sequences in Qwen2.5-VL's chat format.

A prompt ends where the assistant's turn begins. What the model writes there is the target: the trace, then `<|emb|>`.
`<|emb|>` itself is not read: the state that predicts it is the embedding, and nothing comes after it. (For an ablation,
the paper's Table 4, `Processor.finish` adds it.)
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import weakref
from collections.abc import Iterator

import numpy as np
import transformers
from etils import epath

from trace_jax.config import Data
from trace_jax.data import instructions
from trace_jax.data.processor import Geometry, Patches, Sequence, open_image, patchify, rope_positions
from trace_jax.data.schema import MARK, Document, Query

EMB = "<|emb|>"


class TextTooLongError(ValueError):
    """A user's text is over the limit."""


@contextlib.contextmanager
def local_files(folder: str | pathlib.Path | epath.Path) -> Iterator[pathlib.Path]:
    """A model's folder on this machine's disk; of a remote one a temporary copy of its texts, without the weights."""
    if "://" not in str(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="trace_jax_") as copy:
        for file in epath.Path(folder).iterdir():
            if file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json"):
                (pathlib.Path(copy) / file.name).write_bytes(file.read_bytes())
        yield pathlib.Path(copy)


@dataclasses.dataclass(frozen=True)
class Processor:
    """The tokenizer and the image geometry of one base model. Made by `Processor.from_hf`."""

    tokenizer: transformers.PreTrainedTokenizerFast
    geometry: Geometry
    prompts: str
    max_text_tokens: int
    position: str = "before"  # Data.position
    _shown: weakref.WeakValueDictionary[bytes, Patches] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary, init=False, compare=False, repr=False
    )

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path, data: Data) -> "Processor":
        """Loads the tokenizer of a Hugging Face folder, local or remote, and adds `<|emb|>` as its next token.

        Raises FileNotFoundError where there is no such folder, ValueError where the largest image fits no vision row.
        """
        if not (epath.Path(folder) / "config.json").exists():
            raise FileNotFoundError(f"no Hugging Face model in {folder} (--model.base): it has no config.json")
        with local_files(folder) as local:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(local))
            geometry = Geometry.from_hf(local, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
        largest = data.max_pixels // (geometry.patch_size * geometry.merge_size) ** 2 * geometry.merge_unit
        if largest > data.patch_row_length:
            raise ValueError(
                f"--data.max-pixels {data.max_pixels} allows images of {largest} patches, over --data.patch-row-length "
                f"{data.patch_row_length}: raise this or lower that"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": [EMB]}, replace_extra_special_tokens=False)
        return cls(tokenizer, geometry, data.prompts, data.max_text_tokens, data.position)

    def id_of(self, token: str) -> int:
        """The id of one special token. Raises ValueError when the tokenizer does not have it."""
        index = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(index, int) or index == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token!r}: is the base a Qwen2.5-VL?")
        return index

    @functools.cached_property
    def emb(self) -> int:
        """Id of `<|emb|>`."""
        return self.id_of(EMB)

    @functools.cached_property
    def end(self) -> int:
        """Id of `<|im_end|>`, which ends a turn."""
        return self.id_of("<|im_end|>")

    @functools.cached_property
    def pad(self) -> int:
        """Id of the padding token."""
        return self.id_of("<|endoftext|>")

    @functools.cached_property
    def image_pad(self) -> int:
        """Id of the placeholder of a visual token."""
        return self.id_of("<|image_pad|>")

    def encode(self, text: str) -> list[int]:
        """Plain tokens of a text; special tokens written inside it are taken as ordinary characters."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, tokens: np.ndarray | list[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @functools.lru_cache(maxsize=256)  # noqa: B019 (a processor lives as long as the program)
    def _format(self, markup: str) -> tuple[int, ...]:
        """Tokens of our own markup, in which special tokens are meant."""
        return tuple(self.tokenizer.encode(markup, add_special_tokens=False))

    def chat(
        self, system: str, text: str, image: bytes | tuple[bytes, ...] | None, name: str = "", *, cut: bool = True
    ) -> Sequence:
        """The prompt of one user turn, up to where the assistant begins: the image, then the text; several images stand
        where the text marks them (see `Query`).

        `cut` shortens a text of over `max_text_tokens` tokens, not its images; otherwise it raises TextTooLongError.
        """
        several = isinstance(image, tuple)
        files = image if isinstance(image, tuple) else () if image is None else (image,)
        pieces = [self.encode(piece) for piece in (text.split(MARK) if several else ["", text] if files else [text])]
        length = sum(map(len, pieces))
        if length > self.max_text_tokens and not cut:
            raise TextTooLongError(
                f"{name or 'text'}: {length} tokens; the limit is {self.max_text_tokens} (--data.max-text-tokens)"
            )
        images = tuple(self.patches(file, name) for file in files)
        tokens = list(self._format(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"))
        room = self.max_text_tokens
        for piece, shown in zip(pieces, (*images, None), strict=True):
            tokens += piece[:room]
            room -= len(piece[:room])
            if shown is not None:
                rows, columns = shown.grid
                tokens += [self.id_of("<|vision_start|>"), *[self.image_pad] * (rows * columns)]
                tokens += [self.id_of("<|vision_end|>")]
        tokens += self._format("<|im_end|>\n<|im_start|>assistant\n")
        ids = np.asarray(tokens, np.int32)
        is_visual = ids == self.image_pad
        return Sequence(ids, rope_positions(is_visual, [p.grid for p in images]), images, is_visual)

    def patches(self, image: bytes, name: str = "") -> Patches:
        """Decodes and cuts up an encoded image; while somebody holds the result, the same bytes are the same object.

        So a picture that several queries ask about, or a query's that is also a wrong answer, is packed, and computed,
        once.
        """
        shown = self._shown.get(image)
        if shown is None:
            shown = self._shown[image] = patchify(open_image(image, name or "image"), self.geometry)
        return shown

    def query(self, query: Query, name: str = "", *, cut: bool = True) -> Sequence:
        """The prompt of a query (paper, supplement Fig. 5), with its M-BEIR instruction."""
        system = instructions.query_prompt(self.prompts, bool(query.text), query.image is not None)
        text = instructions.format_query(query.instruction, query.text)
        return self.chat(system, text, query.image, name, cut=cut)

    def document(self, document: Document, name: str = "", *, cut: bool = True) -> Sequence:
        """The prompt of a candidate, which never reasons."""
        system = instructions.document_prompt(self.prompts, bool(document.text), document.image is not None)
        return self.chat(system, instructions.format_string(document.text), document.image, name, cut=cut)

    def finish(self, sequence: Sequence) -> Sequence:
        """A prompt, with its trace if it has one, up to the token whose state is the embedding (paper Table 4)."""
        return append(sequence, [self.emb]) if self.position == "token" else sequence


def append(sequence: Sequence, tokens: list[int]) -> Sequence:
    """A sequence that goes on with text tokens."""
    more = np.asarray(tokens, np.int32)
    next_position = sequence.positions[-1].max() + 1
    positions = np.repeat((next_position + np.arange(len(more), dtype=np.int32))[:, None], 3, axis=1)
    return Sequence(
        np.concatenate([sequence.tokens, more]),
        np.concatenate([sequence.positions, positions]),
        sequence.images,
        np.concatenate([sequence.is_visual, np.zeros(len(more), bool)]),
    )
