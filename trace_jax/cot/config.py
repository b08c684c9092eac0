"""Options of a CoT build: frozen dataclasses; one file per build in configs/cot/."""

import dataclasses
import re
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that answers requests, and how hard it may be asked. Keys come from the environment alone."""

    kind: Literal["openai", "metadata"] = "openai"  # metadata: the traces of the source release itself
    model: str = ""
    base_url: str = "http://localhost:8000/v1"  # of an OpenAI-compatible server; /chat/completions is appended
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key, if one is needed
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 512
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # newer hosted models want the latter
    structured: Literal["json_schema", "json_object", "off"] = "json_schema"  # of verdicts; what the server offers
    concurrency: int = 32  # requests in flight
    requests_per_minute: float = 0.0  # 0: no limit
    timeout: float = 120.0  # seconds of one attempt
    attempts: int = 6  # of one request, the first included
    backoff: float = 1.0  # seconds before the second attempt; doubles, with jitter
    max_backoff: float = 60.0
    max_retry_after: float = 900.0  # seconds that a server may ask to wait (Retry-After); of a longer time, so much
    give_up_after: int = 50  # requests in a row without an answer, or rejected: server or options are taken for wrong
    input_price: float = 0.0  # dollars per million tokens
    output_price: float = 0.0


@dataclasses.dataclass(frozen=True)
class Budget:
    """What all the requests of an output folder may cost together; 0 is no cap."""

    tokens: int = 0  # read and written
    dollars: float = 0.0


@dataclasses.dataclass(frozen=True)
class Filters:
    """Thresholds of the rules (paper, supplement 9). Lengths are tokens of the teacher's tokenizer, both ends kept."""

    tokenizer: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # a folder with tokenizer.json, or a name on the Hub
    reasoning_tokens: tuple[int, int] = (16, 256)
    answer_tokens: tuple[int, int] = (2, 64)
    ngram: int = 3  # words
    max_repeated: float = 0.3  # share of n-grams that occurred before in the same text
    min_english: float = 0.01  # probability that the text is English; short texts of foreign names come down to 0.05
    leaked_words: int = 8  # a run of so many words of the prompt
    leaks: tuple[str, ...] = (  # regular expressions; case does not matter
        r"ground[- ]truth",
        r"gold(en)? (target|answer)",
        r"\b(given|provided|expected|correct|target) (answer|target)\b",
        r"target (image|picture|text|item|candidate) (is|shows|says|reads|provided|given)",
        r"<\|",
    )
    refusals: tuple[str, ...] = (
        r"\b(I'm|I am) (sorry|unable|not able)\b",
        r"\bI (can't|cannot|can not|won't) (assist|help|provide|answer|see|view|identify|determine|comply|fulfil)",
        r"\bas an? (AI|((large |AI )?language model)|((helpful|virtual|AI) assistant))\b",
        r"(^|>)\s*(sure|certainly|of course)[,!]",
        r"\bhere('s| is) (the|your|my) (answer|reasoning|response)",
        r"\b(feel free to|let me know|hope this helps)\b",
        r"no image (was|is|has been) (provided|attached|given)",
    )
    duplicate_similarity: float = 0.8  # Jaccard, of character 5-grams of the queries, where picture and answer agree
    permutations: int = 128  # of MinHash

    def __post_init__(self) -> None:
        for pattern in (*self.leaks, *self.refusals):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class Verify:
    """What the verifier's verdict must be."""

    min_confidence: float = 0.7  # kept above it
    controls: float = 0.02  # share of rows that are also shown with another query's target, to calibrate


@dataclasses.dataclass(frozen=True)
class CotConfig:
    """One build."""

    name: str
    prompts: str = "v1"  # trace_jax/cot/prompts/<prompts>.toml
    teacher: Teacher = Teacher()
    verifier: Teacher = Teacher()
    budget: Budget = Budget()
    policy: dict[str, str] = dataclasses.field(default_factory=dict)  # data set -> simple | complex; else the teacher's
    audit: float = 1.0  # share of the queries that the policy decides which the teacher assesses all the same
    show_gold: float = 0.5  # share of the queries whose teacher is shown the target
    show_gold_of: dict[str, float] = dataclasses.field(default_factory=dict)  # the same for single data sets
    filters: Filters = Filters()
    verify: Verify = Verify()
    unanswered: Literal["stop", "drop"] = "stop"  # a row whose request no attempt got answered
    part_rows: int = 5000  # rows of a part: what one worker does at a time
    limit: int = 0  # queries of each file, for a trial; 0 takes all
    records: bool = True  # write ArrayRecord too: queries with their traces, and the candidates

    def __post_init__(self) -> None:
        for dataset, stream in self.policy.items():
            if stream not in ("simple", "complex"):
                raise ValueError(f"policy of {dataset!r} is {stream!r}: choose simple or complex")
        for share in (self.audit, self.show_gold, self.verify.controls, *self.show_gold_of.values()):
            if not 0 <= share <= 1:
                raise ValueError(f"a share is {share}: choose from 0 to 1")
        models = (("teacher", self.teacher), ("verifier", self.verifier))
        counts = {"part_rows": self.part_rows, "filters.permutations": self.filters.permutations}
        counts |= {
            f"{name}.{field}": getattr(model, field)
            for name, model in models
            for field in ("concurrency", "attempts", "timeout", "max_tokens", "give_up_after")
        }
        for name, count in counts.items():
            if count <= 0:
                raise ValueError(f"{name} is {count}: choose more than 0")
        for name, model in models:
            free = model.kind == "openai" and not (model.input_price or model.output_price)
            if self.budget.dollars and free:
                raise ValueError(
                    f"a budget in dollars needs prices: set --{name}.input-price and --{name}.output-price"
                )
