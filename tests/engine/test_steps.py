"""Optimizer steps per epoch, as the official code counts them: whole groups only."""

import pytest
from processes import finish
from tiny import ROOT, make_data

from replknet_paddle.checkpoints.training import load_checkpoint
from replknet_paddle.config import get_config
from replknet_paddle.data.samplers import TrainBatches

IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122  # training images

# File: global batch and images (the official repository's README), and their quotient.
STEPS = {
    "replknet_31b": (2048, IMAGENET_1K, 625),
    "replknet_31b_384": (1024, IMAGENET_1K, 1251),
    "replknet_31b_22k": (4096, IMAGENET_22K, 3466),
    "replknet_31b_22k1k_224": (512, IMAGENET_1K, 2502),
    "replknet_31b_22k1k_384": (512, IMAGENET_1K, 2502),
    "replknet_31l_22k": (4096, IMAGENET_22K, 3466),
    "replknet_31l_22k1k_384": (512, IMAGENET_1K, 2502),
}


@pytest.mark.parametrize("gpus", [8, 16])
@pytest.mark.parametrize("name", STEPS)
def test_steps_per_epoch_of_a_recipe_are_the_official_ones(name, gpus):
    global_batch, images, steps = STEPS[name]
    assert steps == images // global_batch
    config = get_config(ROOT / "configs" / f"{name}.yaml")
    batch_size = config.DATA.BATCH_SIZE * 8 // gpus
    accum_iter = config.TRAIN.ACCUM_ITER
    batches = TrainBatches(
        images, batch_size, rank=gpus - 1, world_size=gpus, seed=0, accum_iter=accum_iter
    )
    assert len(batches) == steps * accum_iter


def test_a_run_makes_whole_steps_and_says_what_they_leave_out(tiny_config_file, tmp_path):
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data", train=47, val=4)
    said = finish(
        [f"-cfg={tiny_config_file}", f"-data_path={tmp_path / 'data'}",
         f"-output={tmp_path / 'run'}", "-batch_size=5", "-accum_iter=3",
         "-opts", "TRAIN.NUM_EPOCHS", "2"],
        output=tmp_path / "log",
    )  # fmt: skip
    assert "3 steps per epoch, which leave 2 images out of each epoch" in said, said
    progress = load_checkpoint(str(tmp_path / "run" / "last")).progress
    assert (progress.step, progress.batches) == (6, 9)


def test_fewer_images_than_a_global_batch_are_bad_input(tiny_config_file, tmp_path):
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data", train=14, val=4)
    said = finish(
        [f"-cfg={tiny_config_file}", f"-data_path={tmp_path / 'data'}",
         f"-output={tmp_path / 'run'}", "-batch_size=5", "-accum_iter=3"],
        output=tmp_path / "log",
        status=2,
    )  # fmt: skip
    assert "14 images, fewer than one global batch" in said and "-accum_iter" in said, said
