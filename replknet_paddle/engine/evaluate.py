"""The evaluation loop."""

from collections.abc import Callable

import paddle

from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.metrics import Metrics, MetricSums
from replknet_paddle.engine.precision import Precision


@paddle.no_grad()
def evaluate(
    *, model: paddle.nn.Layer, loader: Loader, precision: Precision, progress: Callable
) -> Metrics:
    """Metrics of `model` over the loaders of all processes.

    Args:
        model: images (N, 3, H, W) -> logits (N, classes); left in evaluation mode.
        loader: this process's share of the images; shares may differ in length.
        precision: how the network computes.
        progress: (loader, desc=text) -> the same batches, showing how far it is.
    """
    model.eval()
    sums = MetricSums()
    for images, labels in progress(loader, desc="evaluation"):
        with precision.autocast():
            logits = model(images)
        sums.add(logits, labels)
    return sums.total()
