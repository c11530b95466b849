#!/bin/sh
# Lint and test.
#
#   sh run_tests.sh                  every test that is not marked slow, in ten minutes on two cores
#   sh run_tests.sh --full           as well: the slow ones, other instruction sets, the oldest Paddle
#   sh run_tests.sh -m gpu           what needs a GPU; ends with a table of figures
#   PYTHON=python3 sh run_tests.sh   in an environment of yours alone
#
# Flags go to pytest: sh run_tests.sh -k merging
#
# A step that fails does not keep the others from running; the status is 1 if any failed.
set -u
cd "$(dirname "$0")"
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=1 # the tests themselves run in parallel
full=
if [ "${1:-}" = --full ]; then
    full=1
    shift
fi
failed=
steps=
started=$(date +%s)
SLOWEST=$(mktemp) # tests/conftest.py writes a line for each test: seconds, name
export SLOWEST
trap 'rm -f "$SLOWEST"' EXIT

finish() { # the name of a step, its status, and when it began
    seconds=$(($(date +%s) - $3))
    echo "== $1: $seconds s"
    steps="$steps$(printf '%6d s  %s' "$seconds" "$1")
"
    # 5: flags that select tests left none for this step.
    [ "$2" -eq 0 ] || [ "$2" -eq 5 ] || failed="$failed
    $1: status $2"
}

step() { # the name of a step and its command
    name=$1 began=$(date +%s)
    shift
    echo "== $name"
    "$@"
    finish "$name" $? "$began"
}

set_up() { # the name of a step, and files of requirements; sets `python`
    name=$1 began=$(date +%s)
    shift
    python=$(sh setup_env.sh "$@")
    status=$?
    finish "$name" "$status" "$began"
    return "$status"
}

tests() { # flags of pytest
    "$python" -m pytest -n "$cores" "$@"
}

echo "== processor: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)," \
    "$(uname -m), $cores cores," \
    "$(for flag in avx2 avx512f avx512_bf16 amx_bf16; do
        grep -qw "$flag" /proc/cpuinfo 2>/dev/null && printf '%s ' "$flag" || printf 'no %s ' "$flag"
    done)"

set_up "set-up" requirements/test.txt || exit
if [ "${1:-} ${2:-}" = "-m gpu" ]; then # one after the other: they measure
    unset OMP_NUM_THREADS
    "$python" -m pytest -n 0 "$@"
    exit
fi
step "ruff" "$python" -m ruff check .
step "ruff format" "$python" -m ruff format --check .
step "import-linter" "$python" -c 'import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports())'
step "weight" "$python" tests/weight.py
step "tests" tests -m "not slow" "$@"
if [ -n "$full" ]; then
    step "slow tests" tests -m slow "$@"
    step "numbers, instructions up to AVX2" env LK_ISA=1 \
        ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell \
        MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_DEBUG_CPU_TYPE=5 \
        "$python" -m pytest -n "$cores" -m "numbers and not slow" "$@"
    step "numbers, instructions up to SSE4" env LK_ISA=0 \
        ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \
        MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_DEBUG_CPU_TYPE=3 \
        "$python" -m pytest -n "$cores" -m "numbers and not slow" "$@"
    if [ -z "${PYTHON:-}" ]; then
        export VENV=.venv-oldest PADDLE=requirements/oldest.txt
        set_up "set-up of the oldest Paddle" requirements/test.txt &&
            step "the oldest Paddle" tests -m "paddle_version and not slow" "$@"
    fi
fi

echo "== steps"
printf '%s' "$steps"
echo "$(($(date +%s) - started)) s in all"
echo "== the slowest tests"
sort -rn "$SLOWEST" | head -n 10
if [ -n "$failed" ]; then
    echo "== failed:$failed"
    exit 1
fi
echo "== all passed"
