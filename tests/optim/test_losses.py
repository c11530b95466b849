import numpy as np
import paddle
import pytest

from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

pytestmark = pytest.mark.paddle_version

LABELS = np.array([0, 3, 3, 6])


def log_softmax(logits):
    logits = logits.astype("float64")
    return (
        logits
        - logits.max(1, keepdims=True)
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    )


def smoothed_one_hot(labels, classes, smoothing):
    return np.eye(classes)[labels] * (1 - smoothing) + smoothing / classes


@pytest.fixture
def logits():
    return (5 * np.random.default_rng(0).standard_normal((4, 7))).astype("float32")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_equals_the_closed_form(logits, smoothing):
    loss = LabelSmoothingCrossEntropy(smoothing)(paddle.to_tensor(logits), paddle.to_tensor(LABELS))
    expected = -(smoothed_one_hot(LABELS, 7, smoothing) * log_softmax(logits)).sum(1).mean()
    assert loss.shape == [] and loss.dtype == paddle.float32
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_soft_targets_equal_the_closed_form(logits):
    targets = np.random.default_rng(1).dirichlet(np.ones(7), 4).astype("float32")
    loss = SoftTargetCrossEntropy()(paddle.to_tensor(logits), paddle.to_tensor(targets))
    expected = -(targets * log_softmax(logits)).sum(1).mean()
    assert loss.shape == [] and loss.dtype == paddle.float32
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_one_hot_as_soft_target_equals_label_smoothing(logits, smoothing):
    soft = SoftTargetCrossEntropy()(
        paddle.to_tensor(logits),
        paddle.to_tensor(smoothed_one_hot(LABELS, 7, smoothing).astype("float32")),
    )
    hard = LabelSmoothingCrossEntropy(smoothing)(paddle.to_tensor(logits), paddle.to_tensor(LABELS))
    assert float(soft) == pytest.approx(float(hard), rel=1e-6)


def test_gradient_is_softmax_minus_target_over_the_batch(logits):
    x = paddle.to_tensor(logits, stop_gradient=False)
    LabelSmoothingCrossEntropy(0.1)(x, paddle.to_tensor(LABELS)).backward()
    expected = (np.exp(log_softmax(logits)) - smoothed_one_hot(LABELS, 7, 0.1)) / 4
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_lose_nothing_beyond_their_own_rounding(logits, dtype):
    half = paddle.to_tensor(logits).astype(dtype)
    rounded = half.astype("float32").numpy()
    targets = smoothed_one_hot(LABELS, 7, 0.1)
    expected = -(targets * log_softmax(rounded)).sum(1).mean()
    hard = LabelSmoothingCrossEntropy(0.1)(half, paddle.to_tensor(LABELS))
    soft = SoftTargetCrossEntropy()(half, paddle.to_tensor(targets.astype("float32")))
    for loss in (hard, soft):
        assert loss.dtype == paddle.float32
        assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(paddle.device.cuda.device_count() == 0, reason="needs a GPU")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_mixed_precision_does_not_reach_the_loss(logits, level):
    x, labels = paddle.to_tensor(logits), paddle.to_tensor(LABELS)
    loss = LabelSmoothingCrossEntropy(0.1)
    with paddle.amp.auto_cast(level=level, dtype="float16"):
        inside = loss(x, labels)
    assert inside.dtype == paddle.float32
    assert float(inside) == pytest.approx(float(loss(x, labels)), rel=1e-6)


@pytest.mark.parametrize("labels_shape", [[3], [4, 1], [4, 7]])
def test_labels_of_another_shape_are_refused(logits, labels_shape):
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        LabelSmoothingCrossEntropy(0.1)(
            paddle.to_tensor(logits), paddle.zeros(labels_shape, "int64")
        )


@pytest.mark.parametrize("targets_shape", [[4], [4, 6], [3, 7]])
def test_soft_targets_of_another_shape_are_refused(logits, targets_shape):
    with pytest.raises(ValueError, match=r"one shape \(N, C\)"):
        SoftTargetCrossEntropy()(paddle.to_tensor(logits), paddle.zeros(targets_shape))
