"""The network, as PaddleViT's users import it: `from replknet import build_replknet`."""

from replknet_paddle.model import RepLKNet, build_replknet

__all__ = ["RepLKNet", "build_replknet"]
