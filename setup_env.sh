#!/bin/sh
# Make the environment that everything here runs in, and print the path of its Python.
#
#   sh setup_env.sh [REQUIREMENTS ...]      .venv with Paddle for this machine, and more files' worth
#   PYTHON=python3 sh setup_env.sh          an environment of yours that has Paddle: only checked
#   VENV=DIR sh setup_env.sh                another folder than .venv
#   PADDLE=FILE sh setup_env.sh             the Paddle of this requirements file
#   sh setup_env.sh --find                  make nothing: an environment that is there, or an error
#
# Does nothing where the environment is up to date with the requirements files. Where there is a C++
# compiler (CXX, or c++, g++, clang++) the operators are compiled as well.
set -eu
cd "$(dirname "$0")"

fail() {
    echo "error: $*" >&2
    exit 2
}

# The compiled operators, for the Python $1. Says so, and no more, if they cannot be built:
# everything works without. Does nothing where they are up to date.
compile_ops() {
    "$1" -m replknet_paddle build >&2 || true
}

has_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# On a machine with a GPU that is not hidden: whether the GPU build of Paddle that the Python $1 has
# computes on it.
check_gpu() {
    case ${CUDA_VISIBLE_DEVICES-all} in '' | -*) return 0 ;; esac
    has_gpu || return 0
    "$1" -c 'import sys, paddle
if paddle.is_compiled_with_cuda():
    if not paddle.device.cuda.device_count():
        sys.exit("Paddle sees no GPU")
    paddle.utils.run_check()' >&2 ||
        fail "Paddle does not compute on this GPU; its message is above. PyPI has" \
            "paddlepaddle-gpu 2.6.2 alone, which needs CUDA 11.8 and cuDNN 8.6 of the system and" \
            "has machine code for compute capability 6.1 to 8.6 (Pascal to RTX 30xx). For others" \
            "(RTX 40xx, H100 and later), install paddlepaddle-gpu 3.x, which brings its CUDA" \
            "libraries: python3 -m pip install paddlepaddle-gpu -i" \
            "https://www.paddlepaddle.org.cn/packages/stable/cu126/ (or cu118, cu129), and set" \
            "PYTHON to that Python. CUDA_VISIBLE_DEVICES= does without the GPU"
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON=$PYTHON is no program"
    if [ "${1:-}" = --find ]; then
        command -v "$PYTHON"
        exit 0
    fi
    modules='paddle, yacs, yaml, numpy, PIL, tqdm, safetensors'
    case "$*" in *demo*) modules="$modules, sklearn" ;; esac
    case "$*" in *test*) modules="$modules, sklearn, pytest, xdist, ruff, importlinter" ;; esac
    "$PYTHON" -c "import $modules" >&2 ||
        fail "PYTHON=$PYTHON lacks the package named above; install there what" \
            "requirements/common.txt ${*:-} list, or unset PYTHON to have" \
            "an environment made"
    check_gpu "$PYTHON"
    compile_ops "$PYTHON"
    command -v "$PYTHON"
    exit 0
fi

venv=${VENV:-$PWD/.venv}
if [ "${1:-}" = --find ]; then
    if [ -x "$venv/bin/python" ]; then
        echo "$venv/bin/python"
    elif python3 -c 'import paddle, yacs' >/dev/null 2>&1; then
        command -v python3
    else
        fail "no environment in $venv, and python3 has no Paddle; run sh setup_env.sh first, or" \
            "set PYTHON to a Python that has it"
    fi
    exit 0
fi
if [ -n "${PADDLE:-}" ]; then
    paddle=$PADDLE
elif has_gpu; then
    paddle=requirements.txt
else
    paddle=requirements/cpu.txt
fi

wanted="$paddle $* $(cat requirements.txt requirements/*.txt pyproject.toml | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    if [ ! -x "$venv/bin/python" ]; then
        base=
        for candidate in python3.11 python3.12 python3.10 python3; do
            if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
                base=$candidate
                break
            fi
        done
        [ -n "$base" ] || fail "no Python 3.10, 3.11 or 3.12 with its venv module found;" \
            "install one (Debian: python3-venv), or set PYTHON to one that has Paddle"
        echo "making $venv with $base" >&2
        "$base" -m venv "$venv"
    fi
    set -- "$paddle" requirements/common.txt "$@"
    echo "installing $* into $venv" >&2
    requirements=
    for file in "$@"; do
        requirements="$requirements -r $file"
    done
    # shellcheck disable=SC2086  # names of files of this folder, without spaces
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $requirements >&2 ||
        fail "pip could not install $* into $venv; its message is above"
    # The command `replknet`, of this very checkout.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --no-build-isolation --no-deps --editable . >&2 ||
        fail "pip could not install this checkout into $venv; its message is above"
    check_gpu "$venv/bin/python"
    echo "$wanted" > "$venv/installed"
fi
compile_ops "$venv/bin/python"
case $venv in
    /*) echo "$venv/bin/python" ;;
    *) echo "$PWD/$venv/bin/python" ;;
esac
