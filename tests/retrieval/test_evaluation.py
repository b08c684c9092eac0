import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath

from trace_jax.config import Config
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.schema import TASKS
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.artifacts import MissingStageError
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.evaluation import (
    Scope,
    evaluate,
    is_right,
    load_results,
    queries_key,
    results_key,
    run_file,
)
from trace_jax.retrieval.index import exact_search
from trace_jax.retrieval.pools import CandidateVectors


@pytest.mark.parametrize(
    ("trace", "answer", "right"),
    [
        ("A brown square. The colour becomes red, the rest stays. a red square.", "a red square.", True),
        ("A brown square. The colour becomes red, the rest stays.  A red  square", "a red square.", True),
        ("a red square.", "a red square.", True),
        ("A brown square. a blue square.", "a red square.", False),
        ("A brown square. not a red square.", "a red square.", False),
        ("A red square. a blue square.", "a red square.", False),
        ("This is a flag. Castries is the capital of St. Lucia.", "Castries is the capital of St. Lucia.", True),
        ("", "a red square.", False),
        ("a red square.", "", False),
    ],
)
def test_a_trace_is_right_when_it_ends_with_the_answer(trace, answer, right):
    assert is_right(trace, answer) is right


# ---- the release ---------------------------------------------------------------------------------------------------


def test_candidates_are_numbered_once_in_the_order_of_their_dids(benchmark_):
    ids = benchmark_.candidates.ids
    assert (np.diff(ids) > 0).all()
    for pool in benchmark_.searched_pools:
        source = benchmark_.source(pool)
        rows = benchmark_.candidates.rows(np.array([layout.hash_did(did) for did in source.keys]))
        for at in (0, len(source) - 1):
            document = benchmark_.candidates.document(int(rows[at]))
            assert (document.text, document.image or b"") == (source[at]["txt"], source[at]["image"])
            assert layout.did_of(int(ids[rows[at]])) == source[at]["did"]


def test_the_global_pool_is_the_union_of_the_local_ones(benchmark_):
    tests = [query_set for query_set in benchmark_.query_sets if query_set.split == "test"]
    union = set().union(*(benchmark_.ids(query_set.pool).tolist() for query_set in tests))
    assert set(benchmark_.ids("global_test").tolist()) == union
    with pytest.raises(ValueError, match="Did you mean .*global_test"):
        benchmark_.ids("global_tset")


def test_every_query_gets_the_first_instruction_of_its_task(benchmark_):
    prompts = layout.load_instructions(benchmark_.folder / "release")
    for query_set in benchmark_.query_sets:
        labelled = benchmark_.load(query_set)
        assert {query.instruction for query in labelled.queries} <= {choices[0] for choices in prompts.values()}
        assert len({query.instruction for query in labelled.queries}) == 1
        assert len(labelled.qids) == benchmark_.count(query_set)


def test_a_release_whose_training_queries_are_in_the_union_alone_trains_all_its_data_sets(tiny_config, tmp_path):
    release = tmp_path / "mine/release"
    for name in ("query/test/mbeir_mine_task7_test", "cand_pool/local/mbeir_mine_task7_cand_pool"):
        (release / name).parent.mkdir(parents=True)
        (release / f"{name}.jsonl").touch()
    config = dataclasses.replace(
        tiny_config, data=dataclasses.replace(tiny_config.data, root=str(tmp_path), release="mine")
    )
    assert [query_set.trained for query_set in Benchmark(config).query_sets] == [False]
    with pytest.raises(ValueError, match="mine has no query files of val"):
        Benchmark(config).choose(splits=("val",))
    (release / "query/union_train").mkdir()
    (release / "query/union_train/mbeir_union_up_train.jsonl").touch()
    assert [query_set.trained for query_set in Benchmark(config).query_sets] == [True]
    (release / "query/train").mkdir()
    (release / "query/train/mbeir_other_train.jsonl").touch()
    assert [query_set.trained for query_set in Benchmark(config).query_sets] == [False]


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_an_encoder_is_given_the_traces_of_another_run(evaluated, benchmark_, retriever, tmp_path):
    written, _ = evaluated
    shutil.copytree(written.run_dir, tmp_path / "run")
    reads = dataclasses.replace(written.evaluation, reasoner=written.run_dir)
    config = dataclasses.replace(written, workdir=str(tmp_path / "run"), evaluation=reads)
    scope = Scope(("it2i",), ("test",), ("local",))
    metrics, encoded = evaluate(config, retriever, benchmark_, ("external",), scope)
    chosen = benchmark_.choose(scope.tasks, scope.splits)
    assert encoded == sum(map(benchmark_.count, chosen))  # all else was there
    query_set, key = chosen[0], queries_key(written, retriever, benchmark_)
    labelled, traces = benchmark_.load(query_set), load_results(written, query_set, "adaptive", key).traces
    kept = load_results(
        config, query_set, "external", results_key(config, retriever, benchmark_, query_set, "external")
    )
    assert kept.traces == traces and kept.reasoned.tolist() == [bool(trace) for trace in traces]
    texts = [f"{query.text} {trace}".strip() for query, trace in zip(labelled.queries, traces, strict=True)]
    asked = [dataclasses.replace(query, text=text) for query, text in zip(labelled.queries, texts, strict=True)]
    np.testing.assert_allclose(kept.embeddings, retriever.encode_query(asked, "direct").embeddings, atol=2e-5)
    assert "external" in metrics["tasks"]["it2i"]["modes"]
    lost = dataclasses.replace(config, evaluation=dataclasses.replace(reads, reasoner=str(tmp_path / "none")))
    with pytest.raises(MissingStageError, match=r"run launch/evaluate\.py on it"):
        evaluate(lost, retriever, benchmark_, ("external",), scope)


def test_some_queries_can_be_asked_alone(tiny_config, benchmark_, retriever):
    few = dataclasses.replace(tiny_config, evaluation=dataclasses.replace(tiny_config.evaluation, queries=3))
    some = Benchmark(few)
    query_set = some.choose(("it2i",), ("test",))[0]
    whole, part = benchmark_.load(query_set).qids, some.load(query_set).qids
    assert some.count(query_set) == 3 and part == [whole[i * len(whole) // 3] for i in range(3)]
    assert queries_key(few, retriever, some) != queries_key(tiny_config, retriever, benchmark_)
    assert len(some.candidates) == len(benchmark_.candidates)


def test_metrics_hold_what_is_promised(evaluated):
    config, metrics = evaluated
    assert json.loads((epath.Path(config.run_dir) / "metrics.json").read_text()) == metrics
    assert set(metrics["tasks"]) <= set(TASKS.values())
    for entry in metrics["tasks"].values():
        for scope in ("local", "global"):
            values = [entry[scope][f"R@{k}"] for k in (1, 5, 10)]
            assert values == sorted(values)
        assert 0 <= entry["reasoned_fraction"] <= 1
        assert entry["modes"]["direct"]["reasoned_fraction"] == 0
        assert entry["modes"]["adaptive"]["queries_per_second"] > 0
        assert entry["local"]["R@10"] >= entry["global"]["R@10"]
        kinds = entry["kinds"].values()
        assert sum(kind["queries"] for kind in kinds) == entry["queries"]
        assert sum(kind["queries"] * kind["R@5"] for kind in kinds) / entry["queries"] == pytest.approx(
            entry["local"]["R@5"], abs=0.02
        )
    mean = np.mean([entry["local"]["R@5"] for entry in metrics["tasks"].values()])
    assert metrics["average"] == pytest.approx(mean, abs=0.01)
    assert metrics["validation"]
    assert all(index["recall_against_exact"] == 1 for index in metrics["indexes"].values())


def test_routing_is_counted_over_all_test_queries_trained_for(evaluated, benchmark_, retriever):
    config, metrics = evaluated
    reasoned, is_complex, is_simple = [], [], []
    for query_set in benchmark_.choose(splits=("test",)):
        labelled = benchmark_.load(query_set)
        assert (labelled.simple == ~labelled.complex).all()  # each has a line in cot/
        if query_set.trained:
            results = load_results(config, query_set, "adaptive", queries_key(config, retriever, benchmark_))
            reasoned += results.reasoned.tolist()
            is_complex += labelled.complex.tolist()
            is_simple += labelled.simple.tolist()
    direct = ~np.array(reasoned)[np.array(is_simple)]
    assert metrics["routing"]["simple_direct"] == pytest.approx(100 * direct.mean(), abs=0.01)
    thinks = np.array(reasoned)[np.array(is_complex)]
    assert metrics["routing"]["complex_reasoned"] == pytest.approx(100 * thinks.mean(), abs=0.01)
    assert sum(entry["simple_queries"] for entry in metrics["tasks"].values()) == sum(is_simple)


def test_recall_agrees_with_an_independent_count(evaluated, benchmark_, retriever):
    config, metrics = evaluated
    query_set = next(q for q in benchmark_.query_sets if q.split == "test" and q.trained)
    results = load_results(config, query_set, "adaptive", queries_key(config, retriever, benchmark_))
    store, ids = CandidateVectors(config, benchmark_), benchmark_.ids(query_set.pool)
    rows, _ = exact_search(results.embeddings, store.read(store.candidates.rows(ids)), 10)
    labelled = benchmark_.load(query_set)
    hits = [bool(set(ids[row[:5]].tolist()) & right) for row, right in zip(rows, labelled.positives, strict=True)]
    assert metrics["tasks"][query_set.task]["local"]["R@5"] == pytest.approx(100 * np.mean(hits), abs=0.01)
    lines = run_file(config, query_set, "adaptive", "local").read_text().splitlines()
    qid, q0, did, rank, _, run_id = lines[0].split()
    assert (qid, q0, rank, run_id) == (labelled.qids[0], "Q0", "1", "adaptive")
    assert did == layout.did_of(int(ids[rows[0, 0]]))
    assert len(lines) == 10 * len(labelled.qids)


def test_evaluating_again_encodes_nothing_and_changes_nothing(evaluated, benchmark_, retriever):
    config, metrics = evaluated
    again, encoded = evaluate(config, retriever, benchmark_, ("direct",))
    assert encoded == 0
    assert again == metrics


def test_a_damaged_result_is_encoded_again(evaluated, benchmark_, retriever):
    config, metrics = evaluated
    query_set = benchmark_.query_sets[0]
    path = epath.Path(config.run_dir) / "queries" / config.data.release / "direct" / f"{query_set.stem}.npz"
    path.write_bytes(path.read_bytes()[:100])
    again, encoded = evaluate(config, retriever, benchmark_, ("direct",))
    assert encoded == benchmark_.count(query_set)
    assert {task: entry["local"] for task, entry in again["tasks"].items()} == {
        task: entry["local"] for task, entry in metrics["tasks"].items()
    }


def test_indexes_of_another_checkpoint_are_refused(evaluated, benchmark_, retriever, retrained):
    config, _ = evaluated
    assert queries_key(config, retrained, benchmark_) != queries_key(config, retriever, benchmark_)
    with pytest.raises(MissingStageError, match="another checkpoint"):
        evaluate(config, retrained, benchmark_)


def test_exact_search_needs_no_index(evaluated, benchmark_, retriever, tmp_path):
    config, metrics = evaluated
    shutil.copytree(config.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("indexes"))
    options = dataclasses.replace(config.evaluation, search="exact")
    exact = dataclasses.replace(config, workdir=str(tmp_path / "run"), evaluation=options)
    found, encoded = evaluate(exact, retriever, benchmark_, ("direct",))
    assert encoded == 0
    for scope in ("local", "global", "ranking"):
        assert all(entry[scope] == metrics["files"][stem][scope] for stem, entry in found["files"].items()), scope
    assert {index["kind"] for index in found["indexes"].values()} == {"none"}
    with pytest.raises(MissingStageError, match="no index"):
        evaluate(dataclasses.replace(config, workdir=exact.workdir), retriever, benchmark_)


def built_anew(config, folder, name: str, change) -> Config:
    """A release of which one file was changed by `change`, and its records."""
    shutil.copytree(epath.Path(config.data.root) / "tiny" / "release", folder / "tiny" / "release")
    path = folder / "tiny" / "release" / name
    path.write_text(change(path.read_text()))
    mbeir.build(folder / "tiny" / "release", folder / "tiny")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(folder)))


def test_another_release_of_the_same_ids_is_embedded_anew(evaluated, benchmark_, retriever, tmp_path):
    config, _ = evaluated
    pool = next(name for name in benchmark_.searched_pools if benchmark_.source(name)[0]["txt"])
    text = benchmark_.source(pool)[0]["txt"]

    def reworded(lines: str) -> str:
        assert json.dumps(text) in lines
        return lines.replace(json.dumps(text), json.dumps(text[::-1]), 1)

    other = built_anew(config, tmp_path, f"cand_pool/local/{pool}.jsonl", reworded)
    changed = Benchmark(other)
    np.testing.assert_array_equal(changed.candidates.ids, benchmark_.candidates.ids)
    with pytest.raises(MissingStageError, match="the release was another one"):
        CandidateVectors(other, changed)
    old, new = (CandidateVectors(config, each, retriever.whole_key) for each in (benchmark_, changed))
    assert old.folder != new.folder and old.is_whole(0) and not new.is_whole(0)
    assert queries_key(other, retriever, changed) != queries_key(config, retriever, benchmark_)


def test_other_instructions_ask_anew(evaluated, benchmark_, retriever, tmp_path):
    config, _ = evaluated
    name = "instructions/query_instructions.tsv"
    other = built_anew(config, tmp_path, name, lambda lines: lines.replace("Find", "Show", 1))
    changed = Benchmark(other)
    assert queries_key(other, retriever, changed) != queries_key(config, retriever, benchmark_)
    assert CandidateVectors(other, changed).is_whole(0)  # no candidate is asked with them


# ---- artifacts -----------------------------------------------------------------------------------------------------


def test_a_stage_records_its_seconds_only_when_it_worked(tmp_path):
    seconds = epath.Path(tmp_path) / "seconds.json"
    with artifacts.stage(str(tmp_path), "embed"):
        pass
    assert set(artifacts.read_json(seconds)) == {"embed"}
    artifacts.write_json(seconds, {"embed": 99.0})
    with artifacts.stage(str(tmp_path), "embed") as stage:
        stage.worked = False
    assert artifacts.read_json(seconds) == {"embed": 99.0}
    with pytest.raises(RuntimeError), artifacts.stage(str(tmp_path), "index"):
        raise RuntimeError
    assert artifacts.read_json(seconds) == {"embed": 99.0}


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "file"
    artifacts.write_bytes(path, b"old")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        artifacts.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


def test_configs_of_other_limits_have_other_keys(retriever, benchmark_):
    config = dataclasses.replace(
        retriever.config, evaluation=dataclasses.replace(retriever.config.evaluation, max_trace_tokens=1)
    )
    assert queries_key(config, retriever, benchmark_) != queries_key(retriever.config, retriever, benchmark_)
