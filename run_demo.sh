#!/bin/sh
# From nothing to a trained, merged and exported RepLKNet and its predictions, in a few minutes on a
# CPU.
#
# Trains configs/replknet_nano.yaml on the 1,797 handwritten digits of scikit-learn, written out in
# ImageNet's list-file layout, with the main and the flags that ImageNet uses.
set -eu
cd "$(dirname "$0")"
python=$(sh setup_env.sh requirements/demo.txt)

run=output/demo-$(date +%Y%m%d-%H%M%S)
accuracy() { # of the run folder $1: its last top-1, e.g. 98.06 % (353/360)
    sed -n 's/.*top-1 \([0-9.]* % ([0-9/]*)\).*/\1/p' "$1/log.txt" | tail -n 1
}

echo "== data"
"$python" -m replknet_paddle make-digits data/digits -overwrite

echo "== train"
"$python" main_multi_gpu.py -cfg=configs/replknet_nano.yaml -data_path=data/digits -output="$run"

echo "== evaluate the saved checkpoint"
"$python" main_multi_gpu.py -eval -pretrained="$run/last" -data_path=data/digits \
    -output="$run/reloaded"

echo "== merge the small kernels into the large ones, and evaluate that"
"$python" -m replknet_paddle merge "$run/last" -output="$run/merged.safetensors"
"$python" main_multi_gpu.py -eval -pretrained="$run/merged.safetensors" -data_path=data/digits \
    -output="$run/merged" -opts MODEL.SMALL_KERNEL_MERGED True

echo "== export, and classify 12 of the 360 digits with what was exported"
"$python" -m replknet_paddle export "$run/last" -output="$run/exported"
"$python" -m replknet_paddle predict "$run/exported" data/digits/val/*/12[0-5]?.png \
    -output="$run/predictions.csv" -save_grid="$run/predictions.png"

trained=$(accuracy "$run")
reloaded=$(accuracy "$run/reloaded")
merged=$(accuracy "$run/merged")
echo "== top-1 on 360 digits that the network has not seen"
echo "trained:  $trained"
echo "reloaded: $reloaded"
echo "merged:   $merged"
if [ "$reloaded" != "$trained" ] || [ "$merged" != "$trained" ]; then
    echo "error: these should be equal" >&2
    exit 1
fi
