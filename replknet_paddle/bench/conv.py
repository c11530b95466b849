"""How fast convolutions are: a layer at a time beside Paddle's, and by kinds of layer in a network.

The work that counts is that of taps inside the map: a 31x31 kernel on a 14x14 map has 961 taps, of
which an output needs 169 on average.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import paddle
from paddle import nn

from replknet_paddle.bench.timing import (
    check_counts,
    describe_machine,
    median_ratio,
    summarize,
    time_in_turn,
)
from replknet_paddle.ops import (
    FastDepthwiseConv2D,
    LibraryError,
    frozen_weights,
    get_library,
    large_kernel_depthwise_conv2d,
)
from replknet_paddle.ops.matmul_plan import make_plan
from replknet_paddle.runtime.errors import InputError

ALGORITHMS = ("direct", "fft")

# RepLKNet-31B at 224: channels, side of the map, kernel.
STAGES = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))

# Table 5 of the paper, which times 24 depthwise layers.
GRID_LAYERS = 24
GRID = tuple(
    (384, side, kernel) for side in (16, 32, 64) for kernel in (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
)


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
        """Floating-point operations of one forward pass: two for each tap inside the map.

        Each of the two gradients has as many.
        """
        half = self.kernel // 2
        taps = sum(
            min(self.side, i + half + 1) - max(0, i - half) for i in range(self.side)
        )  # along one axis, over all outputs
        return 2 * self.batch * self.channels * taps**2


def measured_library():
    """The compiled operators, which a benchmark is about.

    Raises:
        InputError: they are not there.
    """
    try:
        return get_library()
    except LibraryError as error:
        raise InputError(f"nothing to measure: {error}") from None


def report_conv(*, shapes: str, batch: int, rounds: int, dtype: str = "float32") -> None:
    """Print how fast depthwise convolutions are beside Paddle's, by pass and implementation.

    Args:
        shapes: `stages`, `grid` or `all`, which is both.
        batch: images of each layer's input.
        rounds: how often each is timed.
        dtype: of the tensors; half precision on GPU only.

    Raises:
        InputError: a number below 1, or a type that is not for this device.
    """
    check_counts(batch=batch, rounds=rounds)
    on_cpu = paddle.device.get_device() == "cpu"
    if on_cpu and dtype != "float32":
        raise InputError(f"--dtype {dtype} on CPU; allowed: float32")
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
    layers = {"stages": STAGES, "grid": GRID, "all": (*STAGES, *GRID)}[shapes]
    print(
        f"{'shape':>20} {'pass':17}{'by':15}{'ms':>9}{'from':>9}{'to':>9}{'GFLOP':>9}{'MB':>9}"
        f"{'of peak':>9}{'of bandw.':>10}{'Paddle/it':>11}{f'{GRID_LAYERS} layers':>11}"
    )
    itemsize = 4 if dtype == "float32" else 2
    for channels, side, kernel in layers:
        case = ConvCase(batch, channels, side, kernel)
        by_pass = time_conv(case, rounds=rounds, dtype=dtype)
        for name, by_impl in by_pass.items():
            chosen = "forward" if name == "forward" else "gradients"
            chosen = library.choose(case.shape, chosen) if library is not None else None
            for impl, seconds in by_impl.items():
                work = work_of(case, name, impl, itemsize)
                timing = summarize(seconds)
                of_peak = _share(work.flops, timing, peak)
                of_bandwidth = _share(work.bytes, timing, bandwidth)
                print(
                    f"{f'{batch}x{channels}x{side}x{side} K{kernel}':>20} {name:17}"
                    f"{impl + (' (auto)' if impl == chosen else ''):15}"
                    f"{1e3 * timing.median_seconds:9.3f}{1e3 * timing.min_seconds:9.3f}"
                    f"{1e3 * timing.max_seconds:9.3f}{work.flops / 1e9:9.2f}{work.bytes / 1e6:9.1f}"
                    f"{of_peak:>9}{of_bandwidth:>10}"
                    f"{median_ratio(by_impl['paddle'], seconds):11.1f}"
                    f"{f'{GRID_LAYERS * 1e3 * timing.median_seconds:.1f} ms':>11}",
                    flush=True,
                )


def _share(amount: float, timing, rate: float | None) -> str:
    """What part of a rate was reached."""
    return "-" if rate is None else f"{amount / timing.median_seconds / rate:.2f}"


@dataclass(frozen=True)
class Work:
    """What an implementation does in one pass: floating-point operations, and bytes moved."""

    flops: int
    bytes: int


def work_of(case: ConvCase, name: str, impl: str, itemsize: int) -> Work:
    """The work of one pass.

    Args:
        name: of the pass, as `time_conv` has it.
        impl: products do what their plan says; for others this is the least possible: useful
            operations, and each tensor read or written once.
    """
    if impl.startswith("matmul"):
        kinds = {
            "forward": ("convolution",),
            "input gradient": ("convolution",),
            "weight gradient": ("weight gradient",),
            "both gradients": ("convolution", "weight gradient"),
        }[name]
        plans = [make_plan(kind, case.shape, itemsize) for kind in kinds]
        return Work(sum(p.flops for p in plans), sum(p.bytes_moved for p in plans))
    passes = 2 if name == "both gradients" else 1
    maps = case.batch * case.channels * case.side**2
    values = (1 + passes) * maps + passes * case.channels * case.kernel**2
    return Work(passes * case.useful_flops, itemsize * values)


def time_conv(
    case: ConvCase, *, rounds: int, dtype: str = "float32"
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each pass of a layer, by Paddle's convolution and each implementation, in turn.

    Args:
        rounds: how often each is timed.
        dtype: of the tensors. Paddle's own computes in float32, whatever it is.

    Returns:
        By pass - forward, input gradient, weight gradient, both gradients - and implementation.
        Those that end in `, kept` are of a layer whose weights are frozen.
    """
    paddle.seed(0)
    shape = [case.batch, case.channels, case.side, case.side]
    x, dy = (paddle.randn(shape).astype(dtype) for _ in range(2))
    weight = paddle.randn([case.channels, 1, case.kernel, case.kernel])
    compiled = ALGORITHMS if operators_here() else ()
    impls = ("paddle", *compiled, "matmul")
    passes = {"forward": {}, "input gradient": {}, "weight gradient": {}, "both gradients": {}}
    for impl in impls:
        passes["forward"][impl] = _forward(x, weight, impl)
        passes["both gradients"][impl] = _backward(x, weight, dy, impl, True, True)
    for impl in ("paddle", "matmul"):
        passes["input gradient"][impl] = _backward(x, weight, dy, impl, True, False)
        passes["weight gradient"][impl] = _backward(x, weight, dy, impl, False, True)
    dx, dweight = paddle.empty_like(x), paddle.empty_like(weight)
    for impl in compiled:  # the operator gives both; its kernels can leave one out
        for name, targets in (("input gradient", (dx, None)), ("weight gradient", (None, dweight))):
            passes[name][impl] = _gradient(case, x, weight, dy, targets, impl)
    with contextlib.ExitStack() as frozen:
        for name, impl in (("auto", "auto"), ("matmul", "matmul")):
            if impl == "auto" and not compiled:
                continue
            layer = _layer(case, impl)
            frozen.enter_context(frozen_weights(layer))
            passes["forward"][f"{name}, kept"] = _evaluated(layer, x)
        return {
            name: time_in_turn({k: _waiting(c) for k, c in calls.items()}, rounds=rounds)
            for name, calls in passes.items()
        }


def operators_here():
    """The compiled operators' library, or None where they do not compute."""
    if paddle.device.get_device() != "cpu":
        return None
    try:
        return get_library()
    except LibraryError:
        return None


def device_rates(dtype: str) -> tuple[float, float]:
    """Bytes/s and operations/s that a copy and a large product of matrices reach on a GPU."""
    values = paddle.zeros([2**27]).astype(dtype)  # 256 or 512 MiB
    side = 8192
    a, b = (paddle.randn([side, side]).astype(dtype) for _ in range(2))
    seconds = time_in_turn(
        {
            "copy": _waiting(lambda: paddle.assign(values)),
            "product": _waiting(lambda: paddle.matmul(a, b)),
        },
        rounds=5,
    )
    moved = 2 * values.size * values.element_size()
    return moved / min(seconds["copy"]), 2 * side**3 / min(seconds["product"])


def _waiting(call: Callable) -> Callable[[], None]:
    """A call that ends when the device has done all its work."""

    def waited():
        call()
        if paddle.device.get_device() != "cpu":
            paddle.device.synchronize()

    return waited


def _layer(case: ConvCase, impl: str) -> nn.Layer:
    layer = nn.Conv2D(
        case.channels,
        case.channels,
        case.kernel,
        padding=case.kernel // 2,
        groups=case.channels,
        bias_attr=False,
    )
    layer.eval()
    layer.__class__, layer.impl = FastDepthwiseConv2D, impl
    return layer


def _forward(x, weight, impl) -> Callable[[], None]:
    def call():
        with paddle.no_grad():
            large_kernel_depthwise_conv2d(x, weight, impl=impl)

    return call


def _evaluated(layer, x) -> Callable[[], None]:
    def call():
        with paddle.no_grad():
            layer(x)

    return call


def _backward(x, weight, dy, impl, by_input: bool, by_weight: bool) -> Callable[[], None]:
    x, weight = x.detach(), weight.detach()
    x.stop_gradient, weight.stop_gradient = not by_input, not by_weight
    wanted = [t for t in (x, weight) if not t.stop_gradient]
    y = large_kernel_depthwise_conv2d(x, weight, impl=impl)

    def call():
        paddle.grad(y, wanted, dy, retain_graph=True)

    return call


def _gradient(case, x, weight, dy, targets, impl) -> Callable[[], None]:
    library = get_library()
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, dy, *targets)]

    def call():
        library.gradients(case.shape, *pointers, algorithm=impl)
        return targets  # keeps them alive

    return call


def seconds_by_layer(model: nn.Layer, run: Callable[[], object]) -> dict[str, float]:
    """Seconds that one `run` of the model spends in the forward pass of each kind of layer.

    Only layers without sublayers count; what `forward` methods of others compute, such as ReLU,
    GELU and additions, goes under "between layers". The hooks stay no longer than this.
    """
    seconds: dict[str, float] = defaultdict(float)
    hooks, started = [], {}

    def before(layer, _):
        started[id(layer)] = time.perf_counter()

    def after(layer, _, output):
        seconds[_kind(layer)] += time.perf_counter() - started[id(layer)]

    for layer in model.sublayers():
        if not list(layer.children()):
            hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.register_forward_post_hook(after))
    try:
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()
    seconds["between layers"] = total - sum(seconds.values())
    return dict(seconds)


def _kind(layer: nn.Layer) -> str:
    if not isinstance(layer, nn.Conv2D):
        return type(layer).__name__
    kernel, stride = layer._kernel_size[0], layer._stride
    stride = stride if isinstance(stride, int) else stride[0]
    name = "1x1" if kernel == 1 else f"{kernel}x{kernel}"
    name += " depthwise" if layer._groups > 1 else ""
    return f"{name} convolution" + (f", stride {stride}" if stride > 1 else "")
