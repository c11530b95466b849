"""The last steps of a batch, on its device: the copy, normalization, random erasing."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import same_examples

from replknet_paddle.data.transforms import finish as finish_module
from replknet_paddle.data.transforms.finish import FinishBatch, RandomErasing, to_device
from replknet_paddle.data.transforms.image import normalize
from replknet_paddle.data.transforms.pipelines import TrainTransform

pytestmark = pytest.mark.paddle_version

GOLDENS = Path(__file__).parent / "goldens"  # what made them: see make_goldens.py there
BOXES = json.loads((GOLDENS / "timm_draws.json").read_text())["erased_boxes"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEEDS = st.integers(0, 2**32 - 1)


def finish(mode="pixel") -> FinishBatch:
    return FinishBatch(mean=MEAN, std=STD, erase_mode=mode)


def batch(count=4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 30, 40, 3), dtype=np.uint8)


# ---- the copy


def test_on_cpu_an_array_is_copied():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    tensor = to_device(array)
    array[:] = 0
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]] and tensor.dtype == paddle.uint8


# ---- normalizing, and filling boxes


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

    in_flight = finish_module.deque()
    monkeypatch.setattr(finish_module, "on_gpu", lambda: True)
    monkeypatch.setattr(finish_module, "_in_flight", in_flight)
    monkeypatch.setattr(paddle, "CUDAPinnedPlace", lambda: "pinned")
    monkeypatch.setattr(paddle, "to_tensor", fake_to_tensor)
    monkeypatch.setattr(paddle.Tensor, "cuda", fake_cuda)
    monkeypatch.setattr(paddle.device.cuda, "Event", Event)
    for count in (1, 2, 3):
        to_device(np.zeros(2))
        assert len(in_flight) == count
    assert calls == [False] * 3 and all(event.recorded for event in Event.made)
    Event.made[0].done = Event.made[2].done = True
    to_device(np.zeros(2))
    assert [event for _, event in in_flight] == Event.made[1:]  # in their order
    Event.made[1].done = True
    to_device(np.zeros(2))
    assert [event for _, event in in_flight] == Event.made[3:]


# ---- normalizing, and filling boxes


def test_normalizing_gives_the_bits_of_normalize():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = finish()(paddle.to_tensor(values))
    assert images.dtype == paddle.float32
    np.testing.assert_array_equal(images.numpy()[0], normalize(values[0], MEAN, STD))


@pytest.mark.parametrize("mode, shape", [("pixel", (3, 10, 30)), ("rand", (3, 1, 1)), ("const", 0)])
def test_a_batch_is_erased_by_one_write_with_constants_of_the_device(mode, shape, monkeypatch):
    copied = []
    monkeypatch.setattr(finish_module, "to_device", lambda a: copied.append(a) or to_device(a))
    last_steps, pixels = finish(mode), batch()
    boxes = [(2, 3, 12, 33), (8, 9, 18, 39)]  # they overlap
    erasures = [(i, boxes, 40 + i) for i in (0, 2, 3)]
    plain = last_steps(paddle.to_tensor(pixels)).numpy()
    assert not copied
    got = last_steps(paddle.to_tensor(pixels), erasures).numpy()
    assert len(copied) == 2  # places and values, however many boxes
    wanted = plain.copy()
    for index, boxes, seed in erasures:  # box by box, the later over the earlier
        rng = np.random.default_rng(seed)
        for top, left, bottom, right in boxes:
            noise = rng.standard_normal(shape, np.float32) if shape else 0
            wanted[index, :, top:bottom, left:right] = noise
    np.testing.assert_array_equal(got, wanted)
    monkeypatch.setattr(paddle, "to_tensor", lambda *_, **__: pytest.fail("copies a constant"))
    last_steps(paddle.full([1, 4, 4, 3], 7, "uint8"))


def test_raw_samples_become_those_of_the_whole_transform():
    transform = TrainTransform(
        image_size=32, crop_scale=(0.08, 1.0), crop_ratio=(0.75, 1.33), hflip_prob=0.5,
        photometric=None, erasing=RandomErasing(prob=0.5, mode="const", max_count=2),
        mean=MEAN, std=STD,
    )  # fmt: skip
    image = Image.fromarray(batch(1)[0])
    erased = 0
    for seed in range(20):
        expected = transform(image, np.random.default_rng(seed))
        raw = transform.raw(image, np.random.default_rng(seed))
        erasures = [(0, raw.boxes, raw.seed)] if raw.boxes else []
        images = finish("const")(paddle.to_tensor(raw.pixels[None]), erasures)
        np.testing.assert_array_equal(images.numpy()[0], expected)
        erased += len(erasures)
    assert 3 < erased < 17


# ---- drawing boxes


def test_boxes_equal_timm():
    for row in BOXES:
        eraser = RandomErasing(prob=0.5, mode="const", max_count=row["count"])
        boxes = eraser.boxes(row["height"], row["width"], np.random.default_rng(row["seed"]))
        assert [list(box) for box in boxes] == row["boxes"], row["seed"]


@same_examples
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 4), SEEDS)
def test_boxes_lie_within_the_image_share_their_area_and_never_span_it(height, width, most, seed):
    eraser = RandomErasing(prob=1.0, mode="const", max_count=most)
    boxes = eraser.boxes(height, width, np.random.default_rng(seed))
    assert len(boxes) <= most
    for top, left, bottom, right in boxes:
        assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
        assert bottom - top < height and right - left < width
        # At most a third of the area by all of them, but for rounding to whole pixels.
        sides = bottom - top - 0.5, right - left - 0.5
        assert min(sides) < 0 or sides[0] * sides[1] <= height * width / 3 / len(boxes)
