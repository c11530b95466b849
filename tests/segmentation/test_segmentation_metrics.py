"""mIoU and pixel accuracy against counts by hand."""

import numpy as np
import paddle
import pytest

from replknet_paddle.segmentation.evaluate import (
    ConfusionSums,
    SegmentationMetrics,
    image_iou_percent,
)


def sums_of(*pairs, classes=3):
    """Of (labels, predictions), each a list of rows."""
    sums = ConfusionSums(classes)
    for labels, predicted in pairs:
        sums.add(*(paddle.to_tensor(np.array([rows], "uint8")) for rows in (predicted, labels)))
    return sums


def test_counts_by_hand_with_ignored_pixels():
    metrics = sums_of(
        ([[0, 0, 1, 255]], [[0, 1, 1, 2]]),
        ([[2, 2], [255, 0]], [[2, 0], [1, 0]]),
    ).total()
    # Label 0: pixels 3, right 2, predicted 3 -> IoU 2 / 4. Label 1: 1, 1, 2 -> 1 / 2.
    # Label 2: 2, 1, 1 -> 1 / 2. The two ignored pixels were predicted 2 and 1: not counted.
    assert metrics.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert metrics.class_iou_percent.tolist() == [50.0, 50.0, 50.0]
    np.testing.assert_allclose(metrics.class_accuracy_percent, [200 / 3, 100, 50])
    assert metrics.miou_percent == 50.0
    assert metrics.pixel_accuracy_percent == pytest.approx(100 * 4 / 6)
    assert metrics.images == 2


def test_a_class_that_nothing_has_is_left_out_of_the_mean():
    metrics = sums_of(([[0, 1, 1, 1]], [[0, 1, 1, 0]])).total()
    iou = metrics.class_iou_percent
    assert iou[:2].tolist() == [50.0, pytest.approx(200 / 3)] and np.isnan(iou[2])
    assert metrics.miou_percent == pytest.approx((50 + 200 / 3) / 2)
    assert metrics.record("val")["val_class_iou_percent"][2] is None
    assert "2 of 3 classes" in str(metrics)
    assert str(metrics).splitlines()[-1].split() == ["2", "-", "-"]  # not 0, nor nan


def test_confusions_come_by_their_pixels():
    metrics = sums_of(([[0, 0, 0, 1, 1, 2, 255]], [[1, 1, 0, 2, 1, 2, 0]])).total()
    assert metrics.confusions() == [(0, 1, 2), (1, 2, 1)]
    assert metrics.confusions(1) == [(0, 1, 2)]
    assert sums_of(([[0, 255]], [[0, 1]])).total().confusions() == []


def test_the_worst_images_come_by_the_iou_of_what_their_labels_have():
    ious = np.array([50.0, np.nan, 100.0, 20.0, 50.0, 0.0])
    metrics = SegmentationMetrics(6, np.eye(2, dtype=int), None, ious)
    assert metrics.worst_images(10) == [5, 3, 0, 4]  # neither what is right nor what has no label
    assert metrics.worst_images(2) == [5, 3]


def test_the_iou_of_an_image_leaves_out_classes_that_are_only_predicted():
    # Label 0: 3 pixels, 2 of them right, one taken for the absent class 2; label 1: all right.
    confusion = np.array([[2, 0, 1], [0, 4, 0], [0, 0, 0]])
    assert image_iou_percent(confusion) == pytest.approx((100 * 2 / 3 + 100) / 2)
    assert np.isnan(image_iou_percent(np.zeros((3, 3), int)))


def test_a_class_only_ever_predicted_counts_as_zero():
    metrics = sums_of(([[0, 0]], [[0, 2]])).total()
    assert metrics.class_iou_percent[2] == 0
    assert metrics.miou_percent == 25.0


def test_nothing_but_ignored_pixels_is_no_division_by_zero():
    metrics = sums_of(([[255, 255]], [[0, 2]])).total()
    assert metrics.miou_percent == 0 and metrics.pixel_accuracy_percent == 0


def test_against_sets_of_pixels_on_random_maps():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, (2, 3, 17, 13))
    labels[rng.random(labels.shape) < 0.2] = 255
    sums = sums_of(*zip(labels, predicted), classes=5)
    ious = []
    for k in range(5):
        is_label = {tuple(p) for p in np.argwhere(labels == k)}
        is_predicted = {tuple(p) for p in np.argwhere((predicted == k) & (labels != 255))}
        ious.append(100 * len(is_label & is_predicted) / len(is_label | is_predicted))
    np.testing.assert_allclose(sums.total().class_iou_percent, ious)
