"""Where a classifier looks for a class: Grad-CAM, and its map laid over the picture."""

import contextlib
from collections.abc import Iterator

import numpy as np
import paddle
from PIL import Image

from replknet_paddle.data.transforms.pipelines import EvalTransform
from replknet_paddle.deploy.drawing import fitted, overlay
from replknet_paddle.model import RepLKNet

LAST_STRIDE = 32  # pixels of the network's input for a position of its last stage
SHOWN_PIXELS = (384, 1600)  # least and most of a heat map's longer side


@contextlib.contextmanager
def last_features(network: RepLKNet) -> Iterator[list[paddle.Tensor]]:
    """Yield a list to which each forward pass of `network`, while this is open, appends the output
    of the last stage: maps (N, C, H / 32, W / 32), rounded up."""
    features: list[paddle.Tensor] = []
    stage = network.stages[-1]
    hook = stage.register_forward_post_hook(lambda _, inputs, output: features.append(output))
    try:
        yield features
    finally:
        hook.remove()


@paddle.no_grad()
def grad_cam(network: RepLKNet, features: paddle.Tensor, labels: np.ndarray) -> np.ndarray:
    """Return what speaks for a class where, by Grad-CAM (arXiv 1610.02391) on the output of the
    last stage in evaluation mode.

    Grad-CAM weighs each channel of a map by the mean, over positions, of the gradient of a class's
    logit, sums the channels and keeps what is positive (equations 1 and 2 of the paper). Behind the
    last stage there are only batch norm, a mean over positions and a linear layer here, so these
    gradients are the same for every image and are known: for channel k of a map of h x w positions,

        head.weight[k, class] * norm.weight[k] / sqrt(norm._variance[k] + epsilon) / (h * w)

    No backward pass is needed, and the map costs no more than the prediction.

    Args:
        network: a classifier.
        features: of `last_features`, (N, C, h, w), in any floating-point type.
        labels: the class of each map, (N,) int64.

    Returns:
        Maps (N, h, w), float32, >= 0, in units of the logit; all zeros where nothing does.
    """
    norm, features = network.norm, features.astype("float32")
    scale = norm.weight / paddle.sqrt(norm._variance + norm._epsilon)
    positions = features.shape[2] * features.shape[3]
    of_labels = paddle.gather(network.head.weight, paddle.to_tensor(labels), axis=1)  # (C, N)
    weights = of_labels.T.astype("float32") * scale / positions
    return paddle.nn.functional.relu((features * weights[:, :, None, None]).sum(axis=1)).numpy()


def heat_over(picture: Image.Image, heat: np.ndarray, transform: EvalTransform) -> Image.Image:
    """Return a picture, RGB, with a map of `grad_cam`, (h, w), over what the network saw of it, and
    the rest pale, at the picture's own resolution within `SHOWN_PIXELS`.

    All convolutions of stride 2 have odd kernels and the same padding on either side. So position i
    of the map is centred on the network's pixel 32 i, and the first one on the edge, not on the
    middle of 32 pixels. Between positions, strengths are interpolated linearly.
    """
    left, top, right, bottom = transform.region(*picture.size)
    longer = min(max(max(picture.size), SHOWN_PIXELS[0]), SHOWN_PIXELS[1])
    shown = fitted(picture, (longer, longer)) if longer != max(picture.size) else picture

    def along(length: int, shown_length: int, start: float, end: float, positions: int):
        """For each pixel shown along an axis: the weights of the positions, and whether the network
        saw it."""
        place = (np.arange(shown_length) + 0.5) * length / shown_length  # in the picture's pixels
        place = (place - start) / (end - start) * transform.image_size  # in the network's
        at = (place - 0.5) / LAST_STRIDE
        weights = [np.interp(at, np.arange(positions), one) for one in np.eye(positions)]
        return np.stack(weights, axis=1), (place >= 0) & (place < transform.image_size)

    rows, rows_seen = along(picture.height, shown.height, top, bottom, heat.shape[0])
    columns, columns_seen = along(picture.width, shown.width, left, right, heat.shape[1])
    strength = rows @ (heat / max(heat.max(), np.finfo(np.float32).tiny)) @ columns.T
    return overlay(shown, strength, rows_seen[:, None] & columns_seen)
