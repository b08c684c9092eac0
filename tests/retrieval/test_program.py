"""What the programs share."""

import jax
import pytest

from trace_jax.retrieval import program


@pytest.mark.parametrize("named", [False, True])
def test_what_is_compiled_stays_with_the_run(monkeypatch, tmp_path, named):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere" if named else "")
        program.keep_compiled(str(tmp_path))
        assert jax.config.values["jax_compilation_cache_dir"] == (before if named else str(tmp_path / "compiled"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
