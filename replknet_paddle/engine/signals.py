"""Stopping a run. Who handles which signal, and what is saved:

the first SIGTERM or SIGINT: noted by `StopSignals`; all ranks finish the step, save and end
SIGINT again, after 2 seconds: KeyboardInterrupt, with nothing saved beyond the newest checkpoint
the program that launched the ranks, or restarts them: hands both on and waits (`runtime.launch`)
loader workers: a group of their own, so that a Ctrl-C does not reach them (`data.loader`)
SIGKILL of any process: the others end as well, and what has been saved stays (`runtime.launch`)
"""

import signal
import time

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_CTRL_C_SECONDS = 2.0  # a terminal sends one to a script and to the processes it started


class StopSignals:
    """Only records the first SIGTERM or SIGINT, within this context.

    Further SIGTERMs are ignored: Paddle's launcher sends several.
    """

    def __init__(self):
        self.received: int | None = None
        self.received_at = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.note) for number in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.received_at > SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt

    def requests(self) -> list[float]:
        """Return, for all processes to add up, whether this one has had SIGINT, and SIGTERM."""
        return [float(self.received == number) for number in STOPPING]


class Stopped(Exception):
    """The run was asked to stop by the signal `number`, and has saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number
