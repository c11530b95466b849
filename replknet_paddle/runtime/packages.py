"""Packages beside this one: a Paddle that is supported and computes right, and those of extras.

Paddle is imported in `why_gpus_fail` alone, which setup_env.sh calls once it is installed.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

from replknet_paddle.runtime.errors import InputError

# Beside the package in a checkout; an installed package has none.
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"

# 3.0 has no public way to tell program capture what to take as one operation; in 3.1.0 the view of
# a tensor in a wider type ends the process.
OLDEST_PADDLE = (3, 1, 1)
GPU_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/cu126/"

# Largest error over the largest value: TensorFloat-32 keeps ten bits of each factor.
TOLERANCE = 1e-2


def is_installed(name: str) -> bool:
    """Return whether the package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def install_command(extra: str) -> str:
    """Return the pip command that installs the packages of an extra of pyproject.toml."""
    file = REQUIREMENTS / f"{extra}.txt"
    return f"pip install -r {file}" if file.is_file() else f'pip install "replknet-paddle[{extra}]"'


def import_extra(name: str, extra: str) -> ModuleType:
    """Return the package or module `name`, which belongs to `extra`. An InputError has the pip
    command where it is missing or does not load. What such packages send to their makers is off."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it when it is loaded
    # OpenVINO sends when it is imported. It has a stub for where this package is missing.
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"this needs {name.partition('.')[0]} ({error}); {install_command(extra)}"
        ) from None


class UnsupportedPaddle(InputError, ImportError):
    """Paddle is missing, or of a version that this package does not support."""


class _PaddleFinder:
    """A finder of Paddle alone: raises where it is not supported, so that all else still works, and
    lets Ctrl-C wait for the end of its import, in the midst of which C++ may crash on one."""

    def __init__(self, message: str | None):
        self.message = message

    def find_spec(self, name: str, path=None, target=None):
        if name != "paddle":
            return None
        if self.message is not None:
            raise UnsupportedPaddle(self.message)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_whole(module: ModuleType) -> None:
            received = []
            before = signal.signal(signal.SIGINT, lambda *_: received.append(True))
            try:
                execute(module)
            finally:
                signal.signal(signal.SIGINT, before)
            if received:
                signal.raise_signal(signal.SIGINT)

        if threading.current_thread() is threading.main_thread():  # others get no signals
            spec.loader.exec_module = execute_whole
        return spec


def refuse_other_paddles() -> None:
    """Let `import paddle` fail, by one message, unless the Paddle installed is a supported one. One
    that has been imported already raises UnsupportedPaddle here.

    Paddle 2 beside numpy 2 fails on import, in words of its own.
    """
    message = _why_unsupported(importlib.util.find_spec("paddle"))
    if "paddle" not in sys.modules:
        sys.meta_path.insert(0, _PaddleFinder(message))
    elif message is not None:
        raise UnsupportedPaddle(message)


def _why_unsupported(spec) -> str | None:
    """Return the fault of the Paddle of a module spec and the command that helps, or None."""
    if spec is None or not spec.origin:  # a folder that is called paddle is no Paddle
        return f"this needs Paddle: {install_command('cpu')}; docs/gpu.md has the command for GPUs"
    file = Path(spec.origin).with_name("version") / "__init__.py"
    content = file.read_text() if file.is_file() else ""
    version = re.search(r"full_version\s*=\s*'((\d+)\.(\d+)\.(\d+)[^']*)'", content)
    # Builds of Paddle's development branch report version 0.0.0.
    if version is None or not (0, 0, 0) < tuple(map(int, version.group(2, 3, 4))) < OLDEST_PADDLE:
        return None
    command = install_command("cpu")
    if re.search(r"cuda_version\s*=\s*'\d", content):
        command = f"{install_command('gpu')} --extra-index-url {GPU_INDEX}"
        command += " (docs/gpu.md says which index fits which GPU)"
    oldest = ".".join(map(str, OLDEST_PADDLE))
    return f"Paddle {version[1]} is installed; this needs Paddle {oldest} or later: {command}"


def why_gpus_fail() -> str | None:
    """Return the first GPU's fault in one line, or None where all compute what the CPU does.

    A build of Paddle without code for a GPU fails late and in words of its own, or not at all:
    Paddle 3.0 gave wrong products on compute capability 12.0. None for a build for CPU.
    """
    import numpy as np
    import paddle

    if not paddle.is_compiled_with_cuda():
        return None
    cuda = paddle.device.cuda
    if cuda.device_count() == 0:
        return f"Paddle {paddle.__version__} for CUDA {paddle.version.cuda()} sees no GPU"
    wanted = _products("cpu")
    for index in range(cuda.device_count()):
        name = cuda.get_device_name(index)
        major, minor = cuda.get_device_capability(index)
        built_for = [divmod(int(arch), 10) for arch in paddle.version.cuda_archs()]
        if built_for and not any(m == major and n <= minor for m, n in built_for):
            listed = ", ".join(f"{m}.{n}" for m, n in built_for)
            return (
                f"Paddle {paddle.__version__} is built for compute capability {listed}; {name} "
                f"has {major}.{minor}"
            )
        try:
            got = _products(f"gpu:{index}")
        except (RuntimeError, OSError) as error:
            # After pages of C++ calls, Paddle gives the reason in a line such as "(External) ...".
            lines = str(error).splitlines() or [repr(error)]
            reason = next((line for line in lines if line.startswith("(")), lines[-1])
            return f"Paddle {paddle.__version__} fails on {name}: {reason.strip()}"
        for what, right in wanted.items():
            error = np.abs(got[what] - right).max() / np.abs(right).max()
            if not error <= TOLERANCE:  # NaN fails as well
                return (
                    f"Paddle {paddle.__version__} computes a wrong {what} on {name}: relative "
                    f"error {error:.1e}; allowed: {TOLERANCE:.0e}"
                )
    return None


def _products(device: str) -> dict:
    """Return a matrix product and a convolution, as numpy arrays, of one device."""
    import numpy as np
    import paddle
    from paddle.nn import functional as F

    paddle.set_device(device)
    rng = np.random.default_rng(0)
    a, b = (paddle.to_tensor(x) for x in rng.standard_normal((2, 256, 256), "float32"))
    x = paddle.to_tensor(rng.standard_normal((2, 16, 32, 32), "float32"))
    weight = paddle.to_tensor(rng.standard_normal((32, 16, 3, 3), "float32"))
    return {
        "matrix product": paddle.matmul(a, b).numpy(),
        "convolution": F.conv2d(x, weight, padding=1).numpy(),
    }
