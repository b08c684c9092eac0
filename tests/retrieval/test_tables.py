import csv
import dataclasses
import io
import pathlib
import tomllib

import numpy as np
import pytest
from etils import epath

from trace_jax.config import Config
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.tables import PUBLISHED, table, table1_average, write_tables


def metrics_with(values: dict[str, dict], release: str = "mbeir", sha: str = "abc") -> dict:
    return {
        "files": {stem: {"local": figures, "global": {}, "ranking": {}} for stem, figures in values.items()},
        "config_hash": "0123",
        "checkpoint": {"step": 10, "sha256": sha * 20},
        "mode": "adaptive",
        "asked": 0,
        "release": release,
    }


def test_published_rows_are_whole_and_their_means_are_as_printed():
    one = table("table1", metrics_with({"mbeir_cirr_task7_test": {"R@5": 50.0}}), "mine")
    assert one is not None and len(one.columns) == 16
    for row in one.rows[:-1]:
        assert len(row.values) == 16 and row.source
        # the rounded figures have a mean within rounding of the printed one
        assert np.mean(row.values) == pytest.approx(row.average, abs=0.1), row.name
    three = table("table3", metrics_with({"mbeir_visdial_task0_test": {"R@1": 50.0}}), "mine")
    assert three is not None and {len(row.values) for row in three.rows} == {13}
    assert "Avg" not in three.cells[0]


def test_a_part_of_the_queries_is_called_so_and_fills_no_table_of_all():
    metrics = metrics_with({"mbeir_cirr_task7_test": {"R@5": 50.0}})
    whole, some = table("table1", metrics, "mine"), table("table1", metrics | {"asked": 300}, "mine")
    assert whole is not None and some is not None
    assert "asked 300 queries of each file alone" in some.rows[-1].source
    assert "of each file" not in whole.rows[-1].source


def test_the_papers_average_is_over_all_16_files_and_takes_fashion_at_10():
    columns = tomllib.loads(PUBLISHED.read_text())["table1"]["columns"]
    stems = [stem for column in columns for stem in column["files"]]
    files = {stem: {"local": {"R@5": 40.0, "R@10": 48.0}, "global": {}, "ranking": {}} for stem in stems}
    assert len(stems) == 16 and sum("fashion" in stem for stem in stems) == 3
    assert table1_average(files, "local") == 41.5  # (13 * 40 + 3 * 48) / 16
    assert table1_average(files, "global") is None
    del files["mbeir_cirr_task7_test"]
    assert table1_average(files, "local") is None


def test_our_row_stands_beside_the_published_ones(tmp_path):
    config = Config(name="my_run", workdir=str(tmp_path))
    figures = {"mbeir_cirr_task7_test": {"R@5": 50.25, "R@10": 60.0}, "mbeir_fashioniq_task7_test": {"R@10": 12.0}}
    (made,) = write_tables(config, metrics_with(figures))
    ours = made.rows[-1]
    assert ours.name == "my_run" and ours.average is None  # not all 16 are measured
    assert dict(zip(made.columns, ours.values, strict=True))["FIQ it→i"] == 12.0  # R@10 for fashion
    folder = pathlib.Path(tmp_path) / "tables"
    lines = list(csv.reader(io.StringIO((folder / "table1.csv").read_text())))
    assert len({len(line) for line in lines}) == 1 and lines[-1][0] == "my_run"
    assert "step 10" in lines[-1][-1]
    text, latex = (folder / "table1.txt").read_text(), (folder / "table1.tex").read_text()
    assert "U-MARVEL-7B" in text and "58.8" in text
    assert r"my\_run & --" in latex and latex.count(r"\\") == len(made.rows) + 1
    assert write_tables(dataclasses.replace(config, workdir=str(tmp_path / "none")), metrics_with({})) == []


def test_unseen_benchmarks_of_one_checkpoint_fill_one_table(tmp_path):
    config = Config(name="my_run", workdir=str(tmp_path))
    kinds = ("change_object", "focus_object", "change_attribute", "focus_attribute")
    genecis = {f"mbeir_genecis_{kind}_task7_test": {"R@1": float(i)} for i, kind in enumerate(kinds)}
    others = {
        "metrics_genecis.json": metrics_with(genecis, "genecis"),
        "metrics_visdial.json": metrics_with({"mbeir_visdial_task0_test": {"R@1": 9.0}}, "visdial", "of another"),
    }
    for name, metrics in others.items():
        artifacts.write_json(epath.Path(tmp_path) / name, metrics)
    asked_less = metrics_with({"mbeir_urban1k_task0_test": {"R@1": 9.0}}, "urban1k") | {"asked": 10}
    artifacts.write_json(epath.Path(tmp_path) / "metrics_urban1k.json", asked_less)
    circo = metrics_with({"mbeir_circo_task7_val": {"R@5": 30.0}}, "circo")
    circo["files"]["mbeir_circo_task7_val"]["ranking"] = {"local": {"mAP@5": 7.0}}
    (made,) = write_tables(config, circo)
    ours = dict(zip(made.columns, made.rows[-1].values, strict=True))
    assert {name: value for name, value in ours.items() if value is not None} == {"GeneCIS": 1.5, "CIRCO": 7.0}


def test_the_means_over_prompts_are_a_row_of_their_own():
    metrics = metrics_with({"mbeir_cirr_task7_test": {"R@5": 50.0}, "mbeir_edis_task2_test": {"R@5": 40.0}})
    spread = {"R@5": {"mean": 48.0, "deviation": 2.5}}
    metrics["files"]["mbeir_cirr_task7_test"]["prompts"] = {"local": spread}
    made = table("table1", metrics, "mine")
    assert made is not None and made.rows[-2].name == "mine"
    means = dict(zip(made.columns, made.rows[-1].values, strict=True))
    assert means["CIRR it→i"] == 48.0 and means["EDIS t→it"] is None
    assert "deviation is 2.5 at most" in made.rows[-1].source
