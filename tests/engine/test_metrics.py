"""Ranks of labels, and sums over batches, against Python and numpy written the obvious way."""

from dataclasses import replace

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.engine.evaluate import OutcomeSums, label_ranks, top_classes

# Few values, so that many tie.
LOGITS = st.sampled_from([0.0, -0.0, 1.0, 2.0, np.inf, -np.inf, np.nan])


@st.composite
def batches(draw, logits=LOGITS):
    """Logits (N, classes) float32 and labels (N,)."""
    classes = draw(st.integers(1, 8))
    row = st.lists(logits, min_size=classes, max_size=classes)
    rows = draw(st.lists(st.tuples(row, st.integers(0, classes - 1)), min_size=1, max_size=20))
    return np.float32([row for row, _ in rows]), np.array([label for _, label in rows])


def rank_by_hand(row, label: int) -> int:
    """Equal logits rank by class number; a NaN goes before the label, and a label of NaN behind all
    classes, itself included."""
    if np.isnan(row[label]):
        return len(row)
    return sum(
        np.isnan(x) or x > row[label] or (x == row[label] and i < label) for i, x in enumerate(row)
    )


@settings(deadline=None, max_examples=200)
@given(batches())
def test_ranks_and_top_classes_and_counts_agree_with_the_definition(batch):
    """So that the tables of a report, which are made of top classes, agree with its headline, and a
    network that gives NaN is never right."""
    expected = np.array([rank_by_hand(row, label) for row, label in zip(*batch)])
    logits, labels = map(paddle.to_tensor, batch)
    assert label_ranks(logits, labels).tolist() == expected.tolist()
    classes = top_classes(logits, labels, logits.shape[1])
    assert (np.sort(classes, axis=1) == np.arange(logits.shape[1])).all()  # each class once
    places = (classes == batch[1][:, None]).argmax(axis=1)
    np.testing.assert_array_equal(places, np.minimum(expected, logits.shape[1] - 1))
    for count in (1, 5):
        assert np.array_equal(top_classes(logits, labels, count), classes[:, :count])
    sums = OutcomeSums(logits.shape[1])
    sums.add(logits, labels)
    total = sums.total()
    assert (total.images, total.top1, total.top5) == (
        len(labels), (expected < 1).sum(), (expected < 5).sum(),
    )  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(batches(st.floats(-30, 30, width=32)), st.integers(1, 20))  # Paddle cuts losses at 64
def test_the_loss_is_numpys_in_any_batches(batch, batch_size):
    logits, labels = batch
    wide = logits.astype("float64")
    top = wide.max(1)
    log_sums = np.log(np.exp(wide - top[:, None]).sum(1)) + top
    losses = log_sums - wide[np.arange(len(labels)), labels]
    sums = OutcomeSums(logits.shape[1])
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        sums.add(paddle.to_tensor(logits[part]), paddle.to_tensor(labels[part]))
    assert sums.total().images == len(labels)
    assert sums.total().loss == pytest.approx(losses.mean(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_counted_in_float32(dtype):
    if dtype == "float16" and not paddle.is_compiled_with_cuda():
        logits = paddle.to_tensor(np.array([[1.0, 2.0, 3.0]], "float16"))
    else:
        logits = paddle.to_tensor([[1.0, 2.0, 3.0]]).astype(dtype)
    sums = OutcomeSums(3)
    sums.add(logits, paddle.to_tensor([2]))
    assert sums.total().loss == pytest.approx(0.4076059, rel=1e-5)


def test_a_record_has_percentages_with_units_in_their_names():
    outcomes = Outcomes(images=101, top1=50, top5=101, loss=0.5, num_classes=6)
    assert outcomes.record("val_ema") == {
        "val_ema_top1_percent": pytest.approx(100 * 50 / 101),
        "val_ema_top5_percent": 100.0,
        "val_ema_loss": 0.5,
    }
    assert str(outcomes) == "top-1 49.50 % (50/101), top-5 100.00 % (101/101), loss 0.500000"
    assert outcomes.score == outcomes.top1_percent
    assert replace(outcomes, loss=np.nan).score == -1
    few = replace(outcomes, num_classes=5)
    assert str(few) == "top-1 49.50 % (50/101), loss 0.500000"
    assert few.record("val") == outcomes.record("val")  # whose keys are the same for all data
