"""Versioned prompts: prompts/<version>.toml holds the text of every stage and task; rows keep its hash."""

import dataclasses
import hashlib
import string
import tomllib
from pathlib import Path
from typing import Any, Literal

from trace_jax.data.schema import TASKS

ASSESSMENT = {
    "type": "object",
    "properties": {"complex": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["complex", "reason"],
    "additionalProperties": False,
}
VERDICT = {
    "type": "object",
    "properties": {
        "consistent": {"type": "boolean"},
        "confidence": {"type": "number"},
        "reason": {"type": "string"},
    },
    "required": ["consistent", "confidence", "reason"],
    "additionalProperties": False,
}
_FOLDER = Path(__file__).parent / "prompts"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The system turn and the template of the user turn, with $names for what a query has."""

    system: str
    template: str

    @property
    def hash(self) -> str:
        """Names these very words."""
        return hashlib.sha256(f"{self.system}\0{self.template}".encode()).hexdigest()[:12]

    def fill(self, **values: str) -> str:
        """The user turn of one query. Raises KeyError for a name that has no value."""
        return string.Template(self.template).substitute(values).strip()


class Prompts:
    """The prompts of one version."""

    def __init__(self, version: str) -> None:
        path = _FOLDER / f"{version}.toml"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.toml")))
            raise ValueError(f"no prompts {version!r}; there are {known}")
        self._texts: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))

    def assess(self, task: int) -> Prompt:
        """Asks whether a query of this task is simple or complex."""
        return self._prompt("assess", task, self._texts["assess"]["ask"])

    def generate(self, task: int, gold: bool) -> Prompt:
        """Asks for the trace; with `gold` the target is shown."""
        texts = self._texts["generate"]
        return self._prompt("generate", task, texts["with_target"] if gold else texts["without_target"])

    def verify(self, target: Literal["image", "text"]) -> Prompt:
        """Asks whether an answer is consistent with the target."""
        texts = self._texts["verify"]
        return Prompt(texts["system"].strip(), texts[target].strip())

    def _prompt(self, stage: str, task: int, ask: str) -> Prompt:
        texts = self._texts[stage]
        return Prompt(texts["system"].strip(), f"{texts['tasks'][TASKS[task]].strip()}\n\n{ask.strip()}")

    def hashes(self) -> dict[str, str]:
        """The hash of every prompt, by stage, task and variant."""
        found = {f"assess {name}": self.assess(task).hash for task, name in TASKS.items()}
        for task, name in TASKS.items():
            found[f"generate {name}, target hidden"] = self.generate(task, False).hash
            found[f"generate {name}, target shown"] = self.generate(task, True).hash
        return found | {"verify image": self.verify("image").hash, "verify text": self.verify("text").hash}
