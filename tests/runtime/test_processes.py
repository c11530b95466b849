"""Seeds, buckets, and sums over processes that really run."""

import contextlib
import os
import socket

import numpy as np
import paddle
import pytest
from harness import finish_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet_paddle.runtime import processes
from replknet_paddle.runtime.machines import is_launched
from replknet_paddle.runtime.processes import onednn_may_use_bfloat16

pytestmark = pytest.mark.paddle_version


def checks(arguments: list[str]) -> int:
    """What each of several ranks finds."""
    count = int(arguments[0])
    assert is_launched()
    processes.init()
    assert processes.world_size() == count and 0 <= processes.rank() < count
    mean_rank = (count - 1) / 2
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as listener:
            if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                device = listener.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
                assert device.rstrip(b"\0") == b"lo", listener.getsockname()

    def check(got, wanted, what):
        got = np.asarray(got)
        wanted = np.broadcast_to(wanted, got.shape)
        assert np.allclose(got, wanted, rtol=1e-6), (processes.rank(), what, got, wanted)

    # sums: any shape, in float64, the same everywhere
    for shape in ((), (1,), (3,), (2, 3), (2, 1, 4)):
        own = np.arange(np.prod(shape)).reshape(shape) + 10.0 * processes.rank()
        total = processes.sum_over_ranks(own)
        assert total.shape == shape and total.dtype == np.float64, (shape, total)
        check(total, count * (own - 10 * processes.rank() + 10 * mean_rank), shape)
    large = processes.sum_over_ranks(np.array([2**40 + 1, 1], dtype="int64"))
    assert large.tolist() == [count * (2**40 + 1), count], large
    kept = np.ones(2)
    processes.sum_over_ranks(kept)
    assert kept.tolist() == [1, 1]

    # averages: dtypes and shapes mixed, in many buckets and in one
    for bucket_bytes in (1, 40, 10**9):
        processes.BUCKET_BYTES = bucket_bytes
        kinds = [
            *(([2, 3], "float32"), ([5], "float32"), ([], "float32")),
            *(([4], "float64"), ([1, 1, 2], "float64"), ([3], "float32"), ([64], "float32")),
        ]
        tensors = [
            paddle.full(shape, i + 1 + processes.rank(), dtype)
            for i, (shape, dtype) in enumerate(kinds)
        ]
        same = list(tensors)
        processes.average_over_ranks(tensors)
        for i, (tensor, before) in enumerate(zip(tensors, same)):
            assert tensor is before
            check(tensor.numpy(), i + 1 + mean_rank, (bucket_bytes, i))
        assert [(t.shape, str(t.numpy().dtype)) for t in tensors] == kinds
    processes.average_over_ranks([])

    # parameters and their gradients, in place, and still trainable afterwards
    processes.BUCKET_BYTES = 20
    layer = paddle.nn.Linear(3, 2)
    for parameter in layer.parameters():
        parameter.set_value(np.full(parameter.shape, processes.rank(), dtype="float32"))
    processes.average_over_ranks(list(layer.parameters()))
    for parameter in layer.parameters():
        check(parameter.numpy(), mean_rank, "parameter")
        assert not parameter.stop_gradient and parameter.is_leaf
    layer(paddle.full([1, 3], 1.0 + processes.rank())).sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    processes.average_over_ranks(gradients)
    check(layer.weight.grad.numpy(), 1 + mean_rank, "gradient")
    check(layer.bias.grad.numpy(), 1, "gradient of the bias")
    optimizer = paddle.optimizer.SGD(1.0, parameters=layer.parameters())
    optimizer.step()
    check(layer.weight.numpy(), mean_rank - 1 - mean_rank, "weight after a step")

    # statistics of batch norm
    norm = paddle.nn.BatchNorm2D(2)
    norm._mean.set_value(np.full(2, processes.rank(), dtype="float32"))
    processes.average_over_ranks([norm._mean, norm._variance])
    check(norm._mean.numpy(), mean_rank, "mean")
    check(norm._variance.numpy(), 1, "variance")
    return 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), max_size=5), st.lists(st.integers(0, 2**40), max_size=5))
def test_a_seed_is_31_bits_and_depends_on_every_number_and_their_order(first, second):
    """On zeros at the end, too: numpy's own seeds do not."""
    for numbers in (first, [*first, 0], second):
        seed = processes.random_seed(*numbers)
        assert type(seed) is int and 0 <= seed < 2**31
        assert (seed == processes.random_seed(*first)) == (numbers == first)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12), st.integers(1, 400))
def test_buckets_keep_order_dtype_and_size(kinds, limit):
    tensors = [paddle.zeros([n], "float64" if wide else "float32") for n, wide in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "BUCKET_BYTES", limit)
        buckets = list(processes.buckets(tensors))
    assert [id(t) for bucket in buckets for t in bucket] == [id(t) for t in tensors]
    sizes = [[t.size * t.element_size() for t in bucket] for bucket in buckets]
    for bucket, size in zip(buckets, sizes):
        assert len({t.dtype for t in bucket}) == 1
        assert sum(size) <= limit or len(bucket) == 1
    for bucket, after, size, next_size in zip(buckets, buckets[1:], sizes, sizes[1:]):
        # None ends too early.
        assert after[0].dtype != bucket[0].dtype or sum(size) + next_size[0] > limit


def test_alone_nothing_is_exchanged():
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert processes.sum_over_ranks(np.array([1, 2])).tolist() == [1.0, 2.0]
    assert processes.sum_over_ranks(3).dtype == np.float64
    tensor = paddle.to_tensor([1.0, 2.0])
    processes.average_over_ranks([tensor])
    assert tensor.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_add_up_and_agree(tmp_path, ranks):
    finish_ranks([ranks], folder=tmp_path, ranks=ranks, target=checks)


@pytest.mark.parametrize(
    "largest, may",
    [("", True), ("DEFAULT", True), ("ALL", True), ("AVX512_CORE_BF16", True), ("avx2", False)]
    + [("AVX512_CORE_AMX", True), ("AVX10_1_512", True), ("AVX512_CORE", False), ("AVX", False)]
    + [("AVX2_VNNI_2", False), ("SSE41", False), ("AVX512_CORE_VNNI", False)],
)
def test_a_limit_of_onednns_instructions_may_exclude_bfloat16(largest, may):
    assert onednn_may_use_bfloat16({"ONEDNN_MAX_CPU_ISA": largest} if largest else {}) == may
