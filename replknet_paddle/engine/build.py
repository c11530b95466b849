"""Parts of a run that every task has, built as its configuration says."""

import logging

import paddle

from replknet_paddle.engine.batch_norm import check_synchronized
from replknet_paddle.engine.precision import Precision
from replknet_paddle.engine.task import Task
from replknet_paddle.ops import (
    describe_convolutions,
    use_fast_depthwise_conv,
    use_fast_pointwise_conv,
)
from replknet_paddle.runtime import processes

logger = logging.getLogger(__name__)


def build_network(config, task: Task) -> paddle.nn.Layer:
    """The network on this process's device, with fast convolutions and synchronized BN where those
    apply."""
    sync_bn = synchronizes_batch_norm(config)
    if sync_bn:
        check_synchronized()
    if config.MODEL.SYNC_BN and processes.world_size() > 1 and not processes.on_gpu():
        logger.warning(
            "MODEL.SYNC_BN needs GPUs: each process normalizes by its own batches, "
            "and running statistics are averaged over the processes"
        )
    model = task.network(config, sync_bn=sync_bn)
    use_fast_depthwise_conv(
        model, config.MODEL.CONV_IMPL, memory_bytes=config.MODEL.CONV_MEMORY_MB * 2**20
    )
    pointwise = use_fast_pointwise_conv(model, config.MODEL.CONV_IMPL)
    logger.info(
        "depthwise convolutions: %s; 1x1 convolutions: %s",
        describe_convolutions(model),
        f"{pointwise} by the compiled operator" if pointwise else "all by Paddle",
    )
    return model


def synchronizes_batch_norm(config) -> bool:
    """Whether this run computes batch statistics over all its GPUs."""
    several_gpus = processes.on_gpu() and processes.world_size() > 1
    return config.MODEL.SYNC_BN and several_gpus and not config.EVAL


def build_precision(config) -> Precision:
    """How to compute: mixed precision where asked for and possible."""
    return Precision(enabled=config.AMP, level=config.AMP_LEVEL, dtype=config.AMP_DTYPE)
