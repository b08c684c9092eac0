"""A suite of ablations: its configurations, its verdicts, its page; and, slowly, a run of it that goes on."""

import dataclasses
import re

import pytest

from launch import ablate
from tests.programs import flags
from trace_jax.config import Config
from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.ablation import CLAIMS, Suite, config_of, describe, finished, load_suite, modes_of, verdict
from trace_jax.retrieval.evaluation import config_hash, metrics_path


def test_every_variant_of_the_emoji_suite_is_a_configuration_of_its_own():
    suite = load_suite("emoji", [])
    found = {variant: config_of(suite, variant, 1) for variant in suite.variants}
    assert len({config_hash(config) for config in found.values()}) == len(found)
    assert {config.training.seed for config in found.values()} == {1}
    assert {config.name for config in found.values()} == {suite.base}
    assert next(iter(suite.variants)) == "trace"  # others read what it wrote
    assert found["no_trace"].evaluation.reasoner == found["trace"].workdir == "runs/ablations/emoji/trace_1"
    assert modes_of("no_trace") == ["adaptive", "external"] and modes_of("detached") == ["adaptive"]
    assert modes_of("trace") == ["adaptive", "always", "direct"]
    for claim in CLAIMS:
        assert {claim.better.variant, claim.worse.variant} <= set(suite.variants)
    assert load_suite("emoji", ["--seeds", "5"]).seeds == (5,)
    quick = load_suite("emoji_quick", [])
    assert quick.variants == suite.variants and quick.page != suite.page
    assert config_of(quick, "trace", 0).training.steps < found["trace"].training.steps
    with pytest.raises(SystemExit, match="Did you mean 'emoji'"):
        load_suite("emojy", [])


@pytest.mark.parametrize(
    ("differences", "margin", "said"),
    [
        ([1.0, 0.2, 3.0], 0.0, "holds"),
        ([-1.0, -0.1], 0.0, "does not hold"),
        ([-1.0, 1.0], 0.0, "cannot be told"),
        ([-0.5, 1.0], -1.0, "holds"),
    ],
)
def test_a_claim_holds_when_every_seed_says_so(differences, margin, said):
    assert verdict(differences, margin) == said


def made_up(level: float) -> dict:
    modes = {
        mode: {"local": {"R@5": level + shift}, "local_complex": {"R@5": level + 2 * shift}, "queries_per_second": rate}
        for mode, shift, rate in (("adaptive", 2, 8.0), ("direct", 0, 16.0), ("always", -3, 4.0), ("external", 0, 16.0))
    }
    simple = {"complex_queries": 0, "modes": {mode: row | {"local_complex": {}} for mode, row in modes.items()}}
    routing = {"complex_reasoned": 90.0, "simple_direct": 80.0}
    tasks = {"it2i": {"complex_queries": 9, "modes": modes}, "t2i": simple}
    unseen = {"emojinoto": {"t2i": simple}, "emojiedits": {"it2i": tasks["it2i"]}}
    return {"mode": "adaptive", "release": "made up", "tasks": tasks, "unseen": unseen, "routing": routing}


def test_the_page_compares_seed_by_seed():
    suite = Suite("x", seeds=(0, 1), variants={"trace": (), "no_trace": ("--data.trace", "none")})
    page = describe(suite, {"trace": [made_up(50), made_up(60)], "no_trace": [made_up(40), made_up(61)]}, 1.5)
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| ")]
    lifted = next(row for row in rows if row[1].startswith("Reasoning lifts"))
    assert lifted[3:6] == ["59.0 ± 7.1", "55.0 ± 7.1", "holds"]  # complex: 54 and 64 against 50 and 60
    assert next(row for row in rows if row[1].startswith("Training with traces"))[5] == "cannot be told"
    assert next(row for row in rows if row[1].startswith("Reasoning about every"))[5] == "holds"
    assert next(row for row in rows if row[1].startswith("Routing is"))[3:6] == ["90.0 ± 0.0", "20.0 ± 0.0", "holds"]
    drawn = next(row for row in rows if "a style of drawing" in row[1])
    assert drawn[3:6] == ["57.0 ± 7.1", "52.5 ± 14.8", "cannot be told"]
    assert "| always | 49.0 ± 7.1 | 52.0 ± 7.1 | 4.0 ± 0.0 |" in page  # complex, simple, queries per second
    assert "1.5 hours" in page and "`--data.trace none`" in page
    assert "--only" not in page


def test_the_page_says_what_was_not_run():
    suite = Suite("x", seeds=(0,), variants={"trace": (), "no_trace": (), "lora_small": ()})
    page = describe(suite, {"trace": [made_up(50)], "no_trace": [made_up(40)]}, 1.5)
    assert "`python launch/ablate.py x --only trace no_trace` (not run: lora_small): 2 variants" in page


def test_the_bars_of_a_token_end_no_column():
    suite = Suite("x", seeds=(0,), variants={"trace": (), "emb_token": ()})
    page = describe(suite, {"trace": [made_up(50)], "emb_token": [made_up(40)]}, 1.5)
    (row,) = (line for line in page.splitlines() if line.startswith("| Reading right before"))
    assert len(re.split(r"(?<!\\)\|", row)) == 7  # five columns between bars


@pytest.mark.parametrize("labelled", [True, False])
def test_a_claim_about_queries_that_there_are_none_of_cannot_be_told(labelled):
    def without(level: float) -> dict:
        """Figures of simple tasks alone, or of a release that does not say which are; without unseen sets."""
        metrics = made_up(level)
        simple = metrics["tasks"]["t2i"] | {"complex_queries": 0 if labelled else None}
        routing = {"complex_reasoned": None, "simple_direct": 80.0 if labelled else None}
        return metrics | {"tasks": {"t2i": simple}, "unseen": {}, "routing": routing}

    suite = Suite("x", seeds=(0, 1), variants={"trace": (), "no_trace": ()})
    page = describe(suite, {"trace": [without(50), without(60)], "no_trace": [without(40), without(61)]}, 1.5)
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    untold = "| – | – | cannot be told: no such queries |"
    told = "| 57.0 ± 7.1 | 52.0 ± 7.1 | holds |"
    assert next(line for name, line in rows.items() if name.startswith("Reasoning lifts")).endswith(untold)
    assert next(line for name, line in rows.items() if "a style of drawing" in name).endswith(untold)
    hurts = next(line for name, line in rows.items() if name.startswith("Reasoning about every"))
    assert hurts.endswith(told if labelled else untold)
    routed = next(line for name, line in rows.items() if name.startswith("Routing is"))
    assert routed.endswith("| – | 20.0 ± 0.0 | cannot be told: no such queries |" if labelled else untold)
    assert rows["direct"] == f"| direct | – | {'55.0 ± 7.1' if labelled else '–'} | 16.0 ± 0.0 |"
    assert ("80.0 ± 0.0" in rows["no_trace"]) is labelled and "57.0 ± 7.1" in rows["trace"]


def test_a_suite_goes_on_after_what_is_done(tiny_config: Config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "keep_compiled", lambda folder: None)
    suite = Suite("tiny", options=tuple(flags(tiny_config)), seeds=(0, 1), variants={"trace": (), "no_trace": ()})
    measured = []

    def measure(config: Config, modes: list[str]) -> None:
        measured.append(config.workdir)
        if len(measured) == 2:
            raise FloatingPointError("the loss is no number")
        artifacts.write_json(metrics_path(config), made_up(50) | {"config_hash": config_hash(config)})

    monkeypatch.setattr(ablate, "measure", measure)
    with pytest.raises(FloatingPointError):
        ablate.run(suite)
    assert finished(config_of(suite, "trace", 0)) and not finished(config_of(suite, "trace", 1))
    assert "no_trace" in ablate.run(suite)
    names = ["trace_0", "trace_1", "trace_1", "no_trace_0", "no_trace_1"]
    assert measured == [f"runs/ablations/tiny/{name}" for name in names]
    some = dataclasses.replace(suite, only=("trace",))
    assert "| no_trace |" not in ablate.run(some) and len(measured) == len(names)
    with pytest.raises(ValueError, match="no variant tracy; there are trace, no_trace"):
        ablate.run(dataclasses.replace(suite, only=("tracy",)))
    changed = dataclasses.replace(suite, options=(*suite.options, "--training.steps", "9"))
    assert finished(config_of(changed, "trace", 0)) is None


@pytest.mark.slow
def test_a_suite_is_trained_and_measured(tiny_config: Config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "keep_compiled", lambda folder: None)
    options = flags(dataclasses.replace(tiny_config, workdir=""))
    suite = Suite(
        "tiny",
        options=tuple(options),
        seeds=(0,),
        variants={
            "trace": (),
            "no_trace": ("--data.trace", "none", "--evaluation.reasoner", "{trace}"),
            "emb_token": ("--data.position", "token"),
            "candidate_full": ("--data.candidate-trace", "both"),
        },
    )
    page = ablate.run(suite)
    assert "Training with traces beats training without" in page and "One model beats two" in page
    before = finished(config_of(suite, "trace", 0))
    assert ablate.run(suite) == page and finished(config_of(suite, "trace", 0)) == before
