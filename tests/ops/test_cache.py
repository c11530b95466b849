"""What layers keep of their weights: only while these are declared frozen, and never more."""

import copy
import gc
import sys

import numpy as np
import paddle
import pytest
from paddle import nn

from replknet_paddle.ops import cache, cache_weights, get_library, use_fast_depthwise_conv
from replknet_paddle.optim.ema import ModelEma

pytestmark = [pytest.mark.usefixtures("operators"), pytest.mark.numbers, pytest.mark.paddle_version]


class Case:
    """A layer that keeps something where it may, its plain twin, and how often it made it."""

    def __init__(self, impl, monkeypatch, channels=16, memory_bytes=2**29):
        self.layer, self.plain = (
            nn.Conv2D(channels, channels, 13, padding=6, groups=channels) for _ in range(2)
        )
        self.x = paddle.randn([2, channels, 24, 24])
        assert use_fast_depthwise_conv(self.layer, impl, memory_bytes=memory_bytes) == 1
        self.layer.eval()
        self.made = 0
        for owner, name in ((get_library(), "make_spectrum"), (cache, "make_matrices")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def call(*arguments):
            self.made += 1
            return function(*arguments)

        return call

    def check(self, x=None):
        """The layer computes what its twin does with the same weights."""
        x = self.x if x is None else x
        self.plain.set_state_dict({k: v.clone() for k, v in self.layer.state_dict().items()})
        with paddle.no_grad():
            for _ in range(2):
                got, wanted = self.layer(x).numpy(), self.plain(x).numpy()
                np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture(params=["fft", "auto", "matmul"])
def case(request, monkeypatch):
    return Case(request.param, monkeypatch)


def step(layer, optimizer):
    """An optimizer step, in evaluation mode as some fine-tuning has it."""
    layer.weight.grad = paddle.ones_like(layer.weight)
    optimizer(learning_rate=0.1, parameters=[layer.weight]).step()


CHANGES = {
    "set_state_dict": lambda c: c.set_state_dict({k: v + 0.1 for k, v in c.state_dict().items()}),
    "set_value": lambda c: c.weight.set_value(c.weight + 0.1),
    "copy_": lambda c: c.weight.copy_(c.weight + 0.1, True),
    "in place": lambda c: c.weight.add_(paddle.full([], 0.1)),
    "adamw step": lambda c: step(c, paddle.optimizer.AdamW),
    "another parameter": lambda c: setattr(
        c, "weight", c.create_parameter(c.weight.shape, default_initializer=nn.initializer.Normal())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_where_weights_may_change(change, case):
    case.check()
    with paddle.no_grad():
        CHANGES[change](case.layer)
    case.check()
    with cache_weights(case.layer):
        case.check()
    with paddle.no_grad():
        CHANGES[change](case.layer)
    case.check()
    with cache_weights(case.layer):
        case.check()
    assert case.made == 2  # once for each time they were frozen


def test_evaluation_of_the_average_of_weights_uses_it(case):
    ema = ModelEma(case.layer, decay=0.5)
    ema.flat.set_value(ema.flat + 0.1)
    with cache_weights(case.layer):
        case.check()
    with ema.applied_to(case.layer), cache_weights(case.layer):
        case.check()
    with cache_weights(case.layer):
        case.check()


def test_other_map_sizes_and_larger_batches_are_kept_apart(case):
    with cache_weights(case.layer):
        case.check()
        case.check(case.x[:1].contiguous())
        assert case.made == 1
        case.check(paddle.randn([1, 16, 20, 30]))
        assert case.made == 2
        case.check(paddle.randn([5, 16, 24, 24]))
        case.check()


def test_training_and_gradients_keep_matrices_alone(case):
    with cache_weights(case.layer):
        case.layer(case.x)  # with gradients
        case.layer.train()
        with paddle.no_grad():
            case.layer(case.x)
        assert case.made == (case.layer.impl == "matmul")
        case.layer.eval()
        case.check()
        assert case.made == 1
    assert set(case.layer.state_dict()) == {"weight", "bias"}


def gradients(layer, x):
    """Of the images and of the weight, in three passes over batches of one size."""
    collected = []
    for factor in (1.0, 2.0, -0.5):
        images = factor * x.detach()
        images.stop_gradient = False
        y = layer(images)
        collected += [g.numpy() for g in paddle.grad((y * y).sum(), [images, layer.weight])]
    return collected


@pytest.mark.parametrize("memory_bytes", [2**29, 600_000])
def test_matrices_serve_all_passes_of_a_step_with_the_same_bits(memory_bytes, monkeypatch):
    case = Case("matmul", monkeypatch, memory_bytes=memory_bytes)
    case.layer.train()
    wanted = gradients(case.layer, case.x)
    with cache_weights(case.layer):
        got = gradients(case.layer, case.x)
        sizes = [size for size, _ in cache._caches[case.layer].items.values()]
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted))
    assert case.made == len(sizes) == (2 if memory_bytes == 2**29 else 1)  # flipped, for gradients
    assert sum(sizes) <= memory_bytes
    with paddle.no_grad():
        step(case.layer, paddle.optimizer.AdamW)
    case.check()


def test_gradients_of_gradients_keep_nothing(monkeypatch):
    """T would belong to the graph of the first ones."""
    case = Case("matmul", monkeypatch)
    x = case.x.detach()
    x.stop_gradient = False

    def gradient_of_penalty():
        (gradient,) = paddle.grad((case.layer(x) ** 2).sum(), [x], create_graph=True)
        (gradient**2).sum().backward()
        result = case.layer.weight.grad.numpy()
        case.layer.clear_gradients()
        return result

    wanted = gradient_of_penalty()
    with cache_weights(case.layer):
        for _ in range(2):
            assert np.array_equal(gradient_of_penalty(), wanted)


def test_nothing_is_kept_after_the_end_by_a_graph_that_still_lives(monkeypatch):
    case = Case("matmul", monkeypatch)
    case.layer.train()
    with cache_weights(case.layer):
        y = case.layer(case.x)
        kept = cache._caches[case.layer]
    assert not kept.items
    y.sum().backward()
    assert not kept.items and case.made == 1


def test_a_new_size_takes_the_place_of_others_of_its_layer(monkeypatch):
    case = Case("matmul", monkeypatch, memory_bytes=600_000)  # room for one
    with cache_weights(case.layer):
        for side in (24, 20, 20, 24):
            case.check(paddle.randn([2, 16, side, side]))
    assert case.made == 3


def test_the_inner_of_two_scopes_ends_nothing(case):
    with cache_weights(case.layer):
        with cache_weights(case.layer):
            case.check()
        case.check()
    assert case.made == 1
    assert cache.cache_of(case.layer) is None


def test_a_copy_made_meanwhile_keeps_nothing(case):
    with cache_weights(case.layer):
        case.check()
        case.layer = copy.deepcopy(case.layer)
        case.layer.weight.set_value(case.layer.weight + 0.1)
        case.check()


@pytest.mark.parametrize("impl, memory", [("fft", 2**17), ("matmul", 2**20)])
def test_what_does_not_fit_into_the_memory_allowed_is_made_each_time(impl, memory, monkeypatch):
    case = Case(impl, monkeypatch, memory_bytes=memory)
    layers = nn.LayerList([case.layer, *(copy.deepcopy(case.layer) for _ in range(7))])
    with cache_weights(layers), paddle.no_grad():
        first, again = ([layer(case.x).numpy() for layer in layers] for _ in range(2))
        sizes = [sum(size for size, _ in cache._caches[x].items.values()) for x in layers]
    assert np.array_equal(first, again)
    assert sizes[0] > 0 == sizes[-1] and sum(sizes) <= memory
    assert case.made == sum(size > 0 for size in sizes)


def test_a_network_that_is_collected_within_its_scope_says_nothing(monkeypatch):
    """As of a predictor that nobody closes."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    layer = nn.Conv2D(4, 4, 13, padding=6, groups=4)
    use_fast_depthwise_conv(layer)
    scope = cache_weights(layer)
    scope.__enter__()
    layer.scope = scope
    del layer, scope
    gc.collect()
    assert not said
