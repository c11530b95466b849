"""What one training step asks of the host and of the network: counted by name, at real ranks.

A host synchronization costs a GPU all that it could have been given meanwhile; a reduction its
latency; a copy of a tensor a kernel. Whoever adds one to a step changes the numbers here.
"""

import contextlib
import json
from collections import Counter
from functools import partial

import paddle
import paddle.distributed as dist
import pytest
from epochs import make_model, steps_of
from harness import finish_ranks
from tiny import flags

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.data.transforms import build_mixup
from replknet_paddle.engine.precision import Precision
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.gradients import Gradients
from replknet_paddle.optim.losses import SoftTargetCrossEntropy
from replknet_paddle.runtime import processes

pytestmark = pytest.mark.paddle_version

SYNCHRONIZATIONS = ("numpy", "item", "tolist", "cpu", "__array__", "__float__", "__int__")
SYNCHRONIZATIONS += ("__bool__", "__index__", "__len__")
REDUCTIONS = ("all_reduce", "broadcast", "all_gather", "barrier", "reduce")
COPIES = ("copy_", "_copy_to", "cuda", "pin_memory", "set_value", "clone")
FUNCTIONS = ("to_tensor", "assign", "concat", "split")
SETTERS = ("grad", "grad_", "data")  # the first copies, through a stream that all others wait for

# A step of one batch, with mixing, erasing, a loss scale, EMA weights and statistics to average.
EXPECTED = {
    "numpy": 1,  # loss, images, requests, overflow
    "all_reduce": 3,  # those; the gradients, in one bucket of 64 MiB; the statistics
    "to_tensor": 4,  # the next batch: images, labels, where to erase, and with what
    "concat": 4,  # gradients, statistics, EMA weights, what is read
    "split": 2,  # gradients, statistics
}


@contextlib.contextmanager
def counted():
    """Count the calls of the functions above, by name, within the context."""
    calls = Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (paddle.Tensor, SYNCHRONIZATIONS + COPIES),
            (dist, REDUCTIONS),
            (paddle, FUNCTIONS),
        ):
            for name in filter(partial(hasattr, owner), names):
                patch.setattr(owner, name, counting(name, getattr(owner, name)))
        for name in SETTERS:
            plain = getattr(paddle.Tensor, name)
            setter = counting(f"{name} =", plain.__set__)
            patch.setattr(paddle.Tensor, name, property(plain.__get__, setter))
        yield calls


def count_steps(arguments: list[str]) -> int:
    """On each rank: what the third step of an epoch calls, as JSON."""
    cfg, data_path, output = arguments
    processes.init()
    opts = ["DATA.DATA_PATH", data_path, "TRAIN.RANDOM_ERASE_PROB", "1", "MODEL.DROPPATH", "0"]
    config = update_config(get_config(cfg), flags(batch_size=4, opts=opts))
    ranks = dict(rank=processes.rank(), world_size=processes.world_size())
    loader = get_dataloader(config, get_dataset(config, True), True, **ranks)
    model = make_model()
    precision = Precision()
    precision.loss_scale = 2.0
    steps = steps_of(
        model,
        loader,
        paddle.optimizer.AdamW(1e-3, parameters=model.parameters()),
        criterion=SoftTargetCrossEntropy(),
        precision=precision,
        mixup=build_mixup(config),
        ema=ModelEma(model, decay=0.9),
        requests=lambda: [0.0, 1.0],
    )
    next(steps)
    next(steps)
    with counted() as calls:
        step = next(steps)
    assert step.requests == [0, processes.world_size()]
    with open(f"{output}.{processes.rank()}", "w") as file:
        json.dump(calls, file)
    return 0


def test_a_step_waits_once_reduces_thrice_and_copies_nothing_but_its_batch(
    tiny_config_file, tiny_data, tmp_path
):
    arguments = [tiny_config_file, tiny_data, tmp_path / "counts"]
    finish_ranks(arguments, target=count_steps)
    for rank in range(2):
        assert json.loads((tmp_path / f"counts.{rank}").read_text()) == EXPECTED


def test_gradients_of_half_precision_weights_become_float32_without_a_copy():
    weights = [paddle.create_parameter([size], "float32") for size in (3, 4)]
    model = paddle.nn.ParameterList(weights)
    model.to(dtype="bfloat16")
    gradients = Gradients(model)
    with counted() as calls:
        for _ in range(2):
            sum((weight * weight).astype("float32").sum() for weight in model).backward()
            gradients.collect()
        gradients.finish()
    assert all(weight.grad.dtype == paddle.float32 for weight in model)
    assert calls == {"concat": 2, "split": 1, "grad_ =": 2}
