"""Train or evaluate RepLKNet on every visible device.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet \\
        -batch_size=256 -eval -pretrained=./replknet_31b.pdparams -amp
    CUDA_VISIBLE_DEVICES=0,1 python main_multi_gpu.py ...      two of the GPUs
    python main_multi_gpu.py ... -nproc 2                      two processes on CPU

It starts itself in each process by way of `paddle.distributed.launch`, and may be started by that
as well. `-h` lists the flags; configs/ holds the recipes.
"""

import sys

from replknet_paddle.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:], prog="python main_multi_gpu.py"))
