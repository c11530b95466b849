#!/bin/sh
# Lint and test, on the newest and on the oldest Paddle that is supported.
#
#   sh run_tests.sh                  everything
#   PYTHON=python3 sh run_tests.sh   in an environment of yours alone
#
# Flags go to pytest: sh run_tests.sh -k merging
set -eu
cd "$(dirname "$0")"
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=1  # the tests themselves run in parallel

check() { # the environment whose Python is $1
    python=$1
    shift
    "$python" -c 'import paddle; print(f"== pytest on Paddle {paddle.__version__}")' 2>/dev/null
    "$python" -m pytest -n "$cores" "$@"
}

python=$(sh setup_env.sh requirements/test.txt)
echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "== import-linter"
"$python" -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())'
check "$python" "$@"
if [ -z "${PYTHON:-}" ]; then
    python=$(VENV=.venv-paddle2 PIP_CONSTRAINT=requirements/constraints-paddle2.txt \
        sh setup_env.sh requirements/test.txt requirements/page.txt)
    # The kernels by themselves know no Paddle: once is enough.
    check "$python" --ignore tests/ops/test_csrc.py "$@"
fi
