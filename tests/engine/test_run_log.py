"""The run folder: what is written, when, and by whom."""

import json
import logging
import os

import pytest
from tiny import flags

from replknet_paddle.config import get_config, update_config
from replknet_paddle.engine.run_log import RunLog

CONFIG = update_config(get_config(), flags(output="elsewhere", resume="some/checkpoint"))


def opened(folder, *, config=CONFIG, is_main=True):
    log = RunLog(str(folder), is_main=is_main)
    log.open(config)
    return log


def test_saved_config_is_whole_and_says_nothing_of_this_start(tmp_path):
    opened(tmp_path / "run")
    saved = get_config(str(tmp_path / "run" / "config.yaml"))
    data = os.path.abspath(get_config().DATA.DATA_PATH)
    assert saved == get_config(DATA__DATA_PATH=data)  # neither SAVE nor MODEL.RESUME
    assert "RAND_AUGMENT_MAGNITUDE" in (tmp_path / "run" / "config.yaml").read_text()


def test_ranks_other_than_0_write_nothing_and_say_which_images_they_cannot_read(tmp_path, capsys):
    log = opened(tmp_path / "run", is_main=False)
    log.write_metrics({"epoch": 1})
    log.write_step(3)
    log.forget_metrics_after(0)
    logging.getLogger("quiet").info("not for the console")
    logging.getLogger("replknet_paddle.data.loader").warning("line 3: cannot read image a.jpg")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == "line 3: cannot read image a.jpg\n"


def test_metrics_of_epochs_that_are_trained_again_are_dropped(tmp_path):
    log = opened(tmp_path / "run")
    for epoch in (1, 2, 3):
        log.write_metrics({"epoch": epoch, "val_loss": 1.0})
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 4, "val_')  # cut short by a crash
    log.forget_metrics_after(2)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2]


def test_visualdl_gets_every_number_by_epoch(tmp_path):
    visualdl = pytest.importorskip("visualdl", reason="optional: requirements/plots.txt")
    config = update_config(CONFIG, flags(opts=["LOG.VISUALDL", "True"]))
    log = opened(tmp_path / "run", config=config)
    log.write_metrics({"epoch": 1, "val_loss": 0.5})
    log.write_metrics({"epoch": 2, "val_loss": 0.25, "val_roc_auc": float("nan")})
    log.visualdl.close()
    (record,) = (tmp_path / "run" / "visualdl").iterdir()
    points = visualdl.LogReader(file_path=str(record)).get_data("scalar", "val_loss")
    assert [(point.id, point.value) for point in points] == [(1, 0.5), (2, 0.25)]


def test_step_survives_and_is_overwritten_in_place(tmp_path):
    log = opened(tmp_path / "run")
    for step in (99999, 7):
        log.write_step(step)
    assert (tmp_path / "run" / "step").read_text().strip() == "7"
