#!/bin/sh
# Lint and test, on the newest and on the oldest Paddle that is supported.
#
#   sh run_tests.sh                  everything
#   PYTHON=python3 sh run_tests.sh   in an environment of yours alone
#
#   sh run_tests.sh -m gpu           what needs a GPU; ends with a table of figures
#   GPU_WHEEL=1 sh run_tests.sh      as well, on any machine, what PyPI's GPU build of Paddle shows
#
# Flags go to pytest: sh run_tests.sh -k merging
#
# Tests marked slow run once, on the newest Paddle. A step that fails does not keep the others from
# running; the status is 1 if any failed.
set -u
cd "$(dirname "$0")"
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=1 # the tests themselves run in parallel
failed=

# Tests that do not depend on Paddle: they run once, with a stand-in for it that cannot be called.
once="
    tests/checkpoints/test_hostile_pickles.py
    tests/checkpoints/test_mutated_files.py
    tests/commands/test_make_digits.py
    tests/commands/test_plot.py
    tests/data/test_class_names.py
    tests/data/test_fuzz.py
    tests/data/test_image_files.py
    tests/data/test_list_files.py
    tests/data/test_lists.py
    tests/data/test_samplers.py
    tests/data/test_split.py
    tests/data/transforms/test_augment.py
    tests/data/transforms/test_builders.py
    tests/data/transforms/test_erasing.py
    tests/data/transforms/test_evaluation.py
    tests/data/transforms/test_pixels.py
    tests/data/transforms/test_training.py
    tests/ops/test_csrc.py
    tests/optim/test_schedule.py
    tests/optim/test_state.py
    tests/test_config.py
    tests/test_config_flags.py
    tests/test_recipes.py
"
# Tests that compare numbers: they run again with instruction sets held back.
numerical="
    tests/analysis
    tests/commands/test_benchmark.py
    tests/commands/test_merge.py
    tests/deploy/test_backends.py
    tests/deploy/test_fold.py
    tests/deploy/test_quantize.py
    tests/ops
    tests/optim
    tests/test_model.py
"

# Tests that say something of GPUs in the environment with PyPI's GPU build, without a GPU.
gpu_wheel="
    tests/data/test_device_copy.py
    tests/deploy/test_gpu_branches.py
    tests/engine/test_precision.py
    tests/engine/test_step_costs.py
    tests/ops/test_fast_layers.py
    tests/optim/test_gradients.py
    tests/runtime/test_launch.py
    tests/test_gpu_wheel.py
"

step() { # the name of a step and its command
    name=$1
    shift
    echo "== $name"
    status=0
    "$@" || status=$?
    # 5: flags that select tests left none for this step.
    [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || failed="$failed
    $name: status $status"
}

ignored() { # --ignore for each of the files
    for file in "$@"; do echo "--ignore=$file"; done
}

paddle_version() { # of the Python $1
    "$1" -c 'import importlib.metadata as m
for name in ("paddlepaddle", "paddlepaddle-gpu"):
    try:
        print("Paddle", m.version(name))
        break
    except m.PackageNotFoundError:
        pass'
}

echo "== processor: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)," \
    "$(uname -m), $cores cores," \
    "$(for flag in avx2 avx512f avx512_bf16 amx_bf16; do
        grep -qw "$flag" /proc/cpuinfo 2>/dev/null && printf '%s ' "$flag" || printf 'no %s ' "$flag"
    done)"

python=$(sh setup_env.sh requirements/test.txt) || exit
if [ "${1:-} ${2:-}" = "-m gpu" ]; then # one after the other: they measure
    unset OMP_NUM_THREADS
    exec "$python" -m pytest -n 0 "$@"
fi
step ruff "$python" -m ruff check .
step "ruff format" "$python" -m ruff format --check .
step import-linter "$python" -c 'import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports())'

# The lists above hold no spaces in their names.
# shellcheck disable=SC2046,SC2086
{
    step "tests without Paddle" env PYTHONPATH="$PWD/tests/no_paddle" \
        "$python" -m pytest -n "$cores" $once "$@"
    step "$(paddle_version "$python")" \
        "$python" -m pytest -n "$cores" $(ignored $once) "$@"
    step "$(paddle_version "$python"), instructions up to AVX2" env LK_ISA=1 \
        ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell \
        MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_DEBUG_CPU_TYPE=5 \
        "$python" -m pytest -n "$cores" -m "not slow" $(ignored $once) $numerical "$@"
    step "$(paddle_version "$python"), instructions up to SSE4" env LK_ISA=0 \
        ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \
        MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_DEBUG_CPU_TYPE=3 \
        "$python" -m pytest -n "$cores" -m "not slow" $(ignored $once) $numerical "$@"
    if [ -n "${GPU_WHEEL:-}" ]; then
        if python=$(unset PYTHON && VENV=.venv-gpu PADDLE=requirements.txt \
            sh setup_env.sh requirements/test.txt); then
            step "$(paddle_version "$python"), PyPI's GPU build" \
                "$python" -m pytest -n "$cores" $gpu_wheel "$@"
        else
            failed="$failed
    the environment with PyPI's GPU build of Paddle"
        fi
    fi
    if [ -z "${PYTHON:-}" ]; then
        if python=$(VENV=.venv-paddle2 PIP_CONSTRAINT=requirements/constraints-paddle2.txt \
            sh setup_env.sh requirements/test.txt requirements/page.txt); then
            step "$(paddle_version "$python")" \
                "$python" -m pytest -n "$cores" -m "not slow" $(ignored $once) "$@"
        else
            failed="$failed
    the environment with the oldest Paddle"
        fi
    fi
}

if [ -n "$failed" ]; then
    echo "== failed:$failed"
    exit 1
fi
echo "== all passed"
