"""Processes of a run: started by Paddle's launcher or again after a failure, and how they ended.

Exit statuses, of a training command, of its processes and of `LaunchedRun`:

    0           done
    1           failed: diverged, a fault of the system, or an error with a traceback
    2           bad input
    130, 143    stopped by SIGINT or SIGTERM, which were handed on; the run has been saved
    128 + N     another signal N killed a process

`run_with_restarts` starts a run again after 1 and after a killed process alone. This module does
not import Paddle, which takes seconds.
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from replknet_paddle.runtime.errors import PeerLost
from replknet_paddle.runtime.machines import (
    BEAT_SECONDS,
    STOPPED,
    Heartbeat,
    check_port,
    is_launched,
    node_addresses,
    processes_on_this_machine,
)
from replknet_paddle.runtime.terminal import escaped

FINAL = (0, 2, *STOPPED)  # the same again would not help, or is not wanted

GRACE_SECONDS = 5  # for the processes of this machine to end, once another machine's have

# Paddle's launcher looks every second or two, and kills what is still there after three.
LAUNCHER_SECONDS = 30
ENDING_SECONDS = 2

# Path of the terminal that a run was started on, for rank 0 of several processes.
TERMINAL_VARIABLE = "REPLKNET_PADDLE_TERMINAL"

STATUS_FILE = "status"  # in the log folder of launched processes

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

_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

# Looked up here, because between fork and exec as little as possible may be called.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])

_GLOO_ERROR = re.compile(r"\[\S*gloo/transport[^\]]*\] (.*)")


# ---- a process that ends with this one


def end_with_parent(parent: int | None = None) -> None:
    """Let the system kill this process as soon as its parent has ended, which it may have already
    where its id is given. On Linux alone."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent not in (None, os.getppid()):
            os._exit(1)


@contextlib.contextmanager
def child_process(
    command: list[str], environment: dict[str, str], *, handed_on: int | None = None
) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """Run a command, in this context, that ends with this process; yield it and the list of the
    signals that come. It gets `handed_on`, or the same, for each SIGTERM and SIGINT."""
    # It imports this very package, wherever it is started and whatever is installed.
    paths = [_PACKAGE_PARENT, *filter(None, [environment.get("PYTHONPATH")])]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
    child, received = None, []

    def hand_on(number, _):
        received.append(number)
        if child is not None:
            child.send_signal(handed_on or number)

    # Before it is started: Python loses a KeyboardInterrupt of that moment.
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # A session of its own: Ctrl-C reaches it once, from here, and not by the terminal as well.
        child = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )
        if received:
            child.send_signal(handed_on or received[0])
        yield child, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- several processes


class LaunchedRun:
    """One run in several processes of this machine, one per GPU or all on CPU.

    The output of each process goes to `log_dir`; rank 0's is shown as well. Of several machines,
    `nodes`, each starts its own launcher; `master` is HOST:PORT of one of them, and the folder
    above `log_dir` one that they share.

    Raises:
        InputError: the master's name does not resolve, or another program has its port.
    """

    def __init__(
        self,
        command: list[str],
        *,
        processes: int,
        log_dir: str,
        on_gpu: bool,
        nodes: int = 1,
        master: str | None = None,
    ):
        self.log_dir = log_dir
        self.status_file = Path(log_dir, STATUS_FILE)
        self.heartbeat = None
        # Paddle's own notes.
        quiet = {"PYTHONWARNINGS": "ignore:No ccache found", "GLOG_minloglevel": "1"}
        self.environment = {**quiet, **os.environ}
        if sys.stdout.isatty():
            self.environment[TERMINAL_VARIABLE] = os.ttyname(sys.stdout.fileno())
        if not on_gpu:
            self.environment["PADDLE_DISTRI_BACKEND"] = "gloo"
            # Paddle's launcher gives each process one of the devices listed here, and takes an
            # empty list for one device. -1 hides all GPUs of the machine.
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * processes)
        self.command = [sys.executable, "-c", LAUNCHER]
        self.command += ["--log_level", "CRITICAL"]  # what went wrong is reported here
        self.command += ["--nproc_per_node", str(processes), "--log_dir", log_dir]
        if nodes > 1:
            address, own_address = node_addresses(master)
            check_port(address)
            self.command += ["--nnodes", str(nodes), "--master", address, "--host", own_address]
            self.heartbeat = Heartbeat(log_dir, nodes=nodes, master=address, address=own_address)
        self.command += command

    def wait(self, note: Callable[[str], None] = lambda message: None) -> tuple[int, str]:
        """Start the processes, hand signals on to them, and wait for their end.

        Return the exit status of the first process that failed, else as the table above has it, and
        what there is to print about it, unless a process whose output is shown has done so. `note`
        is called with what there is to say of the end, unless rank 0 has noted it itself.
        """
        self.status_file.unlink(missing_ok=True)
        # SIGTERM for both: a SIGINT may get lost while Paddle imports its launcher.
        with child_process(self.command, self.environment, handed_on=signal.SIGTERM) as (
            launcher,
            received,
        ):
            failure = self._wait_with_nodes(launcher)
            status = launcher.wait()
        left, is_shown, its_message = self._read_status()
        if failure is not None and not left and not received:
            note(failure[1])
            return failure
        status, message = self._outcome(status, left, its_message, received)
        note(message)
        if self.heartbeat is not None:
            self.heartbeat.end(status, message)
        return status, "" if is_shown and message == its_message else message

    def _wait_with_nodes(self, launcher: subprocess.Popen) -> tuple[int, str] | None:
        """Wait until the launcher ends, or end it and return status and message of a node that has
        failed."""
        failure = None
        while self.heartbeat is not None and failure is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(BEAT_SECONDS)
                return None
            failure = self.heartbeat.beat()
        if failure is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(GRACE_SECONDS)  # its processes may have noticed by themselves
            launcher.kill()  # they hang in a collective and end with it
        return failure

    def _read_status(self) -> tuple[int | None, bool, str]:
        """Return the exit status that a process left, whether its output is shown, its message."""
        if not self.status_file.exists():
            return None, False, ""
        number, _, message = self.status_file.read_text(encoding="utf-8").partition("\n")
        status, _, rank_here = number.partition(" ")
        return (int(status) if status else None), rank_here == "0", message

    def _outcome(
        self, status: int, left: int | None, message: str, received: list[int]
    ) -> tuple[int, str]:
        """Return the exit status and the message of the run, from the status of Paddle's launcher,
        what a process of the run left, and the signals that were handed on."""
        if left in (1, 2):
            return left, message
        if received:
            # A run that finished all the same has not been stopped.
            return (0 if left == 0 else 128 + received[0]), message
        if status and left:
            return left, message
        # The signal that ended the launcher, or the process that it reports, whose -9 it makes its
        # own exit status.
        number = -status if status < 0 else 256 - status
        if number not in {*signal.Signals}:
            return status, message
        by = f" by signal {number} ({signal.Signals(number).name})"
        if number == signal.SIGTERM:
            # Nobody asked this run to stop: the launcher ended the process that it reports, after
            # another one that was killed, and does not say how.
            number, by = signal.SIGKILL, ""
        return 128 + number, (
            f"error: a process of this run was killed{by}; the output of each is in {self.log_dir}"
        )


# ---- in a process that was launched


def leave_status(status: int, message: str = "") -> None:
    """Tell `LaunchedRun` the exit status of this process, if it is the first of its run to fail,
    or rank 0. Paddle's launcher ends the others and may then report theirs.

    The message is for the log, in which rank 0 has it already, and for the console, which shows
    what the first process of this machine writes and no other.
    """
    file = _status_file()
    is_main = os.environ.get("PADDLE_TRAINER_ID", "0") == "0"
    if file is not None and (status or is_main):
        with contextlib.suppress(OSError), open(file, "x", encoding="utf-8") as opened:
            rank_here = os.environ.get("PADDLE_RANK_IN_NODE", "0")
            opened.write(f"{status} {rank_here}\n{'' if is_main else message}")


def another_failed() -> bool:
    """Return whether another process of this run has left a status."""
    file = _status_file()
    return file is not None and file.exists()


def _status_file() -> Path | None:
    folder = os.environ.get("PADDLE_LOG_DIR")
    return Path(folder, STATUS_FILE) if is_launched() and folder is not None else None


def lost_peer(error: BaseException) -> PeerLost | None:
    """Return what to raise for the error of a collective that has lost its connection; None for
    other errors."""
    found = _GLOO_ERROR.search(str(error)) if isinstance(error, RuntimeError) else None
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
    if os.environ.get("PADDLE_LOG_DIR") is None:
        return
    # A process closes its connections a moment before it counts as ended.
    deadline = time.monotonic() + ENDING_SECONDS
    while _all_are_running():
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(LAUNCHER_SECONDS)


def _all_are_running() -> bool:
    """Return whether all processes that Paddle's launcher started here are there. Linux only."""
    running = 0
    for path in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                running += state not in "ZX"
    return running == processes_on_this_machine()


# ---- again after a failure


def run_with_restarts(
    command: list[str], *, restarts: int, run_folder: str, is_resuming: bool
) -> int:
    """Run a training command, and again with the newest checkpoint resumed each time that it fails.

    A run that fails twice at the same step is not started again. That one of its processes was
    killed says nothing of the step. A command that resumes a checkpoint does so again until the run
    has written another one.
    """
    folder = Path(run_folder)
    environment = {**os.environ, "MAX_RESTARTS": "0"}
    failed_at, done = "never", 0
    newest_before = _newest_checkpoint(folder)
    while True:
        is_further = not is_resuming or _newest_checkpoint(folder) != newest_before
        resume = ["-opts", "MODEL.RESUME", "auto"] if done and is_further else []
        with child_process([*command, *resume], environment) as (child, received):
            status = child.wait()
        status = 128 - status if status < 0 else status
        if received or status in FINAL:
            return status
        try:
            step = (folder / "step").read_text().strip()
        except OSError:
            step = "none"
        failed = f"failed with status {status} at step {step}"
        if status <= 128 and step == failed_at:
            _note(folder, f"{failed} for the second time; not restarting")
            return status
        if done == restarts:
            _note(folder, f"{failed}; all {restarts} restarts are used up")
            return status
        failed_at = step if status <= 128 else "killed"
        done += 1
        _note(folder, f"{failed}; restart {done} of {restarts}")


def _newest_checkpoint(folder: Path) -> tuple[str, int] | None:
    """Return where RUN/last leads, and when that was written."""
    try:
        return os.path.realpath(folder / "last"), os.stat(folder / "last").st_mtime_ns
    except OSError:
        return None


def _note(folder: Path, text: str) -> None:
    """Print a line, and append it to the run's log, if there is one and the disk has room."""
    print(text, flush=True)
    with contextlib.suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(escaped(f"{time.strftime('%Y-%m-%d %H:%M:%S')} WARNING {text}\n"))
