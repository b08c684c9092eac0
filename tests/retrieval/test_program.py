"""What the programs share."""

import jax
import pytest

from trace_jax.retrieval import program


@pytest.fixture
def cache(monkeypatch):
    """Reads JAX's folder of compiled programs; it is as before when the test ends."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.values["jax_compilation_cache_dir"]
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)


def test_what_is_compiled_stays_with_the_run_wherever_the_process_goes(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    program.keep_compiled("runs/mine")
    assert cache() == str(tmp_path / "runs" / "mine" / "compiled")
    program.keep_compiled("gs://bucket/mine")
    assert cache() == "gs://bucket/mine/compiled"


def test_the_environment_names_the_folder_of_what_is_compiled(cache, monkeypatch, tmp_path):
    before = cache()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    program.keep_compiled(str(tmp_path))
    assert cache() == before


def test_reading_options_changes_nothing(cache):
    before = cache()
    config, _ = program.arguments(["emoji_tiny", "--pools", "local"], None)
    assert config.name == "emoji_tiny" and cache() == before


@pytest.mark.parametrize("option", ["--tasks", "--pools", "--splits"])
def test_an_empty_choice_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        program.arguments(["emoji_tiny", option, ""], None)
    assert "name at least one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ([], "runs/quickstart_untrained"),
        (["--workdir", "runs/mine/"], "runs/mine_untrained"),
        (["--workdir", "gs://bucket/mine"], "gs://bucket/mine_untrained"),
    ],
)
def test_the_base_alone_is_measured_beside_the_run_and_not_in_it(options, folder):
    config, _ = program.arguments(["emoji_tiny", "--untrained", *options], None)
    assert config.run_dir == folder
    assert program.arguments(["emoji_tiny", *options], None)[0].run_dir in (folder[: -len("_untrained")], "runs/mine/")
