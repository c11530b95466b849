"""Gradients of half-precision weights, of a scaled loss, and over ranks that really run.

The networks are elementwise: a CPU has no half-precision matrix product.
"""

import numpy as np
import paddle
import pytest
from harness import finish_ranks
from paddle import nn

from replknet_paddle.optim.gradients import Gradients
from replknet_paddle.runtime import processes

pytestmark = pytest.mark.paddle_version


class Scale(nn.Layer):
    """x -> weight * x, in the weight's type."""

    def __init__(self, values, dtype="float32"):
        super().__init__()
        self.weight = self.create_parameter(
            [len(values)], default_initializer=nn.initializer.Assign(np.float32(values))
        )
        self.to(dtype=dtype)

    def forward(self, x):
        return x.astype(self.weight.dtype) * self.weight


class Mixed(nn.Layer):
    """A half-precision layer and, as batch norm under AMP O2, a float32 one."""

    def __init__(self, recompute=False):
        super().__init__()
        self.narrow = Scale([1.0, 2.0, 3.0], "bfloat16")
        self.wide = Scale([0.5, 0.25, 4.0])
        self.last = Scale([1.0, 1.0, 1.0], "bfloat16")
        self.recompute = recompute

    def forward(self, x):
        x = self.narrow(x)
        if self.recompute:
            from paddle.distributed.fleet.utils import recompute

            x = recompute(self.wide, x)
            return recompute(self.last, x)
        return self.last(self.wide(x))


def backward(model, gradients, values, scale=1.0):
    (model(paddle.to_tensor(np.float32(values))).astype("float32").sum() * scale).backward()
    gradients.collect()


def grads(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_all_gradients_are_float32_with_recompute_and_without(recompute):
    """Recompute runs backward passes within the backward pass."""
    model = Mixed(recompute)
    gradients = Gradients(model)
    backward(model, gradients, [1.0, 2.0, 3.0])
    assert gradients.finish() is None
    got = grads(model)
    assert {name: g.dtype for name, g in got.items()} == dict.fromkeys(got, paddle.float32)
    assert got["narrow.weight"].tolist() == [0.5, 0.5, 12]  # wide * x
    assert got["wide.weight"].tolist() == [1, 4, 9]
    assert got["last.weight"].tolist() == [0.5, 1, 36]


def test_half_precision_gradients_add_up_in_float32():
    """In bfloat16, with 8 bits, 256 + 1 is 256."""
    model = Scale([1.0, 1.0], "bfloat16")
    gradients = Gradients(model)
    backward(model, gradients, [256.0, 1.0])
    for _ in range(100):
        backward(model, gradients, [1.0, 1.0])
    gradients.finish()
    assert model.weight.grad.tolist() == [356, 101]
    model.clear_gradients()
    model.weight.clear_gradient(False)
    backward(model, gradients, [2.0, 3.0])  # the next step begins at 0
    gradients.finish()
    assert model.weight.grad.tolist() == [2, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("broken", [None, np.inf, np.nan, -np.inf])
def test_a_scaled_loss_is_unscaled_and_overflow_is_found(dtype, broken):
    model = nn.LayerList([Scale([1.0, 1.0], dtype), Scale([1.0, 1.0])])
    gradients = Gradients(model)
    for values in ([1.0, 2.0], [4.0, 8.0 if broken is None else broken]):
        x = paddle.to_tensor(np.float32(values))
        loss = (model[0](x).astype("float32") + model[1](paddle.ones([2]))).sum()
        (loss * 1024.0).backward()
        gradients.collect()
    finite = gradients.finish(1024.0)
    assert bool(finite) == (broken is None)
    assert model[1].weight.grad.tolist() == [2, 2]
    if broken is None:
        assert model[0].weight.grad.tolist() == [5, 10]


def gradients_of_ranks(arguments: list[str]) -> int:
    """Two steps on each rank; rank 1's gradients overflow in the second."""
    processes.init()
    model = Mixed()
    gradients = Gradients(model)
    backward(model, gradients, [1.0 + processes.rank(), 1.0, 1.0], scale=8.0)
    found = [float(gradients.finish(8.0))]
    values = {f"0/{name}": g.numpy() for name, g in grads(model).items()}
    for p in model.parameters():
        p.clear_gradient(False)
    backward(model, gradients, [np.inf if processes.rank() else 1.0, 1.0, 1.0], scale=8.0)
    found.append(float(gradients.finish(8.0)))
    np.savez(f"{arguments[0]}.{processes.rank()}.npz", found=found, **values)
    return 0


def test_ranks_share_their_gradients_and_what_overflowed(tmp_path):
    finish_ranks([tmp_path / "ranks"], target=gradients_of_ranks)
    first, second = (dict(np.load(tmp_path / f"ranks.{rank}.npz")) for rank in range(2))
    assert first["found"].tolist() == [1, 0]
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert first["0/narrow.weight"].tolist() == [0.75, 0.25, 4]  # wide * the mean of x
    assert first["0/wide.weight"].tolist() == [1.5, 2, 3]
