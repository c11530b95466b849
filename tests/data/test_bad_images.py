"""Unreadable images in a loader, where batches are finished, and the memory all this takes."""

import gc
import logging
import os

import numpy as np
import pytest
from data_sets import configured, data_with, epoch, picture

from replknet_paddle.data import loader as loader_module
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.data.loader import available_memory_bytes, check_memory
from replknet_paddle.runtime.errors import InputError, SampleError


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_images_are_replaced_and_named_once(
    tmp_path, tiny_config_file, caplog, workers
):
    data_with(tmp_path, {5: b"text", 6: picture(6)[:300]})  # 5's successor is unreadable as well
    config = configured(
        tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 2, "DATA.NUM_WORKERS", workers,
        "TRAIN.ACCUM_ITER", 1,
    )  # fmt: skip
    loader = get_dataloader(config, get_dataset(config, True), True)
    with caplog.at_level(logging.WARNING, logger="loader"):
        batches = [batch for number in range(2) for batch in epoch(loader, number)]
    assert [images.shape for images, _ in batches] == [(8, 3, 32, 32)] * 6
    labels = np.concatenate([labels for _, labels in batches[:3]])
    # 7, of label 3, stands for 5 and 6, of labels 1 and 2.
    assert np.bincount(labels).tolist() == [6, 5, 5, 8]
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert "train_list.txt, line 6: cannot read image 5.jpg: " in messages[0]
    assert "line 7: cannot read image 6.jpg: " in messages[1] and "truncated" in messages[1].lower()


@pytest.mark.parametrize("workers", [0, 1])
def test_one_more_than_allowed_stops_training(tmp_path, tiny_config_file, workers):
    data_with(tmp_path, dict.fromkeys((3, 11, 19), b""))
    config = configured(
        tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 2, "DATA.NUM_WORKERS", workers
    )
    loader = get_dataloader(config, get_dataset(config, True), True)
    with pytest.raises(SampleError, match=r"unreadable image number 3; DATA\.MAX_BAD_IMAGES"):
        epoch(loader, 0)
    assert len(loader.bad_images) == 3


def test_a_list_without_a_readable_image_stops_training(tmp_path, tiny_config_file):
    data_with(tmp_path, dict.fromkeys(range(24), b""))
    config = configured(tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 100)
    loader = get_dataloader(config, get_dataset(config, True), True)
    with pytest.raises(SampleError, match="cannot read image"):
        epoch(loader, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_stops_at_the_first_unreadable_image(tmp_path, tiny_config_file, workers):
    data_with(tmp_path, {17: b"text"})
    config = configured(
        tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 9, "DATA.NUM_WORKERS", workers
    )
    loader = get_dataloader(config, get_dataset(config, False), False)
    with pytest.raises(SampleError, match=r"val_list\.txt, line 18: cannot read image 17\.jpg"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_a_transform_ends_the_loader_with_its_traceback(
    tmp_path, tiny_config_file, workers
):
    data_with(tmp_path, {})
    config = configured(tiny_config_file, tmp_path, "DATA.NUM_WORKERS", workers)
    dataset = get_dataset(config, True)
    dataset.transform.photometric = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        epoch(get_dataloader(config, dataset, True), 0)


def test_memory_that_the_batches_need_is_checked_before_training(monkeypatch):
    monkeypatch.setattr(loader_module, "available_memory_bytes", lambda: 10_000_000)
    check_memory(batch_bytes=1_000_000, workers=4, processes=1)  # 4 * 2 + 1 batches
    with pytest.raises(InputError, match=r"9\.0 GB .*DATA\.NUM_WORKERS or the batch size") as got:
        monkeypatch.setattr(loader_module, "available_memory_bytes", lambda: 9 * 10**9)
        check_memory(batch_bytes=10**9 + 1, workers=4, processes=1)
    assert isinstance(got.value, InputError)
    monkeypatch.setattr(loader_module, "available_memory_bytes", lambda: None)
    check_memory(batch_bytes=10**15, workers=4, processes=1)  # a machine that does not say


def test_both_loaders_of_a_training_run_count(tmp_path, tiny_config_file, monkeypatch):
    data_with(tmp_path, {})
    config = configured(tiny_config_file, tmp_path, "DATA.NUM_WORKERS", 1, batch_size_eval=16)
    needed = (8 + 16) * 3 * 32 * 32 * 3  # images, bytes of each, slots
    monkeypatch.setattr(loader_module, "available_memory_bytes", lambda: needed)
    get_dataloader(config, get_dataset(config, True), True)
    monkeypatch.setattr(loader_module, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match=r"DATA\.NUM_WORKERS"):
        get_dataloader(config, get_dataset(config, True), True)
    get_dataloader(config, get_dataset(config, False), False)


def test_files_that_were_read_do_not_count_as_used_memory(tmp_path):
    machine = available_memory_bytes(str(tmp_path))  # no such files
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 500\nactive_file 200\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory_bytes(str(tmp_path)) == 1000 - 900 + 700
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(available_memory_bytes(str(tmp_path)) - machine) < 0.5 * machine


def memory_bytes(pid: int) -> int:
    """Memory of a process; its share of pages that were forked, without files it has mapped."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        kilobytes = dict(line.split()[:2] for line in file if line.startswith("Pss_"))
    return 1024 * (int(kilobytes["Pss_Anon:"]) + int(kilobytes["Pss_Shmem:"]))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_memory_of_workers_and_parent_stays_flat(tmp_path, tiny_config_file):
    """On small images: those of a few batches, which allocators keep or not, are then too few to
    matter; one of each batch, kept for good, is not."""
    for i in range(50):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i, size=(160, 120)))
    lines = "".join(f"{i % 50}.jpg {i % 4}\n" for i in range(2000))
    (tmp_path / "train_list.txt").write_text(lines)
    config = configured(
        tiny_config_file, tmp_path, "DATA.IMAGE_SIZE", 48, "DATA.NUM_WORKERS", 2,
        "TRAIN.RAND_AUGMENT", True, batch_size=10,
    )  # fmt: skip
    loader = get_dataloader(config, get_dataset(config, True), True)
    used = []
    for number in range(6):
        loader.batch_sampler.set_epoch(number)
        assert sum(len(labels) for _, labels in loader) == 2000
        gc.collect()
        workers = loader.worker_pids()
        used.append([memory_bytes(pid) for pid in (os.getpid(), *workers)])
    used = np.array(used) / 1e6
    print("MB of parent and workers after each epoch:", used.round(1).tolist())
    # From the second epoch on: after the first, allocators have not yet all of their pools.
    assert (np.abs(used[2:] / used[1] - 1) < 0.02).all()
