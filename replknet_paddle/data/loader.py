"""Batches of a dataset, read ahead by worker processes. The way of an image to the device:

1. A sampler of dataset.py names the samples of a batch, and `Loader._batches` gives the names and
   a free slot of shared memory to a worker, up to `BATCHES_AHEAD` batches for each of them.
2. In the worker, `_Reader` has each sample read: `ListDataset.read_sample` finds the path, which
   `lists.resolve` keeps inside the data folder, `image.open_image` reads the file whole (repeated
   by `lists.retry_io` where storage fails), and the transform's `raw` (pipelines.py) decodes,
   crops, resizes, flips and augments it to 8-bit pixels, and draws the boxes to erase: a
   `RawSample`. Where an image cannot be read, one after it takes its place.
3. `_Reader` stacks the pixels into the slot; names and labels go through a pipe.
4. `Loader.__iter__` copies the slot to the device (`finish.to_device`), after which it is free.
5. There `FinishBatch` normalizes the batch and erases the boxes. Training then mixes it (`Mixup`).

`ListDataset` and its batch samplers fit `paddle.io.DataLoader`, too, but training must not depend
on that: at an exception in a data set it waits for ever (without workers) or raises SystemError,
and its threads were seen to wait for batches that workers had delivered. Python's own process
pool passes errors on, notices workers that were killed, and copies nothing but names.
"""

import logging
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import paddle

from replknet_paddle.data.lists import describe
from replknet_paddle.data.transforms.finish import to_device
from replknet_paddle.runtime.errors import InputError, SampleError, SystemFault
from replknet_paddle.runtime.launch import end_with_parent

BATCHES_AHEAD = 2  # for each worker
WARN_SECONDS = 30  # of waiting for a batch

Name = tuple[int, int]  # of a sample: epoch, index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One batch as read by a worker."""

    images: np.ndarray | None  # raw pixels (N, H, W, 3) uint8; None: they are in the batch's slot
    shape: tuple[int, ...]  # of the images
    labels: np.ndarray  # (N,) int64, or label maps (N, H, W) uint8
    erasures: list[tuple]  # for `FinishBatch`
    unreadable: list[tuple[int, str]]  # index of each replaced image, and what is wrong with it
    failures: list[str]  # of the system, after which reading again succeeded


class Loader:
    """The batches of one rank, read by worker processes and finished on this process's device.

    Iterating gives (images (N, 3, H, W) float32, labels as in `Batch`) for what `batch_sampler`
    names; the workers stay for the next time, until `close` or the end of a `with` block.

    Up to `max_bad_images` different unreadable images are each replaced by the next readable one of
    the list, with a warning, before a SampleError; with None, the first one is an error.
    """

    def __init__(
        self,
        dataset,  # with `read_sample`, `describe`, `list_file` and `failures`
        batch_sampler: paddle.io.Sampler,
        *,
        workers: int,  # processes; 0: read in this one
        batch_bytes: int,  # of images, which go through shared memory up to this size
        finish: Callable,  # (raw images on the device, erasures) -> images, the last steps
        max_bad_images: int | None,
        timeout_seconds: float,  # to wait for one batch of the workers
    ):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        self.workers = workers
        self.finish = finish
        self.max_bad_images = max_bad_images
        self.timeout_seconds = timeout_seconds
        self.bad_images: set[int] = set()
        self._reader = _Reader(
            dataset,
            # One slot more than batches ahead: the one that was given last must stay as it is.
            slots=BATCHES_AHEAD * workers + 1 if workers else 0,
            slot_bytes=batch_bytes,
            max_bad_images=max_bad_images,
        )
        self._pool: ProcessPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[paddle.Tensor, paddle.Tensor]]:
        for slot, batch in self._batches():
            for index, message in batch.unreadable:
                self._count_bad_image(index, message)
            if batch.failures:
                first, count = batch.failures[0], len(batch.failures)
                logger.warning("%s; read again (%d such failures in this batch)", first, count)
            images = batch.images
            if images is None:
                images = self._reader.images_in(slot, batch.shape)
            images = to_device(images)  # a copy: the slot will be used again
            yield self.finish(images, batch.erasures), to_device(batch.labels)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers now: before this process uses a GPU or talks to other processes, whose
        state a fork should not copy."""
        if not self.workers or self._pool is not None:
            return
        if not hasattr(os, "fork"):
            raise InputError(
                f"DATA.NUM_WORKERS is {self.workers}, but this system cannot fork the processes "
                "of a loader; allowed here: 0"
            )
        context = multiprocessing.get_context("fork")  # workers share what is there now
        self._pool = ProcessPoolExecutor(
            self.workers, context, initializer=_set_up_worker, initargs=(os.getpid(), self._reader)
        )
        try:
            self._pool.submit(os.getpid)  # the first call forks all of them
        except OSError as error:
            self._kill_workers()
            raise SystemFault(
                f"cannot start {self.workers} loader workers: {describe(error)}; lower "
                "DATA.NUM_WORKERS, or raise the system's limits of processes and memory"
            ) from error

    def close(self) -> None:
        """End the workers. The next iteration starts others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def worker_pids(self) -> list[int]:
        """Return the worker processes; none before `start` or the first iteration."""
        return list(self._pool._processes or ()) if self._pool else []

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield each batch as read, with the slot that holds its images until the next."""
        if not self.workers:
            for names in self.batch_sampler:
                yield 0, self._reader.read(0, names)
            return
        self.start()
        free = deque(range(self._reader.slots))
        ahead: deque[tuple[int, Future, Name]] = deque()  # with the first image's name
        names = iter(self.batch_sampler)
        try:
            while True:
                while len(ahead) < BATCHES_AHEAD * self.workers:
                    if (batch := next(names, None)) is None:
                        break
                    slot = free.popleft()
                    future = self._pool.submit(_read_in_worker, slot, batch)
                    ahead.append((slot, future, batch[0]))
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

    def _wait(self, future: Future, first: Name) -> None:
        """Wait until a batch, whose first sample is `first`, has been read or could not be."""
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
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False)
            self._pool = None

    def _count_bad_image(self, index: int, message: str) -> None:
        """Warn of an image that another took the place of; raise where there are too many."""
        if index in self.bad_images:
            return
        self.bad_images.add(index)
        count, limit = len(self.bad_images), self.max_bad_images
        if count > limit:
            raise SampleError(
                f"{message}. This is unreadable image number {count}; "
                f"DATA.MAX_BAD_IMAGES allows {limit}"
            )
        said = "%s; another image takes its place (%d of DATA.MAX_BAD_IMAGES %d)"
        logger.warning(said, message, count, limit)


class _Reader:
    """Reads batches: in workers into slots of memory, without workers (and slots) into arrays.

    Workers share the memory by being forked later: nothing is copied through a pipe, nothing is
    left behind by a process that is killed, and no limit of /dev/shm applies.
    """

    def __init__(self, dataset, *, slots: int, slot_bytes: int, max_bad_images: int | None):
        self.dataset = dataset
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.memory = mmap.mmap(-1, slots * slot_bytes) if slots else None
        self.max_bad_images = max_bad_images

    def images_in(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the uint8 array of this shape in one of the slots."""
        start = slot * self.slot_bytes
        return np.frombuffer(self.memory, "uint8", int(np.prod(shape)), start).reshape(shape)

    def read(self, slot: int, names: list[Name]) -> Batch:
        """Return the batch of these samples; its images are in the slot, if they fit."""
        unreadable: list[tuple[int, str]] = []
        samples, labels = zip(*(self._read_sample(*name, unreadable) for name in names))
        failures, self.dataset.failures = self.dataset.failures, []
        erasures = [(i, raw.boxes, raw.seed) for i, raw in enumerate(samples) if raw.boxes]
        images = [raw.pixels for raw in samples]
        shape = (len(images), *images[0].shape)
        stacked = None
        if self.slots and len(images) * images[0].nbytes <= self.slot_bytes:
            np.stack(images, out=self.images_in(slot, shape))
        else:
            stacked = np.stack(images)
        return Batch(stacked, shape, np.stack(labels), erasures, unreadable, failures)

    def _read_sample(self, epoch: int, index: int, unreadable: list):
        """Return the sample, or the next readable one in its place."""
        problem, limit, length = None, self.max_bad_images, len(self.dataset)
        tried = min(1 + (limit or 0), length)
        for candidate in range(index, index + tried):
            try:
                sample = self.dataset.read_sample(epoch, candidate % length)
            except SampleError as error:
                problem = problem or error
            else:
                if problem is not None:
                    unreadable.append((index, str(problem)))
                return sample
        if limit is None:
            raise problem
        raise SampleError(
            f"{problem}. Unreadable images in a row: {tried}; DATA.MAX_BAD_IMAGES allows {limit}"
        )


_reader: _Reader | None = None  # in a worker


def _set_up_worker(parent: int, reader: _Reader) -> None:
    """Let a worker live just as long as its parent.

    Ctrl-C and Paddle's launcher signal the whole group of a training process, which then needs its
    workers until it has saved: each leaves that group. On Linux it dies with a parent that was
    killed; other systems have no such call, and workers stay behind there.
    """
    global _reader
    _reader = reader
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the parent's handlers are about the parent's run
    end_with_parent(parent)


def _read_in_worker(slot: int, names: list[Name]) -> Batch:
    return _reader.read(slot, names)
