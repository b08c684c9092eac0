"""Compiles a configuration for TPUs, without any: `python launch/compile_check.py CONFIG --topology v5p:2x2x4`.

Reports, for the training step, the prefill, the decoding and the embedding of documents (`--programs
train,prefill,decode,embed`): whether they fit, FLOPs, collectives, and a roofline. `--json FILE` writes the same as
JSON; `--slices N` compiles for N such slices.
Overrides are those of launch/train.py. Needs `pip install -r requirements-tpu.txt`.
"""

import argparse
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
# The compiler works without a TPU, beside others of its kind; all else runs on the CPU.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from trace_jax import chips, config
from trace_jax.compile_check import report
from trace_jax.retrieval import program

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a name of configs/")
    parser.add_argument("--topology", required=True, help="chip and shape, such as v5p:2x2x4 or v5e:8x8")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--programs", default=",".join(report.KINDS))
    parser.add_argument("--json", type=pathlib.Path)
    options, overrides = parser.parse_known_args()
    chosen = config.load_config(options.config, overrides)
    with program.clear_errors(ValueError, chips.CompilerMissingError):
        chip, devices = chips.find_topology(options.topology, options.slices)
        reports = []
        compiling = report.check(chosen, options.topology, slices=options.slices, kinds=options.programs.split(","))
        for each in compiling:  # said at once: what comes later may fail
            print(report.describe(each, chip, len(devices)), flush=True)
            reports.append(each)
            if options.json:
                options.json.write_text(json.dumps(report.to_json(reports, options.topology), indent=2) + "\n")
    print("\nAssumptions", *(f"- {line}" for line in report.ASSUMPTIONS), sep="\n")
    sys.exit(0 if all(each.fits for each in reports) else 1)
