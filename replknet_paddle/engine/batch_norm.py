"""Whether batch norm really is synchronized."""

from collections.abc import Callable

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.runtime.processes import rank, sum_over_ranks, world_size


@paddle.no_grad()
def check_synchronized(make_layer: Callable[[int], nn.Layer] = nn.SyncBatchNorm) -> None:
    """Normalize inputs that differ by rank, and stop where their statistics stay local.

    Paddle 3's `SyncBatchNorm` skips its reduction without an error where its communicator is not
    set up. Every rank must call this.

    Args:
        make_layer: channels -> the layer to check.

    Raises:
        RuntimeError: on all ranks alike.
    """
    layer = make_layer(1)
    layer.train()
    layer(paddle.full([2, 1, 4, 4], float(rank())))
    mean = (1 - layer._momentum) * (world_size() - 1) / 2  # of 0, 1, 2, ..., from a mean of 0
    is_local = not np.isclose(layer._mean.numpy()[0], mean, rtol=1e-3)
    if sum_over_ranks([is_local]).any():
        raise RuntimeError(
            f"MODEL.SYNC_BN: Paddle {paddle.__version__} computes batch statistics on each GPU by "
            "itself here, though asked to synchronize them, and says nothing; set MODEL.SYNC_BN "
            "False, or take another version of Paddle"
        )
