"""`load_pretrained` where version 0.2 had it; the next release has it in `replknet_paddle` only."""

from replknet_paddle.checkpoints.load import load_pretrained

__all__ = ["load_pretrained"]
