#!/bin/sh
# Train RepLKNet-31B on ImageNet-1K by the official recipe, on every visible GPU.
#
#   sh run_train_multi.sh [FLAGS]    flags of main_multi_gpu.py; they win over those below
#   sh run_train_multi.sh -data_path=/data/imagenet -output=output/31b
#   sh run_train_multi.sh -resume=output/31b
#
# Several machines, the same command on each, with a run folder that they share:
#   NNODES=4 MASTER=10.0.0.1:8090 sh run_train_multi.sh -output=/shared/31b
# NPROC_PER_NODE is the number of processes on this machine; by default one for each visible GPU.
#
# MAX_RESTARTS=N goes on from the newest whole checkpoint, up to N times, when the run fails or one of
# its processes is killed; one that fails twice at the same step stops. Bad input, SIGTERM and SIGINT
# are not restarted.
#
# PYTHON names the Python to use; by default that of .venv, if setup_env.sh made one.
set -eu
cd "$(dirname "$0")"
PYTHON=$(PYTHON=${PYTHON:-} sh ./setup_env.sh --find) || exit 2

exec "$PYTHON" main_multi_gpu.py \
    -cfg=./configs/replknet_31b.yaml \
    -dataset=imagenet2012 \
    -data_path=/dataset/imagenet \
    -amp \
    "$@"
