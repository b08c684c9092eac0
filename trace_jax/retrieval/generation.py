"""Queries to embeddings: prefill, first-token routing, continuous batching of the rows that reason (paper Sec. 3.1).

A batch of prompts, packed many to a row, is read at once, which also predicts their first tokens; prompts whose first
token is <|emb|> are done (Eq. 2). The others move into slots, each with room for a prompt and its trace, and are
decoded together. In a step all slots write their keys and values to the same place of their caches, whatever their
lengths, so that nothing is scattered and nothing copied. A loop on the device runs until enough slots have ended to be
worth a refill; only then does the host look, hand out what is done, and refill the slots from the rows that wait,
reading more prompts when too few do. At the end, when nobody waits, the slots are moved into ever smaller batches. So a
step is hardly ever spent on a row that has ended, and no shape depends on the data.

The embedding is the state that predicts <|emb|> ("pre-token", Table 4), so that emitting the token costs no step.

Drafts (`drafts.py`) make a step read several tokens. Each is kept only if it is the very token that the model itself
chooses, so that the result is the same.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from trace_jax import sharding
from trace_jax.model.architecture import LanguageArchitecture
from trace_jax.model.cache import Cache, KeysValues, empty_cache, update
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.retrieval import drafts
from trace_jax.retrieval.packing import Rows

Array = jax.Array
Mode = Literal["adaptive", "direct", "always"]
MODES: tuple[Mode, ...] = ("adaptive", "direct", "always")
Reasoning = Literal["adaptive", "always"]  # the modes that may write a trace
NO_TOKEN = -1
REFILL = 8  # the slots are refilled when one in so many is free
FEWEST = 8  # slots; fewer are not moved into a smaller batch


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How traces are written; static in the compiled programs. Raises ValueError for numbers that make no sense."""

    stops: tuple[int, ...]  # tokens that end a trace: <|emb|>, and the end of the turn
    max_new_tokens: int  # T: a trace that has not ended by then is capped
    drafts: int = 0  # tokens guessed a step
    temperature: float = 0.0  # 0 is greedy
    samples: int = 1  # traces of each prompt, whose embeddings are averaged
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; allow at least one")
        if self.drafts < 0 or self.temperature < 0 or self.samples < 1:
            raise ValueError(f"{self}: give drafts >= 0, temperature >= 0 and samples >= 1")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"{self.samples} samples at temperature 0 are the same trace; raise the temperature")

    def cache_length(self, longest: int) -> int:
        """Slots of a cache for prompts of `longest` tokens, and what is read in as many steps as a trace may take."""
        return longest + self.max_new_tokens * (self.drafts + 1)


class Generation(NamedTuple):
    """What `generate` returns, on the host; N rows, T = max_new_tokens. Of several samples, all but the embedding is
    the first one's.
    """

    embeddings: np.ndarray  # [N, D] float32, unit length; zeros for an empty row
    tokens: np.ndarray  # [N, T] int32: the trace, without <|emb|>; -1 after its end
    lengths: np.ndarray  # [N] int32: tokens of the trace, 0 where the row did not reason
    reasoned: np.ndarray  # [N] bool: the row wrote a trace
    capped: np.ndarray  # [N] bool: the trace was cut at T tokens
    work: "Work"

    def traces(self) -> list[list[int]]:
        """The traces as token ids, empty where a row did not reason."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


class Work(NamedTuple):
    """What the decoding took: a measure of how full the slots were, and of how good the drafts."""

    steps: int = 0  # passes over the slots
    passes: int = 0  # steps x slots
    useful: int = 0  # of the passes, those of rows that had not ended
    tokens: int = 0  # read in the useful ones; more than one each is the drafts' doing

    def plus(self, other: "Work") -> "Work":
        """Both together."""
        return Work(*map(sum, zip(self, other, strict=True)))


class _Compiled:
    """Counts the seconds that XLA compiles in this process; the call that compiles also computes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


_compiled = _Compiled()


class Program:
    """A jitted function that knows how often, and for how many seconds, it has been compiled."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.jitted: Any = jax.jit(function, **options)
        self.compilations, self.seconds = 0, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls it; the result is on its way, as ever with JAX, when this returns."""
        before = _compiled.seconds
        result = self.jitted(*arguments, **options)
        if self.jitted._cache_size() > self.compilations:
            self.compilations = self.jitted._cache_size()
            self.seconds += _compiled.seconds - before
        return result


class Prefilled(NamedTuple):
    """After the prompts: N of at most P tokens, which were read packed into rows of L."""

    state: Array  # [N, D] float32 at the prompt's last token
    first: Array  # [N, samples] int32: the first token
    draw: Array  # [N, samples] uint32: which random numbers each gets
    tokens: Array  # [N, P] int32: the prompt, then zeros
    lengths: Array  # [N] int32
    shift: Array  # [N] int32: M-RoPE position of the next token, less its number
    row: Array  # [N] int32: where it was read
    places: Array  # [N, P] int32: the slots of its tokens in that row; any after its end
    cache: tuple[KeysValues, ...]  # of the rows


class Slots(NamedTuple):
    """Rows that are being decoded, n of them with room for P tokens of prompt and T of trace; the free are `done`.

    The token of a row that is to be read next is tokens[length]. The cache has P slots for the prompt, and after them a
    ring: a step writes to the next slots of it in all rows, and comes round when nobody needs what was there.
    """

    cache: Cache  # of C slots (`Decoding.cache_length`)
    seen: Array  # [n, C] bool: the slots of the cache that hold the row's tokens
    next: Array  # [] int32: the slot that comes next
    tokens: Array  # [n, P + T + drafts + 1] int32: the prompt, then the trace; nonsense after that
    prompt: Array  # [n] int32: tokens of the prompt
    length: Array  # [n] int32: tokens read
    shift: Array  # [n] int32, as in Prefilled
    draw: Array  # [n] uint32: which random numbers the row gets
    state: Array  # [n, D] float32: the last state
    done: Array  # [n] bool
    capped: Array  # [n] bool


# ---- the host's part ---------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """A row that waits for a slot, or is in one."""

    number: int  # counted over all batches
    sample: int
    row: int  # in its batch


class _Written:
    """The rows in order, and what became of them; grows by a batch at a time."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.lengths: list[int] = []  # of the prompts
        self.states: list[np.ndarray] = []  # [samples, D] of each row
        self.traces: dict[int, np.ndarray] = {}  # of the first sample
        self.capped: set[int] = set()

    def add(self, lengths: np.ndarray, states: np.ndarray) -> int:
        """A batch as it is after its prompts [N], [N, D]; the number of its first row."""
        self.lengths += lengths.tolist()
        self.states += list(np.repeat(states[:, None], self.decoding.samples, axis=1))
        return len(self.lengths) - len(lengths)

    def finish(self, request: _Request, state: np.ndarray, trace: np.ndarray, capped: bool) -> None:
        """A row that has written its trace."""
        self.states[request.number][request.sample] = state
        if request.sample == 0:
            self.traces[request.number] = trace
            if capped:
                self.capped.add(request.number)

    def result(self, work: Work) -> Generation:
        """Everything, in order."""
        numbers = range(len(self.lengths))
        mean = _unit(_unit(np.stack(self.states)).mean(axis=1))
        tokens = np.full((len(numbers), self.decoding.max_new_tokens), NO_TOKEN, np.int32)
        for number, trace in self.traces.items():
            tokens[number, : len(trace)] = trace
        return Generation(
            embeddings=np.where(np.array(self.lengths)[:, None] > 0, mean, np.float32(0)),
            tokens=tokens,
            lengths=(tokens != NO_TOKEN).sum(axis=1, dtype=np.int32),
            reasoned=np.array([number in self.traces for number in numbers], bool),
            capped=np.array([number in self.capped for number in numbers], bool),
            work=work,
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def generate(
    model: Qwen2_5_VL,
    batches: Iterable[Rows],
    decoding: Decoding,
    *,
    longest: int,
    slots: int,
    mode: Reasoning = "adaptive",
    cache_dtype: Any = None,
    memory: drafts.Memory | None = None,
) -> Generation:
    """Embeds batches of prompts, of at most `longest` tokens each; a row of the result for each place of a batch.

    `mode`: "adaptive" lets the first token decide; "always" forbids to stop at it. A stop ends a trace: the state that
    predicts it is the embedding. A trace that has not ended after `max_new_tokens` tokens is capped: its last state is
    the embedding. A prompt's result does not depend on the others, nor on `slots`, the most that are decoded at once (a
    multiple of the mesh's data shards). `cache_dtype` is that of the slots' keys and values, by default the model's;
    int8 keeps a scale with each. `memory` is that of earlier calls, for drafts. Raises ValueError for another mode, or
    prompts over `longest`.
    """
    if mode not in get_args(Reasoning):
        raise ValueError(f"mode {mode!r} is neither 'adaptive' nor 'always'")
    written, work = _Written(decoding), Work()
    prompts = _read_ahead(model, batches, decoding, mode, longest)
    sizes = _sizes(slots)
    running = _empty(model.architecture.language, slots, longest, decoding, cache_dtype or model.dtype)
    memory = memory or drafts.Memory()
    follows = _no_pairs() if memory.follows is None else memory.follows
    rows: list[_Request | None] = [None] * slots
    waiting: collections.deque[tuple[Prefilled, _Request]] = collections.deque()
    more = True
    while True:
        while more and None in rows:
            if waiting:
                running = _refill(running, rows, waiting)
            elif (batch := next(prompts, None)) is not None:
                waiting.extend((batch[1], request) for request in _sort_out(*batch, written))
            else:
                more = False
        occupied = len(rows) - rows.count(None)
        if not occupied:
            memory.follows = follows
            return written.result(work)
        if more:
            enough = len(rows) - math.ceil(len(rows) / REFILL)
        else:
            for size in sizes:  # by halves, so that there are few programs
                if occupied <= size < len(rows):
                    keep = sorted(range(len(rows)), key=lambda slot: rows[slot] is None)[:size]
                    running, rows = _resize(running, np.array(keep, np.int32)), [rows[slot] for slot in keep]
            enough = max((smaller for smaller in sizes if smaller < len(rows)), default=0)
        least = np.int32(min(enough, occupied - 1))
        running, follows, counts = _decode(model, running, follows, least, decoding=decoding)
        _hand_out(running, rows, written)
        steps, useful, tokens = np.asarray(counts).tolist()
        work = work.plus(Work(steps, steps * len(rows), useful, tokens))


def warm_up(
    model: Qwen2_5_VL,
    batches: Iterable[Rows],
    decoding: Decoding,
    *,
    longest: int,
    slots: int,
    mode: Reasoning = "adaptive",
    cache_dtype: Any = None,
) -> None:
    """Compiles all that `generate` can need for batches of these shapes; the arguments are the same."""
    for rows in batches:
        prefilled = _prefill(model, rows, decoding=decoding, mode=mode, longest=longest)
        running = _empty(model.architecture.language, slots, longest, decoding, cache_dtype or model.dtype)
        for moved in (slots, _refilled(slots)):
            running = _admit(running, prefilled, *np.full((3, moved), slots, np.int32))  # nobody goes anywhere
        for size in _sizes(slots):
            if size < slots:
                running = _resize(running, np.arange(size, dtype=np.int32))
            running, _, counts = _decode(model, running, _no_pairs(), np.int32(0), decoding=decoding)  # no step
            jax.block_until_ready(counts)


def _refilled(slots: int) -> int:
    """How many slots are filled again at once."""
    return max(1, slots // REFILL)


def _sizes(slots: int) -> list[int]:
    """The numbers of slots that are in use, fewer towards the end: halves, as long as they can be dealt to the
    devices.
    """
    mesh, sizes = jax.sharding.get_abstract_mesh(), [slots]
    shards = 1 if mesh.empty else sharding.data_shards(mesh)
    while sizes[-1] % (2 * shards) == 0 and sizes[-1] // 2 >= FEWEST:
        sizes.append(sizes[-1] // 2)
    return sizes


def _read_ahead(
    model: Qwen2_5_VL, batches: Iterable[Rows], decoding: Decoding, mode: Reasoning, longest: int
) -> Iterator[tuple[np.ndarray, Prefilled]]:
    """The prompts' lengths [N], and what reading them gave, a batch behind: the device reads the next one while the
    host looks at this one.
    """
    before = None
    for rows in batches:
        lengths = np.asarray(rows.lengths).reshape(-1)
        if lengths.max(initial=0) > longest:
            raise ValueError(f"a prompt of {lengths.max()} tokens is over the longest of {longest}")
        result = _prefill(model, rows, decoding=decoding, mode=mode, longest=longest)
        if before is not None:
            yield before
        before = lengths, result
    if before is not None:
        yield before


def _sort_out(lengths: np.ndarray, prefilled: Prefilled, written: _Written) -> list[_Request]:
    """The rows that reason (with several samples, each of a row's); the others are done."""
    first = written.add(lengths, np.asarray(prefilled.state))
    reasons = ~np.isin(np.asarray(prefilled.first), written.decoding.stops) & (lengths > 0)[:, None]
    return [_Request(first + row, sample, row) for row, sample in np.argwhere(reasons).tolist()]


def _refill(
    running: Slots, rows: list[_Request | None], waiting: collections.deque[tuple[Prefilled, _Request]]
) -> Slots:
    """Puts the next of those who wait into free slots: of one batch, and as many as a refill is, or all at first."""
    batch, moved = waiting[0][0], len(rows) if not any(rows) else _refilled(len(rows))
    chosen = np.full((3, moved), len(rows), np.int32)  # nobody goes to a slot that is not there
    for move in range(moved):
        if not waiting or waiting[0][0] is not batch or None not in rows:
            break
        _, request = waiting.popleft()
        slot = rows.index(None)
        rows[slot], chosen[:, move] = request, (slot, request.row, request.sample)
    return _admit(running, batch, *chosen)


def _hand_out(running: Slots, rows: list[_Request | None], written: _Written) -> None:
    """Takes the rows that have ended out of their slots."""
    done, capped, tokens, prompt, length, state = jax.device_get(
        (running.done, running.capped, running.tokens, running.prompt, running.length, running.state)
    )
    for slot, request in enumerate(rows):
        if request is not None and done[slot]:
            trace = tokens[slot, prompt[slot] : length[slot]]
            written.finish(request, state[slot], trace, bool(capped[slot]))
            rows[slot] = None


# ---- the device's part -------------------------------------------------------------------------------------------


def place_rows(tree: Any) -> Any:
    """Splits rows over the mesh's data axes and, in caches, heads over its tensor axis where they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def place(leaf: Array) -> Array:
        if not leaf.ndim:
            return jax.lax.with_sharding_constraint(leaf, P())
        heads = ["tensor"] if leaf.ndim == 4 and leaf.shape[1] % mesh.shape["tensor"] == 0 else []
        return jax.lax.with_sharding_constraint(leaf, P(sharding.BATCH_AXES, *heads))

    return jax.tree.map(place, tree)


def _choose(logits: Array, draw: Array, at: Array, decoding: Decoding) -> Array:
    """The tokens that come at slots `at` [...] int32, from logits [..., V]: the best or, above temperature 0, drawn.

    The random numbers are a function of the seed, `draw` [...] uint32, and the slot alone.
    """
    if not decoding.temperature:
        return _best(logits)

    def noise(draw: Array, at: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(decoding.seed), draw), at)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    drawn = jax.vmap(noise)(draw.reshape(-1), at.reshape(-1)).reshape(logits.shape)
    return _best(logits / decoding.temperature + drawn)


def _best(logits: Array) -> Array:
    """The first of the largest: [..., V] -> [...] int32. XLA:CPU takes four times as long for `jnp.argmax`."""
    tokens, none = jnp.arange(logits.shape[-1], dtype=jnp.int32), jnp.int32(logits.shape[-1] - 1)
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, tokens.reshape((1,) * (logits.ndim - 1) + (-1,)), none).min(axis=-1)


@functools.partial(Program, static_argnames=("decoding", "mode", "longest"))
def _prefill(model: Qwen2_5_VL, rows: Rows, *, decoding: Decoding, mode: Reasoning, longest: int) -> Prefilled:
    """Reads the prompts and predicts their first tokens; in mode "always" these are no stops."""
    shards, count, length = rows.inputs.tokens.shape
    last = jnp.maximum(jnp.asarray(rows.last), 0)
    state, cache = model.prefill(rows.inputs, at=last)
    state = state.reshape(-1, state.shape[-1])
    row = (last // length + count * jnp.arange(shards, dtype=jnp.int32)[:, None]).reshape(-1)
    last, lengths, shared = (jnp.asarray(each).reshape(-1) for each in (last, rows.lengths, rows.shared))
    number = jnp.arange(longest, dtype=jnp.int32)[None]
    own = number + (last % length + 1 - lengths)[:, None]
    places = jnp.clip(jnp.where(number < shared[:, None], number, own), 0, length - 1)
    read = jnp.asarray(rows.inputs.tokens).reshape(-1, length)[row[:, None], places]
    tokens = jnp.where(number < lengths[:, None], read, 0)
    logits = model.logits(state)
    if mode == "always":
        logits = logits.at[:, jnp.asarray(decoding.stops)].set(-jnp.inf)
    # A prompt ends in text, whose position is the largest.
    position = jnp.asarray(rows.inputs.positions).reshape(-1, length, 3)[row, last % length].max(axis=1) + 1
    # Each prompt draws numbers of its own, whatever its company.
    odd = 2 * jnp.arange(longest, dtype=jnp.uint32) + jnp.uint32(0x9E3779B1)
    prompt = (tokens.astype(jnp.uint32) * odd[None]).sum(axis=1, dtype=jnp.uint32)
    draw = prompt[:, None] + jnp.arange(decoding.samples, dtype=jnp.uint32)[None]
    again = (len(lengths), decoding.samples)
    logits = jnp.broadcast_to(logits[:, None], (*again, logits.shape[-1]))
    first = _choose(logits, draw, jnp.broadcast_to(lengths[:, None], again), decoding)
    return place_rows(Prefilled(state, first, draw, tokens, lengths, position - lengths, row, places, cache))


def _empty_slots(architecture: LanguageArchitecture, slots: int, longest: int, decoding: Decoding, dtype: Any) -> Slots:
    """Free slots for prompts of so many tokens."""
    length = decoding.cache_length(longest)
    number = jnp.zeros(slots, jnp.int32)
    return place_rows(
        Slots(
            cache=empty_cache(architecture, slots, length, dtype),
            seen=jnp.zeros((slots, length), bool),
            next=jnp.int32(longest),
            tokens=jnp.zeros((slots, longest + decoding.max_new_tokens + decoding.drafts + 1), jnp.int32),
            prompt=number,
            length=number,
            shift=number,
            draw=jnp.zeros(slots, jnp.uint32),
            state=jnp.zeros((slots, architecture.hidden_size), jnp.float32),
            done=jnp.ones(slots, bool),
            capped=jnp.zeros(slots, bool),
        )
    )


_empty = Program(_empty_slots, static_argnums=(0, 1, 2, 3, 4))


@functools.partial(Program, donate_argnums=0)
def _admit(slots: Slots, prefilled: Prefilled, to: Array, chosen: Array, samples: Array) -> Slots:
    """Moves prompts [m] of a batch, each in the state of its sample [m], to slots `to` [m].

    A move to a slot that is not there does nothing.
    """

    def put(old: Array, values: Array) -> Array:
        """[n, ...] with values [m, ...]."""
        return old.at[to].set(values.astype(old.dtype), mode="drop")

    def take(values: Array) -> Array:
        return values.at[chosen].get(mode="clip")

    def of_sample(values: Array) -> Array:
        return jnp.take_along_axis(take(values), samples[:, None], axis=1, mode="clip")[:, 0]

    def find(packed: Array) -> Array:
        """[rows, kv_heads, L, head_dim] -> [m, kv_heads, P, head_dim]."""
        return jnp.take_along_axis(packed[take(prefilled.row)], take(prefilled.places)[:, None, :, None], axis=2)

    def put_prompt(old: Array, new: Array, slots: int) -> Array:
        where = (to, *[slice(None)] * (slots - 1), slice(new.shape[slots]))
        return old.at[where].set(new, mode="drop")

    lengths = take(prefilled.lengths)
    room = ((0, 0), (0, slots.tokens.shape[1] - prefilled.tokens.shape[1]))
    tokens = jnp.pad(take(prefilled.tokens), room).at[jnp.arange(len(chosen)), lengths].set(of_sample(prefilled.first))
    return place_rows(
        Slots(
            cache=tuple(
                update(old, find(k), find(v), put_prompt)
                for old, (k, v) in zip(slots.cache, prefilled.cache, strict=True)
            ),
            seen=put(slots.seen, jnp.arange(slots.seen.shape[1], dtype=jnp.int32)[None] < lengths[:, None]),
            next=slots.next,
            tokens=put(slots.tokens, tokens),
            prompt=put(slots.prompt, lengths),
            length=put(slots.length, lengths),
            shift=put(slots.shift, take(prefilled.shift)),
            draw=put(slots.draw, of_sample(prefilled.draw)),
            state=put(slots.state, take(prefilled.state)),
            done=put(slots.done, jnp.zeros(len(chosen), bool)),
            capped=put(slots.capped, jnp.zeros(len(chosen), bool)),
        )
    )


@Program
def _resize(slots: Slots, keep: Array) -> Slots:
    """The slots of these numbers alone."""
    return place_rows(jax.tree.map(lambda leaf: leaf[keep] if leaf.ndim else leaf, slots))


_no_pairs = Program(drafts.nothing)


@functools.partial(Program, static_argnames="decoding", donate_argnums=1)
def _decode(
    model: Qwen2_5_VL, slots: Slots, follows: Array, least: Array, *, decoding: Decoding
) -> tuple[Slots, Array, Array]:
    """Decodes until `least` [] int32 rows, or fewer, have not ended; `follows` as in `drafts.Memory`.

    Also returns [3] int32: steps, and summed over them, the rows that had not ended and the tokens that these read.
    """
    width, length = decoding.drafts + 1, slots.seen.shape[1]
    ahead, places = jnp.arange(width, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32)
    ring = length - width * decoding.max_new_tokens  # where it begins

    def step(loop: tuple[Slots, Array, Array]) -> tuple[Slots, Array, Array]:
        slots, follows, counts = loop
        at = slots.length[:, None] + ahead[None]
        read = jnp.take_along_axis(slots.tokens, slots.length[:, None], axis=1)
        before = jnp.take_along_axis(slots.tokens, jnp.maximum(slots.length - 1, 0)[:, None], axis=1)
        if decoding.drafts:
            read = drafts.guess(slots.tokens, slots.length, before, read, follows, count=decoding.drafts)
        positions = jnp.repeat((at + slots.shift[:, None])[..., None], 3, axis=2)
        new = places[None] - slots.next  # of the tokens that are read, in the slots of the cache
        within = (new >= 0) & (new <= ahead[:, None])
        states, cache = model.decode(slots.cache, read, positions, slots.next, slots.seen[:, None] | within[None])
        draw = jnp.broadcast_to(slots.draw[:, None], at.shape)
        chosen = _choose(model.logits(states), draw, at + 1, decoding)
        stops = jnp.isin(chosen, jnp.asarray(decoding.stops))
        ends = stops | (at + 1 - slots.prompt[:, None] >= decoding.max_new_tokens)
        # A token that was read counts if it is the one chosen before it, and nothing had ended.
        counts_too = (chosen[:, :-1] == read[:, 1:]) & ~ends[:, :-1]
        last = jnp.cumprod(counts_too.astype(jnp.int32), axis=1).sum(axis=1)[:, None]

        def pick(values: Array) -> Array:
            return jnp.take_along_axis(values, last, axis=1)[:, 0]

        active, ended = ~slots.done, pick(ends)
        number = jnp.where(active, last[:, 0] + 1, 0)
        state = jnp.take_along_axis(states, last[..., None], axis=1)[:, 0]
        counts = counts + jnp.stack([jnp.int32(1), active.sum(dtype=jnp.int32), number.sum(dtype=jnp.int32)])
        if decoding.drafts:
            known = active[:, None] & (ahead[None] <= last)
            follows = drafts.remember(follows, before, read, chosen, known)
        slots = slots._replace(
            cache=cache,
            seen=slots.seen | (active[:, None] & (new >= 0) & (new <= last)),
            next=jnp.where(slots.next + width < length, slots.next + width, ring),
            tokens=_write(slots.tokens, chosen, slots.length + 1, active),
            length=slots.length + number,
            state=jnp.where(active[:, None], state, slots.state),
            done=slots.done | ended,
            capped=jnp.where(active, ended & ~pick(stops), slots.capped),
        )
        return place_rows(slots), follows, counts

    start = place_rows(slots), drafts.whole(follows), jnp.zeros(3, jnp.int32)
    return jax.lax.while_loop(lambda loop: (~loop[0].done).sum(dtype=jnp.int32) > least, step, start)


def _write(tokens: Array, new: Array, at: Array, where: Array) -> Array:
    """Tokens [n, C] with new [n, k] from at [n] on, in the rows `where` [n]. A scatter would be a loop over rows."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] - at[:, None]
    values = jnp.take_along_axis(new, jnp.clip(place, 0, new.shape[1] - 1), axis=1)
    return jnp.where(where[:, None] & (place >= 0) & (place < new.shape[1]), values, tokens)


def cache_bytes(architecture: LanguageArchitecture, length: int, dtype: Any) -> int:
    """What the keys and values of one row of so many slots take."""
    cache = jax.eval_shape(lambda: empty_cache(architecture, 1, length, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


PROGRAMS = (_prefill, _empty, _no_pairs, _admit, _resize, _decode)


def compilations() -> tuple[int, float]:
    """How many programs this process has compiled for generation, and in how many seconds."""
    return sum(each.compilations for each in PROGRAMS), sum(each.seconds for each in PROGRAMS)
