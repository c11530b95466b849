"""Resumed runs: from which checkpoint, with which settings, and what is refused.

tests/engine/test_faults.py has what ends a run, and resumes it with the same settings.
"""

import itertools
import os
import re

import pytest
import yaml
from harness import (
    assert_same_end,
    copy_run,
    failing,
    finish,
    main_status,
    metrics,
    progress_of,
    whole_steps,
)

from replknet_paddle.ops import depthwise, gpu_choice

KILLED_AT_STEP_4 = ("step 4", "SIGKILL")


@pytest.fixture
def first_epoch(run_flags, tmp_path):
    """The folder of a run of one epoch."""
    folder = tmp_path / "first"
    flags = [*run_flags, f"-output={folder}", "-opts", "TRAIN.NUM_EPOCHS", "1"]
    finish(flags)
    return folder


# ---- which checkpoint


def test_going_on_from_an_older_checkpoint_loses_neither_it_nor_what_follows(
    run_flags, straight, tmp_path
):
    """The way out of a run that diverged: an earlier checkpoint with another learning rate."""
    folder = copy_run(straight, tmp_path / "run")
    old = folder / "checkpoints" / "epoch_0002_step_00000006.safetensors"
    later = len([step for step in whole_steps(folder) if step > 6])
    finish([f"-resume={old}"], status=-9, fault=("training 0", "SIGKILL"))
    assert progress_of(folder).epoch == 2  # at once, before the first step
    assert len(os.listdir(folder / "superseded")) == later > 0
    assert os.path.exists(folder / "best")
    flags = [*run_flags, f"-resume={old}", "-opts", "TRAIN.BASE_LR", "1e-5", "SAVE_KEEP", "1"]
    finish(flags, status=143, fault=("step 7", "SIGTERM"))
    assert progress_of(folder).step == 8
    assert max(whole_steps(folder)) == 8  # not step 12 of the run before


def test_resuming_into_the_folder_of_another_run_is_refused(run_flags, straight, tmp_path):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    theirs = other / "checkpoints" / "epoch_0003_step_00000009.safetensors"
    theirs.write_bytes(b"theirs")
    flags = [*run_flags, f"-resume={straight}", f"-output={other}"]
    said = finish(flags, status=2)
    assert "holds the checkpoints of another run" in said
    assert theirs.read_bytes() == b"theirs" and os.listdir(other) == ["checkpoints"]


def test_a_finished_run_that_is_resumed_changes_nothing(run_flags, straight, tmp_path):
    folder = copy_run(straight, tmp_path / "run")
    said = finish([*run_flags, f"-output={folder}", "-resume=auto"])
    assert "all 4 epochs of TRAIN.NUM_EPOCHS are done" in said
    assert_same_end(folder, straight)


def as_on_gpu(arguments: list[str]) -> int:
    """A run that chooses large kernels as on a GPU, on which the first argument is the faster."""
    faster, *flags = arguments
    depthwise.is_on_cpu = lambda x: False
    times = itertools.cycle((2, 1) if faster == "products" else (1, 2))
    gpu_choice._seconds = lambda call: next(times)
    return main_status(flags)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_resumed_run_computes_by_what_was_chosen_at_its_start(
    run_flags, tmp_path, is_deterministic
):
    """Another time, another implementation is the faster, and it has other rounding."""
    straight, killed, other = (tmp_path / name for name in ("straight", "killed", "other"))
    flags = [*run_flags, "-opts", "DETERMINISTIC", str(is_deterministic)]
    finish(["products", *flags, f"-output={straight}"], target=as_on_gpu)
    flags = [*flags, f"-output={killed}"]
    finish(["products", *flags], target=as_on_gpu, status=-9, fault=KILLED_AT_STEP_4)
    finish(["paddle", *flags, "-resume=auto"], target=as_on_gpu)
    assert_same_end(killed, straight)
    finish(["paddle", *flags, f"-output={other}"], target=as_on_gpu)
    if is_deterministic:  # and nothing is timed
        assert_same_end(other, straight)
    else:
        with pytest.raises(AssertionError, match="differ"):
            assert_same_end(other, straight)


# ---- other settings than before


OTHER_SETTINGS = {
    "larger batch": ["-batch_size=16"],
    "smaller batch": ["-batch_size=5"],
    "more accumulation": ["-accum_iter=6"],
    "two processes": ["-nproc=2"],
}


@pytest.mark.parametrize(
    "settings", [*list(OTHER_SETTINGS)[:-1], pytest.param("two processes", marks=pytest.mark.slow)]
)
def test_a_resumed_run_may_have_other_steps_and_is_resumed_again(first_epoch, tmp_path, settings):
    """Killed in its first epoch, by which the checkpoint that it resumed is the newest one."""
    folder, straight = (copy_run(first_epoch, tmp_path / name) for name in ("run", "straight"))
    more = [*OTHER_SETTINGS[settings], "-opts", "TRAIN.NUM_EPOCHS", "3", "SAVE_KEEP", "9"]
    finish([f"-resume={straight}", *more])

    killed = {"status": -9, "fault": KILLED_AT_STEP_4}
    if settings == "two processes":
        killed = {"status": 137, "environment": failing(tmp_path, KILLED_AT_STEP_4)}
    finish([f"-resume={folder}", *more], **killed)
    assert progress_of(folder).step == 3
    said = finish([f"-resume={folder}", *more])
    assert "continuing after epoch 1, step 3" in said
    assert not (folder / "superseded").exists()
    progress_of(folder)
    assert_same_end(folder, straight)
    steps = [record["step"] for record in metrics(folder)]
    assert steps == sorted(steps) and steps[0] == 3


@pytest.mark.parametrize("flags", [["-batch_size=12"], ["-batch_size=4", "-accum_iter=6"]])
def test_a_checkpoint_in_mid_epoch_is_newer_than_the_one_resumed(first_epoch, tmp_path, flags):
    """An epoch of two steps, after one of three; in mid-epoch, the steps cannot change."""
    options = ["-opts", "TRAIN.NUM_EPOCHS", "2", "SAVE_STEPS", "1", "SAVE_KEEP", "1"]
    flags = [f"-resume={first_epoch}", *flags, *options]
    finish(flags, status=-9, fault=("step 5", "SIGKILL"))
    progress = progress_of(first_epoch)
    assert (progress.epoch, progress.step) == (1, 4)
    said = finish([f"-resume={first_epoch}", "-batch_size=5"], status=2)
    assert re.search(r"stopped after \d+ of \d+ batches of an epoch, which has 12 here", said), said


def test_the_learning_rate_follows_the_share_of_the_run_that_is_done(run_flags, tmp_path):
    """Half the steps per epoch: the second half of the run has the rates of its epochs."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    half = ["-opts", "TRAIN.NUM_EPOCHS", "2"]
    finish([*run_flags, f"-output={folder}", *half])
    more = ["-batch_size=4", "-opts", "TRAIN.NUM_EPOCHS", "4"]
    finish([f"-resume={folder}", *more])
    finish([*run_flags, "-batch_size=4", f"-output={straight}"])
    rates = [[r["learning_rate"] for r in metrics(f)][2:] for f in (folder, straight)]
    assert rates[0] == rates[1] and len(rates[0]) == 2


# ---- weights that are not finite

EXPLODING = ["-accum_iter=6", "-opts", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.BASE_LR"]


def test_weights_that_are_not_finite_are_not_saved(run_flags, first_epoch, tmp_path):
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}", *EXPLODING, "1e39"]
    said = finish(flags, status=1)
    assert "weights are no longer finite" in said and "TRAIN.BASE_LR" in said
    assert "finished" not in said and "Traceback" not in said
    assert progress_of(folder) is None
    # The checkpoint before stays as it is.
    before = (first_epoch / "last").read_bytes()
    flags = [f"-resume={first_epoch}", *EXPLODING, "1e39", "TRAIN.NUM_EPOCHS", "2"]
    assert "weights are no longer finite" in finish(flags, status=1)
    assert progress_of(first_epoch).epoch == 1
    assert (first_epoch / "last").read_bytes() == (first_epoch / "best").read_bytes() == before
    assert [record["epoch"] for record in metrics(first_epoch)] == [1]


def test_weights_whose_loss_is_not_finite_are_not_the_best(run_flags, tmp_path):
    """They are finite themselves, so they are saved."""
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}", *EXPLODING, "1e38"]
    said = finish([*flags, "TRAIN.NUM_EPOCHS", "1"], status=1)
    assert "the loss of the evaluation is not finite" in said and "finished" not in said
    assert progress_of(folder).epoch == 1 and not os.path.lexists(folder / "best")
    finish([*flags, "-resume=auto"], status=1)  # the loss in training
    assert metrics(folder)[0]["val_loss"] is None and not os.path.lexists(folder / "best")


# ---- run folders used from elsewhere


def in_folder(arguments: list[str]) -> int:
    """A run in the folder that is the first argument."""
    os.chdir(arguments[0])
    return main_status(arguments[1:])


def test_a_run_finds_its_data_from_any_folder(tiny_config_file, own_data, tmp_path):
    """And not a folder of the same name that lies there."""
    data, _ = own_data
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    flags = [f"-cfg={tiny_config_file}", "-data_path=data", "-output=run"]
    said = finish([tmp_path, *flags, "-opts", "TRAIN.NUM_EPOCHS", "1"], target=in_folder)
    assert yaml.safe_load((folder / "config.yaml").read_text())["DATA"]["DATA_PATH"] == str(data)
    assert f"eval {folder} -report=" in said  # next
    evaluate = [elsewhere, "-eval", "-pretrained=../run/best", "-output=eval"]
    said = finish(evaluate, target=in_folder)
    for text in (said, (elsewhere / "eval" / "log.txt").read_text()):
        assert f"evaluating the images of {data / 'val_list.txt'}" in text
    data.rename(tmp_path / "moved")
    said = finish(evaluate[:-1], status=2, target=in_folder)
    assert f"no data folder {data}" in said and "-data_path" in said
