"""Runs of the mains in processes that start in milliseconds.

Importing Paddle takes about two seconds. Here one process per test session has imported everything
and run nothing, and each run is a fork of it, with its own arguments, environment and output. A
fork can be signalled and killed like any other process, and so can its loader workers.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tiny import ROOT

from replknet_paddle.checkpoints.run_folder import checkpoints, load_checkpoint

CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Import everything once, in a process that every run is forked from."""
    CONTEXT.set_forkserver_preload(["replknet_paddle.engine.run", "replknet_paddle.commands.train"])
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Run:
    """One run under way.

    Args:
        arguments: of the command line.
        output: file for what it prints.
        target: what to call instead of the command `train`: (arguments) -> exit status.
        environment: variables beside those of this process.
    """

    def __init__(self, arguments, *, output: Path, target=None, environment=None):
        start_server()
        self.output = output
        self.process = CONTEXT.Process(
            target=_child,
            args=([str(a) for a in arguments], str(output), target, environment or {}),
        )
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        """Signal the process, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """The exit status, or minus the signal that ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def _child(arguments, output, target, environment):
    sys.stdout.flush()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of loader workers, as in a process of its own
    sys.exit((target or main_status)(arguments))


def main_status(arguments: list[str]) -> int:
    """`main_multi_gpu.py` with these arguments, in this process."""
    from replknet_paddle.commands import run_command

    return run_command("train", arguments)


def paused(arguments: list[str]) -> int:
    """A run that waits after optimizer step PAUSE_AT until the file GO exists, so that a test can
    signal it there, however busy the machine is."""
    from replknet_paddle.engine.run_log import RunLog

    really_write = RunLog.write_step

    def write_step(self, step):
        really_write(self, step)
        if step == int(os.environ["PAUSE_AT"]):
            wait_for(lambda: os.path.exists(os.environ["GO"]), timeout=300)

    RunLog.write_step = write_step
    return main_status(arguments)


def finish(arguments, *, output: Path, status: int = 0, **options) -> str:
    """Run to the end; returns what was printed, once the status is right."""
    run = Run(arguments, output=output, **options)
    got = run.wait()
    assert got == status, f"status {got}, expected {status}:\n{run.text()}"
    return run.text()


def finish_ranks(arguments, *, folder: Path, ranks: int = 2, status: int = 0, target=None):
    """The same run in several processes over gloo, as Paddle's launcher would start them."""
    ports = free_ports(ranks + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    runs = [
        Run(
            arguments,
            output=folder / f"rank{rank}.txt",
            target=target,
            environment={
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(ranks),
                "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
                "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
                "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
                "PADDLE_DISTRI_BACKEND": "gloo",
            },
        )
        for rank in range(ranks)
    ]
    for run in runs:
        got = run.wait()
        assert got == status, f"status {got}, expected {status}:\n{run.text()}"
    return [run.text() for run in runs]


def start_really(arguments, **options) -> subprocess.Popen:
    """main_multi_gpu.py in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main_multi_gpu.py"), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **options},
    )


# The sitecustomize of a folder on PYTHONPATH, which Python imports before it runs a program.
CUSTOMIZED = """
import os, sys
if sys.orig_argv[1:5] == ["-u", "-m", "replknet_paddle", "train"]:
    import signal, time
    from replknet_paddle.engine import run, run_log
    from replknet_paddle.engine.signals import StopSignals
    rank = int(os.environ.get("PADDLE_TRAINER_ID", 0))
{code}
"""

# Counts how often a run is started, and lets it fail where a test wants.
FAILING = """
    with open({starts!r}, "a") as file:
        file.write(" ".join(sys.argv[1:]) + chr(10))
    failures = {failures!r}[len(open({starts!r}).readlines()) - 1 :]
    really_write = run_log.RunLog.write_step
    def write_step(self, step):
        really_write(self, step)
        if failures and step == failures[0]:
            if {how!r} == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("fails where a test wants it to")
    run_log.RunLog.write_step = write_step
"""


def customized(folder: Path, code: str) -> dict[str, str]:
    """Variables with which each process that a run starts, by Paddle's launcher or as one that may
    be restarted, executes `code`, indented by four.

    Args:
        folder: for the code.
    """
    (folder / "custom").mkdir()
    (folder / "custom" / "sitecustomize.py").write_text(CUSTOMIZED.format(code=code))
    return {"PYTHONPATH": os.pathsep.join([str(folder / "custom"), str(ROOT)])}


def failing(folder: Path, *, failures: list[int], how="killed") -> dict[str, str]:
    """Variables with which a run that may be restarted fails after the given steps, one each start.

    Args:
        folder: for the code; `starts` there gets the arguments of each start.
        how: "killed", or "raises".
    """
    starts = str(folder / "starts")
    return customized(folder, FAILING.format(starts=starts, failures=failures, how=how))


class Script:
    """run_train_multi.sh on the tiny network, in a process group of its own."""

    def __init__(self, arguments, *, restarts, **environment):
        self.process = subprocess.Popen(
            ["sh", str(ROOT / "run_train_multi.sh"), *map(str, arguments)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHON": sys.executable,
                "MAX_RESTARTS": str(restarts),
                **environment,
            },
        )

    def finish(self, timeout=120) -> tuple[int, str]:
        try:
            said, _ = self.process.communicate(timeout=timeout)
        finally:
            self.kill()
        return self.process.returncode, said

    def kill(self) -> None:
        """End the script and the program that it has started, if they have not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are still there."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def worker(pid: int, rank: int) -> int | None:
    """The training process of `rank` among what `pid` started, by way of Paddle's launcher."""
    for child in children(pid):
        try:
            is_launcher = (
                b"paddle.distributed.launch" in Path(f"/proc/{child}/cmdline").read_bytes()
            )
            for candidate in children(child) if is_launcher else ():
                environment = Path(f"/proc/{candidate}/environ").read_bytes().split(b"\0")
                if f"PADDLE_TRAINER_ID={rank}".encode() in environment:
                    return candidate
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = worker(child, rank)
        if found is not None:
            return found
    return None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def wait_for(condition, *, timeout: float = 60, every: float = 0.002):
    """Poll until `condition()` is true; returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
    return value


# ---- what is asked of run folders

TIMES = ("train_seconds", "train_images_per_second", "val_seconds")


def metrics(run_folder) -> list[dict]:
    """The lines of metrics.jsonl but for times, each of them JSON as the standard has it."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    with open(run_folder / "metrics.jsonl") as file:
        records = [json.loads(line, parse_constant=refuse) for line in file]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_same_end(got, wanted, *, records=True) -> None:
    """Weights, average, optimizer state, progress and metrics of two runs, bit for bit."""
    left, right = (load_checkpoint(str(folder / "last")) for folder in (got, wanted))
    assert left.progress == right.progress
    assert left.scaler == right.scaler
    for part in ("model", "model_ema", "optimizer"):
        ours, theirs = getattr(left, part), getattr(right, part)
        assert ours.keys() == theirs.keys() and ours
        wrong = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
        assert not wrong, f"{part}: {len(wrong)} of {len(ours)} differ, e.g. {wrong[:3]}"
    if records:
        assert metrics(got) == metrics(wanted)


def step_of(run_folder) -> int:
    """The last optimizer step that a run says it has done."""
    try:
        return int((run_folder / "step").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def whole_steps(run_folder) -> list[int]:
    return [int(re.search(r"step_(\d+)", path)[1]) for path in checkpoints(str(run_folder))]
