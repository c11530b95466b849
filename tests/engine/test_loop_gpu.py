"""What only a GPU can show of the loop: copies that do not wait, and kernels of real sizes."""

import time

import numpy as np
import paddle
import pytest
import yaml
from figures import report
from harness import assert_same_end
from tiny import TINY

from replknet_paddle.data.transforms.finish import FinishBatch, to_device
from replknet_paddle.runtime import processes

GPUS = processes.visible_devices()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a GPU, and -m gpu"),
]


@pytest.fixture
def gpu():
    """This process computes on the GPU for the test."""
    paddle.set_device("gpu")
    yield
    paddle.set_device("cpu")


def keep_busy(seconds_at_least=0.2):
    """Queue work that takes the GPU a while; returns how long, once measured."""
    square = paddle.ones([8192, 8192])

    def queue(count):
        product = square
        for _ in range(count):
            product = paddle.matmul(product, square) * 1e-4
        return product

    queue(2)
    paddle.device.synchronize()
    start = time.perf_counter()
    queue(4)
    paddle.device.synchronize()
    each = (time.perf_counter() - start) / 4
    return lambda: queue(int(seconds_at_least / each) + 1)


def test_copies_do_not_wait_for_the_gpu_and_arrive_whole(gpu):
    work = keep_busy()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (64, 224, 224, 3), dtype=np.uint8) for _ in range(4)]
    kept = [array.copy() for array in arrays]
    to_device(arrays[0])  # pinned memory is slow to get the first time
    paddle.device.synchronize()
    start = time.perf_counter()
    work()
    queued = time.perf_counter() - start
    tensors = []
    for array in arrays:
        tensors.append(to_device(array))
        array[:] = 0  # as a worker would write the next batch
    called = time.perf_counter() - start - queued
    paddle.device.synchronize()
    total = time.perf_counter() - start
    report("4 batches of 64 x 224 x 224 copied while the GPU is busy for", f"{1e3 * total:.0f} ms")
    report("of which the calls took", f"{1e3 * called:.1f} ms")
    for tensor, wanted in zip(tensors, kept):
        assert np.array_equal(tensor.numpy(), wanted)
    assert called < total / 2


def test_batches_are_normalized_and_erased_as_on_the_cpu(gpu):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
    erasures = [(i, [(3, 4, 40, 50), (20, 10, 90, 60)], i) for i in (0, 3, 7)]
    finish = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), erase_mode="pixel")
    got = FinishBatch(**finish)(to_device(pixels), erasures).numpy()
    paddle.set_device("cpu")
    wanted = FinishBatch(**finish)(paddle.to_tensor(pixels), erasures).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def real_kernels(folder, **keys):
    """A configuration with the published kernel sizes, and few channels."""
    settings = yaml.safe_load(TINY)
    settings["DATA"] |= {"IMAGE_SIZE": 128, "NUM_WORKERS": 2}
    settings["MODEL"] |= {
        "LARGE_KERNEL_SIZES": [31, 29, 27, 13],
        "CHANNELS": [16, 32, 64, 128],
        "DROPPATH": 0.0,
    }
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump({**settings, **keys}))
    return path


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_real_kernel_sizes_train_with_workers(run_main, tiny_data, tmp_path, level, dtype):
    path = real_kernels(tmp_path, AMP_LEVEL=level, AMP_DTYPE=dtype, AMP=True)
    done = run_main(f"-cfg={path}", f"-data_path={tiny_data}", f"-output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_deterministic_runs_give_the_same_bits(run_main, tiny_data, tmp_path):
    path = real_kernels(tmp_path, DETERMINISTIC=True)
    for name in ("one", "two"):
        done = run_main(
            "-nproc=1", f"-cfg={path}", f"-data_path={tiny_data}", f"-output={tmp_path / name}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(tmp_path / "two", tmp_path / "one")
