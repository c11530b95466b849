#!/bin/sh
# Make the environment that everything here runs in, and print the path of its Python.
#
#   sh setup_env.sh [REQUIREMENTS ...]      .venv with Paddle for this machine, and more files' worth
#   PYTHON=python3 sh setup_env.sh          an environment of yours that has Paddle: only checked
#   VENV=DIR sh setup_env.sh                another folder than .venv
#   PADDLE=FILE sh setup_env.sh             the Paddle of this requirements file
#   sh setup_env.sh --find                  make nothing: an environment that is there, or an error
#   sh setup_env.sh --paddle                print the pip command that installs Paddle for this machine
#
# Does nothing where the environment is up to date with the requirements files. Where there is a C++
# compiler (CXX, or c++, g++, clang++) the operators are compiled as well.
#
# Where nvidia-smi lists GPUs, the build of Paddle that fits them is installed from Paddle's own index
# (PADDLE_INDEX: another place of it) and tried on them. Where that fails, the reason is printed and
# Paddle for CPU is installed; CUDA_VISIBLE_DEVICES= asks for that at once.
set -eu
cd "$(dirname "$0")"
index=${PADDLE_INDEX:-https://www.paddlepaddle.org.cn/packages/stable}

# Paddle's builds: folder of the index, lowest and highest compute capability (x 10) that it has code
# for, oldest driver. docs/gpu.md has the same table, with sources.
BUILDS="cu118 60 86 450
cu126 70 90 525
cu129 80 129 525"

fail() {
    echo "error: $*" >&2
    exit 2
}

# The GPUs that are not hidden, a line each: compute capability, driver, name.
gpus() {
    case ${CUDA_VISIBLE_DEVICES-all} in '' | -*) return 0 ;; esac
    query="--query-gpu=compute_cap,driver_version,name --format=csv,noheader"
    # shellcheck disable=SC2086  # two words
    nvidia-smi ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"} $query 2>/dev/null ||
        nvidia-smi $query 2>/dev/null || true
}

# Sets `paddle`, what pip is to install. On a machine with GPUs that no build fits, `no_gpu` says why.
choose_paddle() {
    paddle="-r ${PADDLE:-requirements/cpu.txt}" no_gpu='' found=$(gpus)
    if [ -n "${PADDLE:-}" ] || [ -z "$found" ]; then
        return
    fi
    names=$(echo "$found" | awk -F', *' '!seen[$0]++ {
        printf "%s%s (%s)", separator, $3, $1; separator = ", " }')
    # shellcheck disable=SC2046  # three numbers
    set -- $(echo "$found" | awk -F', *' '$1 !~ /^[0-9]+\.[0-9]+$/ { exit }
        { x = int($1 * 10 + 0.5); if (x > high) high = x; if (!low || x < low) low = x; driver = $2 }
        END { if (low) print low, high, driver }')
    if [ $# -lt 3 ]; then
        no_gpu="nvidia-smi does not report compute capabilities; a newer driver does"
        return
    fi
    no_gpu="no build of Paddle has code for all of $names; CUDA_VISIBLE_DEVICES hides some"
    while read -r build lowest highest oldest_driver; do
        if [ "$1" -lt "$lowest" ] || [ "$2" -gt "$highest" ]; then
            continue
        fi
        no_gpu=
        if [ "${3%%.*}" -lt "$oldest_driver" ]; then
            no_gpu="driver $3 is too old for Paddle on $names; it needs $oldest_driver or later"
        else
            paddle="-r requirements/gpu.txt --extra-index-url $index/$build/"
        fi
        return
    done <<END
$BUILDS
END
}

# Install with the environment's pip; what it says is kept in the file $log.
pip_install() {
    "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@" \
        >"$log" 2>&1
}

# Paddle for CPU and for GPU are two packages with the same files.
uninstall_paddle() {
    "$venv/bin/python" -m pip uninstall --quiet --yes paddlepaddle paddlepaddle-gpu >/dev/null 2>&1
}

# Why the Python $1 does not compute on the GPUs of this machine, if there are any; else nothing.
why_no_gpu() {
    check='import sys; from replknet_paddle.runtime.packages import why_gpus_fail as why
sys.exit(why())'
    if [ -n "$(gpus)" ] && ! said=$("$1" -c "$check" 2>&1); then
        echo "$said" | tail -n 1
    fi
}

# The compiled operators, for the Python $1. Says so, and no more, if they cannot be built:
# everything works without. Does nothing where they are up to date.
compile_ops() {
    "$1" -m replknet_paddle build >&2 || true
}

if [ "${1:-}" = --paddle ]; then
    choose_paddle
    [ -z "$no_gpu" ] || echo "Paddle for CPU: $no_gpu" >&2
    echo "python3 -m pip install $paddle"
    exit 0
fi

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON=$PYTHON is no program"
    if [ "${1:-}" = --find ]; then
        command -v "$PYTHON"
        exit 0
    fi
    modules='paddle, yacs, yaml, numpy, PIL, tqdm'
    case "$*" in *demo*) modules="$modules, sklearn" ;; esac
    case "$*" in *test*) modules="$modules, sklearn, pytest, xdist, ruff, importlinter, mypy" ;; esac
    "$PYTHON" -c "import $modules" >&2 ||
        fail "PYTHON=$PYTHON lacks the package named above; install there what" \
            "requirements/common.txt ${*:-} list, or unset PYTHON to have" \
            "an environment made"
    reason=$(why_no_gpu "$PYTHON")
    [ -z "$reason" ] || fail "$reason. sh setup_env.sh --paddle prints the command that installs" \
        "another build there; CUDA_VISIBLE_DEVICES= does without the GPU"
    compile_ops "$PYTHON"
    command -v "$PYTHON"
    exit 0
fi

venv=${VENV:-$PWD/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
if [ "${1:-}" = --find ]; then
    if [ -x "$venv/bin/python" ]; then
        if [ -s "$venv/no-gpu" ] && [ -n "$(gpus)" ]; then
            fail "$venv has Paddle for CPU: $(cat "$venv/no-gpu"). When that is mended, type" \
                "sh setup_env.sh; CUDA_VISIBLE_DEVICES= in front of this command does without the GPU"
        fi
        echo "$venv/bin/python"
    elif python3 -c 'import paddle, yacs' >/dev/null 2>&1; then
        command -v python3
    else
        fail "no environment in $venv, and python3 has no Paddle; run sh setup_env.sh first, or" \
            "set PYTHON to a Python that has it"
    fi
    exit 0
fi

choose_paddle
if [ -z "$found" ] && [ -z "${PADDLE:-}" ] && [ -s "$venv/paddle" ]; then
    paddle=$(cat "$venv/paddle") # hidden GPUs change nothing: Paddle for GPU computes on CPU as well
fi
log=$venv/pip.log
wanted="$paddle $* $(cat requirements.txt requirements/*.txt pyproject.toml | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ] || [ -e "$venv/no-gpu" ]; then
    if [ ! -x "$venv/bin/python" ]; then
        base=
        for candidate in python3.13 python3.12 python3.11 python3.10 python3; do
            if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
                base=$candidate
                break
            fi
        done
        [ -n "$base" ] || fail "no Python 3.10 to 3.13 with its venv module found;" \
            "install one (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON to one that" \
            "has Paddle"
        echo "making $venv with $base" >&2
        "$base" -m venv "$venv"
    fi
    rm -f "$venv/installed" "$venv/no-gpu"
    [ "$(cat "$venv/paddle" 2>/dev/null || echo "$paddle")" = "$paddle" ] || uninstall_paddle
    case $paddle in
        *gpu.txt*)
            echo "installing $paddle into $venv" >&2
            # shellcheck disable=SC2086  # words
            if pip_install $paddle; then
                no_gpu=$(why_no_gpu "$venv/bin/python")
                [ -z "$no_gpu" ] || uninstall_paddle
            else
                no_gpu="pip could not install $paddle ($(grep '^ERROR' "$log" | tail -n 1))"
            fi
            ;;
    esac
    if [ -n "$no_gpu" ]; then
        echo "no GPU is used, but Paddle for CPU: $no_gpu" >&2
        echo "$no_gpu" > "$venv/no-gpu"
        paddle="-r requirements/cpu.txt"
    fi
    echo "installing $paddle requirements/common.txt $* into $venv" >&2
    requirements=
    for file in requirements/common.txt "$@"; do
        requirements="$requirements -r $file"
    done
    # shellcheck disable=SC2086  # words
    pip_install $paddle $requirements || fail "pip could not install all of that:" "$(cat "$log")"
    # The command `replknet`, of this very checkout.
    pip_install --no-build-isolation --no-deps --editable . ||
        fail "pip could not install this checkout into $venv:" "$(cat "$log")"
    echo "$paddle" > "$venv/paddle"
    echo "$wanted" > "$venv/installed"
    echo "to use it: . ${venv#"$PWD/"}/bin/activate" >&2
fi
compile_ops "$venv/bin/python"
echo "$venv/bin/python"
