"""Evaluation: the same figures for any processes and batch size, and those of training."""

import os
import re

import pytest
from harness import finish, finish_ranks, metrics, progress_of
from tiny import relisted


def evaluation(run_folder, images) -> tuple:
    (record,) = metrics(run_folder)
    counts = [record[f"val_top{k}_percent"] * images / 100 for k in (1, 5)]
    return counts, record["val_loss"]


def test_evaluation_is_the_same_for_any_processes_and_batch_size(
    tiny_data, straight, validation_images, tmp_path
):
    weights = straight / "last"
    results = {}
    for batch_size in (1, 8, 128):
        flags = [f"-pretrained={weights}", f"-data_path={tiny_data}", "-eval"]
        folder = tmp_path / f"batch{batch_size}"
        finish([*flags, f"-batch_size={batch_size}", f"-output={folder}"])
        results[1, batch_size] = evaluation(folder, validation_images)
    for processes, batch_size in ((2, 8), (3, 7)):
        folder = tmp_path / f"nproc{processes}"
        said, *_ = finish_ranks(
            [*flags, f"-batch_size={batch_size}", f"-output={folder}"], ranks=processes
        )
        assert re.search(rf"top-1 .*/{validation_images}\)", said)  # every image once
        results[processes, batch_size] = evaluation(folder, validation_images)
    counts, loss = results[1, 8]
    (recorded,) = [record for record in metrics(straight) if record["epoch"] == 4]
    assert recorded["val_loss"] == pytest.approx(loss, rel=1e-6)
    for key, (got_counts, got_loss) in results.items():
        assert got_counts == counts, (key, results)
        assert got_loss == pytest.approx(loss, abs=1e-6, rel=1e-6), (key, results)


@pytest.mark.parametrize("weights", ["model", "model_ema"])
def test_evaluation_of_a_checkpoint_gives_what_training_recorded(
    tiny_data, straight, tmp_path, weights
):
    flags = [f"-pretrained={straight / 'last'}", f"-data_path={tiny_data}", "-eval"]
    finish([*flags, f"-output={tmp_path / 'run'}", "-opts", "MODEL.PRETRAINED_WEIGHTS", weights])
    prefix = "val" if weights == "model" else "val_ema"
    assert metrics(tmp_path / "run")[0]["val_loss"] == metrics(straight)[-1][f"{prefix}_loss"]


@pytest.fixture(scope="module")
def by_auc(tiny_data, tiny_config_file, tmp_path_factory):
    """The folder of a run whose best checkpoint is the one of the largest area, on the data with
    the brightest of its four classes against the rest, which are counted in the lists."""
    folder = tmp_path_factory.mktemp("by_auc")

    def brightest(lines):
        return [f"{line[:-2]}{int(line[-2] == '3')}\n" for line in lines]

    data = relisted(tiny_data, folder / "data", brightest)
    flags = [f"-cfg={tiny_config_file}", f"-data_path={data}", f"-output={folder / 'run'}"]
    finish([*flags, "-best_by=roc_auc", "-seed=3", "-opts", "MODEL.NUM_CLASSES", "None"])
    return folder / "run"


def test_best_is_the_checkpoint_of_the_figure_that_is_asked_for(by_auc):
    def best_by(figure: str) -> tuple:
        """The highest value, minus its epoch, whether the weights are raw: the first of equals."""
        kinds = [(r, prefix) for r in metrics(by_auc) for prefix in ("val", "val_ema")]
        return max((r[f"{prefix}_{figure}"], -r["epoch"], prefix == "val") for r, prefix in kinds)

    auc, epoch, is_raw = best_by("roc_auc")
    assert epoch != best_by("top1_percent")[1]  # so that the flag matters
    progress = progress_of(by_auc)
    assert progress.best_score == 100 * auc
    assert progress.best_checkpoint.startswith(f"epoch_{-epoch:04d}_")
    assert os.path.realpath(by_auc / "best").endswith(progress.best_checkpoint)
    weights = "weights" if is_raw else "EMA weights"
    log = (by_auc / "log.txt").read_text()
    assert f"best: epoch {-epoch}, {weights}, roc_auc {100 * auc:.2f} %, in {by_auc}/best" in log
    assert re.search(rf"epoch {-epoch}, {weights}: top-1 .*, roc_auc {100 * auc:.2f} %, loss", log)


def test_a_run_is_not_resumed_by_another_figure_or_with_other_frozen_parts(by_auc):
    times = {path: path.lstat().st_mtime_ns for path in by_auc.rglob("*") if path.name != "lock"}
    for flag, says in (
        ("-best_by=macro_f1", "TRAIN.BEST_BY is 'macro_f1', was 'roc_auc'"),
        ("-freeze=stem", "TRAIN.FREEZE is ['stem'], was None"),
    ):
        said = finish([f"-resume={by_auc}", flag, "-epochs=5"], status=2)
        assert f"{says}; allowed: what the run began with" in said and "-pretrained" in said
    assert all(path.lstat().st_mtime_ns == time for path, time in times.items())
    finish([f"-resume={by_auc}"])
