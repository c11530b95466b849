import numpy as np
import paddle
import pytest
from tiny import assert_identical, weights
from tiny_training import make_config, make_model, train

from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.optimizer import build_optimizer

pytestmark = pytest.mark.paddle_version


@pytest.fixture
def trained():
    """A model after three steps, its average with decay 0.9, and the weights seen on the way."""
    model = make_model()
    optimizer = build_optimizer(make_config(), model, lr=0.1)
    ema, seen = ModelEma(model, decay=0.9), [weights(model)]

    def after_step():
        ema.update(model)
        seen.append(weights(model))

    train(model, optimizer, range(3), after_step)
    return model, ema, seen


def test_average_of_weights_and_statistics_equals_the_closed_form(trained):
    _, ema, seen = trained
    average = ema.state()
    assert "stem.0.norm._mean" in average and "head.weight" in average
    assert average.keys() == seen[0].keys()
    for name in average:
        start, *steps = (w[name].astype("float64") for w in seen)
        expected = 0.9**3 * start + sum(0.1 * 0.9 ** (2 - i) * w for i, w in enumerate(steps))
        np.testing.assert_allclose(average[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_own_weights_return_bit_for_bit(trained, error):
    model, ema, _ = trained
    before, average = weights(model), ema.state()
    tensors = dict(model.named_parameters())
    try:
        with ema.applied_to(model):
            assert_identical(weights(model), average)
            for tensor in (model.head.weight, model.norm._mean):
                tensor.set_value(paddle.zeros_like(tensor))
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert_identical(weights(model), before)
    assert_identical(ema.state(), average)
    assert all(tensor is tensors[name] for name, tensor in model.named_parameters())


def test_half_precision_models_are_averaged_in_float32_and_cast_back():
    model = make_model()
    model.to(dtype="bfloat16")
    ema = ModelEma(model, decay=0.5)
    start = weights(model)
    model.head.weight.set_value((model.head.weight.astype("float32") + 1).astype("bfloat16"))
    ema.update(model)
    np.testing.assert_array_equal(
        ema.state()["head.weight"], (start["head.weight"] + weights(model)["head.weight"]) / 2
    )
    before = weights(model)
    with ema.applied_to(model):
        assert model.head.weight.dtype == paddle.bfloat16
        inside = weights(model)
    rounded = paddle.to_tensor(ema.state()["head.weight"]).astype("bfloat16").astype("float32")
    np.testing.assert_array_equal(inside["head.weight"], rounded.numpy())
    assert_identical(weights(model), before)


def test_masters_are_averaged_in_place_of_their_parameters():
    model = make_model()
    model.to(dtype="bfloat16")
    ema, start = ModelEma(model, decay=0.75), weights(model)
    # A change far below bfloat16's resolution of the weight.
    master = model.head.weight.astype("float32") + 1e-6
    ema.update(model, {"head.weight": master})
    average = ema.state()
    np.testing.assert_allclose(average["head.weight"] - start["head.weight"], 0.25e-6, atol=6e-8)
    np.testing.assert_array_equal(average["stem.0.conv.weight"], start["stem.0.conv.weight"])


def test_state_loads_bit_for_bit_and_is_a_copy(trained):
    model, ema, _ = trained
    state = ema.state()
    kept = {name: value.copy() for name, value in state.items()}
    other = ModelEma(make_model(seed=1), decay=0.9)
    other.load_state(state)
    for average in (ema, other):
        average.update(model)
    assert_identical(other.state(), ema.state())
    assert_identical(state, kept)


def test_another_network_is_refused():
    ema = ModelEma(make_model(), decay=0.9)
    merged = make_model()
    merged.structural_reparam()
    with pytest.raises(ValueError, match="large_kernel_reparam"):
        ema.update(merged)
