"""List files and images as people really have them, and the samples, batches and loaders."""

import multiprocessing
import os
import random
import signal
from io import BytesIO
from queue import Empty

import numpy as np
import pytest
from PIL import Image, features
from tiny import flags, make_data

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import ListDataset, get_dataloader, get_dataset
from replknet_paddle.data.lists import read_list
from replknet_paddle.data.samplers import EvalBatches, TrainBatches
from replknet_paddle.data.transforms.evaluation import EvalTransform
from replknet_paddle.runtime.errors import InputError, SampleError


def parse(tmp_path, content: bytes, num_classes=1000):
    """[(path, label, line number)] of a list file's content."""
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    paths, ends, lines, labels = read_list(str(file), num_classes)
    starts = [0, *ends[:-1]]
    return [
        (paths[start:end], int(label), int(line))
        for start, end, label, line in zip(starts, ends, labels, lines)
    ]


def small(image, _):
    """A transform that is nearly none."""
    return np.asarray(image.convert("RGB").resize((4, 4)), dtype="float32").transpose(2, 0, 1)


def noisy(image, rng):
    return small(image, rng) + rng.normal(size=(3, 4, 4)).astype("float32")


def write_image(path, size=(9, 7), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def one_image_set(folder, line: bytes, transform=small):
    """A data set whose list is an image that is fine, and `line`."""
    folder.mkdir(exist_ok=True)
    write_image(folder / "fine.png")
    (folder / "list.txt").write_bytes(b"fine.png 0\n\n" + line + b" 1\n")
    return ListDataset(str(folder / "list.txt"), str(folder), transform, num_classes=2)


def tiny(config_file, data, **values):
    return update_config(get_config(config_file), flags(data_path=str(data), **values))


def batches(loader):
    return [(images.numpy(), labels.numpy()) for images, labels in loader]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b) for pair in zip(first, second) for a, b in zip(*pair)
    )


# ---- list files


@pytest.mark.parametrize(
    "line, path, label",
    [
        (b"train/a.jpg 3", b"train/a.jpg", 3),
        (b"train/a.jpg\t3", b"train/a.jpg", 3),
        (b"train/a.jpg \t  3", b"train/a.jpg", 3),
        (b"train/a.jpg 3   ", b"train/a.jpg", 3),
        (b"train/a.jpg 3\t", b"train/a.jpg", 3),
        (b"  train/a.jpg 3", b"train/a.jpg", 3),
        (b"great white shark/my photo.jpg 3", b"great white shark/my photo.jpg", 3),
        (b"two  spaces\tand a tab.jpg 3", b"two  spaces\tand a tab.jpg", 3),
        (b"a 7 3", b"a 7", 3),
        (b"a.jpg 003", b"a.jpg", 3),
        (b"a.jpg 0", b"a.jpg", 0),
        (b"a.jpg 999", b"a.jpg", 999),
        (b"caf\xc3\xa9/\xe5\x9b\xbe.jpg 3", b"caf\xc3\xa9/\xe5\x9b\xbe.jpg", 3),
        (b"latin-1 caf\xe9.jpg 3", b"latin-1 caf\xe9.jpg", 3),
        (b"a..b/c...jpg 3", b"a..b/c...jpg", 3),
        (b"./a.jpg 3", b"./a.jpg", 3),
        (b'"quoted".jpg 3', b'"quoted".jpg', 3),
        (b"a,b.jpg 3", b"a,b.jpg", 3),
        (b"# no comment.jpg 3", b"# no comment.jpg", 3),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_label_is_what_follows_the_last_white_space(tmp_path, line, path, label, end):
    assert parse(tmp_path, line + end) == [(path, label, 1)]


def test_blank_lines_count_and_give_no_image(tmp_path):
    content = b"\n  \na.jpg 1\r\n\r\n\t\nb.jpg 2\n\n"
    assert parse(tmp_path, content) == [(b"a.jpg", 1, 3), (b"b.jpg", 2, 6)]


@pytest.mark.parametrize("rest", [b"a.jpg 1\nb.jpg 2\n", b"\r\na.jpg 1\r\nb.jpg 2"])
def test_a_byte_order_mark_is_no_part_of_the_first_path(tmp_path, rest):
    assert [image[:2] for image in parse(tmp_path, b"\xef\xbb\xbf" + rest)] == [
        (b"a.jpg", 1),
        (b"b.jpg", 2),
    ]


def test_a_list_names_an_image_as_often_as_it_does(tmp_path):
    assert len(parse(tmp_path, b"a.jpg 1\na.jpg 1\na.jpg 2\n")) == 3


@pytest.mark.parametrize(
    "line, says",
    [
        (b"a.jpg", "expected a path and a label, got 'a.jpg'"),
        (b"3", "expected a path and a label"),
        (b"my photo.jpg", "'photo.jpg'"),
        (b"a.jpg three", "'three'"),
        (b"a.jpg 1.0", "'1.0'"),
        (b"a.jpg 1e2", "'1e2'"),
        (b"a.jpg 0x1", "'0x1'"),
        (b"a.jpg 1_0", "'1_0'"),
        (b"a.jpg,3", "expected a path and a label"),
        (b"a.jpg \xd9\xa3", "label"),
        (b"a.jpg -1", "label -1 is outside [0, 10)"),
        (b"a.jpg 10", "label 10 is outside [0, 10); MODEL.NUM_CLASSES"),
        (b"a.jpg 99999999999999999999999", "outside [0, 10)"),
        pytest.param(b"a.jpg " + b"9" * 5000, "label", id="5000 digits"),
        (b"../a.jpg 3", "'../a.jpg 3'"),
        (b"x/../a.jpg 3", "inside the data folder"),
        (b"x/.. 3", "inside the data folder"),
        (b"/etc/passwd 3", "relative"),
        (b"//a.jpg 3", "relative"),
        (b"a\0.jpg 3", "path"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, line, says, end):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, b"fine.jpg 0" + end + end + line + end, num_classes=10)
    [message] = str(caught.value).splitlines()
    assert message.startswith(f"{tmp_path / 'list.txt'}, line 3: ")
    assert says in message and len(message) < 1000


def test_several_wrong_lines_are_reported_together(tmp_path):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, b"a\nb.jpg 1\n\nc.jpg x\nd.jpg 9\ne.jpg 2\n../f 1\n", num_classes=3)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].rsplit(" ")[-1] for line in lines] == ["1", "4", "5", "7"]


def test_a_list_that_is_wrong_throughout_does_not_flood(tmp_path):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, b"a.jpg 5\n" * 10_000, num_classes=5)
    assert len(str(caught.value).splitlines()) <= 11


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_list_without_images_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"list\.txt lists no image"):
        parse(tmp_path, content)


def test_paths_and_line_numbers_of_images(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\none two.jpg 1\nth\xe9.jpg 0\n\nf.jpg 1\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), small, num_classes=2)
    assert len(data) == 3
    assert [data.path(i) for i in range(3)] == ["one two.jpg", os.fsdecode(b"th\xe9.jpg"), "f.jpg"]
    assert data.labels.tolist() == [1, 0, 1] and data.labels.dtype == np.int64


@pytest.mark.parametrize("is_train, name", [(True, "train_list.txt"), (False, "val_list.txt")])
def test_a_missing_folder_or_list_says_what_to_prepare(tmp_path, tiny_config_file, is_train, name):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as caught:
        get_dataset(tiny(tiny_config_file, nowhere), is_train)
    assert str(caught.value).startswith(f"no data folder {nowhere}; ")
    with pytest.raises(FileNotFoundError) as caught:
        get_dataset(tiny(tiny_config_file, tmp_path), is_train)
    assert str(caught.value).startswith(f"no list file {tmp_path / name}; ")
    for part in ("-data_path", "train_list.txt", "val_list.txt", "class"):
        assert part in str(caught.value)


def test_a_file_in_place_of_the_folder_and_a_folder_in_place_of_the_list(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no data folder"):
        ListDataset(str(tmp_path / "file"), str(tmp_path / "file"), small, num_classes=2)
    with pytest.raises(FileNotFoundError, match="no list file"):
        ListDataset(str(tmp_path), str(tmp_path), small, num_classes=2)


# ---- images


def test_a_sample_is_what_the_transform_gives_and_the_label(tmp_path):
    pixels, label = one_image_set(tmp_path, b"fine.png")[0, 1]
    assert label == 1 and isinstance(label, np.int64)
    assert pixels.shape == (3, 4, 4) and (pixels == 100).all()


@pytest.mark.parametrize("name", ["with space.png", "caf\u00e9 \u56fe.png", "a..b.png", "#x.png"])
def test_odd_names_open(tmp_path, name):
    data = one_image_set(tmp_path, name.encode())
    write_image(tmp_path / name)
    assert data[0, 1][1] == 1


def test_a_name_that_is_not_utf8_opens(tmp_path):
    data = one_image_set(tmp_path, b"caf\xe9.png")
    os.rename(tmp_path / "fine.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    assert data[0, 1][1] == 1


def links(tmp_path):
    """A data folder with links of all kinds: {line: whether the image may be read}."""
    outside, data = tmp_path / "outside", tmp_path / "data"
    data.mkdir()
    write_image(outside / "secret.png")
    write_image(outside / "deep" / "secret.png")
    write_image(tmp_path / "data2" / "secret.png")  # its path begins as the data folder's does
    write_image(data / "real" / "a.png")
    (data / "file").symlink_to(outside / "secret.png")
    (data / "relative").symlink_to("../outside/secret.png")
    (data / "twice").symlink_to("file")
    (data / "folder").symlink_to(outside)
    (data / "up").symlink_to("..")
    (data / "neighbour").symlink_to(tmp_path / "data2")
    (data / "inside").symlink_to("real/a.png")
    (data / "inside absolute").symlink_to(data / "real" / "a.png")
    (data / "inside folder").symlink_to(data / "real")
    (data / "real" / "there and back").symlink_to("../../data/real/a.png")
    return {
        "file": False,
        "relative": False,
        "twice": False,
        "folder/secret.png": False,
        "folder/deep/secret.png": False,
        "up/outside/secret.png": False,
        "up/data2/secret.png": False,
        "neighbour/secret.png": False,
        "inside": True,
        "inside absolute": True,
        "inside folder/a.png": True,
        "real/there and back": True,
    }


def test_links_are_followed_inside_the_data_folder_and_not_out_of_it(tmp_path):
    for line, allowed in links(tmp_path).items():
        data = one_image_set(tmp_path / "data", line.encode())
        if allowed:
            assert data[0, 1][1] == 1, line
        else:
            with pytest.raises(SampleError, match="outside the data folder") as caught:
                data[0, 1]
            assert "line 3" in str(caught.value) and line in str(caught.value)


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_data_folder_itself_may_be_a_link(tmp_path, slash, monkeypatch):
    write_image(tmp_path / "disk" / "class" / "a.png")
    (tmp_path / "disk" / "list.txt").write_text("class/a.png 0\n")
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.chdir(tmp_path)
    for root in (str(tmp_path / "link") + slash, "link" + slash, "./disk"):
        data = ListDataset(os.path.join(root, "list.txt"), root, small, num_classes=1)
        assert data[0, 0][1] == 0


def test_the_root_folder_can_be_the_data_folder(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{str(tmp_path)[1:]}/a.png 0\n")
    assert ListDataset(str(tmp_path / "list.txt"), "/", small, num_classes=1)[0, 0][1] == 0


def broken(folder):
    """Files that are no image: {name: part of the reason}."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype("uint8"))
    for name, form in (("half.jpg", "JPEG"), ("half.png", "PNG")):
        buffer = BytesIO()
        image.save(buffer, form)
        (folder / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "dangling.jpg").symlink_to("nothing.jpg")
    Image.fromarray(np.full((8, 8), 40_000, dtype="uint16")).save(folder / "deep.png")
    return {
        "missing.jpg": "no such file",
        "no folder/missing.jpg": "no such file",
        "dangling.jpg": "no such file",
        "half.jpg": "truncated",
        "half.png": "",
        "empty.jpg": "cannot identify",
        "text.jpg": "cannot identify",
        "folder.jpg": "regular",
        "text.jpg/a.jpg": "",
        "loop.jpg": "",
        "x" * 300: "",
        "deep.png": "8 bits",
    }


def evaluation(image, _):
    mean = std = (0.5, 0.5, 0.5)
    return EvalTransform(image_size=8, crop_pct=1.0, mode="warp", mean=mean, std=std)(image)


def test_an_image_that_cannot_be_read_is_named_by_list_line_and_path(tmp_path):
    for path, reason in broken(tmp_path).items():
        data = one_image_set(tmp_path, path.encode(), evaluation)
        with pytest.raises(SampleError) as caught:
            data[0, 1]
        [message] = str(caught.value).splitlines()
        start = f"{tmp_path / 'list.txt'}, line 3: cannot read image {path}: "
        assert message.startswith(start)
        assert reason in message[len(start) :] and len(message) > len(start)
        assert isinstance(caught.value, InputError)


def test_an_image_too_large_to_be_honest_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = one_image_set(tmp_path, b"fine.png")
    with pytest.raises(SampleError, match="line 3: cannot read image fine.png: .*bomb"):
        data[0, 1]


FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_give_a_sample_or_a_sample_error(tmp_path, form):
    if form in ("WEBP", "AVIF") and not features.check(form.lower()):
        pytest.skip(f"this Pillow reads no {form}")
    draw = random.Random(0)
    buffer = BytesIO()
    Image.frombytes("RGB", (20, 24), draw.randbytes(1440)).save(buffer, form)
    data = one_image_set(tmp_path, b"damaged", evaluation)
    failures = 0
    for i in range(150):
        content = bytearray(buffer.getvalue())
        if i % 3 == 0:
            content = content[: draw.randrange(len(content))]
        for _ in range(min(i % 4, len(content))):
            content[draw.randrange(draw.choice([min(len(content), 200), len(content)]))] = (
                draw.randrange(256)
            )
        (tmp_path / "damaged").write_bytes(content)
        try:
            assert data[0, 1][0].shape == (3, 8, 8)
        except SampleError as error:
            failures += 1
            assert len(str(error).splitlines()) == 1 and "line 3" in str(error)
    assert failures


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
    config = tiny(tiny_config_file, tmp_path, batch_size_eval=2, opts=opts)
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


# ---- samples


def test_samples_are_the_same_whatever_the_workers(tiny_config_file, tiny_data):
    """With all of the recipe's augmentation."""
    seen = []
    for workers in (0, 2):
        config = tiny(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", str(workers)])
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
    config = tiny(tiny_config_file, tiny_data)
    forward = [get_dataset(config, True)[2, i][0] for i in range(10)]
    data = get_dataset(config, True)
    np.random.seed(7)
    random.seed(7)
    backward = [data[2, i][0] for i in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    other = get_dataset(tiny(tiny_config_file, tiny_data, opts=["SEED", "43"]), True)
    assert not any(np.array_equal(forward[i], data[3, i][0]) for i in range(10))
    assert not any(np.array_equal(forward[i], other[2, i][0]) for i in range(10))


def test_two_entries_of_one_image_are_drawn_apart(tmp_path):
    data = one_image_set(tmp_path, b"fine.png", noisy)
    assert not np.array_equal(data[0, 0][0], data[0, 1][0])


def test_evaluation_samples_depend_on_the_image_alone(tiny_config_file, tiny_data):
    first = get_dataset(tiny(tiny_config_file, tiny_data), False)
    second = get_dataset(tiny(tiny_config_file, tiny_data, opts=["SEED", "1"]), False)
    for i in (0, 50, 100):
        assert np.array_equal(first[0, i][0], second[5, i][0])


def test_get_dataset_takes_list_seed_and_classes_from_the_config(tiny_config_file, tiny_data):
    config = tiny(tiny_config_file, tiny_data, opts=["SEED", "9"])
    train, val = get_dataset(config, True), get_dataset(config, False)
    assert (len(train), len(val), train.seed) == (60, 101, 9)
    assert train.path(0).startswith("train/class 0/") and val.path(0).startswith("val/class 0/")
    assert val.labels.tolist() == [i % 4 for i in range(101)]
    with pytest.raises(InputError, match="label 3 is outside"):
        get_dataset(tiny(tiny_config_file, tiny_data, opts=["MODEL.NUM_CLASSES", "3"]), True)


# ---- batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("length", [20, 47])
def test_ranks_partition_each_global_batch(length, batch_size, world_size):
    ranks = [
        TrainBatches(length, batch_size, rank=rank, world_size=world_size, seed=3)
        for rank in range(world_size)
    ]
    for sampler in ranks:
        sampler.set_epoch(2)
    steps = list(zip(*ranks))
    assert all(len(sampler) == len(list(sampler)) == len(steps) for sampler in ranks)
    assert len(steps) == length // (batch_size * world_size)  # an incomplete one is left out
    seen = [name for step in steps for batch in step for name in batch]
    assert all(len(batch) == batch_size for step in steps for batch in step)
    assert len(set(seen)) == len(seen) == len(steps) * batch_size * world_size
    assert {epoch for epoch, _ in seen} == {2}
    assert {index for _, index in seen} <= set(range(length))


@pytest.mark.parametrize("accum_iter", [1, 2, 3, 16])
def test_an_epoch_has_whole_optimizer_steps_only(accum_iter):
    for length in range(100):
        batches = TrainBatches(length, 2, rank=1, world_size=3, seed=0, accum_iter=accum_iter)
        assert len(batches) == len(list(batches)) == length // (6 * accum_iter) * accum_iter


@pytest.mark.parametrize("length, batch_size", [(16, 4), (47, 3), (100, 1)])
def test_two_ranks_see_in_each_step_what_one_sees_with_twice_the_batch(length, batch_size):
    one = TrainBatches(length, 2 * batch_size, rank=0, world_size=1, seed=5)
    two = [TrainBatches(length, batch_size, rank=rank, world_size=2, seed=5) for rank in (0, 1)]
    for epoch in (0, 1):
        for sampler in (one, *two):
            sampler.set_epoch(epoch)
        steps = [first + second for first, second in zip(*two)]
        assert [sorted(step) for step in steps] == [sorted(step) for step in one]
        assert len(steps) == len(one)


@pytest.mark.parametrize("first_batch", [0, 1, 4, 9, 10])
def test_a_resumed_epoch_goes_on_exactly(first_batch):
    whole = TrainBatches(41, 2, rank=1, world_size=2, seed=5)
    whole.set_epoch(4)
    resumed = TrainBatches(41, 2, rank=1, world_size=2, seed=5)
    resumed.set_epoch(4, first_batch)
    assert list(resumed) == list(whole)[first_batch:]
    assert len(resumed) == len(whole) == 10
    resumed.set_epoch(5)  # from the start again
    whole.set_epoch(5)
    assert list(resumed) == list(whole)


def test_each_epoch_and_seed_has_its_own_order_and_each_epoch_all_images():
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (1, 2), (2, 0)):
        sampler = TrainBatches(60, 5, rank=0, world_size=1, seed=seed)
        sampler.set_epoch(epoch)
        order = [index for batch in sampler for _, index in batch]
        assert order == [index for batch in sampler for _, index in batch]
        assert sorted(order) == list(range(60)) and order != sorted(order)
        orders.append(tuple(order))
    assert len(set(orders)) == 4


def test_images_left_out_of_an_epoch_have_their_turn_in_another():
    sampler = TrainBatches(9, 4, rank=0, world_size=2, seed=0)
    left_out = set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        left_out |= set(range(9)) - {index for batch in sampler for _, index in batch}
    assert left_out == set(range(9))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [1, 3, 40, 101])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 40, 200])
def test_evaluation_sees_every_image_exactly_once(length, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        sampler = EvalBatches(length, batch_size, rank=rank, world_size=world_size)
        listed = list(sampler)
        assert len(sampler) == len(listed)
        assert all(1 <= len(batch) <= batch_size for batch in listed)
        assert all(len(batch) == batch_size for batch in listed[:-1])
        seen += [name for batch in listed for name in batch]
    assert sorted(seen) == [(0, index) for index in range(length)]


# ---- loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_the_validation_loader_gives_every_image_in_order(tiny_config_file, tiny_data, workers):
    opts = ["DATA.NUM_WORKERS", str(workers)]
    config = tiny(tiny_config_file, tiny_data, batch_size_eval=16, opts=opts)
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
        config = tiny(tiny_config_file, tiny_data, **values)
        loader = get_dataloader(config, get_dataset(config, False), False)
        assert loader.batch_sampler.batch_size == expected


def test_loaders_of_ranks_share_the_images(tiny_config_file, tiny_data):
    config = tiny(tiny_config_file, tiny_data)
    data = {is_train: get_dataset(config, is_train) for is_train in (True, False)}
    for is_train in (True, False):
        names = []
        for rank in range(3):
            loader = get_dataloader(config, data[is_train], is_train, rank=rank, world_size=3)
            names += [name for batch in loader.batch_sampler for name in batch]
        assert len(set(names)) == len(names) == (24 if is_train else 101)


def test_an_iteration_may_be_left_and_begun_anew(tiny_config_file, tiny_data):
    config = tiny(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", "2"])
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
    config = tiny(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", "2"])
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
        config = tiny(tiny_config_file, tiny_data, opts=["DATA.NUM_WORKERS", str(workers)])
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
    config = tiny(tiny_config_file, tiny_data, batch_size=batch_size)
    data = get_dataset(config, True)
    with pytest.raises(InputError) as caught:
        get_dataloader(config, data, True, world_size=world_size)
    for part in ("train_list.txt", "60 images", f"{batch_size}", f"{world_size} ", "-batch_size"):
        assert part in str(caught.value)
    get_dataloader(config, get_dataset(config, False), False, world_size=world_size)


def test_as_many_images_as_a_batch_are_enough(tmp_path, tiny_config_file):
    make_data(tmp_path, train=16, val=1)
    config = tiny(tiny_config_file, tmp_path, batch_size=4)
    loader = get_dataloader(config, get_dataset(config, True), True, world_size=2)
    assert len(loader) == 2 and len(batches(loader)) == 2
    val = get_dataloader(config, get_dataset(config, False), False, rank=1, world_size=2)
    assert len(val) == 0 and batches(val) == []  # a rank without images
