"""Ranks of labels, and sums over batches, against numpy written the obvious way."""

import numpy as np
import paddle
import pytest

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.engine.evaluate import OutcomeSums, label_ranks, top_classes


def ranks(logits, labels):
    return label_ranks(
        paddle.to_tensor(np.asarray(logits, "float32")), paddle.to_tensor(np.asarray(labels))
    ).tolist()


@pytest.mark.parametrize(
    "logits, label, rank",
    [
        ([3, 1, 2], 0, 0),
        ([3, 1, 2], 1, 2),
        ([1, 1, 1], 0, 0),  # equal logits rank by class number
        ([1, 1, 1], 1, 1),
        ([1, 1, 1], 2, 2),
        ([0, 2, 2, 1], 2, 1),
        ([float("inf"), float("inf"), 0], 1, 1),
        ([float("-inf")] * 3, 2, 2),
        ([0.0, -0.0], 1, 1),
        ([7], 0, 0),
    ],
)
def test_rank_counts_the_classes_before_the_label(logits, label, rank):
    assert ranks([logits], [label]) == [rank]


@pytest.mark.parametrize(
    "logits, label, rank",
    [
        ([np.nan, 5, 1], 1, 1),  # a NaN goes before the label
        ([np.nan, 5, np.nan], 1, 2),
        ([np.nan, 5, 1], 0, 3),  # a label of NaN: behind all classes, itself included
        ([np.nan] * 3, 0, 3),
        ([np.nan] * 6, 0, 6),
    ],
)
def test_a_network_that_gives_nan_is_never_right(logits, label, rank):
    assert ranks([logits], [label]) == [rank]


@pytest.mark.parametrize("values", [(0.0,), (0.0, 1.0), (0.0, 1.0, np.nan), (np.nan,),
                                    (np.nan, np.inf, -np.inf, -0.0)])  # fmt: skip
def test_the_label_stands_among_the_top_classes_where_its_rank_says(values):
    """So that the tables of a report, which are made of these classes, agree with its headline."""
    rng = np.random.default_rng(0)
    logits = rng.choice(np.float32(values), (500, 7))
    labels = rng.integers(0, 7, 500)
    expected = np.array(ranks(logits, labels))
    logits, labels = paddle.to_tensor(logits), paddle.to_tensor(labels)
    for count in (1, 5, 7):
        classes = top_classes(logits, labels, count)
        assert classes.shape == (500, count)
        is_label = classes == labels.numpy()[:, None]
        places = np.where(is_label.any(axis=1), is_label.argmax(axis=1), count)
        if count < 7:
            np.testing.assert_array_equal(places, np.minimum(expected, count))
    assert (np.sort(classes, axis=1) == np.arange(7)).all()  # each class once


@pytest.mark.parametrize("logits", [[np.nan] * 10, [np.nan] * 5 + [1.0] * 5])
def test_nan_logits_score_nothing(logits):
    sums = OutcomeSums()
    sums.add(paddle.to_tensor([logits] * 10), paddle.arange(10))
    counted = sums.values
    assert counted[1] == 0 and counted[2] == 0, counted


def test_constant_logits_are_right_for_one_class_only():
    sums = OutcomeSums()
    sums.add(paddle.zeros([10, 10]), paddle.arange(10))
    assert (sums.total().top1, sums.total().top5) == (1, 5)


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_with_five_classes_or_fewer_all_are_in_the_top_5(classes):
    rng = np.random.default_rng(classes)
    sums = OutcomeSums()
    labels = rng.integers(0, classes, 20)
    sums.add(
        paddle.to_tensor(rng.normal(size=(20, classes)).astype("float32")), paddle.to_tensor(labels)
    )
    assert sums.total().top5 == 20


def by_hand(logits, labels):
    """Top-1 and top-5 counts, and the mean cross entropy in float64."""
    order = np.argsort(-logits, axis=1, kind="stable")
    wide = logits.astype("float64")
    top = wide.max(1)
    log_sums = np.log(np.exp(wide - top[:, None]).sum(1)) + top
    losses = log_sums - wide[np.arange(len(labels)), labels]
    return (
        int((order[:, 0] == labels).sum()),
        int((order[:, :5] == labels[:, None]).any(1).sum()),
        losses.mean(),
    )


@pytest.mark.parametrize("integers", [False, True])
def test_metrics_equal_numpys(integers):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(500, 30)) * 3
    logits = (np.round(logits) if integers else logits).astype("float32")  # integers: many ties
    labels = rng.integers(0, 30, 500)
    sums = OutcomeSums()
    sums.add(paddle.to_tensor(logits), paddle.to_tensor(labels))
    top1, top5, loss = by_hand(logits, labels)
    got = sums.total()
    assert (got.images, got.top1, got.top5) == (500, top1, top5)
    assert got.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 101])
def test_sums_do_not_depend_on_the_batches(batch_size):
    rng = np.random.default_rng(4)
    logits = paddle.to_tensor(rng.normal(size=(101, 9)).astype("float32") * 5)
    labels = paddle.to_tensor(rng.integers(0, 9, 101))
    whole, parts = OutcomeSums(), OutcomeSums()
    whole.add(logits, labels)
    for start in range(0, 101, batch_size):
        parts.add(logits[start : start + batch_size], labels[start : start + batch_size])
    whole, parts = whole.total(), parts.total()
    assert (parts.images, parts.top1, parts.top5) == (whole.images, whole.top1, whole.top5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_counted_in_float32(dtype):
    if dtype == "float16" and not paddle.is_compiled_with_cuda():
        logits = paddle.to_tensor(np.array([[1.0, 2.0, 3.0]], "float16"))
    else:
        logits = paddle.to_tensor([[1.0, 2.0, 3.0]]).astype(dtype)
    sums = OutcomeSums()
    sums.add(logits, paddle.to_tensor([2]))
    assert sums.total().loss == pytest.approx(0.4076059, rel=1e-5)


def test_a_record_has_percentages_with_units_in_their_names():
    metrics = Outcomes(images=101, top1=50, top5=101, loss=0.5)
    assert metrics.record("val_ema") == {
        "val_ema_top1_percent": pytest.approx(100 * 50 / 101),
        "val_ema_top5_percent": 100.0,
        "val_ema_loss": 0.5,
    }
    assert str(metrics) == "top-1 49.50 % (50/101), top-5 100.00 % (101/101), loss 0.500000"
