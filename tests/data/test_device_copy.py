"""What reaches the device and when: copies, constants, erasing, workers."""

import os

import numpy as np
import paddle
import pytest

from replknet_paddle.data import device_copy
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.data.transforms import finish as finish_module
from replknet_paddle.data.transforms.finish import FinishBatch, to_device


def test_on_cpu_an_array_is_copied():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    tensor = to_device(array)
    array[:] = 0
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]] and tensor.dtype == paddle.uint8


class Event:
    """A CUDA event that is done when the test says so."""

    made = []

    def __init__(self):
        self.done = self.recorded = False
        Event.made.append(self)

    def record(self):
        self.recorded = True

    def query(self):
        return self.done

    def synchronize(self):
        pytest.fail("waits for the GPU")


def test_pinned_memory_is_kept_until_the_gpu_has_read_it(monkeypatch):
    calls = []
    to_tensor, Event.made = paddle.to_tensor, []

    def fake_to_tensor(array, place):
        assert place == "pinned"
        return to_tensor(array)

    def fake_cuda(tensor, device_id=None, blocking=True):
        calls.append(blocking)
        return tensor.clone()

    monkeypatch.setattr(device_copy, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle, "CUDAPinnedPlace", lambda: "pinned")
    monkeypatch.setattr(paddle, "to_tensor", fake_to_tensor)
    monkeypatch.setattr(paddle.Tensor, "cuda", fake_cuda)
    monkeypatch.setattr(paddle.device.cuda, "Event", Event)
    monkeypatch.setattr(device_copy, "_in_flight", device_copy.deque())
    for count in (1, 2, 3):
        to_device(np.zeros(2))
        assert len(device_copy._in_flight) == count
    assert calls == [False] * 3 and all(event.recorded for event in Event.made)
    Event.made[0].done = Event.made[2].done = True
    to_device(np.zeros(2))
    assert [event for _, event in device_copy._in_flight] == Event.made[1:]  # in their order
    Event.made[1].done = True
    to_device(np.zeros(2))
    assert [event for _, event in device_copy._in_flight] == Event.made[3:]


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_a_batch_is_erased_by_one_write_with_constants_of_the_device(mode, monkeypatch):
    copied = []
    monkeypatch.setattr(finish_module, "to_device", lambda a: copied.append(a) or to_device(a))
    finish = FinishBatch(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), erase_mode=mode)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
    erasures = [(i, [(2, 3, 12, 13), (8, 9, 20, 24)], 40 + i) for i in (0, 2, 5)]  # they overlap
    plain = finish(paddle.to_tensor(pixels)).numpy()
    assert not copied
    got = finish(paddle.to_tensor(pixels), erasures).numpy()
    assert len(copied) == 2  # places and values, however many boxes
    wanted = plain.copy()
    for index, boxes, seed in erasures:  # box by box, the later over the earlier
        rng = np.random.default_rng(seed)
        for top, left, bottom, right in boxes:
            shape = {"pixel": (3, bottom - top, right - left), "rand": (3, 1, 1)}.get(mode)
            noise = rng.standard_normal(shape, np.float32) if shape else 0
            wanted[index, :, top:bottom, left:right] = noise
    np.testing.assert_array_equal(got, wanted)
    monkeypatch.setattr(paddle, "to_tensor", lambda *_, **__: pytest.fail("copies a constant"))
    finish(paddle.full([1, 4, 4, 3], 7, "uint8"))


def test_workers_start_when_reported_to(tiny_config_file, tiny_data):
    from tiny import flags

    from replknet_paddle.config import get_config, update_config

    config = update_config(
        get_config(str(tiny_config_file)),
        flags(opts=["DATA.DATA_PATH", str(tiny_data), "DATA.NUM_WORKERS", "2"]),
    )
    with get_dataloader(config, get_dataset(config, False), False) as loader:
        assert loader.worker_pids() == []
        loader.start()
        pids = loader.worker_pids()
        assert len(pids) == 2 and os.getpid() not in pids
        assert sum(len(labels) for _, labels in loader) == 101
        assert loader.worker_pids() == pids
