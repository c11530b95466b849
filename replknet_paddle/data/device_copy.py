"""Copies of arrays on the device that this process computes on."""

from collections import deque

import numpy as np
import paddle

from replknet_paddle.runtime.processes import on_gpu

# Pinned memory that a GPU may still be reading, with the event that it records afterwards. Paddle's
# allocator would give it to the next array as soon as its tensor is gone.
_in_flight: deque[tuple[paddle.Tensor, object]] = deque()


def to_device(array: np.ndarray) -> paddle.Tensor:
    """A copy of `array` on the device; the array may be overwritten at once.

    For a GPU it goes through pinned memory: the copy takes its turn among the kernels that are
    queued, and this process does not wait for them, as it does in `paddle.to_tensor`.
    """
    if not on_gpu():
        return paddle.to_tensor(array)
    pinned = paddle.to_tensor(array, place=paddle.CUDAPinnedPlace())
    tensor = pinned.cuda(blocking=False)
    event = paddle.device.cuda.Event()
    event.record()
    _in_flight.append((pinned, event))
    while _in_flight and _in_flight[0][1].query():
        _in_flight.popleft()
    return tensor
