"""Sliding windows, scales and mirror images against loops over pixels."""

import numpy as np
import paddle
import pytest
from numpy_heads import bilinear

from replknet_paddle.config import get_config
from replknet_paddle.segmentation.evaluate import build_inference, image_logits, windows

SIDE, STRIDE = 16, 11


def probabilities(network, images, **changes):
    """What `network` gives by windows of `SIDE` and `STRIDE`, in the size of 40 x 24 pixels."""
    settings = {"RESIZE": [40, 24], "SLIDE_STRIDE": STRIDE} | changes
    config = get_config(
        DATA__IMAGE_SIZE=SIDE, **{f"SEGMENTATION__{key}": value for key, value in settings.items()}
    )
    return build_inference(config, network)(images).numpy()


def images(height, width, count=1):
    rng = np.random.default_rng(0)
    return paddle.to_tensor(rng.normal(size=(count, 3, height, width)).astype("float32"))


def network(seed=0):
    """A network that sees its neighbours and knows left from right and a window's borders."""
    paddle.seed(seed)
    layer = paddle.nn.Conv2D(3, 4, 5, padding=2)
    layer.eval()
    return layer


@pytest.mark.parametrize("size", [(16, 16), (12, 9), (16, 5)])
def test_sliding_equals_whole_where_the_window_covers_the_image(size):
    x, net = images(*size), network()
    whole = image_logits(net, x, SIDE, None)
    assert image_logits(net, x, SIDE, STRIDE).numpy().tobytes() == whole.numpy().tobytes()


@pytest.mark.parametrize("size", [(17, 40), (16, 27), (50, 16), (9, 33), (39, 28)])
def test_sliding_averages_every_window_that_has_a_pixel(size):
    x, net = images(*size, count=2), network()
    got = image_logits(net, x, SIDE, STRIDE).numpy()
    total, count = np.zeros((2, 4, *size)), np.zeros(size)

    # Windows begin at every stride until one reaches the end, which then ends there.
    def starts(length):
        found = [0]
        while found[-1] + 16 < length:
            found.append(found[-1] + 11)
        return [min(start, max(length - 16, 0)) for start in found]

    for top in starts(size[0]):
        for left in starts(size[1]):
            part = x[:, :, top : top + 16, left : left + 16]
            total[:, :, top : top + 16, left : left + 16] += net(part).numpy()
            count[top : top + 16, left : left + 16] += 1
    assert count.min() >= 1 and count.max() >= 2
    np.testing.assert_allclose(got, total / count, rtol=1e-5, atol=1e-6)


def test_windows_cover_and_stay_inside():
    boxes = list(windows(512, 683, 640, 426))
    assert boxes == [(0, 0, 512, 640), (0, 43, 512, 683)]  # as the official code has them
    assert len(list(windows(640, 2560, 640, 426))) == 6


def test_scales_and_mirror_images_against_a_loop():
    x, net = images(19, 31), network()
    got = probabilities(net, x, EVAL_RATIOS=[0.5, 1.0, 1.75], EVAL_FLIP=True)[0]
    wanted = np.zeros((4, 19, 31))
    # 24 / 19 is less than 40 / 31, so the shorter side decides.
    for size in [(12, 20), (24, 39), (42, 69)]:
        scaled = bilinear(x.numpy()[0].astype("float64"), size, align_corners=False)
        for step in (1, -1):
            turned = np.ascontiguousarray(scaled[None, :, :, ::step]).astype("float32")
            logits = image_logits(net, paddle.to_tensor(turned), SIDE, STRIDE).numpy()[0]
            logits = bilinear(logits[:, :, ::step].astype("float64"), (19, 31), align_corners=False)
            exponentials = np.exp(logits)
            wanted += exponentials / exponentials.sum(axis=0)
    np.testing.assert_allclose(got, wanted / 6, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.sum(axis=0), 1, rtol=1e-5)


def test_corners_are_aligned_where_the_dataset_wants_it():
    x, net = images(13, 21), network()
    one, other = (
        probabilities(net, x, SLIDE_STRIDE=None, ALIGN_CORNERS=aligned) for aligned in (False, True)
    )
    assert np.abs(one - other).max() > 1e-3
