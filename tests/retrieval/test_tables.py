import csv
import io

import numpy as np
import pytest
from etils import epath

from trace_jax.retrieval.tables import table1, write_tables


def metrics_with(values: dict[str, dict]) -> dict:
    checkpoint = {"step": 10, "sha256": "abc" * 20}
    return {
        "files": {stem: {"local": figures, "global": {}} for stem, figures in values.items()},
        "config_hash": "0123",
        "checkpoint": checkpoint,
        "mode": "adaptive",
        "release": "mbeir",
    }


def test_published_rows_are_whole_and_their_means_are_as_printed():
    table = table1(metrics_with({"mbeir_cirr_task7_test": {"R@5": 50.0}}), "mine")
    assert table is not None and len(table.columns) == 16
    for row in table.rows[:-1]:
        assert len(row.values) == 16 and row.source
        # the rounded figures have a mean within rounding of the printed one
        assert np.mean(row.values) == pytest.approx(row.average, abs=0.1), row.name


def test_our_row_stands_beside_the_published_ones(tmp_path):
    figures = {"mbeir_cirr_task7_test": {"R@5": 50.25, "R@10": 60.0}, "mbeir_fashioniq_task7_test": {"R@10": 12.0}}
    metrics = metrics_with(figures)
    (table,) = write_tables(epath.Path(tmp_path), metrics, "my_run")
    ours = table.rows[-1]
    assert ours.name == "my_run" and ours.average is None  # not all 16 are measured
    assert dict(zip(table.columns, ours.values, strict=True))["FIQ it→i"] == 12.0  # R@10 for fashion
    lines = list(csv.reader(io.StringIO((tmp_path / "table1.csv").read_text())))
    assert len({len(line) for line in lines}) == 1 and lines[-1][0] == "my_run"
    assert "step 10" in lines[-1][-1]
    text, latex = (tmp_path / "table1.txt").read_text(), (tmp_path / "table1.tex").read_text()
    assert "U-MARVEL-7B" in text and "58.8" in text
    assert r"my\_run & --" in latex and latex.count(r"\\") == len(table.rows) + 1
    assert write_tables(epath.Path(tmp_path / "none"), metrics_with({}), "x") == []
