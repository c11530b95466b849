"""Starting the processes of a run by `paddle.distributed.launch`, and learning how they ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from replknet_paddle.runtime.cores import processes_on_this_machine
from replknet_paddle.runtime.errors import SystemFault
from replknet_paddle.runtime.nodes import BEAT_SECONDS, Heartbeat, check_port, node_addresses
from replknet_paddle.runtime.parent import child_process
from replknet_paddle.runtime.processes import is_launched, rank, visible_devices

GRACE_SECONDS = 5  # for the processes of this machine to end, once another machine's have

# Path of the terminal that a run was started on, for rank 0 of several processes.
TERMINAL_VARIABLE = "REPLKNET_PADDLE_TERMINAL"

STATUS_FILE = "status"  # in the log folder of launched processes

# Paddle's launcher looks every second or two, and kills what is still there after three.
LAUNCHER_SECONDS = 30

# `python -m paddle.distributed.launch`, without a line for each request of its client, without the
# output of a process that has failed once more, and without a traceback where a signal ends its
# wait for other machines.
LAUNCHER = """
import logging, sys
logging.getLogger("httpx").setLevel(logging.WARNING)
from paddle.distributed.launch.job.container import Container
from paddle.distributed.launch.main import launch
Container.tail = lambda *_, **__: None
try:
    launch()
except AssertionError as error:
    if "No container" not in str(error):
        raise
    sys.exit(1)
"""


def launch(
    command: list[str],
    *,
    processes: int,
    log_dir: str,
    nodes: int = 1,
    master: str | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> tuple[int, str]:
    """Run a command in several processes of this machine, one per GPU or all on CPU.

    Args:
        command: program and arguments, the same for each.
        processes: how many on this machine.
        log_dir: where each process's output goes; rank 0's is shown as well.
        nodes: machines that take part; each starts its own launcher.
        master: HOST:PORT of one of them, where there are several. The parent folders of their log
            folders are then one folder, which they share.
        note: called with what there is to say of the end, unless rank 0 has noted it itself.

    Returns:
        Exit status, and what there is to print about it, unless a process whose output is shown
        has printed it itself: 0, that of the first process that failed,
        128 + the number of the signal that killed one, or 128 + that of a SIGTERM or SIGINT that
        this process received and handed on.

    Raises:
        InputError: the master's name does not resolve, or another program has its port.
    """
    status_file = os.path.join(log_dir, STATUS_FILE)
    if os.path.exists(status_file):
        os.unlink(status_file)
    heartbeat = None
    quiet = {"PYTHONWARNINGS": "ignore:No ccache found", "GLOG_minloglevel": "1"}  # Paddle's own
    environment = {**quiet, **os.environ}
    if sys.stdout.isatty():
        environment[TERMINAL_VARIABLE] = os.ttyname(sys.stdout.fileno())
    if not visible_devices():
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
        # Paddle's launcher gives each process one of the devices listed here, and takes an empty
        # list for one device. -1 hides all GPUs of the machine.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * processes)
    launcher_command = [
        sys.executable,
        "-c",
        LAUNCHER,
        "--log_level",
        "CRITICAL",  # what went wrong is reported here
        "--nproc_per_node",
        str(processes),
        "--log_dir",
        log_dir,
    ]
    if nodes > 1:
        address, own_address = node_addresses(master)
        check_port(address)
        launcher_command += ["--nnodes", str(nodes), "--master", address, "--host", own_address]
        heartbeat = Heartbeat(log_dir, nodes=nodes, master=address, address=own_address)
    # SIGTERM for both: a SIGINT may get lost while Paddle imports its launcher.
    with child_process([*launcher_command, *command], environment, handed_on=signal.SIGTERM) as (
        launcher,
        received,
    ):
        failure = wait_with_nodes(launcher, heartbeat)
        status = launcher.wait()
    left, is_shown, its_message = read_status(status_file)
    if failure is not None and not left and not received:
        note(failure[1])
        return failure
    status, message = outcome(status, left, its_message, received, log_dir)
    note(message)
    if heartbeat is not None:
        heartbeat.end(status, message)
    return status, "" if is_shown and message == its_message else message


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


def read_status(status_file: str) -> tuple[int | None, bool, str]:
    """What a process of the run left as its exit status, if any, whether its output is shown, and
    its message."""
    try:
        with open(status_file, encoding="utf-8") as file:
            number, _, message = file.read().partition("\n")
    except FileNotFoundError:
        return None, False, ""
    status, _, rank_here = number.partition(" ")
    return (int(status) if status else None), rank_here == "0", message


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
        message: for the log, in which rank 0 has it already, and for the console, which shows what
            the first process of this machine writes and no other.
    """
    folder = os.environ.get("PADDLE_LOG_DIR")
    if is_launched() and folder is not None and (status or rank() == 0):
        with (
            contextlib.suppress(OSError),
            open(os.path.join(folder, STATUS_FILE), "x", encoding="utf-8") as file,
        ):
            rank_here = os.environ.get("PADDLE_RANK_IN_NODE", "0")
            file.write(f"{status} {rank_here}\n{message if rank() else ''}")


class PeerLost(SystemFault):
    """The connection to another process of this run is lost, which has left no status: it was
    killed, or has not answered for half a minute."""


GLOO_ERROR = re.compile(r"\[\S*gloo/transport[^\]]*\] (.*)")


def lost_peer(error: BaseException) -> PeerLost | None:
    """What to raise for the error of a collective that has lost its connection; None for others."""
    found = GLOO_ERROR.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None or not is_launched():
        return None
    return PeerLost(
        "the connection to another process of this run is lost: it has ended, or has not answered "
        f"for 30 s (gloo: {found[1].strip()})"
    )


def wait_to_be_ended() -> None:
    """Give Paddle's launcher the time to notice which process was killed, and to end this one.

    It reports the status of the first process that is not 0: this one must not be it. Where all of
    this machine's are there, the one that is lost is another machine's.
    """
    if os.environ.get("PADDLE_LOG_DIR") is not None and not all_are_running():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        time.sleep(LAUNCHER_SECONDS)


def all_are_running() -> bool:
    """Whether all processes that Paddle's launcher has started on this machine are. Linux only."""
    running = 0
    for path in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                running += state not in "ZX"
    return running == processes_on_this_machine()


def another_failed() -> bool:
    """Whether another process of this run has left a status."""
    folder = os.environ.get("PADDLE_LOG_DIR")
    return (
        is_launched() and folder is not None and os.path.exists(os.path.join(folder, STATUS_FILE))
    )
