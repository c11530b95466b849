"""Batches of a data set, read ahead by worker processes.

`ListDataset` and its batch samplers fit `paddle.io.DataLoader`, too, but training must not depend
on that: at an exception in a data set it waits for ever (without workers) or raises SystemError,
and its threads were seen to wait for batches that workers had delivered. Python's own process
pool passes errors on, notices workers that were killed, and copies nothing but names.
"""

import contextlib
import ctypes
import logging
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.data.device_copy import to_device
from replknet_paddle.data.storage import describe
from replknet_paddle.data.transforms.finish import FinishBatch
from replknet_paddle.runtime.errors import InputError, SampleError, SystemFault

# How many images after an unreadable one are tried in its place.
MAX_REPLACEMENTS = 10

BATCHES_AHEAD = 2  # for each worker

WARN_SECONDS = 30  # of waiting for a batch
KILL_SECONDS = 10  # that a worker may take to end

Name = tuple[int, int]  # of a sample: epoch, index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What is read for the names of a batch.

    Attributes:
        images: the images; None: they are in the batch's slot.
        shape, dtype: of the images.
        labels: (N,) int64, or label maps (N, H, W) uint8.
        erasures: for `FinishBatch`.
        unreadable: index of each image that another took the place of, and what is wrong with it.
        failures: messages of failures of the system after which reading again succeeded.
    """

    images: np.ndarray | None
    shape: tuple[int, ...]
    dtype: str
    labels: np.ndarray
    erasures: list[tuple]
    unreadable: list[tuple[int, str]]
    failures: list[str]


class Loader:
    """The batches of one rank, read by worker processes and finished on this process's device.

    Iterating gives (images (N, 3, H, W) float32, labels as in `Batch`) for what `batch_sampler`
    names; the workers stay for the next time, until `close` or the end of a `with` block.

    Args:
        dataset: a `ListDataset`, or another with `read_sample`, `describe` and `list_file`.
        batch_sampler: of `replknet_paddle.data.samplers`.
        workers: processes; 0: read in this one.
        batch_bytes: of the images of a batch, which go through shared memory up to this size.
        finish: last steps of the pipeline, on the device; None: the workers do them.
        max_bad_images: how many different unreadable images to replace by the next readable one
            of the list, each with a warning, before the run stops; None: to stop at the first.
        timeout_seconds: how long to wait for one batch of the workers.

    Raises (while iterating):
        SampleError: an image is missing or damaged and none may take its place.
        SystemFault: storage fails time and again, or hangs; a worker was killed, or none
            can be started.
    """

    def __init__(
        self,
        dataset,
        batch_sampler: paddle.io.Sampler,
        *,
        workers: int,
        batch_bytes: int,
        finish: FinishBatch | None,
        max_bad_images: int | None,
        timeout_seconds: float = 600.0,
    ):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        self.workers = workers
        self.finish = finish
        self.max_bad_images = max_bad_images
        self.timeout_seconds = timeout_seconds
        self.bad_images: set[int] = set()
        self._slots = Slots(slot_count(workers), batch_bytes) if workers else None
        self._read = _ReadBatch(
            dataset,
            slots=self._slots,
            unfinished=finish is not None,
            replace=max_bad_images is not None,
        )
        self._pool: ProcessPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[paddle.Tensor, paddle.Tensor]]:
        for slot, batch in self._batches():
            for index, message in batch.unreadable:
                self._count_bad_image(index, message)
            if batch.failures:
                logger.warning(
                    "%s; read again (%d such failures in this batch)",
                    batch.failures[0],
                    len(batch.failures),
                )
            images = batch.images
            if images is None:
                images = self._slots.array(slot, batch.shape, batch.dtype)
            images = to_device(images)  # a copy: the slot will be used again
            if self.finish is not None:
                images = self.finish(images, batch.erasures)
            yield images, to_device(batch.labels)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers now, and not at the first iteration: before this process uses a GPU or
        talks to other processes, whose state a fork should not copy."""
        if self.workers and self._pool is None:
            self._pool = self._start_workers()
            self._submit(os.getpid)  # the first call forks all of them

    def close(self) -> None:
        """End the workers. The next iteration starts others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def worker_pids(self) -> list[int]:
        """The worker processes; none before `start` or the first iteration."""
        return list(self._pool._processes or ()) if self._pool else []

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """What is read for each batch, with the slot that holds its images until the next."""
        if not self.workers:
            for names in self.batch_sampler:
                yield 0, self._read(0, names)
            return
        if self._pool is None:
            self._pool = self._start_workers()
        # More slots than batches ahead: the one that was given last must stay as it is.
        free = deque(range(self._slots.count))
        ahead: deque[tuple[int, Future, Name]] = deque()  # with the first image's name
        names = iter(self.batch_sampler)
        try:
            while True:
                while len(ahead) < BATCHES_AHEAD * self.workers:
                    if (batch := next(names, None)) is None:
                        break
                    slot = free.popleft()
                    ahead.append((slot, self._submit(_read_in_worker, slot, batch), batch[0]))
                if not ahead:
                    return
                slot, future, first = ahead.popleft()
                self._wait(future, first)
                yield slot, future.result()
                free.append(slot)
        except BrokenProcessPool:
            self._pool = None
            raise SystemFault(
                f"a loader worker of {self.dataset.list_file} was killed; if the machine was out "
                "of memory, lower DATA.NUM_WORKERS or the batch size"
            ) from None
        finally:  # whoever leaves early may begin anew, with all slots
            pending = [future for _, future, _ in ahead if not future.cancel()]
            if wait(pending, self.timeout_seconds).not_done:
                self._kill_workers()

    def _submit(self, call: Callable, *arguments) -> Future:
        try:
            return self._pool.submit(call, *arguments)
        except OSError as error:  # the first one forks the workers
            self._kill_workers()
            raise SystemFault(
                f"cannot start {self.workers} loader workers: {describe(error)}; lower "
                "DATA.NUM_WORKERS, or raise the system's limits of processes and memory"
            ) from error

    def _wait(self, future: Future, first: Name) -> None:
        """Wait until a batch has been read, or reading it has failed.

        Args:
            first: name of the batch's first image.
        """
        patience = min(WARN_SECONDS, self.timeout_seconds / 2)
        if wait([future], patience).done:
            return
        what = f"a batch whose first one is {self.dataset.describe(first[1])}"
        logger.warning("waiting for %s since %g s: storage may hang", what, patience)
        if wait([future], self.timeout_seconds - patience).done:
            return
        self._kill_workers()
        raise SystemFault(
            f"loader workers did not deliver {what} within {self.timeout_seconds:g} s "
            "(DATA.WORKER_TIMEOUT); check whether storage hangs"
        )

    def _kill_workers(self) -> None:
        """End workers that do not answer."""
        if self._pool is None:
            return
        running = list((self._pool._processes or {}).values())
        for process in running:
            process.kill()
        sentinels = {process.sentinel for process in running}
        deadline = time.monotonic() + KILL_SECONDS
        while sentinels and time.monotonic() < deadline:
            sentinels -= set(multiprocessing.connection.wait(sentinels, KILL_SECONDS))
        if sentinels:  # the kernel is waiting in them; a normal exit would wait for them
            logger.critical(
                "%d loader workers cannot even be killed: their storage hangs. This process leaves "
                "them behind, with status 1",
                len(sentinels),
            )
            logging.shutdown()
            os._exit(1)
        self._pool.shutdown(wait=False)
        self._pool = None

    def _start_workers(self) -> ProcessPoolExecutor:
        if not hasattr(os, "fork"):
            raise InputError(
                f"DATA.NUM_WORKERS is {self.workers}, but this system cannot fork the processes "
                "of a loader; allowed here: 0"
            )
        return ProcessPoolExecutor(
            self.workers,
            multiprocessing.get_context("fork"),
            initializer=_set_up_worker,
            initargs=(os.getpid(), self._read),  # forked, not copied through a pipe
        )

    def _count_bad_image(self, index: int, message: str) -> None:
        if index in self.bad_images:
            return
        self.bad_images.add(index)
        count, limit = len(self.bad_images), self.max_bad_images
        if count > limit:
            raise SampleError(
                f"{message}. This is unreadable image number {count}; "
                f"DATA.MAX_BAD_IMAGES allows {limit}"
            )
        logger.warning(
            "%s; another image takes its place (%d of DATA.MAX_BAD_IMAGES %d)",
            message,
            count,
            limit,
        )


class Slots:
    """Memory that workers write batches into and their parent reads them from, used in turn.

    It is there before the workers are, so they share it by being forked: nothing is copied through
    a pipe, nothing is left behind by a process that is killed, and no limit of /dev/shm applies.
    """

    def __init__(self, count: int, slot_bytes: int):
        self.count = count
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(-1, count * slot_bytes)

    def array(self, slot: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array in one of the slots."""
        return np.frombuffer(
            self._memory, dtype, int(np.prod(shape)), slot * self.slot_bytes
        ).reshape(shape)


def slot_count(workers: int) -> int:
    """Slots for the batches read ahead, and for the one that is copied to the device."""
    return BATCHES_AHEAD * workers + 1


class _ReadBatch:
    """Reads a batch: in a worker into a slot, or without slots into an array."""

    def __init__(self, dataset, *, slots: Slots | None, unfinished: bool, replace: bool):
        self.dataset = dataset
        self.slots = slots
        self.unfinished = unfinished
        self.candidates = 1 + MAX_REPLACEMENTS if replace else 1

    def __call__(self, slot: int, names: list[Name]) -> Batch:
        unreadable: list[tuple[int, str]] = []
        failures: list[str] = []
        images, labels = zip(*(self._read_image(*name, unreadable, failures) for name in names))
        erasures = []
        if self.unfinished:
            erasures = [
                (i, image.boxes, image.seed) for i, image in enumerate(images) if image.boxes
            ]
            images = [image.pixels for image in images]
        shape, dtype = (len(images), *images[0].shape), images[0].dtype
        stacked = None
        if self.slots and len(images) * images[0].nbytes <= self.slots.slot_bytes:
            np.stack(images, out=self.slots.array(slot, shape, dtype))
        else:
            stacked = np.stack(images)
        return Batch(stacked, shape, dtype.str, np.stack(labels), erasures, unreadable, failures)

    def _read_image(self, epoch: int, index: int, unreadable: list, failures: list):
        problem = None
        for candidate in range(index, index + self.candidates):
            candidate %= len(self.dataset)
            try:
                sample = self.dataset.read_sample(
                    epoch, candidate, unfinished=self.unfinished, failures=failures
                )
            except SampleError as error:
                problem = problem or error
            else:
                if problem is not None:
                    unreadable.append((index, str(problem)))
                return sample
        raise problem


# In a worker, what it calls for each batch.
_read: Callable[[int, list[Name]], Batch] | None = None

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def _set_up_worker(parent: int, read: _ReadBatch) -> None:
    """Let a worker live just as long as its parent.

    Ctrl-C and Paddle's launcher signal the whole group of a training process, which then needs its
    workers until it has saved: each leaves that group. On Linux it dies with a parent that was
    killed; other systems have no such call, and workers stay behind there.
    """
    global _read
    _read = read
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the parent's handlers are about the parent's run
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before prctl took effect
        os._exit(1)


def _read_in_worker(slot: int, names: list[Name]) -> Batch:
    return _read(slot, names)


def check_memory(*, batch_bytes: int, workers: int, processes: int) -> None:
    """Find out before training whether the workers' batches fit into the memory.

    Args:
        batch_bytes: of a batch of each loader that a process has, together.
        workers: of each loader.
        processes: of the run, on this machine.

    Raises:
        InputError: they do not fit.
    """
    needed = processes * slot_count(workers) * batch_bytes
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"{processes} process(es) with {workers} loader workers each share {needed / 1e9:.1f} "
            f"GB of memory with them, and {available / 1e9:.1f} GB are available; lower "
            "DATA.NUM_WORKERS or the batch size (-batch_size, -batch_size_eval)"
        )


def available_memory_bytes(cgroup: str = "/sys/fs/cgroup") -> int | None:
    """What this machine, or the container that this is, has left; None where it does not say."""
    limits = []
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        limits += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no such files, or no limit
        used, most = (
            int(Path(cgroup, name).read_text()) for name in ("memory.current", "memory.max")
        )
        statistics = dict(map(str.split, Path(cgroup, "memory.stat").read_text().splitlines()))
        # Files read before count as used, and are freed when memory is needed.
        cached = int(statistics["active_file"]) + int(statistics["inactive_file"])
        limits.append(most - used + cached)
    return min(limits, default=None)
