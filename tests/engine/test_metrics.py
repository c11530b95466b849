"""Ranks of labels and figures, against scikit-learn, and Python and numpy the obvious way."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from harness import finish, finish_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet_paddle.config_keys import CLASS_FIGURES, TWO_CLASS_FIGURES
from replknet_paddle.data.dataset import EvalBatches
from replknet_paddle.engine.evaluate import OutcomeSums, label_ranks, top_classes
from replknet_paddle.runtime import processes

# Few values, so that many tie.
LOGITS = st.sampled_from([0.0, -0.0, 1.0, 2.0, np.inf, -np.inf, np.nan])


@st.composite
def batches(draw, logits=LOGITS):
    """Logits (N, classes) float32 and labels (N,)."""
    classes = draw(st.integers(1, 8))
    row = st.lists(logits, min_size=classes, max_size=classes)
    rows = draw(st.lists(st.tuples(row, st.integers(0, classes - 1)), min_size=1, max_size=20))
    return np.float32([row for row, _ in rows]), np.array([label for _, label in rows])


def outcomes_of(logits, labels, batch_size=100, best_by="top1", rank=0, ranks=1):
    """What an evaluation gives for these logits (N, classes), in as many processes."""
    batches = EvalBatches(len(labels), batch_size, rank=rank, world_size=ranks)
    loader = SimpleNamespace(dataset=labels, batch_sampler=batches)
    sums = OutcomeSums(logits.shape[1], loader, best_by)
    for names in batches:
        part = [index for _, index in names]
        sums.add(paddle.to_tensor(logits[part]), paddle.to_tensor(labels[part]))
    return sums.total()


def print_records(arguments) -> int:
    """Print the figures of random logits, for 2 and 7 classes, in this process of several."""
    processes.init()
    place = dict(rank=processes.rank(), ranks=processes.world_size())
    for classes in (2, 7):
        rng = np.random.default_rng(classes)
        logits = rng.normal(0, 3, (23, classes)).round(1).astype("float32")
        total = outcomes_of(logits, rng.integers(0, classes, 23), int(arguments[0]), **place)
        print(json.dumps(total.record("val")), total)
    return 0


def test_figures_are_the_same_digits_in_one_two_and_three_processes():
    one = finish([23], target=print_records).splitlines()[-2:]
    assert [line.count("val_") for line in one] == [12, 10]
    for ranks in (2, 3):
        for said in finish_ranks([4], ranks=ranks, target=print_records):
            assert said.splitlines()[-2:] == one


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
    total = outcomes_of(*batch)
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
    total = outcomes_of(logits, labels, batch_size)
    assert total.images == len(labels)
    assert total.loss == pytest.approx(losses.mean(), rel=1e-5, abs=1e-5)
    assert total.record("val") == outcomes_of(logits, labels).record("val")  # the same digits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_counted_in_float32(dtype):
    if dtype == "float16" and not paddle.is_compiled_with_cuda():
        logits = paddle.to_tensor(np.array([[1.0, 2.0, 3.0]], "float16"))
    else:
        logits = paddle.to_tensor([[1.0, 2.0, 3.0]]).astype(dtype)
    assert outcomes_of(logits, np.array([2])).loss == pytest.approx(0.4076059, rel=1e-5)


def test_a_record_has_percentages_with_units_in_their_names_and_figures_from_0_to_1():
    logits = np.float32([[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4]])
    outcomes = replace(outcomes_of(logits, np.array([1, 1, 5])), losses=np.array([0.5, 0.25, 0.75]))
    record = outcomes.record("val_ema")
    names = ("top1_percent", "top5_percent", "loss", *CLASS_FIGURES)
    assert [*record] == [f"val_ema_{name}" for name in names]
    assert [*record.values()][:4] == pytest.approx([100 / 3, 200 / 3, 0.5, 0.25])
    assert str(outcomes) == "top-1 33.33 % (1/3), top-5 66.67 % (2/3), loss 0.500000"
    assert outcomes.score == outcomes.top1_percent
    assert replace(outcomes, losses=np.array([1.0, np.nan, 1.0])).score == -1
    by_f1 = replace(outcomes, best_by="macro_f1")
    assert str(by_f1) == "top-1 33.33 % (1/3), top-5 66.67 % (2/3), macro_f1 22.22 %, loss 0.500000"
    assert by_f1.score == pytest.approx(100 * (0 + 2 / 3 + 0) / 3)
    few = outcomes_of(logits[:, :5], np.array([1, 1, 4]))
    assert str(few).startswith("top-1 33.33 % (1/3), loss")
    assert few.record("val").keys() == outcomes.record("val").keys()  # the same for all data


@settings(deadline=None, max_examples=100)
@given(batches())
def test_figures_of_classes_are_scikit_learns(batch):
    """With ties, NaN, classes that no image has or gets, and a single class."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="requirements/demo.txt")
    total, labels = outcomes_of(*batch), batch[1]
    predicted = top_classes(*map(paddle.to_tensor, batch), 1)[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of answers that are no label
        balanced = sklearn_metrics.balanced_accuracy_score(labels, predicted)
    wanted = {"balanced_accuracy": balanced}
    for mean in ("macro", "weighted", None):
        for of in ("precision", "recall", "f1"):
            score = getattr(sklearn_metrics, f"{of}_score")
            numbers = None if mean else range(total.num_classes)
            options = dict(average=mean, labels=numbers, zero_division=0)
            wanted[f"{mean}_{of}"] = score(labels, predicted, **options)
    got = total.figures() | {f"None_{of}": each for of, each in total.per_class().items()}
    assert {*CLASS_FIGURES} <= wanted.keys() <= got.keys()
    for name, figure in wanted.items():
        np.testing.assert_allclose(got[name], figure, rtol=0, atol=1e-9, err_msg=name)


# Sure answers, whose probabilities are 1 in float32, among ties and others.
SURE = st.sampled_from([0.0, -0.0, 1.0, 40.0, 41.0, np.inf, -np.inf]) | st.floats(-90, 90, width=32)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(SURE, SURE, st.integers(0, 1)), min_size=1, max_size=30))
def test_figures_of_two_classes_are_scikit_learns_by_the_difference_of_logits(rows):
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="requirements/demo.txt")
    logits, labels = np.float32([row[:2] for row in rows]), np.array([row[2] for row in rows])
    total = outcomes_of(logits, labels, best_by="roc_auc")
    with np.errstate(invalid="ignore"):
        margins = np.subtract(*logits.T[::-1], dtype="float64")
    is_defined = len(set(labels)) == 2 and not np.isnan(margins).any()
    for name in TWO_CLASS_FIGURES:
        figure, wanted = total.figures()[name], np.nan
        if is_defined:  # scikit-learn takes no infinity
            wanted = getattr(sklearn_metrics, f"{name}_score")(labels, margins.clip(-1e9, 1e9))
        assert figure == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    is_best = is_defined and np.isfinite(total.loss)
    assert total.score == (100 * total.figures()["roc_auc"] if is_best else -1)
