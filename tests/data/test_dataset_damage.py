"""Data sets as bad as they come: bad images in a loader, fuzzing, and the memory all this takes."""

import gc
import logging
import os
import resource
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiny import flags

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data import loader as loader_module
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.data.dataset import ListDataset, get_dataloader, get_dataset
from replknet_paddle.data.lists import read_list
from replknet_paddle.data.loader import available_memory_bytes, check_memory
from replknet_paddle.data.transforms.evaluation import EvalTransform
from replknet_paddle.runtime.errors import InputError, SampleError
from replknet_paddle.zoo import find_record, list_models


def configured(tiny_config_file, folder, *opts, **values):
    opts = [str(option) for option in opts]
    return update_config(
        get_config(tiny_config_file), flags(data_path=str(folder), opts=opts, **values)
    )


def picture(seed: int, form: str = "JPEG", size=(40, 36)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def data_with(folder, bad: dict[int, bytes], count: int = 24):
    """`count` images in both lists, some of them with other content than they should have."""
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(bad.get(i, picture(i)))
    for split in ("train", "val"):
        lines = [f"{i}.jpg {i % 4}\n" for i in range(count)]
        (folder / f"{split}_list.txt").write_text("".join(lines))


def epoch(loader, number: int):
    loader.batch_sampler.set_epoch(number)
    return [(images.numpy(), labels.numpy()) for images, labels in loader]


# ---- bad images in training and evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_images_are_replaced_and_named_once(
    tmp_path, tiny_config_file, caplog, workers
):
    data_with(tmp_path, {5: b"text", 6: picture(6)[:300]})  # 5's successor is unreadable as well
    config = configured(
        tiny_config_file, tmp_path, "DATA.MAX_BAD_IMAGES", 2, "DATA.NUM_WORKERS", workers
    )
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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_without_being_decoded(tmp_path):
    header = b"P6 %d %d 255\n"
    for name, width, height in (("wide", 60_000, 60_000), ("large", 10_000, 9_000)):
        (tmp_path / name).write_bytes(header % (width, height))
    (tmp_path / "list.txt").write_text("wide 0\nlarge 0\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), None, num_classes=1)
    for index in range(2):
        with pytest.raises(SampleError, match="bomb"):
            data[0, index]


def test_formats_whose_readers_start_programs_are_refused(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(script)
    (tmp_path / "list.txt").write_text("a.jpg 0\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), None, num_classes=1)
    with pytest.raises(SampleError, match="cannot identify"):
        data[0, 0]


def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "list.txt").write_text("pipe.jpg 0\nfolder.jpg 0\n")
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), None, num_classes=1)
    for index in range(2):
        with pytest.raises(SampleError, match="not a regular file"):
            data[0, index]


def test_paths_outside_can_be_allowed(tmp_path, tiny_config_file):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "data" / "link.jpg").symlink_to("../a.jpg")
    lines = f"../a.jpg 0\n{tmp_path}/a.jpg 0\nlink.jpg 0\n"
    (tmp_path / "data" / "val_list.txt").write_text(lines)
    config = configured(tiny_config_file, tmp_path / "data", "DATA.ALLOW_OUTSIDE", True)
    data = get_dataset(config, False)
    assert all(np.array_equal(data[0, i][0], data[0, 0][0]) for i in range(3))
    with pytest.raises(InputError, match=r"DATA\.ALLOW_OUTSIDE"):
        get_dataset(configured(tiny_config_file, tmp_path / "data"), False)


# ---- what goes with the images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_train", [True, False])
def test_finishing_on_the_device_gives_the_workers_bits(
    tmp_path, tiny_config_file, workers, is_train
):
    data_with(tmp_path, {})
    seen = []
    for on_device in (True, False):
        config = configured(
            tiny_config_file, tmp_path, "DATA.NUM_WORKERS", workers,
            "DATA.FINISH_ON_DEVICE", on_device, "TRAIN.RANDOM_ERASE_PROB", 0.0,
        )  # fmt: skip
        loader = get_dataloader(config, get_dataset(config, is_train), is_train)
        seen.append([images.numpy() for images, _ in loader])
    assert all(np.array_equal(a, b) for a, b in zip(*seen))


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


def test_class_names_come_from_the_config_or_beside_the_lists_or_the_project(
    tmp_path, tiny_config_file
):
    config = configured(tiny_config_file, tmp_path)
    assert get_class_names(config) is None
    (tmp_path / "class_names.txt").write_text("a\nb\nc\nd\n")
    assert get_class_names(config) == ["a", "b", "c", "d"]
    other = tmp_path / "other.txt"
    other.write_bytes("\ufeffâne\r\nb b\r\nc\r\nd".encode())
    named = configured(tiny_config_file, tmp_path, "DATA.CLASS_NAMES", other)
    assert get_class_names(named) == ["âne", "b b", "c", "d"]
    other.write_text("a\n\nc\n")
    with pytest.raises(InputError, match="3 lines, 1 of them empty; allowed: .* 4 classes"):
        get_class_names(named)
    with pytest.raises(FileNotFoundError, match="nothing"):
        get_class_names(configured(tiny_config_file, tmp_path, "DATA.CLASS_NAMES", "nothing"))


def test_imagenet_names_are_in_the_order_of_the_synsets(tmp_path, tiny_config_file):
    config = get_config("configs/replknet_31b.yaml")
    names = get_class_names(config)
    assert len(set(names)) == 1000
    known = {0: "tench", 134: "crane bird", 207: "golden retriever", 388: "giant panda"}
    known |= {517: "crane", 638: "maillot", 999: "toilet tissue"}
    assert {index: names[index] for index in known} == known


def test_only_a_config_that_says_so_gets_imagenets_names(tmp_path, tiny_config_file):
    other = configured(tiny_config_file, tmp_path, "MODEL.NUM_CLASSES", 1000)
    assert get_class_names(other) is None
    for record in list_models():
        config = get_config(f"configs/{find_record(record).config}", DATA__DATA_PATH=str(tmp_path))
        assert (get_class_names(config) is not None) == (config.MODEL.NUM_CLASSES == 1000)
    tuned = get_config("configs/replknet_31b.yaml", MODEL__NUM_CLASSES=5)
    assert get_class_names(tuned) is None
    (tmp_path / "class_names.txt").write_text("own\n" * 1000)
    own = get_config("configs/replknet_31b.yaml", DATA__DATA_PATH=str(tmp_path))
    assert get_class_names(own) == ["own"] * 1000


# ---- fuzzing


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with bytes changed, cut off, doubled or moved; most of it near the beginning."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(min(len(data), 64 if rng.random() < 0.5 else len(data)) or 1))
        kind = rng.integers(5)
        if kind == 0:
            data[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place : place + int(rng.integers(1, 30))]
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 30))]
        else:
            data[place : place + 2] = [(0, 0), (255, 255), (127, 255), (0, 1)][rng.integers(4)]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_mutated_images_give_a_sample_or_a_sample_error(tmp_path):
    seeds = [picture(0, "JPEG", (20, 17)), picture(1, "PNG", (9, 11))]
    extra = BytesIO()
    Image.fromarray(np.zeros((9, 9, 4), np.uint8), "CMYK").save(extra, "JPEG")
    grey = BytesIO()
    Image.new("L", (12, 10), 77).save(grey, "JPEG", progressive=True)
    palette = BytesIO()
    Image.new("P", (12, 10), 7).save(palette, "PNG")
    seeds += [extra.getvalue(), grey.getvalue(), palette.getvalue()]
    file = tmp_path / "image"
    (tmp_path / "list.txt").write_text("image 0\n")
    transform = EvalTransform(image_size=8, crop_pct=0.875, mode="short_crop", mean=(0,), std=(1,))
    data = ListDataset(str(tmp_path / "list.txt"), str(tmp_path), transform.pixels, num_classes=1)
    rng, errors, slowest = np.random.default_rng(0), 0, 0.0
    for i in range(10_000):
        if i == 2000:
            gc.collect()
            before = resident_bytes()
        file.write_bytes(mutated(seeds[i % len(seeds)], rng))
        start = time.process_time()
        try:
            assert data.read(0, 0, lambda image, _: transform.pixels(image)).shape == (8, 8, 3)
        except SampleError as error:
            errors += 1
            assert "line 1: cannot read image image: " in str(error) and "\n" not in str(error)
        slowest = max(slowest, time.process_time() - start)
    assert 1000 < errors < 9900
    assert slowest < 5
    gc.collect()
    assert resident_bytes() - before < 30e6


def test_ten_thousand_mutated_lists_give_labels_or_an_input_error(tmp_path):
    seeds = [
        b"train/a.jpg 1\ntrain/b c.jpg 2\n\nval/c.png 3\n",
        b"\xef\xbb\xbfa/b/c.JPEG 0\r\nd.jpg\t9\r\n",
        b"x 1\n" * 20,
    ]
    file = tmp_path / "list.txt"
    rng, errors = np.random.default_rng(1), 0
    for i in range(10_000):
        if i == 1000:
            before = resident_bytes()
        file.write_bytes(mutated(seeds[i % len(seeds)], rng))
        try:
            data = ListDataset(str(file), str(tmp_path), None, num_classes=10)
        except InputError as error:
            errors += 1
            assert str(file) in str(error)
            continue
        assert ((data.labels >= 0) & (data.labels < 10)).all()
        for index in range(len(data)):
            path = data.path(index)
            assert path and not path.startswith("/") and ".." not in path.split("/")
            with pytest.raises(SampleError):
                data[0, index]
    assert 500 < errors < 9500
    assert resident_bytes() - before < 30e6


def test_read_list_reports_ten_problems_at_most(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"bad\n" * 50)
    with pytest.raises(InputError) as error:
        read_list(str(tmp_path / "list.txt"), 10)
    assert len(str(error.value).splitlines()) == 10


# ---- memory


def memory_bytes(pid: int) -> int:
    """Memory of a process; its share of pages that were forked, without files it has mapped."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        kilobytes = dict(line.split()[:2] for line in file if line.startswith("Pss_"))
    return 1024 * (int(kilobytes["Pss_Anon:"]) + int(kilobytes["Pss_Shmem:"]))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_memory_of_workers_and_parent_stays_flat(tmp_path, tiny_config_file):
    for i in range(50):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i, size=(500, 375)))
    lines = "".join(f"{i % 50}.jpg {i % 4}\n" for i in range(2000))
    (tmp_path / "train_list.txt").write_text(lines)
    config = configured(
        tiny_config_file, tmp_path, "DATA.IMAGE_SIZE", 224, "DATA.NUM_WORKERS", 2,
        "TRAIN.RAND_AUGMENT", True, batch_size=10,
    )  # fmt: skip
    loader = get_dataloader(config, get_dataset(config, True), True)
    used = []
    for number in range(5):
        loader.batch_sampler.set_epoch(number)
        assert sum(len(labels) for _, labels in loader) == 2000
        gc.collect()
        workers = loader.worker_pids()
        used.append([memory_bytes(pid) for pid in (os.getpid(), *workers)])
    used = np.array(used) / 1e6
    print("MB of parent and workers after each epoch:", used.round(1).tolist())
    assert (np.abs(used[1:] / used[0] - 1) < 0.02).all()
