"""Preprocessing: from a Pillow image to what the network sees, and mixing of batches.

`build_*` are the only functions here that see the config; everything else takes explicit
arguments.
"""

from replknet_paddle.data.transforms.augment import (
    RAND_AUGMENT,
    RAND_AUGMENT_INCREASING,
    AutoAugment,
    RandAugment,
    fill_color,
)
from replknet_paddle.data.transforms.finish import RandomErasing
from replknet_paddle.data.transforms.mixup import Mixup
from replknet_paddle.data.transforms.pipelines import ColorJitter, EvalTransform, TrainTransform
from replknet_paddle.runtime.errors import InputError


def build_eval_transform(config) -> EvalTransform:
    """Return the evaluation pipeline that the config's weights expect."""
    return EvalTransform(
        image_size=config.DATA.IMAGE_SIZE,
        crop_pct=config.DATA.CROP_PCT,
        mode=config.DATA.RESIZE_MODE,
        mean=config.DATA.IMAGENET_MEAN,
        std=config.DATA.IMAGENET_STD,
    )


def build_train_transform(config) -> TrainTransform:
    """Return the training pipeline of one sample.

    One photometric policy at most: RandAugment wins over AutoAugment, and colour jitter is
    for when neither is on (PaddleViT's rule).
    """
    train = config.TRAIN
    # It spares the part of a batch that holds clean copies of augmented samples (AugMix).
    if train.RANDOM_ERASE_SPLIT:
        raise InputError(
            f"TRAIN.RANDOM_ERASE_SPLIT {train.RANDOM_ERASE_SPLIT}: must be False; it "
            "spares the clean copies of an augmentation that makes some, and none "
            "here does"
        )
    fill = fill_color(config.DATA.IMAGENET_MEAN)
    photometric = None
    if train.RAND_AUGMENT:
        photometric = RandAugment(
            layers=train.RAND_AUGMENT_LAYERS,
            magnitude=train.RAND_AUGMENT_MAGNITUDE,
            magnitude_std=train.RAND_AUGMENT_MAGNITUDE_STD,
            names=RAND_AUGMENT_INCREASING if train.RAND_AUGMENT_INCREASING else RAND_AUGMENT,
            fill=fill,
        )
    elif train.AUTO_AUGMENT:
        photometric = AutoAugment(fill=fill)
    elif train.COLOR_JITTER:
        photometric = ColorJitter(strength=train.COLOR_JITTER)
    erasing = None
    if train.RANDOM_ERASE_PROB > 0:
        erasing = RandomErasing(
            prob=train.RANDOM_ERASE_PROB,
            mode=train.RANDOM_ERASE_MODE,
            max_count=train.RANDOM_ERASE_COUNT,
        )
    return TrainTransform(
        image_size=config.DATA.IMAGE_SIZE,
        crop_scale=train.CROP_SCALE,
        crop_ratio=train.CROP_RATIO,
        hflip_prob=train.HFLIP_PROB,
        vflip_prob=train.VFLIP_PROB,
        quarter_turns=train.QUARTER_TURNS,
        photometric=photometric,
        erasing=erasing,
        mean=config.DATA.IMAGENET_MEAN,
        std=config.DATA.IMAGENET_STD,
        reduced_decode=config.DATA.REDUCED_DECODE,
    )


def build_mixup(config) -> Mixup | None:
    """Return the mixup and CutMix of training batches; None where the config switches both off."""
    train = config.TRAIN
    mixes = train.MIXUP_ALPHA > 0 or train.CUTMIX_ALPHA > 0 or train.CUTMIX_MINMAX is not None
    if not mixes or train.MIXUP_PROB == 0:
        return None
    return Mixup(
        mixup_alpha=train.MIXUP_ALPHA,
        cutmix_alpha=train.CUTMIX_ALPHA,
        cutmix_minmax=train.CUTMIX_MINMAX,
        prob=train.MIXUP_PROB,
        switch_prob=train.MIXUP_SWITCH_PROB,
        label_smoothing=train.SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )
