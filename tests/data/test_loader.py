"""Samples and the loaders over them: the same whatever the workers do."""

import multiprocessing
import os
import random
import signal
from queue import Empty

import numpy as np
import pytest
from data_sets import broken, configured, one_image_set, small, write_image
from tiny import make_data

from replknet_paddle.data.dataset import get_dataloader, get_dataset
from replknet_paddle.runtime.errors import InputError, SampleError

pytestmark = pytest.mark.paddle_version


def noisy(image, rng):
    return small(image, rng) + rng.normal(size=(3, 4, 4)).astype("float32")


def batches(loader):
    return [(images.numpy(), labels.numpy()) for images, labels in loader]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b) for pair in zip(first, second) for a, b in zip(*pair)
    )


def iterate(config, queue):
    """Put what a validation loader gives into `queue`: the number of batches, or its exception."""
    try:
        queue.put(len(batches(get_dataloader(config, get_dataset(config, False), False))))
    except BaseException as error:
        queue.put((type(error).__name__, isinstance(error, InputError), str(error)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("line", [b"missing image.jpg", b"half.jpg", b"caf\xe9.jpg"])
def test_a_loader_raises_the_samples_own_error(tmp_path, tiny_config_file, line, workers):
    """In a process of its own, for a loader that never answers must not stop the tests."""
    broken(tmp_path)
    write_image(tmp_path / "fine.png")
    (tmp_path / "val_list.txt").write_bytes(b"fine.png 0\n" * 9 + line + b" 1\n")
    opts = ["DATA.NUM_WORKERS", str(workers)]
    config = configured(tiny_config_file, tmp_path, batch_size_eval=2, opts=opts)
    with pytest.raises(SampleError) as direct:
        get_dataset(config, False)[0, 9]
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=iterate, args=(config, queue))
    process.start()
    try:
        got = queue.get(timeout=15)
    except Empty:
        pytest.fail("the loader hangs")
    finally:
        process.join(timeout=5)  # its workers end with it, but not where it is killed
        process.kill()
        process.join()
    assert got == ("SampleError", True, str(direct.value))
    assert len(got[2].splitlines()) == 1 and "val_list.txt, line 10: " in got[2]


def test_samples_are_the_same_whatever_the_workers(tiny_config_file, tiny_data):
    """With all of the recipe's augmentation."""
    seen = []
    for workers in (0, 2):
        config = configured(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", str(workers)])
        loader = get_dataloader(config, get_dataset(config, True), True)
        epochs = []
        for epoch in (0, 3):
            loader.batch_sampler.set_epoch(epoch)
            epochs += batches(loader)
        seen.append(epochs)
    assert len(seen[0]) == 12 and same(*seen)
    images, labels = seen[0][0]
    assert images.shape == (8, 3, 32, 32) and images.dtype == np.float32
    assert labels.shape == (8,) and labels.dtype == np.int64


def test_a_sample_depends_on_seed_epoch_and_index_alone(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data)
    forward = [get_dataset(config, True)[2, i][0] for i in range(10)]
    data = get_dataset(config, True)
    np.random.seed(7)
    random.seed(7)
    backward = [data[2, i][0] for i in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    other = get_dataset(configured(tiny_config_file, tiny_data, opts=["SEED", "43"]), True)
    assert not any(np.array_equal(forward[i], data[3, i][0]) for i in range(10))
    assert not any(np.array_equal(forward[i], other[2, i][0]) for i in range(10))


def test_two_entries_of_one_image_are_drawn_apart(tmp_path):
    data = one_image_set(tmp_path, b"fine.png", noisy)
    assert not np.array_equal(data[0, 0][0], data[0, 1][0])


def test_evaluation_samples_depend_on_the_image_alone(tiny_config_file, tiny_data):
    first = get_dataset(configured(tiny_config_file, tiny_data), False)
    second = get_dataset(configured(tiny_config_file, tiny_data, opts=["SEED", "1"]), False)
    for i in (0, 50, 100):
        assert np.array_equal(first[0, i][0], second[5, i][0])


def test_get_dataset_takes_list_seed_and_classes_from_the_config(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data, opts=["SEED", "9"])
    train, val = get_dataset(config, True), get_dataset(config, False)
    assert (len(train), len(val), train.seed) == (60, 101, 9)
    assert train.path(0).startswith("train/class 0/") and val.path(0).startswith("val/class 0/")
    assert val.labels.tolist() == [i % 4 for i in range(101)]
    with pytest.raises(InputError, match="label 3 is outside"):
        get_dataset(configured(tiny_config_file, tiny_data, opts=["MODEL.NUM_CLASSES", "3"]), True)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_validation_loader_gives_every_image_in_order(tiny_config_file, tiny_data, workers):
    opts = ["DATA.NUM_WORKERS", str(workers)]
    config = configured(tiny_config_file, tiny_data, batch_size_eval=16, opts=opts)
    data = get_dataset(config, False)
    loader = get_dataloader(config, data, False)
    assert len(loader) == 7
    for _ in range(3):  # persistent workers serve again
        seen = batches(loader)
        assert [len(labels) for _, labels in seen] == [16] * 6 + [5]
        assert np.concatenate([labels for _, labels in seen]).tolist() == data.labels.tolist()
    assert np.array_equal(seen[1][0][3], data[0, 19][0])


def test_the_validation_batch_is_that_of_training_unless_set(tiny_config_file, tiny_data):
    for values, expected in (({}, 8), ({"batch_size_eval": 5}, 5), ({"batch_size": 9}, 9)):
        config = configured(tiny_config_file, tiny_data, **values)
        loader = get_dataloader(config, get_dataset(config, False), False)
        assert loader.batch_sampler.batch_size == expected


def test_loaders_of_ranks_share_the_images(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data)
    data = {is_train: get_dataset(config, is_train) for is_train in (True, False)}
    for is_train in (True, False):
        names = []
        for rank in range(3):
            loader = get_dataloader(config, data[is_train], is_train, rank=rank, world_size=3)
            names += [name for batch in loader.batch_sampler for name in batch]
        assert len(set(names)) == len(names) == (48 if is_train else 101)


def test_an_iteration_may_be_left_and_begun_anew(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", "2"])
    with get_dataloader(config, get_dataset(config, True), True) as loader:
        whole = batches(loader)
        for number in range(2 * len(whole)):  # at every point, and more often than there are slots
            for _, left in zip(range(number % len(whole)), loader):
                assert len(left[1]) == 8
        pids = loader.worker_pids()
        assert same(batches(loader), whole) and loader.worker_pids() == pids
    assert loader.worker_pids() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_worker_is_reported(tiny_config_file, tiny_data):
    config = configured(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", "2"])
    with get_dataloader(config, get_dataset(config, True), True) as loader:
        whole = batches(loader)
        os.kill(loader.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker of .*train_list.txt was killed"):
            for _ in range(1000):  # the other one may do it all before it is noticed
                batches(loader)
        assert same(batches(loader), whole)  # by new workers


def test_persistent_workers_follow_set_epoch(tiny_config_file, tiny_data):
    """Whole epochs and one taken up in the middle, in any order: always what is asked for."""
    expected, seen = [], []
    for workers, out in ((0, expected), (2, seen)):
        config = configured(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", str(workers)])
        loader = get_dataloader(config, get_dataset(config, True), True)
        for epoch, first_batch in ((1, 2), (2, 0), (0, 0), (2, 0)):
            loader.batch_sampler.set_epoch(epoch, first_batch)
            out.append(batches(loader))
    assert [len(epoch) for epoch in expected] == [4, 6, 6, 6]
    assert all(same(*epochs) for epochs in zip(expected, seen))
    assert same(expected[1], expected[3]) and not same(expected[1], expected[2])


@pytest.mark.parametrize("world_size, batch_size", [(1, 31), (2, 16), (3, 11)])
def test_too_few_images_for_a_global_batch_are_an_error(
    tiny_config_file, tiny_data, world_size, batch_size
):
    config = configured(tiny_config_file, tiny_data, batch_size=batch_size)
    data = get_dataset(config, True)
    with pytest.raises(InputError) as caught:
        get_dataloader(config, data, True, world_size=world_size)
    for part in ("train_list.txt", "60 images", f"{batch_size}", f"{world_size} ", "-batch_size"):
        assert part in str(caught.value)
    get_dataloader(config, get_dataset(config, False), False, world_size=world_size)


def test_as_many_images_as_a_batch_are_enough(tmp_path, tiny_config_file):
    make_data(tmp_path, train=16, val=1)
    config = configured(tiny_config_file, tmp_path, batch_size=4)
    loader = get_dataloader(config, get_dataset(config, True), True, world_size=2)
    assert len(loader) == 2 and len(batches(loader)) == 2
    val = get_dataloader(config, get_dataset(config, False), False, rank=1, world_size=2)
    assert len(val) == 0 and batches(val) == []  # a rank without images
