"""The evaluation loop."""

from collections.abc import Callable

import paddle

from engine.metrics import Metrics, MetricSums


@paddle.no_grad()
def evaluate(*, model: paddle.nn.Layer, loader: paddle.io.DataLoader, autocast: Callable,
             progress: Callable) -> Metrics:
    """Metrics of `model` over the loaders of all processes.

    Args:
        model: images (N, 3, H, W) -> logits (N, classes); left in evaluation mode.
        loader: this process's share of the images; shares may differ in length.
        autocast: makes the context that the network runs in (mixed precision, or none).
        progress: (loader, desc=text) -> the same batches, showing how far it is.
    """
    model.eval()
    sums = MetricSums()
    for images, labels in progress(loader, desc='evaluation'):
        with autocast():
            logits = model(images)
        sums.add(logits, labels)
    return sums.total()
