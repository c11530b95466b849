#!/bin/sh
# Evaluate RepLKNet-31B on the 50,000 validation images of ImageNet-1K, on every visible GPU.
#
#   sh run_eval_multi.sh [FLAGS]     flags of main_multi_gpu.py; they win over those below
#   sh run_eval_multi.sh -cfg=configs/replknet_xl.yaml -pretrained=replknet_xl.pdparams
#
# NNODES, MASTER and NPROC_PER_NODE as for run_train_multi.sh.
# PYTHON names the Python to use; by default that of .venv, if setup_env.sh made one.
set -eu
cd "$(dirname "$0")"
[ -n "${PYTHON:-}" ] || PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=$(command -v "$PYTHON" || echo python3)
exec "$PYTHON" main_multi_gpu.py \
    -cfg=./configs/replknet_31b.yaml \
    -dataset=imagenet2012 \
    -batch_size=256 \
    -data_path=/dataset/imagenet \
    -eval \
    -pretrained=./replknet_31b.pdparams \
    -amp \
    "$@"
