"""Runs whose processes do something that a test wants, as soon as they start."""

import sys
import textwrap
from pathlib import Path

from processes import Run
from tiny import ROOT

# The sitecustomize of a folder on PYTHONPATH, which Python imports before it runs a program.
CUSTOMIZED = """
import os
if "PADDLE_TRAINER_ID" in os.environ:
    import signal, time
    from replknet_paddle.engine import run, run_log
    from replknet_paddle.engine.signals import StopSignals
    rank = int(os.environ["PADDLE_TRAINER_ID"])
{code}
"""

# Stands for Python where one process is started by a script.
WRAPPED = """
import os, runpy, signal, sys, time
sys.path.insert(0, {root!r})
from replknet_paddle.engine import run, run_log
from replknet_paddle.engine.signals import StopSignals
rank = 0
{code}
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Rank 0 waits after step 4 until it is signalled, so that a run is not over before, however busy
# the machine is.
SIGNALLED_AFTER_STEP_4 = """
    really_note, really_write_step, noted = StopSignals.note, run_log.RunLog.write_step, []
    def note(self, *rest):
        noted.append(rest)
        really_note(self, *rest)
    def write_step(self, step):
        really_write_step(self, step)
        while rank == 0 and step == 4 and not noted:
            time.sleep(0.01)
    StopSignals.note, run_log.RunLog.write_step = note, write_step
"""


def customized(folder: Path, code: str) -> dict[str, str]:
    """Variables with which each launched process of a run executes `code`, indented by four.

    Args:
        folder: for the code.
    """
    (folder / "custom").mkdir()
    (folder / "custom" / "sitecustomize.py").write_text(CUSTOMIZED.format(code=code))
    return {"PYTHONPATH": str(folder / "custom")}


def wrapped(folder: Path, code: str) -> Path:
    """A program that is Python, but executes such `code` first; for PYTHON of the scripts."""
    program, wrapper = folder / "python", folder / "wrapper.py"
    wrapper.write_text(WRAPPED.format(root=str(ROOT), code=textwrap.dedent(code)))
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{wrapper}" "$@"\n')
    program.chmod(0o755)
    return program


class LaunchedRun(Run):
    """A run under way whose processes are started by Paddle's launcher; the program that starts
    the launcher is a fork, and `pid` is its."""

    def kill(self) -> None:
        """End what has not ended: its processes end with the program."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
