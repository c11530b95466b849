#!/bin/sh
# Train RepLKNet-31B on ImageNet-1K by the official recipe, on every visible GPU.
#
#   sh run_train_multi.sh [FLAGS]    flags of main_multi_gpu.py; they win over those below
#   sh run_train_multi.sh -data_path=/data/imagenet -output=output/31b
#   sh run_train_multi.sh -resume=output/31b
#
# PYTHON names the Python to use; by default that of .venv, if setup_env.sh made one.
set -eu
cd "$(dirname "$0")"
[ -n "${PYTHON:-}" ] || PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=$(command -v "$PYTHON" || echo python3)
exec "$PYTHON" main_multi_gpu.py \
    -cfg=./configs/replknet_31b.yaml \
    -dataset=imagenet2012 \
    -data_path=/dataset/imagenet \
    -amp \
    "$@"
