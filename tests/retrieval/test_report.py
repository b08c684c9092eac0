import dataclasses
import io
import json
import re

import pytest
from etils import epath
from PIL import Image

from trace_jax.data.schema import Query
from trace_jax.retrieval.artifacts import MissingStageError
from trace_jax.retrieval.report import data_uri, write_report
from trace_jax.retrieval.search import choose_pool, draw, read_query, search, to_json


def test_the_page_stands_alone_and_shows_enough(evaluated, benchmark_):
    config, metrics = evaluated
    page = write_report(config, benchmark_, [("again", config.run_dir)]).read_text()
    assert page.count('<article class="card">') >= 24
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    misses, hits = (int(re.search(rf"(\d+) {kind}</h3>", page)[1]) for kind in ("misses", "hits"))
    assert misses == hits
    assert f"{metrics['average']:.1f}" in page
    assert "again" in page
    assert write_report(config, benchmark_, [("again", config.run_dir)]).read_text() == page


def test_an_unevaluated_run_is_refused(fresh_config, benchmark_):
    with pytest.raises(MissingStageError, match="make quickstart"):
        write_report(fresh_config, benchmark_)


def test_pictures_are_made_small():
    buffer = io.BytesIO()
    Image.new("RGB", (900, 300), "red").save(buffer, "PNG")
    assert data_uri(buffer.getvalue()).startswith("data:image/webp;base64,")
    assert data_uri(None) == ""


# ---- one search ----------------------------------------------------------------------------------------------------


def test_pools_are_found_by_task_or_name(benchmark_):
    pool, task = choose_pool(benchmark_, "it2t", Query("what?"))
    assert (pool, task) == ("mbeir_emoji_task6_cand_pool", 6)
    assert choose_pool(benchmark_, None, Query("a cat"))[1] == 0
    assert choose_pool(benchmark_, "global", Query("a cat")) == ("global_test", 0)
    with pytest.raises(ValueError, match="Did you mean 'global'"):
        choose_pool(benchmark_, "globall", Query("a cat"))


def test_unreadable_queries_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such image file"):
        read_query("", str(tmp_path / "absent.png"), "")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    torn = tmp_path / "torn.png"
    torn.write_bytes(buffer.getvalue()[:600])
    with pytest.raises(ValueError, match=r"torn\.png"):
        read_query("", str(torn), "")
    with pytest.raises(ValueError, match="empty query"):
        read_query("  ", None, "")


def test_a_search_finds_and_draws(evaluated, benchmark_, retriever, monkeypatch):
    config, _ = evaluated
    monkeypatch.setattr("trace_jax.retrieval.search.Retriever.load", lambda _: retriever)
    image = benchmark_.candidates.document(0).image
    answer = search(config, Query("give it another colour", image), pool="it2i", top=5)
    assert len(answer.hits) == 5
    assert answer.query.instruction == benchmark_.instruction(7)
    scores = [hit.score for hit in answer.hits]
    assert scores == sorted(scores, reverse=True)
    assert draw(answer).width > 600
    several = dataclasses.replace(answer, query=Query("<image> then <image> and <image>", (image,) * 3))
    assert draw(several).width > draw(answer).width
    text_only = search(config, Query("a cat"), pool="t2t", top=2, mode="direct")
    assert text_only.trace == ""
    assert draw(text_only).height > 100
    said = json.loads(json.dumps(to_json(config, answer)))
    assert (said["pool"], said["trace"], said["instruction"]) == (answer.pool, answer.trace, answer.query.instruction)
    assert [(each["did"], each["score"]) for each in said["results"]] == [(hit.did, hit.score) for hit in answer.hits]
    for hit, each in zip(answer.hits, said["results"], strict=True):
        assert epath.Path(each["image"]).read_bytes() == hit.document.image
    assert [each["image"] for each in to_json(config, text_only)["results"]] == [None, None]


def test_a_search_without_an_index_says_what_to_run(fresh_config):
    with pytest.raises(MissingStageError, match="make quickstart"):
        search(fresh_config, Query("a cat"))
    assert not epath.Path(fresh_config.run_dir).exists()
