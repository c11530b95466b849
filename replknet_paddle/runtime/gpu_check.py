"""Whether Paddle computes right on this machine's GPUs; setup_env.sh asks after installing it.

A build without code for a GPU fails late and in words of its own, or does not fail at all: Paddle
3.0 gave wrong products on compute capability 12.0.

    python -m replknet_paddle.runtime.gpu_check
"""

import sys

import numpy as np
import paddle
from paddle.nn import functional as F

# Largest error over the largest value: TensorFloat-32 keeps ten bits of each factor.
TOLERANCE = 1e-2


def why_gpus_fail() -> str | None:
    """Return the first GPU's fault in one line, or None where all compute what the CPU does.

    Of a build of Paddle for CPU there is nothing to say.
    """
    if not paddle.is_compiled_with_cuda():
        return None
    count = paddle.device.cuda.device_count()
    if count == 0:
        return f"Paddle {paddle.__version__} for CUDA {paddle.version.cuda()} sees no GPU"
    paddle.set_device("cpu")
    wanted = products()
    for index in range(count):
        name = paddle.device.cuda.get_device_name(index)
        major, minor = paddle.device.cuda.get_device_capability(index)
        built_for = [divmod(int(arch), 10) for arch in paddle.version.cuda_archs()]
        if built_for and not any(m == major and n <= minor for m, n in built_for):
            listed = ", ".join(f"{m}.{n}" for m, n in built_for)
            return (
                f"Paddle {paddle.__version__} is built for compute capability {listed}; {name} "
                f"has {major}.{minor}"
            )
        try:
            paddle.set_device(f"gpu:{index}")
            got = products()
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


def products() -> dict[str, np.ndarray]:
    """A matrix product and a convolution on the current device."""
    rng = np.random.default_rng(0)
    a, b = (paddle.to_tensor(x) for x in rng.standard_normal((2, 256, 256), "float32"))
    x = paddle.to_tensor(rng.standard_normal((2, 16, 32, 32), "float32"))
    weight = paddle.to_tensor(rng.standard_normal((32, 16, 3, 3), "float32"))
    return {
        "matrix product": paddle.matmul(a, b).numpy(),
        "convolution": F.conv2d(x, weight, padding=1).numpy(),
    }


if __name__ == "__main__":
    problem = why_gpus_fail()
    if problem is not None:
        print(problem)
        sys.exit(1)
