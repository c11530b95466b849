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
    Table,
    check_counts,
    describe_machine,
    median_ratio,
    time_in_turn,
)
from replknet_paddle.config import override
from replknet_paddle.data.dataset import TrainBatches, get_dataset
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.data.loader import Loader
from replknet_paddle.runtime.errors import InputError

PHOTOGRAPH = (500, 375)  # what most of ImageNet is
QUALITY = 90
ROUND = 20  # images
PLAIN = "plain Pillow decoding"
IMAGES = 200


def report_data(config, photographs: list[str], *, rounds: int, workers: int, epochs: int) -> None:
    """Print what a core does of the input pipeline beside plain decoding, and how loaders scale.

    The pipelines of `config` are timed on copies of the photographs, of about 500x375 pixels: what
    they show decides how long decoding takes, so noise would not do. With `workers`, a loader of
    so many is compared with a loader of one, for `epochs` after one in which its workers start.
    """
    check_counts(rounds=rounds, epochs=epochs)
    if workers < 0:
        raise InputError(f"-workers {workers}; allowed: an integer >= 0")
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photographs(photographs, folder)
        for name in LIST_FILES.values():
            with open(os.path.join(folder, name), "w", encoding="ascii") as file:
                file.writelines(f"{os.path.basename(path)} 0\n" for path in paths)
        config = override(config, DATA__DATA_PATH=folder, DATA__FOLD=None)
        train, val = get_dataset(config, True), get_dataset(config, False)
        kilobytes = sum(map(os.path.getsize, paths)) / len(paths) / 1e3
        print(f"{describe_machine()}, Pillow {PIL.__version__}")
        print(
            f"{len(paths)} photographs of 500x375 pixels, quality {QUALITY}, {kilobytes:.0f} kB, "
            f"to {config.DATA.IMAGE_SIZE} pixels by {type(train.transform.px).__name__}"
        )
        jobs = {
            "evaluation, 8 bits": lambda _, i: val.read(0, i, val.transform.raw),
            "evaluation, normalized": lambda _, i: val.read(0, i, val.transform),
            "training, 8 bits": lambda epoch, i: train.read(epoch, i, train.transform.raw),
            "training, normalized and erased": lambda epoch, i: train.read(
                epoch, i, train.transform
            ),
        }
        table = Table({"one core": -34, "images/s": 8, "quartiles": 13, "of decoding": 13})
        seconds = core_seconds(paths, jobs, rounds=rounds)
        for name, values in seconds.items():
            low, median, high = 1 / np.quantile(values, [0.75, 0.5, 0.25])
            ratio = median_ratio(seconds[PLAIN], values)
            table.add(name, f"{median:.0f}", f"{low:.0f}..{high:.0f}", f"{ratio:.3f}")
        if not workers:
            return
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
            for number in sorted({1, workers})
        }
        table = Table({"training loader": -34, "images/s": 8, "times one": 13})
        seconds = loader_seconds(loaders, epochs=epochs)
        for number, values in seconds.items():
            loaders[number].close()
            ratio = median_ratio(seconds[1], values)
            table.add(f"{number} worker(s)", f"{1 / statistics.median(values):.0f}", f"{ratio:.2f}")


def make_photographs(sources: list[str], folder: str) -> list[str]:
    """Write JPEGs of 500x375 pixels: crops of photographs, scaled by less than a quarter."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(IMAGES):
        with Image.open(sources[i % len(sources)]) as image:
            image = image.convert("RGB")
        if i // len(sources) % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        share = rng.uniform(0.8, 1)
        width = share * min(image.width, image.height * PHOTOGRAPH[0] / PHOTOGRAPH[1])
        height = width * PHOTOGRAPH[1] / PHOTOGRAPH[0]
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        paths.append(os.path.join(folder, f"{i:05d}.jpg"))
        image.resize(PHOTOGRAPH, Image.Resampling.BICUBIC, box).save(paths[-1], quality=QUALITY)
    return paths


def core_seconds(
    paths: list[str], jobs: dict[str, Callable[[int, int], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds that a core computes for an image, in turn with plain decoding."""

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
    """Return the seconds by the clock that an image takes each loader, epoch by epoch, in turn."""
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
