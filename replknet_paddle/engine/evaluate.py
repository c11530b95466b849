"""The evaluation loop."""

from collections.abc import Callable

import paddle

from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.precision import Precision
from replknet_paddle.ops import cache_weights


@paddle.no_grad()
def evaluate(
    *,
    model: paddle.nn.Layer,
    inference: Callable,
    loader: Loader,
    precision: Precision,
    sums,
    progress: Callable,
):
    """Metrics of `model` over the loaders of all processes.

    Args:
        model: left in evaluation mode.
        inference: images (N, 3, H, W) -> what `sums` takes; `model` itself, or a way to use it.
        loader: this process's share of the images; shares may differ in length.
        precision: how the network computes.
        sums: empty sums of the metrics, such as `MetricSums`.
        progress: (loader, desc=text) -> the same batches, showing how far it is.

    Returns:
        The total of `sums` over all processes.
    """
    model.eval()
    with cache_weights(model):
        for images, labels in progress(loader, desc="evaluation"):
            with precision.autocast():
                outputs = inference(images)
            sums.add(outputs, labels)
    return sums.total()
