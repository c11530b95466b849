"""How soon `replknet -h` and the help of each command answer, as processes of their own."""

import subprocess
import sys
import time
from collections.abc import Iterable


def time_help(names: Iterable[str], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of `replknet -h` and `replknet NAME -h`, in turn, after a round that is not timed."""
    calls = {"replknet -h": [], **{f"replknet {name} -h": [name] for name in names}}
    seconds = {name: [] for name in calls}
    for turn in range(1 + rounds):
        for name, arguments in calls.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "replknet_paddle", *arguments, "-h"],
                stdout=subprocess.DEVNULL,
                check=True,
            )
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds
