#!/bin/sh
# The benchmarks that need a GPU: the most telling first, each in a process and with a JSON of its own, so that what ends
# one of them (a time limit, memory) costs none of the others. On one H100 they take about 8 minutes.
#
#   PYTHON=.venv/bin/python sh tests/benchmarks/gpu.sh FOLDER
#   .venv/bin/python -m tests.benchmarks.page FOLDER/*.json

folder=${1:-.benchmarks-gpu}
python=${PYTHON:-python3}
tests=tests/benchmarks
mkdir -p "$folder"

run() {  # NAME SECONDS TEST...
    name=$1 limit=$2
    shift 2
    # An interruption: pytest writes what is done.
    timeout --signal=INT --kill-after=20 "$limit" "$python" -m pytest -q -p no:cacheprovider -rs \
        --benchmark-json="$folder/$name.json" --benchmark-columns=median "$@"
}

run large 330 "$tests/test_large.py::test_default_parts" "$tests/test_alternatives.py::test_ways[large]"
run alternatives 90 "$tests/test_alternatives.py::test_ways[gpt2]" "$tests/test_alternatives.py::test_ways[gpt2-xl]"
run growth 120 "$tests/test_growth.py::test_hidden" "$tests/test_growth.py::test_tokens"
run writes 90 "$tests/test_large.py::test_with_writes"
DELTA_BENCH_CALIBRATIONS=seed run devices 120 "$tests/test_devices.py" -k cuda-float32
