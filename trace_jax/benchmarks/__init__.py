"""Parts of the program, measured beside a peer or a bound; `launch/benchmark.py` runs them."""
