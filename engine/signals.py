"""Being asked to stop: SIGTERM from a scheduler, SIGINT from a keyboard."""

import signal


class StopSignals:
    """Within this context, the first SIGTERM or SIGINT is noted in `received`, not acted upon.

    A second SIGINT interrupts as usual. A second SIGTERM does not: Paddle's launcher sends several
    to a process that is still there after a moment.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> 'StopSignals':
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


class Stopped(Exception):
    """The run was asked to stop, and has saved. `number` is the signal's."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
