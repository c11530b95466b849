"""Samples and the loaders over them: the same whatever the workers do, and without bad images."""

import gc
import logging
import os
import random
import signal

import numpy as np
import pytest
from data_sets import batches, configured, data_with, one_image_set, picture, small, write_image
from tiny import make_data

from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.runtime.errors import InputError, SampleError

pytestmark = pytest.mark.paddle_version

EITHER = pytest.mark.parametrize("workers", [0, 2])


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b) for pair in zip(first, second) for a, b in zip(*pair)
    )


def epoch(loader, number: int, first_batch: int = 0):
    loader.batch_sampler.set_epoch(number, first_batch)
    return batches(loader)


def loader_of(config, is_train: bool, **places):
    return get_dataloader(config, get_dataset(config, is_train), is_train, **places)


# ---- samples


def test_a_sample_depends_on_seed_epoch_and_index_alone(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data)
    forward = [get_dataset(config, True)[2, i][0] for i in range(10)]
    data = get_dataset(config, True)
    np.random.seed(7)
    random.seed(7)
    backward = [data[2, i][0] for i in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    other = get_dataset(configured(tiny_config_file, tiny_data, "SEED", 43), True)
    assert not any(np.array_equal(forward[i], data[3, i][0]) for i in range(10))
    assert not any(np.array_equal(forward[i], other[2, i][0]) for i in range(10))


def test_two_entries_of_one_image_are_drawn_apart(tmp_path):
    def noisy(image, rng):
        return small(image, rng) + rng.normal(size=(3, 4, 4)).astype("float32")

    data = one_image_set(tmp_path, b"fine.png", noisy)
    assert not np.array_equal(data[0, 0][0], data[0, 1][0])


def test_evaluation_samples_depend_on_the_image_alone(tiny_config_file, tiny_data):
    first = get_dataset(configured(tiny_config_file, tiny_data), False)
    second = get_dataset(configured(tiny_config_file, tiny_data, "SEED", 1), False)
    for i in (0, 50, 100):
        assert np.array_equal(first[0, i][0], second[5, i][0])


def test_get_dataset_takes_list_seed_and_classes_from_the_config(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data, "SEED", 9)
    train, val = get_dataset(config, True), get_dataset(config, False)
    assert (len(train), len(val), train.seed) == (60, 101, 9)
    assert train.path(0).startswith("train/class 0/") and val.path(0).startswith("val/class 0/")
    assert val.labels.tolist() == [i % 4 for i in range(101)]
    with pytest.raises(InputError, match="label 3 is outside"):
        get_dataset(configured(tiny_config_file, tiny_data, "MODEL.NUM_CLASSES", 3), True)


# ---- batches


def test_persistent_workers_give_the_same_samples_and_follow_set_epoch(tiny_config_file, tiny_data):
    """With all of the recipe's augmentation; whole epochs and one taken up in the middle."""
    expected, seen = [], []
    for workers, out in ((0, expected), (2, seen)):
        config = configured(tiny_config_file, tiny_data, "DATA.NUM_WORKERS", workers)
        with loader_of(config, True) as loader:
            for number, first_batch in ((1, 2), (2, 0), (0, 0), (2, 0)):
                out.append(epoch(loader, number, first_batch))
    assert [len(epoch) for epoch in expected] == [4, 6, 6, 6]
    assert all(same(*epochs) for epochs in zip(expected, seen))
    assert same(expected[1], expected[3]) and not same(expected[1], expected[2])
    images, labels = expected[0][0]
    assert images.shape == (8, 3, 32, 32) and images.dtype == np.float32
    assert labels.shape == (8,) and labels.dtype == np.int64


@EITHER
def test_the_validation_loader_gives_every_image_in_order(tiny_config_file, tiny_data, workers):
    config = configured(
        tiny_config_file, tiny_data, "DATA.NUM_WORKERS", workers, batch_size_eval=16
    )
    data = get_dataset(config, False)
    with get_dataloader(config, data, False) as loader:
        assert len(loader) == 7
        for _ in range(3):  # persistent workers serve again
            seen = batches(loader)
            assert [len(labels) for _, labels in seen] == [16] * 6 + [5]
            assert np.concatenate([labels for _, labels in seen]).tolist() == data.labels.tolist()
        assert np.array_equal(seen[1][0][3], data[0, 19][0])


def test_the_validation_batch_is_that_of_training_unless_set(tiny_config_file, tiny_data):
    for values, expected in (({}, 8), ({"batch_size_eval": 5}, 5), ({"batch_size": 9}, 9)):
        loader = loader_of(configured(tiny_config_file, tiny_data, **values), False)
        assert loader.batch_sampler.batch_size == expected


def test_loaders_of_ranks_share_the_images(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data)
    for is_train in (True, False):
        names = []
        for rank in range(3):
            loader = loader_of(config, is_train, rank=rank, world_size=3)
            names += [name for batch in loader.batch_sampler for name in batch]
        assert len(set(names)) == len(names) == (48 if is_train else 101)


@pytest.mark.parametrize("world_size, batch_size", [(1, 31), (2, 16), (3, 11)])
def test_too_few_images_for_a_global_batch_are_an_error(
    tiny_config_file, tiny_data, world_size, batch_size
):
    config = configured(tiny_config_file, tiny_data, batch_size=batch_size)
    with pytest.raises(InputError) as caught:
        loader_of(config, True, world_size=world_size)
    for part in ("train_list.txt", "60 images", f"{batch_size}", f"{world_size} ", "-batch_size"):
        assert part in str(caught.value)
    loader_of(config, False, world_size=world_size)


def test_as_many_images_as_a_batch_are_enough(tmp_path, tiny_config_file):
    make_data(tmp_path, train=16, val=1)
    config = configured(tiny_config_file, tmp_path, batch_size=4)
    loader = loader_of(config, True, world_size=2)
    assert len(loader) == 2 and len(batches(loader)) == 2
    val = loader_of(config, False, rank=1, world_size=2)
    assert len(val) == 0 and batches(val) == []  # a rank without images


# ---- workers


def test_workers_start_when_told_and_an_iteration_may_be_left_and_begun_anew(
    tiny_config_file, tiny_data
):
    config = configured(tiny_config_file, tiny_data, "DATA.NUM_WORKERS", 2)
    with loader_of(config, True) as loader:
        assert loader.worker_pids() == []
        loader.start()
        pids = loader.worker_pids()
        assert len(pids) == 2 and os.getpid() not in pids
        whole = batches(loader)
        for number in range(2 * len(whole)):  # at every point, and more often than there are slots
            for _, left in zip(range(number % len(whole)), loader):
                assert len(left[1]) == 8
        assert same(batches(loader), whole) and loader.worker_pids() == pids
    assert loader.worker_pids() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_worker_is_reported(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data, "DATA.NUM_WORKERS", 2)
    with loader_of(config, True) as loader:
        whole = batches(loader)
        os.kill(loader.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker of .*train_list.txt was killed"):
            for _ in range(1000):  # the other one may do it all before it is noticed
                batches(loader)
        assert same(batches(loader), whole)  # by new workers


@EITHER
@pytest.mark.parametrize("line", [b"missing image.jpg", b"half.jpg", b"caf\xe9.jpg"])
def test_evaluation_ends_at_an_unreadable_image_with_the_samples_own_error(
    tmp_path, tiny_config_file, line, workers
):
    """However many of them training may replace."""
    (tmp_path / "half.jpg").write_bytes(picture(0)[:400])
    write_image(tmp_path / "fine.png")
    (tmp_path / "val_list.txt").write_bytes(b"fine.png 0\n" * 9 + line + b" 1\n")
    config = configured(
        tiny_config_file, tmp_path, "DATA.NUM_WORKERS", workers, "DATA.MAX_BAD_IMAGES", 9,
        "DATA.WORKER_TIMEOUT", 15, batch_size_eval=2,
    )  # fmt: skip
    with pytest.raises(SampleError) as direct:
        get_dataset(config, False)[0, 9]
    with loader_of(config, False) as loader, pytest.raises(SampleError) as caught:
        batches(loader)
    [message] = str(caught.value).splitlines()
    assert message == str(direct.value) and "val_list.txt, line 10: " in message


@EITHER
def test_a_defect_in_a_transform_ends_the_loader_with_its_traceback(
    tmp_path, tiny_config_file, workers
):
    data_with(tmp_path, {})
    config = configured(tiny_config_file, tmp_path, "DATA.NUM_WORKERS", workers)
    dataset = get_dataset(config, True)
    dataset.transform.photometric = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        batches(get_dataloader(config, dataset, True))


# ---- bad images


@EITHER
def test_unreadable_training_images_are_replaced_and_named_once(
    tmp_path, tiny_config_file, caplog, workers
):
    data_with(tmp_path, {5: b"text", 6: picture(6)[:300]})  # 5's successor is unreadable as well
    config = configured(
        tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 2, "DATA.NUM_WORKERS", workers,
        "TRAIN.ACCUM_ITER", 1,
    )  # fmt: skip
    with loader_of(config, True) as loader, caplog.at_level(logging.WARNING, logger="loader"):
        seen = [batch for number in range(2) for batch in epoch(loader, number)]
    assert [images.shape for images, _ in seen] == [(8, 3, 32, 32)] * 6
    labels = np.concatenate([labels for _, labels in seen[:3]])
    # 7, of label 3, stands for 5 and 6, of labels 1 and 2.
    assert np.bincount(labels).tolist() == [6, 5, 5, 8]
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert "train_list.txt, line 6: cannot read image 5.jpg: " in messages[0]
    assert "line 7: cannot read image 6.jpg: " in messages[1] and "truncated" in messages[1].lower()


@EITHER
def test_one_more_than_allowed_stops_training(tmp_path, tiny_config_file, workers):
    data_with(tmp_path, dict.fromkeys((3, 11, 19), b""))
    config = configured(
        tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 2, "DATA.NUM_WORKERS", workers
    )
    with loader_of(config, True) as loader:
        with pytest.raises(SampleError, match=r"unreadable image number 3; DATA\.MAX_BAD_IMAGES"):
            batches(loader)
        assert len(loader.bad_images) == 3


def test_a_list_without_a_readable_image_stops_training(tmp_path, tiny_config_file):
    data_with(tmp_path, dict.fromkeys(range(24), b""))
    config = configured(tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 100)
    with pytest.raises(SampleError, match="cannot read image"):
        batches(loader_of(config, True))


# ---- memory


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
    used = []
    with loader_of(config, True) as loader:
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
