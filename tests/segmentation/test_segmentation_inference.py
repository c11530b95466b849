"""Sliding windows, scales and mirror images against loops over pixels."""

import numpy as np
import paddle
import pytest
from numpy_heads import bilinear

from replknet_paddle.config import get_config
from replknet_paddle.segmentation import evaluate
from replknet_paddle.segmentation.evaluate import (
    build_inference,
    build_strips,
    image_logits,
    resized_rows,
    windows,
)
from replknet_paddle.segmentation.upernet import resize

SIDE, STRIDE = 16, 11


def config_of(**changes):
    """A configuration of windows of `SIDE` and `STRIDE`, in the size of 40 x 24 pixels."""
    settings = {"RESIZE": [40, 24], "SLIDE_STRIDE": STRIDE} | changes
    settings = {f"SEGMENTATION__{key}": value for key, value in settings.items()}
    return get_config(DATA__IMAGE_SIZE=SIDE, MODEL__NUM_CLASSES=4, **settings)


@paddle.no_grad()
def probabilities(network, images, **changes):
    """What `network` gives, all strips in one array, and the rows of each."""
    strips = [strip.numpy() for strip in build_strips(config_of(**changes), network)(images)]
    return np.concatenate(strips, axis=2), [strip.shape[2] for strip in strips]


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
    (got,), _ = probabilities(net, x, EVAL_RATIOS=[0.5, 1.0, 1.75], EVAL_FLIP=True)
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
        probabilities(net, x, SLIDE_STRIDE=None, ALIGN_CORNERS=aligned)[0]
        for aligned in (False, True)
    )
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("changes", [{}, {"EVAL_RATIOS": [0.5, 1.75], "EVAL_FLIP": True}])
def test_large_images_go_by_strips_of_a_bounded_size(monkeypatch, aligned, changes):
    x, net, changes = images(67, 41, count=2), network(), {"ALIGN_CORNERS": aligned} | changes
    whole, rows = probabilities(net, x, **changes)
    assert rows == [67]
    classes = build_inference(config_of(**changes), net)(x).numpy()
    assert classes.dtype == "uint8" and (classes == whole.argmax(axis=1)).all()
    monkeypatch.setattr(evaluate, "STRIP_VALUES", 20 * whole.size // 67)
    got, rows = probabilities(net, x, **changes)
    assert rows == [20, 20, 20, 7]
    np.testing.assert_allclose(got, whole, atol=1e-5)
    assert (build_inference(config_of(**changes), net)(x).numpy() == classes).all()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [(31, 17), (90, 41), (16, 20), (5, 3)])
def test_rows_of_a_resized_map_are_those_of_the_whole(size, aligned):
    x = images(16, 20, count=2)
    whole = resize(x, size, align_corners=aligned).numpy()
    got = resized_rows(x, size, range(size[0]), align_corners=aligned).numpy()
    assert (got == whole).all()
    for top in range(size[0]):
        rows = range(top, min(top + 4, size[0]))
        got = resized_rows(x, size, rows, align_corners=aligned).numpy()
        np.testing.assert_allclose(got, whole[:, :, top : rows.stop], atol=1e-5)
