#!/bin/sh
# Make the environment that everything here runs in, and print the path of its Python.
#
#   sh setup_env.sh [REQUIREMENTS ...]      .venv with Paddle for this machine, and more files' worth
#   PYTHON=python3 sh setup_env.sh          an environment of yours that has Paddle: only checked
#   VENV=DIR sh setup_env.sh                another folder than .venv
#
# Does nothing where the environment is up to date with the requirements files.
set -eu
cd "$(dirname "$0")"

fail() {
    echo "error: $*" >&2
    exit 2
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON=$PYTHON is no program"
    "$PYTHON" -c 'import paddle, yacs, yaml, numpy, PIL, tqdm' >&2 ||
        fail "PYTHON=$PYTHON lacks a package named above; pip install -r requirements-common.txt" \
             "yacs numpy pillow there, or unset PYTHON to have an environment made"
    command -v "$PYTHON"
    exit 0
fi

venv=${VENV:-.venv}
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    paddle=requirements.txt
else
    paddle=requirements-cpu.txt
fi

wanted="$paddle $* $(cat requirements*.txt constraints*.txt | cksum)"
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
    set -- "$paddle" "$@"
    echo "installing $* into $venv" >&2
    requirements=
    for file in "$@"; do
        requirements="$requirements -r $file"
    done
    # shellcheck disable=SC2086  # names of files of this folder, without spaces
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $requirements >&2 ||
        fail "pip could not install $* into $venv; its message is above"
    echo "$wanted" > "$venv/installed"
fi
echo "$PWD/$venv/bin/python"
