"""Samples and the loaders over them: the same whatever the workers do, and without bad images."""

import gc
import logging
import os
import random
import signal

import numpy as np
import pytest
from data_sets import batches, data_with, one_image_set, picture, small, write_image
from tiny import make_data

from replknet_paddle.config import get_config
from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.runtime.errors import InputError, SampleError

pytestmark = pytest.mark.paddle_version

EITHER = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture
def loader_of(tiny_config_file):
    """The loader of a data folder, by the tiny configuration with keys changed."""

    def build(folder, is_train: bool, *, rank=0, world_size=1, **keys):
        config = get_config(tiny_config_file, DATA__DATA_PATH=str(folder), **keys)
        dataset = get_dataset(config, is_train)
        return get_dataloader(config, dataset, is_train, rank=rank, world_size=world_size)

    return build


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b) for pair in zip(first, second) for a, b in zip(*pair)
    )


def epoch(loader, number: int, first_batch: int = 0):
    loader.batch_sampler.set_epoch(number, first_batch)
    return batches(loader)


# ---- samples


def test_a_sample_depends_on_seed_epoch_and_index_alone(loader_of, tiny_data):
    data = loader_of(tiny_data, True).dataset
    forward = [data[2, i][0] for i in range(10)]
    again = loader_of(tiny_data, True).dataset
    np.random.seed(7)
    random.seed(7)
    backward = [again[2, i][0] for i in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    other = loader_of(tiny_data, True, SEED=43).dataset
    assert not any(np.array_equal(forward[i], data[3, i][0]) for i in range(10))
    assert not any(np.array_equal(forward[i], other[2, i][0]) for i in range(10))


def test_two_entries_of_one_image_are_drawn_apart(tmp_path):
    def noisy(image, rng):
        return small(image, rng) + rng.normal(size=(3, 4, 4)).astype("float32")

    data = one_image_set(tmp_path, b"fine.png", noisy)
    assert not np.array_equal(data[0, 0][0], data[0, 1][0])


def test_evaluation_samples_depend_on_the_image_alone(loader_of, tiny_data):
    first, second = loader_of(tiny_data, False).dataset, loader_of(tiny_data, False, SEED=1).dataset
    for i in (0, 50, 100):
        assert np.array_equal(first[0, i][0], second[5, i][0])


def test_get_dataset_takes_list_seed_and_classes_from_the_config(loader_of, tiny_data):
    train, val = (loader_of(tiny_data, is_train, SEED=9).dataset for is_train in (True, False))
    assert (len(train), len(val), train.seed) == (60, 101, 9)
    assert train.path(0).startswith("train/class 0/") and val.path(0).startswith("val/class 0/")
    assert val.labels.tolist() == [i % 4 for i in range(101)]
    with pytest.raises(InputError, match="label 3 is outside"):
        loader_of(tiny_data, True, MODEL__NUM_CLASSES=3)


# ---- batches


def test_persistent_workers_give_the_same_samples_and_follow_set_epoch(loader_of, tiny_data):
    """With all of the recipe's augmentation; whole epochs and one taken up in the middle."""
    expected, seen = [], []
    for workers, out in ((0, expected), (2, seen)):
        with loader_of(tiny_data, True, DATA__NUM_WORKERS=workers) as loader:
            for number, first_batch in ((1, 2), (2, 0), (0, 0), (2, 0)):
                out.append(epoch(loader, number, first_batch))
    assert [len(epoch) for epoch in expected] == [4, 6, 6, 6]
    assert all(same(*epochs) for epochs in zip(expected, seen))
    assert same(expected[1], expected[3]) and not same(expected[1], expected[2])
    images, labels = expected[0][0]
    assert images.shape == (8, 3, 32, 32) and images.dtype == np.float32
    assert labels.shape == (8,) and labels.dtype == np.int64


@EITHER
def test_the_validation_loader_gives_every_image_in_order(loader_of, tiny_data, workers):
    keys = {"DATA__NUM_WORKERS": workers, "DATA__BATCH_SIZE_EVAL": 16}
    with loader_of(tiny_data, False, **keys) as loader:
        data = loader.dataset
        assert len(loader) == 7
        for _ in range(3):  # persistent workers serve again
            seen = batches(loader)
            assert [len(labels) for _, labels in seen] == [16] * 6 + [5]
            assert np.concatenate([labels for _, labels in seen]).tolist() == data.labels.tolist()
        assert np.array_equal(seen[1][0][3], data[0, 19][0])


def test_the_validation_batch_is_that_of_training_unless_set(loader_of, tiny_data):
    for keys, expected in (({}, 8), ({"BATCH_SIZE_EVAL": 5}, 5), ({"BATCH_SIZE": 9}, 9)):
        loader = loader_of(tiny_data, False, **{f"DATA__{key}": n for key, n in keys.items()})
        assert loader.batch_sampler.batch_size == expected


@pytest.mark.parametrize("is_train, images", [(True, 48), (False, 101)])
def test_loaders_of_ranks_share_the_images(loader_of, tiny_data, is_train, images):
    loaders = [loader_of(tiny_data, is_train, rank=rank, world_size=3) for rank in range(3)]
    names = [name for loader in loaders for batch in loader.batch_sampler for name in batch]
    assert len(set(names)) == len(names) == images


@pytest.mark.parametrize("world_size, batch_size", [(1, 31), (2, 16), (3, 11)])
def test_too_few_images_for_a_global_batch_are_an_error(
    loader_of, tiny_data, world_size, batch_size
):
    options = {"world_size": world_size, "DATA__BATCH_SIZE": batch_size}
    with pytest.raises(InputError) as caught:
        loader_of(tiny_data, True, **options)
    for part in ("train_list.txt", "60 images", f"{batch_size}", f"{world_size} ", "-batch_size"):
        assert part in str(caught.value)
    loader_of(tiny_data, False, **options)


def test_as_many_images_as_a_batch_are_enough(loader_of, tmp_path):
    make_data(tmp_path, train=16, val=1)
    loader = loader_of(tmp_path, True, world_size=2, DATA__BATCH_SIZE=4)
    assert len(loader) == 2 and len(batches(loader)) == 2
    val = loader_of(tmp_path, False, rank=1, world_size=2)
    assert len(val) == 0 and batches(val) == []  # a rank without images


# ---- workers


def test_workers_start_when_told_and_an_iteration_may_be_left_and_begun_anew(loader_of, tiny_data):
    with loader_of(tiny_data, True, DATA__NUM_WORKERS=2) as loader:
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


def test_a_killed_worker_is_reported(loader_of, tiny_data):
    with loader_of(tiny_data, True, DATA__NUM_WORKERS=2) as loader:
        whole = batches(loader)
        os.kill(loader.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker of .*train_list.txt was killed"):
            for _ in range(1000):  # the other one may do it all before it is noticed
                batches(loader)
        assert same(batches(loader), whole)  # by new workers


@EITHER
def test_a_defect_in_a_transform_ends_the_loader_with_its_traceback(loader_of, tmp_path, workers):
    data_with(tmp_path, {})
    with loader_of(tmp_path, True, DATA__NUM_WORKERS=workers) as loader:
        loader.dataset.transform.photometric = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            batches(loader)


# ---- bad images


@EITHER
@pytest.mark.parametrize("line", [b"missing image.jpg", b"half.jpg", b"caf\xe9.jpg"])
def test_evaluation_ends_at_an_unreadable_image_with_the_samples_own_error(
    loader_of, tmp_path, line, workers
):
    """However many of them training may replace."""
    (tmp_path / "half.jpg").write_bytes(picture(0)[:400])
    write_image(tmp_path / "fine.png")
    (tmp_path / "val_list.txt").write_bytes(b"fine.png 0\n" * 9 + line + b" 1\n")
    keys = {"NUM_WORKERS": workers, "MAX_BAD_IMAGES": 9, "WORKER_TIMEOUT": 15, "BATCH_SIZE_EVAL": 2}
    keys = {f"DATA__{key}": value for key, value in keys.items()}
    with loader_of(tmp_path, False, **keys) as loader:
        with pytest.raises(SampleError) as direct:
            loader.dataset[0, 9]
        with pytest.raises(SampleError) as caught:
            batches(loader)
    [message] = str(caught.value).splitlines()
    assert message == str(direct.value) and "val_list.txt, line 10: " in message


@EITHER
def test_unreadable_training_images_are_replaced_and_named_once(
    loader_of, tmp_path, caplog, workers
):
    data_with(tmp_path, {5: b"text", 6: picture(6)[:300]})  # 5's successor is unreadable as well
    keys = {"DATA__MAX_BAD_IMAGES": 2, "DATA__NUM_WORKERS": workers, "TRAIN__ACCUM_ITER": 1}
    with loader_of(tmp_path, True, **keys) as loader, caplog.at_level(logging.WARNING, "loader"):
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
def test_one_more_than_allowed_stops_training(loader_of, tmp_path, workers):
    data_with(tmp_path, dict.fromkeys((3, 11, 19), b""))
    with loader_of(tmp_path, True, DATA__MAX_BAD_IMAGES=2, DATA__NUM_WORKERS=workers) as loader:
        with pytest.raises(SampleError, match=r"unreadable image number 3; DATA\.MAX_BAD_IMAGES"):
            batches(loader)
        assert len(loader.bad_images) == 3


@pytest.mark.parametrize("allowed", [0, 11, 12])
def test_unreadable_images_in_a_row_are_replaced_up_to_the_number_allowed(
    loader_of, tmp_path, allowed
):
    data_with(tmp_path, dict.fromkeys(range(4, 16), b""))  # twelve
    loader = loader_of(tmp_path, True, DATA__MAX_BAD_IMAGES=allowed, TRAIN__ACCUM_ITER=1)
    if allowed == 12:
        assert sum(len(labels) for _, labels in batches(loader)) == 24
        assert loader.bad_images == set(range(4, 16))
    else:
        with pytest.raises(SampleError, match=rf"DATA\.MAX_BAD_IMAGES allows {allowed}$"):
            batches(loader)


def test_a_list_without_a_readable_image_stops_training(loader_of, tmp_path):
    data_with(tmp_path, dict.fromkeys(range(24), b""))
    with pytest.raises(SampleError, match="Unreadable images in a row: 24; DATA.MAX_BAD_IMAGES"):
        batches(loader_of(tmp_path, True, DATA__MAX_BAD_IMAGES=100))


# ---- memory


def memory_bytes(pid: int) -> int:
    """Memory of a process; its share of pages that were forked, without files it has mapped."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        kilobytes = dict(line.split()[:2] for line in file if line.startswith("Pss_"))
    return 1024 * (int(kilobytes["Pss_Anon:"]) + int(kilobytes["Pss_Shmem:"]))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_memory_of_workers_and_parent_stays_flat(loader_of, tmp_path):
    """On small images: those of a few batches, which allocators keep or not, are then too few to
    matter; one of each batch, kept for good, is not."""
    for i in range(50):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i, size=(160, 120)))
    lines = "".join(f"{i % 50}.jpg {i % 4}\n" for i in range(2000))
    (tmp_path / "train_list.txt").write_text(lines)
    keys = {"DATA__IMAGE_SIZE": 48, "DATA__BATCH_SIZE": 10, "TRAIN__RAND_AUGMENT": True}
    used = []
    with loader_of(tmp_path, True, DATA__NUM_WORKERS=2, **keys) as loader:
        for number in range(6):
            loader.batch_sampler.set_epoch(number)
            assert sum(len(labels) for _, labels in loader) == 2000
            gc.collect()
            used.append([memory_bytes(pid) for pid in (os.getpid(), *loader.worker_pids())])
    used = np.array(used) / 1e6
    print("MB of parent and workers after each epoch:", used.round(1).tolist())
    # From the second epoch on: after the first, allocators have not yet all of their pools.
    assert (np.abs(used[2:] / used[1] - 1) < 0.02).all()
