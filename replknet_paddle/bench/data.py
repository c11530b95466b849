"""How fast samples are read and transformed, beside plain JPEG decoding."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image

from replknet_paddle.bench.timing import (
    check_counts,
    describe_machine,
    median_ratio,
    time_in_turn,
)
from replknet_paddle.data.dataset import ListDataset, TrainBatches, get_dataset
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.data.loader import Loader
from replknet_paddle.runtime.errors import InputError

PHOTOGRAPH = (500, 375)  # what most of ImageNet is
QUALITY = 90
ROUND = 20  # images
PLAIN = "plain Pillow decoding"
IMAGES = 200


def report_data(
    config, photographs: list[str], *, rounds: int, workers: int = 0, epochs: int = 9
) -> None:
    """Print what a core does of the input pipeline beside plain decoding, and how loaders scale.

    Args:
        config: whose pipelines to time; on copies of the photographs.
        photographs: as the `sources` of `make_photographs`.
        rounds: as of `core_seconds`.
        workers: also compare a loader of this many with a loader of one; 0: do not.
        epochs: as of `loader_seconds`.

    Raises:
        InputError: a number below 1, or below 0 workers.
    """
    check_counts(rounds=rounds, epochs=epochs)
    if workers < 0:
        raise InputError(f"--workers {workers}; allowed: an integer >= 0")
    with tempfile.TemporaryDirectory() as folder:
        files = make_photographs(photographs, folder, IMAGES)
        for name in LIST_FILES.values():
            with open(os.path.join(folder, name), "w", encoding="ascii") as file:
                file.writelines(f"{image} 0\n" for image in files)
        config = config.clone()
        config.defrost()
        config.DATA.DATA_PATH = folder
        config.freeze()
        train, val = get_dataset(config, True), get_dataset(config, False)
        paths = [os.path.join(folder, name) for name in files]
        kilobytes = sum(map(os.path.getsize, paths)) / len(paths) / 1e3
        print(f"{describe_machine()}, Pillow {PIL.__version__}")
        print(
            f"{len(files)} photographs of 500x375 pixels, quality {QUALITY}, {kilobytes:.0f} kB, "
            f"to {config.DATA.IMAGE_SIZE} pixels by {type(train.transform.px).__name__}"
        )
        seconds = core_seconds(paths, _jobs(train, val), rounds=rounds)
        print(f"{'one core':34}{'images/s':>9}{'quartiles':>14}{'of decoding':>14}")
        for name, values in seconds.items():
            low, median, high = (1 / q for q in _quartiles(values)[::-1])
            ratio = median_ratio(seconds[PLAIN], values)
            print(f"{name:34}{median:9.0f}{f'{low:.0f}..{high:.0f}':>14}{ratio:14.3f}")
        loaders = {
            number: Loader(
                train,
                TrainBatches(len(train), 10, rank=0, world_size=1, seed=0),
                workers=number,
                batch_bytes=30 * config.DATA.IMAGE_SIZE**2,
                finish=lambda pixels, erasures: pixels,  # as if the device were another
                max_bad_images=0,
                timeout_seconds=config.DATA.WORKER_TIMEOUT,
            )
            for number in sorted({1, workers} if workers else ())
        }
        seconds = loader_seconds(loaders, epochs=epochs)
        for number, values in seconds.items():
            loaders[number].close()
            print(
                f"{f'training loader, {number} worker(s)':34}{1 / statistics.median(values):9.0f}"
                f"{median_ratio(seconds[1], values):28.2f} times one"
            )


def _jobs(train: ListDataset, val: ListDataset) -> dict[str, Callable[[int, int], object]]:
    return {
        "evaluation, 8 bits": lambda _, i: val.read(0, i, val.transform.raw),
        "evaluation, normalized": lambda _, i: val.read(0, i, val.transform),
        "training, 8 bits": lambda n, i: train.read(n, i, train.transform.raw),
        "training, normalized and erased": lambda n, i: train.read(n, i, train.transform),
    }


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3


def make_photographs(sources: list[str], folder: str, count: int) -> list[str]:
    """Write JPEGs of 500x375 pixels: crops, scaled by less than a quarter, of photographs.

    Args:
        sources: photographs of about that size. What they show decides how long decoding takes,
            so noise would not do.

    Returns:
        The names of the files in `folder`.
    """
    rng = np.random.default_rng(0)
    names = []
    for i in range(count):
        with Image.open(sources[i % len(sources)]) as image:
            image = image.convert("RGB")
        if i // len(sources) % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        share = rng.uniform(0.8, 1)
        width = share * min(image.width, image.height * PHOTOGRAPH[0] / PHOTOGRAPH[1])
        height = width * PHOTOGRAPH[1] / PHOTOGRAPH[0]
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        name = f"{i:05d}.jpg"
        image.resize(PHOTOGRAPH, Image.Resampling.BICUBIC, box).save(
            os.path.join(folder, name), quality=QUALITY
        )
        names.append(name)
    return names


def core_seconds(
    paths: list[str], jobs: dict[str, Callable[[int, int], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Seconds that a core computes for an image, in turn with plain decoding, round by round.

    Args:
        paths: the images that are decoded.
        jobs: called with (round, index of the image).
        rounds: of `ROUND` images for each job.
    """

    def decode(_, index):
        with Image.open(paths[index]) as image:
            image.load()

    def several(job):
        numbers = itertools.count()  # all jobs go through the images alike

        def run():
            number = next(numbers)
            for i in range(ROUND):
                job(number, (ROUND * number + i) % len(paths))

        return run

    calls = {name: several(job) for name, job in {PLAIN: decode, **jobs}.items()}
    seconds = time_in_turn(calls, rounds=rounds, clock=time.process_time)
    return {name: [value / ROUND for value in values] for name, values in seconds.items()}


def loader_seconds(loaders: dict[int, object], *, epochs: int) -> dict[int, list[float]]:
    """Seconds an image takes each loader by the clock on the wall, epoch by epoch, in turn.

    A first epoch, in which the workers start, is left out.
    """
    seconds = {name: [] for name in loaders}
    for epoch in range(epochs + 1):
        for name, loader in loaders.items():
            loader.batch_sampler.set_epoch(epoch)
            images, start = 0, None
            for batch, _ in loader:
                if start is None:  # the workers are under way
                    start = time.perf_counter()
                else:
                    images += len(batch)
            if epoch:
                seconds[name].append((time.perf_counter() - start) / images)
    return seconds
