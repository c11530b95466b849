"""From a checkpoint to fast inference: merging, folding, export, and backends to run the result."""

from deploy.backends import Backend, installed_backends, open_backend, open_for_evaluation
from deploy.export import export_model
from deploy.fold import folded, merged
from deploy.predictor import Predictor, inference_model
from deploy.sidecar import Sidecar

__all__ = [
    "Backend",
    "Predictor",
    "Sidecar",
    "export_model",
    "folded",
    "inference_model",
    "installed_backends",
    "merged",
    "open_backend",
    "open_for_evaluation",
]
