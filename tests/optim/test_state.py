import numpy as np
import pytest

from replknet_paddle.optim.state import check_fits
from replknet_paddle.runtime.errors import InputError


def test_a_state_that_fits_passes():
    check_fits({"a": np.zeros((2, 3))}, {"a": [2, 3]}, "the state")


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
