import numpy as np
import paddle
import pytest

from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

pytestmark = pytest.mark.paddle_version

LOGITS = (5 * np.random.default_rng(0).standard_normal((4, 7))).astype("float32")
LABELS = np.array([0, 3, 3, 6])


def log_softmax(logits):
    logits = logits.astype("float64")
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def smoothed_one_hot(smoothing):
    return np.eye(7)[LABELS] * (1 - smoothing) + smoothing / 7


def assert_equals_the_closed_form(loss, logits, targets):
    expected = -(targets * log_softmax(logits)).sum(1).mean()
    assert loss.shape == [] and loss.dtype == paddle.float32
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_both_losses_equal_the_closed_form(smoothing, dtype):
    """Half-precision logits lose nothing beyond their own rounding."""
    logits = paddle.to_tensor(LOGITS).astype(dtype)
    rounded, targets = logits.astype("float32").numpy(), smoothed_one_hot(smoothing)
    hard = LabelSmoothingCrossEntropy(smoothing)(logits, paddle.to_tensor(LABELS))
    soft = SoftTargetCrossEntropy()(logits, paddle.to_tensor(targets.astype("float32")))
    for loss in (hard, soft):
        assert_equals_the_closed_form(loss, rounded, targets)


def test_soft_targets_may_be_any_distribution():
    targets = np.random.default_rng(1).dirichlet(np.ones(7), 4).astype("float32")
    loss = SoftTargetCrossEntropy()(paddle.to_tensor(LOGITS), paddle.to_tensor(targets))
    assert_equals_the_closed_form(loss, LOGITS, targets)


def test_gradient_is_softmax_minus_target_over_the_batch():
    x = paddle.to_tensor(LOGITS, stop_gradient=False)
    LabelSmoothingCrossEntropy(0.1)(x, paddle.to_tensor(LABELS)).backward()
    expected = (np.exp(log_softmax(LOGITS)) - smoothed_one_hot(0.1)) / 4
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(paddle.device.cuda.device_count() == 0, reason="needs a GPU")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_mixed_precision_does_not_reach_the_loss(level):
    x, labels = paddle.to_tensor(LOGITS), paddle.to_tensor(LABELS)
    loss = LabelSmoothingCrossEntropy(0.1)
    with paddle.amp.auto_cast(level=level, dtype="float16"):
        inside = loss(x, labels)
    assert inside.dtype == paddle.float32
    assert float(inside) == pytest.approx(float(loss(x, labels)), rel=1e-6)


@pytest.mark.parametrize("labels_shape", [[3], [4, 1], [4, 7]])
def test_labels_of_another_shape_are_refused(labels_shape):
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        LabelSmoothingCrossEntropy(0.1)(
            paddle.to_tensor(LOGITS), paddle.zeros(labels_shape, "int64")
        )


@pytest.mark.parametrize("targets_shape", [[4], [4, 6], [3, 7]])
def test_soft_targets_of_another_shape_are_refused(targets_shape):
    with pytest.raises(ValueError, match=r"one shape \(N, C\)"):
        SoftTargetCrossEntropy()(paddle.to_tensor(LOGITS), paddle.zeros(targets_shape))
