"""Searches with a trained run, prints the results and saves a picture of them.

python launch/search.py "a firefighter with dark skin" --image picture.png --instruction "Find ..."

`--json` prints the query, the trace and the results as one JSON object, and nothing else.
"""

import argparse
import hashlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from etils import epath

from trace_jax import config
from trace_jax.retrieval import program, search
from trace_jax.retrieval.generation import MODES


def main() -> None:
    """Reads the command line, searches, prints, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("text", nargs="?", default="", help="the query's text; may be left out when there is an image")
    parser.add_argument("--image", help="the query's image file")
    parser.add_argument("--instruction", default="", help="what is looked for; default: the task's first instruction")
    parser.add_argument("--config", default=config.DEFAULT, help=f"the run (default {config.DEFAULT})")
    parser.add_argument("--pool", help="a task such as it2i, global, or a pool's full name; default: images")
    parser.add_argument("--top", type=int, default=5, help="results (default 5)")
    parser.add_argument("--mode", choices=MODES, help="default: the config's")
    parser.add_argument("--output", help="the picture; default <run_dir>/searches/<digest>.png")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, overrides = parser.parse_known_args()
    if options.top < 1:
        parser.error("--top must be at least 1")
    chosen = config.load_config(options.config, overrides)
    program.prepare(chosen.run_dir)
    with program.clear_errors(ValueError):
        query = search.read_query(options.text, options.image, options.instruction)
        answer = search.search(chosen, query, pool=options.pool, top=options.top, mode=options.mode)
        digest = hashlib.sha256(repr((query, answer.pool, options.mode)).encode()).hexdigest()[:12]
        path = epath.Path(options.output or f"{chosen.run_dir}/searches/{digest}.png")
        search.save_picture(answer, path)
    if options.json:
        print(json.dumps(search.to_json(chosen, answer) | {"picture": str(path)}, indent=2, ensure_ascii=False))
        return
    print(f"instruction  {answer.query.instruction}")
    print(f"the model    {answer.trace or 'wrote no trace: <|emb|> came first'}")
    for rank, hit in enumerate(answer.hits, start=1):
        print(f"{rank:3}. {hit.score:.3f}  {hit.did:10} {hit.document.text or '(picture)'}")
    print(f"picture      {path}")


if __name__ == "__main__":
    main()
