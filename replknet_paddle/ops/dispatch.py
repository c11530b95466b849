"""Whether the compiled operators are to compute, and how Paddle is asked to run them."""

import logging
import os

import paddle

from replknet_paddle.ops.library import LibraryError, get_library
from replknet_paddle.runtime.errors import InputError

IMPLS = ("auto", "paddle", "direct", "fft")
DTYPES = (paddle.float32, paddle.float16, paddle.bfloat16)

logger = logging.getLogger(__name__)


def check_impl(impl: str) -> None:
    """Raise InputError for an implementation that does not exist."""
    if impl not in IMPLS:
        raise InputError(f"impl is {impl!r}; allowed: {', '.join(IMPLS)}")


def is_on_cpu(x) -> bool:
    if paddle.in_dynamic_mode():
        return x.place.is_cpu_place()
    return paddle.device.get_device() == "cpu"


_told: set[str] = set()


def why_not_operator(*, on_cpu: bool) -> str | None:
    """Why the compiled operator cannot be used, or None."""
    if not on_cpu:
        return "it computes on CPU alone"
    try:
        get_library()
    except LibraryError as error:
        return str(error)
    return None


def use_operator(impl: str, on_cpu: bool) -> bool:
    """Whether to compute by the operator; says once why not where `auto` would have liked to.

    Raises:
        InputError: it is asked for by name and cannot be had.
    """
    if impl == "paddle":
        return False
    why = why_not_operator(on_cpu=on_cpu)
    if why is None:
        return True
    if impl != "auto":
        raise InputError(f"depthwise convolution {impl!r} needs the compiled operator: {why}")
    if on_cpu and why not in _told:  # elsewhere Paddle's own is what one expects
        _told.add(why)
        logger.warning(
            "depthwise convolutions run on Paddle's own, not on the compiled operator: %s", why
        )
    return False


def describe(tensor) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).split('.')[-1]}"


def pair(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value, value]


def as_one_operation(target):
    """Let program capture take a function or a layer as a whole, not follow its Python code."""
    marker = getattr(paddle.jit, "marker", None)
    if marker is not None:  # Paddle 3
        return marker.unified(target)
    from paddle.jit.sot.opcode_translator import skip_files
    from paddle.jit.sot.utils import paddle_api_config

    if isinstance(target, type):  # Paddle 2.6 can be told of functions alone
        whole = as_one_operation(target.forward)

        def forward(self, x):
            return whole(self, x)

        target.forward = paddle.jit.not_to_static(forward)
        return target
    skip_files.skip_file_names.add(os.path.dirname(os.path.abspath(__file__)) + os.sep)
    skip_files.setup_skip_files()
    paddle_api_config.paddle_api_list.append(target)
    return paddle.jit.not_to_static(target)


def run_operator(name: str, inputs: dict[str, paddle.Tensor], attributes: dict) -> paddle.Tensor:
    """The output of a registered operator, or its place in the program that is being captured.

    Args:
        inputs, attributes: by name, in the order of registration.
    """
    run = getattr(paddle._C_ops, "_run_custom_op", None)  # Paddle 3
    if run is None and paddle.in_dynamic_mode():
        run = paddle.base.core.eager._run_custom_op
    if run is not None and (paddle.in_dynamic_mode() or paddle.base.framework.in_pir_mode()):
        out = run(name, *inputs.values(), *attributes.values())
        return out[0] if isinstance(out, (list, tuple)) else out
    from paddle.base.layer_helper import LayerHelper

    # Paddle 2.6's gradient operators need a place for every gradient, wanted or not.
    inputs = {
        slot: _with_gradient(tensor) if tensor.stop_gradient else tensor
        for slot, tensor in inputs.items()
    }
    helper = LayerHelper(name)
    out = helper.create_variable_for_type_inference(dtype=inputs["X"].dtype)
    helper.append_op(type=name, inputs=inputs, outputs={"Out": out}, attrs=attributes)
    return out


def _with_gradient(tensor):
    tensor = paddle.assign(tensor)
    tensor.stop_gradient = False
    return tensor


def describe_operator() -> str:
    """The operators in use, for the log.

    Raises:
        LibraryError: there are none.
    """
    library = get_library()
    return f"compiled operator, {library.isa}, {library.threads} thread(s)"
