"""How fast samples are read and transformed, beside plain JPEG decoding."""

import itertools
import os
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from replknet_paddle.bench.timing import time_in_turn

PHOTOGRAPH = (500, 375)  # what most of ImageNet is
QUALITY = 90
ROUND = 20  # images
PLAIN = "plain Pillow decoding"


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
