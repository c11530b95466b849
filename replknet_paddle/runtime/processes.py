"""Processes of one run: who am I, start together, add up, agree.

Works alike in one process, in several on CPU (gloo) and on GPUs (NCCL), over one machine or many:
`paddle.distributed.launch` starts the processes and tells each its rank in the environment.
"""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import paddle
import paddle.distributed as dist

# Gradients travel in pieces of about this many bytes: large enough to be efficient, small enough
# that the copy that a piece needs does not count beside the model.
BUCKET_BYTES = 64 * 2**20

STATUS_FILE = "status"  # in the log folder of launched processes


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """How many processes this run has."""
    return dist.get_world_size()


def is_launched() -> bool:
    """Whether `paddle.distributed.launch` started this process."""
    return "PADDLE_TRAINERS_NUM" in os.environ


def init() -> None:
    """Choose this process's device and connect the processes, where there are several."""
    paddle.set_device("gpu" if visible_devices() else "cpu")
    if world_size() > 1:
        dist.init_parallel_env()


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return paddle.device.get_device().startswith("gpu")


def visible_devices() -> int:
    """GPUs that this process may use; 0 on a machine without."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def launch(
    script: str,
    arguments: list[str],
    *,
    processes: int,
    log_dir: str,
    nodes: int = 1,
    master: str | None = None,
) -> int:
    """Run `script` in several processes of this machine, one per GPU or all on CPU.

    Args:
        processes: how many on this machine.
        log_dir: where each process's output goes; rank 0's is shown as well.
        nodes: machines that take part; each starts its own launcher.
        master: HOST:PORT of one of them, where there are several.

    Returns:
        Exit status: 0, that of the first process that failed, or 128 + the number of a SIGTERM or
        SIGINT that this process received and handed on.
    """
    status_file = os.path.join(log_dir, STATUS_FILE)
    if os.path.exists(status_file):
        os.unlink(status_file)
    quiet = {"PYTHONWARNINGS": "ignore:No ccache found", "GLOG_minloglevel": "1"}  # Paddle's own
    environment = {**quiet, **os.environ}
    if not visible_devices():
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
    command = [
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--log_level",
        "WARNING",
        "--nproc_per_node",
        str(processes),
        "--log_dir",
        log_dir,
    ]
    if nodes > 1:
        command += ["--nnodes", str(nodes), "--master", master]
    # A session of its own: Ctrl-C reaches it once, from here, and not its processes as well.
    launcher = subprocess.Popen(
        [*command, script, *arguments], env=environment, start_new_session=True
    )
    received = []

    def hand_on(number, _):
        received.append(number)
        launcher.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    left = None
    if os.path.exists(status_file):
        with open(status_file, encoding="utf-8") as file:
            number, _, message = file.read().partition("\n")
        left = int(number) if number else None
        if message:
            print(message, file=sys.stderr)
    if received and left not in (1, 2):
        return 128 + received[0]
    if status and left is not None:
        return left
    return status if status >= 0 else 128 - status


def leave_status(status: int, message: str = "") -> None:
    """Tell `launch` the exit status of this process, if it is the first of its run to fail.

    Paddle's launcher ends the others and may then report theirs.

    Args:
        message: for the console, which shows what rank 0 writes and no other process.
    """
    folder = os.environ.get("PADDLE_LOG_DIR")
    if status and is_launched() and folder is not None:
        with (
            contextlib.suppress(OSError),
            open(os.path.join(folder, STATUS_FILE), "x", encoding="utf-8") as file,
        ):
            file.write(f"{status}\n{message if rank() else ''}")


def another_failed() -> bool:
    """Whether another process of this run has left a status."""
    folder = os.environ.get("PADDLE_LOG_DIR")
    return (
        is_launched() and folder is not None and os.path.exists(os.path.join(folder, STATUS_FILE))
    )


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """The sum of each rank's float64 `values` (any one shape), the same on every rank."""
    values = np.asarray(values, dtype="float64")
    if world_size() == 1:
        return values
    total = paddle.to_tensor(values)
    dist.all_reduce(total)
    return total.numpy()


@paddle.no_grad()
def average_over_ranks(tensors: list[paddle.Tensor]) -> None:
    """Replace each tensor, in place, by its mean over the ranks. The lists must be alike."""
    if world_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = paddle.concat([tensor.reshape([-1]) for tensor in bucket])
        dist.all_reduce(flat)
        flat = flat / world_size()
        pieces = paddle.split(flat, [tensor.size for tensor in bucket])
        for tensor, piece in zip(bucket, pieces):
            paddle.assign(piece.reshape(tensor.shape), output=tensor)


def _buckets(tensors: list[paddle.Tensor]):
    """Runs of tensors of one dtype, of about BUCKET_BYTES each."""
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
    """A 31-bit seed that depends on all of `numbers` (each >= 0) and on their order."""
    # With their count in front: alone, numpy takes (7,) and (7, 0) for the same.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0]) >> 1
