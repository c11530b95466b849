"""From an image of any size to the class probabilities of its pixels.

Whole or by sliding windows, at one scale or several, with or without mirror images: the official
evaluation (mmsegmentation 0.x). Logits are resized to the image's own size before softmax, and
probabilities of scales and mirror images are averaged.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.segmentation.data import Box, resized_size
from replknet_paddle.segmentation.upernet import resize


def build_inference(config, network: Callable) -> Callable:
    """Return the function of normalized images (N, 3, H, W) that gives the probabilities of their
    classes, (N, num_classes, H, W) float32, as `config` says.

    Args:
        network: images (N, 3, h, w) -> logits (N, num_classes, h, w).
    """
    settings, crop_size = config.SEGMENTATION, config.DATA.IMAGE_SIZE
    turns = (False, True) if settings.EVAL_FLIP else (False,)

    @paddle.no_grad()
    def probabilities(images: paddle.Tensor) -> paddle.Tensor:
        size = images.shape[2:]
        total = 0
        for ratio in settings.EVAL_RATIOS:
            new_size = resized_size(size, settings.RESIZE, ratio)
            resized = images
            if new_size != tuple(size):
                resized = resize(images, new_size, align_corners=False)
            for mirrored in turns:
                turned = resized.flip(3) if mirrored else resized
                logits = image_logits(network, turned, crop_size, settings.SLIDE_STRIDE)
                if logits.shape[2:] != size:
                    logits = resize(logits, size, align_corners=settings.ALIGN_CORNERS)
                shares = F.softmax(logits, axis=1)
                total = total + (shares.flip(3) if mirrored else shares)
        return total / (len(settings.EVAL_RATIOS) * len(turns))

    return probabilities


def image_logits(
    network: Callable, images: paddle.Tensor, crop_size: int, stride: int | None
) -> paddle.Tensor:
    """Return logits at the size of the images, float32; where windows overlap, their average."""
    if stride is None:
        return network(images).astype("float32")
    height, width = images.shape[2:]
    counts = np.zeros((1, 1, height, width), np.float32)
    total = None
    for top, left, bottom, right in windows(height, width, crop_size, stride):
        logits = network(images[:, :, top:bottom, left:right]).astype("float32")
        if total is None:
            total = paddle.zeros([*logits.shape[:2], height, width])
        total[:, :, top:bottom, left:right] += logits
        counts[:, :, top:bottom, left:right] += 1
    return total / paddle.to_tensor(counts)


def windows(height: int, width: int, side: int, stride: int) -> Iterator[Box]:
    """Yield boxes (top, left, bottom, right) that cover an image, row by row: `side` x `side`
    pixels, less where the image is smaller; the last of a row or column ends with the image."""
    for bottom in _ends(height, side, stride):
        for right in _ends(width, side, stride):
            yield max(bottom - side, 0), max(right - side, 0), bottom, right


def _ends(length: int, side: int, stride: int) -> Sequence[int]:
    steps = -(-max(length - side, 0) // stride)
    return [min(side + i * stride, length) for i in range(steps + 1)]
