"""Stopping a run: SIGTERM from a scheduler, SIGINT from a keyboard."""

import signal
import time
from collections.abc import Sequence

SAME_CTRL_C_SECONDS = 2.0


class StopSignals:
    """Within this context, the first SIGTERM or SIGINT is only recorded in `received`.

    A later SIGINT interrupts as usual. One within `SAME_CTRL_C_SECONDS` is taken for the same
    Ctrl-C, which a terminal sends to a script and to the processes it started. Further SIGTERMs are
    ignored: Paddle's launcher sends several.
    """

    def __init__(self):
        self.received: int | None = None
        self.received_at = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {
            number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)
        }
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
        """For all processes to add up: whether this one has had SIGINT, and SIGTERM."""
        return [
            float(self.received == signal.SIGINT),
            float(self.received == signal.SIGTERM),
        ]

    @staticmethod
    def number(requests: Sequence[float]) -> signal.Signals:
        """The signal that sums of `requests`, not all 0, stand for."""
        return signal.SIGINT if requests[0] else signal.SIGTERM


class Stopped(Exception):
    """The run was asked to stop, and has saved. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number
