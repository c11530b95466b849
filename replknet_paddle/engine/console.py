"""What a process of a run shows: log lines, and a progress bar that they never splice into.

Of a run in several processes, Paddle's launcher copies what rank 0 prints, line by line and some
time later. Where the run was started on a terminal, rank 0 writes to that terminal itself.
"""

import logging
import os
import sys

from tqdm import tqdm

from replknet_paddle.runtime.launch import TERMINAL_VARIABLE


class Console(logging.StreamHandler):
    """Log lines on the terminal or on standard output, each above the bar, if one is shown."""

    def __init__(self, *, is_main: bool):
        terminal = os.environ.get(TERMINAL_VARIABLE)
        stream = sys.stdout
        if is_main and terminal is not None:
            number = os.open(terminal, os.O_WRONLY | os.O_NOCTTY)
            stream = os.fdopen(number, "w", 1, encoding="utf-8", errors="replace")
        super().__init__(stream)
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def bar(self, batches=None, **options) -> tqdm:
        """tqdm's progress bar over batches; invisible where there is no terminal."""
        return tqdm(
            batches,
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            file=self.stream,
            disable=not self.stream.isatty(),
            **options,
        )
