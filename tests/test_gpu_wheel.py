"""PyPI's `paddlepaddle-gpu` 2.6.2, which imports without a driver: has it the kernels we need?

`GPU_WHEEL=1 sh run_tests.sh` runs these, and what else can be shown in that environment, there.
What is computed is recorded while the network trains and evaluates on the CPU; for each operation
Paddle's registry then says in which types the GPU has it, forward and backward.
"""

import re
from collections import defaultdict

import numpy as np
import paddle
import pytest

pytestmark = [
    pytest.mark.gpu_wheel,
    pytest.mark.skipif(
        not paddle.is_compiled_with_cuda(), reason="needs Paddle's GPU wheel: GPU_WHEEL=1"
    ),
]

FLOATS = {"float", "float16", "bfloat16"}
# What computes on other types alone, or in fewer; all else must exist for FLOATS.
OTHER_TYPES = {
    "isfinite_v2": {"float"},  # of float32 gradients
    "lookup_table_v2": {"float"},
    "one_hot_v2": {"int64_t"},  # labels
    "reduce_all": {"bool"},
    "logical_not": {"bool"},
    "logical_and": {"bool"},
    "logical_or": {"bool"},
    "take_along_axis": {"float"},  # of float32 logits
    "top_k_v2": {"float"},
    "range": {"int64_t"},
    "uniform_random": {"float"},
    "gaussian_random": {"float"},
    "truncated_gaussian_random": {"float"},
    "bernoulli": {"float"},
    "cast": FLOATS | {"uint8_t", "bool", "int64_t", "double"},
    "transfer_dtype": FLOATS | {"uint8_t", "bool", "int64_t", "double"},
    "transpose2": FLOATS | {"uint8_t"},  # batches of 8-bit pixels
    "stack": FLOATS | {"bool", "double"},  # the numbers that a step reads
    "concat": FLOATS | {"double"},
    "scatter": {"float"},  # erasing
}

REGISTERED_AS = {"full_": "fill_constant"}


def gpu_kernels() -> dict[str, set[str]]:
    """The types that each operation has a GPU kernel for."""
    registry = paddle.base.core._get_all_register_op_kernels("phi")
    types = defaultdict(set)
    for operation, kernels in registry.items():
        for kernel in kernels:
            dtype, place = re.match(r"\{data_type\[(.*?)\];.*place\[(.*?)\];", kernel).groups()
            if "gpu" in place:
                types[operation].add(dtype.rpartition("::")[2])
    return types


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Names of the operations of two training steps and an evaluation, with all that is optional:
    mixing, erasing, stochastic depth, layer decay, clipping, EMA weights, a loss scale."""
    from tiny import TINY, make_data

    from replknet_paddle.config import get_config, update_config
    from replknet_paddle.data.dataset import get_dataloader, get_dataset
    from replknet_paddle.data.transforms import build_mixup
    from replknet_paddle.engine.metrics import label_ranks
    from replknet_paddle.engine.precision import LossScaler, Precision
    from replknet_paddle.engine.train import Parts, train_epoch
    from replknet_paddle.model import build_replknet
    from replknet_paddle.ops import use_fast_depthwise_conv, use_fast_pointwise_conv
    from replknet_paddle.optim.ema import ModelEma
    from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from replknet_paddle.optim.optimizer import build_optimizer

    folder = tmp_path_factory.mktemp("wheel")
    make_data(folder, train=32, val=8)
    (folder / "tiny.yaml").write_text(TINY)

    class Flags:
        opts = ["DATA.DATA_PATH", str(folder), "TRAIN.RANDOM_ERASE_PROB", "1"]
        opts += ["TRAIN.LAYER_DECAY", "0.7", "TRAIN.GRAD_CLIP", "1.0", "DATA.NUM_WORKERS", "0"]

    config = update_config(get_config(str(folder / "tiny.yaml")), Flags)
    model = build_replknet(config)
    use_fast_depthwise_conv(model, "paddle")
    use_fast_pointwise_conv(model, "paddle")
    loader = get_dataloader(config, get_dataset(config, True), True)
    precision = Precision()
    precision.scaler = LossScaler(2.0)
    parts = Parts(
        model=model,
        criterion=SoftTargetCrossEntropy(),
        optimizer=build_optimizer(config, model, lr=1e-3),
        learning_rate=lambda step: 1e-3,
        precision=precision,
        mixup=build_mixup(config),
        ema=ModelEma(model, decay=0.9),
    )
    paddle.set_flags({"FLAGS_low_precision_op_list": 1})
    try:
        assert len(list(train_epoch(parts, loader, accum_iter=2, seed=0, epoch=0))) == 2
        LabelSmoothingCrossEntropy(0.1)(model(paddle.ones([2, 3, 32, 32])), paddle.ones([2], int))
        model.eval()
        for images, labels in get_dataloader(config, get_dataset(config, False), False):
            label_ranks(model(images), labels)
        model.structural_reparam()
        model(images)
        names = set(paddle.base.core.get_low_precision_op_list())
    finally:
        paddle.set_flags({"FLAGS_low_precision_op_list": 0})
    assert {"conv2d", "depthwise_conv2d", "batch_norm", "adamw_", "lerp"} <= names, names
    return sorted(names)


def test_the_gpu_has_every_operation_in_every_type_that_we_need(recorded):
    kernels = gpu_kernels()
    missing = {}
    for name in recorded:
        operation = REGISTERED_AS.get(name, name.rstrip("_"))
        lacking = OTHER_TYPES.get(operation, FLOATS) - kernels.get(operation, set())
        if lacking:
            missing[operation] = lacking
    assert not missing
    for operation in ("sync_batch_norm", "c_allreduce_sum", "matmul_v2"):
        assert kernels[operation] >= FLOATS, operation
    assert "double" in kernels["c_allreduce_sum"]  # what a step reads is summed in float64


def test_the_gpu_has_their_gradients(recorded):
    registry = paddle.base.core._get_all_register_op_kernels("phi")
    kernels = gpu_kernels()
    checked, missing = [], {}
    for name in recorded:
        gradient = f"{name.rstrip('_')}_grad"
        if gradient in registry:
            checked.append(gradient)
            lacking = (OTHER_TYPES.get(name.rstrip("_"), FLOATS) & FLOATS) - kernels[gradient]
            if lacking:
                missing[gradient] = lacking
    assert not missing
    assert {"conv2d_grad", "depthwise_conv2d_grad", "batch_norm_grad", "relu_grad"} <= set(checked)
    assert kernels["sync_batch_norm_grad"] >= FLOATS


def test_the_flags_that_are_set_on_gpus_exist():
    from replknet_paddle.runtime.processes import DETERMINISTIC_FLAGS

    before = paddle.get_flags(list(DETERMINISTIC_FLAGS))
    try:
        paddle.set_flags(DETERMINISTIC_FLAGS)
        assert paddle.get_flags(list(DETERMINISTIC_FLAGS)) == DETERMINISTIC_FLAGS
    finally:
        paddle.set_flags(before)


def test_tensorrt_that_the_wheel_lacks_is_no_error():
    from replknet_paddle.deploy.runtimes import has_tensorrt

    assert any(paddle.inference.get_trt_compile_version())
    assert not has_tensorrt()


def test_events_of_copies_can_be_made():
    assert paddle.device.cuda.Event() is not None


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_branches_of_training_on_a_gpu_are_taken(level, monkeypatch):
    """With the device faked: what they ask of Paddle exists and has these parameters."""
    from replknet_paddle.engine.precision import Precision
    from replknet_paddle.runtime import processes

    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *_: (8, 0))
    assert processes.on_gpu() and processes.gpu_computes_in_bfloat16()
    for dtype in ("float16", "bfloat16"):
        precision = Precision(enabled=True, level=level, dtype=dtype)
        layer = paddle.nn.Linear(2, 2)
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=layer.parameters())
        precision.prepare(layer, optimizer)
        with precision.autocast():
            loss = layer(paddle.ones([1, 2])).sum()
        precision.backward(loss)
        precision.step(optimizer, finite=True)
        assert np.isfinite(layer.weight.numpy()).all()
