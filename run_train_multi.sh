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

set -- -cfg=./configs/replknet_31b.yaml -dataset=imagenet2012 -data_path=/dataset/imagenet \
    -amp "$@"
restarts=${MAX_RESTARTS:-0}
case $restarts in
    *[!0-9]* | '')
        echo "error: MAX_RESTARTS is $restarts; allowed: an integer >= 0" >&2
        exit 2
        ;;
esac
[ "$restarts" -gt 0 ] || exec "$PYTHON" main_multi_gpu.py "$@"

run= # the run folder: restarts have to know it
resumed=
previous=
for flag in "$@"; do
    case $flag in
        -output=* | --output=*) run=${flag#*=} ;;
        -resume=* | --resume=*) resumed=${flag#*=} ;;
    esac
    case $previous in
        -output | --output) run=$flag ;;
        -resume | --resume) resumed=$flag ;;
        -opts | --opts) break ;; # the rest are keys and values
    esac
    previous=$flag
done
if [ -z "$run" ] && [ -n "$resumed" ]; then
    if [ ! -d "$resumed" ]; then
        echo "error: with MAX_RESTARTS, -resume=$resumed needs the run folder as -output" >&2
        exit 2
    fi
    run=$resumed
    set -- "$@" -output="$run"
elif [ -z "$run" ]; then
    if [ "${NNODES:-1}" -gt 1 ]; then
        echo "error: with MAX_RESTARTS and several machines, name the run folder by -output" >&2
        exit 2
    fi
    run=output/train-$(date +%Y%m%d-%H%M%S)
    set -- "$@" -output="$run"
fi

say() {
    echo "$*"
    [ ! -d "$run" ] || echo "$(date '+%Y-%m-%d %H:%M:%S') run_train_multi.sh: $*" >> "$run/log.txt"
}

child=
trap '[ -z "$child" ] || kill -TERM "$child"' TERM
trap '[ -z "$child" ] || kill -INT "$child"' INT
done_restarts=0
failed_at=
auto=
while :; do
    "$PYTHON" main_multi_gpu.py "$@" $auto &
    child=$!
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not yet the child
        status=0
        wait "$child" || status=$?
    done
    case $status in 0 | 2 | 130 | 143) exit "$status" ;; esac

    step=none
    [ ! -f "$run/step" ] || step=$(tr -d ' ' < "$run/step")
    # A status above 128 is that of a process that was killed, which says nothing of the step.
    if [ "$status" -le 128 ] && [ "$step" = "$failed_at" ]; then
        say "failed with status $status at step $step for the second time; not restarting"
        exit "$status"
    fi
    if [ "$done_restarts" -ge "$restarts" ]; then
        say "failed with status $status at step $step; all $restarts restarts are used up"
        exit "$status"
    fi
    failed_at=killed
    [ "$status" -gt 128 ] || failed_at=$step
    done_restarts=$((done_restarts + 1))
    # A run that resumes another's checkpoint does so again, until it has one of its own.
    [ -n "$resumed" ] && [ ! -e "$run/last" ] || auto=-resume=auto
    say "failed with status $status at step $step; restart $done_restarts of $restarts"
done
