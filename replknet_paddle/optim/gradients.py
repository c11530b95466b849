"""The gradients of one optimizer step: summed over its backward passes, averaged over the ranks.

Three departures from `loss.backward(); optimizer.step()` of Paddle:

- Half-precision weights (AMP O2) have half-precision gradients. They are added up in float32 here,
  after every backward pass. Paddle's own `master_grad` does so by a hook that runs at the end of a
  backward pass and is then gone: the nested backward passes of recompute use it up.
- Paddle's `GradScaler` reads on the host whether a gradient overflowed, and every `adamw` kernel
  of such a step reads it again. Here this is one number on the device, for the caller to read.
- Gradients travel and are checked in a few flat buffers instead of tensor by tensor.
"""

import paddle
from paddle import nn

from replknet_paddle.runtime.processes import average_over_ranks, buckets, flatten, world_size

HALF_TYPES = (paddle.float16, paddle.bfloat16)


class Gradients:
    """The gradients of the trainable parameters of `model`.

    Half-precision parameters are those that are so at the first `collect`.
    """

    def __init__(self, model: nn.Layer):
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        self.half_buckets: list[list[paddle.Tensor]] | None = None
        self.sums: list[paddle.Tensor] = []  # float32, one for each of half_buckets

    @paddle.no_grad()
    def collect(self) -> None:
        """Take the half-precision gradients of a backward pass; call after each one."""
        if self.half_buckets is None:
            half = [p for p in self.parameters if p.dtype in HALF_TYPES and p.grad is not None]
            self.half_buckets = list(buckets(half))
        new = [flatten([p.grad for p in bucket]).astype("float32") for bucket in self.half_buckets]
        for bucket in self.half_buckets:
            for parameter in bucket:
                parameter.clear_gradient(False)
        self.sums = [a + b for a, b in zip(self.sums, new)] if self.sums else new

    @paddle.no_grad()
    def finish(self, loss_scale: float | None = None) -> paddle.Tensor | None:
        """Average over the ranks and divide by `loss_scale`; an optimizer step may follow.

        Afterwards all gradients are float32, those of half-precision parameters included. Return
        whether all are finite, a bool scalar on the device, the same on all ranks, which have the
        same sums; None without a loss scale.
        """
        half = {id(p) for bucket in self.half_buckets or () for p in bucket}
        full = [p.grad for p in self.parameters if id(p) not in half and p.grad is not None]
        flats = []
        if world_size() > 1 or loss_scale is not None:
            flats = average_over_ranks(full, divisor=loss_scale or 1.0)
            flats += average_over_ranks(self.sums, divisor=loss_scale or 1.0)
        for bucket, flat in zip(self.half_buckets or (), self.sums):
            pieces = paddle.split(flat, [p.size for p in bucket])
            for parameter, piece in zip(bucket, pieces):
                # Without the underscore Paddle copies, through a stream that all others wait for.
                parameter.grad_ = piece.reshape(parameter.shape)
        self.sums = []
        if loss_scale is None:
            return None
        return paddle.stack([paddle.isfinite(flat).all() for flat in flats]).all()
