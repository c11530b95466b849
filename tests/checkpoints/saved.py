"""Checkpoints with something in every part, as files of a run folder."""

import os
from dataclasses import replace

import numpy as np

from replknet_paddle.checkpoints.run_folder import (
    Checkpoint,
    Progress,
    path_at,
    save_checkpoint,
)

PROGRESS = Progress(
    epoch=3,
    batch=14,
    batches=20,
    step=37,
    best_score=100 / 3,
    epoch_sums=(0.1 + 0.2, 128.0),
    record={"epoch": 3, "train_loss": 0.1 + 0.2},
)


def example(progress=PROGRESS, seed=0, size=3) -> Checkpoint:
    rng = np.random.default_rng(seed)

    def tensors(**shapes):
        return {
            name.replace("_", "."): rng.normal(size=shape).astype("float32")
            for name, shape in shapes.items()
        }

    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], "float32")
    return Checkpoint(
        config="SEED: 1\nMODEL:\n  NAME: tiny é\n",
        progress=progress,
        model={
            **tensors(stem_weight=(size, 3, 3, 3), stem_bias=(size,)),
            "odd": odd,
            "scalar": np.array(2.5, "float32"),
            "none": np.zeros((0, 4), "float32"),
            "turned": rng.normal(size=(4, 5)).astype("float32").T,
        },
        model_ema=tensors(stem_weight=(size, 3, 3, 3), stem_bias=(size,)),
        optimizer=tensors(stem_weight_moment1=(size, 3, 3, 3), stem_weight_beta1=(1,)),
        scaler={"scale": 32768.0, "incr_count": 3, "use_dynamic_loss_scaling": True},
    )


def save_at(run_folder, epoch, step, batch=0, **options) -> str:
    progress = replace(PROGRESS, epoch=epoch, step=step, batch=batch)
    path = path_at(str(run_folder), progress)
    os.makedirs(run_folder, exist_ok=True)
    save_checkpoint(path, example(progress, seed=step, **options))
    return path


def assert_same(got: Checkpoint, wanted: Checkpoint) -> None:
    assert got.config == wanted.config
    assert got.progress == wanted.progress
    assert got.scaler == wanted.scaler
    for part in ("model", "model_ema", "optimizer"):
        left, right = getattr(got, part), getattr(wanted, part)
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].shape == right[name].shape, name
            assert left[name].dtype == right[name].dtype, name
            assert left[name].tobytes() == right[name].tobytes(), name


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))
