"""Merging and folding keep what a network computes, and only fold what can be folded exactly."""

import numpy as np
import paddle
import pytest
from paddle import nn
from small_networks import (
    FORMS,
    assert_same,
    double_precision,
    float32_tolerance,
    images,
    logits,
    small_config,
    small_network,
)

from replknet_paddle.deploy.fold import (
    compare_forms,
    fold_norm_before,
    folded,
    largest_deviation,
    merged,
)

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]


def assert_outputs_stay(model, build, batch):
    """In float64 to better than float32 can say, and in float32 to its rounding."""
    exact = double_precision(model)
    reference = logits(exact, batch.astype("float64"))
    in_float64 = logits(build(exact), batch.astype("float64"))
    assert in_float64.dtype == reference.dtype == np.float64
    # Some constants within Paddle's batch norm are of float32, which leaves 4e-9.
    assert largest_deviation(in_float64, reference) < 1e-7
    tolerance = float32_tolerance(model)
    assert 5e-6 < tolerance < 5e-5
    assert_same(logits(build(model), batch), reference, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [merged, folded])
def test_outputs_stay(tmp_path, form, build):
    model = small_network(small_config(tmp_path, form))
    for batch in (images(1), images(3, size=45)):
        assert_outputs_stay(model, build, batch)


@pytest.mark.parametrize("form", FORMS)
def test_no_norm_is_left_in_a_folded_classifier(tmp_path, form):
    model = folded(small_network(small_config(tmp_path, form)))
    assert not [layer for layer in model.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    assert not [name for name in model.state_dict() if "norm" in name or "_bn" in name]


@pytest.mark.parametrize("build", [merged, folded])
def test_the_network_itself_stays_as_it_is(tmp_path, build):
    model = small_network(small_config(tmp_path))
    model.train()
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    build(model)
    after = {name: value.numpy() for name, value in model.state_dict().items()}
    assert model.training and before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_folding_what_is_folded_changes_nothing(tmp_path):
    config = small_config(tmp_path)
    once = folded(small_network(config))
    twice = folded(once)
    assert np.array_equal(logits(once, images(2)), logits(twice, images(2)))


def test_a_backbone_keeps_the_norms_of_its_maps(tmp_path):
    extra = "  OUT_INDICES: [1, 3]\n  NORM_INTER_FEATURES: True\n"
    model = small_network(small_config(tmp_path, extra=extra))
    assert_outputs_stay(model, folded, images(2, size=64))
    result = folded(model)
    left = [name for name, layer in result.named_sublayers() if isinstance(layer, nn.BatchNorm2D)]
    assert left == [f"stages.{i}.norm" for i in range(4)]


@pytest.mark.parametrize("padding, groups, folds", [(0, 1, True), (1, 1, False), (0, 4, False)])
def test_a_norm_goes_into_the_convolution_after_it_only_where_that_is_exact(padding, groups, folds):
    rng = np.random.default_rng(0)
    norm, conv = nn.BatchNorm2D(4), nn.Conv2D(4, 8, 3, padding=padding, groups=groups)
    norm._mean.set_value(rng.normal(size=4).astype("float32"))
    norm._variance.set_value(rng.uniform(0.5, 2, size=4).astype("float32"))
    norm.eval()
    batch = paddle.to_tensor(rng.normal(size=(2, 4, 6, 6)).astype("float32"))
    with paddle.no_grad():
        before = conv(norm(batch)).numpy()
        left = fold_norm_before(norm, conv)
        after = conv(left(batch)).numpy()
    assert (left is not norm) == folds
    assert_same(after, before, 1e-5)


def test_forms_are_compared_by_size_and_outputs(tmp_path):
    model = small_network(small_config(tmp_path))
    as_it_is, after_merging, after_folding = compare_forms(model, images(2))
    count = sum(int(np.prod(value.shape)) for value in model.state_dict().values())
    assert as_it_is.parameters == count and as_it_is.deviation is None
    assert after_folding.parameters < after_merging.parameters < count
    tolerance = 2 * float32_tolerance(model)  # both sides are rounded
    assert 0 < after_merging.deviation < tolerance and 0 < after_folding.deviation < tolerance


def test_deviation_is_relative_to_the_largest_logit():
    reference = np.array([[1.0, -4.0], [2.0, 0.0]])
    assert largest_deviation(reference, reference) == 0
    assert largest_deviation(reference + [[0, 0], [0, 1]], reference) == 0.25
