"""The configuration, as PaddleViT's users import it: `from config import get_config`."""

from replknet_paddle.config import get_config, update_config

__all__ = ["get_config", "update_config"]
