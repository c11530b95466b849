"""What the compiled operators of csrc/ are built from: kernels, and a thin operator for Paddle.

The operator is compiled against the headers of the installed Paddle; the kernels know nothing of
it. `replknet build`, setup_env.sh and the first use build the library.
"""

import importlib.util
import sys
from pathlib import Path

from replknet_paddle.runtime.compiler import BuildError, SharedLibrary

CSRC = Path(__file__).resolve().parent / "csrc"


def paddle_folder() -> Path:
    """Where Paddle is installed, without importing it.

    Raises:
        BuildError: nowhere.
    """
    spec = importlib.util.find_spec("paddle")
    if spec is None or not spec.origin:
        raise BuildError(f"{sys.executable} has no Paddle")
    return Path(spec.origin).parent


def operators_library() -> SharedLibrary:
    """The library of convolutions for this machine's Paddle.

    Raises:
        BuildError: Paddle is not installed.
    """
    paddle = paddle_folder()
    base = paddle / "base"
    includes = (CSRC, paddle / "include", paddle / "include" / "third_party")
    kernels = sorted((CSRC / "cpu").glob("*.cpp"))
    sources = (*kernels, CSRC / "pointwise.cpp", CSRC / "paddle_op.cpp")  # which alone knows Paddle
    return SharedLibrary(
        name="large_kernel",
        sources=sources,
        headers=tuple(p for p in CSRC.rglob("*") if p.is_file() and p not in sources),
        flags=(
            *("-fvisibility=hidden", "-pthread", "-w", "-DPADDLE_WITH_CUSTOM_KERNEL"),
            *(f"-I{path}" for path in includes),
        ),
        # No path of libpaddle.so: whoever loads this library has imported Paddle. All environments
        # with the same build of Paddle share it.
        link_flags=(
            *("-pthread", f"-L{base}", f"-L{paddle / 'libs'}"),
            *("-Wl,--no-as-needed", "-l:libpaddle.so", "-ldl"),
        ),
        must_match=(paddle / "version" / "__init__.py").read_bytes(),
    )
