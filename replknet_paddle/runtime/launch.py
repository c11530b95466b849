"""Starting the processes of a run by `paddle.distributed.launch`, and learning how they ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from replknet_paddle.runtime.errors import SystemFault
from replknet_paddle.runtime.nodes import BEAT_SECONDS, Heartbeat, node_addresses
from replknet_paddle.runtime.parent import child_process
from replknet_paddle.runtime.processes import is_launched, rank, visible_devices

GRACE_SECONDS = 5  # for the processes of this machine to end, once another machine's have

# Path of the terminal that a run was started on, for rank 0 of several processes.
TERMINAL_VARIABLE = "REPLKNET_PADDLE_TERMINAL"

STATUS_FILE = "status"  # in the log folder of launched processes

# Paddle's launcher looks every second or two, and kills what is still there after three.
LAUNCHER_SECONDS = 30

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def launch(
    command: list[str],
    *,
    processes: int,
    log_dir: str,
    nodes: int = 1,
    master: str | None = None,
) -> tuple[int, str]:
    """Run a command in several processes of this machine, one per GPU or all on CPU.

    Args:
        command: program and arguments, the same for each.
        processes: how many on this machine.
        log_dir: where each process's output goes; rank 0's is shown as well.
        nodes: machines that take part; each starts its own launcher.
        master: HOST:PORT of one of them, where there are several. The parent folders of their log
            folders are then one folder, which they share.

    Returns:
        Exit status, and what there is to say about it: 0, that of the first process that failed,
        128 + the number of the signal that killed one, or 128 + that of a SIGTERM or SIGINT that
        this process received and handed on.

    Raises:
        InputError: the master's name does not resolve.
    """
    status_file = os.path.join(log_dir, STATUS_FILE)
    if os.path.exists(status_file):
        os.unlink(status_file)
    heartbeat = Heartbeat(log_dir) if nodes > 1 else None
    quiet = {"PYTHONWARNINGS": "ignore:No ccache found", "GLOG_minloglevel": "1"}  # Paddle's own
    environment = {**quiet, **os.environ}
    # The processes import this very package, wherever they are started and whatever is installed.
    paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if sys.stdout.isatty():
        environment[TERMINAL_VARIABLE] = os.ttyname(sys.stdout.fileno())
    if not visible_devices():
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
        # Paddle's launcher gives each process one of the devices listed here, and takes an empty
        # list for one device. -1 hides all GPUs of the machine.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * processes)
    launcher_command = [
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--log_level",
        "CRITICAL",  # what went wrong is reported here
        "--nproc_per_node",
        str(processes),
        "--log_dir",
        log_dir,
    ]
    if nodes > 1:
        address, own_address = node_addresses(master)
        launcher_command += ["--nnodes", str(nodes), "--master", address, "--host", own_address]
    # SIGTERM for both: a SIGINT may get lost while Paddle imports its launcher.
    with child_process([*launcher_command, *command], environment, handed_on=signal.SIGTERM) as (
        launcher,
        received,
    ):
        failure = wait_with_nodes(launcher, heartbeat)
        status = launcher.wait()
    if failure is not None and not received:
        return failure
    status, message = outcome(status, *read_status(status_file), received, log_dir)
    if heartbeat is not None:
        heartbeat.end(status, message)
    return status, message


def wait_with_nodes(
    launcher: subprocess.Popen, heartbeat: Heartbeat | None
) -> tuple[int, str] | None:
    """Wait until the launcher ends, or end it where another node has failed.

    Returns:
        That node's exit status, and what there is to say about it; None where none has failed.
    """
    failure = None
    while heartbeat is not None and failure is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(BEAT_SECONDS)
            return None
        failure = heartbeat.beat()
    if failure is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(GRACE_SECONDS)  # its processes may have noticed by themselves
        launcher.kill()  # they hang in a collective and end with it
    return failure


def outcome(
    status: int, left: int | None, message: str, received: list[int], log_dir: str
) -> tuple[int, str]:
    """What `launch` returns.

    Args:
        status: of Paddle's launcher.
        left, message: what a process of the run left.
        received: signals that were handed on.
    """
    if left in (1, 2):
        return left, message
    if received:
        # A run that finished all the same has not been stopped.
        return (0 if left == 0 else 128 + received[0]), message
    if status and left:
        return left, message
    number = killed_by(status)
    if number is None:
        return status, message
    by = f" by {signal_name(number)}"
    if number == signal.SIGTERM:
        # Nobody asked this run to stop: the launcher ended the process that it reports, after
        # another one that was killed, and does not say how.
        number, by = signal.SIGKILL, ""
    return 128 + number, (
        f"error: a process of this run was killed{by}; the output of each is in {log_dir}"
    )


def read_status(status_file: str) -> tuple[int | None, str]:
    """What a process of the run left as its exit status, if any, and its message."""
    try:
        with open(status_file, encoding="utf-8") as file:
            number, _, message = file.read().partition("\n")
    except FileNotFoundError:
        return None, ""
    return (int(number) if number else None), message


def killed_by(status: int) -> int | None:
    """The signal in the status of a launcher: its own, or that of the process that it reports,
    whose -9 it makes its own exit status."""
    if status < 0:
        return -status
    return 256 - status if status > 256 - signal.NSIG else None


def signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def leave_status(status: int, message: str = "") -> None:
    """Tell `launch` the exit status of this process, if it is the first of its run to fail, or
    the one of rank 0.

    Paddle's launcher ends the others and may then report theirs.

    Args:
        message: for the console, which shows what rank 0 writes and no other process.
    """
    folder = os.environ.get("PADDLE_LOG_DIR")
    if is_launched() and folder is not None and (status or rank() == 0):
        with (
            contextlib.suppress(OSError),
            open(os.path.join(folder, STATUS_FILE), "x", encoding="utf-8") as file,
        ):
            file.write(f"{status}\n{message if rank() else ''}")


class PeerLost(SystemFault):
    """Another process of this run has ended without leaving a status: it was killed."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is a collective's that has lost its connection to another process."""
    return is_launched() and isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def wait_to_be_ended() -> None:
    """Give Paddle's launcher the time to notice which process was killed, and to end this one.

    It reports the status of the first process that is not 0: this one must not be it.
    """
    if os.environ.get("PADDLE_LOG_DIR") is not None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        time.sleep(LAUNCHER_SECONDS)


def another_failed() -> bool:
    """Whether another process of this run has left a status."""
    folder = os.environ.get("PADDLE_LOG_DIR")
    return (
        is_launched() and folder is not None and os.path.exists(os.path.join(folder, STATUS_FILE))
    )
