"""M-BEIR-CoT: which training queries need reasoning, and the traces that a model should write for them.

config      every option of a build
schema      Row: one query on its way through the stages
source      a release in M-BEIR's layout -> parts of rows
prompts     versioned prompts (prompts/*.toml) and their hashes
cache       finished requests, on disk; the ledger of tokens and money
client      one OpenAI-compatible endpoint: retries, rate, images
teacher     answers requests from the cache, a server or a release's own metadata
batch       requests as files for offline batch APIs, and their answers back
filters     the rules that a trace must pass; duplicates: the one rule that compares rows
stages      assess, generate and verify: a row's requests, and what their answers make of it
pipeline    the stages as Apache Beam pipelines over parts
write       the release, the records, Parquet; card: what was built, for people
build       all of it, in order
"""
