#!/bin/sh
# Benchmarks one after the other, the most telling first, each in a process and with a JSON of its own, so that what ends
# one of them (a time limit, memory) costs none of the others.
#
#   PYTHON=.venv/bin/python sh tests/benchmarks/each.sh gpu FOLDER    what needs a GPU: about 10 minutes on an H100
#   PYTHON=.venv/bin/python sh tests/benchmarks/each.sh cpu FOLDER    what the CPU does: about as long, on two cores
#   .venv/bin/python -m tests.benchmarks.page FOLDER/*.json

what=${1:-gpu}
folder=${2:-.benchmarks-$what}
python=${PYTHON:-python3}
tests=tests/benchmarks
mkdir -p "$folder"

run() {  # NAME SECONDS TEST...
    name=$what-$1 limit=$2
    shift 2
    # An interruption: pytest writes what is done.
    timeout --signal=INT --kill-after=20 "$limit" "$python" -m pytest -q -p no:cacheprovider -rs \
        --benchmark-json="$folder/$name.json" --benchmark-columns=median "$@"
}

case $what in
gpu)
    run large 300 "$tests/test_large.py" "$tests/test_alternatives.py::test_ways[large]"
    run alternatives 150 "$tests/test_alternatives.py::test_ways[gpt2]" "$tests/test_alternatives.py::test_ways[gpt2-xl]"
    run growth 150 "$tests/test_growth.py::test_hidden" "$tests/test_growth.py::test_tokens"
    DELTA_BENCH_CALIBRATIONS=seed run devices 240 "$tests/test_devices.py" -k cuda-float32
    ;;
cpu)
    export CUDA_VISIBLE_DEVICES=
    run alternatives 300 "$tests/test_alternatives.py::test_ways[gpt2]" "$tests/test_alternatives.py::test_ways[small]"
    DELTA_BENCH_TOKENS=512,1024,2048,4096,8192 run growth 270 \
        "$tests/test_growth.py::test_many_entries" "$tests/test_growth.py::test_claims" "$tests/test_growth.py::test_models" \
        "$tests/test_growth.py::test_layers" "$tests/test_growth.py::test_tokens"
    ;;
*)
    echo "sh $0 gpu|cpu [FOLDER]" >&2
    exit 2
    ;;
esac
