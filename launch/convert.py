"""Models and runs, in and out of Hugging Face.

check DIR         compares the weights with config.json, from their headers: what is missing, unexpected, mis-shaped.
from-hf DIR OUT   rewrites a base in our own layout. Training reads Hugging Face folders as they are; this is for
                  pods: every host reads only its own shards of OUT, straight from a bucket (`--model.base OUT`).
from-peft DIR     makes a PEFT adapter checkpoint 0 of a run, to search with or to train on.
to-hf OUT         exports a run for transformers: merged, or with --adapter for PEFT; with a model card.

On a TPU slice from-hf is started on every worker at once (launch/tpu_vm.sh); the rest runs in one process. DIR may be a
folder or gs://...; so may the OUT of from-hf. from-peft and to-hf take `--config NAME` and its overrides:

    python launch/convert.py to-hf exported --config emoji_tiny --workdir runs/mine
"""

import dataclasses
import pathlib
import sys
from typing import Annotated, Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tyro

from trace_jax import config, sharding
from trace_jax.retrieval import program
from trace_jax.training import convert

Name = tyro.conf.Positional[str]


@dataclasses.dataclass(frozen=True)
class Check:
    """Compares the weights of a Hugging Face folder with its config.json."""

    folder: Name


@dataclasses.dataclass(frozen=True)
class FromHf:
    """Rewrites a Hugging Face folder as a base in our own layout (Orbax)."""

    source: Name
    out: Name
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mesh: config.Mesh = dataclasses.field(default_factory=lambda: config.Mesh(data=1, fsdp=-1))
    """How the model is split while it is converted; any mesh can read the result."""


@dataclasses.dataclass(frozen=True)
class FromPeft:
    """Makes a PEFT adapter checkpoint 0 of a run."""

    folder: Name
    config: str = config.DEFAULT


@dataclasses.dataclass(frozen=True)
class ToHf:
    """Exports a run's checkpoint as a Hugging Face folder."""

    out: Name
    config: str = config.DEFAULT
    step: int | None = None
    """The checkpoint; default: the newest."""
    adapter: bool = False
    """A PEFT adapter instead of merged weights."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of merged weights. bfloat16 rounds what was trained. An adapter is float32."""


Command = (
    Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[FromHf, tyro.conf.subcommand("from-hf")]
    | Annotated[FromPeft, tyro.conf.subcommand("from-peft")]
    | Annotated[ToHf, tyro.conf.subcommand("to-hf")]
)


def main(given: list[str]) -> None:
    """Reads the command line and does it; raises SystemExit with one clear line if it cannot."""
    command, overrides = tyro.cli(Command, args=given, description=__doc__, return_unknown_args=True)
    sharding.join_processes()
    program.prepare_logging()
    with program.clear_errors(ValueError, FileExistsError):
        if isinstance(command, FromPeft | ToHf):
            run = config.load_config(command.config, overrides)
            if isinstance(command, FromPeft):
                convert.import_adapter(run, command.folder)
                print(f"checkpoint 0 of {run.run_dir}; launch/train.py {run.name} goes on from it")
                return
            if command.adapter:
                convert.export_adapter(run, command.out, step=command.step)
            else:
                convert.export_merged(run, command.out, step=command.step, dtype=command.dtype)
            print(f"{command.out}: see its README.md")
            return
        if overrides:
            raise ValueError(f"unknown options: {' '.join(overrides)}")
        if isinstance(command, Check):
            print(convert.check_base(command.folder))
        else:
            convert.convert_base(command.source, command.out, sharding.make_mesh(command.mesh), command.dtype)
            print(f"{command.out}: use it with --model.base {command.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
