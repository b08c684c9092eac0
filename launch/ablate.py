"""Runs a suite of ablations: `python launch/ablate.py emoji [--seeds 0 1 2] [--variants ...]`.

Every variant of configs/ablations/<suite>.py is trained, embedded, indexed and measured with every seed, one after
another; what is done is skipped, so that the same command goes on. When all are done, a page (of the suite emoji
docs/reproduction.md) says which of the paper's claims hold. emoji_quick is the same suite, short.
"""

import logging
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trace_jax.retrieval import program
from trace_jax.retrieval.ablation import Suite, config_of, describe, finished, load_suite, modes_of, seconds_of

STAGES = {
    "train": (),
    "embed": (),
    "build_index": (),
    "evaluate": ("--splits", "test", "--pools", "local", "--modes"),
}


def run(suite: Suite) -> str:
    """Runs what is missing of a suite and returns its page. Raises SystemExit with the command that fails."""
    results, seconds = {}, 0.0
    compiled = str(pathlib.Path(suite.folder).resolve() / "compiled")  # one for all: most of them run the same programs
    environment = {"JAX_COMPILATION_CACHE_DIR": compiled} | os.environ
    for variant in suite.variants:
        for seed in suite.seeds:
            config, options = config_of(suite, variant, seed)
            for stage, own in STAGES.items():
                if finished(config):
                    break
                modes = [",".join(modes_of(variant))] if stage == "evaluate" else []
                command = [sys.executable, str(ROOT / "launch" / f"{stage}.py"), *options, *own, *modes]
                logging.info("%s, seed %d: %s", variant, seed, stage)
                if subprocess.run(command, check=False, env=environment).returncode:
                    raise SystemExit(f"error: this failed: {' '.join(command)}")
            results.setdefault(variant, []).append(finished(config))
            seconds += seconds_of(config)
    return describe(suite, results, seconds / 3600)


if __name__ == "__main__":
    program.prepare_logging()
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    suite = load_suite(arguments[0], arguments[1:])
    page = run(suite)
    (ROOT / suite.page).write_text(page, "utf-8")
    print(page)
