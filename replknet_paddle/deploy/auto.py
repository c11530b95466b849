"""`auto`: which installed backend is the fastest for a network on this machine, measured once.

Which one it is depends on the network and the processor: for RepLKNet-31B on a CPU the backends are
within a third of each other, for a network of a few megabytes one can be ten times as fast as the
next. So the candidates run by turns for some seconds, and the result is kept in the user's cache,
by network, batch size, precision, threads, processor and versions.
"""

import contextlib
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from replknet_paddle.deploy.fold import random_images
from replknet_paddle.deploy.runtimes import Backend
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import cache_folder, locked, write_text
from replknet_paddle.runtime.machines import available_cores, processor_name

logger = logging.getLogger(__name__)

FOLDER = "fastest_backend"  # in the cache
LARGEST_BATCH = 8  # larger batches keep the ratios of this one
ROUNDS = 5
MAX_SECONDS = 15  # after which no further round begins
TURN_SECONDS = 0.05  # at least, of each candidate in each round
LONG_SECONDS = 0.5  # after which a candidate's turn ends
MAX_RATIO = 1.5  # slower ones leave after their first round
# Intel's OpenMP, which Paddle brings, lets idle threads spin for 0.2 s.
SETTLE_SECONDS = 0.25


def open_fastest(
    names: Sequence[str], open_one: Callable[[str], Backend], *, facts: dict, batch_size: int
) -> Backend:
    """Open the fastest of the backends `names`, all of which are installed.

    Args:
        open_one: opens one of them.
        facts: what, besides the machine and the versions, says how fast each is: the network,
            precision, threads; JSON values.
        batch_size: images that `run` will get at once.

    Raises:
        InputError: none of them can be opened.
    """
    if len(names) == 1:
        logger.info("backend %s: the only installed one that runs this", names[0])
        return open_one(names[0])
    batch_size = min(batch_size, LARGEST_BATCH)
    facts = {
        **facts,
        "batch_size": batch_size,
        "processor": processor_name(),
        "cores": available_cores(),
        "versions": {name: _version(name) for name in sorted({*names, "paddle"})},
    }
    text = json.dumps(facts, sort_keys=True)
    path = cache_folder() / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    with _one_process_at_a_time(path.parent):
        remembered = _recall(path, facts, names)
        if remembered is not None:
            with contextlib.suppress(InputError):
                backend = open_one(remembered)
                logger.info("backend %s: the fastest when it was measured (%s)", remembered, path)
                return backend
        opened = _open_all(names, open_one)
        size = facts["image_size"]
        logger.info(
            "measuring %s on batches of %d once; the result is remembered",
            ", ".join(opened),
            batch_size,
        )
        milliseconds = measure(opened, random_images(batch_size, size))
        _remember(path, {"facts": facts, "milliseconds": milliseconds})
    fastest = min(milliseconds, key=milliseconds.get)
    logger.info(
        "backend %s: the fastest of %s",
        fastest,
        ", ".join(f"{name} {value:.3g} ms" for name, value in milliseconds.items()),
    )
    for name, backend in opened.items():
        if name != fastest:
            backend.close()
    return opened[fastest]


def measure(opened: dict[str, Backend], images: np.ndarray) -> dict[str, float]:
    """Milliseconds of a run of each backend: its best round, the rounds going by turns.

    A backend that fails or is far slower than the best one leaves after its first round.

    Raises:
        InputError: all of them fail.
    """
    best: dict[str, float] = {}
    racing = dict(opened)
    end = time.monotonic() + MAX_SECONDS
    for _ in range(ROUNDS):
        for name in list(racing):
            time.sleep(SETTLE_SECONDS)
            try:
                seconds = _time_turn(racing[name], images)
            except Exception as error:  # whatever a backend raises, the others can run
                logger.warning("backend %s is left out: %s", name, error)
                del racing[name]
                best.pop(name, None)
                continue
            best[name] = min(seconds, best.get(name, seconds))
        if not best:
            raise InputError("no backend runs this network; the warnings above say why")
        limit = MAX_RATIO * min(best.values())
        racing = {name: racing[name] for name in racing if best[name] < limit}
        if len(racing) == 1 or time.monotonic() > end:
            break
    return {name: 1e3 * seconds for name, seconds in best.items()}


def _time_turn(backend: Backend, images: np.ndarray) -> float:
    """Median seconds of a few runs after one that is not timed."""
    backend.run(images)
    seconds = []
    while len(seconds) < 3 or sum(seconds) < TURN_SECONDS:
        start = time.perf_counter()
        backend.run(images)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > LONG_SECONDS:
            break
    return statistics.median(seconds)


def _open_all(names: Sequence[str], open_one: Callable[[str], Backend]) -> dict[str, Backend]:
    opened, problem = {}, None
    for name in names:
        try:
            opened[name] = open_one(name)
        except InputError as error:
            problem = error
            logger.warning("backend %s is left out: %s", name, error)
    if not opened:
        raise problem
    return opened


def _version(name: str) -> str:
    try:
        return metadata.version({"paddle": "paddlepaddle"}.get(name, name))
    except metadata.PackageNotFoundError:  # paddlepaddle-gpu, or a build of one's own
        import paddle

        return paddle.__version__


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Let the processes of one run measure once, and not at the same time."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written is done without
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock"))
        yield


def _recall(path: Path, facts: dict, names: Sequence[str]) -> str | None:
    """The fastest of `names` by an earlier measurement, if there is one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        milliseconds = content["milliseconds"]
        if content["facts"] == facts and milliseconds.keys() <= set(names):
            return min(milliseconds, key=milliseconds.get)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no such file, or one that something else has written
    return None


def _remember(path: Path, content: dict) -> None:
    try:
        write_text(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        logger.warning("the measurement is not remembered: %s", error)
