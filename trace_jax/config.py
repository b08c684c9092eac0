"""Configurations: frozen dataclasses, one file per experiment in configs/, overridable on the command line.

`load_config("emoji_tiny", ["--optimizer.learning-rate", "1e-4"])` imports configs/emoji_tiny.py and reads its
`config`. A misspelt name or option gets a "did you mean".
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar, get_args, get_type_hints

import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT = "emoji_tiny"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters on the language model's linear layers (paper Table 7: rank 128, alpha 256)."""

    rank: int = 128
    alpha: float = 256.0
    rslora: bool = False  # scale alpha/sqrt(rank) instead of alpha/rank
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # Of the adapters' input, in training. Not shown: a checkpoint names its adapters by the rest.
    dropout: float = dataclasses.field(default=0.0, repr=False)


@dataclasses.dataclass(frozen=True)
class Model:
    """Which base to start from and how to run it. The architecture is read from the base's config.json."""

    base: str = "trace_jax/assets/emoji_base"  # a Hugging Face folder
    lora: Lora | None = Lora()
    trainable: tuple[str, ...] = (r"projector/.*", r".*/lora_[ab]", r"emb_row")  # regexes on parameter paths
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matmuls; norms, softmax, rotary and losses are float32
    # Of the part of the base that does not train; all that trains is float32. int8: the decoder's kernels, with a scale
    # a column; the rest is bfloat16.
    param_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    scan_layers: bool = True  # False unrolls: faster on CPU, slower to compile
    remat: Literal["none", "dots", "attention", "full"] = "full"  # what is kept for the backward pass
    attention: Literal["xla", "splash"] = "xla"  # splash is a TPU kernel: no scores in memory


@dataclasses.dataclass(frozen=True)
class Data:
    """What to train on, and the static shapes of a batch."""

    source: Literal["retrieval", "generative"] = "retrieval"
    release: str = "emoji_small"  # a folder of `root`, in M-BEIR's layout
    root: str = "data"
    batch_size: int = 1024  # pairs, over all devices
    row_length: int = 2048  # L: tokens of a packed row; also the longest sequence
    rows: int = 0  # R: packed rows of a shard; 0 measures the first batches
    patch_row_length: int = 1280  # P: patches of a vision row; also the largest image
    patch_rows: int = 0  # V: vision rows of a shard; 0 measures the first batches
    prompts: Literal["paper", "short"] = "paper"  # the task prompts of the paper's Fig. 5, or two words
    max_text_tokens: int = 480  # longer texts of a data set are cut (LamRA's length); a user's are refused
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # task (t2i, ...) or kind -> share; default 1
    same_task: int = 1  # pairs in a row that are of one task; few of a batch, or its fixed shapes stay half empty
    trace: Literal["both", "reasoning", "answer", "none"] = "both"  # what of it is a target (paper Table 5)
    closing_tag: str = ""  # written after a trace; the embedding is then read at its end (paper Table 4)
    position: Literal["before", "token"] = "before"  # of the embedding: before <|emb|>, or that token itself
    candidate_trace: Literal["none", "answer", "both"] = "none"  # what pictures write before <|emb|> (paper Table 6)
    max_positives: int = 8  # K
    hard_negatives: int = 0  # H: drawn for each query from its list in the release
    max_trace_tokens: int = 384
    jitter: float = 0.0  # random zoom and shift of training pictures, as a share of their sides
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 300 * 28 * 28

    def __post_init__(self) -> None:
        if "://" in self.root:
            raise ValueError(f"data.root {self.root}: records are read from a disk; mount the bucket (docs/tpu.md)")
        # An override is read as the default's type: a weight that a config writes as 2 may become 2.5.
        object.__setattr__(self, "weights", {name: float(share) for name, share in self.weights.items()})


@dataclasses.dataclass(frozen=True)
class Loss:
    """L = generation * L_gen + retrieval * L_ret (paper Eq. 5, Table 8)."""

    generation: float = 1.0
    retrieval: float = 1.0
    temperature: float = 0.05  # of InfoNCE; its start, where it is learned
    learn_temperature: bool = False  # the logarithm of its inverse trains; it never falls below 0.01, as in CLIP
    both_directions: bool = False  # InfoNCE also from document to query: L_ret is the mean of the two
    # Where both losses read one state, the one before <|emb|>, L_gen does not pull on it: the emission of <|emb|> then
    # trains its row of the head alone, and L_ret alone forms the embedding. To test whether the two losses conflict.
    detach_emission: bool = False
    supervise_emb: bool = True  # the emission of <|emb|> is a target also when there is no trace
    vocabulary_chunk: int = 1024  # supervised tokens whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and cosine decay to `final_fraction` of the peak."""

    learning_rate: float = 2e-4
    warmup_steps: int = 30
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis (sharding.py says what they split); -1 takes all that remain."""

    slice: int = 1  # TPU slices, joined by the data-centre network
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Training:
    """Length, rhythm and seed of a run."""

    steps: int = 1000
    chunks: int = 1  # C: parts of a device's batch that are in memory one after another; more is slower by a forward
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    checkpoint_minutes: float = 15.0
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # beside those at steps that this divides; 0: none
    validate_every: int = 0  # steps between looks at the validation split; 0: never
    validation_batches: int = 4
    spike: float = 10.0  # a loss so many times its running median stops the run; 0: only one that is no number
    profile: tuple[int, int] | None = None  # first and last step of a window for JAX's profiler
    wandb: str = ""  # a Weights & Biases project to log to as well
    prefetch: int = 4  # batches made ahead


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a checkpoint is searched with and measured."""

    mode: Literal["adaptive", "direct", "always"] = "adaptive"
    batch_size: int = 128  # queries or documents embedded at once
    max_trace_tokens: int = 64
    drafts: int = 0  # tokens guessed a decoding step from what was said before; the traces stay the same
    temperature: float = 0.0  # 0 writes the likeliest token; above it, tokens are drawn
    samples: int = 1  # traces drawn for each query, whose embeddings are averaged
    cache_gib: float = 4.0  # of a device's memory for the keys and values of the rows that are decoded together
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None  # of these; None is the model's
    dimensions: int | None = None  # embeddings cut to their first so many features (Matryoshka); None keeps all
    ks: tuple[int, ...] = (1, 5, 10)
    neighbours: int = 10  # results kept per query
    search: Literal["scann", "exact"] = "scann"  # the index of launch/build_index.py, or all stored vectors
    queries: int = 0  # of each file that are asked, spread over it; 0: all
    reasoner: str = ""  # the run whose traces the mode "external" puts into the texts of the queries
    benchmark: str = ""  # the release that is searched and measured on; default data.release
    mesh: Mesh | None = None  # to embed and to reason on; None is the training's. To reason with fsdp is slow
    pool_mesh: Mesh | None = None  # to embed whole pools on (launch/embed.py); None is `mesh`
    pool_batch_size: int | None = None  # documents embedded at once there; None is `batch_size`


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str
    workdir: str = ""  # default runs/<name>
    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @property
    def run_dir(self) -> str:
        """Where checkpoints, events, embeddings and reports of the run go; local or gs://."""
        return self.workdir or f"runs/{self.name}"

    @property
    def benchmark(self) -> str:
        """The release that is searched and measured on."""
        return self.evaluation.benchmark or self.data.release


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(values: dict[str, Any], kind: Any = Config) -> Any:
    """What `to_json` gave as a configuration; missing options have their defaults, unknown ones are left out."""

    def read(hint: Any, value: Any) -> Any:
        inner = next((each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)), None)
        if isinstance(value, dict) and inner is not None:
            return from_json(value, inner)
        return tuple(value) if isinstance(value, list) else value

    hints = get_type_hints(kind)
    return kind(**{name: read(hints[name], value) for name, value in values.items() if name in hints})


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Kind = TypeVar("_Kind", bound=_Named)


def config_names(folder: str = "configs") -> list[str]:
    """The experiments in configs/, or in another folder of the repository."""
    return sorted(path.stem for path in (ROOT / folder).glob("[!_]*.py"))


def load_config(
    name: str = DEFAULT, overrides: Sequence[str] = (), kind: type[_Kind] = Config, folder: str = "configs"
) -> _Kind:
    """Reads `config` of configs/<name>.py and applies command-line overrides.

    `kind` is its dataclass, and `folder` where configs of that kind are. Raises SystemExit with a "did you mean" for an
    unknown name or option.
    """
    if name not in config_names(folder):
        near = difflib.get_close_matches(name, config_names(folder), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SystemExit(f"unknown config {name!r}.{hint} There are: {', '.join(config_names(folder))}")
    spec = importlib.util.spec_from_file_location(f"configs.{name}", ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config: _Kind = module.config
    if config.name != name:
        raise SystemExit(f"{folder}/{name}.py holds a config named {config.name!r}; the names must agree")
    return tyro.cli(kind, default=config, args=list(overrides), prog=name, config=(tyro.conf.AvoidSubcommands,))


def from_command_line(arguments: Sequence[str], default: str = DEFAULT) -> Config:
    """`[config] [overrides]`, as every program in launch/ takes them."""
    if arguments and not arguments[0].startswith("-"):
        return load_config(arguments[0], arguments[1:])
    return load_config(default, arguments)
