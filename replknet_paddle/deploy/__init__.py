"""From a checkpoint to fast inference: merging, folding, export, and backends to run the result."""

from replknet_paddle.deploy.backends import (
    Backend,
    get_model,
    installed_backends,
    open_backend,
    open_for_evaluation,
)
from replknet_paddle.deploy.export import ModelInfo, export_model
from replknet_paddle.deploy.fold import folded, merged
from replknet_paddle.deploy.predict import Predictor, inference_model

__all__ = [
    "Backend",
    "ModelInfo",
    "Predictor",
    "export_model",
    "folded",
    "get_model",
    "inference_model",
    "installed_backends",
    "merged",
    "open_backend",
    "open_for_evaluation",
]
