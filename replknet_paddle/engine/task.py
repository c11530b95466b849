"""What a run trains: the parts that classification and other tasks do not share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import paddle

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.data.loader import Loader
from replknet_paddle.data.transforms import build_mixup
from replknet_paddle.engine.metrics import MetricSums
from replknet_paddle.engine.start import differing_names
from replknet_paddle.model import build_replknet
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from replknet_paddle.optim.optimizer import build_optimizer
from replknet_paddle.optim.schedule import get_lr
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError


@dataclass(frozen=True)
class Task:
    """Builders of a run's parts. `engine.run` calls each with the configuration.

    Attributes:
        check: raises InputError for a configuration of something else.
        dataset: (config, is_train) -> the dataset, to find its problems early.
        loader: (config, is_train) -> this process's `Loader`.
        network: (config, sync_bn=) -> the network, freshly initialized.
        load_weights: (network, config, checkpoint file) puts a checkpoint into the network.
        optimizer: (config, network, lr=, multi_precision=) -> AdamW.
        schedule: (config, peak, steps_per_epoch) -> the learning rate of each step.
        mixup: config -> what mixes training batches, or None.
        criterion: config -> (outputs, targets) -> mean loss.
        inference: (config, network) -> images -> what the metrics are computed from.
        metric_sums: config -> sums over batches: `add(outputs, labels)`, and `total()`, metrics
            with `score`, `record(prefix)` and a text.
    """

    check: Callable
    dataset: Callable
    loader: Callable[..., Loader]
    network: Callable[..., paddle.nn.Layer]
    load_weights: Callable
    optimizer: Callable
    schedule: Callable[..., Callable[[int], float]]
    mixup: Callable
    criterion: Callable
    inference: Callable
    metric_sums: Callable


def check_classifier(config) -> None:
    """Raise InputError for a configuration that is not of a classifier."""
    if config.MODEL.OUT_INDICES is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {config.MODEL.OUT_INDICES}, which makes a backbone "
            "without a head; training and evaluation need it to be None"
        )


def build_loader(config, is_train: bool) -> Loader:
    """This process's loader of the training or the validation set."""
    return get_dataloader(
        config,
        get_dataset(config, is_train),
        is_train,
        rank=processes.rank(),
        world_size=processes.world_size(),
    )


def load_weights(model: paddle.nn.Layer, config, file: CheckpointFile) -> None:
    """Put a checkpoint into the network."""
    load_pretrained(
        model,
        file,
        weights=config.MODEL.PRETRAINED_WEIGHTS,
        drop_head=config.MODEL.DROP_HEAD and not config.EVAL,
        other_classes=bool(differing_names(config, file.classes)),
    )


def cosine_schedule(config, peak: float, steps_per_epoch: int) -> Callable[[int], float]:
    """Warm-up and cosine over the epochs of the run."""
    train = config.TRAIN
    return partial(
        get_lr,
        base_lr=peak,
        min_lr=train.END_LR,
        warmup_start_lr=train.WARMUP_START_LR,
        warmup_steps=train.WARMUP_EPOCHS * steps_per_epoch,
        total_steps=train.NUM_EPOCHS * steps_per_epoch,
    )


def build_criterion(config) -> Callable:
    """Cross entropy of mixed targets or of labels."""
    if build_mixup(config) is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.TRAIN.SMOOTHING)


CLASSIFICATION = Task(
    check=check_classifier,
    dataset=get_dataset,
    loader=build_loader,
    network=build_replknet,
    load_weights=load_weights,
    optimizer=build_optimizer,
    schedule=cosine_schedule,
    mixup=build_mixup,
    criterion=build_criterion,
    inference=lambda config, model: model,
    metric_sums=lambda config: MetricSums(),
)
