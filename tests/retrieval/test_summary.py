"""Figures of query files, arranged by task."""

from trace_jax.retrieval.summary import lay_over, merge


def test_data_sets_of_one_task_are_averaged():
    one = {"dataset": "a", "queries": 10, "local": {"R@5": 40.0}, "ceiling": None}
    other = {"dataset": "b", "queries": 20, "local": {"R@5": 60.0}, "ceiling": {"R@5": 90.0}}
    merged = merge([one, other])
    assert merged == {"dataset": "a, b", "queries": 30, "local": {"R@5": 50.0}, "ceiling": {"R@5": 90.0}}


def test_a_task_has_the_pools_and_modes_that_all_its_data_sets_have():
    row = {"local": {"R@5": 40.0}}
    one = row | {"global": {"R@5": 20.0}, "modes": {"adaptive": row, "always": row}}
    other = row | {"global": {}, "modes": {"adaptive": {"local": {"R@5": 60.0}}}, "prompts": {"local": 1.0}}
    merged = merge([one, other])
    assert merged["global"] == {} and merged["modes"] == {"adaptive": {"local": {"R@5": 50.0}}}
    assert merged["prompts"] == {"local": 1.0}


def test_what_was_known_stays_under_what_is_known_now():
    before = {"a": {"local": {"R@5": 1.0}, "global": {"R@5": 2.0}, "ceiling": None}, "b": {"queries": 3}}
    now = {"a": {"local": {"R@5": 4.0}, "global": {}, "ceiling": {"R@5": 5.0}}, "c": {"queries": 6}}
    assert lay_over(before, now) == {
        "a": {"local": {"R@5": 4.0}, "global": {"R@5": 2.0}, "ceiling": {"R@5": 5.0}},
        "b": {"queries": 3},
        "c": {"queries": 6},
    }
