"""Starting the processes of a run by `paddle.distributed.launch`, and learning how they ended."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from replknet_paddle.runtime.errors import InputError, SystemFault
from replknet_paddle.runtime.parent import end_with_parent
from replknet_paddle.runtime.processes import is_launched, rank, visible_devices

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
        master: HOST:PORT of one of them, where there are several.

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
    quiet = {"PYTHONWARNINGS": "ignore:No ccache found", "GLOG_minloglevel": "1"}  # Paddle's own
    environment = {**quiet, **os.environ}
    # The processes import this very package, wherever they are started and whatever is installed.
    paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
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
    # A session of its own: Ctrl-C reaches it once, from here, and not its processes as well.
    launcher = subprocess.Popen(
        [*launcher_command, *command],
        env=environment,
        start_new_session=True,
        preexec_fn=functools.partial(end_with_parent, os.getpid()),
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
    left, message = read_status(status_file)
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


def node_addresses(master: str) -> tuple[str, str]:
    """The address of the master, and the one under which other nodes reach this machine.

    Paddle's launcher starts the server of `--master` only on the machine whose `--host` is the same
    text, and hands its own address, by default whatever its name resolves to, to the other nodes.
    Debian lets a machine's name mean 127.0.1.1, which is of no use to them.

    Args:
        master: HOST:PORT.

    Returns:
        ADDRESS:PORT and ADDRESS, equal addresses on the machine that MASTER means.

    Raises:
        InputError: a name that does not resolve.
    """
    host, port = master.rsplit(":", 1)
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise InputError(
            f"MASTER is {master}, and {host} does not resolve ({error}); allowed: HOST:PORT of one "
            "of the machines, by a name or an IPv4 address that all of them know"
        ) from None
    is_name = host != address
    if is_name and host != "localhost" and address.startswith("127."):
        address = outgoing_address("192.0.2.1") or address  # any address beyond this network
    if is_own_address(address):
        return f"{address}:{port}", address
    return f"{address}:{port}", outgoing_address(address) or address


def is_own_address(address: str) -> bool:
    """Whether this machine has this IPv4 address."""
    with socket.socket() as listener:
        try:
            listener.bind((address, 0))
        except OSError:
            return False
    return True


def outgoing_address(destination: str) -> str | None:
    """This machine's address on the way to another one; None without a route. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


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
