"""The check that saved arrays fit before any of them is loaded."""

from collections.abc import Mapping, Sequence

import numpy as np

from replknet_paddle.runtime.errors import InputError

LISTED = 20  # problems in one message; another network's state has thousands


def check_fits(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], what: str
) -> None:
    """Raise unless `state` has exactly the names of `shapes`, with these shapes.

    Raises:
        InputError: naming `what` and what is missing, unknown or of another shape.
    """
    problems = [f"missing: {name}" for name in shapes if name not in state]
    problems += [f"unknown: {name}" for name in state if name not in shapes]
    problems += [
        f"{name}: shape {np.shape(state[name])}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and np.shape(state[name]) != tuple(shape)
    ]
    if len(problems) > LISTED:
        problems[LISTED:] = [f"and {len(problems) - LISTED} more"]
    if problems:
        raise InputError(f"{what} does not fit the model:\n  " + "\n  ".join(problems))
