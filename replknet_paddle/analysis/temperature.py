"""The one temperature by which a classifier's logits become probabilities that fit labelled images:
temperature scaling (Guo et al., arXiv 1706.04599, section 4.2).

The mean negative log likelihood of the labels is convex in 1 / temperature, so the minimum is the
root of its derivative: the mean over images of the expected logit less the label's.
"""

import numpy as np

from replknet_paddle.config_keys import TEMPERATURES
from replknet_paddle.runtime.errors import InputError

IMAGES_AT_ONCE = 1024  # in float64


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature at which labels (N,) are the most likely by logits (N, classes), by
    Newton's method between bounds, in float64; InputError: there is none that MODEL.TEMPERATURE
    may be."""
    lowest, highest = (statistics(logits, labels, each)[1].mean() for each in TEMPERATURES)
    if not highest < 0 < lowest:
        why = "the lower, the better" if lowest <= 0 else "the higher, the better"
        why = "the network's outputs are not finite" if np.isnan(lowest) else why
        raise InputError(
            f"no temperature from {TEMPERATURES[0]} to {TEMPERATURES[1]} fits these images: {why}. "
            "Allowed: images of which the network gets some wrong, and whose classes have higher "
            "logits than others on average"
        )
    high, low, inverse = 1 / TEMPERATURES[0], 1 / TEMPERATURES[1], 1.0
    for _ in range(100):
        _, slope, curvature, _ = statistics(logits, labels, 1 / inverse).mean(axis=1)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        with np.errstate(divide="ignore", invalid="ignore"):  # where all probabilities are 0 or 1
            step = slope / curvature
        if abs(step) <= 1e-11 * inverse:  # the error is about its square
            break
        inverse = inverse - step if low < inverse - step < high else (low * high) ** 0.5
    return float(1 / inverse)


def statistics(logits: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Return (4, N) float64, of each image at a temperature: the negative log likelihood in nats,
    its first and second derivative by 1 / temperature, and the largest probability."""
    parts = []
    for start in range(0, len(labels), IMAGES_AT_ONCE):
        x = logits[start : start + IMAGES_AT_ONCE].astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        own = np.take_along_axis(x, labels[start : start + IMAGES_AT_ONCE, None], axis=1)[:, 0]
        shares = np.exp(x / temperature)
        total = shares.sum(axis=1)
        shares /= total[:, None]
        mean = (shares * x).sum(axis=1)
        spread = (shares * (x - mean[:, None]) ** 2).sum(axis=1)
        parts.append([np.log(total) - own / temperature, mean - own, spread, 1 / total])
    return np.concatenate(parts, axis=1)
