"""The one exception for mistakes in what a user gave: configs, lists, images, checkpoints.

Command lines print its message without a traceback and exit with status 2; anything else
that escapes is a defect of the program and keeps its traceback.
"""


class InputError(ValueError):
    """Input that cannot be used. The message names the thing, its value, and what is allowed."""


class SampleError(InputError):
    """An image that cannot be read; the message has the list, the line and the path."""
