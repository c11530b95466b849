"""What a run learns: the full recipe fits a small dataset, and `best` is what its figure says."""

import json

import pytest
from harness import finish, main_status, metrics
from tiny import command, make_patterns

from replknet_paddle.checkpoints.run_folder import load_checkpoint


@pytest.mark.slow
def test_the_full_recipe_overfits_64_images(tiny_config_file, tmp_path):
    """RandAugment, erasing, mixup, cutmix, smoothing, drop path, EMA and accumulation: all on."""
    make_patterns(tmp_path / "data")
    options = {
        "TRAIN.NUM_EPOCHS": 50,
        "TRAIN.WARMUP_EPOCHS": 2,
        "TRAIN.BASE_LR": 1e-2,
        "TRAIN.RAND_AUGMENT": True,
        "TRAIN.RAND_AUGMENT_MAGNITUDE": 1,
        "TRAIN.RAND_AUGMENT_LAYERS": 1,
        "TRAIN.MIXUP_PROB": 0.2,
        "TRAIN.CROP_SCALE": "[0.9,1.0]",
        "TRAIN.GRAD_CLIP": 5,
        "TRAIN.LAYER_DECAY": 0.9,
        "MODEL.DROPPATH": 0.05,
        "MODEL.CHANNELS": "[12,16,24,32]",
        "DATA.BATCH_SIZE": 16,
        "VALIDATE_FREQ": 50,
    }
    finish(
        [f"-cfg={tiny_config_file}", f"-data_path={tmp_path / 'data'}",
         f"-output={tmp_path / 'run'}", "-opts",
         *(item for pair in options.items() for item in pair)],
        output=tmp_path / "log",
    )  # fmt: skip
    last = metrics(tmp_path / "run")[-1]
    assert last["val_top1_percent"] == 100.0, last
    assert last["val_ema_top1_percent"] == 100.0, last


# ---- the weights that are best

EASY = {
    "TRAIN.MIXUP_ALPHA": 0,
    "TRAIN.CUTMIX_ALPHA": 0,
    "TRAIN.RANDOM_ERASE_PROB": 0,
    "TRAIN.AUTO_AUGMENT": False,
    "TRAIN.COLOR_JITTER": 0,
    "TRAIN.CROP_SCALE": "[0.9,1.0]",
    "TRAIN.MODEL_EMA_DECAY": 1 - 1e-7,
    "MODEL.DROPPATH": 0,
    "MODEL.CHANNELS": "[12,16,24,32]",
}


def options(**more) -> list:
    """`-opts` with EASY and more keys, two underscores standing for a dot."""
    keys = EASY | {name.replace("__", "."): value for name, value in more.items()}
    return ["-opts", *(item for pair in keys.items() for item in pair)]


@pytest.fixture(scope="module")
def two_runs(tiny_config_file, tmp_path_factory):
    """Run folders by the weights that are better at their end: 'model' and 'model_ema'.

    EMA weights stay what they were at the beginning. The first run trains from scratch. The second
    begins with the weights of the first, and spoils its own by a far too high learning rate.
    """
    folder = tmp_path_factory.mktemp("two_runs")
    make_patterns(folder / "data")
    flags = [f"-cfg={tiny_config_file}", f"-data_path={folder / 'data'}", "-accum_iter=1"]
    first, second = folder / "model", folder / "model_ema"
    finish(
        [
            *flags,
            f"-output={first}",
            *options(TRAIN__NUM_EPOCHS=6, TRAIN__BASE_LR=3e-2, VALIDATE_FREQ=3),
        ],
        output=folder / "log",
    )
    finish(
        [*flags, f"-output={second}", f"-pretrained={first / 'best'}",
         *options(TRAIN__NUM_EPOCHS=1, TRAIN__WARMUP_EPOCHS=0, TRAIN__BASE_LR=0.3)],
        output=folder / "log",
    )  # fmt: skip
    return {"model": first, "model_ema": second}


def best_top1(run_folder) -> float:
    """Percent, as training's metrics have it."""
    return max(
        record[f"{kind}_top1_percent"]
        for record in metrics(run_folder)
        if "val_top1_percent" in record  # every VALIDATE_FREQ epochs
        for kind in ("val", "val_ema")
    )


@pytest.mark.parametrize("better", ["model", "model_ema"])
def test_best_records_which_weights_won(two_runs, better):
    run_folder = two_runs[better]
    last = metrics(run_folder)[-1]
    won, lost = ("val_ema", "val") if better == "model_ema" else ("val", "val_ema")
    assert last[f"{won}_top1_percent"] >= last[f"{lost}_top1_percent"] + 10, last
    progress = load_checkpoint(str(run_folder / "best")).progress
    assert progress.better_weights == better
    assert progress.best_score == best_top1(run_folder)


TITLES = {"model": "weights", "model_ema": "EMA weights"}


@pytest.mark.parametrize("backend", [None, "auto", "dygraph"])
@pytest.mark.parametrize("better", ["model", "model_ema"])
def test_evaluation_of_best_gives_the_figure_of_training(two_runs, tmp_path, better, backend):
    run_folder = two_runs[better]
    data = run_folder.parent / "data"
    flags = [] if backend is None else [f"-backend={backend}"]
    said = finish(
        ["-eval", f"-pretrained={run_folder / 'best'}", f"-data_path={data}",
         f"-output={tmp_path / 'run'}", *flags],
        output=tmp_path / "log",
    )  # fmt: skip
    [record] = metrics(tmp_path / "run")
    assert record["val_top1_percent"] == best_top1(run_folder)
    assert f"tensors from the {TITLES[better]} of {run_folder / 'best'}" in said, said


def predicted_top1(model, data, tmp_path) -> tuple[float, str]:
    """Percent of the validation images that `replknet predict` classifies right, and its text."""
    out = tmp_path / "predictions.jsonl"
    said = finish(
        [model, data / "*.png", "--out", out], output=tmp_path / "log", target=command("predict")
    )
    labels = dict(line.rsplit(" ", 1) for line in (data / "val_list.txt").read_text().splitlines())
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(predictions) == len(labels) == 64
    right = [
        int(labels[prediction["path"].rpartition("/")[2]]) == prediction["pred_label"]
        for prediction in predictions
    ]
    return 100 * sum(right) / len(right), said


@pytest.mark.parametrize("better", ["model", "model_ema"])
def test_predictions_and_exports_of_best_have_its_accuracy(two_runs, tmp_path, better):
    best = two_runs[better] / "best"
    data = two_runs[better].parent / "data"
    got, said = predicted_top1(best, data, tmp_path)
    assert got == best_top1(two_runs[better])
    assert f"tensors from the {TITLES[better]} of {best}" in said, said
    for name in ("export", "merge"):
        target = tmp_path / ("exported" if name == "export" else "merged.safetensors")
        said = finish(["-pretrained", best, target], output=tmp_path / "log", target=command(name))
        assert f"tensors from the {TITLES[better]} of {best}" in said, said
    got, _ = predicted_top1(tmp_path / "exported", data, tmp_path)
    assert got == best_top1(two_runs[better])
    finish(
        ["-eval", f"-pretrained={tmp_path / 'merged.safetensors'}", f"-data_path={data}",
         f"-cfg={two_runs[better] / 'config.yaml'}", f"-output={tmp_path / 'run'}",
         "-opts", "MODEL.SMALL_KERNEL_MERGED", "True"],
        output=tmp_path / "log",
    )  # fmt: skip
    assert metrics(tmp_path / "run")[0]["val_top1_percent"] == best_top1(two_runs[better])


# ---- what only concerns the start


def test_a_run_that_began_with_ema_weights_and_another_head_can_be_opened(
    two_runs, tiny_config_file, tmp_path
):
    """Its folder says nothing of its start: without EMA weights of its own, in the same classes."""
    data = two_runs["model_ema"].parent / "data"
    flags = [f"-cfg={tiny_config_file}", f"-data_path={data}", "-accum_iter=1"]
    fine_tuned = tmp_path / "fine_tuned"
    said = finish(
        [*flags, f"-output={fine_tuned}", f"-pretrained={two_runs['model_ema'] / 'best'}",
         *options(TRAIN__NUM_EPOCHS=2, TRAIN__LAST_EPOCH=1, TRAIN__MODEL_EMA=False,
                  MODEL__PRETRAINED_WEIGHTS="model_ema", MODEL__DROP_HEAD=True,
                  MODEL__NUM_CLASSES=5)],
        output=tmp_path / "log",
    )  # fmt: skip
    assert "the network keeps its fresh one for 5 classes" in said, said
    finish(
        ["-eval", f"-pretrained={fine_tuned / 'best'}", f"-data_path={data}",
         f"-output={tmp_path / 'run'}"],
        output=tmp_path / "log",
    )  # fmt: skip
    assert metrics(tmp_path / "run")[0]["val_loss"] == metrics(fine_tuned)[-1]["val_loss"]
    saved = (fine_tuned / "config.yaml").read_text()
    assert "model_ema" not in saved and "DROP_HEAD: false" in saved and "LAST_EPOCH: 0" in saved
    got = finish([f"-resume={fine_tuned}"], output=tmp_path / "log", target=main_status)
    assert "all 2 epochs of TRAIN.NUM_EPOCHS are done" in got


def test_a_weights_file_of_other_classes_is_not_evaluated_with_a_fresh_head(
    two_runs, tiny_config_file, tmp_path
):
    data = two_runs["model"].parent / "data"
    said = finish(
        ["-eval", f"-cfg={tiny_config_file}", f"-pretrained={two_runs['model'] / 'best'}",
         f"-data_path={data}", f"-output={tmp_path / 'run'}",
         "-opts", "MODEL.DROP_HEAD", "True", "MODEL.NUM_CLASSES", "5"],
        output=tmp_path / "log", status=2,
    )  # fmt: skip
    assert "does not fit the network" in said and "head.{weight, bias}" in said


def test_a_folder_without_a_checkpoint_does_not_start_afresh_by_itself(
    two_runs, tiny_config_file, tmp_path
):
    """Its config.yaml does not say that the run began with pretrained weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((two_runs["model_ema"] / "config.yaml").read_text())
    said = finish(["-resume=auto", f"-output={folder}"], output=tmp_path / "log", status=2)
    assert f"{folder} has no checkpoint to resume; start the run again with -cfg" in said
