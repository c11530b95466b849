"""Starting the processes of a run by `paddle.distributed.launch`, and learning how they ended."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from replknet_paddle.runtime.processes import is_launched, rank, visible_devices

STATUS_FILE = "status"  # in the log folder of launched processes

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def launch(
    command: list[str],
    *,
    processes: int,
    log_dir: str,
    nodes: int = 1,
    master: str | None = None,
) -> int:
    """Run a command in several processes of this machine, one per GPU or all on CPU.

    Args:
        command: program and arguments, the same for each.
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
    # The processes import this very package, wherever they are started and whatever is installed.
    paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if not visible_devices():
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
    launcher_command = [
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
        launcher_command += ["--nnodes", str(nodes), "--master", master]
    # A session of its own: Ctrl-C reaches it once, from here, and not its processes as well.
    launcher = subprocess.Popen(
        [*launcher_command, *command], env=environment, start_new_session=True
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
