"""Runs that are started by Paddle's launcher, and what their processes may do."""

from processes import Run

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


class LaunchedRun(Run):
    """A run under way whose processes are started by Paddle's launcher; the program that starts
    the launcher is a fork, and `pid` is its."""

    def kill(self) -> None:
        """End what has not ended: its processes end with the program."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
