"""The last steps of both pipelines, normalizing and erasing, for a batch on the device it is on.

8-bit batches are a quarter of the size on their way from the workers through shared memory to the
device, and a device normalizes in no time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle

from replknet_paddle.data.device_copy import to_device
from replknet_paddle.data.transforms.erasing import noise_shape

_WHITE = np.array([255], np.float32)


class Unfinished(NamedTuple):
    """A sample before its last two steps.

    pixels: (H, W, 3) uint8.
    boxes: what to erase: (top, left, bottom, right) each; often none.
    seed: of what the boxes are filled with.
    """

    pixels: np.ndarray
    boxes: Sequence[tuple[int, int, int, int]] = ()
    seed: int = 0


class FinishBatch:
    """Normalize a batch and erase in it.

    Args:
        mean, std: three each, per RGB channel, in units of the [0, 1] scale.
        erase_mode: see `RandomErasing`.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], erase_mode: str):
        self.mean = np.asarray(mean, np.float32).reshape(3, 1, 1)
        self.std = np.asarray(std, np.float32).reshape(3, 1, 1)
        self.erase_mode = erase_mode
        self._constants: list[paddle.Tensor] = []  # 255, mean and std on the device, once used

    @paddle.no_grad()
    def __call__(
        self, pixels: paddle.Tensor, erasures: Sequence[tuple[int, Sequence[tuple], int]] = ()
    ) -> paddle.Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32; on CPU bit for bit what `normalize` gives.

        Args:
            erasures: (index in the batch, boxes, seed) of each image to erase in.
        """
        if not self._constants:
            self._constants = [paddle.to_tensor(c) for c in (_WHITE, self.mean, self.std)]
        white, mean, std = self._constants
        images = pixels.transpose([0, 3, 1, 2]).astype("float32")
        # By a tensor: Paddle 3.1 multiplies by the inverse of a number, which rounds differently.
        images = (images / white - mean) / std
        if not erasures:
            return images
        positions, values = self.fillings(erasures, *images.shape[2:])
        flat = images.reshape([-1]).scatter_(to_device(positions), to_device(values))
        return flat.reshape(images.shape)

    def fillings(
        self, erasures: Sequence[tuple[int, Sequence[tuple], int]], height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What to write where in a batch (N, 3, height, width), each place once.

        Returns:
            Places in the flat batch, int64; values, float32; both of one length.
        """
        positions, values = [], []
        for index, boxes, seed in erasures:
            rng = np.random.default_rng(seed)
            image = np.zeros((3, height, width), np.float32)
            is_erased = np.zeros((height, width), bool)
            for top, left, bottom, right in boxes:  # a later one covers those before it
                shape = noise_shape(self.erase_mode, bottom - top, right - left)
                noise = rng.standard_normal(shape, np.float32) if shape else 0.0
                image[:, top:bottom, left:right] = noise
                is_erased[top:bottom, left:right] = True
            where = np.flatnonzero(np.broadcast_to(is_erased, image.shape))
            positions.append(where + index * image.size)
            values.append(image.reshape(-1)[where])
        return np.concatenate(positions), np.concatenate(values)
