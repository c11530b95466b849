"""Evaluation: the same figures for any processes and batch size, and those of training."""

import re

import pytest
from harness import finish, finish_ranks, metrics


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
