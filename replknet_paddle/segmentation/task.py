"""A segmentation network's parts of a run, with the methods of `engine.task`."""

from collections.abc import Callable
from functools import partial

import paddle
from paddle import nn

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.load import layout_of, load_pretrained
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.data.loader import Loader
from replknet_paddle.optim.optimizer import ParameterGroup, adamw
from replknet_paddle.optim.schedule import get_poly_lr
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.segmentation.data import get_dataloader, get_dataset
from replknet_paddle.segmentation.evaluate import ConfusionSums, build_inference, segmentation_loss
from replknet_paddle.segmentation.upernet import UPerNet, build_upernet


def parameter_groups(model: nn.Layer, weight_decay: float) -> list[ParameterGroup]:
    """Return the trainable parameters: all decay but those of norms; classifiers' biases do, too.

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


class SegmentationTask:
    """Builds the parts of a run that tasks do not share, each from the configuration."""

    prefix = "val"
    dataset = staticmethod(get_dataset)
    loader = staticmethod(get_dataloader)
    network = staticmethod(build_upernet)
    inference = staticmethod(build_inference)

    def check(self, config) -> None:
        """Raise InputError for a configuration that is not a segmentation network's."""
        if config.MODEL.TYPE != "UPerNet":
            raise InputError(
                f"MODEL.TYPE is {config.MODEL.TYPE}; allowed for segmentation: UPerNet "
                "(configs/upernet_*.yaml)"
            )

    def load_weights(self, model: UPerNet, config, file: CheckpointFile) -> None:
        """Load a checkpoint: all of it or, to start training, a classifier's backbone."""
        weights = config.MODEL.PRETRAINED_WEIGHTS
        if config.EVAL or layout_of(file, weights=weights) in ("upernet", "mmseg"):
            drop_head = config.MODEL.DROP_HEAD and not config.EVAL
            load_pretrained(model, file, weights=weights, drop_head=drop_head)
        else:
            load_pretrained(model.backbone, file, weights=weights)

    def optimizer(
        self, config, model: nn.Layer, *, lr: float, multi_precision: bool = False
    ) -> paddle.optimizer.AdamW:
        """Return AdamW as the official configurations have it."""
        groups = parameter_groups(model, config.TRAIN.WEIGHT_DECAY)
        return adamw(config, groups, lr=lr, multi_precision=multi_precision)

    def schedule(self, config, peak: float, steps_per_epoch: int) -> Callable[[int], float]:
        """Return the learning rate of each step: warm-up and straight decay over the run."""
        return partial(
            get_poly_lr,
            base_lr=peak,
            min_lr=config.TRAIN.END_LR,
            warmup_start_lr=config.TRAIN.WARMUP_START_LR,
            warmup_steps=config.SEGMENTATION.WARMUP_STEPS,
            total_steps=config.TRAIN.NUM_EPOCHS * steps_per_epoch,
        )

    def mixup(self, config) -> None:
        """Return None: batches are not mixed."""

    def criterion(self, config, class_weights: None = None) -> Callable:
        """Return the mean loss of (logits of both heads, labels)."""
        return partial(segmentation_loss, align_corners=config.SEGMENTATION.ALIGN_CORNERS)

    def metric_sums(self, config, loader: Loader | None = None) -> ConfusionSums:
        """Return an empty confusion matrix with the names of the classes; with a `loader`, that of
        an evaluation, the IoU of each image is kept as well."""
        return ConfusionSums(config.MODEL.NUM_CLASSES, get_class_names(config), loader)


SEGMENTATION = SegmentationTask()
