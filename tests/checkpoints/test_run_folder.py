"""Checkpoints in a run folder: its links, which checkpoints stay, and which are not its own."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from saved import PROGRESS, assert_same, example, names, save_at

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.run_folder import (
    checkpoints,
    load_checkpoint,
    point_to,
    prepare_run_folder,
    remove_superseded,
    run_config_file,
    run_folder_of,
    save_checkpoint,
)
from replknet_paddle.runtime.errors import InputError

# ---- links


@pytest.mark.parametrize("links", [True, False])
def test_last_and_best_stand_for_checkpoints(tmp_path, monkeypatch, links):
    first, second = save_at(tmp_path, 1, 5), save_at(tmp_path, 2, 10)
    if not links:

        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "symlink", refuse)
    for path in (first, second):
        point_to(str(tmp_path), "last", path)
        got = load_checkpoint(str(tmp_path / "last"))
        assert_same(got, load_checkpoint(path))
    assert names(tmp_path) == ["checkpoints", "last"]
    assert os.path.islink(tmp_path / "last") == links


def test_a_run_folder_that_moves_keeps_its_links(tmp_path):
    (tmp_path / "before").mkdir()
    path = save_at(tmp_path / "before", 1, 5)
    point_to(str(tmp_path / "before"), "last", path)
    os.rename(tmp_path / "before", tmp_path / "after")
    assert load_checkpoint(str(tmp_path / "after" / "last")).progress.step == 5


def test_what_a_killed_process_left_of_a_link_is_no_obstacle(tmp_path):
    path = save_at(tmp_path, 1, 5)
    os.symlink("nowhere", tmp_path / "last.unfinished")
    point_to(str(tmp_path), "last", path)
    assert load_checkpoint(str(tmp_path / "last")).progress.step == 5
    assert names(tmp_path) == ["checkpoints", "last"]


# ---- which ones stay


def steps_left(run_folder) -> list[int]:
    return [int(os.path.basename(path)[16:24]) for path in checkpoints(str(run_folder))]


def test_newest_and_every_kth_epoch_stay(tmp_path):
    for epoch in range(1, 8):
        save_at(tmp_path, epoch, 10 * epoch)
    remove_superseded(str(tmp_path), keep_every=3, keep_newest=2)
    assert steps_left(tmp_path) == [30, 60, 70]


def test_of_a_kth_epoch_its_end_stays_and_not_what_follows(tmp_path):
    for epoch, step in ((2, 20), (2, 25), (3, 30), (3, 33), (3, 36), (4, 40), (4, 44)):
        save_at(tmp_path, epoch, step, batch=step % 10)
    remove_superseded(str(tmp_path), keep_every=3, keep_newest=1)
    assert steps_left(tmp_path) == [30, 44]


def test_the_beginning_of_the_first_epoch_is_no_epoch(tmp_path):
    for epoch, step in ((0, 2), (0, 4), (0, 6)):
        save_at(tmp_path, epoch, step, batch=step)
    remove_superseded(str(tmp_path), keep_every=1, keep_newest=1)
    assert steps_left(tmp_path) == [6]


@pytest.mark.parametrize("links", [True, False])
def test_best_stays(tmp_path, monkeypatch, links):
    paths = [save_at(tmp_path, epoch, 10 * epoch) for epoch in range(1, 6)]
    if not links:
        monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(95, "no")))
    point_to(str(tmp_path), "best", paths[1])
    remove_superseded(str(tmp_path), keep_every=100, keep_newest=1)
    assert load_checkpoint(str(tmp_path / "best")).progress.step == 20
    assert steps_left(tmp_path) == ([20, 50] if links else [50])


def test_unfinished_files_go_and_whole_ones_stay(tmp_path):
    path = save_at(tmp_path, 1, 5)
    unfinished = f"{path}.4711.unfinished"
    Path(unfinished).write_bytes(b"half a checkpoint")
    remove_superseded(str(tmp_path), keep_every=100, keep_newest=1)
    assert names(tmp_path / "checkpoints") == [os.path.basename(path)]


# ---- where a checkpoint belongs


@pytest.mark.parametrize(
    "named", ["run", "run/last", "run/checkpoints/epoch_0001_step_00000005.safetensors", "link"]
)
def test_a_checkpoint_knows_its_run_folder(tmp_path, named):
    run = tmp_path / "run"
    path = save_at(run, 1, 5)
    (run / "config.yaml").write_text("SEED: 1\n")
    point_to(str(run), "last", path)
    os.symlink(path, tmp_path / "link")
    assert os.path.realpath(run_folder_of(str(tmp_path / named))) == os.path.realpath(run)
    assert os.path.realpath(run_config_file(str(tmp_path / named))) == str(run / "config.yaml")


@pytest.mark.parametrize("named", ["last", "./last", "checkpoints/../last", "."])
def test_a_checkpoint_named_from_inside_its_run_folder(tmp_path, monkeypatch, named):
    path = save_at(tmp_path, 1, 5)
    (tmp_path / "config.yaml").write_text("SEED: 1\n")
    point_to(str(tmp_path), "last", path)
    monkeypatch.chdir(tmp_path)
    folder = run_folder_of(named)
    assert folder, repr(folder)  # '' is no value of SAVE
    assert os.path.realpath(folder) == str(tmp_path)


def test_a_checkpoint_alone_has_no_run_folder(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_checkpoint(path, example())
    assert run_folder_of(path) is None
    with pytest.raises(InputError, match="-cfg"):
        run_config_file(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run_config_file(str(tmp_path / "nothing"))


# ---- which weights


@pytest.mark.parametrize("better", ["model", "model_ema"])
def test_auto_takes_the_weights_that_the_run_found_better(tmp_path, better):
    path = str(tmp_path / "a.safetensors")
    save_checkpoint(path, example(replace(PROGRESS, better_weights=better)))
    assert CheckpointFile(path).ema_or_raw("auto") == better
    for named in ("model", "model_ema"):
        assert CheckpointFile(path).ema_or_raw(named) == named
    with pytest.raises(InputError, match="weights is 'ema'; allowed: auto, model, model_ema"):
        CheckpointFile(path).ema_or_raw("ema")


# ---- going on


def test_later_checkpoints_are_set_aside_and_best_stays_known(tmp_path, caplog):
    paths = [save_at(tmp_path, epoch, 10 * epoch) for epoch in (1, 2, 3)]
    point_to(str(tmp_path), "best", paths[2])
    with caplog.at_level(logging.WARNING):
        prepare_run_folder(str(tmp_path), replace(PROGRESS, epoch=1, step=10))
    assert checkpoints(str(tmp_path)) == paths[:1]
    assert names(tmp_path / "superseded") == [os.path.basename(path) for path in paths[1:]]
    assert caplog.text.count("is later than the checkpoint resumed; moved to") == 2
    assert load_checkpoint(str(tmp_path / "best")).progress.step == 30


def test_best_is_linked_again_after_a_crash_before_its_link(tmp_path):
    old, new = (save_at(tmp_path, epoch, 10 * epoch) for epoch in (1, 2))
    point_to(str(tmp_path), "best", old)
    prepare_run_folder(
        str(tmp_path),
        replace(PROGRESS, epoch=2, step=20, best_checkpoint=os.path.basename(new)),
    )
    assert load_checkpoint(str(tmp_path / "best")).progress.step == 20
