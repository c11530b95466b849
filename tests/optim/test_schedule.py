import math

import pytest

from replknet_paddle.optim.schedule import base_learning_rate, get_lr

RECIPE = dict(
    base_lr=4e-3, min_lr=1e-6, warmup_start_lr=0.0, warmup_steps=6250, total_steps=187500
)  # 31B on ImageNet-1K: 300 epochs of 625 steps, 10 of warm-up


def cosine(progress):
    return 1e-6 + (4e-3 - 1e-6) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.0),
        (1, 4e-3 / 6249),
        (3124, 4e-3 * 3124 / 6249),
        (6249, 4e-3),  # last of the warm-up
        (6250, 4e-3),  # first of the cosine
        (6250 + 181250 // 2, (4e-3 + 1e-6) / 2),  # middle of the cosine
        (93750, cosine(87500 / 181250)),  # middle of the run
        (187499, cosine(181249 / 181250)),  # last of the run
        (187500, 1e-6),
    ],
)
def test_rate_equals_the_closed_form(step, expected):
    assert get_lr(step, **RECIPE) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    "other, rates",
    [
        ({"warmup_start_lr": 1e-5}, [1e-5]),
        ({"warmup_steps": 0}, [4e-3]),
        ({"warmup_steps": 1}, [0.0, 4e-3]),
    ],
)
def test_the_first_steps(other, rates):
    assert [get_lr(step, **RECIPE | other) for step in range(len(rates))] == rates


def test_a_run_of_warm_up_alone_ends_at_the_peak():
    rates = [
        get_lr(step, base_lr=1.0, min_lr=0.0, warmup_start_lr=0.0, warmup_steps=3, total_steps=3)
        for step in range(4)
    ]
    assert rates == [0.0, 0.5, 1.0, 1.0]


def test_rate_rises_then_falls():
    rates = [
        get_lr(step, base_lr=1.0, min_lr=0.1, warmup_start_lr=0.2, warmup_steps=5, total_steps=40)
        for step in range(41)
    ]
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == rates[4] == rates[5] == 1.0
    assert min(rates) == rates[40] == 0.1 < rates[39]


@pytest.mark.parametrize("step, warmup_steps", [(-1, 0), (187501, 0), (0, -1), (0, 187501)])
def test_steps_outside_the_run_are_refused(step, warmup_steps):
    with pytest.raises(ValueError, match="total_steps=187500"):
        get_lr(step, **{**RECIPE, "warmup_steps": warmup_steps})


def test_base_rate_is_absolute_unless_scaling_is_asked_for():
    assert base_learning_rate(4e-3, 2048) == 4e-3
    assert base_learning_rate(4e-3, 2048, 256) == pytest.approx(3.2e-2, rel=1e-12)
