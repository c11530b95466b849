"""Magnitudes of the large kernels, from weights alone."""

import numpy as np

from replknet_paddle.model import ReparamLargeKernelConv, RepLKNet


def kernel_magnitudes(model: RepLKNet) -> list[np.ndarray]:
    """How strong each position of each stage's large kernels is.

    Args:
        model: a merged network (`structural_reparam`): a kernel then includes its small kernel and
            the scales of batch normalization.

    Returns:
        For each stage, (K, K) float64: the mean absolute weight over channels and blocks, divided
        by the largest value.

    Raises:
        ValueError: the network is not merged.
    """
    stages = []
    for stage in model.stages:
        layers = [m for m in stage.sublayers() if isinstance(m, ReparamLargeKernelConv)]
        if not all(hasattr(layer, "large_kernel_reparam") for layer in layers):
            raise ValueError("the network is not merged; call structural_reparam() first")
        weights = [layer.large_kernel_reparam.weight.numpy() for layer in layers]
        magnitude = np.abs(np.concatenate(weights).astype(np.float64)).mean(axis=(0, 1))
        stages.append(magnitude / max(magnitude.max(), np.finfo(np.float64).tiny))
    return stages
