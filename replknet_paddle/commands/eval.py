"""Evaluate -pretrained on every visible device, each image exactly once.

`replknet train -eval` does the same.
"""

from replknet_paddle.commands import train
from replknet_paddle.commands.train import add_arguments

__all__ = ["add_arguments", "run"]

EXAMPLES = """\
example: replknet eval -pretrained=output/RUN/best -data_path=data/digits --report report
"""


def run(args) -> int:
    args.eval = True
    args.argv = ["-eval", *args.argv]  # for the processes that are started
    return train.run(args)
