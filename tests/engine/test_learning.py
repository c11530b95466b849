"""What a run learns: the full recipe fits a small dataset, and `best` is what its figure says."""

import json

import pytest
from harness import finish, metrics
from tiny import command, make_patterns

from replknet_paddle.checkpoints.run_folder import load_checkpoint


def options(**keys) -> list:
    """`-opts` with these keys, two underscores standing for a dot."""
    return ["-opts", *(x for key, value in keys.items() for x in (key.replace("__", "."), value))]


@pytest.mark.slow
def test_the_full_recipe_overfits_64_images(tiny_config_file, tmp_path):
    """RandAugment, erasing, mixup, cutmix, smoothing, drop path, EMA and accumulation: all on."""
    make_patterns(tmp_path / "data")
    recipe = options(
        TRAIN__NUM_EPOCHS=50,
        TRAIN__WARMUP_EPOCHS=2,
        TRAIN__BASE_LR=1e-2,
        TRAIN__RAND_AUGMENT=True,
        TRAIN__RAND_AUGMENT_MAGNITUDE=1,
        TRAIN__RAND_AUGMENT_LAYERS=1,
        TRAIN__MIXUP_PROB=0.2,
        TRAIN__CROP_SCALE="[0.9,1.0]",
        TRAIN__GRAD_CLIP=5,
        TRAIN__LAYER_DECAY=0.9,
        MODEL__DROPPATH=0.05,
        MODEL__CHANNELS="[12,16,24,32]",
        DATA__BATCH_SIZE=16,
        VALIDATE_FREQ=50,
    )
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tmp_path / 'data'}"]
    finish([*flags, f"-output={tmp_path / 'run'}", *recipe])
    last = metrics(tmp_path / "run")[-1]
    assert last["val_top1_percent"] == 100.0, last
    assert last["val_ema_top1_percent"] == 100.0, last


# ---- the weights that are best

EASY = dict(
    TRAIN__MIXUP_ALPHA=0,
    TRAIN__CUTMIX_ALPHA=0,
    TRAIN__RANDOM_ERASE_PROB=0,
    TRAIN__AUTO_AUGMENT=False,
    TRAIN__COLOR_JITTER=0,
    TRAIN__CROP_SCALE="[0.9,1.0]",
    TRAIN__MODEL_EMA_DECAY=1 - 1e-7,
    MODEL__DROPPATH=0,
    MODEL__CHANNELS="[12,16,24,32]",
)


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
    spoiled = [f"-output={second}", f"-pretrained={first / 'best'}"]
    spoiled += options(**EASY, TRAIN__NUM_EPOCHS=1, TRAIN__WARMUP_EPOCHS=0, TRAIN__BASE_LR=0.3)
    learned = options(**EASY, TRAIN__NUM_EPOCHS=6, TRAIN__BASE_LR=3e-2, VALIDATE_FREQ=3)
    for run in ([f"-output={first}", *learned], spoiled):
        finish([*flags, *run])
    return {"model": first, "model_ema": second}


def evaluation(weights, data, tmp_path, *flags) -> tuple[dict, str]:
    """The metrics of a weights file, and what its evaluation prints."""
    start = ["-eval", f"-pretrained={weights}", f"-data_path={data}", f"-output={tmp_path / 'run'}"]
    said = finish([*start, *flags])
    [record] = metrics(tmp_path / "run")
    return record, said


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


@pytest.mark.parametrize("backend", [None, "auto", "eager"])
@pytest.mark.parametrize("better", ["model", "model_ema"])
def test_evaluation_of_best_gives_the_figure_of_training(two_runs, tmp_path, better, backend):
    run_folder = two_runs[better]
    flags = [] if backend is None else [f"-backend={backend}"]
    record, said = evaluation(run_folder / "best", run_folder.parent / "data", tmp_path, *flags)
    assert record["val_top1_percent"] == best_top1(run_folder)
    assert f"tensors from the {TITLES[better]} of {run_folder / 'best'}" in said, said


def predicted_top1(model, data, tmp_path) -> tuple[float, str]:
    """Percent of the validation images that `replknet predict` classifies right, and its text."""
    out = tmp_path / "predictions.jsonl"
    said = finish([model, data / "*.png", "-output", out, "-overwrite"], target=command("predict"))
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
        said = finish(["-pretrained", best, target], target=command(name))
        assert f"tensors from the {TITLES[better]} of {best}" in said, said
    got, _ = predicted_top1(tmp_path / "exported", data, tmp_path)
    assert got == best_top1(two_runs[better])
    merged = [
        f"-cfg={two_runs[better] / 'config.yaml'}",
        "-opts",
        "MODEL.SMALL_KERNEL_MERGED",
        "True",
    ]
    record, _ = evaluation(tmp_path / "merged.safetensors", data, tmp_path, *merged)
    assert record["val_top1_percent"] == best_top1(two_runs[better])


# ---- what only concerns the start


def test_a_run_that_began_with_ema_weights_and_another_head_can_be_opened(
    two_runs, tiny_config_file, tmp_path
):
    """Its folder says nothing of its start: without EMA weights of its own, in the same classes."""
    data = two_runs["model_ema"].parent / "data"
    flags = [f"-cfg={tiny_config_file}", f"-data_path={data}", "-accum_iter=1"]
    fine_tuned = tmp_path / "fine_tuned"
    flags += [f"-output={fine_tuned}", f"-pretrained={two_runs['model_ema'] / 'best'}"]
    start = dict(MODEL__PRETRAINED_WEIGHTS="model_ema", MODEL__DROP_HEAD=True, MODEL__NUM_CLASSES=5)
    epochs = dict(TRAIN__NUM_EPOCHS=2, TRAIN__LAST_EPOCH=1, TRAIN__MODEL_EMA=False)
    said = finish([*flags, *options(**EASY, **epochs, **start)])
    assert "the network keeps its fresh one for 5 classes" in said, said
    record, _ = evaluation(fine_tuned / "best", data, tmp_path)
    assert record["val_loss"] == metrics(fine_tuned)[-1]["val_loss"]
    saved = (fine_tuned / "config.yaml").read_text()
    assert "model_ema" not in saved and "DROP_HEAD: false" in saved and "LAST_EPOCH: 0" in saved
    assert "all 2 epochs of TRAIN.NUM_EPOCHS are done" in finish([f"-resume={fine_tuned}"])


def test_a_weights_file_of_other_classes_is_not_evaluated_with_a_fresh_head(
    two_runs, tiny_config_file, tmp_path
):
    data = two_runs["model"].parent / "data"
    flags = ["-eval", f"-cfg={tiny_config_file}", f"-pretrained={two_runs['model'] / 'best'}"]
    flags += [f"-data_path={data}", f"-output={tmp_path / 'run'}"]
    said = finish([*flags, *options(MODEL__DROP_HEAD=True, MODEL__NUM_CLASSES=5)], status=2)
    assert "does not fit the network" in said and "head.{weight, bias}" in said


def test_a_folder_without_a_checkpoint_does_not_start_afresh_by_itself(
    two_runs, tiny_config_file, tmp_path
):
    """Its config.yaml does not say that the run began with pretrained weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((two_runs["model_ema"] / "config.yaml").read_text())
    said = finish(["-resume=auto", f"-output={folder}"], status=2)
    assert f"{folder} has no checkpoint to resume; start the run again with -cfg" in said
