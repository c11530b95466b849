"""Starting a run that has failed again, from the newest checkpoint that it has written."""

import contextlib
import os
import signal
import time
from pathlib import Path

from replknet_paddle.runtime.parent import child_process

# Done, bad input, or stopped: the same again would not help, or is not wanted.
FINAL = (0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def run_with_restarts(
    command: list[str], *, restarts: int, run_folder: str, is_resuming: bool
) -> int:
    """Run a training command, and again with the newest checkpoint resumed each time that it fails.

    A run that fails twice at the same step is not started again. That one of its processes was
    killed says nothing of the step.

    Args:
        command: program and arguments of `replknet train`.
        restarts: how often at most.
        is_resuming: whether the command resumes a checkpoint. Until the run has written another
            one, it then does so again.

    Returns:
        Exit status of the last process, 128 + the number of the signal for one that was killed.
    """
    folder = Path(run_folder)
    environment = {**os.environ, "MAX_RESTARTS": "0"}
    failed_at, done = "never", 0
    newest_before = newest_checkpoint(folder)
    while True:
        is_further = not is_resuming or newest_checkpoint(folder) != newest_before
        resume = ["-opts", "MODEL.RESUME", "auto"] if done and is_further else []
        with child_process([*command, *resume], environment) as (child, received):
            status = child.wait()
        status = 128 - status if status < 0 else status
        if received or status in FINAL:
            return status
        step = read_step(folder)
        failed = f"failed with status {status} at step {step}"
        if status <= 128 and step == failed_at:
            note(folder, f"{failed} for the second time; not restarting")
            return status
        if done == restarts:
            note(folder, f"{failed}; all {restarts} restarts are used up")
            return status
        failed_at = step if status <= 128 else "killed"
        done += 1
        note(folder, f"{failed}; restart {done} of {restarts}")


def newest_checkpoint(folder: Path) -> tuple[str, int] | None:
    """Where RUN/last leads, and when that was written."""
    try:
        return os.path.realpath(folder / "last"), os.stat(folder / "last").st_mtime_ns
    except OSError:
        return None


def read_step(folder: Path) -> str:
    """The optimizer step that the run has come to."""
    try:
        return (folder / "step").read_text().strip()
    except OSError:
        return "none"


def note(folder: Path, text: str) -> None:
    """Print a line, and append it to the run's log, if there is one and the disk has room."""
    print(text, flush=True)
    with contextlib.suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} WARNING {text}\n")
