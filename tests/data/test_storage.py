"""What counts as a failure of the system, what as a bad image, and how often reading is tried."""

import builtins
import errno
import logging
import os
from unittest.mock import Mock

import faulty_storage
import numpy as np
import pytest
from data_sets import batches, configured
from tiny import make_data

from replknet_paddle.data import lists
from replknet_paddle.data.check_data import check_sample
from replknet_paddle.data.dataset import ListDataset, get_dataloader, get_dataset
from replknet_paddle.data.lists import PAUSES_SECONDS, retry_io
from replknet_paddle.runtime.errors import InputError, SampleError, SystemFault

SYSTEM = [
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT),
    *(errno.EINTR, errno.EAGAIN, errno.ENODEV, errno.ENXIO, errno.EACCES, errno.ENOTCONN),
]


@pytest.fixture
def slept(monkeypatch):
    """The pauses that were made, none of which takes time."""
    pauses = []
    monkeypatch.setattr(lists.time, "sleep", pauses.append)
    return pauses


def failing(error, times: int):
    """A function that raises `error` so many times and then gives 'bytes'."""
    return Mock(side_effect=[error] * times + ["bytes"])


@pytest.mark.parametrize("number", [*SYSTEM, None], ids=lambda n: errno.errorcode.get(n, "memory"))
def test_failures_of_the_system_are_tried_again_with_pauses(slept, number):
    """As is memory that runs out."""
    error = OSError(number, os.strerror(number)) if number else MemoryError()
    said, failures = os.strerror(number).lower() if number else "MemoryError", []
    assert retry_io(failing(error, 2), "image a.jpg", failures) == "bytes"
    assert slept == list(PAUSES_SECONDS) and sum(slept) == 31
    assert failures == [f"cannot read image a.jpg: {said}"] * 2
    with pytest.raises(SystemFault, match=rf"image a\.jpg: {said}, in 3 attempts over 31 s"):
        retry_io(failing(error, 3), "image a.jpg")


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "gone"), OSError(errno.ELOOP, "loop"), ValueError("a defect")]
    + [OSError(errno.ENAMETOOLONG, "long"), OSError("image file is truncated"), InputError("bad")],
    ids=repr,
)
def test_anything_else_is_raised_at_once(slept, error):
    with pytest.raises(type(error)) as caught:
        retry_io(failing(error, 1), "x")
    assert caught.value is error and slept == []


@pytest.fixture
def one_image(tmp_path):
    make_data(tmp_path, train=1, val=1, classes=1)
    path = tmp_path / "train" / "class 0" / "0000.jpg"

    def size(image, _):
        return image.size

    size.raw = size
    return ListDataset(str(tmp_path / "train_list.txt"), str(tmp_path), size, num_classes=1), path


@pytest.mark.parametrize("call", ["open", "lstat", "stat"])
def test_each_call_on_the_way_to_the_pixels_may_fail(one_image, monkeypatch, slept, call):
    """Once and then no more: the image. And for ever: never a SampleError."""
    data, path = one_image
    module, left = builtins if call == "open" else os, 0

    def fault(name):
        nonlocal left
        left -= name == str(path)
        return faulty_storage.fail() if name == str(path) and left >= 0 else None

    expected = data[0, 0][0]
    monkeypatch.setattr(module, call, faulty_storage.faulty(getattr(module, call), fault))
    left = 1
    assert data[0, 0][0] == expected and len(slept) == 1
    left = 1000
    with pytest.raises(SystemFault, match=r"0000\.jpg .*line 1.*input/output error"):
        data[0, 0]
    with pytest.raises(SystemFault):
        check_sample(data, 0)
    path.unlink()
    left = 0
    with pytest.raises(SampleError, match="no such file"):
        data[0, 0]


def test_running_out_of_memory_while_decoding_is_no_bad_image(one_image, slept):
    data, _ = one_image
    data.transform = Mock(side_effect=MemoryError)
    with pytest.raises(SystemFault):
        data[0, 0]


def test_a_repeated_reading_draws_the_same_random_numbers(one_image, slept):
    data, _ = one_image
    drawn = []

    def transform(image, rng):
        drawn.append(rng.random())
        if len(drawn) == 1:
            raise MemoryError
        return image

    data.transform = transform
    assert data[0, 0] and drawn[0] == drawn[1]


def test_a_file_larger_than_any_image_is_refused_without_being_read(one_image):
    data, path = one_image
    with open(path, "r+b") as file:
        file.truncate(2**30 + 1)  # a hole: it takes no space
    with pytest.raises(SampleError, match="1073741825 bytes; allowed: 1,073,741,824"):
        data[0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_batches_and_one_warning_for_each_batch(
    tiny_config_file, tiny_data, monkeypatch, caplog, workers
):
    config = configured(tiny_config_file, tiny_data, "DATA.NUM_WORKERS", workers)
    data = get_dataset(config, True)
    with get_dataloader(config, data, True) as loader:
        expected = batches(loader)
    read = [data.path(index) for batch in loader.batch_sampler for _, index in batch]
    failing_images = sum(path.endswith("7.jpg") for path in read)
    assert failing_images >= 2
    seen = set()  # in each worker

    def fault(path):
        if not path.endswith("7.jpg") or path in seen:
            return None
        seen.add(path)
        return faulty_storage.fail(errno.ETIMEDOUT)

    faulty_storage.patch_open(fault, monkeypatch, pauses=(0.01,))
    with get_dataloader(config, data, True) as loader:
        with caplog.at_level(logging.WARNING):
            got = batches(loader)
        assert not loader.bad_images
    assert len(got) == len(expected)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(got, expected))
    messages = [record.getMessage() for record in caplog.records]
    counts = [int(message.split("(")[-1].split()[0]) for message in messages]
    assert sum(counts) == failing_images and len(counts) <= len(expected)
    assert all("connection timed out; read again" in message for message in messages)


def test_a_system_that_starts_no_processes_is_not_the_users_mistake(
    tiny_config_file, tiny_data, monkeypatch
):
    config = configured(tiny_config_file, tiny_data, "DATA.NUM_WORKERS", 2)
    loader = get_dataloader(config, get_dataset(config, True), True)
    real_fork, children = os.fork, []

    def fork():
        if children:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        if child := real_fork():
            children.append(child)
        return child

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(SystemFault, match="cannot start 2 loader workers: resource temporarily"):
        next(iter(loader))
    monkeypatch.undo()
    assert len(children) == 1
    with loader:
        assert len(list(loader)) == 6
