"""Runs on few or unbalanced images: class weights, balanced batches, frozen parts, patience."""

import re
import shutil

import pytest
from harness import assert_same_end, copy_run, finish, finish_ranks, metrics, progress_of

from replknet_paddle.checkpoints.load import load_state

EVEN = ["TRAIN.CLASS_WEIGHTS", "balanced", "TRAIN.SAMPLER", "balanced"]
# What never learns, so that no checkpoint is better than the first: nothing but the head may
# change, at a rate that no weight can tell from 0.
STILL = ["TRAIN.FREEZE", "backbone", "TRAIN.BASE_LR", "1e-15", "TRAIN.WARMUP_START_LR", "0"]
STILL += ["TRAIN.END_LR", "0", "TRAIN.WEIGHT_DECAY", "0"]


@pytest.fixture
def uneven(tiny_data, tiny_config_file, tmp_path):
    """Flags of a run on 48 images of 4 classes: 15, 15, 15 and 3."""
    shutil.copytree(tiny_data, tmp_path / "data")
    path = tmp_path / "data" / "train_list.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12] + [line for line in lines[12:] if line[-2] != "3"]))
    (tmp_path / "data" / "class_names.txt").write_text("a\nb\nc\nrare\n")
    return [f"-cfg={tiny_config_file}", f"-data_path={tmp_path / 'data'}"]


def test_a_run_with_all_of_it_that_is_killed_in_mid_epoch_ends_with_the_same_bits(uneven, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = [*uneven, "-freeze=stem,stages.0", "-patience=1", "-epochs=9", "-opts", *EVEN]
    flags += ["SAVE_STEPS", "1", "SAVE_KEEP", "99"]
    said = finish([*flags, f"-output={straight}"])
    assert "class sizes: 15 (a), 15 (b), 15 (c), 3 (rare)" in said
    assert "class weights: 0.8 (a), 0.8 (b), 0.8 (c), 4 (rare)" in said
    assert "3 steps per epoch, each class equally often" in said
    assert "not trained: stem, stages.0" in said and "TRAIN.FREEZE keeps random weights" in said
    end = progress_of(straight)
    assert end.epoch < 9 and end.epoch == end.best_epoch + 1
    assert f"trained epochs 1 to {end.epoch} in" in said and "; no better for 1 epoch" in said

    flags += ["-output", killed]
    finish(flags, status=-9, fault=("step 5", "SIGKILL"))
    assert (progress_of(killed).epoch, progress_of(killed).batch) == (1, 2)  # of 6 batches
    said = finish([*flags, "-resume=auto"])
    assert "continuing after epoch 1, step 4" in said
    assert_same_end(killed, straight)
    said = finish([*flags, "-resume=auto"])  # and nothing is left to do
    assert "no better for 1 epoch; a higher -patience trains on" in said
    assert "finished: no epoch was left to train" in said
    assert_same_end(killed, straight)


def test_frozen_tensors_keep_their_bits_on_three_ranks(straight, uneven, tmp_path):
    """Which stop together, and whose means round."""
    flags = [*uneven, "-freeze=stem,transitions.1,head.bias", "-batch_size=4", "-patience=1"]
    flags += [f"-pretrained={straight / 'last'}", f"-output={tmp_path / 'run'}", "-epochs=9"]
    flags += ["-opts", *EVEN, "TRAIN.LAYER_DECAY", "0.9", "MODEL.RECOMPUTE", "True"]
    flags += ["MODEL.PRETRAINED_WEIGHTS", "model"]
    said = finish_ranks(flags, ranks=3)[0]
    assert "random weights" not in said and re.search("finished: .*; no better for 1 epoch", said)
    before = load_state(straight / "last", weights="model")
    for kind in ("model", "model_ema"):
        after = load_state(tmp_path / "run" / "last", weights=kind)
        same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
        assert same == {n for n in before if re.match(r"stem\.|transitions\.1\.|head\.bias", n)}


def test_patience_counts_epochs_and_ends_at_an_evaluation(run_flags, tmp_path):
    """Of epochs 2, 4 and so on, the first stays the best."""
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}", "-opts", *STILL, "VALIDATE_FREQ", "2"]
    flags += ["TRAIN.NUM_EPOCHS", "9", "TRAIN.PATIENCE"]
    finish([*flags, "3"], status=-9, fault=("metrics 5", "SIGKILL"))
    said = finish([*flags, "3", "-resume=auto"])
    assert "finished: trained epochs 5 to 6 in" in said and "no better for 4 epochs" in said
    assert progress_of(folder).best_epoch == 2
    said = finish([*flags, "5", "-resume=auto"])
    assert [record["epoch"] for record in metrics(folder)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "no better for 6 epochs" in said


def test_a_run_is_resumed_with_what_it_froze(run_flags, straight, tmp_path):
    folder = copy_run(straight, tmp_path / "run")
    said = finish([*run_flags, f"-resume={folder}", "-freeze=stem", "-epochs=5"], status=2)
    assert "TRAIN.FREEZE is ['stem'], was None" in said and "-pretrained" in said
    assert_same_end(folder, straight)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["-freeze=stems"], "TRAIN.FREEZE has 'stems'.*did you mean stem?"),
        (["-freeze=,"], "TRAIN.FREEZE is ','; allowed: names with commas between"),
        (["-patience=0"], "TRAIN.PATIENCE is '0'; allowed: an integer >= 1"),
        (["-opts", "TRAIN.CLASS_WEIGHTS", "[1, 2]"], "TRAIN.CLASS_WEIGHTS has 2 numbers"),
        (
            ["-opts", "TRAIN.CLASS_WEIGHTS", "even"],
            "allowed: 'balanced', or a list of values, each",
        ),
        (["-opts", "TRAIN.SAMPLER", "even"], "allowed: 'shuffle' or 'balanced'"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(run_flags, tmp_path, flags, says):
    said = finish([*run_flags, f"-output={tmp_path / 'run'}", *flags], status=2)
    assert re.search(f"error: .*{says}", said) and "Traceback" not in said
    assert not (tmp_path / "run").exists()
