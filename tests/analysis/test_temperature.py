"""Calibration error and fitted temperature against their definitions, written the obvious way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.analysis.temperature import fit_temperature, statistics
from replknet_paddle.runtime.errors import InputError

EDGES = st.sampled_from([m / 15 for m in range(16)])
CONFIDENCES = st.one_of(EDGES, EDGES.map(lambda c: min(1, np.nextafter(c, 2))), st.floats(0, 1))


def error_of(images) -> float:
    """The calibration error of (confidence, whether it is right)."""
    confidences, is_right = np.array(images).T
    labels, classes = np.ones(len(images), int), 2 - is_right[:, None].astype(int)
    unused = np.zeros(len(images))
    return Outcomes(3, labels, unused, unused, classes, confidences[:, None]).calibration_error


@given(st.lists(st.tuples(CONFIDENCES, st.booleans()), min_size=1, max_size=60))
def test_the_calibration_error_is_the_papers(images):
    """Guo et al., section 2: bin m of 15 has the images with a confidence in ](m - 1)/15, m/15]."""
    total = 0.0
    for m in range(1, 16):
        within = [x for x in images if (m - 1) / 15 < x[0] <= m / 15 or m == 1 and x[0] == 0]
        if within:
            confidence, accuracy = np.mean(within, axis=0)
            total += len(within) / len(images) * abs(accuracy - confidence)
    assert error_of(images) == pytest.approx(total, abs=1e-9)


@st.composite
def answers(draw):
    """Logits (N, classes) float32, maybe with ties, and labels (N,), of some or all classes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, classes = draw(st.integers(1, 40)), draw(st.integers(2, 12))
    logits = rng.normal(0, draw(st.sampled_from([0.05, 1, 30])), (images, classes))
    logits = logits.round() if draw(st.booleans()) else logits
    labels = rng.integers(0, draw(st.integers(1, classes)), images)
    return logits.astype("f"), np.where(rng.random(images) < 0.6, logits.argmax(axis=1), labels)


@settings(max_examples=150)
@given(answers())
def test_the_temperature_is_scipys(batch):
    """The root of the derivative, found by another method; where there is none within the limits,
    an error says which way it lies."""
    optimize = pytest.importorskip("scipy.optimize")
    special = pytest.importorskip("scipy.special")
    logits, labels = batch[0].astype("float64"), batch[1]
    rows = np.arange(len(labels))

    def slope(inverse):
        expected = (special.softmax(inverse * logits, axis=1) * logits).sum(axis=1)
        return np.mean(expected - logits[rows, labels])

    if slope(0.01) < -1e-9 and slope(100) > 1e-9:
        wanted = 1 / optimize.brentq(slope, 0.01, 100, xtol=1e-15, rtol=1e-14, maxiter=1000)
        found = fit_temperature(*batch)
        assert found == pytest.approx(wanted, rel=1e-9)
        losses, *_, confidences = statistics(*batch, found)
        shares = special.softmax(logits / found, axis=1)
        np.testing.assert_allclose(losses, -np.log(shares[rows, labels]), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(confidences, shares.max(axis=1), rtol=1e-9)
    elif slope(100) < -1e-9 or slope(0.01) > 1e-9:  # else too near to zero to say
        with pytest.raises(InputError, match="the lower" if slope(100) < 0 else "the higher"):
            fit_temperature(*batch)


def test_what_is_not_finite_has_no_calibration_error_and_no_temperature():
    assert np.isnan(error_of([(0.5, True), (np.nan, False)]))
    with pytest.raises(InputError, match="not finite"):
        fit_temperature(np.float32([[np.nan, 3], [2, 0]]), np.array([0, 1]))
