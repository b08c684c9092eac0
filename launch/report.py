"""Writes `<run_dir>/report.html`: `python launch/report.py [config] [--benchmark mbeir] [overrides]`.

Where M-BEIR or the unseen benchmarks were measured, `<run_dir>/tables/` holds the paper's Tables 1 and 3 with our row:
text, CSV and LaTeX.
`--compare base=runs/x plain=runs/y` adds the figures of other runs.
"""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.evaluation import record_seconds
from trace_jax.retrieval.report import write_report

if __name__ == "__main__":
    config, options = program.arguments(sys.argv[1:], __doc__)
    program.prepare(config.run_dir)
    with program.clear_errors(), artifacts.stage(config.run_dir, "report"):
        benchmark = Benchmark(config)
        path = write_report(config, benchmark, options.compare)
        logging.info("%s", path)
    record_seconds(config, benchmark)
