"""The files of configs/, for each published row and each official recipe, and PaddleViT's."""

import re

import pytest
import yaml
from tiny import ROOT, leaves

from replknet_paddle.config import get_config
from replknet_paddle.data.dataset import TrainBatches
from replknet_paddle.optim.schedule import base_learning_rate

CONFIGS = ROOT / "configs"
ALL_CONFIGS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
K31, KXL = [31, 29, 27, 13], [27, 27, 27, 13]
WIDTH_B, WIDTH_L, WIDTH_XL = ([width * 2**i for i in range(4)] for width in (128, 192, 256))

# What each published row's figure was measured with. The short side that an image
# is resized to is in the table where it is cropped, for that is what gives the figure.
# file: size, resize mode, short side, (mean, std), classes, channels, kernels, small, dw ratio
PUBLISHED = {
    "replknet_31b": (224, "short_crop", 256, IMAGENET, 1000, WIDTH_B, K31, 5, 1.0),
    "replknet_31b_384": (384, "warp", None, IMAGENET, 1000, WIDTH_B, K31, 5, 1.0),
    "replknet_31b_22k1k_224": (224, "short_crop", 256, IMAGENET, 1000, WIDTH_B, K31, 5, 1.0),
    "replknet_31b_22k1k_384": (384, "warp", None, IMAGENET, 1000, WIDTH_B, K31, 5, 1.0),
    "replknet_31l_22k1k_384": (384, "warp", None, IMAGENET, 1000, WIDTH_L, K31, 5, 1.0),
    "replknet_xl": (320, "short_crop", 365, HALF, 1000, WIDTH_XL, KXL, None, 1.5),
    "replknet_31b_22k": (224, "short_crop", 256, IMAGENET, 21841, WIDTH_B, K31, 5, 1.0),
    "replknet_31l_22k_384": (384, "warp", None, IMAGENET, 21841, WIDTH_L, K31, 5, 1.0),
}

# The official recipes. file: global batch, epochs, warm-up, rate, min rate, weight decay,
# drop path, (mixup, cutmix), EMA, layer decay, image size, classes
RECIPES = {
    "replknet_31b": (2048, 300, 10, 4e-3, 1e-6, 0.05, 0.5, (0.8, 1.0), True, None, 224, 1000),
    "replknet_31b_384": (1024, 30, 1, 4e-4, 1e-6, 1e-8, 0.8, (0, 0), True, 0.7, 384, 1000),
    "replknet_31b_22k": (4096, 90, 5, 4e-3, 1e-6, 0.05, 0.1, (0.8, 1.0), False, None, 224, 21841),
    "replknet_31b_22k1k_224": (512, 30, 1, 4e-4, 1e-6, 1e-8, 0.2, (0, 0), True, 0.7, 224, 1000),
    "replknet_31b_22k1k_384": (512, 30, 1, 4e-4, 3e-4, 1e-8, 0.3, (0, 0), True, 0.7, 384, 1000),
    "replknet_31l_22k": (4096, 90, 5, 4e-3, 1e-6, 0.05, 0.1, (0.8, 1.0), False, None, 224, 21841),
    "replknet_31l_22k1k_384": (512, 30, 1, 4e-4, 3e-4, 1e-8, 0.3, (0, 0), True, 0.7, 384, 1000),
}

# For small datasets. File: what it starts from.
FINETUNE = {
    "replknet_31b_finetune": "replknet_31b_22k1k_224",
    "replknet_nano_finetune": "replknet_nano",
}

IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122  # training images

# Global batch: (ImageNet-1K's, or of the 22K recipes ImageNet-22K's) steps per epoch, of the
# official README.
STEPS = {2048: 625, 1024: 1251, 512: 2502, 4096: 3466}


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_every_file_of_configs_loads_and_is_named_for_its_model(name):
    config = get_config(CONFIGS / name)
    assert config.MODEL.NAME == name.removesuffix(".yaml")
    assert config.MODEL.PRETRAINED is None and config.MODEL.RESUME is None and config.SAVE is None
    assert isinstance(yaml.safe_load((CONFIGS / name).read_text()), dict)  # for other tools


def test_the_tables_here_cover_the_folder():
    named = {f"{name}.yaml" for name in [*(PUBLISHED | RECIPES), *FINETUNE, "replknet_nano"]}
    # Those of segmentation are in tests/segmentation/test_published_rows.py.
    assert named == {name for name in ALL_CONFIGS if name.startswith("replknet")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_row_carries_the_preprocessing_of_its_figure(name):
    config = get_config(CONFIGS / f"{name}.yaml")
    data, model = config.DATA, config.MODEL
    is_cropped = data.RESIZE_MODE == "short_crop"
    assert PUBLISHED[name] == (
        *(data.IMAGE_SIZE, data.RESIZE_MODE),
        int(data.IMAGE_SIZE / data.CROP_PCT) if is_cropped else None,
        (data.IMAGENET_MEAN, data.IMAGENET_STD),
        *(model.NUM_CLASSES, model.CHANNELS, model.LARGE_KERNEL_SIZES),
        *(model.SMALL_KERNEL, model.DW_RATIO),
    )
    assert data.CROP_PCT == 0.875 or not is_cropped
    assert (model.LAYERS, model.FFN_RATIO, model.OUT_INDICES) == ([2, 2, 18, 2], 4.0, None)
    assert not model.SMALL_KERNEL_MERGED and not model.NORM_INTER_FEATURES


# What all official recipes have in common: rand-m9-mstd0.5-inc1, and so on.
COMMON = {
    "OPTIMIZER.BETAS": [0.9, 0.999],
    "OPTIMIZER.EPS": 1e-8,
    "MODEL_EMA_DECAY": 0.9999,
    "GRAD_CLIP": None,
    "RAND_AUGMENT": True,
    "AUTO_AUGMENT": False,
    "RAND_AUGMENT_LAYERS": 2,
    "RAND_AUGMENT_MAGNITUDE": 9,
    "RAND_AUGMENT_MAGNITUDE_STD": 0.5,
    "RAND_AUGMENT_INCREASING": True,
    "SMOOTHING": 0.1,
    "RANDOM_ERASE_PROB": 0.25,
    "RANDOM_ERASE_MODE": "pixel",
    "RANDOM_ERASE_COUNT": 1,
    "RANDOM_ERASE_SPLIT": False,
    "CROP_SCALE": [0.08, 1.0],
    "CROP_RATIO": [3 / 4, 4 / 3],
    "HFLIP_PROB": 0.5,
    "MIXUP_PROB": 1.0,
    "MIXUP_SWITCH_PROB": 0.5,
    "CUTMIX_MINMAX": None,
    "LINEAR_SCALED_LR": None,  # the rate is absolute
    "WARMUP_START_LR": 0.0,
    "LAST_EPOCH": 0,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_official_values_at_its_global_batch(name):
    config = get_config(CONFIGS / f"{name}.yaml")
    train, model = config.TRAIN, config.MODEL
    assert RECIPES[name] == (
        8 * config.DATA.BATCH_SIZE * train.ACCUM_ITER,
        *(train.NUM_EPOCHS, train.WARMUP_EPOCHS, train.BASE_LR, train.END_LR, train.WEIGHT_DECAY),
        *(model.DROPPATH, (train.MIXUP_ALPHA, train.CUTMIX_ALPHA), train.MODEL_EMA),
        *(train.LAYER_DECAY, config.DATA.IMAGE_SIZE, model.NUM_CLASSES),
    )
    values = leaves(train)
    assert {key: values[key] for key in COMMON} == COMMON and model.SYNC_BN


@pytest.mark.parametrize("name", sorted(PUBLISHED | RECIPES))
def test_the_batch_in_a_files_head_is_the_one_that_it_sets(name):
    path = CONFIGS / f"{name}.yaml"
    config = get_config(path)
    head = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line[:1] == "#")
    stated = re.search(
        r"Global batch (\d+): 8 GPUs x BATCH_SIZE (\d+)(?: x ACCUM_ITER (\d+))?", head
    )
    if stated is None:
        assert name not in RECIPES and "evaluates" in head
        return
    batch, per_gpu, steps = (int(number or 1) for number in stated.groups())
    assert (per_gpu, steps) == (config.DATA.BATCH_SIZE, config.TRAIN.ACCUM_ITER)
    assert batch == 8 * per_gpu * steps


@pytest.mark.parametrize("name", FINETUNE)
def test_recipe_for_small_datasets_takes_its_numbers_from_its_base(name):
    config, base = (get_config(CONFIGS / f"{file}.yaml") for file in (name, FINETUNE[name]))
    assert config.MODEL.NUM_CLASSES is None and config.MODEL.DROP_HEAD
    assert not config.DATA.IMAGENET_NAMES and not config.MODEL.SYNC_BN
    architecture = ("CHANNELS", "LAYERS", "LARGE_KERNEL_SIZES", "SMALL_KERNEL", "DW_RATIO")
    assert all(config.MODEL[key] == base.MODEL[key] for key in architecture)
    batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUM_ITER
    base_batch = RECIPES.get(FINETUNE[name], [base.DATA.BATCH_SIZE])[0]
    rate = base.TRAIN.BASE_LR * (batch / base_batch) ** 0.5
    assert config.TRAIN.BASE_LR == pytest.approx(rate, rel=0.02)
    warmup = config.TRAIN.WARMUP_EPOCHS / config.TRAIN.NUM_EPOCHS
    assert 0.08 <= warmup <= 0.1


def test_averaged_weights_of_a_small_dataset_cover_the_same_part_of_the_run():
    """1,000 images here against ImageNet-1K in the base, whose share is 13 %."""
    shares = []
    for name, images, batch in zip(next(iter(FINETUNE.items())), (1000, IMAGENET_1K), (32, 512)):
        train = get_config(CONFIGS / f"{name}.yaml").TRAIN
        shares.append(1 / (1 - train.MODEL_EMA_DECAY) / (images // batch * train.NUM_EPOCHS))
    assert shares[0] == pytest.approx(shares[1], rel=0.25)


@pytest.mark.parametrize("gpus", [8, 16])
@pytest.mark.parametrize("name", RECIPES)
def test_steps_per_epoch_of_a_recipe_are_the_official_ones(name, gpus):
    images = IMAGENET_22K if name.endswith("22k") else IMAGENET_1K
    config = get_config(CONFIGS / f"{name}.yaml")
    accum_iter = config.TRAIN.ACCUM_ITER
    batches = TrainBatches(
        images,
        config.DATA.BATCH_SIZE * 8 // gpus,
        rank=gpus - 1,
        world_size=gpus,
        seed=0,
        accum_iter=accum_iter,
    )
    assert len(batches) == STEPS[RECIPES[name][0]] * accum_iter


# ---- PaddleViT's files

PADDLEVIT = """
BASE: ['']
DATA:
    IMAGE_SIZE: 384
    CROP_PCT: 1.0
MODEL:
    TYPE: RepLKNet
    NAME: replknet_xl
    SMALL_KERNEL: None
    OUT_INDICES: None
TRAIN:
    BASE_LR: 4e-3
    WEIGHT_DECAY: 1e-8
    LINEAR_SCALED_LR: 256
    OPTIMIZER:
        BETAS: (0.9, 0.999)
    CUTMIX_ALPHA: 0.0
SAVE: "./output"
"""


def test_paddlevit_file_loads_unchanged_and_means_what_it_meant(tmp_path):
    (tmp_path / "user.yaml").write_text(PADDLEVIT)
    config = get_config(tmp_path / "user.yaml")
    assert config.MODEL.OUT_INDICES is None and config.MODEL.SMALL_KERNEL is None
    assert config.TRAIN.BASE_LR == 0.004 and isinstance(config.TRAIN.BASE_LR, float)
    assert config.TRAIN.WEIGHT_DECAY == 1e-8 and isinstance(config.TRAIN.WEIGHT_DECAY, float)
    assert config.TRAIN.OPTIMIZER.BETAS == [0.9, 0.999]
    # a short side of 384 and a centre crop, which is how PaddleViT evaluates: no warp
    assert (config.DATA.RESIZE_MODE, config.DATA.CROP_PCT) == ("short_crop", 1.0)
    assert config.SAVE == "./output"
    # what the file leaves out is PaddleViT's default
    assert config.TRAIN.WARMUP_START_LR == 1e-6
    assert config.TRAIN.AUTO_AUGMENT and not config.TRAIN.RAND_AUGMENT
    assert (config.TRAIN.MIXUP_ALPHA, config.TRAIN.CUTMIX_ALPHA) == (0.8, 0.0)
    assert config.TRAIN.LAYER_DECAY is None and not config.MODEL.SYNC_BN
    assert (config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL) == (64, None)
    # and its rate scales with the global batch, as those of this project's files do not
    train, ours = config.TRAIN, get_config(CONFIGS / "replknet_31b.yaml").TRAIN
    assert base_learning_rate(train.BASE_LR, 2048, train.LINEAR_SCALED_LR) == pytest.approx(0.032)
    assert base_learning_rate(ours.BASE_LR, 2048, ours.LINEAR_SCALED_LR) == 0.004
