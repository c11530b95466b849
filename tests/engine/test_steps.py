"""Optimizer steps per epoch: whole groups of batches only."""

import pytest
from processes import finish
from tiny import make_data

from replknet_paddle.checkpoints.run_folder import load_checkpoint

pytestmark = pytest.mark.paddle_version


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
