"""Which tests see the GPUs of this machine: decided when this module is imported."""

import os
import re
import sys


def selects_gpu_tests(arguments: list[str]) -> bool:
    """Whether these arguments of pytest select the tests marked `gpu`."""
    expressions = [
        following for flag, following in zip(arguments, arguments[1:]) if flag == "-m"
    ] + [argument[2:].lstrip("=") for argument in arguments if re.match("-m.", argument)]
    return any(
        re.search(r"\bgpu\b", expression) and not re.search(r"\bnot +gpu\b", expression)
        for expression in expressions
    )


def hide_gpus() -> None:
    """Hide all GPUs from this process and those it starts, unless `-m gpu` selects their tests."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # which inherits what was decided
    if not is_worker and not selects_gpu_tests(sys.argv[1:]):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


hide_gpus()
