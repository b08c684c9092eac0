"""M-BEIR's exact layout, in miniature, all the way: check, build, train, embed, index, evaluate, the paper's table."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import pytrec_eval
from etils import epath

from launch import prepare_data
from tests.data.mbeir_release import write_release
from tests.data.test_unseen import circo, genecis, vist
from tests.test_end_to_end import figures
from trace_jax import sharding
from trace_jax.config import Config, Mesh
from trace_jax.data.builders import layout
from trace_jax.data.builders.check import PUBLISHED
from trace_jax.data.tokenizer import Processor
from trace_jax.retrieval import artifacts, evaluation
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.evaluation import (
    Scope,
    evaluate,
    leave_out,
    load_results,
    metrics_path,
    queries_key,
    run_file,
)
from trace_jax.retrieval.index import build_indexes
from trace_jax.retrieval.measures import recalls
from trace_jax.retrieval.pools import CandidateVectors, embed_candidates
from trace_jax.retrieval.program import arguments
from trace_jax.retrieval.report import write_report
from trace_jax.retrieval.summary import describe
from trace_jax.training.train import model_identity, restore_model, train

TESTS = Scope(splits=("test",))


@pytest.fixture(scope="module")
def prepared(tiny_config, tmp_path_factory) -> Config:
    """A configuration whose benchmark is a synthetic M-BEIR, checked and built."""
    root = tmp_path_factory.mktemp("mbeir")
    source = write_release(root / "M-BEIR", queries=2)
    prepare_data.main(prepare_data.Arguments("mbeir", str(source), data_dir=root / "data"))
    data = dataclasses.replace(tiny_config.data, root=str(root / "data"), release="mbeir")
    return dataclasses.replace(tiny_config, data=data, workdir=str(root / "run"))


@pytest.fixture(scope="module")
def embedded(prepared, retriever) -> tuple[Config, Benchmark]:
    benchmark = Benchmark(prepared)
    assert embed_candidates(prepared, retriever, benchmark) == len(benchmark.candidates)
    build_indexes(prepared, benchmark)
    return prepared, benchmark


def test_all_16_files_are_measured_in_both_pools(embedded, retriever):
    config, benchmark = embedded
    metrics, encoded = evaluate(config, retriever, benchmark, scope=TESTS)
    assert encoded == 2 * 16
    assert set(metrics["files"]) == {f"mbeir_{dataset}_task{task}_test" for dataset, task in PUBLISHED}
    assert not metrics["unseen"] and not metrics["validation"]
    for stem, entry in metrics["files"].items():
        assert entry["local_pool"] == 4 and entry["global_pool"] == 16 * 4
        fashion = "fashion" in stem
        for pool in ("local", "global"):
            assert ("R@50" in entry[pool]) == fashion
            assert entry[pool]["R@10"] >= entry[pool]["R@5"] >= entry[pool]["R@1"]
        assert entry["local"]["R@10"] == 100  # the pool is no larger
        if "oven" in stem:  # half of the right answers are in another pool
            assert entry["ranking"]["local"]["true R@10"] == 50
    assert len(metrics["config_hash"]) == 16 and metrics["seeds"] == {"training": config.training.seed}
    said = describe(metrics)
    assert metrics["caveat"] in said
    columns = [entry["local"]["R@10" if "fashion" in stem else "R@5"] for stem, entry in metrics["files"].items()]
    assert metrics["paper_average"] == pytest.approx(np.mean(columns), abs=0.01)
    assert f"R@10 for fashion: {metrics['paper_average']} local" in said
    query_set = benchmark.choose(["fashioniq"], ["test"])[0]
    path = run_file(config, query_set, "adaptive", "global")
    other = dataclasses.replace(config.evaluation, benchmark="another")  # with a file of the same name
    assert run_file(dataclasses.replace(config, evaluation=other), query_set, "adaptive", "global") != path
    lines = path.read_text().splitlines()
    assert {len(line.split()) for line in lines} == {6} and len(lines) == 2 * 50


def test_trec_eval_finds_the_same_in_the_run_files(embedded, retriever):
    config, benchmark = embedded
    metrics, _ = evaluate(config, retriever, benchmark, scope=TESTS)
    for query_set in benchmark.choose(splits=("test",)):
        path = benchmark.folder / f"release/qrels/test/{query_set.stem}_qrels.txt"
        qrels = pytrec_eval.parse_qrel(" ".join(line.split()[:4]) for line in path.read_text().splitlines())
        for pool in ("local", "global"):
            lines = run_file(config, query_set, "adaptive", pool).read_text().splitlines()
            run = pytrec_eval.parse_run(lines)
            assert sum(map(len, run.values())) == len(lines)  # no candidate twice
            theirs = pytrec_eval.RelevanceEvaluator(qrels, {"success.1,5,10", "recall.10"}).evaluate(run)
            entry = metrics["files"][query_set.stem]
            for k in (1, 5, 10):
                wanted = 100 * np.mean([each[f"success_{k}"] for each in theirs.values()])
                assert entry[pool][f"R@{k}"] == round(wanted, 2)
            wanted = 100 * np.mean([each["recall_10"] for each in theirs.values()])
            assert entry["ranking"][pool]["true R@10"] == round(wanted, 2)


def test_nothing_is_said_of_routing_where_no_query_is_called_simple_or_complex(embedded, retriever):
    config, benchmark = embedded
    metrics, _ = evaluate(config, retriever, benchmark, scope=TESTS)
    nothing = {"simple_direct": None, "complex_reasoned": None}
    assert metrics["routing"] == nothing
    for entry in metrics["files"].values():
        assert entry["routing"] == nothing and entry["traces"]["written"] is None
        assert entry["complex_queries"] is None and entry["simple_queries"] is None
    assert "None" not in describe(metrics) and "simple" not in describe(metrics)


def test_files_measured_later_join_those_that_are_there(embedded, retriever):
    config, benchmark = embedded
    whole, _ = evaluate(config, retriever, benchmark, scope=TESTS)
    again, _ = evaluate(config, retriever, benchmark, scope=Scope(("cirr",), ("test",), ("local",)))
    assert again == whole == json.loads(metrics_path(config).read_text())
    for stranger in ({"config_hash": "of another"}, {"records": "of others"}, {"qrels": ""}, {"checkpoint": {}}):
        artifacts.write_json(metrics_path(config), whole | stranger)
        alone, _ = evaluate(config, retriever, benchmark, scope=Scope(("cirr",), ("test",), ("local",)))
        assert set(alone["files"]) == {"mbeir_cirr_task7_test"} and alone["average_global"] is None
        assert alone["files"]["mbeir_cirr_task7_test"]["global"] == {} and alone["paper_average"] is None


def test_a_page_holds_the_papers_table(embedded, retriever):
    config, benchmark = embedded
    evaluate(config, retriever, benchmark, scope=TESTS)
    page = write_report(config, benchmark).read_text()
    assert page.count(">U-MARVEL-7B, best on average<") == 1 and page.count(">tiny</text>") == 2  # plots of both pools
    assert "U-MARVEL-7B" in page and "files as in the paper" in page and "simple queries" not in page
    tables = epath.Path(config.run_dir) / "tables"
    assert {path.name for path in tables.iterdir()} == {
        f"{stem}.{ending}" for stem in ("table1", "table1_global") for ending in ("txt", "csv", "tex")
    }
    assert tables.joinpath("table1.csv").read_text().splitlines()[-1].startswith("tiny,")


def test_a_part_of_it_can_be_measured_by_itself(embedded, retriever):
    config, benchmark = embedded
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, ks=(1, 5)))
    scope = Scope(("it2i", "oven_task6"), ("test",), ("local",))
    metrics, _ = evaluate(config, retriever, benchmark, scope=scope)
    assert {stem.removeprefix("mbeir_") for stem in metrics["files"]} == {
        "fashioniq_task7_test",
        "cirr_task7_test",
        "oven_task6_test",
    }
    assert all(entry["global"] == {} for entry in metrics["files"].values())
    assert metrics["average_global"] is None and describe(metrics)
    assert write_report(config, benchmark).exists()
    with pytest.raises(ValueError, match="did you mean cirr"):
        evaluate(config, retriever, benchmark, scope=Scope(("cir",)))


def test_all_four_prompts_give_a_spread(embedded, retriever):
    config, benchmark = embedded
    scope = Scope(("cirr",), ("test",), prompts="all")
    metrics, encoded = evaluate(config, retriever, benchmark, scope=scope)
    entry = metrics["files"]["mbeir_cirr_task7_test"]
    assert encoded in (6, 8)  # the first prompt may have been asked before
    for pool in ("local", "global"):
        five = entry["prompts"][pool]["R@5"]
        each = [five[f"prompt {i}"] for i in (1, 2, 3, 4)]
        assert each[0] == entry[pool]["R@5"]
        assert five["mean"] == pytest.approx(sum(each) / 4, abs=0.01)
    again, encoded = evaluate(config, retriever, benchmark, scope=scope)
    assert encoded == 0 and again == metrics
    query_set = benchmark.choose(["cirr"], ["test"])[0]
    asked = [benchmark.load(query_set, prompt).queries[0].instruction for prompt in range(4)]
    assert len(set(asked)) == 4
    with pytest.raises(ValueError, match=r"no instruction 5 for it2i of data set 8; add it"):
        benchmark.load(query_set, 4)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(embedded, retriever, tmp_path, monkeypatch):
    config, benchmark = embedded
    metrics_path(config).unlink(missing_ok=True)  # other tests measured more
    whole, _ = evaluate(config, retriever, benchmark, scope=TESTS)
    other = dataclasses.replace(config, workdir=str(tmp_path / "other"))
    embed_candidates(other, retriever, benchmark)
    build_indexes(other, benchmark)
    encode, done = evaluation.encode, []

    def stopping(*given, **options):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(given)
        return encode(*given, **options)

    monkeypatch.setattr(evaluation, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, retriever, benchmark, scope=TESTS)
    assert not metrics_path(other).exists()
    monkeypatch.setattr(evaluation, "encode", encode)
    resumed, encoded = evaluate(other, retriever, benchmark, scope=TESTS)
    assert encoded == 2 * (16 - 7)
    assert figures(resumed) == figures(whole)


def test_a_benchmark_other_than_the_runs_own_release_has_metrics_of_its_own(prepared):
    given = ["emoji_tiny", "--benchmark", "mbeir", "--pools", "local,global", "--tasks", "all", "--data.root"]
    config, options = arguments([*given, prepared.data.root], None)
    assert (options.tasks, options.pools) == (("all",), ("local", "global"))
    assert Benchmark(config).name == config.benchmark == "mbeir" and config.data.release == "emoji_small"
    assert metrics_path(config).name == "metrics_mbeir.json"
    with pytest.raises(SystemExit):
        arguments(["emoji_tiny", "--pools", "locale"], None)


def searched(prepared, retriever, folder, name: str, make) -> tuple[Config, Benchmark, dict]:
    """An unseen benchmark from its authors' files, prepared, embedded and measured."""
    make(folder / "source")
    prepare_data.main(prepare_data.Arguments(name, str(folder / "source"), data_dir=folder / "data"))
    data = dataclasses.replace(prepared.data, root=str(folder / "data"))
    options = dataclasses.replace(prepared.evaluation, benchmark=name)
    config = dataclasses.replace(prepared, data=data, evaluation=options, workdir=str(folder / "run"))
    benchmark = Benchmark(config)
    embed_candidates(config, retriever, benchmark)
    build_indexes(config, benchmark)
    return config, benchmark, evaluate(config, retriever, benchmark)[0]


def test_a_query_with_judged_wrong_answers_is_measured_among_those_alone(prepared, retriever, tmp_path, monkeypatch):
    config, benchmark, metrics = searched(prepared, retriever, tmp_path, "genecis", genecis)
    assert not metrics["tasks"] and set(metrics["unseen"]) == {query_set.dataset for query_set in benchmark.query_sets}
    for query_set in benchmark.query_sets:
        labelled, entry = benchmark.load(query_set), metrics["files"][query_set.stem]
        found: dict[str, list[int]] = {qid: [] for qid in labelled.qids}
        for line in run_file(config, query_set, "adaptive", "local").read_text().splitlines():
            qid, _, did, *_ = line.split()
            found[qid].append(layout.hash_did(did))
        firsts = [ids[0] in right for ids, right in zip(found.values(), labelled.positives, strict=True)]
        assert [set(ids) for ids in found.values()] == labelled.galleries
        assert entry["local"]["R@1"] == round(100 * sum(firsts) / len(firsts), 2) and entry["local"]["R@5"] == 100
    assert "VIST" in write_report(config, benchmark).read_text()
    assert metrics_path(config).name == "metrics_genecis.json"
    # A model whose embeddings are all alike has found nothing, though right answers have the first dids.
    searcher = evaluation.Searcher(config, benchmark, CandidateVectors(config, benchmark, retriever.whole_key))
    key = queries_key(config, retriever, benchmark)
    one = np.random.default_rng(0).normal(size=48).astype(np.float32)
    monkeypatch.setattr(CandidateVectors, "read", lambda _, rows: np.tile(one, (len(rows), 1)))
    for query_set in benchmark.query_sets:
        labelled, results = benchmark.load(query_set), load_results(config, query_set, "adaptive", key)
        assert results is not None
        collapsed = dataclasses.replace(results, embeddings=np.tile(one, (len(labelled.qids), 1)))
        found = searcher.search(query_set, "adaptive", "local", labelled, collapsed)
        assert recalls(found, labelled.positives, (1,)) == {"R@1": 0.0}


def test_a_server_that_keeps_the_answers_is_sent_a_file(prepared, retriever, tmp_path):
    config, benchmark, metrics = searched(prepared, retriever, tmp_path, "circo", circo)
    (submission,) = metrics["submissions"].values()
    sent = json.loads(epath.Path(submission).read_text())
    assert set(sent) == {"0", "1"} and all(sorted(pictures) == list(range(5)) for pictures in sent.values())
    query_set = benchmark.choose(("circo",), ("test",))[0]
    first = run_file(config, query_set, "adaptive", "local").read_text().splitlines()[0].split()
    numbers = {did: n for n, did in enumerate(benchmark.source(query_set.pool).keys)}
    assert sent["0"][0] == numbers[first[2]]
    assert set(metrics["files"]) == {"mbeir_circo_task7_val"}  # nothing is said of what nobody here can judge
    assert metrics["files"]["mbeir_circo_task7_val"]["ranking"]["local"]["mAP@5"] > 0
    assert "CIRCO" in write_report(config, benchmark).read_text()
    assert len(benchmark.candidates) == 5  # both splits search one pool


def test_a_storys_own_pictures_are_no_answers(prepared, retriever, tmp_path):
    config, benchmark, metrics = searched(prepared, retriever, tmp_path, "vist", vist)
    query_set = benchmark.query_sets[0]
    labelled, found = benchmark.load(query_set), {}
    for line in run_file(config, query_set, "adaptive", "local").read_text().splitlines():
        qid, _, did, *_ = line.split()
        found.setdefault(qid, []).append(layout.hash_did(did))
    everything = set(benchmark.ids(query_set.pool).tolist())
    assert [len(query.images) for query in labelled.queries] == [4, 4]
    for qid, out in zip(labelled.qids, labelled.excluded, strict=True):
        assert len(out) in (3, 4) and set(found[qid]) == everything - out
    assert metrics["files"]["mbeir_vist_task7_test"]["local"]["R@5"] == 100
    page = write_report(config, benchmark).read_text()
    assert page.count("a picture of the query") >= 4


def test_what_is_left_out_makes_room_for_what_follows():
    found, scores = np.array([[4, 5, 6, 7], [4, 5, -1, -1]]), np.array([[4.0, 3.0, 2.0, 1.0]] * 2)
    ids, values = leave_out(found, scores, [frozenset({5, 4}), frozenset()], 2)
    assert ids.tolist() == [[6, 7], [4, 5]] and values.tolist() == [[2.0, 1.0], [4.0, 3.0]]
    ids, values = leave_out(found[:1, :3], scores[:1, :3], [frozenset({5})], 3)  # the whole pool was found
    assert ids.tolist() == [[4, 6, -1]] and values.tolist() == [[4.0, 2.0, -np.inf]]


@pytest.mark.slow
def test_trained_and_measured_the_same_on_one_device_and_on_eight(prepared, tmp_path):
    training = dataclasses.replace(prepared.training, steps=3, checkpoint_every=3)
    config = dataclasses.replace(prepared, training=training, workdir=str(tmp_path / "run"))
    assert train(config)
    processor, benchmark = Processor.from_hf(config.model.base, config.data), Benchmark(config)
    measured = []
    for devices in (8, 1):
        mesh = sharding.make_mesh(Mesh(), jax.devices()[:devices])
        restored = restore_model(config, processor, mesh)
        assert restored is not None
        step, model = restored
        retriever = Retriever(model, processor, config, mesh, step=step, identity=model_identity(config))
        for made in ("embeddings", "indexes", "queries"):
            if (epath.Path(config.run_dir) / made).exists():
                (epath.Path(config.run_dir) / made).rmtree()
        embed_candidates(config, retriever, benchmark)
        build_indexes(config, benchmark)
        metrics, encoded = evaluate(config, retriever, benchmark, scope=TESTS)
        assert encoded == 2 * 16 and metrics["checkpoint"]["sha256"]
        measured.append(figures(metrics))
    assert measured[0] == measured[1]
