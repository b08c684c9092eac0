from trace_jax.retrieval.plots import curves, points
from trace_jax.retrieval.tables import Row, Table


def test_curves_are_inline_and_the_same_every_time():
    rows = [{"step": step, "loss_gen": 1 / step, "emb_first": 0.5, "recall_in_batch": 0.1} for step in (1, 2, 3)]
    drawn = curves(rows)
    assert len(drawn) == 3
    assert all(svg.startswith("<svg") for svg in drawn)
    assert drawn == curves(rows)
    assert curves(rows[:1]) == []


def test_a_table_is_drawn_with_every_figure_and_ours_by_name():
    published = (Row("A", (10.0, None, 30.0), None, "a"), Row("B", (20.0, 40.0, None), None, "b"))
    table = Table("", ("one", "two", "three"), published, (Row("mine", (1.0, 2.0, 3.0), 2.0, "here"),))
    drawn = points(table)
    assert drawn == points(table) and drawn.startswith("<svg")
    for said in ("B, best on average", "other published rows", "mine", "one", "two", "three"):
        assert f">{said}<" in drawn
    alone = points(Table("", table.columns, (), table.measured))
    assert drawn.count("<use ") - alone.count("<use ") == 2 + 2 + 2  # a point a figure, and one of each in the legend
    assert "published" not in alone
