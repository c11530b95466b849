"""Runs on few or unbalanced images: class weights, balanced batches, frozen parts, patience."""

import re

import pytest
from harness import assert_same_end, finish, finish_ranks, metrics, progress_of
from tiny import relisted, same_bits

from replknet_paddle.checkpoints.load import load_state

EVEN = ["TRAIN.CLASS_WEIGHTS", "balanced", "TRAIN.SAMPLER", "balanced"]


@pytest.fixture
def uneven(tiny_data, tiny_config_file, tmp_path):
    """Flags of a run on 48 images of 4 classes: 15, 15, 15 and 3."""

    def few(lines):
        return lines[:12] + [line for line in lines[12:] if line[-2] != "3"]

    data = relisted(tiny_data, tmp_path / "data", few, "train_list.txt")
    return [f"-cfg={tiny_config_file}", f"-data_path={data}"]


def test_a_run_with_all_of_it_that_is_killed_in_mid_epoch_ends_with_the_same_bits(uneven, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = [*uneven, "-freeze=stem,stages.0", "-patience=1", "-epochs=9", "-opts", *EVEN]
    flags += ["SAVE_STEPS", "1"]
    said = finish([*flags, f"-output={straight}"])
    assert "class sizes: 15 (class 0), 15 (class 1), 15 (class 2), 3 (class 3)" in said
    assert "class weights: 0.8 (class 0), 0.8 (class 1), 0.8 (class 2), 4 (class 3)" in said
    assert "3 steps per epoch, each class equally often" in said
    assert "not trained: stem, stages.0" in said and "the frozen weights are random" in said
    end = progress_of(straight)
    assert end.epoch == end.best_epoch + 1 < 9
    last_line = f"finished: trained epochs 1 to {end.epoch} in .*; no better for 1 epoch"
    assert re.search(last_line, said)
    flags += ["-output", killed]
    finish(flags, status=-9, fault=("step 5", "SIGKILL"))
    assert (progress_of(killed).epoch, progress_of(killed).batch) == (1, 2)  # of 6 batches
    for said_at_start in ("continuing after epoch 1, step 4", "for 1 epoch; a higher -patience"):
        assert said_at_start in finish([*flags, "-resume=auto"])  # then nothing is left to train
        assert_same_end(killed, straight)


def test_frozen_tensors_keep_their_bits_on_three_ranks(straight, uneven, tmp_path):
    """Which stop together, and whose means round."""
    flags = [*uneven, "-freeze=stem,transitions.1,head.bias", "-batch_size=4", "-patience=1"]
    flags += [f"-pretrained={straight / 'last'}", f"-output={tmp_path / 'run'}", "-epochs=9"]
    flags += ["-opts", *EVEN, "TRAIN.LAYER_DECAY", "0.9", "MODEL.RECOMPUTE", "True"]
    said = finish_ranks([*flags, "MODEL.PRETRAINED_WEIGHTS", "model"], ranks=3)[0]
    assert "are random" not in said and re.search("finished: .*; no better for 1 epoch", said)
    before = load_state(straight / "last", weights="model")
    for kind in ("model", "model_ema"):
        after = load_state(tmp_path / "run" / "last", weights=kind)
        frozen = {n for n in before if re.match(r"stem\.|transitions\.1\.|head\.bias", n)}
        assert same_bits(before, after) == frozen


def test_patience_counts_epochs_and_ends_at_an_evaluation(run_flags, tmp_path):
    """Of epochs 2, 4 and so on, the first stays the best: only the head may change, at a rate that
    no weight can tell from 0."""
    folder = tmp_path / "run"
    flags = [*run_flags, f"-output={folder}", "-freeze=backbone", "-lr=1e-15", "-epochs=9", "-opts"]
    flags += ["TRAIN.WARMUP_START_LR", "0", "TRAIN.END_LR", "0", "VALIDATE_FREQ", "2"]
    finish([*flags, "TRAIN.PATIENCE", "3"], status=-9, fault=("metrics 5", "SIGKILL"))
    said = finish([*flags, "TRAIN.PATIENCE", "3", "-resume=auto"])
    assert "finished: trained epochs 5 to 6 in" in said and "no better for 4 epochs" in said
    assert "no better for 6 epochs" in finish([*flags, "TRAIN.PATIENCE", "5", "-resume=auto"])
    assert [record["epoch"] for record in metrics(folder)] == [1, 2, 3, 4, 5, 6, 7, 8]
