"""What Paddle Inference is asked to do on GPUs, with the device faked."""

from types import SimpleNamespace

import paddle
import pytest
from small_networks import small_config, small_network

from replknet_paddle.deploy import open_backend, runtimes
from replknet_paddle.deploy.runtimes import TENSORRT_BATCH, computes_in, gpu_predictor
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

SIDECAR = SimpleNamespace(preprocessing=SimpleNamespace(image_size=32), segmentation=None)


class Settings:
    """Stands for `paddle.inference.Config`: notes which methods were called, and with what."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.__setitem__(name, (args, kwargs))


@pytest.fixture
def on_gpu(monkeypatch):
    """This process believes that it computes on GPU 1, of the given compute capability."""

    def pretend(capability=(8, 0)):
        monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:1")
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(runtimes.inference, "create_predictor", lambda config: config)
        assert processes.on_gpu()

    return pretend


def tensorrt_of_the_wheel(monkeypatch, runtime_version):
    """As `paddlepaddle-gpu` 2.6.2 of PyPI, which is built with TensorRT and does not bring it."""
    monkeypatch.setattr(paddle, "__version__", "2.6.2")
    monkeypatch.setattr(runtimes.inference, "get_trt_compile_version", lambda: (8, 5, 3))
    monkeypatch.setattr(runtimes.inference, "get_trt_runtime_version", runtime_version)


def missing_library():
    raise RuntimeError("(NotFound) TensorRT is needed, but its dynamic library is not found.")


@pytest.mark.parametrize("runtime_version", [missing_library, lambda: (0, 0, 0)])
def test_a_gpu_without_tensorrt_uses_cudnn(monkeypatch, on_gpu, runtime_version):
    on_gpu()
    tensorrt_of_the_wheel(monkeypatch, runtime_version)
    predictor, prepared = gpu_predictor(Settings, SIDECAR, "fp16")
    assert prepared is None and "enable_tensorrt_engine" not in predictor.calls
    assert predictor.calls["enable_use_gpu"][0][1:] == (1, paddle.inference.PrecisionType.Half)


def test_a_gpu_with_tensorrt_is_prepared_for_batches(monkeypatch, on_gpu):
    on_gpu()
    tensorrt_of_the_wheel(monkeypatch, lambda: (8, 5, 3))
    predictor, prepared = gpu_predictor(Settings, SIDECAR, "fp32")
    assert prepared == (TENSORRT_BATCH, 32) and "enable_tensorrt_engine" in predictor.calls
    for other, version in (("bf16", "2.6.2"), ("fp32", "3.3.1")):
        monkeypatch.setattr(paddle, "__version__", version)
        assert gpu_predictor(Settings, SIDECAR, other)[1] is None


@pytest.mark.parametrize("capability, allowed", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_needs_a_gpu_that_has_it(on_gpu, capability, allowed):
    on_gpu(capability)
    assert computes_in("paddle", "bf16") == allowed
    assert computes_in("paddle", "fp16") and computes_in("paddle", "fp32")


def test_bfloat16_on_a_gpu_without_it_is_refused(tmp_path, on_gpu):
    config = small_config(tmp_path)
    network = small_network(config)
    on_gpu((7, 5))
    with pytest.raises(InputError, match="compute capability below 8.0"):
        open_backend(network, "paddle", config=config, precision="bf16")
