import numpy as np
import paddle
import pytest
from PIL import Image

from replknet_paddle.data.transforms.finish import FinishBatch, RandomErasing
from replknet_paddle.data.transforms.image import normalize
from replknet_paddle.data.transforms.pipelines import TrainTransform

pytestmark = pytest.mark.paddle_version

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def finish(mode="pixel") -> FinishBatch:
    return FinishBatch(mean=MEAN, std=STD, erase_mode=mode)


def batch(count=4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 30, 40, 3), dtype=np.uint8)


def test_normalizing_gives_the_workers_bits():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = finish()(paddle.to_tensor(values))
    assert images.dtype == paddle.float32
    np.testing.assert_array_equal(images.numpy()[0], normalize(values[0], MEAN, STD))


def test_boxes_are_erased_and_nothing_else():
    pixels = batch()
    plain = finish()(paddle.to_tensor(pixels)).numpy()
    boxes = [(2, 3, 12, 33), (20, 0, 30, 5)]
    images = finish()(paddle.to_tensor(pixels), [(1, boxes, 7)]).numpy()
    erased = np.zeros((4, 30, 40), bool)
    erased[1, 2:12, 3:33] = erased[1, 20:30, 0:5] = True
    changed = (images != plain).any(1)
    np.testing.assert_array_equal(changed, erased)
    noise = images.transpose(0, 2, 3, 1)[erased]
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("mode, values", [("pixel", 900), ("rand", 3), ("const", 1)])
def test_fillings(mode, values):
    images = finish(mode)(paddle.to_tensor(batch(1)), [(0, [(0, 0, 10, 30)], 3)]).numpy()
    box = images[0, :, :10, :30]
    assert len(np.unique(box)) >= values * 0.99 and len(np.unique(box)) <= values
    if mode == "const":
        assert not box.any()


def test_what_fills_a_box_depends_on_the_images_seed_alone():
    pixels, box = paddle.to_tensor(batch()), [(5, 5, 20, 25)]
    alone = finish()(pixels, [(2, box, 11)]).numpy()[2]
    paddle.seed(99)
    among = finish()(pixels, [(0, box, 3), (2, box, 11), (3, box, 4)]).numpy()
    np.testing.assert_array_equal(among[2], alone)
    assert not np.array_equal(among[0, :, 5:20, 5:25], among[3, :, 5:20, 5:25])


def test_unfinished_samples_are_those_of_the_whole_transform():
    transform = TrainTransform(
        image_size=32, crop_scale=(0.08, 1.0), crop_ratio=(0.75, 1.33), hflip_prob=0.5,
        photometric=None, erasing=RandomErasing(prob=0.5, mode="const", max_count=2),
        mean=MEAN, std=STD,
    )  # fmt: skip
    image = Image.fromarray(batch(1)[0])
    erased = 0
    for seed in range(20):
        expected = transform(image, np.random.default_rng(seed))
        sample = transform.unfinished(image, np.random.default_rng(seed))
        erasures = [(0, sample.boxes, sample.seed)] if sample.boxes else []
        images = finish("const")(paddle.to_tensor(sample.pixels[None]), erasures)
        np.testing.assert_array_equal(images.numpy()[0], expected)
        erased += len(erasures)
    assert 3 < erased < 17
