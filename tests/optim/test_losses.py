import numpy as np
import paddle
import pytest

from replknet_paddle.data.transforms.mixup import mix_labels
from replknet_paddle.optim.losses import (
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    WeightedCrossEntropy,
    class_weights,
)
from replknet_paddle.runtime.errors import InputError

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


# ---- weights of the classes


@pytest.mark.parametrize("present", [[0, 1, 2], [1, 4], [3]])
def test_balanced_weights_are_scikit_learns(present):
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels, expected = np.repeat(present, np.arange(1, 40, 15)[: len(present)]), np.zeros(5)
    expected[present] = compute("balanced", classes=np.array(present), y=labels)
    np.testing.assert_allclose(class_weights("balanced", labels, 5), expected, rtol=1e-9)


def test_a_list_of_weights_keeps_its_ratios_and_has_a_mean_of_1_over_the_images():
    weights = class_weights([1, 5, 4], np.array([0, 0, 0, 2]), 3)
    np.testing.assert_allclose(weights, np.array([1, 5, 4]) / (7 / 4), rtol=1e-12)
    for wanted, says in (([1, 2], "has 2 numbers; allowed: bal"), ([0, 9, 0], ", 0 in all over")):
        with pytest.raises(InputError, match=says):
            class_weights(wanted, np.array([0, 0, 2]), 3)


WEIGHTS = np.array([0.2, 1, 3, 0.7, 0, 1, 9])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_a_mixed_image_loses_what_its_two_labels_do_by_their_shares(smoothing, lam):
    """And labels alone what mixing nothing gives."""
    targets = smoothed_one_hot(smoothing) * WEIGHTS[LABELS][:, None]
    mixed = lam * targets + (1 - lam) * targets[::-1]
    expected = -(mixed * log_softmax(LOGITS)).sum(1).mean()
    criterion, labels = WeightedCrossEntropy(WEIGHTS, smoothing), paddle.to_tensor(LABELS)
    soft = mix_labels(labels, lam, num_classes=7, label_smoothing=smoothing)
    for target in [soft] + [labels] * (lam == 1):
        loss = criterion(paddle.to_tensor(LOGITS), target)
        assert loss.dtype == paddle.float32 and float(loss) == pytest.approx(expected, rel=2e-6)
