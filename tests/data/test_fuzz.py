"""Mutated images and lists: a sample or one error, never a crash, never memory without end."""

import gc
import resource
import time
from io import BytesIO

import numpy as np
import pytest
from data_sets import picture
from PIL import Image

from replknet_paddle.data.dataset import ListDataset
from replknet_paddle.data.lists import read_list
from replknet_paddle.data.transforms.pipelines import EvalTransform
from replknet_paddle.runtime.errors import InputError, SampleError


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with bytes changed, cut off, doubled or moved; most of it near the beginning."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(min(len(data), 64 if rng.random() < 0.5 else len(data)) or 1))
        kind = rng.integers(5)
        if kind == 0:
            data[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place : place + int(rng.integers(1, 30))]
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 30))]
        else:
            data[place : place + 2] = [(0, 0), (255, 255), (127, 255), (0, 1)][rng.integers(4)]
    return bytes(data)


# The first of them in every run of the tests, all of them in the full one.
COUNTS = pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])


@COUNTS
@pytest.mark.filterwarnings("ignore")
def test_mutated_images_give_a_sample_or_a_sample_error(tmp_path, count):
    seeds = [picture(0, "JPEG", (20, 17)), picture(1, "PNG", (9, 11))]
    extra = BytesIO()
    Image.fromarray(np.zeros((9, 9, 4), np.uint8), "CMYK").save(extra, "JPEG")
    grey = BytesIO()
    Image.new("L", (12, 10), 77).save(grey, "JPEG", progressive=True)
    palette = BytesIO()
    Image.new("P", (12, 10), 7).save(palette, "PNG")
    seeds += [extra.getvalue(), grey.getvalue(), palette.getvalue()]
    file = tmp_path / "image"
    (tmp_path / "list.txt").write_text("image 0\n")
    transform = EvalTransform(image_size=8, crop_pct=0.875, mode="short_crop", mean=(0,), std=(1,))
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), transform.pixels, num_classes=1)
    rng, errors, slowest = np.random.default_rng(0), 0, 0.0
    for i in range(count):
        if i == count // 5:
            gc.collect()
            before = resident_bytes()
        file.write_bytes(mutated(seeds[i % len(seeds)], rng))
        start = time.process_time()
        try:
            assert data.read(0, 0, lambda image, _: transform.pixels(image)).shape == (8, 8, 3)
        except SampleError as error:
            errors += 1
            assert "line 1: cannot read image image: " in str(error) and "\n" not in str(error)
        slowest = max(slowest, time.process_time() - start)
    assert 0.1 * count < errors < 0.99 * count
    assert slowest < 5
    gc.collect()
    assert resident_bytes() - before < 30e6


@COUNTS
def test_mutated_lists_give_labels_or_an_input_error(tmp_path, count):
    seeds = [
        b"train/a.jpg 1\ntrain/b c.jpg 2\n\nval/c.png 3\n",
        b"\xef\xbb\xbfa/b/c.JPEG 0\r\nd.jpg\t9\r\n",
        b"x 1\n" * 20,
    ]
    file = tmp_path / "list.txt"
    rng, errors = np.random.default_rng(1), 0
    for i in range(count):
        if i == count // 10:
            before = resident_bytes()
        file.write_bytes(mutated(seeds[i % len(seeds)], rng))
        try:
            data = ListDataset(str(file), str(tmp_path), None, num_classes=10)
        except InputError as error:
            errors += 1
            assert str(file) in str(error)
            continue
        assert ((data.labels >= 0) & (data.labels < 10)).all()
        for index in range(len(data)):
            path = data.path(index)
            assert path and not path.startswith("/") and ".." not in path.split("/")
            with pytest.raises(SampleError):
                data[0, index]
    assert 0.05 * count < errors < 0.95 * count
    assert resident_bytes() - before < 30e6


def test_read_list_reports_ten_problems_at_most(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"bad\n" * 50)
    with pytest.raises(InputError) as error:
        read_list(str(tmp_path / "list.txt"), 10)
    assert len(str(error.value).splitlines()) == 10
