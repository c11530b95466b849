"""The processes of one run: rank, device and what it can, sums over ranks, seeds.

Works alike in one process, in several on CPU (gloo) and on GPUs (NCCL), over one machine or many:
`paddle.distributed.launch` starts the processes and tells each its rank in the environment.
"""

import contextlib
import io
import os
import socket
import sys
from collections.abc import Iterator

import numpy as np
import paddle
import paddle.distributed as dist

from replknet_paddle.runtime.machines import (
    interfaces,
    name_attempt,
    processes_on_this_machine,
    processor_has,
)

# Gradients travel in pieces of about this many bytes: large enough to be efficient, small enough
# that the copy that a piece needs does not count beside the model.
BUCKET_BYTES = 64 * 2**20

DETERMINISTIC_FLAGS = {
    "FLAGS_cudnn_deterministic": True,  # convolutions and batch norm
    "FLAGS_embedding_deterministic": 1,  # sums of gathered rows
    "FLAGS_cudnn_exhaustive_search": False,  # which may choose another algorithm each time
}


_deterministic = False


def is_deterministic() -> bool:
    """Return whether `init` was asked for the same bits each time."""
    return _deterministic


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """Return how many processes this run has."""
    return dist.get_world_size()


def init(*, deterministic: bool = False) -> None:
    """Choose this process's device and connect the processes, where there are several.

    `deterministic` lets GPUs use only algorithms that give the same bits each time, where Paddle
    has a choice.
    """
    global _deterministic
    _deterministic = deterministic
    paddle.set_device("gpu" if visible_devices() else "cpu")
    if deterministic and on_gpu():
        paddle.set_flags(DETERMINISTIC_FLAGS)
    if world_size() > 1:
        name_attempt()
        is_local = processes_on_this_machine() == world_size() and sys.platform == "linux"
        address = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
        interface = "lo" if is_local else interfaces().get(address)
        if interface is not None:
            # Else gloo looks up this machine's name, which may mean 127.0.1.1, or nothing.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # Paddle lists the flags that its own launcher has set.
        with contextlib.redirect_stderr(io.StringIO()):
            dist.init_parallel_env()
        if is_local:
            close_to_other_machines()


def close_to_other_machines() -> None:
    """Let the sockets that this process listens on hear of this machine alone: Paddle's store
    listens on all addresses."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as listener:
            if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")


def on_gpu() -> bool:
    """Return whether this process computes on a GPU."""
    return paddle.device.get_device().startswith("gpu")


def supports_bfloat16(device: str) -> bool:
    """Return whether "cpu", or this process's "gpu", computes in bfloat16: Paddle only warns of a
    GPU that does not, and oneDNN emulates it several times slower than float32, or fails."""
    if device == "gpu":
        return paddle.device.cuda.get_device_capability() >= (8, 0)  # Ampere
    return processor_has("avx512_bf16") and onednn_may_use_bfloat16()


def onednn_may_use_bfloat16(environment=os.environ) -> bool:
    """Return whether ONEDNN_MAX_CPU_ISA leaves bfloat16 to oneDNN, where the processor has it."""
    largest = environment.get("ONEDNN_MAX_CPU_ISA", "").upper()
    is_avx512_without = largest in ("AVX512_CORE", "AVX512_CORE_VNNI")
    return not (is_avx512_without or largest.startswith(("SSE", "AVX2")) or largest == "AVX")


def visible_devices() -> int:
    """Return the number of GPUs that this process may use; 0 on a machine without."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """Return the sum of each rank's float64 `values` (any one shape), the same on every rank."""
    values = np.asarray(values, dtype="float64")
    if world_size() == 1:
        return values
    total = paddle.to_tensor(values)
    dist.all_reduce(total)
    return total.numpy()


def text_of_rank_0(text: str) -> str:
    """Return rank 0's `text` on every rank. The texts of the others are ignored."""
    if world_size() == 1:
        return text
    content = np.frombuffer(text.encode() if rank() == 0 else b"", "uint8")
    shared = np.zeros(int(sum_over_ranks([len(content)])[0]))
    shared[: len(content)] = content
    return sum_over_ranks(shared).astype("uint8").tobytes().decode()


def sum_on_device(values: list[paddle.Tensor | float]) -> paddle.Tensor:
    """Return the sums over the ranks of numbers and scalar tensors, float64, on the device: nothing
    waits for it."""
    # By `full`, not by `to_tensor`, which would wait for all that a GPU has queued.
    scalars = [
        value.astype("float64").reshape([])
        if isinstance(value, paddle.Tensor)
        else paddle.full([], value, "float64")
        for value in values
    ]
    total = paddle.stack(scalars)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


@paddle.no_grad()
def average_over_ranks(
    tensors: list[paddle.Tensor], *, divisor: float | None = None
) -> list[paddle.Tensor]:
    """Replace each tensor, in place, by its mean over the ranks, divided by `divisor`. The lists
    must be alike.

    Return the few 1-D buffers, all that was averaged, whose memory the tensors then share; none
    where there was nothing to do, as in one process without a divisor.
    """
    if world_size() == 1 and divisor is None:
        return []
    flats = []
    for bucket in buckets(tensors):
        flat = flatten(bucket)
        if world_size() > 1:
            dist.all_reduce(flat)
        flat = flat / (world_size() * (divisor or 1.0))
        pieces = [flat] if len(bucket) == 1 else paddle.split(flat, [t.size for t in bucket])
        for tensor, piece in zip(bucket, pieces):
            # No copy: the tensor lets go of its memory and takes over that of the piece, whose
            # Python object has to live as long as what `get_tensor` gives.
            piece = piece.reshape(tensor.shape)
            tensor.get_tensor()._share_data_with(piece.get_tensor())
        flats.append(flat)
    return flats


def flatten(tensors: list[paddle.Tensor]) -> paddle.Tensor:
    """Return a new 1-D tensor of all values of some tensors of one dtype."""
    return paddle.concat([tensor.reshape([-1]) for tensor in tensors])


def buckets(tensors: list[paddle.Tensor]) -> Iterator[list[paddle.Tensor]]:
    """Yield runs of tensors of one dtype, of about BUCKET_BYTES each."""
    bucket, size = [], 0
    for tensor in tensors:
        tensor_bytes = tensor.size * tensor.element_size()
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor_bytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor_bytes
    if bucket:
        yield bucket


def random_seed(*numbers: int) -> int:
    """Return a 31-bit seed that depends on all of `numbers` (each >= 0) and on their order."""
    # With their count in front: alone, numpy takes (7,) and (7, 0) for the same.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0]) >> 1
