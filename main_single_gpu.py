"""Train or evaluate RepLKNet on one device: a GPU where Paddle has one, else the CPU.

    python main_single_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet \\
        -batch_size=256 -eval -pretrained=./replknet_31b.pdparams

`-h` lists the flags; configs/ holds the recipes.
"""

import sys

from replknet_paddle.commands import run_command

if __name__ == "__main__":
    # The last of two equal flags wins, and this is about one process, whatever is asked for.
    sys.exit(run_command("train", [*sys.argv[1:], "-nproc=1"], prog="python main_single_gpu.py"))
