"""Train or evaluate RepLKNet on one device: a GPU where Paddle has one, else the CPU.

    python main_single_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet \\
        -batch_size=256 -eval -pretrained=./replknet_31b.pdparams

`-h` lists the flags; configs/ holds the recipes.
"""

import sys

from replknet_paddle.deploy import open_for_evaluation
from replknet_paddle.commands.train import main

if __name__ == "__main__":
    sys.exit(main(script=__file__, multi=False, open_network=open_for_evaluation))
