"""The heads against numpy, at sizes that nothing divides."""

import numpy as np
import paddle
import pytest
from numpy_heads import fcn_head, uper_head

from replknet_paddle.segmentation.upernet import FCNHead, UPerHead

pytestmark = pytest.mark.paddle_version

CHANNELS = [3, 4, 5, 6]


def randomized(layer, seed=0):
    """`layer` in evaluation mode with random weights and statistics; also these, as float64."""
    rng = np.random.default_rng(seed)
    for name, value in layer.state_dict().items():
        numbers = rng.normal(0, 0.5, value.shape)
        if name.endswith(("_variance", "norm.weight")):
            numbers = rng.uniform(0.3, 2.0, value.shape)
        value.set_value(numbers.astype("float32"))
    layer.eval()
    return layer, {name: v.numpy().astype("float64") for name, v in layer.state_dict().items()}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "sizes", [[(13, 19), (7, 10), (4, 5), (2, 3)], [(9, 5), (5, 3), (3, 2), (1, 1)]]
)
def test_uper_head_equals_numpy_at_odd_sizes(sizes, align_corners):
    head, state = randomized(UPerHead(CHANNELS, 4, 3, align_corners=align_corners))
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=(2, c, *size)).astype("float32") for c, size in zip(CHANNELS, sizes)]
    got = head([paddle.to_tensor(x) for x in maps]).numpy()
    for image in range(2):
        wanted = uper_head(
            state, [x[image].astype("float64") for x in maps], align_corners=align_corners
        )
        assert np.abs(wanted).max() > 0.5
        np.testing.assert_allclose(got[image], wanted, rtol=1e-4, atol=1e-4)


def test_fcn_head_equals_numpy():
    head, state = randomized(FCNHead(5, 4, 3))
    x = np.random.default_rng(1).normal(size=(1, 5, 7, 9)).astype("float32")
    got = head(paddle.to_tensor(x)).numpy()[0]
    np.testing.assert_allclose(got, fcn_head(state, x[0].astype("float64")), rtol=1e-4, atol=1e-4)


def test_training_drops_a_tenth_of_the_channels_whole():
    head, _ = randomized(FCNHead(5, 1000, 1))
    seen = []
    head.dropout.register_forward_post_hook(lambda _, given, result: seen.append((given, result)))
    paddle.seed(0)
    head.train()
    head(paddle.rand([1, 5, 4, 4]) + 1)
    given, result = (x.numpy()[0].reshape(1000, -1) for x in (seen[0][0][0], seen[0][1]))
    dropped = (result == 0).all(axis=1)
    active = (given != 0).any(axis=1)
    assert 0.07 < dropped[active].mean() < 0.13
    np.testing.assert_allclose(result[~dropped], given[~dropped] / 0.9, rtol=1e-5)
