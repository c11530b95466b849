import contextlib
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from tiny import assert_identical, weights
from tiny_training import make_config, make_model, train

from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.optimizer import (
    build_optimizer,
    check_fits,
    layer_id,
    load_optimizer_state,
    master_weights,
    optimizer_state,
)
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version

KINDS = ("moment1", "moment2", "beta1_pow", "beta2_pow")


def shift_internal_names():
    """Build layers that Paddle's counters see, so that the next model's tensors are renamed."""
    paddle.nn.Conv2D(1, 1, 1), paddle.nn.BatchNorm2D(1), paddle.nn.Linear(1, 1)


def adamw_reference(params, gradients, rates, *, scale, decay, betas, eps, clip):
    """AdamW of arXiv 1711.05101, with clipping by the norm over all gradients, in float64."""
    params = {name: value.astype("float64") for name, value in params.items()}
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    for t, (step_gradients, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum((g.astype("float64") ** 2).sum() for g in step_gradients.values()))
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        for name, g in step_gradients.items():
            g = g.astype("float64") * shrink
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g**2
            m_hat, v_hat = m[name] / (1 - betas[0] ** t), v[name] / (1 - betas[1] ** t)
            lr = rate * scale[name]
            params[name] = params[name] * (1 - lr * decay[name]) - lr * m_hat / (
                np.sqrt(v_hat) + eps
            )
    return params


@pytest.mark.parametrize("clip, layer_decay", [(None, None), (None, 0.7), (0.5, None), (0.5, 0.7)])
def test_steps_equal_an_independent_adamw(clip, layer_decay):
    config = make_config(
        GRAD_CLIP=clip,
        LAYER_DECAY=layer_decay,
        WEIGHT_DECAY=0.3,
        OPTIMIZER=SimpleNamespace(NAME="AdamW", EPS=1e-6, BETAS=[0.8, 0.95]),
    )
    model = make_model()
    trainable = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    start = {name: param.numpy() for name, param in trainable.items()}
    rates = [0.01, 0.03, 0.02, 0.005]
    rng = np.random.default_rng(0)
    # Sizes that differ by name, so that a norm taken over some of the parameters would show.
    gradients = [
        {
            name: (rng.standard_normal(value.shape) * 10.0 ** -(i % 4)).astype("float32")
            for i, (name, value) in enumerate(start.items())
        }
        for _ in rates
    ]

    optimizer = build_optimizer(config, model, lr=123.0)
    for step_gradients, rate in zip(gradients, rates, strict=True):
        for name, param in trainable.items():
            param.grad = paddle.to_tensor(step_gradients[name])
        optimizer.set_lr(rate)
        optimizer.step()

    expected = adamw_reference(
        start,
        gradients,
        rates,
        betas=(0.8, 0.95),
        eps=1e-6,
        clip=clip,
        scale={
            name: 1.0 if layer_decay is None else 0.7 ** (6 - layer_id(name, [1, 1, 3, 1]))
            for name in start
        },
        decay={name: 0.0 if value.ndim == 1 else 0.3 for name, value in start.items()},
    )
    for name, param in trainable.items():
        np.testing.assert_allclose(
            param.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("steps_before", [0, 3])
def test_training_continues_bit_for_bit_under_other_internal_names(steps_before):
    config = make_config(GRAD_CLIP=1.0, LAYER_DECAY=0.7)
    straight = make_model()
    straight_optimizer = build_optimizer(config, straight, lr=0.1)
    train(straight, straight_optimizer, range(6))

    first = make_model()
    first_optimizer = build_optimizer(config, first, lr=0.1)
    train(first, first_optimizer, range(steps_before))
    saved_weights, saved = weights(first), optimizer_state(first_optimizer, first)

    shift_internal_names()
    second = make_model(seed=1)
    assert first.head.weight.name != second.head.weight.name
    second_optimizer = build_optimizer(config, second, lr=0.1)
    second.set_state_dict(saved_weights)
    load_optimizer_state(second_optimizer, second, saved)
    assert_identical(weights(second), saved_weights)
    assert_identical(optimizer_state(second_optimizer, second), saved)
    assert second_optimizer.get_lr() == 0.1
    assert all(param.grad is None for param in second.parameters())
    train(second, second_optimizer, range(steps_before, 6))

    assert_identical(weights(second), weights(straight))
    assert_identical(
        optimizer_state(second_optimizer, second), optimizer_state(straight_optimizer, straight)
    )


def test_state_names_every_trainable_parameter_and_is_a_copy():
    model = make_model()
    optimizer = build_optimizer(make_config(), model, lr=0.1)
    fresh = optimizer_state(optimizer, model)
    assert fresh.keys() == {
        f"{name}.{kind}"
        for name, p in model.named_parameters()
        if not p.stop_gradient
        for kind in KINDS
    }
    train(model, optimizer, range(1))
    state = optimizer_state(optimizer, model)
    kept = {key: value.copy() for key, value in state.items()}
    train(model, optimizer, range(1, 2))
    assert_identical(state, kept)
    assert state.keys() == fresh.keys()
    assert state["stem.0.conv.weight.moment1"].any()
    np.testing.assert_allclose(state["head.bias.beta1_pow"], [0.9**2], rtol=1e-6)


def test_parameters_that_never_got_a_gradient_are_saved_and_loaded():
    model = make_model(norm_inter_features=True)  # a classifier does not use these norms
    optimizer = build_optimizer(make_config(), model, lr=0.1)
    train(model, optimizer, range(2))
    state = optimizer_state(optimizer, model)
    other = make_model(norm_inter_features=True)
    other_optimizer = build_optimizer(make_config(), other, lr=0.1)
    load_optimizer_state(other_optimizer, other, state)
    assert_identical(optimizer_state(other_optimizer, other), state)
    assert state["stages.0.norm.weight.beta1_pow"] == np.float32(0.9)


@pytest.mark.parametrize("what", ["optimizer", "average"])
def test_a_state_that_does_not_fit_is_refused_whole(what):
    model = make_model()
    optimizer, ema = build_optimizer(make_config(), model, lr=0.1), ModelEma(model, decay=0.9)
    train(model, optimizer, range(1))
    kind, save, load = {
        "optimizer": (
            ".moment1",
            lambda: optimizer_state(optimizer, model),
            lambda state: load_optimizer_state(optimizer, model, state),
        ),
        "average": ("", ema.state, ema.load_state),
    }[what]
    before = save()
    state = {key: value + 1 for key, value in before.items() if key != f"head.weight{kind}"}
    state[f"neck.weight{kind}"] = state[f"head.bias{kind}"] = np.zeros(7, "float32")
    with pytest.raises(InputError) as error:
        load(state)
    for line in (
        f"missing: head.weight{kind}",
        f"unknown: neck.weight{kind}",
        f"head.bias{kind}: shape (7,), expected (5,)",
    ):
        assert line in str(error.value)
    assert_identical(save(), before)


def test_masters_are_part_of_the_state():
    model = make_model()
    model.to(dtype="bfloat16")
    optimizer = build_optimizer(make_config(), model, lr=0.1, multi_precision=True)
    before = optimizer_state(optimizer, model)
    assert master_weights(optimizer, model) == {}
    for param in model.parameters():
        if not param.stop_gradient:
            param.grad = paddle.ones_like(param)
    # No half-precision AdamW on a CPU; Paddle creates the masters before it finds out.
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    masters = master_weights(optimizer, model)
    state = optimizer_state(optimizer, model)
    assert state.keys() == before.keys()
    assert masters.keys() == {n for n, p in model.named_parameters() if not p.stop_gradient}
    for name, master in masters.items():
        assert master.dtype == paddle.float32
        np.testing.assert_array_equal(state[f"{name}.master"], master.numpy())


@pytest.mark.gpu
@pytest.mark.skipif(paddle.device.cuda.device_count() == 0, reason="needs a GPU")
def test_masters_continue_bit_for_bit():
    """The gradients are given, so that only the optimizer's arithmetic is compared."""

    def build(seed):
        model = make_model(seed)
        model.to(dtype="bfloat16")
        return model, build_optimizer(make_config(), model, lr=0.1, multi_precision=True)

    def run(model, optimizer, steps):
        for step in steps:
            for i, param in enumerate(p for p in model.parameters() if not p.stop_gradient):
                paddle.seed(1000 * step + i)
                param.grad = paddle.randn(param.shape).astype(param.dtype)
            optimizer.step()

    straight, straight_optimizer = build(0)
    run(straight, straight_optimizer, range(6))
    first, first_optimizer = build(0)
    run(first, first_optimizer, range(3))
    for steps_of_its_own in (0, 1):
        second, second_optimizer = build(1)
        run(second, second_optimizer, range(steps_of_its_own))
        second.set_state_dict(first.state_dict())
        load_optimizer_state(second_optimizer, second, optimizer_state(first_optimizer, first))
        assert_identical(weights(second), weights(first))
        run(second, second_optimizer, range(3, 6))
        assert_identical(weights(second), weights(straight))
        assert_identical(
            optimizer_state(second_optimizer, second), optimizer_state(straight_optimizer, straight)
        )


def test_another_networks_state_gives_a_message_of_bearable_length():
    with pytest.raises(InputError) as error:
        check_fits(
            {f"theirs.{i}": np.zeros(1) for i in range(500)},
            {f"ours.{i}": (1,) for i in range(500)},
            "the state",
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "the state does not fit the model:"
    assert len(lines) == 22 and lines[-1].strip() == "and 980 more"
