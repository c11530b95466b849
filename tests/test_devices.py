"""Tests for the CPU do not run on a GPU."""

import os

import pytest
from devices import selects_gpu_tests

from replknet_paddle.runtime import processes


@pytest.mark.parametrize(
    "arguments, selected",
    [
        ([], False),
        (["-n", "2", "-m", "gpu"], True),
        (["-m=gpu"], True),
        (["-mgpu", "-q"], True),
        (["-m", "gpu and not slow"], True),
        (["-m", "not gpu"], False),
        (["-m", "slow"], False),
        (["-k", "gpu"], False),
        (["tests/gpu"], False),
    ],
)
def test_only_their_mark_selects_gpu_tests(arguments, selected):
    assert selects_gpu_tests(arguments) == selected


def test_this_test_and_what_it_starts_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
    assert processes.visible_devices() == 0
