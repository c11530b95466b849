"""RepLKNet (arXiv 2203.06717) in PaddlePaddle: networks with convolution kernels up to 31x31.

    import replknet_paddle

    replknet_paddle.list_models("*384*")
    model = replknet_paddle.get_model("replknet-31b-1k-224", pretrained=True)
    model = replknet_paddle.get_model("output/RUN")  # or a checkpoint file, or an export folder

What is listed in `__all__` is imported when it is first used, so that `import replknet_paddle`
takes no time.
"""

import importlib
from typing import TYPE_CHECKING

from replknet_paddle.runtime.packages import refuse_other_paddles

refuse_other_paddles()

__version__ = "0.2.0"

_PLACES = {
    "build_replknet": "replknet_paddle.model",
    "get_config": "replknet_paddle.config",
    "get_model": "replknet_paddle.deploy",
    "inference_model": "replknet_paddle.deploy",
    "list_models": "replknet_paddle.zoo",
    "load_pretrained": "replknet_paddle.checkpoints.load",
}

if TYPE_CHECKING:  # the same for editors and type checkers
    from replknet_paddle.checkpoints.load import load_pretrained
    from replknet_paddle.config import get_config
    from replknet_paddle.deploy import get_model, inference_model
    from replknet_paddle.model import build_replknet
    from replknet_paddle.zoo import list_models
else:

    def __getattr__(name: str):
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_PLACES[name]), name)


__all__ = [
    "__version__",
    "build_replknet",
    "get_config",
    "get_model",
    "inference_model",
    "list_models",
    "load_pretrained",
]


def __dir__() -> list[str]:
    return sorted(__all__)
