"""The compiled library: what it is built from, found or built, loaded, tried out, given threads.

csrc/ has kernels, and a thin operator that is compiled against the headers of the installed Paddle;
the kernels know nothing of it. `get_library` loads the library once per process, on first use, and
compares what it computes with a reference before anyone relies on it. Where nobody has compiled it
yet - `replknet build`, setup_env.sh - it is compiled then.
"""

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.runtime.compiler import BuildError, SharedLibrary
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.machines import core_share

CSRC = Path(__file__).resolve().parent / "csrc"

ALGORITHMS = {"auto": 0, "direct": 1, "fft": 2}
PASSES = {"forward": 0, "gradients": 1}
ISA_NAMES = ("portable code", "AVX2", "AVX-512")
THREADS_VARIABLE = "LARGE_KERNEL_THREADS"
MAX_THREADS = 64  # of csrc/cpu/pool.h

# Largest error over the largest value, for each algorithm; well above what either has.
SELF_TEST_TOLERANCE = {"direct": 1e-5, "fft": 1e-4}


LibraryError = BuildError  # why the compiled operators cannot be used here, and what to do


def paddle_folder() -> Path:
    """Return where Paddle is installed, without importing it."""
    spec = importlib.util.find_spec("paddle")
    if spec is None or not spec.origin:
        raise BuildError(f"{sys.executable} has no Paddle")
    return Path(spec.origin).parent


def operators_library() -> SharedLibrary:
    """Return the library of convolutions for this machine's Paddle, which may not be built yet."""
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


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")]
    _fields_ += [("kernel", ctypes.c_int)]


class _Product(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "in_channels", "out_channels", "pixels")]


class Library:
    """The C interface of csrc/large_kernel.h over addresses of contiguous float32 arrays.

    It computes on `threads`, unless a call states otherwise; `shape` is (N, C, H, W, K).
    """

    def __init__(self, path: Path, *, threads: int):
        self.path = path
        self.threads = threads
        handle = ctypes.CDLL(str(path))
        shape, pointer, integer = ctypes.POINTER(_Shape), ctypes.c_void_p, ctypes.c_int
        product = ctypes.POINTER(_Product)
        for name, result, arguments in (
            ("lk_forward", integer, [shape, *[pointer] * 4, integer, integer]),
            ("lk_gradients", integer, [shape, *[pointer] * 5, integer, integer]),
            ("lk_spectrum_floats", ctypes.c_int64, [shape]),
            ("lk_make_spectrum", integer, [shape, pointer, pointer, integer]),
            ("lk_forward_cached", integer, [shape, *[pointer] * 4, integer]),
            ("lk_choose", integer, [shape, integer]),
            ("lk_isa", integer, []),
            ("lk_peak_gflops", ctypes.c_double, [integer]),
            ("lk_op_set_threads", None, [integer]),
            ("pw_available", integer, []),
            ("pw_forward", integer, [product, *[pointer] * 3, integer]),
            ("pw_gradients", integer, [product, *[pointer] * 5, integer]),
        ):
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)
        self._lk_op_set_threads(threads)

    @property
    def isa(self) -> str:
        """The instructions in use."""
        return ISA_NAMES[self._lk_isa()]

    @property
    def has_pointwise(self) -> bool:
        """Whether Paddle's package has the oneDNN that 1x1 convolutions need."""
        return bool(self._pw_available())

    def forward(self, shape, x, weight, bias, y, *, algorithm="auto", threads=None) -> None:
        """Compute y, the convolution; `bias` may be None."""
        code, threads = ALGORITHMS[algorithm], threads or self.threads
        _check(self._lk_forward(_Shape(*shape), x, weight, bias, y, code, threads))

    def gradients(
        self, shape, x, weight, dy, dx, dweight, *, algorithm="auto", threads=None
    ) -> None:
        """Compute the gradients by input and weight; either address may be None."""
        code, threads = ALGORITHMS[algorithm], threads or self.threads
        _check(self._lk_gradients(_Shape(*shape), x, weight, dy, dx, dweight, code, threads))

    def spectrum_floats(self, shape) -> int:
        """Return the size of a weight's spectrum for such maps; 0 where none is worth while."""
        return self._lk_spectrum_floats(_Shape(*shape))

    def make_spectrum(self, shape, weight, spectrum) -> None:
        """Fill `spectrum`, of `spectrum_floats(shape)` values."""
        _check(self._lk_make_spectrum(_Shape(*shape), weight, spectrum, self.threads))

    def forward_cached(self, shape, x, spectrum, bias, y) -> None:
        """Compute y, the convolution, with the weight's spectrum."""
        _check(self._lk_forward_cached(_Shape(*shape), x, spectrum, bias, y, self.threads))

    def pointwise(self, shape, x, weight, dy, y, dx, dweight) -> None:
        """Compute output and gradients of a 1x1 convolution; `shape` is (N, C, C', pixels)."""
        shape = _Product(*shape)
        _check(self._pw_forward(shape, x, weight, y, self.threads))
        _check(self._pw_gradients(shape, x, weight, dy, dx, dweight, self.threads))

    def choose(self, shape, which: str) -> str:
        """Return the algorithm that `auto` takes for one of `PASSES`."""
        code = self._lk_choose(_Shape(*shape), PASSES[which])
        return next(name for name, value in ALGORITHMS.items() if value == code)

    def peak_gflops(self, threads: int) -> float:
        """Return the measured rate of multiply-adds from registers, 1e9 operations per second."""
        return self._lk_peak_gflops(threads)


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("no memory left for a large-kernel depthwise convolution")
    if status != 0:
        raise ValueError(f"the kernels refuse these arguments, status {status}")


def thread_count(environment=os.environ) -> int:
    """Return the number of threads of this process's convolutions.

    `LARGE_KERNEL_THREADS` where it is set, else `core_share`. `OMP_NUM_THREADS` says nothing here:
    Paddle and its launcher set it to 1 wherever the user does not.

    Raises:
        InputError: LARGE_KERNEL_THREADS is not a positive number.
    """
    wanted = environment.get(THREADS_VARIABLE)
    if wanted is not None:
        if not (wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= MAX_THREADS):
            raise InputError(
                f"{THREADS_VARIABLE} is {wanted!r}; allowed: an integer from 1 to {MAX_THREADS}"
            )
        return int(wanted)
    return min(MAX_THREADS, core_share(environment))


_lock = threading.Lock()


def get_library() -> Library:
    """Return the library, ready to use.

    Raises:
        LibraryError: there is none that works here; the message says why.
        InputError: see `thread_count`.
    """
    with _lock:  # functools.cache alone would load it twice when two threads come first
        outcome = _load()
    if isinstance(outcome, LibraryError):
        raise outcome
    return outcome


@functools.cache
def _load() -> Library | LibraryError:
    try:
        path = operators_library().find_or_build()
        library = Library(path, threads=thread_count())
        paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(path))
        self_test(library)
    except (BuildError, OSError, AttributeError, RuntimeError) as error:
        return LibraryError(" ".join(str(error).split())[:500])
    return library


def self_test(library: Library) -> None:
    """Raise LibraryError where a pass of an algorithm differs from plain sums in float64."""
    rng = np.random.default_rng(0)
    for shape in ((1, 17, 19, 20, 15), (2, 5, 6, 9, 7)):
        batch, channels, height, width, kernel = shape
        x, dy = rng.standard_normal((2, batch, channels, height, width), "float32")
        weight = rng.standard_normal((channels, 1, kernel, kernel), "float32")
        bias = rng.standard_normal(channels, "float32")
        wanted = reference_passes(x, weight, bias, dy)
        for algorithm, tolerance in SELF_TEST_TOLERANCE.items():
            got = [np.full_like(values, np.nan, "float32") for values in wanted]
            pointers = [array.ctypes.data for array in (x, weight, bias, dy, *got)]
            px, pweight, pbias, pdy, py, pdx, pdweight = pointers
            library.forward(shape, px, pweight, pbias, py, algorithm=algorithm)
            library.gradients(shape, px, pweight, pdy, pdx, pdweight, algorithm=algorithm)
            names = ("forward", "input gradient", "weight gradient")
            for name, ours, right in zip(names, got, wanted):
                _compare(f"{algorithm}, {name} of {shape}", ours, right, tolerance)
        spectrum = np.full(library.spectrum_floats(shape), np.nan, "float32")
        if spectrum.size:
            y = np.full_like(x, np.nan)
            library.make_spectrum(shape, weight.ctypes.data, spectrum.ctypes.data)
            library.forward_cached(
                shape, x.ctypes.data, spectrum.ctypes.data, bias.ctypes.data, y.ctypes.data
            )
            _compare(f"fft, kept spectrum of {shape}", y, wanted[0], SELF_TEST_TOLERANCE["fft"])
    if library.has_pointwise:
        x, dy = (rng.standard_normal((2, count, 50), "float32") for count in (19, 70))
        weight = rng.standard_normal((70, 19), "float32")
        wanted = weight @ x, weight.T @ dy, np.einsum("nop,nip->oi", dy, x)
        got = [np.full_like(values, np.nan) for values in wanted]
        library.pointwise((2, 19, 70, 50), *(array.ctypes.data for array in (x, weight, dy, *got)))
        for name, ours, right in zip(("output", "input gradient", "weight gradient"), got, wanted):
            _compare(f"1x1, {name}", ours, right, SELF_TEST_TOLERANCE["direct"])


def _compare(what: str, ours: np.ndarray, right: np.ndarray, tolerance: float) -> None:
    error = np.abs(ours - right).max() / np.abs(right).max()
    if not error <= tolerance:  # NaN fails as well
        raise LibraryError(
            f"self-test failed: {what}: relative error {error:.1e}; allowed: {tolerance:.0e}"
        )


def reference_passes(x, weight, bias, dy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return output, input gradient and weight gradient in float64, tap by tap."""
    half, (height, width) = weight.shape[-1] // 2, x.shape[2:]
    margins = ((0, 0), (0, 0), (half, half), (half, half))
    padded = np.pad(x.astype("float64"), margins)
    y = np.zeros(x.shape)
    dpadded, dweight = np.zeros_like(padded), np.zeros(weight.shape)
    for u, v in np.ndindex(*weight.shape[2:]):
        window = (..., slice(u, u + height), slice(v, v + width))
        tap = weight[:, 0, u, v].astype("float64")[:, None, None]
        y += tap * padded[window]
        dpadded[window] += tap * dy
        dweight[:, 0, u, v] = (padded[window] * dy).sum((0, 2, 3))
    y += bias.astype("float64")[:, None, None]
    return y, dpadded[..., half : half + height, half : half + width], dweight
