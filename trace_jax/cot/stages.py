"""Assess, generate, verify: which requests a row needs, and what their answers make of the row."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from trace_jax.cot.cache import Answer
from trace_jax.cot.client import Request
from trace_jax.cot.config import CotConfig, Teacher
from trace_jax.cot.prompts import ASSESSMENT, VERDICT, Prompts
from trace_jax.cot.schema import Row, chosen
from trace_jax.cot.teacher import Result, Unanswered

_NONE = "(none)"


def read_json(text: str) -> dict[str, Any] | None:
    """The first JSON object of an answer, which may stand in a fence or between words; None if there is none."""
    for brace in re.finditer(r"\{", text):
        try:
            return json.JSONDecoder().raw_decode(text, brace.start())[0]
        except ValueError:
            continue
    return None


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the three have in common: the options, the prompts and the release that holds the pictures."""

    config: CotConfig
    prompts: Prompts
    release: Path

    def model(self) -> Teacher:
        """Who is asked."""
        return self.config.teacher

    def requests(self, row: Row) -> list[Request]:
        """What has to be asked about a row; nothing where that is settled."""
        raise NotImplementedError

    def absorb(self, row: Row, answers: list[Answer]) -> Row:
        """The row with what was asked for and answered."""
        raise NotImplementedError

    def finish(self, row: Row, results: list[Result]) -> Row:
        """The row after this stage: with the answers, or dropped where a request has none."""
        answers = []
        for result in results:
            if isinstance(result, Unanswered):
                return row.drop("unanswered", result.why)
            if result.error:
                return row.drop("rejected", result.error)
            answers.append(result)
        return self.absorb(row, answers)

    def _picture(self, path: str) -> tuple[bytes, ...]:
        return ((self.release / path).read_bytes(),) if path else ()


class Assess(Stage):
    """Simple (z = 0) or complex (z = 1): the teacher's word, unless the policy settles it for the whole data set."""

    def requests(self, row: Row) -> list[Request]:
        """One request; for a query that the policy decides only where it is audited."""
        if row.dataset in self.config.policy and not chosen(row.qid, "audit", self.config.audit):
            return []
        prompt = self.prompts.assess(row.task)
        text = prompt.fill(instruction=row.instruction or _NONE, query=row.text or _NONE)
        return [Request("assess", prompt.system, text, self._picture(row.image), ASSESSMENT, row.qid)]

    def finish(self, row: Row, results: list[Result]) -> Row:
        """As every stage; but a query that the policy decides goes on without its audit."""
        finished = super().finish(row, results)
        return self.absorb(row, []) if finished.dropped and row.dataset in self.config.policy else finished

    def absorb(self, row: Row, answers: list[Answer]) -> Row:
        """Sets `complex`, and `assessed` where the teacher was asked."""
        policy = self.config.policy.get(row.dataset)
        if answers:
            found = read_json(answers[0].text) or {}
            opinion = found.get("complex")
            row = dataclasses.replace(
                row,
                assessed=opinion if isinstance(opinion, bool) else None,
                assessment=str(found.get("reason") or ""),
                prompts=row.prompts | {"assess": self.prompts.assess(row.task).hash},
            )
        if policy is not None:
            return dataclasses.replace(row, complex=policy == "complex")
        if row.assessed is None:
            return row.drop("assessment", answers[0].text[:200] if answers else "")
        return dataclasses.replace(row, complex=row.assessed)


class Generate(Stage):
    """The trace of a complex query, with the target shown or hidden."""

    def requests(self, row: Row) -> list[Request]:
        """One request for a complex query."""
        if not row.complex:
            return []
        gold = self._gold(row)
        prompt = self.prompts.generate(row.task, gold)
        text = prompt.fill(
            instruction=row.instruction or _NONE,
            query=row.text or _NONE,
            target=row.target_text or row.target_caption or "the last picture",
        )
        images = self._picture(row.image) + (self._picture(row.target_image) if gold else ())
        return [Request("generate", prompt.system, text, images, None, row.qid, row.target if gold else "")]

    def _gold(self, row: Row) -> bool:
        share = self.config.show_gold_of.get(row.dataset, self.config.show_gold)
        return chosen(row.qid, "gold", share)

    def absorb(self, row: Row, answers: list[Answer]) -> Row:
        """Keeps what was written, as it was written; the filters take it apart."""
        if not answers:
            return row
        gold = self._gold(row)
        return dataclasses.replace(
            row,
            raw=answers[0].text,
            gold=gold,
            teacher=self.config.teacher.model or self.config.teacher.kind,
            prompts=row.prompts | {"generate": self.prompts.generate(row.task, gold).hash},
        )


class Verify(Stage):
    """Is the answer consistent with the target? Controls are also asked about a target that is not theirs."""

    def model(self) -> Teacher:
        """The verifier, which may be another model."""
        return self.config.verifier

    def requests(self, row: Row) -> list[Request]:
        """One request for a row with a trace, two for a control."""
        if not row.complex:
            return []
        asked = [self._ask(row, row.target, row.target_text or row.target_caption, row.target_image)]
        if row.decoy:
            asked.append(self._ask(row, row.decoy, row.decoy_text, row.decoy_image))
        return asked

    def _ask(self, row: Row, did: str, text: str, image: str) -> Request:
        prompt = self.prompts.verify("image" if image else "text")
        words = prompt.fill(
            instruction=row.instruction or _NONE, query=row.text or _NONE, target=text or _NONE, answer=row.answer
        )
        images = self._picture(row.image) + self._picture(image)
        return Request("verify", prompt.system, words, images, VERDICT, row.qid, did, (row.reasoning, row.answer))

    def absorb(self, row: Row, answers: list[Answer]) -> Row:
        """Keeps the row when the verifier finds it consistent and is more than `min_confidence` sure."""
        if not answers:
            return row
        consistent, confidence, reason = _verdict(answers[0].text)
        decoy_consistent, decoy_confidence, _ = _verdict(answers[1].text) if len(answers) > 1 else (None, None, "")
        prompt = self.prompts.verify("image" if row.target_image else "text")
        row = dataclasses.replace(
            row,
            consistent=consistent,
            confidence=confidence,
            verdict=reason,
            decoy_consistent=decoy_consistent,
            decoy_confidence=decoy_confidence,
            verifier=self.config.verifier.model or self.config.verifier.kind,
            prompts=row.prompts | {"verify": prompt.hash},
        )
        if consistent is None or confidence is None:
            return row.drop("verdict", answers[0].text[:200])
        if not consistent:
            return row.drop("inconsistent", reason)
        if confidence <= self.config.verify.min_confidence:
            return row.drop("confidence", f"{confidence:g}")
        return row


def _verdict(text: str) -> tuple[bool | None, float | None, str]:
    """(decision, confidence from 0 to 1, reason); None for what cannot be read."""
    found = read_json(text) or {}
    decision, confidence = found.get("consistent"), found.get("confidence")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        confidence = None
    return decision if isinstance(decision, bool) else None, confidence, str(found.get("reason") or "")


STAGES: dict[str, type[Stage]] = {"assess": Assess, "generate": Generate, "verify": Verify}


def make_stage(name: str, config: CotConfig, release: Path) -> Stage:
    """The stage of a build. Raises ValueError for prompts that there are not."""
    return STAGES[name](config, Prompts(config.prompts), release)
