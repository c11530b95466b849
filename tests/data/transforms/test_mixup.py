import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import same_examples

from replknet_paddle.data.transforms.mixup import (
    Mix,
    Mixup,
    cutmix_box_minmax,
    mix_images,
    mix_labels,
)

pytestmark = pytest.mark.paddle_version

GOLDENS = Path(__file__).parent / "goldens"  # what made them: see make_goldens.py there
DRAWS = json.loads((GOLDENS / "timm_draws.json").read_text())
SHARES = st.floats(0, 1)
MINMAX = st.none() | st.tuples(SHARES, SHARES).map(sorted)


def mixup(**changed) -> Mixup:
    """The official recipe's, for 10 classes."""
    defaults = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_minmax": None, "prob": 1.0}
    defaults |= {"switch_prob": 0.5, "label_smoothing": 0.1, "num_classes": 10}
    return Mixup(**(defaults | changed))


def batch(size: int) -> paddle.Tensor:
    values = np.random.default_rng(size).standard_normal((size, 3, 8, 9), np.float32)
    return paddle.to_tensor(values)


def test_draws_equal_timm():
    for row in DRAWS["mixes"]:
        mixer = mixup(
            **{key: row[key] for key in ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob")}
        )
        mix = mixer.draw(row["height"], row["width"], np.random.default_rng(row["seed"]))
        assert mix.lam == row["lam"], row["seed"]
        assert (None if mix.box is None else list(mix.box)) == row["box"], row["seed"]


def test_minmax_boxes_equal_timm():
    for row in DRAWS["minmax_boxes"]:
        box = cutmix_box_minmax(
            row["height"], row["width"], row["minmax"], np.random.default_rng(row["seed"])
        )
        assert list(box) == row["box"], row["seed"]


@same_examples
@given(st.integers(1, 300), st.integers(1, 300), MINMAX, st.integers(0, 2**32 - 1))
def test_cutmix_lam_is_the_share_left_of_the_own_image(height, width, minmax, seed):
    """And the box lies within the image, with sides within `minmax` if that is given."""
    mixer = mixup(mixup_alpha=0.0, cutmix_minmax=minmax)
    mix = mixer.draw(height, width, np.random.default_rng(seed))
    top, left, bottom, right = mix.box
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    kept = np.ones((height, width))
    kept[top:bottom, left:right] = 0
    assert mix.lam == pytest.approx(kept.mean(), abs=1e-12)
    if minmax is not None:
        assert int(height * minmax[0]) <= bottom - top <= max(height * minmax[1], 1)
        assert int(width * minmax[0]) <= right - left <= max(width * minmax[1], 1)


MIXES = [
    *(Mix(0.3, None), Mix(1.0, None)),
    *(Mix(1 - 24 / 72, (2, 1, 5, 9)), Mix(1.0, (3, 4, 3, 4)), Mix(0.0, (0, 0, 8, 9))),
]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_mixing_blends_with_the_partner_or_pastes_its_box_and_nothing_else(size, mix):
    images = batch(size)
    x = images.numpy().copy()
    mixed = mix_images(images, mix).numpy()
    np.testing.assert_array_equal(images.numpy(), x)  # the input is left alone
    if mix.box is None and mix.lam < 1:
        np.testing.assert_allclose(mixed, mix.lam * x + (1 - mix.lam) * x[::-1], atol=1e-6)
        return
    top, left, bottom, right = mix.box or (0, 0, 0, 0)
    expected = x.copy()
    expected[:, :, top:bottom, left:right] = x[::-1, :, top:bottom, left:right]
    np.testing.assert_array_equal(mixed, expected)


@pytest.mark.gpu
@pytest.mark.skipif(paddle.device.cuda.device_count() == 0, reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("float16", 4e-3), ("bfloat16", 4e-2)]
)
@pytest.mark.parametrize("mix", [Mix(0.25, None), Mix(0.5, (0, 0, 4, 9))])
def test_gpu_equals_cpu_in_every_precision(dtype, tolerance, mix):
    expected = mix_images(batch(5), mix).numpy()
    mixed = mix_images(batch(5).cuda().astype(dtype), mix)
    assert mixed.place.is_gpu_place()
    assert mixed.astype("float32").astype(dtype).dtype == mixed.dtype
    np.testing.assert_allclose(mixed.astype("float32").numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets(lam, smoothing):
    labels = np.array([4, 0, 2, 4, 3])
    targets = mix_labels(paddle.to_tensor(labels), lam, num_classes=6, label_smoothing=smoothing)
    one_hot = np.eye(6)[labels]
    smooth = np.where(one_hot == 1, 1 - smoothing + smoothing / 6, smoothing / 6)
    assert targets.dtype == paddle.float32
    np.testing.assert_allclose(targets.numpy(), lam * smooth + (1 - lam) * smooth[::-1], atol=1e-6)
    np.testing.assert_allclose(targets.numpy().sum(1, dtype=np.float64), 1, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_call_mixes_images_and_labels_with_one_draw(size):
    images, labels = batch(size), paddle.arange(size)
    for seed in range(8):
        mixed, targets = mixup()(images, labels, np.random.default_rng(seed))
        mix = mixup().draw(8, 9, np.random.default_rng(seed))
        np.testing.assert_array_equal(mixed.numpy(), mix_images(images, mix).numpy())
        expected = mix_labels(labels, mix.lam, num_classes=10, label_smoothing=0.1)
        np.testing.assert_array_equal(targets.numpy(), expected.numpy())


def test_paddles_and_numpys_global_generators_are_not_touched():
    paddle.seed(0)
    np.random.seed(0)
    expected = paddle.rand([4]).numpy(), np.random.rand(4)
    paddle.seed(0)
    np.random.seed(0)
    mixup()(batch(4), paddle.arange(4), np.random.default_rng(0))
    np.testing.assert_array_equal(paddle.rand([4]).numpy(), expected[0])
    np.testing.assert_array_equal(np.random.rand(4), expected[1])
