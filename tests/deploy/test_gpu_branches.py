"""What Paddle Inference is asked to do on GPUs, with the device faked."""

import paddle
import pytest
from small_networks import small_config, small_network

from replknet_paddle.deploy import open_backend, runtimes
from replknet_paddle.deploy.runtimes import computes_in, gpu_predictor
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version


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


@pytest.mark.parametrize(
    "precision, kind", [("fp32", "Float32"), ("fp16", "Half"), ("bf16", "Bfloat16")]
)
def test_paddle_inference_computes_on_this_processes_gpu(on_gpu, precision, kind):
    on_gpu()
    calls = gpu_predictor(Settings(), precision).calls
    assert calls["enable_use_gpu"][0][1:] == (1, getattr(paddle.inference.PrecisionType, kind))
    # It would accumulate in half precision.
    ((excluded,), _) = calls["exp_disable_mixed_precision_ops"]
    assert excluded == {"depthwise_conv2d", "pd_op.depthwise_conv2d"}
    paddle.inference.Config().exp_disable_mixed_precision_ops(excluded)  # Paddle's own takes it


def test_int8_is_refused_on_a_gpu(on_gpu):
    on_gpu()
    with pytest.raises(InputError, match="precision int8 .* on GPU; allowed: fp32, fp16, bf16"):
        gpu_predictor(Settings(), "int8")


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
