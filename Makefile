# Two commands for a newcomer: `make quickstart` and `make test`. Both make the environment first.
PYTHON ?= python3
RUN := .venv/bin/python
CONFIG ?= emoji_tiny
RELEASE ?= emoji_small
# Tests of one file share what they build; more processes than this need more memory than a small machine has.
WORKERS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile

# XLA:CPU allocates its temporaries anew each step: kept in the heap, on huge pages, they cost no page faults.
export TRANSFORMERS_VERBOSITY := error
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456

.PHONY: quickstart test test-all check base clean

.venv/.installed: requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info[:2] == (3, 11), f'Python 3.11 is needed, this is {sys.version}'"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Data, training, embeddings, indexes, evaluation, report. Every stage skips what is done and resumes what is not.
quickstart: .venv/.installed
	$(RUN) launch/build_data.py $(RELEASE)
	$(RUN) launch/train.py $(CONFIG)
	$(RUN) launch/embed.py $(CONFIG)
	$(RUN) launch/build_index.py $(CONFIG)
	$(RUN) launch/evaluate.py $(CONFIG)
	$(RUN) launch/report.py $(CONFIG)

# The embedded base model from nothing: hours, resumable.
base: .venv/.installed
	$(RUN) launch/build_data.py emoji_small
	$(RUN) launch/build_base.py

test: .venv/.installed-dev
	$(RUN) -m pytest $(WORKERS) -m "not slow"

test-all: .venv/.installed-dev
	$(RUN) -m pytest $(WORKERS)

check: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

clean:
	rm -rf data runs
