"""What only GPUs can show: mixed precision and statistics over several devices, in whole runs."""

import json

import numpy as np
import pytest

from replknet_paddle.checkpoints.run_folder import load_checkpoint
from replknet_paddle.runtime import processes

GPUS = processes.visible_devices()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a GPU")]


@pytest.fixture
def train(run_main, tiny_config_file, tiny_data, tmp_path):
    """Runs the tiny network; returns its run folder and what it said."""

    def run(name, *arguments):
        folder = tmp_path / name
        done = run_main(
            f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder}", *arguments
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, done.stdout

    return run


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([[r["train_loss"], r["val_loss"], r["val_ema_loss"]] for r in records])


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_trains_and_evaluates_like_float32(level, dtype, train):
    full, _ = train("full", "-nproc=1")
    half, _ = train("half", "-nproc=1", "-amp", "-opts", "AMP_LEVEL", level, "AMP_DTYPE", dtype)
    assert np.isfinite(losses(half)).all()
    np.testing.assert_allclose(losses(half), losses(full), atol=0.1)


def test_checkpoint_of_half_precision_weights_holds_their_masters(train):
    folder, _ = train("run", "-nproc=1", "-amp", "-opts", "AMP_LEVEL", "O2")
    checkpoint = load_checkpoint(str(folder / "last"))
    weight = checkpoint.model["stem.0.conv.weight"]
    assert weight.dtype == np.float32
    assert (weight != weight.astype("float16").astype("float32")).any()
    assert np.array_equal(weight, checkpoint.optimizer["stem.0.conv.weight.master"])


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_resumed_mixed_precision_goes_on_where_it_stopped(level, train):
    flags = ["-nproc=1", "-amp", "-opts", "AMP_LEVEL", level]
    straight, _ = train("straight", *flags)
    middle = sorted((straight / "checkpoints").glob("epoch_0002_*"))[0]
    resumed, _ = train("resumed", f"-resume={middle}", *flags)
    one, other = (load_checkpoint(str(folder / "last")) for folder in (straight, resumed))
    for name in one.model:  # some of cuDNN's kernels add up in an order that varies
        np.testing.assert_allclose(other.model[name], one.model[name], rtol=1e-2, atol=1e-3)
    assert other.scaler == one.scaler


def test_recompute_under_half_precision_weights(train):
    flags = ["-nproc=1", "-amp", "-opts", "AMP_LEVEL", "O2"]
    plain, _ = train("plain", *flags)
    recomputed, _ = train("recomputed", *flags, "MODEL.RECOMPUTE", "True")
    np.testing.assert_allclose(losses(recomputed), losses(plain), atol=0.05)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_synchronized_statistics_equal_those_of_one_device(train):
    flags = ["-opts", "MODEL.DROPPATH", "0", "TRAIN.MIXUP_PROB", "0", "MODEL.SYNC_BN", "True"]
    one, _ = train("one", "-nproc=1", "-batch_size=8", *flags)
    two, said = train("two", "-nproc=2", "-batch_size=4", *flags)
    assert "MODEL.SYNC_BN: " not in said
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-2)
