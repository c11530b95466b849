"""`load_pretrained` where version 0.2 had it; from the next release on, `replknet_paddle` has it."""

from replknet_paddle.checkpoints.load import load_pretrained

__all__ = ["load_pretrained"]
