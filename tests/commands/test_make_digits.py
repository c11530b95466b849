"""The demo's data set: complete, disjoint, labelled right, and the same bytes every time."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from tiny import command

from replknet_paddle.data.dataset import ListDataset

main = command("make-digits")

load_digits = pytest.importorskip(
    "sklearn.datasets", reason="scikit-learn (requirements/demo.txt) carries the digits"
).load_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "a" / "new folder"
    assert main([str(folder)]) == 0
    return folder


def entries(folder, split):
    """[(path, label)] of a list."""
    lines = (folder / f"{split}_list.txt").read_text().splitlines()
    return [(path, int(label)) for path, label in (line.rsplit(" ", 1) for line in lines)]


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_split_is_1437_and_360_and_disjoint(digits):
    train, val = ([path for path, _ in entries(digits, split)] for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert len(set(train) | set(val)) == 1797
    assert all(path.startswith("train/") for path in train)
    assert all(path.startswith("val/") for path in val)
    files = {str(path.relative_to(digits)) for path in digits.rglob("*.png")}
    assert files == set(train) | set(val)


def test_every_scan_is_there_once_with_its_own_label(digits):
    source = load_digits()
    wanted = sorted(
        (np.round(scan * 255 / 16).astype("uint8").tobytes(), int(label))
        for scan, label in zip(source.images, source.target)
    )
    written = []
    for split in ("train", "val"):
        for path, label in entries(digits, split):
            with Image.open(digits / path) as image:
                assert image.size == (8, 8) and image.mode == "L"
                written.append((image.tobytes(), label))
            assert path.split("/")[1] == str(label)
    assert sorted(written) == wanted


def test_both_parts_hold_every_digit_in_like_shares(digits):
    for split, least in (("train", 130), ("val", 25)):
        labels = [label for _, label in entries(digits, split)]
        assert set(labels) == set(range(10))
        assert min(labels.count(digit) for digit in range(10)) >= least


def test_a_second_run_writes_the_same_bytes(digits, tmp_path):
    before = fingerprint(digits)
    assert main([str(tmp_path)]) == 0
    assert fingerprint(tmp_path) == before
    assert main([str(digits)]) == 2
    assert main([str(digits), "-overwrite"]) == 0  # over itself
    assert fingerprint(digits) == before


@pytest.mark.parametrize("split, count", [("train", 1437), ("val", 360)])
def test_the_lists_load_as_a_data_set(digits, split, count):
    def pixels(image, _):
        return np.asarray(image.convert("RGB"), dtype="float32").transpose(2, 0, 1)

    data = ListDataset(str(digits / f"{split}_list.txt"), str(digits), pixels, num_classes=10)
    assert len(data) == count
    for index in (0, count // 2, count - 1):
        image, label = data[0, index]
        assert image.shape == (3, 8, 8) and 0 <= image.min() <= image.max() <= 255
        assert label == entries(digits, split)[index][1]


def test_an_incomplete_run_leaves_no_list(tmp_path, monkeypatch):
    """run_demo.sh takes the lists as the sign that the images are there."""

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert main([str(tmp_path)]) == 2
    assert not list(tmp_path.glob("*_list.txt"))
