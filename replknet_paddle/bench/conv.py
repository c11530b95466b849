"""How fast depthwise convolutions are, a layer at a time, beside Paddle's.

The work that counts is that of taps inside the map: a 31x31 kernel on a 14x14 map has 961 taps, of
which an output needs 169 on average.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import paddle

from replknet_paddle.bench.timing import (
    Table,
    check_counts,
    describe_machine,
    median_ratio,
    summarize,
    time_in_turn,
)
from replknet_paddle.model import conv2d
from replknet_paddle.ops import (
    FastDepthwiseConv2D,
    LibraryError,
    cache_weights,
    get_library,
    large_kernel_depthwise_conv2d,
)
from replknet_paddle.ops.matmul_conv import memory_of
from replknet_paddle.ops.matmul_plan import make_plan
from replknet_paddle.runtime.errors import InputError

# RepLKNet-31B at 224: channels, side of the map, kernel.
STAGES = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))

# Table 5 of the paper, which times 24 depthwise layers.
GRID_LAYERS = 24
GRID = tuple(
    (384, side, kernel) for side in (16, 32, 64) for kernel in (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
)
COLUMNS = {"shape": 20, "pass": -16, "by": -14, "ms": 9, "from": 8, "to": 8, "GFLOP": 8, "MB": 8}
COLUMNS |= {"of peak": 8, "of bandw.": 9, "Paddle/it": 10, f"{GRID_LAYERS} layers": 11}

# What each pass computes: gradients by the input and by the weight.
PASSES = {
    "forward": (),
    "input gradient": (True, False),
    "weight gradient": (False, True),
    "both gradients": (True, True),
}


@dataclass(frozen=True)
class ConvCase:
    """One depthwise layer: `batch` maps of `channels` x `side` x `side`, and its kernel size."""

    batch: int
    channels: int
    side: int
    kernel: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(N, C, H, W, K)."""
        return (self.batch, self.channels, self.side, self.side, self.kernel)

    @property
    def useful_flops(self) -> int:
        """Operations of a forward pass, or of one gradient: two for each tap inside the map."""
        half = self.kernel // 2
        taps = sum(  # along one axis, over all outputs
            min(self.side, i + half + 1) - max(0, i - half) for i in range(self.side)
        )
        return 2 * self.batch * self.channels * taps**2

    def work(self, name: str, impl: str, itemsize: int) -> tuple[int, int]:
        """Return floating-point operations and bytes moved of a pass by an implementation.

        Products do what their plan says; for others this is the least possible: useful operations,
        and each tensor read or written once.
        """
        if impl.startswith("matmul"):
            by_input, by_weight = PASSES[name] or (True, False)
            kinds = by_input * ["convolution"] + by_weight * ["weight gradient"]
            plans = [make_plan(kind, self.shape, itemsize, memory_of(None)) for kind in kinds]
            return sum(plan.flops for plan in plans), sum(plan.bytes_moved for plan in plans)
        passes = sum(PASSES[name]) or 1
        maps = self.batch * self.channels * self.side**2
        values = (1 + passes) * maps + passes * self.channels * self.kernel**2
        return passes * self.useful_flops, itemsize * values


def report_conv(*, shapes: str, batch: int, rounds: int, dtype: str) -> None:
    """Print how fast depthwise convolutions are beside Paddle's, by pass and implementation.

    `shapes` are `stages`, `grid` or `all`, which is both; `dtype` is half precision on GPU only.
    """
    check_counts(batch=batch, rounds=rounds)
    on_cpu = paddle.device.get_device() == "cpu"
    if on_cpu and dtype != "float32":
        raise InputError(f"-dtype {dtype} on CPU; allowed: float32")
    print(describe_machine())
    library = operators_here()
    bandwidth, peak = (None, None) if on_cpu else device_rates(dtype)
    if not on_cpu:
        print(
            f"{dtype}, {paddle.device.cuda.get_device_name()}: a copy moves "
            f"{bandwidth / 1e9:.0f} GB/s, a product of matrices does {peak / 1e12:.1f} TFLOP/s"
        )
    elif library is not None:
        peak = 1e9 * library.peak_gflops(library.threads)
        print(
            f"{library.isa}, {library.threads} thread(s) (LARGE_KERNEL_THREADS), measured peak "
            f"{peak / 1e9:.0f} GFLOP/s"
        )
    print("GFLOP and MB: of products as planned, of others the least possible")
    table = Table(COLUMNS)
    for layer in {"stages": STAGES, "grid": GRID, "all": (*STAGES, *GRID)}[shapes]:
        case = ConvCase(batch, *layer)
        for name, by_impl in time_conv(case, rounds=rounds, dtype=dtype).items():
            which = "forward" if name == "forward" else "gradients"
            chosen = library and library.choose(case.shape, which)
            for impl, seconds in by_impl.items():
                flops, moved = case.work(name, impl, 4 if dtype == "float32" else 2)
                median, low, high, _ = summarize(seconds)
                table.add(
                    f"{batch}x{case.channels}x{case.side}x{case.side} K{case.kernel}",
                    name,
                    impl + " (auto)" * (impl == chosen),
                    *(f"{1e3 * value:.3f}" for value in (median, low, high)),
                    f"{flops / 1e9:.2f}",
                    f"{moved / 1e6:.1f}",
                    f"{flops / median / peak:.2f}" if peak else "-",
                    f"{moved / median / bandwidth:.2f}" if bandwidth else "-",
                    f"{median_ratio(by_impl['paddle'], seconds):.1f}",
                    f"{GRID_LAYERS * 1e3 * median:.1f} ms",
                )


def time_conv(case: ConvCase, *, rounds: int, dtype: str) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of a layer by pass, of `PASSES`, and implementation, timed in turn.

    Those that end in `, kept` are of a layer that caches what it makes of its weights. Paddle's own
    computes in float32, whatever `dtype`.
    """
    paddle.seed(0)
    shape = [case.batch, case.channels, case.side, case.side]
    x, dy = (paddle.randn(shape).astype(dtype) for _ in range(2))
    weight = paddle.randn([case.channels, 1, case.kernel, case.kernel])
    compiled = ("direct", "fft") if operators_here() else ()
    passes = {name: {} for name in PASSES}
    for impl in ("paddle", *compiled, "matmul"):
        passes["forward"][impl] = _forward(large_kernel_depthwise_conv2d, x, weight, impl=impl)
        for name, wanted in list(PASSES.items())[1:]:
            if impl in compiled and not all(wanted):  # the operator gives both, its kernels one
                passes[name][impl] = _kernels_gradient(case, x, weight, dy, wanted, impl)
            else:
                passes[name][impl] = _backward(x, weight, dy, impl, wanted)
    with contextlib.ExitStack() as cached:
        for impl in ("auto", "matmul") if compiled else ("matmul",):
            layer = conv2d(case.channels, case.channels, case.kernel, groups=case.channels)
            layer.eval()
            layer.__class__, layer.impl = FastDepthwiseConv2D, impl
            cached.enter_context(cache_weights(layer))
            passes["forward"][f"{impl}, kept"] = _forward(layer, x)
        return {name: time_in_turn(calls, rounds=rounds) for name, calls in passes.items()}


def operators_here():
    """Return the compiled operators' library, or None where they do not compute."""
    with contextlib.suppress(LibraryError):
        return get_library() if paddle.device.get_device() == "cpu" else None


def device_rates(dtype: str) -> tuple[float, float]:
    """Return the bytes/s of a large copy and the operations/s of a large product on a GPU."""
    values = paddle.zeros([2**27]).astype(dtype)  # 256 or 512 MiB
    side = 8192
    a, b = (paddle.randn([side, side]).astype(dtype) for _ in range(2))
    calls = {"copy": lambda: paddle.assign(values), "product": lambda: paddle.matmul(a, b)}
    seconds = time_in_turn(calls, rounds=5)
    moved = 2 * values.size * values.element_size()
    return moved / min(seconds["copy"]), 2 * side**3 / min(seconds["product"])


def _forward(convolution: Callable, *tensors, **options) -> Callable[[], None]:
    return paddle.no_grad()(lambda: convolution(*tensors, **options))


def _backward(x, weight, dy, impl: str, wanted: tuple[bool, bool]) -> Callable[[], None]:
    leaves = [x.detach(), weight.detach()]
    for leaf, by_it in zip(leaves, wanted):
        leaf.stop_gradient = not by_it
    y = large_kernel_depthwise_conv2d(*leaves, impl=impl)
    trained = [leaf for leaf in leaves if not leaf.stop_gradient]
    return lambda: paddle.grad(y, trained, dy, retain_graph=True)


def _kernels_gradient(case, x, weight, dy, wanted: tuple[bool, bool], impl: str) -> Callable:
    targets = [paddle.empty_like(t) if by_it else None for t, by_it in zip((x, weight), wanted)]
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, dy, *targets)]

    def call():
        get_library().gradients(case.shape, *pointers, algorithm=impl)
        return targets  # keeps them alive

    return call
