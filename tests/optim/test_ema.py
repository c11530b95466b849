import numpy as np
import paddle
import pytest
from tiny_training import assert_identical, make_config, make_model, train, weights

from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.optimizer import build_optimizer
from replknet_paddle.runtime.errors import InputError

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
        expected = 0.9**3 * start + sum(
            0.1 * 0.9 ** (2 - i) * value for i, value in enumerate(steps)
        )
        np.testing.assert_allclose(average[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_average_starts_as_a_copy_of_the_model():
    model = make_model()
    ema, start = ModelEma(model, decay=0.5), weights(model)
    model.head.weight.set_value(model.head.weight + 1)
    assert_identical(ema.state(), start)


def test_applied_average_is_what_evaluation_sees(trained):
    model, ema, _ = trained
    other = make_model(seed=1)
    other.set_state_dict(ema.state())
    other.eval()
    model.eval()
    images = paddle.randn([2, 3, 32, 32])
    with paddle.no_grad(), ema.applied_to(model):
        inside = model(images).numpy()
    np.testing.assert_array_equal(inside, other(images).numpy())
    assert not np.array_equal(inside, model(images).numpy())


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


def test_a_state_that_does_not_fit_is_refused_whole(trained):
    _, ema, _ = trained
    before = ema.state()
    state = {name: value + 1 for name, value in before.items() if name != "head.weight"}
    state["neck.weight"] = state["head.bias"] = np.zeros(7, "float32")
    with pytest.raises(InputError) as error:
        ema.load_state(state)
    for line in (
        "missing: head.weight",
        "unknown: neck.weight",
        "head.bias: shape (7,), expected (5,)",
    ):
        assert line in str(error.value)
    assert_identical(ema.state(), before)


def test_another_network_is_refused():
    ema = ModelEma(make_model(), decay=0.9)
    merged = make_model()
    merged.structural_reparam()
    with pytest.raises(ValueError, match="large_kernel_reparam"):
        ema.update(merged)
