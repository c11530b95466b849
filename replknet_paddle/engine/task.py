"""A classifier's parts of a run. `segmentation.task` has the same methods for segmentation."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import paddle

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.data.loader import Loader
from replknet_paddle.data.transforms import build_mixup
from replknet_paddle.engine.evaluate import OutcomeSums
from replknet_paddle.engine.start import differing_names
from replknet_paddle.model import build_replknet
from replknet_paddle.optim.losses import (
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    WeightedCrossEntropy,
)
from replknet_paddle.optim.optimizer import build_optimizer
from replknet_paddle.optim.schedule import get_lr
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError


class ClassificationTask:
    """Builds the parts of a run that tasks do not share, each from the configuration."""

    prefix = "val"  # of an evaluation's figures in metrics.jsonl

    def __init__(self, *, flip: bool = False) -> None:
        self.flip = flip  # evaluate the mean probabilities of each image and its mirror image

    dataset = staticmethod(get_dataset)  # (config, is_train) -> to find its problems early
    network = staticmethod(build_replknet)  # (config, sync_bn=) -> freshly initialized
    optimizer = staticmethod(build_optimizer)  # (config, network, lr=, multi_precision=) -> AdamW
    mixup = staticmethod(build_mixup)  # config -> what mixes training batches, or None

    def check(self, config) -> None:
        """Raise InputError for a configuration that is not a classifier's."""
        if config.MODEL.OUT_INDICES is not None:
            raise InputError(
                f"MODEL.OUT_INDICES is {config.MODEL.OUT_INDICES}, which makes a backbone "
                "without a head; training and evaluation need it to be None"
            )
        if config.MODEL.NUM_CLASSES == 0:
            raise InputError(
                "MODEL.NUM_CLASSES is 0, which makes a network without a head; training and "
                "evaluation need the number of classes, or None for that of the data"
            )

    def loader(self, config, is_train: bool) -> Loader:
        """Return this process's loader of the training or the validation set."""
        return get_dataloader(
            config,
            self.dataset(config, is_train),
            is_train,
            rank=processes.rank(),
            world_size=processes.world_size(),
        )

    def load_weights(self, model: paddle.nn.Layer, config, file: CheckpointFile) -> None:
        """Load a checkpoint into the network."""
        load_pretrained(
            model,
            file,
            weights=config.MODEL.PRETRAINED_WEIGHTS,
            drop_head=config.MODEL.DROP_HEAD and not config.EVAL,
            other_classes=bool(differing_names(config, file.classes)),
        )

    def schedule(self, config, peak: float, steps_per_epoch: int) -> Callable[[int], float]:
        """Return the learning rate of each step: warm-up and cosine over the epochs of the run."""
        train = config.TRAIN
        return partial(
            get_lr,
            base_lr=peak,
            min_lr=train.END_LR,
            warmup_start_lr=train.WARMUP_START_LR,
            warmup_steps=train.WARMUP_EPOCHS * steps_per_epoch,
            total_steps=train.NUM_EPOCHS * steps_per_epoch,
        )

    def criterion(self, config, class_weights: np.ndarray | None = None) -> Callable:
        """Return the mean loss of (logits, mixed targets or labels)."""
        if class_weights is not None:
            return WeightedCrossEntropy(class_weights, config.TRAIN.SMOOTHING)
        if build_mixup(config) is not None:
            return SoftTargetCrossEntropy()
        return LabelSmoothingCrossEntropy(config.TRAIN.SMOOTHING)

    def inference(self, config, model: Callable) -> Callable:
        """Return the function from images to the logits of the metrics, at MODEL.TEMPERATURE."""
        temperature = config.MODEL.TEMPERATURE
        if temperature == 1 and not self.flip:
            return model

        def calibrated(images: paddle.Tensor) -> paddle.Tensor:
            views = [images, images.flip(3)] if self.flip else [images]
            logits = [model(view).astype("float32") / temperature for view in views]
            if not self.flip:
                return logits[0]
            with paddle.amp.auto_cast(enable=False):
                # Paddle's log_softmax ends at -64 on CPU, below which classes would be equal.
                logs = [z - paddle.logsumexp(z, axis=1, keepdim=True) for z in logits]
                return paddle.logsumexp(paddle.stack(logs), axis=0) - math.log(2)

        return calibrated

    def metric_sums(self, config, loader: Loader) -> OutcomeSums:
        """Return empty sums over the batches of an evaluation's loader: `add(outputs, labels)`, and
        `total()`, which has a `score`, a `record(prefix)`, a text, and what a report needs of each
        image."""
        return OutcomeSums(config.MODEL.NUM_CLASSES, loader, config.TRAIN.BEST_BY)


CLASSIFICATION = ClassificationTask()
