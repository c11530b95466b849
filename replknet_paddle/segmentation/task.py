"""The parts of a segmentation run, for `replknet_paddle.engine`."""

from collections.abc import Callable
from functools import partial

import paddle
from paddle import nn

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.load import layout_of, load_pretrained
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.task import Task
from replknet_paddle.optim.optimizer import ParameterGroup, adamw
from replknet_paddle.optim.schedule import get_poly_lr
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.segmentation.data import get_dataloader, get_dataset
from replknet_paddle.segmentation.evaluate import ConfusionSums, SegmentationLoss
from replknet_paddle.segmentation.inference import build_inference
from replknet_paddle.segmentation.upernet import UPerNet, build_upernet


def check_segmenter(config) -> None:
    """Raise InputError for a configuration that is not of a segmentation network."""
    if config.MODEL.TYPE != "UPerNet":
        raise InputError(
            f"MODEL.TYPE is {config.MODEL.TYPE}; allowed for segmentation: UPerNet "
            "(configs/upernet_*.yaml)"
        )


def build_loader(config, is_train: bool) -> Loader:
    """This process's loader of the training or the validation set."""
    return get_dataloader(
        config, is_train, rank=processes.rank(), world_size=processes.world_size()
    )


def load_weights(model: UPerNet, config, file: CheckpointFile) -> None:
    """Put a checkpoint into the network: all of it or, to start training, a
    classifier's backbone."""
    weights = config.MODEL.PRETRAINED_WEIGHTS
    if config.EVAL or layout_of(file, weights=weights) in ("upernet", "mmseg"):
        drop_head = config.MODEL.DROP_HEAD and not config.EVAL
        load_pretrained(model, file, weights=weights, drop_head=drop_head)
    else:
        load_pretrained(model.backbone, file, weights=weights)


def parameter_groups(model: nn.Layer, weight_decay: float) -> list[ParameterGroup]:
    """The trainable parameters: all decay but those of norms; the classifiers' biases do, too.

    Source: the official configuration's `paramwise_cfg=dict(norm_decay_mult=0)`.
    """
    norms = {
        name
        for name, layer in model.named_sublayers()
        if isinstance(layer, (nn.BatchNorm2D, nn.SyncBatchNorm))
    }
    groups = [ParameterGroup(0, 1.0, weight_decay), ParameterGroup(0, 1.0, 0.0)]
    for name, param in model.named_parameters():
        if not param.stop_gradient:
            group = groups[name.rpartition(".")[0] in norms]
            group.names.append(name)
            group.params.append(param)
    return groups


def build_optimizer(
    config, model: nn.Layer, *, lr: float, multi_precision: bool = False
) -> paddle.optimizer.AdamW:
    """AdamW as the official configurations have it."""
    groups = parameter_groups(model, config.TRAIN.WEIGHT_DECAY)
    return adamw(config, groups, lr=lr, multi_precision=multi_precision)


def poly_schedule(config, peak: float, steps_per_epoch: int) -> Callable[[int], float]:
    """Warm-up and straight decay over the steps of the run."""
    return partial(
        get_poly_lr,
        base_lr=peak,
        min_lr=config.TRAIN.END_LR,
        warmup_start_lr=config.TRAIN.WARMUP_START_LR,
        warmup_steps=config.SEGMENTATION.WARMUP_STEPS,
        total_steps=config.TRAIN.NUM_EPOCHS * steps_per_epoch,
    )


def build_metric_sums(config) -> ConfusionSums:
    """The confusion matrix, with the names of the classes."""
    return ConfusionSums(config.MODEL.NUM_CLASSES, get_class_names(config))


SEGMENTATION = Task(
    check=check_segmenter,
    dataset=get_dataset,
    loader=build_loader,
    network=build_upernet,
    load_weights=load_weights,
    optimizer=build_optimizer,
    schedule=poly_schedule,
    mixup=lambda config: None,
    criterion=lambda config: SegmentationLoss(align_corners=config.SEGMENTATION.ALIGN_CORNERS),
    inference=build_inference,
    metric_sums=build_metric_sums,
)
