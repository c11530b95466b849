"""How fast samples are read and transformed, beside plain JPEG decoding."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from analysis.timing import Rate, measure_rates, rate_of

PHOTOGRAPH = (500, 375)  # what most of ImageNet is
QUALITY = 90


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


class CoreRates(NamedTuple):
    """images/s of one core for each job, and the ratio to plain decoding of the same round."""

    rates: dict[str, Rate]
    ratios: dict[str, Rate]


def core_rates(
    paths: list[str], jobs: dict[str, Callable[[int, int], object]], *, rounds: int
) -> CoreRates:
    """Measure jobs in this process, in turn with plain decoding, a few images at a time.

    Args:
        paths: the images that are decoded.
        jobs: called with (round, index of the image).
        rounds: of 20 images for each job.
    """

    def decode(_, index):
        with Image.open(paths[index]) as image:
            image.load()

    def several(job):
        def run(number):
            for i in range(20):
                job(number, (20 * number + i) % len(paths))
            return 20

        return run

    all_jobs = {"plain Pillow decoding": decode, **jobs}
    return CoreRates(
        *measure_rates({name: several(job) for name, job in all_jobs.items()}, rounds=rounds)
    )


def loader_rate(loader, *, epochs: int) -> Rate:
    """images/s of a loader by the clock on the wall, over epochs after the first."""
    rates = []
    for epoch in range(epochs + 1):
        loader.batch_sampler.set_epoch(epoch)
        images, start = 0, None
        for batch, _ in loader:
            if start is None:  # the workers have begun
                start = time.perf_counter()
            else:
                images += len(batch)
        if epoch:
            rates.append(images / (time.perf_counter() - start))
    return rate_of(rates)
